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
    parser.add_argument("--scope", default="nearest", choices=["nearest", "reference", "zscore"])
    parser.add_argument("--quick", action="store_true", help="ten seconds")
    parser.add_argument("--json", action="store_true")
    args = parser.parse_args()
    args.seconds = 10 if args.quick else args.seconds
    torch.set_num_threads(1)  # threads of ours, not torch's
    model, tokenizer = testbed.load()
    facts = testbed.facts()[:11]
    prompts = [tokenizer([fact.text], return_tensors="pt") for fact in facts]
    editor = Editor(model, tokenizer, EditConfig.for_model(model, scope=args.scope))
    editor.collect_covariance(testbed.texts(), tokens=100_000, progress=False)

    def answer(n: int) -> torch.Tensor:
        """Logits of the first token that the model would write behind a prompt."""
        found = model.generate(
            **prompts[n], max_new_tokens=1, do_sample=False, output_logits=True, return_dict_in_generate=True
        )
        return found.logits[0][0]

    values = editor.target_values(facts[:10])

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
    stop, answers, foreign = threading.Event(), [0] * args.readers, [0] * args.readers

    def read(number: int) -> None:
        draw = random.Random(number)
        while not stop.is_set():
            n = draw.randrange(len(prompts))
            found = answer(n)
            answers[number] += 1
            foreign[number] += not any(torch.allclose(found, state[n], rtol=0, atol=CLOSE) for state in states)

    started, edits = time.monotonic(), 0
    with ThreadPoolExecutor(args.readers) as threads:
        readers = [threads.submit(read, number) for number in range(args.readers)]
        try:
            while time.monotonic() - started < args.seconds:
                for _ in steps():
                    edits += 1
                    if time.monotonic() - started >= args.seconds:
                        break
        finally:
            stop.set()
    errors = [repr(reader.exception()) for reader in readers if reader.exception() is not None]
    row = {"scope": args.scope, "readers": args.readers, "seconds": round(time.monotonic() - started), "answers": sum(answers),
           "of no state": sum(foreign), "steps of the editing thread": edits, "errors": errors}  # fmt: skip
    if not args.json:
        print(", ".join(f"{key} {value}" for key, value in row.items()))
    finish([row], [target("errors", len(errors), 0, not errors), target("answers of no state", sum(foreign), 0, not sum(foreign))], args.json)


if __name__ == "__main__":
    main()
