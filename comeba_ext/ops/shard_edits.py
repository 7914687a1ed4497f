"""What a layer adds for tokens in scope where every subject has a low-rank ``delta`` of its own (:mod:`comeba_ext.layers.shards`)."""

from __future__ import annotations

import torch

_CHUNK = 1 << 25  # numbers gathered at a time


def shard_edits(x: torch.Tensor, shards: torch.Tensor, rows: torch.Tensor, left: torch.Tensor, right: torch.Tensor) -> torch.Tensor:
    """``Σ_j left[r_j] (right[r_j]·x)`` over the rows ``r`` of every token's shard; zero for tokens without one. Differentiable.

    Args:
        x: ``(n, d_in)``.
        shards: ``(n,)`` int64, each token's; negative: none.
        rows: ``(shards, m)`` int64, rows of the factors; −1: none.
        left: ``(rows, d_out)``, right: ``(rows, d_in)``.

    Returns:
        ``(n, d_out)`` in the factors' dtype.
    """
    if not len(rows):
        return x.new_zeros(len(x), left.shape[1], dtype=left.dtype)
    own = torch.where((shards >= 0)[:, None], rows[shards.clamp(min=0)], -1)  # (n, m)
    if own.device.type == "cpu" and own.shape[1] > 1 and not torch.compiler.is_compiling():
        own = own[:, : max(1, int((own >= 0).sum(1).max())) if len(own) else 1]  # most shards are smaller than the largest
    size = max(1, _CHUNK // (own.shape[1] * (left.shape[1] + right.shape[1])))
    parts = [_edits(part, which, left, right) for part, which in zip(x.split(size), own.split(size))]
    return torch.cat(parts) if parts else x.new_zeros(0, left.shape[1], dtype=left.dtype)


def _edits(x, own, left, right):
    there = (own >= 0)[..., None]
    chosen = own.clamp(min=0)
    share = (right[chosen] * there) @ x.to(right.dtype)[..., None]  # (n, m, 1)
    return (left[chosen] * (share * there)).sum(1)
