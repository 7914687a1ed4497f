"""Does a step cost more the more was edited before? ``python bench/bench_step_cost.py [--edits N] [--quick] [--json] [--plot FILE]``

Two hundred consecutive batches of five edits of the embedded model, with a fixed number of optimiser steps so that every
batch has the same work. The last tenth is edited twice, batch by batch in turn: by the editor that has edited everything
before, and by a fresh editor for which these are the first batches. The two meet the same requests and the same machine,
so that neither the length of the prompts nor a neighbour's load can pass for growth (windows minutes apart differed by
20 % on shared cores). Memory is the process's resident set after free heap pages were handed back (``malloc_trim``; without
it the allocator's spare pages come and go by 100 MB), with the ledger's own bytes (keys and responses kept for retraction:
d_in + d_out floats a request and layer) beside it.

With ``--edits 10000``: so many records of CounterFact, other subjects all, are edited with values that nobody looked for, which costs
little; then twenty batches of ten, with as many steps as the model's settings have, by that editor and by a fresh one in turn.
"""

from __future__ import annotations

import argparse
import ctypes
import gc
import statistics

import torch
from common import counterfact, finish, one_a_subject, target

from comeba_ext import EditConfig, Editor, testbed
from comeba_ext.text.request import consecutive_batches


def resident() -> int:
    """Bytes in use, now (not the high-water mark): the resident set without the heap's free pages, where libc can say."""
    gc.collect()
    if trim := getattr(ctypes.CDLL(None), "malloc_trim", None):
        trim(0)
    with open("/proc/self/statm") as file:
        return int(file.read().split()[1]) * 4096


def fresh_editor(requests, size: int, **changes) -> Editor:
    model, tokenizer = testbed.load()
    editor = Editor(model, tokenizer, EditConfig.for_model(model, early_stop=0.0, **changes))
    editor.collect_covariance(testbed.texts(), progress=False)
    editor.edit(requests[:size])  # warm-up
    editor.rollback(0)
    return editor


def after(edits: int, batches: int) -> tuple[list[dict], list[dict]]:
    """Rows and targets of batches of ten after so many edits, and before any."""
    size, many, width = 10, 100, testbed.load()[0].config.hidden_size
    requests = one_a_subject(counterfact("train") + counterfact("edit"))[: edits + batches * size]
    young, old = fresh_editor(requests, size), fresh_editor(requests, size)
    generator = torch.Generator().manual_seed(0)
    for batch in consecutive_batches(requests[:edits], many):
        old.edit(batch, torch.randn(len(batch), width, generator=generator))
    rows = []
    for batch in consecutive_batches(requests[edits:], size):
        reports = {name: editor.edit(batch) for name, editor in (("", old), ("fresh_", young))}
        rows.append({"live": len(old.ledger.live()), "requests": len(batch)})
        for name, report in reports.items():
            rows[-1] |= {f"{name}seconds": sum(report.seconds.values())}
            rows[-1] |= {f"{name}{phase}": seconds for phase, seconds in report.seconds.items()}
    ratio = statistics.median(row["seconds"] / row["fresh_seconds"] for row in rows)
    return rows, [target(f"step time after {edits:,} edits / the first steps of a fresh editor", ratio, 1.10, ratio <= 1.10)]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--edits", type=int, help="instead: steps after so many edits, and first ones")
    parser.add_argument("--quick", action="store_true", help="60 batches of three; with --edits, five batches")
    parser.add_argument("--json", action="store_true")
    parser.add_argument("--plot", help="write a PNG")
    args = parser.parse_args()
    if args.edits is not None:
        finish(*after(args.edits, 5 if args.quick else 20), args.json)
    batches, size = (60, 3) if args.quick else (200, 5)
    tenth = batches // 10
    requests = testbed.facts()[: batches * size]
    editor, young = (fresh_editor(requests, size, steps=3) for _ in range(2))
    rows = []
    for start in range(0, batches * size, size):
        batch = requests[start : start + size]
        report = editor.edit(batch)
        ledger = sum(t.nbytes for e in editor.ledger.entries for t in (*e.keys.values(), *e.responses.values()))
        row = {
            "batch": report.step,
            "seconds": sum(report.seconds.values()),
            **report.seconds,
            "resident_mb": resident() / 1e6,
            "ledger_mb": ledger / 1e6,
        }
        if report.step > batches - tenth:
            row["fresh_seconds"] = sum(young.edit(batch).seconds.values())
        rows.append(row)
    ratio = statistics.median(r["seconds"] / r["fresh_seconds"] for r in rows[-tenth:])
    own = [r["resident_mb"] - r["ledger_mb"] for r in rows[:-tenth]]  # up to where the fresh editor begins to grow too
    growth = statistics.median(own[-tenth:]) - statistics.median(own[:tenth])
    if args.plot:
        plot(rows, args.plot)
    finish(
        rows,
        [
            target(f"step time, batches {batches - tenth + 1}-{batches} / the same by a fresh editor", ratio, 1.10, ratio <= 1.10),
            target(f"growth beyond the ledger over {batches - tenth} batches, MB", growth, 50.0, growth <= 50.0),
        ],
        args.json,
    )


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
