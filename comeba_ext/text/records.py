"""The forms that the field keeps edits in, as fields of requests.

========================  =====================================================================================================
form                      known by
========================  =====================================================================================================
this package's, EasyEdit  ``prompt``, ``subject``, ``target_new``; ``portability`` and ``locality`` by kind, as KnowEdit has them
CounterFact               ``requested_rewrite``, a mapping
MQuAKE, AKEW              ``requested_rewrite``, a list: several edits, and questions that follow from all of them
RippleEdits               ``edit``, and lists of tests by criterion
ZsRE                      ``src`` and ``alt``
QAEdit                    ``target``
UnKE                      ``question`` and ``answer``, a paragraph
========================  =====================================================================================================
"""

from __future__ import annotations

import re
from collections.abc import Callable, Iterable, Iterator, Mapping
from itertools import takewhile

from comeba_ext.errors import RequestError
from comeba_ext.text.questions import Probe, Question

RIPPLES = (
    "Logical_Generalization",
    "Compositionality_I",
    "Compositionality_II",
    "Subject_Aliasing",
    "Forgetfulness",
    "Relation_Specificity",
)
EASYEDIT = ("case_id", "rephrase_prompt", "locality_prompt", "locality_ground_truth", "locality", "portability")  # and no others' names
UNSTRUCTURED = "unstructured"  # a field that a reader sets where AKEW's paragraphs are to be edited
LONE = ("prompt", "src", "requested_rewrite", "edit", "question")  # fields of which a record has one


def fields_of(record: Mapping, known: Iterable[str]) -> list[dict]:
    """Fields of every request that a record holds.

    Args:
        known: the fields that requests have.

    Raises:
        RequestError, KeyError, TypeError, AttributeError: the record has no known form or lacks a field.
    """
    published = _published(record)
    found = [_flat(record, known)] if published is None else published(record)
    for fields in found:
        for name in ("target_new", "ground_truth"):  # years and the like
            if isinstance(fields.get(name), (int, float)) and not isinstance(fields[name], bool):
                fields[name] = str(fields[name])
    return found


def unknown_fields(record: Mapping, known: Iterable[str]) -> list[str]:
    """What nothing reads in a record of this package's own form; of published forms, which have much more than is read, nothing."""
    if _published(record) is not None or any(name in record for name in EASYEDIT):
        return []
    return [str(name) for name in record if name not in set(known)]


def _published(record: Mapping) -> Callable[[Mapping], list[dict]] | None:
    """The reader of the published form that a record has; ``None``: this package's own, or EasyEdit's."""
    rewrites = record.get("requested_rewrite")
    if record.get(UNSTRUCTURED) and isinstance(rewrites, Mapping):
        return lambda record: [_counterfact(record, rewrites) | _paragraph(rewrites)]
    if record.get(UNSTRUCTURED) and not isinstance(rewrites, (list, tuple)):
        raise RequestError("only AKEW's records have unstructured counterparts ('fact_new_uns' in their 'requested_rewrite')")
    if isinstance(rewrites, (list, tuple)):
        return lambda record: _mquake(record, rewrites)
    if rewrites is not None:
        return lambda record: [_counterfact(record, rewrites)]
    if isinstance(record.get("edit"), Mapping):
        return lambda record: [_ripple_edits(record, record["edit"])]
    if "src" in record and "alt" in record:
        return lambda record: [_zsre(record)]
    if "target" in record and "target_new" not in record:
        return lambda record: [_qaedit(record)]
    if "question" in record and "answer" in record and "prompt" not in record:
        return lambda record: [_unke(record)]
    return None


def _flat(record: Mapping, known: Iterable[str]) -> dict:
    """This package's own form, and EasyEdit's."""
    fields = {name: record[name] for name in known if record.get(name) is not None}
    for required in ("prompt", "subject", "target_new"):
        if required not in fields:
            raise KeyError(required)
    if isinstance(fields["target_new"], Mapping):  # CounterFact's inner form
        fields["target_new"] = fields["target_new"]["str"]
    if "request_id" not in fields:
        fields["request_id"] = _name(record, "case_id")
    if record.get("rephrase_prompt"):
        fields.setdefault("rephrase_prompts", listed(record["rephrase_prompt"]))
    if record.get("locality_prompt"):
        fields.setdefault("locality_prompts", _zipped(record["locality_prompt"], record.get("locality_ground_truth")))
    local, moved = (_by_kind(record.get(name)) for name in ("locality", "portability"))
    if local:
        fields.setdefault("locality_prompts", [(prompt, next(strings(own), None)) for _, prompt, own in local])
    if moved and "portability_prompts" not in fields:
        names = [own[0] if own else [] for *_, own in moved]
        fields["portability_prompts"] = [(prompt, own[0] if own else None) for (_, prompt, _), own in zip(moved, names, strict=True)]
        fields["portability_aliases"] = [own[1:] for own in names]
        fields.setdefault("questions", [Question(kind, (_probe(prompt, own),)) for kind, prompt, own in moved if any(map(any, own))])
    return fields


