"""What to edit: one fact a request, and the record formats that are understood as requests."""

from __future__ import annotations

import dataclasses
import json
import logging
import re
from collections import Counter
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from difflib import get_close_matches
from itertools import groupby

from comeba_ext.errors import RequestError
from comeba_ext.text.questions import Question
from comeba_ext.text.records import EASYEDIT, fields_of, strings, unknown_fields

log = logging.getLogger(__name__)
SLOT = "{}"  # stands for the subject in a prompt
FACT_TOKENS = ("subject_last", "last")


@dataclass(frozen=True)
class EditRequest:
    """One fact to change.

    Args:
        prompt: text that the new object shall follow, with ``{}`` in the subject's place. A prompt that spells the
            subject out is accepted; the subject's last occurrence becomes the slot.
        subject: the entity the fact is about; the edit happens at its last token.
        target_new: the new object, without a leading space.
        ground_truth: the object before the edit, when known.
        rephrase_prompts: other wordings, subject spelled out (or ``{}``), for generality. ``{}`` is the subject in all that is asked.
        locality_prompts: ``(prompt, answer)`` pairs, or prompts alone, whose predictions must not change.
        portability_prompts: ``(prompt, answer)`` pairs that follow from the new fact.
        request_id: a name to retract it by; the editor assigns one when absent.
        aliases: other names of the new object, which count as well where what was written is read (never used to edit).
        portability_aliases: the same for each answer of ``portability_prompts``, in their order; may be shorter.
        wordings: other texts that the new object shall follow too, subject spelled out (or ``{}``), e.g. as a question: target
            values are found for them together with the prompt. (``rephrase_prompts`` are only asked, never used.)
        fact_token: where the edit happens: ``"subject_last"``, the subject's last token, which carries it to other wordings; or
            ``"last"``, the prompt's, for subjects whose own place says nothing.
        questions: what else follows from the edit, or must not (:class:`~comeba_ext.text.questions.Question`, or mappings).
        case: edits with the same one are put into one batch; the last of them asks the questions that follow from all.

    Raises:
        RequestError: a field is missing, empty or of the wrong type, or the subject is not in the prompt.
    """

    prompt: str
    subject: str
    target_new: str
    ground_truth: str | None = None
    rephrase_prompts: tuple[str, ...] = ()
    locality_prompts: tuple[tuple[str, str | None], ...] = ()
    portability_prompts: tuple[tuple[str, str | None], ...] = ()
    request_id: str | None = None
    wordings: tuple[str, ...] = ()
    fact_token: str = "subject_last"
    aliases: tuple[str, ...] = ()
    portability_aliases: tuple[tuple[str, ...], ...] = ()
    questions: tuple[Question, ...] = ()
    case: str | None = None

    def __post_init__(self) -> None:
        where = f"request {self.request_id!r}" if self.request_id is not None else "request"
        for field in ("prompt", "subject", "target_new"):
            value = getattr(self, field)
            if not isinstance(value, str) or not value.strip():
                raise RequestError(f"{where}: {field!r} must be non-empty text, got {value!r}")
        set_ = lambda name, value: object.__setattr__(self, name, value)  # noqa: E731  (frozen dataclass)
        set_("subject", self.subject.strip())
        set_("target_new", self.target_new.strip())
        if self.request_id is not None:
            set_("request_id", str(self.request_id))
        prompt = self.prompt.rstrip()
        if SLOT not in prompt:
            start = last_place(self.subject, prompt)
            if start < 0:
                raise RequestError(f"{where}: subject {self.subject!r} is not in the prompt {prompt!r}; write {SLOT} where it stands")
            prompt = prompt[:start] + SLOT + prompt[start + len(self.subject) :]
        elif prompt.count(SLOT) > 1:
            raise RequestError(f"{where}: prompt {prompt!r} has {prompt.count(SLOT)} slots {SLOT}, expected one")
        set_("prompt", prompt)
        if SLOT in self.subject:  # what is edited and asked would hold it, letter by letter
            raise RequestError(f"{where}: the text {self.text!r} holds {SLOT}, which stands for the subject, and no subject to fill in")
        truth = self.ground_truth
        if isinstance(truth, (list, tuple)):  # aliases, in some records: the first one
            truth = next(strings(truth), None)
        if truth is not None and not isinstance(truth, str):
            raise RequestError(f"{where}: ground_truth must be text, got {truth!r}")
        set_("ground_truth", truth)
        for field in ("rephrase_prompts", "wordings"):
            set_(field, tuple(_fill(p, self.subject) for p in _texts(getattr(self, field), f"{where}: {field}")))
        for wording in self.wordings:
            if self.subject not in wording:
                raise RequestError(f"{where}: the wording {wording!r} does not name the subject {self.subject!r}")
        set_("aliases", _texts(self.aliases, f"{where}: aliases"))
        if not isinstance(self.portability_aliases, (list, tuple)):
            raise RequestError(f"{where}: portability_aliases must be a list of texts for each answer, got {self.portability_aliases!r}")
        set_("portability_aliases", tuple(_texts(own, f"{where}: portability_aliases") for own in self.portability_aliases))
        if self.fact_token not in FACT_TOKENS:
            raise RequestError(f"{where}: fact_token must be one of {', '.join(FACT_TOKENS)}, got {self.fact_token!r}")
        if not isinstance(self.questions, (list, tuple)):
            raise RequestError(f"{where}: questions must be a list, got {self.questions!r}")
        try:
            set_("questions", tuple(Question.of(own).asking(lambda text: _fill(text, self.subject)) for own in self.questions))
        except RequestError as error:
            raise RequestError(f"{where}: {error}") from None
        if self.case is not None:
            set_("case", str(self.case))
        for field in ("locality_prompts", "portability_prompts"):
            set_(field, tuple((_fill(p, self.subject), answer) for p, answer in _pairs(getattr(self, field), where, field)))
        _encodable(where, self)

    @property
    def text(self) -> str:
        """The prompt with the subject filled in."""
        return _fill(self.prompt, self.subject)

    @property
    def place(self) -> int:
        """Index of the character behind the token of :attr:`text` that is edited."""
        return self.place_in(self.text, self.prompt.index(SLOT))

    def place_in(self, text: str, start: int) -> int:
        """The same in another text, which names the subject at index ``start``."""
        return len(text) if self.fact_token == "last" else start + len(self.subject)

    @property
    def fact(self) -> tuple[str, str]:
        """What the request is about: two requests with the same prompt and subject speak of the same fact."""
        return self.prompt, self.subject

    @property
    def asked(self) -> tuple[str, str, str]:
        """What the request asks for: two with the same text, subject and new object are the same request, whatever their ids."""
        return self.text, self.subject, self.target_new

    @classmethod
    def from_record(cls, record: EditRequest | Mapping, index: int | None = None) -> EditRequest:
        """The request of a record of one edit; see :meth:`all_from_record`.

        Raises:
            RequestError: the record holds several, has no known form or lacks a field.
        """
        found = cls.all_from_record(record, index)
        if len(found) > 1:
            where = "record" if index is None else f"record {index}"
            raise RequestError(f"{where}: holds {len(found)} edits, expected one; as_requests takes such records")
        return found[0]

    @classmethod
    def all_from_record(cls, record: EditRequest | Mapping, index: int | None = None) -> list[EditRequest]:
        """The requests of any supported record.

        Args:
            record: an ``EditRequest``; a mapping with this class's fields; a record in one of the forms of
                :mod:`comeba_ext.text.records`: EasyEdit's and KnowEdit's, CounterFact's, MQuAKE's (several edits), RippleEdits',
                ZsRE's, QAEdit's, UnKE's.
            index: position in its file or batch, for error messages.

        Raises:
            RequestError: the record has no known form or lacks a field.
        """
        if isinstance(record, EditRequest):
            return [record]
        where = "" if index is None else f"record {index}: "
        if not isinstance(record, Mapping):
            raise RequestError(f"{where}expected a mapping or an EditRequest, got {type(record).__name__}")
        try:
            found = fields_of(record, _names(cls))
            return [cls(**fields) for fields in found]
        except RequestError as error:
            raise RequestError(f"{where}{error}") from None
        except (KeyError, TypeError, AttributeError) as error:
            raise RequestError(f"{where}missing or malformed field {error}; has {sorted(map(str, record))}") from None

    def to_record(self) -> dict:
        """Plain JSON-serialisable mapping that :meth:`from_record` reads back."""
        record = dataclasses.asdict(self)
        for name in ("rephrase_prompts", "wordings"):
            record[name] = [_unfilled(text, self.subject) for text in record[name]]
        for name in ("locality_prompts", "portability_prompts"):  # lists, as JSON gives them back
            record[name] = [[_unfilled(prompt, self.subject), answer] for prompt, answer in record[name]]
        for name in ("aliases", "portability_aliases"):
            record[name] = [own if isinstance(own, str) else list(own) for own in record[name]]
        record["questions"] = [question.asking(lambda text: _unfilled(text, self.subject)).to_record() for question in self.questions]
        for name in ("aliases", "portability_aliases", "questions", "case"):  # like records of versions that did not know them
            if not record[name]:
                del record[name]
        return record


