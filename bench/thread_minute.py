"""Eight threads generate while a ninth edits, retracts and rolls back, for a minute: no error, every answer from one complete state.

    python bench/thread_minute.py --seconds 60

The states that the ninth thread goes through are first gone through alone, and what the model then says to every prompt is kept: an
answer that is none of these was computed half before and half behind an edit. Prints, and writes to ``results/threads.json``.
"""

from __future__ import annotations

import argparse
import json
import random
import sys
import threading
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import torch

sys.path.insert(0, str(Path(__file__).parent))
import common

from comeba_ext import EditConfig, Editor, testbed

CLOSE = 1e-3  # of logits: where a tensor begins decides how BLAS sums


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--seconds", type=float, default=60)
    parser.add_argument("--readers", type=int, default=8)
    parser.add_argument("--scope", default="nearest", choices=["nearest", "reference", "zscore"])
    args = parser.parse_args()
    torch.set_num_threads(1)  # threads of ours, not torch's
    model, tokenizer = testbed.load()
    facts = testbed.facts()[:12]
    prompts = [tokenizer([fact.text], return_tensors="pt") for fact in facts]
    editor = Editor(model, tokenizer, EditConfig.for_model(model, scope=args.scope))
    editor.collect_covariance(testbed.texts(), tokens=100_000, progress=False)

    def answer(n: int) -> torch.Tensor:
        """Logits of the first token that the model would write behind a prompt."""
        found = model.generate(
            **prompts[n], max_new_tokens=1, do_sample=False, output_logits=True, return_dict_in_generate=True
        )
        return found.logits[0][0]

    def steps():
        """One round: back where it began, through six states."""
        yield editor.edit(facts[:4])
        yield editor.edit(facts[4:8])
        yield editor.retract([facts[0].request_id])
        yield editor.edit(facts[8:])
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
        finally:
            stop.set()
    errors = [repr(reader.exception()) for reader in readers if reader.exception() is not None]
    took = time.monotonic() - started
    row = {"scope": args.scope, "readers": args.readers, "seconds": round(took), "answers": sum(answers), "of no state": sum(foreign),
           "errors": len(errors), "steps of the editing thread": edits}  # fmt: skip
    print(", ".join(f"{key} {value}" for key, value in row.items()), *errors, sep="\n")
    path = Path(__file__).parent / "results" / "threads.json"
    rows = [old for old in (json.loads(path.read_text())["rows"] if path.exists() else []) if old["scope"] != args.scope]
    path.write_text(json.dumps({"machine": common.machine(), "rows": [*rows, row]}, indent=1) + "\n")
    raise SystemExit(bool(errors or sum(foreign)))


if __name__ == "__main__":
    main()
