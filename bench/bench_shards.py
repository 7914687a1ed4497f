"""What an edit costs with many subjects before it: ``python bench/bench_shards.py [--quick] [--json] [--plot FILE]``

Invented subjects, one key each, through the layer algebra alone (no model): a hooked layer of SmolLM2-135M's shape (1,536 to 576), keys
with a covariance of condition 10³, a batch of 100 a step as the editor makes it (a twin's copies of the small tables, the update, taking
over). At every number of subjects:

- ``update_ms``: a request's share of a step, median of ten steps;
- ``retract_ms``: taking one request out;
- ``stored_mb``: factors, anchors and tables as they are saved; ``save_s``: into an empty folder, one step before; ``save_more_s``: into
  the same folder a step later; ``load_s``: back from there.

Names have three tokens, of which the last is drawn from 5,000. What the layer costs a text: ``bench_subjects.py``.
"""

from __future__ import annotations

import argparse
import statistics
import sys
import tempfile
import time
from pathlib import Path

import torch
from common import finish, target
from torch import nn

from comeba_ext.editing.subject_shards import Member, SubjectShards
from comeba_ext.layers.hooked_linear import HookedLinear
from comeba_ext.memory.key_memory import KeyMemory
from comeba_ext.ops.mentions import name_hash
from comeba_ext.storage import read_folder, write_folder

D_IN, D_OUT, BATCH = 1536, 576, 100


def covariance(width: int) -> torch.Tensor:
    generator = torch.Generator().manual_seed(0)
    basis = torch.linalg.qr(torch.randn(width, width, generator=generator, dtype=torch.float64))[0]
    return basis * torch.logspace(0, -3, width, dtype=torch.float64) @ basis.mT


def timed(call, times: int) -> float:
    found = []
    for _ in range(times):
        start = time.perf_counter()
        call()
        found.append(time.perf_counter() - start)
    return statistics.median(found)


@torch.no_grad()
def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--quick", action="store_true", help="up to 10,000 subjects")
    parser.add_argument("--json", action="store_true")
    parser.add_argument("--plot", help="write a PNG")
    args = parser.parse_args()
    moment = covariance(D_IN)
    root, generator = torch.linalg.cholesky(moment).float(), torch.Generator().manual_seed(1)
    layer = HookedLinear(nn.Linear(D_IN, D_OUT), "nearest", 0.6)
    layer.score.fit(moment.float())
    memory, shards = KeyMemory(48.0 * moment), SubjectShards()
    count, rows, steps = 0, [], []
    for size in (1_000, 10_000) if args.quick else (1_000, 10_000, 100_000):
        home = tempfile.TemporaryDirectory()
        while count < size:
            if count == size - BATCH:
                first = saved(layer, home.name)
            keys = torch.randn(BATCH, D_IN, generator=generator) @ root.mT
            unit = layer.score.directions(keys)
            answers = torch.randn(BATCH, D_OUT, generator=generator)
            members = [
                Member((f"{count + n}", 1), keys[n : n + 1], answers[n : n + 1], unit[n : n + 1], FAR, NEAR, *called(count + n))
                for n in range(BATCH)
            ]
            start = time.perf_counter()
            twin, own = copied(layer), shards.copy()
            own.add(twin, memory, members)
            layer.take_over(twin)
            shards = own
            steps.append(time.perf_counter() - start)
            count += BATCH
        row = {"subjects": count, "update_ms": statistics.median(steps[-10:]) / BATCH * 1e3}
        twin, own = copied(layer), shards.copy()
        row["retract_ms"] = timed(lambda: own.remove(twin, memory, {next(iter(own.members.values()))[0].name}), 5) * 1e3  # noqa: B023
        row |= {"save_s": first, "save_more_s": saved(layer, home.name), **loaded(layer, home.name)}
        rows.append({name: round(value, 4) for name, value in row.items()})
        print(rows[-1], file=sys.stderr, flush=True)
    if args.plot:
        draw(rows, args.plot)
    ratio = rows[-1]["update_ms"] / rows[0]["update_ms"]
    finish(rows, [target(f"update at {rows[-1]['subjects']:,} subjects / at 1,000", ratio, 1.1, ratio <= 1.1)], args.json)


FAR, NEAR = torch.tensor([0.85]), torch.tensor([0.4])


def called(n: int) -> tuple[tuple[int, ...], tuple[int, ...]]:
    """Two forms of a name, and their ends."""
    last = n * 7919 % 5000
    forms = [[first, 6000 + n % 1000, last] for first in (7000 + n, 200_000 + n)]
    return tuple(map(name_hash, forms)), (name_hash([last]),)


def copied(layer: HookedLinear) -> HookedLinear:
    """What a step begins with: the layer with tables of its own; the factors are shared."""
    other = HookedLinear(layer.base_layer, "nearest", 0.6)
    other.take_over(layer)
    return other


def saved(layer: HookedLinear, folder: str) -> float:
    """Seconds of a save; what does not grow is left out."""
    start = time.perf_counter()
    tensors = {name: tensor for name, tensor in layer.tensors().items() if name not in ("delta", "projection")}
    write_folder(folder, {"format": 2}, {"adapter": tensors}, {})
    return time.perf_counter() - start


def loaded(layer: HookedLinear, folder: str) -> dict[str, float]:
    start, other = time.perf_counter(), HookedLinear(layer.base_layer, "nearest", 0.6)
    (tensors,) = read_folder(folder, "adapter")[1]
    other.restore(tensors | {"projection": layer.score.projection})
    took = time.perf_counter() - start
    assert torch.equal(other.score.anchors[: other.score.known], layer.score.anchors[: layer.score.known])
    return {"stored_mb": sum(path.stat().st_size for path in Path(folder).iterdir()) / 1e6, "load_s": took}


def draw(rows: list[dict], path: str) -> None:
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    figure, axes = pyplot.subplots(1, 2, figsize=(9, 3.2), constrained_layout=True)
    subjects = [row["subjects"] for row in rows]
    for name, label in (("update_ms", "an edit, ms"), ("retract_ms", "taking one back, ms")):
        axes[0].plot(subjects, [row[name] for row in rows], marker="o", label=label)
    axes[0].set(xscale="log", yscale="log", xlabel="subjects", title="time")
    axes[0].legend()
    axes[1].plot(subjects, [row["stored_mb"] for row in rows], marker="o")
    axes[1].set(xscale="log", yscale="log", xlabel="subjects", title="stored, MB a layer")
    figure.savefig(path, dpi=120)


if __name__ == "__main__":
    main()
