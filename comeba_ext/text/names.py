"""What a subject is called: in letters, and in tokens at the beginning of a text, behind other words, as its own prompt writes it."""

from __future__ import annotations

import functools
import re
from collections.abc import Iterable, Iterator
from typing import NamedTuple

from comeba_ext.text.encoding import encode_all
from comeba_ext.text.request import SLOT, EditRequest

# Scripts that write no spaces between words, as ranges of a regular expression's class: Thai and Lao, Myanmar, Khmer, kana, Han.
UNSPACED = "\u0e01-\u0eff\u1000-\u109f\u1780-\u17ff\u3005-\u3007\u3041-\u30ff\u31f0-\u31ff\u3400-\u9fff\uf900-\ufaff\uff66-\uff9f"
UNSPACED += "\U00020000-\U000323af"
HEAD = 4  # letters of a name that it is looked up by


class Names(NamedTuple):
    """What tells a request's subject in a text.

    Attributes:
        names: lists of token ids, none of them twice; none where the edit is not at the subject.
        ends: their last tokens, and that which the request is edited at.
    """

    names: list[list[int]]
    ends: list[int]


def forms_of(subject: str) -> list[str]:
    """A subject in letters. One of several words in small letters too, and as a sentence begins with it: a single word may be another
    one then ("turkey")."""
    several = len(subject.split()) > 1
    return list(dict.fromkeys((subject, subject.lower(), subject[0].upper() + subject[1:]) if several else (subject,)))


def places_of(name: str, text: str) -> Iterator[re.Match]:
    """Where a name stands in a text, as whole words; in a script that writes no spaces between them, anywhere."""
    if name in text:  # at once, where most are not
        before, behind = (rf"(?<![^\W{UNSPACED}])", rf"(?![^\W{UNSPACED}])")
        open_start, open_end = (re.match(f"[{UNSPACED}]", letter) for letter in (name[:1], name[-1:]))
        yield from re.finditer(("" if open_start else before) + re.escape(name) + ("" if open_end else behind), text)


def places_in(text: str, subjects: Iterable[str]) -> list[tuple[int, int, str]]:
    """Where a text names which subjects, in the forms of :func:`forms_of`: the first character, that behind the last one, the subject.
    (Only names that begin as something in the text does are looked for: there may be many thousands.)"""
    by_head, sizes = _by_head(frozenset(subjects))
    heads = {text[n : n + size] for size in sizes for n in range(len(text) - size + 1)}
    forms = [own for head in heads & by_head.keys() for own in by_head[head]]
    return [(place.start(), place.end(), subject) for form, subject in forms for place in places_of(form, text)]


@functools.lru_cache(maxsize=8)
def _by_head(subjects: frozenset[str]) -> tuple[dict[str, list[tuple[str, str]]], set[int]]:
    """The forms of subjects, and whose each is, by their first letters; how many these are."""
    found: dict[str, list[tuple[str, str]]] = {}
    for subject in subjects:
        for form in forms_of(subject):
            found.setdefault(form[:HEAD], []).append((form, subject))
    return found, set(map(len, found))


def outermost(places: list[tuple[int, int, str]]) -> set[str]:
    """The subjects that have a place (:func:`places_in`) which is no part of a longer one's."""
    inside = lambda start, end: any(a <= start and end <= b and end - start < b - a for a, b, _ in places)  # noqa: E731
    return {subject for start, end, subject in places if not inside(start, end)}


def named_in(text: str, subjects: Iterable[str]) -> set[str]:
    """The subjects that a text names, as whole words; not one whose every place is a part of a longer one's ("New York" in "New York
    City", if both are subjects)."""
    return outermost(places_in(text, subjects))


def names_of(tokenizer, requests: list[EditRequest]) -> list[Names]:
    """Every request's names, in the forms of :func:`forms_of`."""
    if not requests:
        return []
    forms, owner = [], []
    for n, request in enumerate(requests):
        for form in forms_of(request.subject.strip()):
            if request.fact_token == "subject_last":
                forms += [form, f" {form}"]
                owner += [n, n]
    found: list[list[list[int]]] = [[] for _ in requests]
    for n, ids in zip(owner, tokenizer(forms, add_special_tokens=False)["input_ids"] if forms else [], strict=True):
        if ids and ids not in found[n]:
            found[n].append(ids)
    # In its prompt the tokenizer may split or join it in another way.
    edited = as_prompted(tokenizer, requests)
    for n, ids in enumerate(edited):
        # Less than the name, from its middle on, would be another one.
        whole = found[n] and (len(ids) >= min(map(len, found[n])) or any(ids[0] == own[0] for own in found[n]))
        if whole and ids not in found[n]:
            found[n].append(ids)
    return [Names(own, list(dict.fromkeys([*(ids[-1] for ids in own), ids[-1]]))) for own, ids in zip(found, edited, strict=True)]


def as_prompted(tokenizer, requests: list[EditRequest]) -> list[list[int]]:
    """The tokens of every request's subject in its own prompt, up to where it is edited: "Jr" and not "." of "Cuisia Jr., who"."""
    ends = encode_all(tokenizer, [(request.text, None, request.place) for request in requests])
    special, found = set(tokenizer.all_special_ids), []
    inside = [n for n, request in enumerate(requests) if request.prompt.index(SLOT)]
    before = encode_all(tokenizer, [(requests[n].text, None, requests[n].prompt.index(SLOT)) for n in inside])
    starts = {n: own.subject_last + 1 for n, own in zip(inside, before, strict=True)}
    for n, own in enumerate(ends):
        start = starts.get(n, next((n for n, token in enumerate(own.ids) if token not in special), 0))
        found.append(own.ids[min(start, own.subject_last) : own.subject_last + 1])
    return found
