"""How many tokens go through a model at once: from the memory that is free, and from what starting a pass costs.

Peak memory above the model's own is bounded by this number: the graph of one pass, and keys and values of one group of
requests. The estimate is an upper bound, every block with all its activations kept for the backward pass; what target
values keep is less, because only the blocks above the value layer and the tokens from the subject's last one on have a
graph. ``bench_editing.py --parts memory`` prints what is really used.
"""

from __future__ import annotations

from pathlib import Path

import torch
from torch import nn

SHARE = 0.5  # of the free memory; the rest is for weights being converted, logits and the allocator's own
LEAST = 256
MOST = {"cpu": 4096}  # where larger products stop being faster
MOST_ELSEWHERE = 8192
# What a pass takes whatever its size: reading the weights, as long as the products of so many tokens; and seconds, for it
# and for every block, in which so many multiplications could be done. Tuned on two CPU cores, guessed for accelerators.
READ, RATE, PASS, BLOCK = {"cpu": 64}, {"cpu": 5e10}, 3e-3, 0.8e-3
READ_ELSEWHERE, RATE_ELSEWHERE = 256, 3e13


def token_budget(model: nn.Module, given: int | None = None) -> int:
    """Padded tokens per pass: ``given``, or as many as fit into half of the free memory of the fullest device.

    Args:
        model: a Hugging Face language model on any devices.
    """
    if given is not None:
        return given
    devices = {p.device for p in model.parameters() if p.device.type != "meta"}
    memory = [free for free in map(free_memory, devices) if free is not None]
    most = min((MOST.get(device.type, MOST_ELSEWHERE) for device in devices), default=LEAST)
    if not memory:
        return min(4096, most)
    return max(LEAST, min(most, int(SHARE * min(memory) / token_bytes(model))))


def launch_tokens(blocks: list[nn.Module], device: torch.device, spared: nn.Module | None = None) -> int:
    """How many tokens' products take as long as starting a pass through some blocks: what splitting a batch costs.

    Args:
        blocks: what a pass runs through.
        spared: the part of one that hardly a token runs through.
    """
    weights = sum(p.numel() for block in blocks for p in block.parameters())
    weights -= sum(p.numel() for p in spared.parameters()) if spared is not None else 0
    operations = (PASS + BLOCK * len(blocks)) * RATE.get(device.type, RATE_ELSEWHERE)
    return READ.get(device.type, READ_ELSEWHERE) + round(operations / max(weights, 1))


def token_bytes(model: nn.Module) -> int:
    """Bytes that one token leaves behind for a backward pass through the whole model, at most.

    A block keeps about 14 vectors of the hidden width (norms, queries, keys, values, attention, residuals) and four of the
    MLP's.
    """
    config = model.config.get_text_config()
    width = config.hidden_size
    inner = getattr(config, "intermediate_size", None) or getattr(config, "n_inner", None) or 4 * width
    size = next((p.element_size() for p in model.parameters() if p.is_floating_point()), 4)
    return config.num_hidden_layers * (14 * width + 4 * inner) * max(2, size)


def free_memory(device: torch.device) -> int | None:
    """Bytes that can still be allocated on a device, or ``None`` where nothing tells."""
    if device.type == "cuda":
        free, _ = torch.cuda.mem_get_info(device)
        return free + torch.cuda.memory_reserved(device) - torch.cuda.memory_allocated(device)
    if device.type != "cpu":
        return None
    found = [_available(), _left_in_group()]
    return min((value for value in found if value is not None), default=None)


def _available(path: Path = Path("/proc/meminfo")) -> int | None:
    try:
        line = next(line for line in path.read_text().splitlines() if line.startswith("MemAvailable:"))
        return int(line.split()[1]) * 1024
    except (OSError, StopIteration, ValueError, IndexError):
        return None


def _left_in_group(folder: Path = Path("/sys/fs/cgroup")) -> int | None:
    """What a container's own limit leaves (cgroup v2)."""
    try:
        return int((folder / "memory.max").read_text()) - int((folder / "memory.current").read_text())
    except (OSError, ValueError):  # no such file, or "max": no limit
        return None
