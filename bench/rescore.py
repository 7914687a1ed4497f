"""Score what an experiment's logs say was written again, by today's rules of comparing texts; the same where they have not changed.

    python bench/rescore.py OUT MODEL
    comeba experiment FILE --out OUT …      # as before: reads the logs, and makes table, JSON and plots anew

Logs hold what was written to every prompt, and what the unedited model wrote to locality's, so nothing is run. A record's aliases are not
in them: logs of records with aliases are refused where a verdict would fall.
"""

from __future__ import annotations

import argparse
import json
from pathlib import Path

from comeba_ext.evaluation.answers import mean
from comeba_ext.evaluation.queries import METRICS
from comeba_ext.evaluation.written import Writing, is_contained, is_same, is_written
from comeba_ext.storage import write_text


def rescored(row: dict, writing: Writing, tokenizer) -> dict:
    """A record's row of a log, and its answers, with the scores of what was written."""
    answers = []
    for answer in row["answers"]:
        if answer["metric"] == "locality":
            right = is_same(answer["written"], answer["unedited_written"])
        else:
            right = is_written(answer["written"], [answer["wanted"]]) if writing.fits(tokenizer, [answer["wanted"]]) else None
        answers.append(answer | {"right": right})
    row = row | {"answers": answers}
    for name in METRICS:
        own = [answer for answer in answers if answer["metric"] == name]
        before, row[f"{name}_written"] = row.get(f"{name}_written"), mean([answer["right"] for answer in own])
        if before == 1 and row[f"{name}_written"] == 0 and name != "locality":
            raise SystemExit(f"{row['prompt']!r}: {own[0]['written']!r} was right, perhaps by an alias, which the log does not hold")
        if name != "locality":
            held = [None if a["right"] is None else is_contained(a["written"], [a["wanted"]]) for a in own]
            row[f"{name}_contained"] = mean(held)
    local = [answer for answer in answers if answer["metric"] == "locality"]
    new = [[is_contained(answer[key], [row["target_new"]]) for key in ("written", "unedited_written")] for answer in local]
    row["hallucination"] = mean([after and not before for after, before in new])
    return row


def main() -> None:
    from transformers import AutoTokenizer

    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("out", type=Path, help="what 'comeba experiment' had for --out")
    parser.add_argument("model", help="for its tokenizer")
    args = parser.parse_args()
    tokenizer = AutoTokenizer.from_pretrained(args.model)
    for path in sorted(args.out.rglob("log.jsonl")):
        events = [json.loads(line) for line in path.read_text(encoding="utf-8").splitlines()]
        if (how := events[0].get("writing")) is None:
            continue
        changed = 0
        for n, event in enumerate(events):
            if event.get("event") == "record":
                events[n] = rescored(event, Writing(**how), tokenizer)
                keys = [f"{name}{way}" for name in METRICS for way in ("_written", "_contained")] + ["hallucination"]
                changed += any(events[n].get(key) != event.get(key) for key in keys)
        write_text(path, "".join(json.dumps(event) + "\n" for event in events))
        print(f"{path}: {changed} of {sum(event.get('event') == 'record' for event in events)} records are scored otherwise")


if __name__ == "__main__":
    main()
