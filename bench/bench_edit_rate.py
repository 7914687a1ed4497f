"""How many edits a second: ``python bench/bench_edit_rate.py [SHAPE or folder] [--quick] [--json]``

Real CounterFact records in batches of 10 and 100, a model of a real shape with random weights (default: llama-3-8b in bfloat16 on a
GPU, gpt2 on a CPU) or one from a folder, default settings but for the loss evaluations: nine each, which is what a target value of
SmolLM2 takes in the mean (``target_values.py``) and what a model that knows nothing would not stop at. The covariance is a random one
of the right size. What is timed is the whole step, from records to the model that answers.
"""

from __future__ import annotations

import argparse
import time

import torch
from bench_editing import random_covariance
from bench_model_overhead import loaded
from common import counterfact, finish, one_a_subject, target

from comeba_ext import EditConfig, Editor
from comeba_ext.text.request import consecutive_batches

EVALUATIONS, WANTED = 9, 20.0  # edits a second on a GPU, 7 to 8 billion parameters


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    gpu = torch.cuda.is_available()
    parser.add_argument("model", nargs="?", default="llama-3-8b" if gpu else "gpt2", help="a shape of bench_model_overhead.py, or a folder")
    parser.add_argument("--quick", action="store_true", help="two batches of ten")
    parser.add_argument("--json", action="store_true")
    args = parser.parse_args()
    device, dtype = ("cuda", torch.bfloat16) if gpu else ("cpu", torch.float32)
    model, tokenizer = loaded(args.model, dtype, device)
    editor = Editor(model, tokenizer, EditConfig.for_model(model, steps=EVALUATIONS, early_stop=0.0))
    editor.set_covariance(random_covariance(model, editor.layers))
    requests = one_a_subject(counterfact("train", 1000))
    editor.edit(requests[:2])  # warm-up
    editor.rollback(0)
    rows = []
    for size, count in ((10, 20),) if args.quick else ((10, 50), (100, 300)):
        reports, start = [], time.perf_counter()
        for batch in consecutive_batches(requests[:count], size):
            reports.append(editor.edit(batch))
        if gpu:
            torch.cuda.synchronize()
        seconds = time.perf_counter() - start
        edited = sum(len(report.request_ids) for report in reports)
        phases = {phase: sum(report.seconds[phase] for report in reports) / edited for phase in reports[0].seconds}
        rows.append({"model": args.model, "device": device, "dtype": str(dtype), "batch_size": size, "edits": edited})
        rows[-1] |= {"edits_a_second": edited / seconds, **{f"{phase}_seconds": own for phase, own in phases.items()}}
        editor.rollback(0)
    targets = []
    if gpu:
        best = max(row["edits_a_second"] for row in rows)
        targets.append(target(f"edits a second, {args.model}", best, WANTED, best >= WANTED))
    finish(rows, targets, args.json)


if __name__ == "__main__":
    main()
