"""Editing without weights: the new fact stands before the question (Zheng et al. 2023, IKE, arXiv 2305.12740)."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

import torch

from comeba_ext.data import read_requests
from comeba_ext.editing.config import EditConfig, check_fields
from comeba_ext.editing.report import Phases
from comeba_ext.editing.session import Session
from comeba_ext.errors import ComebaError, ConfigError
from comeba_ext.forward.architectures import context_length
from comeba_ext.layers.edit_table import EditTable, Questions, questions_in
from comeba_ext.layers.prompts import PromptRewriter
from comeba_ext.memory.ledger import Entry
from comeba_ext.methods.base import OnProgress
from comeba_ext.methods.snapshots import Snapshots
from comeba_ext.text.encoding import input_device
from comeba_ext.text.names import named_in
from comeba_ext.text.request import EditRequest
from comeba_ext.text.retrieval import BM25
from comeba_ext.text.rows import answer_rows, check_length

PLACE = "comeba_facts"  # where the edited facts stand in the model


@dataclass(frozen=True)
class InContextConfig(EditConfig):
    """Settings of in-context editing; ``layers`` and all that concerns them mean nothing.

    Args:
        facts: how many edited facts, the most similar to the question, stand before it.
        named: only facts whose subject the question names; where there is none, the question is left as it is.
            With ``question_floor``, of those only facts that it asks for.
        demonstrations: IKE: file of records to show how a fact is used, none of which is to be edited or asked.
        shown: IKE: how many demonstrations a fact has.
    """

    layers: tuple[int, ...] = (0,)
    facts: int = 1
    named: bool = False
    demonstrations: str | None = None
    shown: int = 16

    def __post_init__(self) -> None:
        super().__post_init__()
        check_fields(self, counts=("facts", "shown"), flags=("named",), texts_or_none=("demonstrations",))
        check_named(self)


def check_named(config: InContextConfig) -> None:
    """Raises :class:`ConfigError` for a ``question_floor`` without ``named``."""
    if config.question_floor is not None and not config.named:
        raise ConfigError("question_floor asks what a prompt wants to know of an edited subject: it needs named: true")


def fact_of(request: EditRequest) -> str:
    """What is told of an edit: its prompt with the new object behind it."""
    return f"{request.text} {request.target_new}"


class Facts(EditTable, PromptRewriter):
    """Edited facts, and the prompt that goes before a question. An entry is ``id``, ``fact`` and what stands before it, ``shown``.

    Args:
        count: how many of them a question is given.
        named: only those whose ``subject``, which they then have too, it names.
        questions: only those that it asks for; ``None``: that makes no difference.
    """

    def __init__(self, count: int, device=None, named: bool = False, questions: Questions | None = None):
        super().__init__(device, questions)
        self.count, self.named, self._found = count, named, None

    def rewrite(self, prompt: str) -> str:
        held = self._buffers  # one look: what is in it belongs together
        facts = self.unpacked(held["packed"])
        near = self._index(facts).nearest(prompt, self.count, self.candidates(prompt, facts, held))
        return self.composed(prompt, [facts[n] for n in near][::-1])  # the most similar one is next to the question

    def composed(self, prompt: str, chosen: list[dict]) -> str:
        """A prompt behind these facts."""
        before = "".join(part for own in chosen for part in (*own["shown"], f"New Fact: {own['fact']}\n"))
        return f"{before}Prompt: {prompt}" if chosen else prompt

    def candidates(self, prompt: str, facts: list[dict], held: dict[str, torch.Tensor]) -> list[int]:
        """Numbers of the facts that may be what a prompt is about."""
        if not self.named:
            return list(range(len(facts)))
        found = named_in(prompt, {own["subject"] for own in facts})
        if self.questions is not None:
            return self.asked_for([prompt], [found], facts, held)[0]
        return [n for n, own in enumerate(facts) if own["subject"] in found]

    def entry(self, request: EditRequest, shown: list[str]) -> dict:
        """What is kept of a request."""
        own = {"id": request.request_id, "fact": fact_of(request), "shown": shown}
        return {**own, "subject": request.subject} if self.named else own

    def ways(self) -> tuple:
        return (*super().ways(), self.count, self.named)

    def fits(self, entry: dict) -> bool:
        texts = {"id", "fact", "subject"} if self.named else {"id", "fact"}
        known = set(entry) == {*texts, "shown"} and isinstance(entry["shown"], list)
        return known and all(isinstance(text, str) for text in (*(entry[name] for name in texts), *entry["shown"]))

    def _index(self, facts: list[dict]) -> BM25:
        found = self._found
        if found is None or found[0] is not facts:
            found = self._found = facts, BM25([own["fact"] for own in facts])
        return found[1]


class ICE(Snapshots):
    """The edited fact that is most similar to the question (BM25) stands before it: "New Fact: … Prompt: …"; with ``named``, only where
    the question names that fact's subject, and with ``question_floor``, only where it is what is asked.

    Nothing in the model changes: it must be asked as :func:`~comeba_ext.layers.prompts.prompt_rewriter` says, as its ``generate`` does
    (:class:`~comeba_ext.layers.prompts.GenerateAsRead`), ``evaluate`` and the command line; its ``forward`` cannot.
    """

    name = "ICE"
    config_class = InContextConfig
    in_prompt = True
    tells_questions = True

    @classmethod
    def build(cls, model, config: InContextConfig, architecture) -> dict[str, Facts]:
        return {PLACE: Facts(config.facts, input_device(model), config.named, questions_in(model, config.question_floor, architecture))}

    @classmethod
    def targets(cls, config, architecture) -> list[str]:
        return []

    def validate(self, batch: list[EditRequest]) -> None:
        super().validate(batch)
        held = self.attachments[PLACE]
        self._check([held.composed(request.text, [held.entry(request, self.shown(request))]) for request in batch], batch)

    def apply(self, batch: list[EditRequest], phases: Phases, on_progress: OnProgress) -> tuple[list[float], list[int]]:
        with phases("update"):
            held = self.attachments[PLACE]
            held.add([held.entry(r, self.shown(r)) for r in batch], held.questions_of([([r.text], r.subject) for r in batch]))
            self._check([held.rewrite(request.text) for request in batch], batch)  # behind other facts too
        return [], []

    def _check(self, asked: list[str], batch: list[EditRequest]) -> None:
        """Raises :class:`RequestError` where what is asked instead of a request's prompt, with its target, exceeds the context."""
        rows = answer_rows(self.session.tokenizer, [(text, r.target_new) for text, r in zip(asked, batch, strict=True)])
        check_length(rows, batch, context_length(self.session.model))

    def shown(self, request: EditRequest) -> list[str]:
        """What stands before a request's fact."""
        return []

    def take_out(self, entries: list[Entry]) -> None:
        self.attachments[PLACE].drop({entry.request.request_id for entry in entries})


