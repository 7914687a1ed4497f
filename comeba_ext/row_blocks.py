"""Large tables in files of rows, named by what they hold: a save writes what the last one did not have.

Tables of edits grow at their end. One of ``n`` rows is cut into blocks of :data:`BYTES`, each a safetensors file named by a digest of its
dtype, shape and bytes, and the rest of the rows, which stay where they were. A block that is there already is not written again. What
changed in the middle costs the blocks from there on.
"""

from __future__ import annotations

import hashlib
from collections.abc import Callable

import torch

BYTES = 8 << 20
KIND = "rows"


def split(tensors: dict[str, torch.Tensor]) -> tuple[dict[str, torch.Tensor], dict[str, list[str]], dict[str, torch.Tensor]]:
    """Tables without their full blocks; the digests of those, in order, by the table's name; digest to block."""
    rest, digests, blocks = {}, {}, {}
    for name, tensor in tensors.items():
        tensor = tensor.detach().cpu().contiguous()
        size = tensor[0].numel() * tensor.element_size() if tensor.dim() and len(tensor) else 0
        each = max(1, BYTES // size) if size else 0
        full = len(tensor) // each if each else 0
        if full:
            digests[name] = []
            for block in tensor[: full * each].split(each):
                digests[name].append(digest(block))
                blocks[digests[name][-1]] = block
            tensor = tensor[full * each :].clone()
        rest[name] = tensor
    return rest, digests, blocks


def digest(block: torch.Tensor) -> str:
    """32 hexadecimal digits of a contiguous block."""
    found = hashlib.sha256(f"{block.dtype}{tuple(block.shape)}".encode())
    found.update(block.view(-1).view(torch.uint8).numpy())
    return found.hexdigest()[:32]


def join(rest: dict[str, torch.Tensor], digests: dict[str, list[str]], read: Callable[[str], torch.Tensor]) -> dict[str, torch.Tensor]:
    """What :func:`split` was given; ``read`` gives a block by its digest.

    Raises:
        ValueError: there is no table for some blocks, or one of them is not of its kind.
    """
    whole = dict(rest)
    for name, own in digests.items():
        end = rest.get(name)
        parts = [read(one) for one in own]
        if end is None or any(part.dtype != end.dtype or part.shape[1:] != end.shape[1:] or not part.dim() for part in parts):
            raise ValueError(f"blocks of {name} do not fit it")
        whole[name] = torch.cat([*parts, end])
    return whole
