"""Does a step cost more the more was edited before? ``python bench/bench_step_cost.py [--quick] [--json] [--plot FILE]``

Two hundred consecutive batches of five edits of the embedded model, with a fixed number of optimiser steps so that every
batch has the same work. The cost of batch 200 is compared with that of batch 1, as medians of the first and last tenth.
Memory is the process's resident set, with the ledger's own bytes (keys and responses kept for retraction: d_in + d_out
floats a request and layer) beside it.
"""

from __future__ import annotations

import argparse
import gc
import statistics

from common import finish, target

from comeba_ext import EditConfig, Editor, testbed


def resident() -> int:
    """Bytes, now (not the high-water mark)."""
    with open("/proc/self/statm") as file:
        return int(file.read().split()[1]) * 4096


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--quick", action="store_true", help="60 batches of three")
    parser.add_argument("--json", action="store_true")
    parser.add_argument("--plot", help="write a PNG")
    args = parser.parse_args()
    batches, size = (60, 3) if args.quick else (200, 5)
    model, tokenizer = testbed.load()
    editor = Editor(model, tokenizer, EditConfig.for_model(model, steps=3, early_stop=0.0))
    editor.collect_covariance(testbed.texts(), progress=False)
    requests = testbed.facts()[: batches * size]
    editor.edit(requests[:size])  # warm-up
    editor.rollback(0)
    rows = []
    for report in editor.edit_all(requests, size, progress=False):
        gc.collect()
        ledger = sum(t.nbytes for e in editor.ledger.entries for t in (*e.keys.values(), *e.responses.values()))
        rows.append({"batch": report.step, "seconds": sum(report.seconds.values()), **report.seconds,
                     "resident_mb": resident() / 1e6, "ledger_mb": ledger / 1e6})  # fmt: skip
    tenth = batches // 10
    first, last = rows[:tenth], rows[-tenth:]
    ratio = statistics.median(r["seconds"] for r in last) / statistics.median(r["seconds"] for r in first)
    growth = statistics.median(r["resident_mb"] - r["ledger_mb"] for r in last) - statistics.median(
        r["resident_mb"] - r["ledger_mb"] for r in first
    )
    if args.plot:
        plot(rows, args.plot)
    finish(rows, [
        target(f"step time, last tenth / first tenth of {batches} batches", ratio, 1.10, ratio <= 1.10),
        target("growth of resident memory beyond the ledger, MB", growth, 50.0, growth <= 50.0),
    ], args.json)  # fmt: skip


def plot(rows: list[dict], path: str) -> None:
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    figure, (time, memory) = plt.subplots(1, 2, figsize=(9, 3.2), constrained_layout=True)
    x = [r["batch"] for r in rows]
    bottom = [0.0] * len(rows)
    for name, colour in zip(("values", "keys", "update", "calibrate"), ("#0072B2", "#E69F00", "#009E73", "#CC79A7")):
        top = [b + 1000 * r[name] for b, r in zip(bottom, rows)]
        time.fill_between(x, bottom, top, label=name, color=colour, linewidth=0)
        bottom = top
    time.set(xlabel="consecutive batch", ylabel="milliseconds a step", title="Time of a step", xlim=(1, len(rows)))
    time.set_ylim(0, 1.4 * statistics.median(bottom))
    time.legend(loc="lower right", fontsize=8)
    memory.plot(x, [r["resident_mb"] for r in rows], color="#0072B2", label="process")
    memory.plot(x, [r["ledger_mb"] for r in rows], color="#D55E00", label="of which ledger")
    memory.set(xlabel="consecutive batch", ylabel="MB", title="Memory", ylim=(0, None), xlim=(1, len(rows)))
    memory.legend(fontsize=8)
    figure.savefig(path, dpi=130)


if __name__ == "__main__":
    main()