class IKE(ICE):
    """ICE behind demonstrations of how a fact is used (IKE, section 3.2): the records most similar to it (BM25; published: cosine of
    sentence embeddings), in turn copying it, applying it to another wording, and keeping an unrelated answer as it was (1 : 3 : 4).

    The file is read when something is edited: what was edited can be taken back without it.

    Raises:
        ConfigError: no demonstrations are named; when something is edited, there is no usable one.
    """

    name = "IKE"
    kinds = ("copy", "update", "update", "update", "retain", "retain", "retain", "retain")

    @classmethod
    def files(cls, config: InContextConfig) -> dict[str, Path]:
        return {"demonstrations": Path(config.demonstrations)} if config.demonstrations else {}

    def __init__(self, session: Session):
        if session.config.demonstrations is None:  # before the model is touched
            raise ConfigError("IKE shows demonstrations: give 'demonstrations', a file of records, or use ICE, which shows none")
        self.read: tuple[list[EditRequest], BM25] | None = None
        super().__init__(session)

    def needed(self) -> tuple[list[EditRequest], BM25]:
        """The demonstrations, and what finds them.

        Raises:
            ConfigError: there is no usable one.
        """
        if self.read is None:
            known = read_records(self.config.demonstrations, "demonstrations")
            self.read = known, BM25([fact_of(r) for r in known])
        return self.read

    def ready(self) -> None:
        self.needed()

    def shown(self, request: EditRequest) -> list[str]:
        known, index = self.needed()
        chosen = index.nearest(fact_of(request), self.config.shown)
        texts = []
        for place, number in enumerate(chosen):
            other, kind = known[number], self.kinds[place % len(self.kinds)]
            fact = fact_of(other)
            asked = fact
            if kind == "update" and other.rephrase_prompts:
                asked = f"{other.rephrase_prompts[0]} {other.target_new}"
            elif kind == "retain":
                asked = next((f"{p} {a}" for p, a in other.locality_prompts if a), fact)
            texts.append(f"New Fact: {fact}\nPrompt: {asked}\n\n")
        return texts[::-1]  # the most similar one next to the fact


def read_records(file: str, setting: str, count: int | None = None) -> list[EditRequest]:
    """The records of a file that a setting names, ``count`` at most.

    Raises:
        ConfigError: about the setting: there is no usable one.
    """
    try:
        found = read_requests(file, count).requests
    except ComebaError as error:
        raise ConfigError(f"{setting}: {error}") from None
    if not found:
        raise ConfigError(f"{setting}: {file} holds no usable record")
    return found