def as_requests(records: Iterable[EditRequest | Mapping]) -> list[EditRequest]:
    """:meth:`EditRequest.all_from_record` over a batch; a single record or text is refused."""
    if isinstance(records, (str, bytes, Mapping, EditRequest)):
        raise RequestError(f"expected a list of requests, got a single {type(records).__name__}; wrap it in [...]")
    if not isinstance(records, Iterable):
        raise RequestError(f"expected a list of requests, got {records!r}")
    found, unknown = [], UnknownFields()
    for index, record in enumerate(records):
        found += EditRequest.all_from_record(record, index)
        unknown.add(record)
    unknown.warn()
    return found


class UnknownFields:
    """Fields of records that nothing reads, which are more often misspelt than meant for somebody else.

    Args:
        where: the records are from.
    """

    def __init__(self, where: str = "records"):
        self.where, self.counts = where, Counter()

    def add(self, record: EditRequest | Mapping) -> None:
        """Look through a record that has been read."""
        if isinstance(record, Mapping):
            self.counts.update(unknown_fields(record, _names(EditRequest)))

    def warn(self) -> None:
        """Log each of them once."""
        for name, count in self.counts.items():
            near = get_close_matches(name, (*_names(EditRequest), *EASYEDIT), 1)
            meant = f"; is {near[0]!r} meant?" if near else ""
            log.warning("%s: the field %r (%d record%s) is unknown and not read%s", self.where, name, count, "s" * (count > 1), meant)


