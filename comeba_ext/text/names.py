"""What a subject is called, in tokens: at the beginning of a text, behind other words, as its own prompt writes it."""

from __future__ import annotations

from comeba_ext.text.encoding import encode_all
from comeba_ext.text.request import EditRequest


def names_of(tokenizer, requests: list[EditRequest]) -> list[list[list[int]]]:
    """Every request's names, lists of token ids without repetition; none where the edit is not at the subject.

    A name of several words counts in small letters too: those of a single one may be another word ("turkey").
    """
    there = [n for n, request in enumerate(requests) if request.fact_token == "subject_last"]
    if not there:
        return [[] for _ in requests]
    forms, owner = [], []
    for n in there:
        subject = requests[n].subject
        for form in dict.fromkeys((subject, subject.lower() if len(subject.split()) > 1 else subject)):
            forms += [form, f" {form}"]
            owner += [n, n]
    found: list[list[list[int]]] = [[] for _ in requests]
    for n, ids in zip(owner, tokenizer(forms, add_special_tokens=False)["input_ids"], strict=True):
        if ids and ids not in found[n]:
            found[n].append(ids)
    # Where the tokenizer splits or joins it in another way in its prompt. What begins the text is covered.
    inside = [n for n in there if requests[n].place > len(requests[n].subject)]
    texts = [requests[n].text for n in inside]
    ends = encode_all(tokenizer, [(text, None, requests[n].place) for n, text in zip(inside, texts, strict=True)])
    starts = encode_all(
        tokenizer, [(text, None, requests[n].place - len(requests[n].subject)) for n, text in zip(inside, texts, strict=True)]
    )
    for n, start, end in zip(inside, starts, ends, strict=True):
        ids = end.ids[start.subject_last + 1 : end.subject_last + 1]
        # Less than the name, from its middle on, would be another one.
        whole = ids and (len(ids) >= min(map(len, found[n])) or any(ids[0] == own[0] for own in found[n]))
        if whole and ids not in found[n]:
            found[n].append(ids)
    return found
