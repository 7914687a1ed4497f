"""What an edited layer's key memory costs a batch: ``python bench/bench_key_memory.py [--quick] [--json] [--plot FILE]``

A batch of u keys means ``C ← C + K Kᵀ`` and ``C⁻¹ K``. Four ways, in float64, a row a shape:

- ours: ``KeyMemory.update``; batches until what is pending has been folded in at least once, so that the mean (what the
  ratios use) has that cost in it; the median is what most batches wait;
- factor: the same in the factor form, which it takes when the inverse would lose accuracy;
- refactorise: ``cholesky(C)`` and two triangular solves;
- solve: ``torch.linalg.solve``, what the authors' code does for every layer and batch.

The last rows are about error: a thousand batches of ten keys, a third of them followed by a downdate, with heavy-tailed
keys and covariances of condition 10⁴ to 10⁶ (the embedded model's have 10³ to 10⁵); C⁻¹K against a solution refined with
residuals in extended precision. That is twenty times more keys than dimensions or more, which no edited model sees, so
most of these end in the factor form; ``batches_as_inverse`` counts until then.
"""

from __future__ import annotations

import argparse
import os
import statistics
import sys
import time

import numpy as np
import torch
from common import finish, target

from comeba_ext.forward.budget import free_memory
from comeba_ext.memory.factor_form import FactorForm
from comeba_ext.memory.inverse_form import _most_pending
from comeba_ext.memory.key_memory import KeyMemory


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--quick", action="store_true", help="two shapes, one of them the targets', and fewer repetitions")
    parser.add_argument("--json", action="store_true")
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu", choices=["cpu", "cuda"])
    parser.add_argument("--plot", help="write a PNG")
    args = parser.parse_args()
    # Inputs of MLP projections: 6400 GPT-2-XL, 14336 Llama-3-8B, 16384 GPT-J, 18944 Qwen2.5-7B.
    shapes = (
        [(1600, 10, 1), (6400, 10, 1)]
        if args.quick
        else [
            *((1600, u, 1) for u in (1, 10, 100, 1000)),
            (1600, 10, 6),
            *((6400, u, 1) for u in (1, 10, 100, 1000)),
            (6400, 10, 6),
            *((d, 10, 1) for d in (14336, 16384, 18944)),
        ]
    )
    rows = []
    for d, u, layers in shapes:
        reason = unfit(d, layers, args.device)
        row = {"d": d, "u": u, "layers": layers, "device": args.device, "load_before": round(os.getloadavg()[0], 1)}
        rows.append(row | ({"skipped": reason} if reason else measure(d, u, layers, args.device, args.quick)))
        print(rows[-1], file=sys.stderr, flush=True)
    threads = torch.get_num_threads()
    torch.set_num_threads(1)  # matrices this small are slower with more
    rows += errors(args.device, 128 if args.quick else 256, 1000)
    torch.set_num_threads(threads)
    if args.plot:
        plot(rows, args.plot)
    headline = next(r for r in rows if (r.get("d"), r.get("u"), r.get("layers")) == (6400, 10, 1))
    ratio = headline["ours_mean"] / headline["solve"]
    error = max(r["error"] for r in rows if "error" in r)
    finish(
        rows,
        [
            target("update+solve / linalg.solve, d = 6400, u = 10, float64", ratio, 1 / 20, ratio <= 1 / 20),
            {"name": "relative error of C⁻¹K after 1,000 batches", "value": error, "limit": 1e-9, "holds": error <= 1e-9},
        ],
        args.json,
    )


def unfit(d: int, layers: int, device: str) -> str | None:
    """Why a shape is left out, if it is."""
    need = (layers + 3) * 8 * d * d  # every layer's memory, the matrix, and what a solve or a fold copies
    free = free_memory(torch.device(device))
    if device == "cpu" and d > 6400:
        seconds = 0.7 * d**3 / 5e10
        return f"linalg.solve alone takes about {seconds:.0f} s a call on a CPU, the inverse to start with several times that"
    return f"needs {need / 1e9:.0f} GB, {free / 1e9:.0f} GB are free" if need > 0.9 * free else None


