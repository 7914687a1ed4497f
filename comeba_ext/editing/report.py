"""What one step did, and how long its phases took."""

from __future__ import annotations

import contextlib
import dataclasses
import resource
import sys
import time
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path

import torch
from tqdm.auto import tqdm

from comeba_ext import distributed


@dataclass
class EditReport:
    """Result of one consecutive step.

    Attributes:
        step: number of the step, from 1.
        request_ids: ids of the requests that were edited, in order; what :meth:`Editor.retract` takes.
        declined: ``request_id``, ``prompt``, ``subject``, ``target_new`` and ``reason`` of each request that was left out
            because its key tells nothing.
        moved: ids of those edited at the prompt's last token, because the subject's own place tells nothing.
        answered: whether the edited model gives each request's object behind its prompt (teacher-forced, every token).
        superseded: ids of earlier requests about the same facts, whose place they took.
        rewritten: ids of earlier edits of other facts of the same subjects, whose values were found anew together with these.
        losses: final loss of every target value (empty when target values were given).
        optimizer_steps: steps each target value took.
        alpha: threshold of every layer after the step (nearest: its lowest anchor's).
        leverage: median leverage ``kᵀ C0⁻¹ k`` of the batch's keys in every layer, and ``share``: the share ``ℓ/(λ+ℓ)`` of its
            residual that such a key realises alone (nearest only).
        seconds: time of the phases ``values``, ``keys``, ``update``, ``calibrate``, ``check``.
        peak_memory: high-water mark in bytes, of the GPU where the model is on one, else of the process, since it
            was last reset (:func:`reset_peak_memory`; the editor itself never does).
    """

    step: int
    request_ids: list[str]
    declined: list[dict] = field(default_factory=list)
    moved: list[str] = field(default_factory=list)
    answered: list[bool] = field(default_factory=list)
    superseded: list[str] = field(default_factory=list)
    rewritten: list[str] = field(default_factory=list)
    losses: list[float] = field(default_factory=list)
    optimizer_steps: list[int] = field(default_factory=list)
    alpha: dict[str, float] = field(default_factory=dict)
    leverage: dict[str, float] = field(default_factory=dict)
    share: dict[str, float] = field(default_factory=dict)
    seconds: dict[str, float] = field(default_factory=dict)
    peak_memory: int = 0

    def to_dict(self) -> dict:
        return dataclasses.asdict(self)


class Phases:
    """Seconds spent in named phases; device work is waited for, so that it counts where it belongs."""

    def __init__(self, device: torch.device):
        self.device = device
        self.seconds = dict.fromkeys(("values", "keys", "update", "calibrate", "check"), 0.0)

    @contextlib.contextmanager
    def __call__(self, name: str):
        start = time.perf_counter()
        try:
            yield
        finally:
            if self.device.type == "cuda":
                torch.cuda.synchronize(self.device)
            self.seconds[name] += time.perf_counter() - start


def reset_peak_memory(device: torch.device) -> None:
    """Let :func:`peak_memory` count from here on: on a GPU, and on Linux."""
    if device.type == "cuda":
        torch.cuda.reset_peak_memory_stats(device)
    elif sys.platform == "linux":
        with contextlib.suppress(OSError):  # not every sandbox has the file
            Path("/proc/self/clear_refs").write_text("5")  # resets the high-water mark of resident memory (proc(5))


def peak_memory(device: torch.device) -> int:
    """Bytes, see :class:`EditReport`."""
    if device.type == "cuda":
        return torch.cuda.max_memory_allocated(device)
    with contextlib.suppress(OSError, StopIteration):  # Linux; the same number below cannot be reset, and comes with a parent's
        line = next(line for line in Path("/proc/self/status").read_text().splitlines() if line.startswith("VmHWM:"))
        return int(line.split()[1]) * 1024
    used = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return used if sys.platform == "darwin" else used * 1024


@contextlib.contextmanager
def values_bar(total: int, progress: bool | Callable[[int, float], None]):
    """A progress bar over the target values of one batch, in the first process only; or a function of the caller's in its place."""
    if callable(progress):
        yield progress
        return
    with tqdm(total=total, unit="value", desc="target values", disable=not progress or distributed.rank() > 0) as bar:

        def on_progress(done: int, loss: float) -> None:
            bar.update(done - bar.n)
            bar.set_postfix(loss=f"{loss:.3f}")

        yield on_progress