def _names(of: type) -> tuple[str, ...]:
    return tuple(field.name for field in dataclasses.fields(of))


class Ids:
    """The request ids met so far: one of them names one fact.

    Attributes:
        facts: id to fact.
    """

    def __init__(self, requests: Iterable[EditRequest] = ()):
        self.facts: dict[str, tuple[str, str]] = {}
        for request in requests:
            self.add(request)

    def add(self, request: EditRequest) -> None:
        """Raises :class:`RequestError` if the id is that of another fact."""
        if request.request_id is not None and self.facts.setdefault(request.request_id, request.fact) != request.fact:
            raise RequestError(f"request_id {request.request_id!r} is used by another request; ids must differ")


def cases_of(requests: Iterable[EditRequest]) -> list[list[EditRequest]]:
    """Requests that belong together, in order; one without a case is alone."""
    runs = groupby(enumerate(requests), key=lambda pair: pair[0] if pair[1].case is None else pair[1].case)
    return [[request for _, request in own] for _, own in runs]


def consecutive_batches(requests: list[EditRequest], size: int) -> list[list[EditRequest]]:
    """Batches in order; one ends early before a case it could not hold whole, or before a fact it already holds, whose later
    request thereby supersedes the earlier. A case of more requests than ``size`` is a batch of its own."""
    found: list[list[EditRequest]] = []
    for case in cases_of(requests):
        facts = {request.fact for request in found[-1]} if found else set()
        if not found or len(found[-1]) + len(case) > size or any(request.fact in facts for request in case):
            found.append([])
        for request in case:
            if any(request.fact == other.fact for other in found[-1]):
                found.append([])
            found[-1].append(request)
    return found


