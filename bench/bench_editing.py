"""Edits per second against the plain procedure: ``python bench/bench_editing.py [--quick] [--json] [--plot FILE]``

Sizes are those of GPT-2 124M with random weights (edited blocks 3–5, 20 steps, no early stop, real CounterFact records,
6 context prefixes), and the embedded model with early stop. The opponent is ``plain_procedure.py``, in the same run. It
is measured on fewer requests, which it takes one at a time anyway; its dense solve counts once a batch. ``--parts``
chooses among values, step, embedded, flat, memory.
"""

from __future__ import annotations

import argparse
import json
import statistics
import sys
import time

import plain_procedure
import torch
from common import DATA, finish, target
from plain_procedure import PlainEditor, target_value

from comeba_ext import EditConfig, Editor, evaluate, testbed
from comeba_ext.covariance import Covariance
from comeba_ext.editing.report import peak_memory, reset_peak_memory
from comeba_ext.editing.target_values import optimise_target_values
from comeba_ext.forward.activation_recorder import ActivationRecorder
from comeba_ext.forward.architectures import Architecture
from comeba_ext.storage import identity
from comeba_ext.text.prefixes import sample_prefixes
from comeba_ext.text.request import as_requests

STEPS = 20


def gpt2_124m():
    from transformers import GPT2Config, GPT2LMHeadModel, GPT2Tokenizer

    tokenizer = GPT2Tokenizer(vocab=str(DATA / "gpt2_bpe" / "vocab.json"), merges=str(DATA / "gpt2_bpe" / "merges.txt"))
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        model = GPT2LMHeadModel(GPT2Config()).eval()
    return model, tokenizer


def records(count: int) -> list:
    return as_requests(json.loads((DATA / "counterfact" / "counterfact_500.json").read_text(encoding="utf-8"))[:count])


def timed(function):
    start = plain_procedure.clock()
    result = function()
    return plain_procedure.clock() - start, result


def relative(found, wanted) -> float:
    return ((found - wanted).norm() / wanted.norm()).item()


