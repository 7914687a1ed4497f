"""What to edit: one fact a request, and the record formats that are understood as requests."""

from __future__ import annotations

import dataclasses
from collections.abc import Iterable, Mapping
from dataclasses import dataclass

from comeba_ext.errors import RequestError

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
        rephrase_prompts: other wordings, subject spelled out (or ``{}``), for generality.
        locality_prompts: ``(prompt, answer)`` pairs, or prompts alone, whose predictions must not change.
        portability_prompts: ``(prompt, answer)`` pairs that follow from the new fact.
        request_id: a name to retract it by; the editor assigns one when absent.
        aliases: other names of the new object, which count as well where what was written is read (never used to edit).
        portability_aliases: the same for each answer of ``portability_prompts``, in their order; may be shorter.
        wordings: other texts that the new object shall follow too, subject spelled out (or ``{}``), e.g. as a question: target
            values are found for them together with the prompt. (``rephrase_prompts`` are only asked, never used.)
        fact_token: where the edit happens: ``"subject_last"``, the subject's last token, which carries it to other wordings; or
            ``"last"``, the prompt's, for subjects whose own place says nothing.

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
            start = prompt.rfind(self.subject)
            if start < 0:
                raise RequestError(f"{where}: subject {self.subject!r} is not in the prompt {prompt!r}; write {SLOT} where it stands")
            prompt = prompt[:start] + SLOT + prompt[start + len(self.subject) :]
        elif prompt.count(SLOT) > 1:
            raise RequestError(f"{where}: prompt {prompt!r} has {prompt.count(SLOT)} slots {SLOT}, expected one")
        set_("prompt", prompt)
        truth = self.ground_truth
        if isinstance(truth, (list, tuple)):  # aliases, in some records: the first one
            truth = next(_strings(truth), None)
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
        set_("locality_prompts", _pairs(self.locality_prompts, where, "locality_prompts"))
        set_("portability_prompts", _pairs(self.portability_prompts, where, "portability_prompts"))
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
        """A request from any supported record.

        Args:
            record: an ``EditRequest``; a mapping with this class's fields; a record in EasyEdit's form (``prompt``,
                ``rephrase_prompt``, ``locality_prompt`` …); an original CounterFact record (``requested_rewrite``); a
                ZsRE record (``src``, ``alt`` …); a QAEdit record (``target``, ``rephrase``, a list ``locality``).
            index: position in its file or batch, for error messages.

        Raises:
            RequestError: the record has no known form or lacks a field.
        """
        if isinstance(record, EditRequest):
            return record
        where = "record" if index is None else f"record {index}"
        if not isinstance(record, Mapping):
            raise RequestError(f"{where}: expected a mapping or an EditRequest, got {type(record).__name__}")
        try:
            if "requested_rewrite" in record:
                fields = _from_counterfact(record)
            elif "src" in record and "alt" in record:
                fields = _from_zsre(record)
            elif "target" in record and "target_new" not in record:
                fields = _from_qaedit(record)
            else:
                fields = _from_flat(record)
        except (KeyError, TypeError, AttributeError) as error:
            raise RequestError(f"{where}: missing or malformed field {error}; has {sorted(map(str, record))}") from None
        try:
            return cls(**fields)
        except RequestError as error:
            raise RequestError(f"{where}: {error}") from None

    def to_record(self) -> dict:
        """Plain JSON-serialisable mapping that :meth:`from_record` reads back."""
        record = dataclasses.asdict(self)
        for name in ("rephrase_prompts", "wordings"):
            record[name] = [_unfilled(text, self.subject) for text in record[name]]
        for name in ("locality_prompts", "portability_prompts"):  # lists, as JSON gives them back
            record[name] = [list(pair) for pair in record[name]]
        for name in ("aliases", "portability_aliases"):  # like records of versions that did not know them, where there are none
            record[name] = [own if isinstance(own, str) else list(own) for own in record[name]]
            if not record[name]:
                del record[name]
        return record


def as_requests(records: Iterable[EditRequest | Mapping]) -> list[EditRequest]:
    """:meth:`EditRequest.from_record` over a batch; a single record or text is refused."""
    if isinstance(records, (str, bytes, Mapping, EditRequest)):
        raise RequestError(f"expected a list of requests, got a single {type(records).__name__}; wrap it in [...]")
    if not isinstance(records, Iterable):
        raise RequestError(f"expected a list of requests, got {records!r}")
    return [EditRequest.from_record(record, index) for index, record in enumerate(records)]


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


