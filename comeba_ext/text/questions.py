"""What else follows from edits, or must not: questions of benchmarks that ask more than one prompt for one verdict.

A question belongs to a criterion, whose score is the share of its questions that are answered. MQuAKE (arXiv 2305.14795) asks a
multi-hop question in three wordings, any of which will do, and counts a case as recalled when every single hop is; RippleEdits
(arXiv 2307.12976) joins prompts by *or* and *and*, and counts a question only if the unedited model knows what it takes for granted.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import asdict, dataclass, replace
from typing import NamedTuple

from comeba_ext.errors import RequestError


class Probe(NamedTuple):
    """A prompt, and what may be answered.

    Args:
        answers: a name and its aliases.
        also: further names, each with its aliases, that must stand in the answer as well ("the siblings of … are").
    """

    prompt: str
    answers: tuple[str, ...]
    also: tuple[tuple[str, ...], ...] = ()

    def answered(self, text: str, rule: Callable[[str, tuple[str, ...]], bool], contained: Callable[[str, tuple[str, ...]], bool]) -> bool:
        """Whether a text answers it: a rule holds for one of the names, and all of them stand in the text."""
        names = (self.answers, *self.also)
        return any(rule(text, own) for own in names) and all(contained(text, own) for own in names)


@dataclass(frozen=True)
class Question:
    """One verdict.

    Args:
        criterion: what it tests; free text.
        probes: prompts to ask, each with its answers.
        every: whether all of them must be answered, or any one will do.
        conditions: prompts that the *unedited* model must answer; where it does not, the question is not counted.
        case: of which record it is, where one edit asks the questions of several; each has its own vote.

    Raises:
        RequestError: there is no probe, or one without a prompt or without an answer.
    """

    criterion: str
    probes: tuple[Probe, ...]
    every: bool = False
    conditions: tuple[Probe, ...] = ()
    case: str | None = None

    def __post_init__(self) -> None:
        if not isinstance(self.criterion, str) or not self.criterion.strip():
            raise RequestError(f"a question's criterion must be text, got {self.criterion!r}")
        if not isinstance(self.every, bool):
            raise RequestError(f"{self.criterion}: 'every' must be true or false, got {self.every!r}")
        for name in ("probes", "conditions"):
            object.__setattr__(self, name, _probes(getattr(self, name), f"{self.criterion}: {name}"))
        if not self.probes:
            raise RequestError(f"{self.criterion}: a question must ask something")

    @classmethod
    def of(cls, value: Question | Mapping) -> Question:
        """A question from one, or from a mapping with its fields.

        Raises:
            RequestError: it is neither, or has other fields.
        """
        if isinstance(value, cls):
            return value
        try:
            return cls(**value)
        except TypeError:
            raise RequestError(f"a question has criterion, probes, every, conditions and case, got {value!r}") from None

    def asking(self, changed: Callable[[str], str]) -> Question:
        """The question with every prompt changed; the same where that changes nothing."""
        own = {name: tuple(p._replace(prompt=changed(p.prompt)) for p in getattr(self, name)) for name in ("probes", "conditions")}
        return self if (self.probes, self.conditions) == tuple(own.values()) else replace(self, **own)

    def to_record(self) -> dict:
        """Plain JSON-serialisable mapping that :meth:`of` reads back."""
        pairs = lambda probes: [[p.prompt, list(p.answers), *([list(map(list, p.also))] if p.also else [])] for p in probes]  # noqa: E731
        record = asdict(self) | {"probes": pairs(self.probes), "conditions": pairs(self.conditions)}
        if self.case is None:  # like records of versions that did not know it
            del record["case"]
        return record


def _probes(values, where: str) -> tuple[Probe, ...]:
    expected = f"{where} must be (prompt, answers) pairs, or (prompt, answers, further answers)"
    if not isinstance(values, (list, tuple)):
        raise RequestError(f"{expected}, got {values!r}")
    found = []
    for value in values:
        if not isinstance(value, (list, tuple)) or len(value) not in (2, 3):
            raise RequestError(f"{expected}, got {value!r}")
        prompt, answers, also = (*value, ())[:3]
        if not isinstance(prompt, str) or not prompt.strip() or not isinstance(also, (list, tuple)):
            raise RequestError(f"{expected}, got {value!r}")
        names = [(own,) if isinstance(own, str) else own for own in (answers, *also)]
        if not all(isinstance(own, (list, tuple)) for own in names):
            raise RequestError(f"{expected}, got {value!r}")
        for own in names:
            if not all(isinstance(answer, str) for answer in own) or not any(answer.strip() for answer in own):
                raise RequestError(f"{where}: the answers to {prompt!r} must be texts, one at least, got {own!r}")
        first, *further = (tuple(answer for answer in own if answer.strip()) for own in names)
        found.append(Probe(prompt.strip(), first, tuple(further)))
    return tuple(found)
