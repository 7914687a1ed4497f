"""What a subject is called, in tokens: at the beginning of a text, behind other words, as its own prompt writes it."""

from __future__ import annotations

from typing import NamedTuple

from comeba_ext.text.encoding import encode_all
from comeba_ext.text.request import EditRequest


class Names(NamedTuple):
    """What tells a request's subject in a text.

    Attributes:
        names: lists of token ids, none of them twice; none where the edit is not at the subject.
        ends: their last tokens, and that which the request is edited at.
    """

    names: list[list[int]]
    ends: list[int]


def names_of(tokenizer, requests: list[EditRequest]) -> list[Names]:
    """Every request's names. One of several words counts in small letters too: a single word may be another one then ("turkey")."""
    if not requests:
        return []
    forms, owner = [], []
    for n, request in enumerate(requests):
        subject = request.subject.strip()
        for form in dict.fromkeys((subject, subject.lower() if len(subject.split()) > 1 else subject)):
            if request.fact_token == "subject_last":
                forms += [form, f" {form}"]
                owner += [n, n]
    found: list[list[list[int]]] = [[] for _ in requests]
    for n, ids in zip(owner, tokenizer(forms, add_special_tokens=False)["input_ids"] if forms else [], strict=True):
        if ids and ids not in found[n]:
            found[n].append(ids)
    # In its prompt the tokenizer may split or join it in another way. (What begins the text is covered.)
    edited = encode_all(tokenizer, [(request.text, None, request.place) for request in requests])
    inside = [n for n, request in enumerate(requests) if found[n] and request.place > len(request.subject)]
    before = encode_all(tokenizer, [(requests[n].text, None, requests[n].place - len(requests[n].subject)) for n in inside])
    for n, start in zip(inside, before, strict=True):
        ids = edited[n].ids[start.subject_last + 1 : edited[n].subject_last + 1]
        # Less than the name, from its middle on, would be another one.
        whole = ids and (len(ids) >= min(map(len, found[n])) or any(ids[0] == own[0] for own in found[n]))
        if whole and ids not in found[n]:
            found[n].append(ids)
    last = [own.ids[own.subject_last] for own in edited]
    return [Names(own, list(dict.fromkeys([*(ids[-1] for ids in own), end]))) for own, end in zip(found, last, strict=True)]