def consecutive_batches(requests: list[EditRequest], size: int) -> list[list[EditRequest]]:
    """Batches in order; one ends early before a fact it already holds, whose later request thereby supersedes the earlier."""
    found: list[list[EditRequest]] = []
    for request in requests:
        if not found or len(found[-1]) == size or any(request.fact == other.fact for other in found[-1]):
            found.append([])
        found[-1].append(request)
    return found


def _from_flat(record: Mapping) -> dict:
    """This package's own form, and EasyEdit's."""
    fields = {f.name: record[f.name] for f in dataclasses.fields(EditRequest) if record.get(f.name) is not None}
    for required in ("prompt", "subject", "target_new"):
        if required not in fields:
            raise KeyError(required)
    if isinstance(fields["target_new"], Mapping):  # CounterFact's inner form
        fields["target_new"] = fields["target_new"]["str"]
    if "request_id" not in fields and record.get("case_id") is not None:
        fields["request_id"] = str(record["case_id"])
    if record.get("rephrase_prompt"):
        fields.setdefault("rephrase_prompts", _listed(record["rephrase_prompt"]))
    if record.get("locality_prompt"):
        fields.setdefault("locality_prompts", _zipped(record["locality_prompt"], record.get("locality_ground_truth")))
    for ours, theirs in (("locality_prompts", "locality"), ("portability_prompts", "portability")):
        groups = record.get(theirs)
        if isinstance(groups, Mapping):
            pairs = [pair for g in groups.values() for pair in _zipped(g.get("prompt"), g.get("ground_truth"))]
            fields.setdefault(ours, pairs)
    return fields


def _from_counterfact(record: Mapping) -> dict:
    rewrite = record["requested_rewrite"]
    return {
        "prompt": rewrite["prompt"],
        "subject": rewrite["subject"],
        "target_new": rewrite["target_new"]["str"],
        "ground_truth": rewrite.get("target_true", {}).get("str"),
        "rephrase_prompts": record.get("paraphrase_prompts", ()),
        # Neighbourhood prompts are about other subjects for which the true object holds.
        "locality_prompts": [(p, rewrite.get("target_true", {}).get("str")) for p in record.get("neighborhood_prompts", ())],
        "request_id": str(record["case_id"]) if record.get("case_id") is not None else None,
    }


def _from_zsre(record: Mapping) -> dict:
    portability = record.get("portability") or {}
    return {
        "prompt": record["src"],
        "subject": record["subject"],
        "target_new": record["alt"],
        "ground_truth": next(iter(record.get("answers") or ()), None),
        "rephrase_prompts": _listed(record.get("rephrase")),
        "locality_prompts": _zipped(record.get("loc"), record.get("loc_ans")),
        "portability_prompts": _zipped(portability.get("New Question"), portability.get("New Answer")),
        "request_id": str(record["case_id"]) if record.get("case_id") is not None else None,
    }


def _from_qaedit(record: Mapping) -> dict:
    """QAEdit (arXiv 2502.11177): natural questions; a " *" at the end of some answers is a mark of their source."""
    return {
        "prompt": record["prompt"],
        "subject": record["subject"],
        "target_new": record["target"].removesuffix("*"),
        "rephrase_prompts": _listed(record.get("rephrase")),
        "locality_prompts": [(pair["loc"], pair.get("loc_ans")) for pair in record.get("locality") or ()],
        "request_id": str(record["id"]) if record.get("id") is not None else None,
    }


def _fill(prompt: str, subject: str) -> str:
    return prompt.replace(SLOT, subject, 1)


def _unfilled(text: str, subject: str) -> str:
    """A text that :func:`_fill` turns into this one, which may hold a slot's signs of its own."""
    return text.replace(subject, SLOT, 1) if SLOT in text else text


def _listed(value) -> list:
    return [] if value in (None, "") else [value] if isinstance(value, str) else list(value)


def _zipped(prompts, answers) -> list[tuple[str, str | None]]:
    prompts, answers = _listed(prompts), _listed(answers)
    return [(p, answers[i] if i < len(answers) else None) for i, p in enumerate(prompts)]


def _strings(value):
    """All text in a value of nested lists."""
    if isinstance(value, str):
        yield value
    elif isinstance(value, (list, tuple)):
        for item in value:
            yield from _strings(item)


def _encodable(where: str, request: EditRequest) -> None:
    """Half a surrogate pair, which JSON can hold, is no text that a tokenizer takes."""
    for field in dataclasses.fields(request):
        try:
            "".join(_strings(getattr(request, field.name))).encode()
        except UnicodeEncodeError as error:
            raise RequestError(f"{where}: {field.name!r} holds {error.object[error.start]!r}, which is half of a character") from None


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
