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
from comeba_ext.forward.question_states import USUAL, VIEWS, Asked, asked_of_all, nearness, place_of, question_states, sentence_of
from comeba_ext.layers.attachment import disabled
from comeba_ext.layers.prompts import UNREAD, Heard, PromptReader
from comeba_ext.text.names import outermost, places_in

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


class _Known(tuple):
    """What was made of something that never changes, behind that itself, by which it is known again: a copy of a table shares it."""

    def __deepcopy__(self, memo) -> _Known:
        return self


class EditTable(PromptReader):
    """An entry an edit, and beside it rows of tensors, none of which is ever written in place (but by ``load_state_dict``).

    Args:
        device: of what a subclass looks at there.
        questions: how it is told what is asked; ``None``: it is not.

    Class attributes:
        by_edit: names of buffers that have a row an edit, or none.
        on_host: names of buffers that stay on the host, where they are read, wherever the model goes.

    Attributes:
        packed: the entries, as JSON in bytes: a list of dictionaries with the ``id`` of a request and, where it is told what is asked,
            its ``subject``.
        asked, usual, form, said: what each edit's prompt asks (:class:`~comeba_ext.forward.question_states.Asked`); absent without
            ``questions``.
    """

    precise = ("asked", "usual")
    by_edit: ClassVar[tuple[str, ...]] = Asked._fields
    on_host: ClassVar[tuple[str, ...]] = ("packed", *Asked._fields)
    appended = on_host

    def __init__(self, device=None, questions: Questions | None = None):
        super().__init__()
        self.register_buffer("packed", torch.zeros(0, dtype=torch.uint8))
        if questions is not None:
            self.register_buffer("asked", torch.zeros(0, len(VIEWS), questions.width))
            self.register_buffer("usual", torch.zeros(0, len(USUAL), len(VIEWS), questions.width))
            self.register_buffer("form", torch.zeros(0, dtype=torch.int64))
            self.register_buffer("said", torch.zeros(0, dtype=torch.int64))
        self.questions, self._read = questions, None

    @property
    def entries(self) -> list[dict]:
        return self.unpacked(self.packed)

    def unpacked(self, packed: torch.Tensor) -> list[dict]:
        read = self._read  # one look: another thread may be here, or edit
        if read is None or read[0] is not packed or read[1] != _version(packed):
            read = self._read = _Known((packed, _version(packed), json.loads(packed.cpu().numpy().tobytes()) if len(packed) else []))
        return read[2]

    def as_packed(self, entries: list[dict]) -> torch.Tensor:
        text = bytearray(json.dumps(entries).encode()) if entries else bytearray()
        packed = torch.frombuffer(text, dtype=torch.uint8) if text else torch.zeros(0, dtype=torch.uint8)
        self._read = _Known((packed, _version(packed), entries))
        return packed

    def hold(self, **buffers: torch.Tensor) -> None:
        """Put these in the place of what it held, all at once: whoever asks meanwhile has the old ones, or the new ones."""
        self._buffers = {**self._buffers, **buffers}

    def rows(self) -> dict[str, torch.Tensor]:
        """Its buffers with a row an edit."""
        return {name: own for name, own in self._buffers.items() if name in self.by_edit}

    @torch.inference_mode(False)
    def add(self, entries: list[dict], rows: dict[str, torch.Tensor], **more: torch.Tensor) -> None:
        """Take in edits, with their rows of buffers, and what other buffers are to hold then."""
        rows = {name: torch.cat([own, rows[name].detach().to(own)]) for name, own in self.rows().items()}
        self.hold(packed=self.as_packed(self.entries + entries), **rows, **more)

    @torch.inference_mode(False)
    def drop(self, gone: set[str]) -> None:
        """Take out the edits of some requests, by their ids."""
        kept = [n for n, own in enumerate(self.entries) if own["id"] not in gone]
        if len(kept) == len(self.entries):
            return
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
            return asked_of_all(*reading, asked)._asdict()

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

    def _apply(self, fn, recurse: bool = True):
        """``model.cuda()`` and the like leave on the host what is read there."""
        held = {name: own for name, own in self._buffers.items() if name in self.on_host}
        super()._apply(fn, recurse)
        self.hold(**held)
        return self

    def ways(self) -> tuple:
        """What another table must have in common with it to be one with it."""
        return type(self), self.questions

    def join(self, other: EditTable) -> None:
        if type(self) is type(other) and self.questions != other.questions:
            floors = " and ".join("null" if own.questions is None else f"{own.questions.floor:g}" for own in (self, other))
            raise ComebaError(f"their settings differ: question_floor is {floors}")
        if not isinstance(other, EditTable) or self.ways() != other.ways():
            return super().join(other)
        self.add(other.entries, other.rows())
        self.tokenizer = other.tokenizer if self.tokenizer is None else self.tokenizer

    def take_over(self, other: EditTable) -> None:
        self.hold(**other.own_buffers())  # shared, since neither writes in them: all of it at once
        self._read = other._read

    def restore(self, tensors: dict[str, torch.Tensor]) -> None:
        super().restore(_with_said(tensors))
        if not all(isinstance(own, dict) and self.fits(own) for own in self.entries):
            raise ValueError("an edit in the table is malformed")
        if any(len(own) != len(self.entries) for own in self.rows().values()):
            raise ValueError(f"the table's edits and {' and '.join(self.rows())} are not equally many")

    def _load_from_state_dict(self, state_dict: dict, prefix: str, *args, **kwargs) -> None:
        state_dict.update(_with_said(state_dict, prefix))
        super()._load_from_state_dict(state_dict, prefix, *args, **kwargs)

    def fits(self, entry: dict) -> bool:
        """Whether an entry is one of its own."""
        raise NotImplementedError


