"""Decoys: other names that end as a subject does.

What a shallow layer knows of "Saratov Oblast" where it ends is largely "Oblast", and the tokens most often taken for a
subject's are the ends of other names: "Moscow Oblast", "Hanford High School" for "Oliver Ames High School". A corpus
sample holds few of them, so they are made: the last token and the last two of a subject, as its prompt has them, behind
other beginnings. An anchor's threshold lies above what its decoys reach, as far as the subject's own prompts let it.

A request that is edited at its prompt's last token has the same prompt about others for decoys.
"""

from __future__ import annotations

from comeba_ext.text.encoding import encode_all
from comeba_ext.text.names import as_prompted
from comeba_ext.text.request import SLOT, EditRequest
from comeba_ext.text.rows import Row

CONTEXT = "The article about the"
BEGINNINGS = (" Robert", " Northern", " Lake", " Saint Mary", " Gold", " Pakistan")
TAILS = (1, 2)  # tokens
OTHERS = ("Robert", "The Northern Line", "Lake Saint Mary", "Gold", "Pakistan", "London")


def decoy_rows(tokenizer, requests: list[EditRequest]) -> list[Row]:
    """Rows that end where a decoy does; a subject of one token, which other names do not end with, has none."""
    context = tokenizer(CONTEXT)["input_ids"]
    while context and context[-1] == tokenizer.eos_token_id:  # a tokenizer that closes every text
        context = context[:-1]
    beginnings = tokenizer(list(BEGINNINGS), add_special_tokens=False)["input_ids"]
    rows = []
    subjects = as_prompted(tokenizer, requests)
    for n, (request, ids) in enumerate(zip(requests, subjects, strict=True)):
        if request.fact_token == "last":
            texts = [request.prompt.replace(SLOT, other) for other in OTHERS if other != request.subject]
            found = encode_all(tokenizer, [(text, None, len(text)) for text in texts])
            rows += [Row(n, encoded.ids[: encoded.subject_last + 1], encoded.subject_last, [], -1) for encoded in found]
            continue
        for tail in TAILS:
            for beginning in beginnings if tail < len(ids) else ():
                row = context + beginning + ids[-tail:]
                rows.append(Row(n, row, len(row) - 1, [], -1))
    return rows
