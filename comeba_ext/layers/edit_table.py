"""A table of edits beside a model's layers, and which of them a prompt asks for."""

from __future__ import annotations

import json
import math
from contextlib import contextmanager
from typing import ClassVar, NamedTuple

import torch
from torch import nn

from comeba_ext.errors import ComebaError
from comeba_ext.forward.architectures import Architecture
from comeba_ext.forward.question_states import USUAL, VIEWS, Asked, asked_about, nearness, place_of, question_states, sentence_of
from comeba_ext.layers.attachment import disabled
from comeba_ext.layers.prompts import UNREAD, PromptReader
from comeba_ext.text.names import named_in

QUESTIONS = "comeba_questions"  # where a gate stands in the model


class Questions(NamedTuple):
    """How it is told what a prompt asks.

    Attributes:
        place: where in the decoder (:func:`~comeba_ext.forward.question_states.place_of`), and ``width``: how wide that is.
        floor: how near to an edited prompt it must be.
    """

    place: str
    width: int
    floor: float


def questions_in(model: nn.Module, floor: float | None, architecture: Architecture) -> Questions | None:
    """How a model is to tell questions; ``None``, without a floor: not at all."""
    return None if floor is None else Questions(*place_of(model, architecture), floor)


class EditTable(PromptReader):
    """An entry an edit, and beside it rows of tensors.

    Args:
        questions: how it is told what is asked; ``None``: it is not.

    Class attributes:
        by_edit: names of buffers that have a row an edit, or none.

    Attributes:
        packed: the entries, as JSON in bytes: a list of dictionaries with the ``id`` of a request and, where it is told what is asked,
            its ``subject``.
        asked, usual, form: what each edit's prompt asks (:class:`~comeba_ext.forward.question_states.Asked`); absent without ``questions``.
    """

    precise = ("asked", "usual")
    by_edit: ClassVar[tuple[str, ...]] = Asked._fields

    def __init__(self, device=None, questions: Questions | None = None):
        super().__init__()
        self.register_buffer("packed", torch.zeros(0, dtype=torch.uint8, device=device))
        if questions is not None:
            self.register_buffer("asked", torch.zeros(0, len(VIEWS), questions.width, device=device))
            self.register_buffer("usual", torch.zeros(0, len(USUAL), len(VIEWS), questions.width, device=device))
            self.register_buffer("form", torch.zeros(0, dtype=torch.int64, device=device))
        self.questions, self._read = questions, None

    @property
    def entries(self) -> list[dict]:
        return self.unpacked(self.packed)

    def unpacked(self, packed: torch.Tensor) -> list[dict]:
        read = self._read  # one look: another thread may be here, or edit
        version = None if packed.is_inference() else packed._version  # load_state_dict writes in place
        if read is None or read[0] is not packed or read[1] != version:
            read = self._read = packed, version, json.loads(packed.cpu().numpy().tobytes()) if len(packed) else []
        return read[2]

    def as_packed(self, entries: list[dict]) -> torch.Tensor:
        text = bytearray(json.dumps(entries).encode()) if entries else bytearray()
        packed = torch.frombuffer(text, dtype=torch.uint8) if text else torch.zeros(0, dtype=torch.uint8)
        return packed.to(self.packed.device)

    def hold(self, **buffers: torch.Tensor) -> None:
        """Put these in the place of what it held, all at once: whoever asks meanwhile has the old ones, or the new ones."""
        self._buffers = {**self._buffers, **buffers}

    def rows(self) -> dict[str, torch.Tensor]:
        """Its buffers with a row an edit."""
        return {name: own for name, own in self._buffers.items() if name in self.by_edit}

    def add(self, entries: list[dict], rows: dict[str, torch.Tensor], **more: torch.Tensor) -> None:
        """Take in edits, with their rows of buffers, and what other buffers are to hold then."""
        rows = {name: torch.cat([own, rows[name].to(own)]) for name, own in self.rows().items()}
        self.hold(packed=self.as_packed(self.entries + entries), **rows, **more)

    def drop(self, gone: set[str]) -> None:
        """Take out the edits of some requests, by their ids."""
        kept = [n for n, own in enumerate(self.entries) if own["id"] not in gone]
        rows = {name: own[kept] for name, own in self.rows().items()}
        self.hold(packed=self.as_packed([self.entries[n] for n in kept]), **rows)

    def nbytes_with(self, more: int) -> int:
        """Bytes of the rows with so many edits more."""
        count = len(self.entries) + more
        return sum(count * own.element_size() * math.prod(own.shape[1:]) for own in self.rows().values())

    # -- what a prompt asks -------------------------------------------------------------------------------------

    def asked_for(self, prompts: list[str], named: list[set[str]], entries: list[dict], held: dict[str, torch.Tensor]) -> list[list[int]]:
        """Numbers of the edits that each prompt asks for, of those of the subjects that it names.

        Args:
            entries, held: of one look at what it holds.
        """
        if not any(named):  # as most prompts
            return [[] for _ in prompts]
        of_subject: dict[str, list[int]] = {}
        for n, entry in enumerate(entries):
            of_subject.setdefault(entry["subject"], []).append(n)
        pairs = [(n, subject, sentence_of(prompts[n], subject)) for n, own in enumerate(named) for subject in sorted(own)]
        sentences = list(dict.fromkeys(sentence for _, _, sentence in pairs))
        states = dict(zip(sentences, self.states(sentences), strict=True))
        kept: list[list[int]] = [[] for _ in prompts]
        for n, subject, sentence in pairs:
            own = of_subject[subject]
            near = nearness(sentence, states[sentence], Asked(*(held[name][own].cpu() for name in Asked._fields))).tolist()
            kept[n] += [number for number, value in zip(own, near, strict=True) if value >= self.questions.floor]
        return [sorted(own) for own in kept]

    def states(self, prompts: list[str]) -> torch.Tensor:
        """:func:`~comeba_ext.forward.question_states.question_states` of the model that it stands in."""
        with self.reading() as reading:
            return question_states(*reading, prompts)

    def questions_of(self, asked: list[tuple[list[str], str]]) -> dict[str, torch.Tensor]:
        """What prompts ask of their subjects, prompts of one together, as rows of its buffers; empty without ``questions``."""
        if self.questions is None:
            return {}
        with self.reading() as reading:
            found = [asked_about(*reading, prompts, subject) for prompts, subject in asked]
        return {name: torch.cat(rows) for name, rows in zip(Asked._fields, zip(*found, strict=True), strict=True)}

    @contextmanager
    def reading(self):
        """Inside, its model's edits are off for this thread; gives the decoder, where to look and the tokenizer.

        Raises:
            ComebaError: the tokenizer is not known.
        """
        if self.tokenizer is None or self.context is None:
            raise ComebaError(UNREAD)
        with disabled(self.context.decoder) as decoder:
            yield decoder, self.questions.place, self.tokenizer

    # -- as any attachment --------------------------------------------------------------------------------------

    def ways(self) -> tuple:
        """What another table must have in common with it to be one with it."""
        return type(self), self.questions

    def join(self, other: EditTable) -> None:
        if not isinstance(other, EditTable) or self.ways() != other.ways():
            return super().join(other)
        self.add(other.entries, other.rows())
        self.tokenizer = other.tokenizer if self.tokenizer is None else self.tokenizer

    def take_over(self, other: EditTable) -> None:
        self.hold(**{name: own.clone() for name, own in other.own_buffers().items()})  # never in place: all of it at once

    def restore(self, tensors: dict[str, torch.Tensor]) -> None:
        super().restore(tensors)
        if not all(isinstance(own, dict) and self.fits(own) for own in self.entries):
            raise ValueError("an edit in the table is malformed")
        if any(len(own) != len(self.entries) for own in self.rows().values()):
            raise ValueError(f"the table's edits and {' and '.join(self.rows())} are not equally many")

    def fits(self, entry: dict) -> bool:
        """Whether an entry is one of its own."""
        raise NotImplementedError


class QuestionGate(EditTable):
    """Of hooked layers' edits, those whose subject a prompt names and whose questions it does not ask are muted while ``generate`` answers
    it: a subject's edits are felt where one of them is asked for. (A ``forward`` does not know where a question ends, and is as without.)

    An edit has an entry for its prompt and one for each of its ``wordings``: ``id``, ``subject`` and, as hashes, the ``names`` of it that
    the layers know.
    """

    def muted(self, prompts: list[str]) -> list[list[int]]:
        held = self._buffers  # one look: what is in it belongs together
        entries = self.unpacked(held["packed"])
        names: dict[str, set[int]] = {}
        for own in entries:
            names.setdefault(own["subject"], set()).update(own["names"])
        named = [named_in(prompt, names) for prompt in prompts]
        asked = [{entries[n]["subject"] for n in own} for own in self.asked_for(prompts, named, entries, held)]
        return [[name for subject in all_ - own for name in names[subject]] for all_, own in zip(named, asked, strict=True)]

    def fits(self, entry: dict) -> bool:
        names = entry.get("names")
        texts = all(isinstance(entry.get(name), str) for name in ("id", "subject"))
        return set(entry) == {"id", "subject", "names"} and texts and isinstance(names, list) and all(type(own) is int for own in names)