def _by_kind(groups) -> list[tuple[str, str, list[list[str]]]]:
    """Kind, prompt and answers, each a name and its aliases, of EasyEdit's ``{kind: {"prompt": …, "ground_truth": …}}``, or KnowEdit's with
    a list of such. A list of texts is one answer's names; a list of lists is several answers, of which all are wanted."""
    found = []
    for kind, group in groups.items() if isinstance(groups, Mapping) else ():
        for part in group if isinstance(group, (list, tuple)) else [group]:
            prompts, answers = part.get("prompt"), part.get("ground_truth")
            pairs = [(prompts, answers)] if isinstance(prompts, str) else _zipped(prompts, answers)
            found += [(str(kind), prompt, _names(answer)) for prompt, answer in pairs]
    return found


def _names(answer) -> list[list[str]]:
    several = isinstance(answer, (list, tuple)) and any(isinstance(own, (list, tuple)) for own in answer)
    return [own for own in (list(strings(one)) for one in (answer if several else [answer])) if own]


def _probe(prompt: str, names: list) -> Probe:
    first, *further = (tuple(own) for own in names)
    return Probe(prompt, first, tuple(further))


def _counterfact(record: Mapping, rewrite: Mapping) -> dict:
    return {
        **_rewrite(rewrite),
        "rephrase_prompts": record.get("paraphrase_prompts", ()),
        # Neighbourhood prompts are about other subjects for which the true object holds.
        "locality_prompts": [(p, rewrite.get("target_true", {}).get("str")) for p in record.get("neighborhood_prompts", ())],
        "request_id": _name(record, "case_id"),
    }


def _rewrite(rewrite: Mapping) -> dict:
    return {
        "prompt": rewrite["prompt"],
        "subject": rewrite["subject"],
        "target_new": rewrite["target_new"]["str"],
        "ground_truth": rewrite.get("target_true", {}).get("str"),
    }


def _mquake(record: Mapping, rewrites: list) -> list[dict]:
    """MQuAKE (arXiv 2305.14795, section 3): edit-wise, whether each new fact is recalled; instance-wise, whether all single hops of
    the new chain are; multi-hop, whether one of the three wordings of the question is answered. They are asked with the last edit."""
    if not rewrites:
        raise RequestError("'requested_rewrite' is an empty list")
    name, found = _name(record, "case_id"), []
    unstructured = record.get(UNSTRUCTURED)
    aliases = {hop["answer"]: tuple(hop.get("answer_alias", ())) for hop in record.get("new_single_hops", ())}
    for n, rewrite in enumerate(rewrites):
        own = _rewrite(rewrite) | {"rephrase_prompts": listed(rewrite.get("question")), "case": name or f"{rewrite['subject']} …"}
        own["request_id"] = None if name is None else f"{name}.{n}"
        own["aliases"] = aliases.get(own["target_new"], ())
        probe = Probe(rewrite["prompt"].replace("{}", rewrite["subject"], 1), (own["target_new"], *own["aliases"]))
        own["questions"] = [Question("edit-wise", (probe,))]
        found.append(own | _paragraph(rewrite) if unstructured else own)
    hops = [
        Probe(hop.get("cloze") or hop["question"], (hop["answer"], *hop.get("answer_alias", ())))
        for hop in record.get("new_single_hops", ())
    ]
    answers = (record["new_answer"], *record.get("new_answer_alias", ()))
    if hops:
        found[-1]["questions"].append(Question("instance-wise", tuple(hops), every=True))
    found[-1]["questions"].append(Question("multi-hop", tuple(Probe(question, answers) for question in record["questions"])))
    return found


def _paragraph(rewrite: Mapping) -> dict:
    """AKEW (arXiv 2402.18909): instead of a fact, the paragraph that states it is edited, behind the fact's question and at its end."""
    if not rewrite.get("fact_new_uns") or not rewrite.get("question"):
        raise RequestError("there is no unstructured counterpart: 'fact_new_uns' and 'question' are wanted in every rewrite")
    about = {"prompt": "{}", "subject": rewrite["question"], "target_new": rewrite["fact_new_uns"], "fact_token": "last"}
    return about | {"ground_truth": None, "rephrase_prompts": [], "aliases": ()}


