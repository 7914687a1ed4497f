"""Work shared by several processes: a few lines over :mod:`torch.distributed`.

Everything here also works where no process group was initialised, as in the only process of a group of one. The group is
the user's (``torchrun``, ``accelerate launch`` or ``init_process_group`` by hand); only the command line starts one.

The rule that keeps processes from waiting for each other for ever: whatever can fail runs inside :func:`together`, which
lets all of them fail when one does.
"""

from __future__ import annotations

import contextlib
import hashlib
import os
from collections.abc import Callable, Iterator
from typing import TypeVar

import torch
import torch.distributed as dist

from comeba_ext.errors import ComebaError

T = TypeVar("T")


def initialised() -> bool:
    return dist.is_available() and dist.is_initialized()


def rank() -> int:
    """Number of this process in the group."""
    return dist.get_rank() if initialised() else 0


def world_size() -> int:
    """Number of processes in the group."""
    return dist.get_world_size() if initialised() else 1


def local_rank() -> int:
    """Number of this process on its machine, as the launcher tells it."""
    return int(os.environ.get("LOCAL_RANK", 0)) if initialised() else 0


def together(work: Callable[[], T]) -> list[T]:
    """Call ``work`` in every process; every process gets the results of all, in order of rank.

    Args:
        work: its result must be picklable, with tensors on the CPU, unless there is one process only.

    Raises:
        Exception: what this process's own ``work`` raised, or, when only others' did, a :class:`ComebaError` (of the
            same class, if theirs was one) that says which process failed and why. So either all processes raise or none.
            Ctrl-C and exits are not waited for.
    """
    if world_size() == 1:
        return [work()]
    result, error = None, None
    try:
        result = work()
    except Exception as caught:
        error = caught
    kind = type(error) if isinstance(error, ComebaError) else ComebaError
    message = error and (str(error) if isinstance(error, ComebaError) else f"{type(error).__name__}: {error}")
    outcomes: list = [None] * world_size()
    dist.all_gather_object(outcomes, (result, kind, message))
    if error is not None:
        raise error
    for number, (_, kind, message) in enumerate(outcomes):
        if message is not None:
            raise kind(f"process {number} of {len(outcomes)} failed: {message}")
    return [result for result, _, _ in outcomes]


def require_same(value: object, what: str) -> None:
    """Raise in every process when their values differ (by ``repr``); ``what`` names them in the message."""
    digest = hashlib.sha256(repr(value).encode()).digest()
    digests = together(lambda: digest)
    if len(set(digests)) > 1:
        others = [n for n, other in enumerate(digests) if other != digests[0]]
        raise ComebaError(f"{what} of process {others[0]} differ from those of process 0; give all processes the same")


def require_replicated(model: torch.nn.Module) -> None:
    """Refuse a model of which every process holds a share (tensor parallelism, FSDP): its processes must move together.

    Raises:
        ComebaError: with what to do instead.
    """
    if world_size() > 1 and any(hasattr(parameter, "device_mesh") for parameter in model.parameters()):
        raise ComebaError(
            "the model is sharded over the processes; load it whole in each, or spread it over the devices of one process with device_map"
        )


def sum_over_processes(tensor: torch.Tensor) -> torch.Tensor:
    """The sum over all processes, the same bits in each, on the tensor's own device; may overwrite ``tensor``."""
    if world_size() == 1:
        return tensor
    # On the host where the group can, whatever the device: all must choose alike, and theirs may differ (a process without
    # work, a model over several GPUs).
    able = [pair.split(":")[0] for pair in dist.get_backend_config().split(",")]
    there = tensor.to("cpu" if "cpu" in able else able[0])
    dist.all_reduce(there)
    return there.to(tensor.device)


@contextlib.contextmanager
def process_group() -> Iterator[None]:
    """Inside, the process group of a program that ``torchrun`` or ``accelerate launch`` started; else nothing."""
    if initialised() or not dist.is_available() or not dist.is_torchelastic_launched():
        yield
        return
    # Objects and tensors on the host go through gloo, so that no process needs a GPU to take part.
    dist.init_process_group("cpu:gloo,cuda:nccl" if torch.cuda.is_available() else "gloo")
    try:
        yield
    finally:
        dist.destroy_process_group()