def seconds_of(step, repetitions: int, device: str) -> list[float]:
    """Wall time of each call, the device idle before and after."""
    times = []
    for _ in range(repetitions):
        if device == "cuda":
            torch.cuda.synchronize()
        start = time.perf_counter()
        step()
        if device == "cuda":
            torch.cuda.synchronize()
        times.append(time.perf_counter() - start)
    return times


def covariance(d: int, device: str) -> torch.Tensor:
    """λ·C0 with λ = 1000 and eigenvalues from 1 to 10⁻⁴, without an O(d³) rotation: a rank-64 part and a diagonal."""
    generator = torch.Generator(device).manual_seed(0)
    mix = torch.randn(d, 64, generator=generator, dtype=torch.float64, device=device) / d**0.5
    matrix = 1000 * (mix @ mix.mT)
    matrix.diagonal().add_(1000 * torch.logspace(0, -4, d, dtype=torch.float64, device=device))
    return matrix


def measure(d: int, u: int, layers: int, device: str, quick: bool) -> dict:
    matrix = covariance(d, device)
    generator = torch.Generator(device).manual_seed(1)
    scale = matrix.diagonal().sqrt() / 1000**0.5
    keys = [scale[:, None] * torch.randn(d, u, generator=generator, dtype=torch.float64, device=device) for _ in range(3)]
    memories = [KeyMemory(matrix)]
    for _ in range(layers - 1):
        memories.append(KeyMemory.from_tensors(memories[0].tensors()))
    if any(memory.form != "inverse" for memory in memories):
        raise RuntimeError("the benchmark's covariance is meant to suit the inverse form")
    count = iter(range(10**9))

    def ours():
        for memory in memories:
            memory.update(keys[next(count) % 3])

    ours()  # warm-up
    cycle = -(-_most_pending(d) // u)  # batches from one fold to the next
    times = seconds_of(ours, cycle * max(1, -(-(3 if d * u >= 10**6 else 12) // cycle)), device)
    forms = {memory.form for memory in memories}
    del memories[1:]
    row = {
        "form": "/".join(sorted(forms)),
        "ours_median": statistics.median(times),
        "ours_mean": statistics.mean(times),
        "ours_worst": max(times),
        "ours_batches": len(times),
    }

    few = 2 if quick or d * u >= 10**6 else 3
    probe, lower = keys[0], torch.linalg.cholesky(matrix)
    factor = FactorForm(lower.contiguous())
    factor.change(probe, 1)
    others = {
        "factor": lambda: factor.change(probe, 1),
        "refactorise": lambda: torch.cholesky_solve(probe, torch.linalg.cholesky(matrix)),
        "solve": lambda: torch.linalg.solve(matrix, probe),
    }
    for name, step in others.items():
        times = seconds_of(step, few, device)
        row[name], row[f"{name}_spread"] = layers * statistics.median(times), layers * (max(times) - min(times))
    for name in others:
        row[f"ours / {name}"] = round(row["ours_mean"] / row[name], 4)
    return row


def errors(device: str, d: int, batches: int) -> list[dict]:
    """Relative error of C⁻¹K, the worst column, for both forms and for a factorisation of the exact sum."""
    generator = torch.Generator().manual_seed(0)
    random = lambda *shape: torch.randn(*shape, generator=generator, dtype=torch.float64)  # noqa: E731
    rotation = torch.linalg.qr(random(d, d))[0]
    rows = []
    for condition, lam, kind in (
        (1e4, 1000.0, "corpus-like"),
        (1e6, 1000.0, "corpus-like"),
        (1e6, 1.0, "corpus-like"),
        (1e6, 1.0, "isotropic"),
    ):
        root = rotation * torch.logspace(0, -np.log10(condition) / 2, d, dtype=torch.float64)

        def draw(u: int, kind=kind, root=root) -> torch.Tensor:
            return random(d, u) * root.norm() / d if kind == "isotropic" else root @ (random(d, u) * random(1, u).exp())

        matrix = lam * (root @ root.mT)
        matrix = (matrix + matrix.mT) / 2
        memory, live, as_inverse = KeyMemory(matrix.to(device)), [], 0
        factor = FactorForm(torch.linalg.cholesky(matrix).contiguous().to(device))
        for n in range(batches):
            live.append(draw(10))
            memory.update(live[-1])
            factor = factor.change(live[-1].to(device), 1)[0]
            if n % 3 == 2:
                gone = live.pop(n % len(live))
                memory.downdate(gone)
                factor = factor.change(gone.to(device), -1)[0]
            as_inverse += memory.form == "inverse"
        everything = torch.cat(live, 1).numpy().astype(np.longdouble)
        total = matrix.numpy().astype(np.longdouble) + everything @ everything.T
        fresh = torch.linalg.cholesky(torch.from_numpy(total.astype(np.float64)))
        probe = torch.cat([draw(10), live[-1]], 1)
        exact = refined(total, fresh, probe)
        rows.append(
            {
                "d": d,
                "batches": batches,
                "u": 10,
                "keys": kind,
                "condition": condition,
                "lambda": lam,
                "batches_as_inverse": as_inverse,
                "error": worst(memory.solve(probe.to(device)), exact),
                "error_factor_form": worst(factor.solve(probe.to(device)), exact),
                "error_fresh_factorisation": worst(torch.cholesky_solve(probe, fresh), exact),
            }
        )
    return rows


def refined(total: np.ndarray, factor: torch.Tensor, keys: torch.Tensor) -> np.ndarray:
    """``C⁻¹K`` by iterative refinement, residuals in extended precision."""
    solution = np.zeros(keys.shape, np.longdouble)
    for _ in range(10):
        residual = keys.numpy().astype(np.longdouble) - total @ solution
        solution = solution + torch.cholesky_solve(torch.from_numpy(residual.astype(np.float64)), factor).numpy()
    return solution


def worst(found: torch.Tensor, exact: np.ndarray) -> float:
    difference = found.cpu().numpy().astype(np.longdouble) - exact
    return float((np.sqrt((difference**2).sum(0)) / np.sqrt((exact**2).sum(0))).max())


def plot(rows: list[dict], path: str) -> None:
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    figure, (time_axes, error_axes) = plt.subplots(1, 2, figsize=(11, 3.6), constrained_layout=True)
    timed = [r for r in rows if "solve" in r]
    ways = {
        "ours_mean": ("this package", "#0072B2"),
        "factor": ("updated Cholesky factor", "#56B4E9"),
        "refactorise": ("refactorise + solve", "#E69F00"),
        "solve": ("torch.linalg.solve", "#D55E00"),
    }
    for n, (name, (label, colour)) in enumerate(ways.items()):
        time_axes.bar([x + 0.2 * n - 0.3 for x in range(len(timed))], [r[name] for r in timed], 0.2, label=label, color=colour)
    time_axes.set_xticks(
        range(len(timed)), [f"{r['d']}\nu={r['u']}" + (f"\n×{r['layers']}" if r["layers"] > 1 else "") for r in timed], fontsize=8
    )
    time_axes.set(
        yscale="log",
        ylabel="seconds a batch",
        xlabel="keys' dimension, keys a batch, layers",
        title=f"C += K Kᵀ and C⁻¹K, float64 ({timed[0]['device']})",
    )
    time_axes.legend(fontsize=8)
    checked = [r for r in rows if "error" in r]
    kinds = {
        "error": ("this package", "#0072B2"),
        "error_factor_form": ("updated factor", "#56B4E9"),
        "error_fresh_factorisation": ("fresh factorisation", "#E69F00"),
    }
    for n, (name, (label, colour)) in enumerate(kinds.items()):
        error_axes.bar([x + 0.25 * n - 0.25 for x in range(len(checked))], [r[name] for r in checked], 0.25, label=label, color=colour)
    error_axes.axhline(1e-9, color="0.4", linewidth=1, linestyle="--")
    error_axes.set_xticks(
        range(len(checked)), [f"{r['keys']}\ncond {r['condition']:.0e}\nλ = {r['lambda']:.0f}" for r in checked], fontsize=8
    )
    error_axes.set(yscale="log", ylabel="relative error of C⁻¹K", title="after 1,000 batches; dashed: target")
    error_axes.legend(fontsize=8)
    figure.savefig(path, dpi=130)


if __name__ == "__main__":
    main()