def _with_said(tensors: dict[str, torch.Tensor], prefix: str = "") -> dict[str, torch.Tensor]:
    """A version before did not keep which sentences edits' prompts are."""
    form = tensors.get(f"{prefix}form")
    return tensors if form is None else {f"{prefix}said": torch.zeros_like(form), **tensors}


def _version(tensor: torch.Tensor) -> int | None:
    """How often it was written in place, as ``load_state_dict`` does."""
    return None if tensor.is_inference() else tensor._version


class QuestionGate(EditTable):
    """Of hooked layers' edits, those whose subject a prompt names and whose questions it does not ask are muted while ``generate`` answers
    it: a subject's edits are felt where one of them is asked for. (A ``forward`` does not know where a question ends, and is as without.)

    An edit has an entry for its prompt and one for each of its ``wordings``: ``id``, ``subject`` and, as hashes, the ``names`` of it that
    the layers know and the tokens that these end in, ``ends`` (of which earlier versions kept none): a last name alone may be felt too.
    """

    _known: _Known | None = None  # entries, every subject's names, the subjects

    def heard(self, prompts: list[str]) -> list[Heard]:
        held = self._buffers  # one look: what is in it belongs together
        entries = self.unpacked(held["packed"])
        names, subjects = self._names(entries)
        places = [places_in(prompt, subjects) for prompt in prompts]
        # Who is named only inside of a longer name is not asked about; that name's tokens would be felt as his all the same.
        asked = [{entries[n]["subject"] for n in own} for own in self.asked_for(prompts, list(map(outermost, places)), entries, held)]
        found = []
        for there, own in zip(places, asked, strict=True):
            kept = {name for subject in own for name in names[subject]}
            gone = {name for subject in {subject for _, _, subject in there} - own for name in names[subject]}
            found.append(Heard(sorted(gone - kept), sorted(kept)))
        return found

    def _names(self, entries: list[dict]) -> tuple[dict[str, set[int]], frozenset[str]]:
        """Every subject's names and their ends, and the subjects; kept for as long as the entries are these."""
        known = self._known  # one look: another thread may be here
        if known is None or known[0] is not entries:
            names: dict[str, set[int]] = {}
            for own in entries:
                names.setdefault(own["subject"], set()).update(own["names"], own.get("ends", ()))
            known = self._known = _Known((entries, names, frozenset(names)))
        return known[1:]

    def fits(self, entry: dict) -> bool:
        texts = all(isinstance(entry.get(name), str) for name in ("id", "subject"))
        hashes = [entry.get("names"), entry.get("ends", [])]
        known = {*entry, "ends"} == {"id", "subject", "names", "ends"} and all(isinstance(own, list) for own in hashes)
        return known and texts and all(type(own) is int for part in hashes for own in part)
