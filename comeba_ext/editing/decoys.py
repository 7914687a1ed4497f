"""Decoys: other names that end as a subject does.

What a shallow layer knows of "Saratov Oblast" where it ends is largely "Oblast", and the tokens most often taken for a
subject's are the ends of other names: "Moscow Oblast", "Hanford High School" for "Oliver Ames High School". A corpus
sample holds few of them, so they are made: the last token and the last two of a subject behind other beginnings. An
anchor's threshold lies above what its decoys reach, as far as the subject's own prompts let it.
"""

from __future__ import annotations

from comeba_ext.editing.rows import Row

CONTEXT = "The article about the"
BEGINNINGS = (" Robert", " Northern", " Lake", " Saint Mary", " Gold", " Pakistan")
TAILS = (1, 2)  # tokens


def decoy_rows(tokenizer, subjects: list[str]) -> list[Row]:
    """Rows that end where a decoy does; a subject of one token, which other names do not end with, has none."""
    context = tokenizer(CONTEXT)["input_ids"]
    while context and context[-1] == tokenizer.eos_token_id:  # a tokenizer that closes every text
        context = context[:-1]
    beginnings = tokenizer(list(BEGINNINGS), add_special_tokens=False)["input_ids"]
    rows = []
    for n, ids in enumerate(tokenizer([f" {subject}" for subject in subjects], add_special_tokens=False)["input_ids"]):
        for tail in TAILS:
            for beginning in beginnings if tail < len(ids) else ():
                row = context + beginning + ids[-tail:]
                rows.append(Row(n, row, len(row) - 1, [], -1))
    return rows
