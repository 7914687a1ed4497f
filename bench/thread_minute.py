"""Eight threads generate while a ninth edits, retracts and rolls back, for a minute: no error, every answer from one complete state.

    python bench/thread_minute.py --seconds 60

The states that the ninth thread goes through are first gone through alone, and what the model then says to every prompt is kept: an
answer that is none of these was computed half before and half behind an edit.
"""

from __future__ import annotations

import argparse
import random
import threading
import time
from concurrent.futures import ThreadPoolExecutor

import torch
from common import finish, target

from comeba_ext import EditConfig, Editor, testbed

CLOSE = 1e-3  # of logits: where a tensor begins decides how BLAS sums


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--seconds", type=float, default=60)
    parser.add_argument("--readers", type=int, default=8)
    parser.add_argument("--scope", nargs="+", default=["nearest", "reference", "zscore"])
    parser.add_argument("--quick", action="store_true", help="ten seconds")
    parser.add_argument("--json", action="store_true")
    args = parser.parse_args()
    torch.set_num_threads(1)  # threads of ours, not torch's
    rows = []
    for scope in args.scope:
        rows.append(minute(scope, 10 if args.quick else args.seconds, args.readers))
        if not args.json:
            print(", ".join(f"{key} {value}" for key, value in rows[-1].items()))
    errors, foreign = sum(len(row["errors"]) for row in rows), sum(row["of no state"] for row in rows)
    finish(rows, [target("errors", errors, 0, not errors), target("answers of no state", foreign, 0, not foreign)], args.json)


def minute(scope: str, seconds: float, count: int) -> dict:
    """One score's turn."""
    model, tokenizer = testbed.load()
    facts = testbed.facts()[:11]
    prompts = [tokenizer([fact.text], return_tensors="pt") for fact in facts]
    editor = Editor(model, tokenizer, EditConfig.for_model(model, scope=scope))
    editor.collect_covariance(testbed.texts(), tokens=100_000, progress=False)
    values = editor.target_values(facts[:10])

    def answer(n: int) -> torch.Tensor:
        """Logits of the first token that the model would write behind a prompt."""
        found = model.generate(**prompts[n], max_new_tokens=1, do_sample=False, output_logits=True, return_dict_in_generate=True)
        return found.logits[0][0]

    def steps():
        """One round: back where it began, through seven states."""
        yield editor.edit(facts[:4], values[:4])
        yield editor.edit(facts[4:8], values[4:8])
        yield editor.retract([facts[0].request_id])
        yield editor.edit(facts[8:10], values[8:])
        yield editor.edit(facts[10:11])  # with a target value of its own, found while the others read
        yield editor.rollback(2)
        yield editor.rollback(0)

    states = [[answer(n) for n in range(len(prompts))] for _ in steps()]
    stop, answers, foreign = threading.Event(), [0] * count, [0] * count

    def read(number: int) -> None:
        draw = random.Random(number)
        while not stop.is_set():
            n = draw.randrange(len(prompts))
            found = answer(n)
            answers[number] += 1
            foreign[number] += not any(torch.allclose(found, state[n], rtol=0, atol=CLOSE) for state in states)

    started, edits = time.monotonic(), 0
    with ThreadPoolExecutor(count) as threads:
        readers = [threads.submit(read, number) for number in range(count)]
        try:
            while time.monotonic() - started < seconds:
                for _ in steps():
                    edits += 1
                    if time.monotonic() - started >= seconds:
                        break
        finally:
            stop.set()
    return {
        "scope": scope,
        "readers": count,
        "seconds": round(time.monotonic() - started),
        "answers": sum(answers),
        "of no state": sum(foreign),
        "steps of the editing thread": edits,
        "errors": [repr(r.exception()) for r in readers if r.exception() is not None],
    }


if __name__ == "__main__":
    main()
