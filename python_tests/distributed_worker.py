"""What one process of :mod:`test_distributed` does: ``torchrun … distributed_worker.py FOLDER``.

Results of every scenario go to ``FOLDER/rank<n>.pt``.
"""

import contextlib
import itertools
import shutil
import sys
from pathlib import Path

import torch
import torch.distributed as dist
from transformers import AutoModelForCausalLM, AutoTokenizer

from comeba_ext import EditConfig, Editor, covariance, distributed
from comeba_ext.covariance import Covariance, corpus
from comeba_ext.errors import RequestError

LAYERS, TOKENS = (0, 1), 701


def build(folder: Path, family: str = "gpt2", dtype=torch.float64, **changes) -> Editor:
    model = AutoModelForCausalLM.from_pretrained(folder / family, dtype=dtype)
    settings = {"layers": LAYERS, "prefixes": 2, "prefix_length": 3, "steps": 8, "early_stop": 0.0, "clamp": 1.0} | changes
    return Editor(model, AutoTokenizer.from_pretrained(folder / family), EditConfig(**settings))


def summed(layer) -> torch.Tensor:
    """The sum of what a layer adds for all subjects, ``(d_out, d_in)``."""
    shards = layer.shards.tensors()
    return shards["shard_left"].mT @ shards["shard_right"]


@contextlib.contextmanager
def changed(owner, name: str, value):
    before = getattr(owner, name)
    setattr(owner, name, value)
    try:
        yield
    finally:
        setattr(owner, name, before)


def failing(function, at: int, error: Exception | None):
    """``function``, whose ``at``-th call raises."""
    calls = itertools.count(1)

    def run(*args, **kwargs):
        if next(calls) == at and error is not None:
            raise error
        return function(*args, **kwargs)

    return run


def outcome(work) -> str:
    """What the error of ``work()`` says."""
    try:
        work()
    except Exception as error:
        return f"{type(error).__name__}: {error}"
    return "no error"


@contextlib.contextmanager
def saving_always():
    """A checkpoint after every unit."""
    import comeba_ext.editor as module

    real = covariance.collect_covariance
    with changed(module, "collect_covariance", lambda *a, **k: real(*a, save_seconds=0, **k)):
        yield


def covariances(folder: Path, texts: list[str], rank: int) -> dict:
    found = {}
    for dtype in (torch.float64, torch.float32):
        path = folder / f"{dtype}.cov"
        editor = build(folder, dtype=dtype)
        editor.collect_covariance(texts, tokens=TOKENS, path=path, progress=False)
        found[str(dtype)] = {name: editor.covariance[name] for name in editor.layers}
        found[f"{dtype} counts"] = (editor.covariance.tokens, editor.covariance.texts)
        dist.barrier()
        found[f"{dtype} files"] = sorted(p.name for p in folder.iterdir() if p.name.startswith(path.name))
    one_unit = build(folder)
    few = covariance.collect_covariance(
        one_unit.model, one_unit.tokenizer, texts, one_unit.layers, one_unit.session.decoder, tokens=5, progress=False
    )
    found["fewer units than processes"] = {name: few[name] for name in few.moments}
    return found


def interruptions(folder: Path, texts: list[str], rank: int) -> dict:
    path, found = folder / "stopped.cov", {}
    collect = lambda: build(folder).collect_covariance(texts, tokens=TOKENS, path=path, progress=False)  # noqa: E731
    error = RuntimeError("out of memory") if rank == 1 else None
    with saving_always(), changed(covariance, "run_until", failing(covariance.run_until, 4, error)):
        found["stopped"] = outcome(collect)
    found["left"] = {p.name: len(Covariance.load(p).unfinished.units) for p in folder.glob("stopped.cov*")}
    dist.barrier()
    if rank == 0:
        shutil.copytree(folder, folder / "for one process", ignore=lambda d, names: [n for n in names if "stopped" not in n])
    dist.barrier()
    runs = itertools.count()
    with changed(covariance, "run_until", lambda *a, run=covariance.run_until, **k: (next(runs), run(*a, **k))):
        collect()
    found["runs"] = next(runs)
    dist.barrier()
    found["after"] = sorted(p.name for p in folder.glob("stopped.cov*"))
    found["resumed"] = {name: Covariance.load(path)[name] for name in Covariance.load(path).moments}
    return found


def refusals(folder: Path, texts: list[str], requests: list[dict], rank: int) -> dict:
    other = texts[::-1] if rank else texts
    found = {"texts": outcome(lambda: build(folder).collect_covariance(other, tokens=TOKENS, progress=False))}
    # Only the first process reads the file, yet both must refuse it.
    foreign = lambda: build(folder, "llama").collect_covariance(texts, path=folder / "stopped.cov")  # noqa: E731
    found["model"] = outcome(foreign)
    found["empty"] = outcome(lambda: build(folder).collect_covariance([], progress=False))
    editor = build(folder)
    editor.collect_covariance(texts, tokens=TOKENS, progress=False)
    before = {name: summed(layer) for name, layer in editor.layers.items()}
    import comeba_ext.methods.comeba_hk as module

    for error in (RequestError("not finite"), RuntimeError("broken")):
        broken = failing(module.optimise_target_values, 1, error if rank == 1 else None)
        with changed(module, "optimise_target_values", broken):
            found[type(error).__name__] = outcome(lambda: editor.edit(requests))
    found["requests"] = outcome(lambda: editor.edit(requests[: 3 + rank]))
    found["unchanged"] = editor.step == 0 and all(torch.equal(summed(x), before[n]) for n, x in editor.layers.items())
    editor.model.lm_head.weight.device_mesh = "as a parameter sharded by tensor parallelism has"
    found["sharded"] = outcome(lambda: editor.edit(requests))
    return found


def values(folder: Path, texts: list[str], requests: list[dict]) -> dict:
    found = {}
    for family in ("gpt2", "llama"):
        editor = build(folder, family)
        editor.collect_covariance(texts, tokens=TOKENS, progress=False)
        found[family] = editor.target_values(requests)
        found[f"{family} one"] = editor.target_values(requests[:1])
        reports = [editor.edit(requests[:3]), editor.edit(requests[3:])]
        found[f"{family} losses"] = [loss for report in reports for loss in report.losses]
        found[f"{family} steps"] = [steps for report in reports for steps in report.optimizer_steps]
        found[f"{family} delta"] = {name: summed(layer) for name, layer in editor.layers.items()}
        found[f"{family} alpha"] = reports[-1].alpha
    return found


def main(folder: Path) -> None:
    corpus.POOL_TOKENS, corpus.UNIT_TOKENS = 200, 64
    dist.init_process_group("gloo")
    rank = distributed.rank()
    given = torch.load(folder / "given.pt", weights_only=False)
    texts, requests = given["texts"], given["requests"]
    found = {
        "covariances": covariances(folder, texts, rank),
        "interruptions": interruptions(folder, texts, rank),
        "refusals": refusals(folder, texts, requests, rank),
        "values": values(folder, texts, requests),
    }
    torch.save(found, folder / f"rank{rank}.pt")
    dist.destroy_process_group()


if __name__ == "__main__":
    main(Path(sys.argv[1]))