def last_place(subject: str, text: str) -> int:
    """Where a subject stands last in a text, as a word of its own if it does ("i" in "i want to be with you"); −1: nowhere."""
    whole = list(re.finditer(rf"(?<!\w){re.escape(subject)}(?!\w)", text))
    return whole[-1].start() if whole else text.rfind(subject)


def latest(requests: list[EditRequest]) -> list[EditRequest]:
    """One request a fact, the last, in the order in which they were made; with the questions of earlier ones that asked for the same,
    which keep their own votes (``Question.case``)."""
    found: dict[tuple[str, str], EditRequest] = {}
    alike: Counter[tuple[str, str, str]] = Counter()
    for request in requests:
        if request.questions:
            alike[request.asked] += 1  # a name that is the same in every order of the records
            name = request.case or request.request_id or "\n".join((*request.asked, str(alike[request.asked])))
            request = dataclasses.replace(
                request, questions=tuple(dataclasses.replace(own, case=own.case or name) for own in request.questions)
            )
        before = found.pop(request.fact, None)  # a dict keeps the place of the first
        if before is not None and before.target_new == request.target_new:
            request = dataclasses.replace(request, questions=tuple(dict.fromkeys((*before.questions, *request.questions))))
        found[request.fact] = request
    return list(found.values())


def _fill(prompt: str, subject: str) -> str:
    return prompt.replace(SLOT, subject, 1)


def _unfilled(text: str, subject: str) -> str:
    """A text that :func:`_fill` turns into this one, which may hold a slot's signs of its own."""
    return text.replace(subject, SLOT, 1) if SLOT in text else text


def _encodable(where: str, request: EditRequest) -> None:
    """Half a surrogate pair, which JSON can hold, is no text that a tokenizer takes."""
    for name, value in request.to_record().items():
        try:
            json.dumps(value, ensure_ascii=False).encode()
        except UnicodeEncodeError as error:
            raise RequestError(f"{where}: {name!r} holds {error.object[error.start]!r}, which is half of a character") from None


def _texts(values, where: str) -> tuple[str, ...]:
    values = (values,) if isinstance(values, str) else values
    if not isinstance(values, Iterable) or isinstance(values, Mapping):
        raise RequestError(f"{where} must be texts, got {values!r}")
    values = tuple(values)
    for value in values:
        if not isinstance(value, str):
            raise RequestError(f"{where} must be texts, got {value!r}")
    return values


def _pairs(values, where: str, field: str) -> tuple[tuple[str, str | None], ...]:
    values = (values,) if isinstance(values, str) else values
    if not isinstance(values, Iterable) or isinstance(values, Mapping):
        raise RequestError(f"{where}: {field} must be texts or (prompt, answer) pairs, got {values!r}")
    pairs = []
    for value in values:
        is_pair = isinstance(value, (list, tuple)) and 1 <= len(value) <= 2
        prompt, answer = (value, None) if not is_pair else (*value, None)[:2]
        if not isinstance(prompt, str) or not (answer is None or isinstance(answer, str)):
            raise RequestError(f"{where}: {field} must be texts or (prompt, answer) pairs, got {value!r}")
        pairs.append((prompt, answer))
    return tuple(pairs)
