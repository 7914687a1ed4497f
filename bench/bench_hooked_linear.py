"""What the hook costs a layer: ``python bench/bench_hooked_linear.py [--device cuda] [--quick] [--json]``

Exact and gated hook against the plain linear layer and against the torch reference hook (both products, then norm, score
and swap as separate operations), for the edited layers of four models; ``stacked`` is the exact hook on one product with
both weights in one matrix, which would read the input once. Variants take turns within a row, so that ratios come from one
run; medians with the spread (10th to 90th percentile). Caches are cold at every call, as they are in a model of which
other layers ran since; on a GPU a call is a replayed CUDA graph. ``limit`` is the time the machine would need at its own
measured copy bandwidth and matrix-product rate for the bytes and FLOPs of the shape; ``of_limit`` is that over the
measured time.
"""

from __future__ import annotations

import argparse
import functools
import math
import statistics
import sys
import time

import torch
from common import finish, target
from torch import nn
from torch.nn import functional as F

from comeba_ext import HookedLinear
from comeba_ext.ops import hooked_linear as ops

SHAPES = {"GPT2-XL": (6400, 1600), "GPT-J": (16384, 4096), "Llama-3-8B": (14336, 4096), "Qwen2.5-7B": (18944, 3584)}
TOKENS = (1, 8, 16, 32, 64, 512, 2048, 8192)
FEW = ops.DECODE_MOST  # tokens that the kernel of one pass over both weights can take
SHARES = (0.0, 1 / 512, 1 / 16)
DTYPES = {"bf16": torch.bfloat16, "fp16": torch.float16, "fp32": torch.float32}


class Clock:
    """Seconds of one call of each function, taking turns."""

    def __init__(self, device: str):
        self.device = device
        self.flush = torch.empty(256 << 20, dtype=torch.uint8, device=device)  # read and written between calls

    def __call__(self, calls: dict, seconds: float, rounds: int) -> dict[str, list[float]]:
        once = {name: self._prepare(call) for name, call in calls.items()}
        taken: dict[str, list[float]] = {name: [] for name in calls}
        start = time.perf_counter()
        while len(taken[next(iter(taken))]) < rounds or (time.perf_counter() - start < seconds and len(taken[next(iter(taken))]) < 50):
            for name, run in once.items():
                taken[name].append(run())
        return taken

    def _prepare(self, call):
        for _ in range(3 if self.device == "cuda" else 1):
            call()
        if self.device != "cuda":

            def run():
                self.flush.add_(1)
                start = time.perf_counter()
                call()
                return time.perf_counter() - start

            return run
        torch.cuda.synchronize()
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph):
            call()

        def replay():
            self.flush.zero_()
            begin, end = torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)
            begin.record()
            graph.replay()
            end.record()
            end.synchronize()
            return begin.elapsed_time(end) / 1e3

        return replay


def machine_rates(device: str, dtype: torch.dtype, clock: Clock) -> tuple[float, float]:
    """Copy bandwidth in bytes/s and matrix-product rate in FLOP/s."""
    size = 8192 if device == "cuda" else 2048
    a, b = torch.randn(2, size, size, device=device).to(dtype)
    source = torch.empty(1 << (30 if device == "cuda" else 28), dtype=torch.uint8, device=device).zero_()
    copy = source.clone()
    taken = clock({"copy": lambda: copy.copy_(source), "product": lambda: a @ b}, 1.0, 5)
    return 2 * source.numel() / min(taken["copy"]), 2 * size**3 / min(taken["product"])


def threshold(layer: HookedLinear, x: torch.Tensor, count: int) -> float:
    """The α that puts ``count`` tokens in scope."""
    if count == 0:
        return math.inf
    return layer.scores(x).flatten().topk(count).values[-1].item()