def values_rows(quick: bool, rows: list, targets: list) -> None:
    model, tokenizer = gpt2_124m()
    requests = records(6 if quick else 50)
    config = EditConfig(layers=(3, 4, 5), steps=STEPS, early_stop=0.0)
    prefixes = sample_prefixes(model, tokenizer, 5, 10, 0)
    architecture = Architecture.of(model)
    some = requests[:: max(1, len(requests) // (1 if quick else 6))]
    seconds = {}
    found = {}
    for name, changes in (("float32", {}), ("bfloat16", {"compute_dtype": "bfloat16"})):

        def run(requests=requests, **more):
            changed = config.replace(**changes, **more)  # noqa: B023
            return optimise_target_values(model, tokenizer, architecture, changed, requests, prefixes)

        run(requests[:4], steps=1)  # warm-up
        times = [timed(run) for _ in range(1 if quick else 2)]
        seconds[name], found[name] = min(t for t, _ in times) / len(requests), times[0][1]
    plain = {}
    for name, twice in (("as published", True), ("logits once", False)):
        took, wanted = timed(lambda twice=twice: [target_value(model, tokenizer, config, r, prefixes, twice)[0] for r in some])
        plain[name] = took / len(some)
    where = [requests.index(request) for request in some]
    worst = max(relative(found["float32"].values[n], w) for n, w in zip(where, wanted, strict=True))
    h = optimise_target_values(model, tokenizer, architecture, config.replace(steps=1), requests, prefixes).values
    delta, half = (found[name].values - h for name in ("float32", "bfloat16"))
    for name, each in seconds.items():
        rows.append(
            {
                "what": "target values",
                "model": "gpt2-124m",
                "compute": name,
                "requests": len(requests),
                "edits_per_second": 1 / each,
                "plain_edits_per_second": 1 / plain["as published"],
                "plain_requests": len(some),
                "ratio": plain["as published"] / each,
                "ratio_to_plain_with_logits_once": plain["logits once"] / each,
            }
        )
    rows[-1]["difference_of_delta_from_float32"] = relative(half, delta)
    rows[-1]["mean_loss"], rows[-2]["mean_loss"] = (statistics.mean(found[n].losses) for n in ("bfloat16", "float32"))
    targets.append(target("target values float32, ours / plain", rows[-2]["ratio"], 8.0, rows[-2]["ratio"] >= 8))
    targets.append(target("target values bfloat16 compute, ours / plain", rows[-1]["ratio"], 15.0, rows[-1]["ratio"] >= 15))
    targets.append(target("target values, largest relative difference from plain", worst, 1e-3, worst <= 1e-3))


def random_covariance(model, layers: dict, seed: int = 0) -> Covariance:
    """Something positive definite of the right size; what it says of the model plays no part in the cost."""
    moments = {}
    for n, (name, layer) in enumerate(layers.items()):
        x = torch.randn(2 * layer.in_features, layer.in_features, generator=torch.Generator().manual_seed(seed + n))
        moments[name] = (x.mT @ x).double()
    return Covariance(moments, 2 * layer.in_features, identity(model, list(layers)), 1, 1)


def step_rows(quick: bool, rows: list, targets: list) -> None:
    config = EditConfig(layers=(3, 4, 5), steps=STEPS, early_stop=0.0, scope="reference")
    model, tokenizer = gpt2_124m()
    few = 2 if quick else 4
    for size in (10,) if quick else (10, 100):
        requests = records(size)
        editor = Editor(model, tokenizer, config)
        editor.set_covariance(random_covariance(model, editor.layers))
        prefixes, covariance = editor.prefixes, editor.covariance
        took, report = timed(lambda e=editor, r=requests: e.edit(r))
        editor.close()
        plain = PlainEditor(model, tokenizer, config, covariance, prefixes)
        plain.edit(requests[: few // 2])
        once = dict(plain.seconds)
        plain.edit(requests[few // 2 : few])
        # The first batch bears the start-up of the solver; updates count once a batch, the rest once a request.
        update = plain.seconds["update"] - once["update"]
        expected = {n: s / few * size for n, s in plain.seconds.items()} | {"update": update}
        for layer in plain.layers.values():
            layer.mode = "off"
        from comeba_ext.layers.attachment import detach

        detach(model)
        ratio = sum(expected.values()) / took
        rows.append(
            {
                "what": "whole step",
                "model": "gpt2-124m",
                "compute": "float32",
                "requests": size,
                "edits_per_second": size / took,
                "plain_edits_per_second": size / sum(expected.values()),
                "plain_requests": few,
                "ratio": ratio,
                "seconds": report.seconds,
                "plain_seconds": expected,
            }
        )
        targets.append(target(f"whole step, batch {size}, ours / plain", ratio, 8.0, ratio >= 8))


def embedded_rows(quick: bool, rows: list, targets: list) -> None:
    from comeba_ext.layers.attachment import detach

    count, few = (30, 5) if quick else (200, 60)
    requests = testbed.facts()[:count]
    model, tokenizer = testbed.load()
    editor = Editor(model, tokenizer)
    editor.collect_covariance(testbed.texts(), progress=False)
    covariance, prefixes, config = editor.covariance, editor.prefixes, editor.config
    editor.close()
    for size in (10, 100):
        plain = PlainEditor(model, tokenizer, config, covariance, prefixes)
        for start in range(0, few, size):
            plain.edit(requests[:few][start : start + size])
        detach(model)
        for optimizer in ("adam", "polyak"):
            editor = Editor(model, tokenizer, config.replace(optimizer=optimizer))
            editor.set_covariance(covariance)
            editor.edit(requests[:2])
            editor.rollback(0)
            took, reports = timed(lambda s=size, e=editor: list(e.edit_all(requests, s, progress=False)))
            scores = evaluate(model, tokenizer, requests, generate=False)
            editor.close()
            expected = {n: s / few * count for n, s in plain.seconds.items()}
            expected["update"] = plain.seconds["update"] / len(range(0, few, size)) * len(reports)
            ratio = sum(expected.values()) / took
            rows.append(
                {
                    "what": "whole step, early stop",
                    "model": "embedded",
                    "compute": "float32",
                    "optimizer": optimizer,
                    "requests": count,
                    "batch_size": size,
                    "edits_per_second": count / took,
                    "mean_steps": statistics.mean(s for r in reports for s in r.optimizer_steps),
                    "plain_edits_per_second": count / sum(expected.values()),
                    "plain_requests": few,
                    "ratio": ratio,
                    "seconds": {n: sum(r.seconds[n] for r in reports) for n in reports[0].seconds},
                    "plain_seconds": expected,
                    **{n: scores[n] for n in ("reliability", "generality", "locality")},
                }
            )
            targets.append(
                target(f"embedded model with early stop, batches of {size}, {optimizer}, ours / plain", ratio, 15.0, ratio >= 15)
            )


def flat_rows(quick: bool, rows: list, targets: list) -> None:
    """Ten thousand edits: 1,250 facts in each of their relation's eight wordings, always to the same new object.

    Metrics are of every fifth fact edited so far. From 2,000 edits on, locality is a lower bound: some locality prompts of
    facts 1,000 to 1,249 ask about subjects that are edited by then.

    The last tenth, with a fixed number of optimiser steps, batch by batch in turn with a second editor for which these are
    its first edits: the same requests on the same machine in the same minutes, batches 901–1,000 against batches 1–100.
    """
    import dataclasses

    from comeba_ext.testbed.templates import TEMPLATES

    relation = {t: name for name, templates in TEMPLATES.items() for t in templates}
    facts = testbed.facts()
    requests = [
        dataclasses.replace(fact, prompt=TEMPLATES[relation[fact.prompt]][wording], request_id=f"{fact.request_id}-{wording}")
        for wording in range(8)
        for fact in facts[:1250]
    ][: 200 if quick else 10_000]

    def prepared() -> Editor:
        model, tokenizer = testbed.load()
        editor = Editor(model, tokenizer)
        editor.collect_covariance(testbed.texts(), progress=False)
        editor.edit(requests[:10])
        editor.rollback(0)
        return editor

    editor, young, spent = prepared(), prepared(), 0.0
    last = len(requests) // 10

    def measured(edits: int) -> None:
        sample = facts[: min(edits, 1250)][::5]
        scores = evaluate(editor.model, editor.tokenizer, sample, generate=False)
        rows.append(
            {"what": "metrics", "model": "embedded", "edits": edits, "facts": len(sample)}
            | {f"{n}{s}": scores[f"{n}{s}"] for n in ("reliability", "generality", "locality") for s in ("", "_interval")}
            | {"seconds": spent}
        )
        print(rows[-1], file=sys.stderr, flush=True)

    for number, report in enumerate(editor.edit_all(requests[:-last], 10, progress=False), 1):
        spent += sum(report.seconds.values())
        if number * 10 in (1000, 2000, 5000):
            measured(number * 10)
    for each in (editor, young):
        each.config = each.config.replace(steps=4, early_stop=0.0)
    pairs = []
    for start in range(len(requests) - last, len(requests), 10):
        batch = requests[start : start + 10]
        pairs.append([each.edit(batch).seconds for each in (editor, young)])
        spent += sum(pairs[-1][0].values())
    measured(len(requests))
    whole = [[sum(seconds.values()) for seconds in pair] for pair in pairs]
    ratio = statistics.median(old / new for old, new in whole)
    phases = {
        f"{name}_{age}": statistics.median(pair[n][name] for pair in pairs)
        for n, age in enumerate(("old", "young"))
        for name in pairs[0][0]
    }
    rows.append(
        {
            "what": "step time",
            "model": "embedded",
            "edits": len(requests),
            "pairs": len(pairs),
            "ratio": ratio,
            "seconds_old": statistics.median(p[0] for p in whole),
            "seconds_young": statistics.median(p[1] for p in whole),
            "keys": {name: layer.score.known_keys() for name, layer in editor.layers.items()},
            **phases,
        }
    )
    targets.append(target(f"step time, the last {len(pairs)} batches of {len(requests)} edits / the first", ratio, 1.1, ratio <= 1.1))


def memory_rows(quick: bool, rows: list, targets: list) -> None:
    """High-water mark above the model's own, in fresh processes, for two token budgets."""
    import subprocess

    for budget in (1024,) if quick else (1024, 4096):
        code = (
            "import sys; sys.path.insert(0, 'bench'); import bench_editing as b; "
            f"print(b.peak_of_a_batch({10 if quick else 100}, {budget}))"
        )
        out = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
        rows.append({"what": "memory", "model": "gpt2-124m", "max_tokens": budget, **json.loads(out.stdout.splitlines()[-1])})


def peak_of_a_batch(size: int, max_tokens: int) -> str:
    model, tokenizer = gpt2_124m()
    config = EditConfig(layers=(3, 4, 5), steps=2, early_stop=0.0, max_tokens=max_tokens)
    prefixes = sample_prefixes(model, tokenizer, 5, 10, 0)
    cpu = torch.device("cpu")
    reset_peak_memory(cpu)
    before = peak_memory(cpu)
    architecture = Architecture.of(model)
    block, projection = architecture.block(model, 3), model.get_submodule(architecture.projection_name(3))
    trace = ActivationRecorder(block, projection, max_tokens)  # as the editor asks for
    optimise_target_values(model, tokenizer, architecture, config, records(size), prefixes, trace=trace)
    return json.dumps({"requests": size, "own_mb": before / 1e6, "above_mb": (peak_memory(cpu) - before) / 1e6})


PARTS = {"values": values_rows, "step": step_rows, "embedded": embedded_rows, "flat": flat_rows, "memory": memory_rows}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--quick", action="store_true", help="fewer requests and batches")
    parser.add_argument("--json", action="store_true")
    parser.add_argument("--parts", default=",".join(PARTS), help="comma-separated")
    parser.add_argument("--processor-time", action="store_true", help="one thread, its processor time: for a machine that does other work")
    parser.add_argument("--plot", help="write a PNG of where the time goes")
    args = parser.parse_args()
    if args.processor_time:
        torch.set_num_threads(1)
        plain_procedure.clock = time.process_time
    rows: list[dict] = []
    targets: list[dict] = []
    for part in args.parts.split(","):
        if part in ("values", "step", "memory") and not (DATA / "counterfact").is_dir():
            print(f"{part}: skipped, no real data at {DATA}; set COMEBA_TEST_DATA", file=sys.stderr)
            continue
        start = time.perf_counter()
        PARTS[part](args.quick, rows, targets)
        print(f"{part}: {time.perf_counter() - start:.0f} s", file=sys.stderr, flush=True)
    if args.plot:
        plot(rows, args.plot)
    finish(rows, targets, args.json)


def plot(rows: list[dict], path: str) -> None:
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    steps = [row for row in rows if "plain_seconds" in row]
    names = ("values", "keys", "update", "calibrate")
    figure, axes = plt.subplots(1, len(steps), figsize=(2.2 * len(steps), 3.4), constrained_layout=True)
    for axis, row in zip(axes, steps):
        for x, seconds in enumerate((row["plain_seconds"], row["seconds"])):
            bottom = 0.0
            for name, colour in zip(names, ("#0072B2", "#E69F00", "#009E73", "#CC79A7")):
                each = 1000 * seconds[name] / row["requests"]
                axis.bar(x, each, bottom=bottom, color=colour, label=name if x else None, width=0.6)
                bottom += each
            axis.text(x, bottom, f"{bottom:.0f}", ha="center", va="bottom", fontsize=8)
        size = row.get("batch_size", row["requests"])
        axis.set(xticks=(0, 1), xticklabels=("plain", "ours"))
        axis.set_title(f"{row['model']}, batch {size}\n{row.get('optimizer', 'adam')}: {row['ratio']:.1f}x", fontsize=9)
        axis.margins(y=0.15)
    axes[0].set_ylabel("milliseconds an edit")
    axes[-1].legend(fontsize=8)
    figure.savefig(path, dpi=130)


if __name__ == "__main__":
    main()