def _ripple_edits(record: Mapping, edit: Mapping) -> dict:
    """RippleEdits (arXiv 2307.12976): the edit is one sentence, which ends where the fact that was true says something else. A fact that is
    only recent replaces none: its sentence is parted behind its verb."""
    earlier = edit.get("original_fact") or edit.get("previous_fact")
    new, true = (text.strip().rstrip(".") for text in (edit["prompt"], earlier["prompt"] if earlier else edit["prompt"]))
    # Up to the word in which they part ("… is Syria", "… is Spain"); but for what both answers begin with ("… is New York", "… New Delhi").
    head = _common(f"{new} ", f"{true} ") if earlier else new
    head = head[: head.rfind(" ") + 1]
    verb = re.match(r".*\s(is|are|was|were)\s", head)
    head = verb[0] if verb else head
    if not earlier and not verb:
        raise RequestError(f"cannot tell what {new!r} is edited to say: there is neither an 'original_fact' beside it nor a verb in it")
    tests = {kind: record[kind] for kind in RIPPLES if record.get(kind)}
    prompts = [query["prompt"] for items in tests.values() for item in items for query in (*item["test_queries"], *_conditions(item))]
    return {
        "prompt": head.rstrip(),
        "subject": edit.get("subject") or _subject(head, prompts),
        "target_new": new[len(head) :],
        "ground_truth": true[len(head) :] if earlier else None,
        "request_id": _name(record, "case_id"),
        "questions": [
            Question(
                kind.replace("_", " ").lower(),
                _queries(item["test_queries"]),
                every=item.get("test_condition", "OR") == "AND",
                conditions=_queries(_conditions(item)),
            )
            for kind, items in tests.items()
            for item in items
        ],
    }


def _conditions(item: Mapping) -> list:
    return item.get("condition_queries") or []


def _queries(queries: list) -> tuple[Probe, ...]:
    names = lambda query: [(answer["value"], *answer.get("aliases", ())) for answer in query["answers"]] or [()]  # noqa: E731
    return tuple(_probe(query["prompt"], names(query)) for query in queries)


def _subject(head: str, prompts: list[str]) -> str:
    """Whom a sentence of RippleEdits is about, which names it by a number only: "The … of *subject* is". What the prompts of its tests
    about the same subject end in, too; failing that, what stands behind the last "of"."""
    about = re.sub(r"\s+(is|are|was|were)$", "", head.rstrip())
    ends = [re.sub(r"\s+(is|are|was|were)$", "", prompt.rstrip()) for prompt in prompts]
    shared = [_common(about[::-1], end[::-1])[::-1] for end in ends if end != about]
    shared = [own.partition(" of ")[2] for own in shared if " of " in own]
    subject = max(shared, key=len, default="") or about.rpartition(" of ")[2]
    if not subject or subject == about:
        raise RequestError(f"cannot tell the subject of {head!r}; add it as 'subject' to the record's 'edit'")
    return subject


def _common(one: str, other: str) -> str:
    """What two texts begin with."""
    return "".join(a for a, _ in takewhile(lambda pair: pair[0] == pair[1], zip(one, other)))


def _zsre(record: Mapping) -> dict:
    portability = record.get("portability") or {}
    return {
        "prompt": record["src"],
        "subject": record["subject"],
        "target_new": record["alt"],
        "ground_truth": next(iter(record.get("answers") or ()), None),
        "rephrase_prompts": listed(record.get("rephrase")),
        "locality_prompts": _zipped(record.get("loc"), record.get("loc_ans")),
        "portability_prompts": _zipped(portability.get("New Question"), portability.get("New Answer")),
        "request_id": _name(record, "case_id"),
    }


def _qaedit(record: Mapping) -> dict:
    """QAEdit (arXiv 2502.11177): natural questions; a " *" at the end of some answers is a mark of their source."""
    return {
        "prompt": record["prompt"],
        "subject": record["subject"],
        "target_new": record["target"].removesuffix("*") if isinstance(record["target"], str) else record["target"],
        "rephrase_prompts": listed(record.get("rephrase")),
        "locality_prompts": [(pair["loc"], pair.get("loc_ans")) for pair in record.get("locality") or ()],
        "request_id": _name(record, "id"),
    }


def _unke(record: Mapping) -> dict:
    """UnKE (arXiv 2405.15349): a question, which is edited at its end, and a paragraph as its answer. Who writes such records by hand
    may name a ``subject`` to stand for ``{}``."""
    filled = lambda text: text.replace("{}", record.get("subject") or "{}", 1)  # noqa: E731
    asked = _zipped(record.get("sub_question"), record.get("sub_answer"))
    return {
        "prompt": "{}",
        "subject": filled(record["question"]),
        "target_new": record["answer"],
        "rephrase_prompts": [filled(text) for text in listed(record.get("para_question"))],
        "portability_prompts": [(filled(prompt), answer) for prompt, answer in asked],
        "request_id": _name(record, "id"),
        "fact_token": "last",
    }


def _name(record: Mapping, field: str) -> str | None:
    return str(record[field]) if record.get(field) is not None else None


def listed(value) -> list:
    return [] if value in (None, "") else [value] if isinstance(value, str) else list(value)


def _zipped(prompts, answers) -> list[tuple[str, str | None]]:
    prompts, answers = listed(prompts), listed(answers)
    return [(p, answers[i] if i < len(answers) else None) for i, p in enumerate(prompts)]


def strings(value) -> Iterator[str]:
    """All text in a value of nested lists."""
    if isinstance(value, str):
        yield value
    elif isinstance(value, (list, tuple)):
        for item in value:
            yield from strings(item)