@torch.no_grad()
def measure(shape: str, tokens: int, dtype: str, share: float, device: str, clock: Clock, rates, seconds: float) -> dict:
    d_in, d_out = SHAPES[shape]
    generator = torch.Generator(device).manual_seed(0)
    base = nn.Linear(d_in, d_out, bias=shape == "GPT-J", device=device, dtype=DTYPES[dtype])
    x = torch.randn(1, tokens, d_in, generator=generator, device=device).to(DTYPES[dtype])
    layers = {gate: HookedLinear(base, scope="reference", gate=gate) for gate in ("exact", "sketch")}
    delta = (torch.randn(d_out, d_in, generator=generator, device=device) * d_in**-0.5).to(DTYPES[dtype])
    for layer in layers.values():
        layer.delta.copy_(delta)
        layer.score.scale.fill_(float(d_out))
        layer.alpha.fill_(threshold(layer, x, round(share * tokens)))
    exact = layers["exact"]

    def reference():
        decision = (None, None, exact.alpha, exact.score.scale, "reference")
        return ops.exact_hook_ref(F.linear(x, base.weight, base.bias), F.linear(x, delta), *decision)

    both = torch.cat((base.weight, delta))
    bias = None if base.bias is None else torch.cat((base.bias, torch.zeros_like(base.bias)))

    def stacked():
        output, edit = F.linear(x, both, bias).split(d_out, -1)
        return ops.exact_hook(output, edit, None, None, exact.alpha, exact.score.scale, "reference", inplace=True)

    calls = {
        "plain": lambda: base(x),
        "reference": reference,
        "exact": lambda: exact(x),
        "stacked": stacked,
        "gated": lambda: layers["sketch"](x),
    }
    if device == "cuda" and tokens <= FEW:  # whether the layer takes them or not: where one should end and the other begin
        for name, layer in layers.items():
            sketch = layer.score.sketch(layer.delta) if name == "sketch" else None
            decision = (None, None, layer.alpha, layer.score.scale, "reference")
            few = functools.partial(ops.decode_hook, x, base.weight, base.bias, delta, sketch, *decision)
            calls[f"one_pass_{'gated' if name == 'sketch' else name}"] = few
    taken = clock(calls, seconds, 7)
    median = {name: statistics.median(times) for name, times in taken.items()}
    row = {
        "shape": shape,
        "d_in": d_in,
        "d_out": d_out,
        "tokens": tokens,
        "dtype": dtype,
        "in_scope": share,
        "calls": len(taken["plain"]),
        "plain_ms": median["plain"] * 1e3,
    }
    bandwidth, rate = rates
    item = x.element_size()
    for name, products in (("plain", 1), ("exact", 2), ("gated", 1 + share)):
        size = item * (d_in * d_out * math.ceil(products) + tokens * (d_in + d_out))
        limit = max(size / bandwidth, 2 * tokens * d_in * d_out * products / rate)
        row[f"{name}_of_limit"] = limit / median[name]
    for name in [name for name in calls if name != "plain"]:
        ratios = sorted(own / plain for own, plain in zip(taken[name], taken["plain"], strict=True))
        row[f"{name}_ratio"] = statistics.median(ratios)  # of neighbours in time: a busy machine slows both
        row[f"{name}_spread"] = [round(ratios[len(ratios) // 10], 4), round(ratios[-1 - len(ratios) // 10], 4)]
    for name in ("exact", "gated"):
        ratios = [own / reference for own, reference in zip(taken[name], taken["reference"], strict=True)]
        row[f"{name}_to_reference"] = statistics.median(ratios)
    return {k: round(v, 4) if isinstance(v, float) else v for k, v in row.items()}


def worst(rows: list[dict], column: str, keep, reduce=max) -> float | None:
    values = [row[column] for row in rows if keep(row)]
    return reduce(values) if values else None


def targets_of(rows: list[dict], device: str) -> list[dict]:
    gpu = device == "cuda"
    main = "bf16" if gpu else "fp32"
    rows = [row for row in rows if row["dtype"] == main and "skipped" not in row]
    at_most = [
        ("exact hook / plain, 2048 tokens and more", "exact_ratio", 2.05 if gpu else 2.10, lambda r: r["tokens"] >= 2048),
        ("gated hook / plain, nothing in scope", "gated_ratio", 1.08 if gpu else 1.15, lambda r: not r["in_scope"]),
        (
            "gated hook / plain, 1 token in 512 in scope, prefill",
            "gated_ratio",
            1.15 if gpu else 1.30,
            lambda r: 0 < r["in_scope"] < 0.01 and r["tokens"] >= 512,
        ),
    ]
    if gpu:
        at_most += [
            (
                "exact hook / torch reference, decode, GPT2-XL",
                "exact_to_reference",
                0.6,
                lambda r: r["tokens"] <= 64 and r["shape"] == "GPT2-XL",
            ),
            (
                "exact hook / torch reference, decode, other shapes",
                "exact_to_reference",
                0.85,
                lambda r: r["tokens"] <= 64 and r["shape"] != "GPT2-XL",
            ),
        ]
    found = []
    for name, column, limit, keep in at_most:
        value = worst(rows, column, keep)
        if value is not None:
            found.append(target(f"{name} ({main}, worst row)", value, limit, value <= limit))
    if gpu:
        value = worst(rows, "exact_of_limit", lambda r: r["tokens"] <= 8, min)
        if value is not None:
            found.append(target(f"exact hook, decode 1-8 tokens, share of the memory limit ({main})", value, 0.75, value >= 0.75))
    return found


def plot(rows: list[dict], path) -> None:
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as pyplot

    dtype = rows[0]["dtype"]
    rows = [row for row in rows if row["dtype"] == dtype and not row["in_scope"] and "skipped" not in row]
    shapes = [shape for shape in SHAPES if any(row["shape"] == shape for row in rows)]
    figure, axes = pyplot.subplots(1, len(shapes), figsize=(3.2 * len(shapes), 3.2), sharey=True, squeeze=False)
    for axis, shape in zip(axes[0], shapes, strict=True):
        own = [row for row in rows if row["shape"] == shape]
        for name, colour, label in (
            ("reference", "#999999", "torch reference"),
            ("exact", "#D55E00", "exact hook"),
            ("gated", "#0072B2", "gated hook"),
        ):
            axis.plot([r["tokens"] for r in own], [r[f"{name}_ratio"] for r in own], "o-", color=colour, label=label)
        axis.axhline(1, color="black", linewidth=0.8)
        axis.set_xscale("log", base=2)
        axis.set_title(f"{shape}, {own[0]['d_in']}→{own[0]['d_out']}", fontsize=9)
        axis.set_xlabel("tokens")
    axes[0][0].set_ylabel(f"time / plain linear layer ({dtype})")
    axes[0][0].legend(fontsize=8)
    axes[0][0].set_ylim(bottom=0)
    figure.tight_layout()
    figure.savefig(path, dpi=120)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu", choices=("cpu", "cuda"))
    parser.add_argument("--shapes", nargs="+", choices=SHAPES, help="some shapes only")
    parser.add_argument("--quick", action="store_true", help="one shape, up to 2048 tokens")
    parser.add_argument("--json", action="store_true")
    parser.add_argument("--plot", metavar="PNG", help="also draw the ratios")
    args = parser.parse_args()
    gpu = args.device == "cuda"
    clock = Clock(args.device)
    dtypes = ("bf16", "fp16", "fp32") if gpu and not args.quick else ("bf16",) if gpu else ("fp32",)
    shapes = args.shapes or (list(SHAPES)[:1] if args.quick and not gpu else list(SHAPES))
    rows = []
    for dtype in dtypes:
        rates = machine_rates(args.device, DTYPES[dtype], clock)
        for shape in shapes:
            for tokens in TOKENS:
                for share in SHARES:
                    if share and round(share * tokens) == 0:
                        continue
                    d_in, d_out = SHAPES[shape]
                    expected = 8 * 2 * tokens * d_in * d_out / rates[1]  # all variants once
                    if expected > (4 if args.quick else 40):
                        rows.append(
                            {
                                "shape": shape,
                                "tokens": tokens,
                                "dtype": dtype,
                                "in_scope": share,
                                "skipped": f"a round would take {expected:.0f} s on this machine",
                            }
                        )
                        continue
                    rows.append(
                        measure(shape, tokens, dtype, share, args.device, clock, rates, 0.5 if gpu else 4.0 if args.quick else 10.0)
                    )
                    print("  ".join(f"{k} {v}" for k, v in rows[-1].items()), file=sys.stderr, flush=True)
    if args.plot:
        plot(rows, args.plot)
    finish(rows, targets_of(rows, args.device), args.json)


if __name__ == "__main__":
    main()
