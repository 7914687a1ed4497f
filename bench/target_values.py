"""Target values of a real model against the plain procedure: ``python bench/target_values.py MODEL [--quick] [--json]``

With the defaults for the model, on records of counterfact-train: ours for a batch of them, in float32 and with matrix products in
bfloat16, and the paper's procedure (``plain_procedure.py``: one request at a time, Adam, every layer and every position at each
step, the head twice) on some of the same requests, in the same run. Beside seconds, what was found: steps and losses. Settings were
chosen on other records of the same file (the first 300).
"""

from __future__ import annotations

import argparse
import statistics
import time

import plain_procedure
import torch
from common import counterfact, finish, target

from comeba_ext import EditConfig
from comeba_ext.editing import target_values
from comeba_ext.forward.architectures import Architecture
from comeba_ext.loading import load_model
from comeba_ext.text.prefixes import sample_prefixes
from comeba_ext.text.request import as_requests

FIRST = 400  # of the records that no setting was chosen on
LIMITS = {"float32": 12.0, "bfloat16": 25.0}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("model", help="a folder with a model, such as bench/real_models.py makes")
    parser.add_argument("--quick", action="store_true", help="fewer requests")
    parser.add_argument("--json", action="store_true")
    args = parser.parse_args()
    count, few = (10, 2) if args.quick else (40, 8)
    model, tokenizer = load_model(args.model, torch.float32)
    requests = as_requests(counterfact("train", FIRST + count)[FIRST:])
    config, architecture = EditConfig.for_model(model), Architecture.of(model)
    prefixes = sample_prefixes(model, tokenizer, config.prefixes, config.prefix_length, config.seed)

    def run(dtype: str, requests=requests, **changes):
        changed = config.replace(compute_dtype=None if dtype == "float32" else dtype, **changes)
        start = time.perf_counter()
        found = target_values.optimise_target_values(model, tokenizer, architecture, changed, requests, prefixes)
        return time.perf_counter() - start, found

    run("float32", requests[:2], steps=1)  # warm-up
    start = time.perf_counter()
    plain = [plain_procedure.target_value(model, tokenizer, config, request, prefixes) for request in requests[:: count // few]]
    plain_seconds = (time.perf_counter() - start) / len(plain)
    own = {"model": args.model.rstrip("/").rpartition("/")[2], "optimizer": config.optimizer}
    rows, targets = [], []
    for dtype, limit in LIMITS.items():
        seconds, found = run(dtype)
        ratio = plain_seconds * count / seconds
        rows.append(
            {
                **own,
                "compute": dtype,
                "requests": count,
                "seconds_an_edit": seconds / count,
                "steps": statistics.mean(found.steps),
                "mean_loss": statistics.mean(found.losses),
                "plain_requests": len(plain),
                "plain_seconds_an_edit": plain_seconds,
                "plain_steps": statistics.mean(steps for *_, steps in plain),
                "plain_mean_loss": statistics.mean(loss for _, loss, _ in plain),
                "ratio": ratio,
            }
        )
        targets.append(target(f"target values of {own['model']}, {dtype}, ours / plain", ratio, limit, ratio >= limit))
    finish(rows, targets, args.json)


if __name__ == "__main__":
    main()
