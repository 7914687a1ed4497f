"""Shards: what a hooked layer adds for each subject, as the two factors of a ``delta`` of its own.

A token in scope is like one edited key more than like any other, so nothing forces all edits into one matrix, whose inputs bound how
much it can hold. Every subject (more exactly: all keys that no token can tell apart, and the other keys of their requests) has its own
key memory ``λ·C0 + K Kᵀ`` and its own least squares,

    delta_s = V Kᵀ (λ·C0 + K Kᵀ)⁻¹,

with its few keys ``K (d_in, m)`` and what they are to answer, ``V (d_out, m)``. That matrix is never made: a token in scope pays for
``m·(d_in + d_out)`` numbers, where one matrix of all edits would cost it ``d_in·d_out``. An edit costs ``d_in + d_out`` numbers a key,
whatever else was edited before, and takes nothing from others.
"""

from __future__ import annotations

import torch
from torch import nn

from comeba_ext.ops.shard_edits import shard_edits

GROWTH = 4  # storage grows by a quarter, so that what is written is copied seldom


class Shards(nn.Module):
    """The factors of all shards of one layer.

    What is written stays as it is: a shard that changes gets new rows, and ``rows`` says which count. So a twin of the model, or a
    thread that generates meanwhile, can share the storage.

    Args:
        d_in, d_out: of the layer.
        dtype, device: of the factors.

    Attributes:
        left: ``(capacity, d_out)``, columns of V; right: ``(capacity, d_in)``, rows of ``Kᵀ (λ·C0 + K Kᵀ)⁻¹``.
        rows: ``(shards, m)`` int64, where a shard's factors are; −1: none.
        used: rows of the storage that were ever written.
    """

    def __init__(self, d_in: int, d_out: int, *, dtype: torch.dtype = torch.float32, device="cpu"):
        super().__init__()
        self.register_buffer("left", torch.zeros(0, d_out, dtype=dtype, device=device))
        self.register_buffer("right", torch.zeros(0, d_in, dtype=dtype, device=device))
        self.register_buffer("rows", torch.zeros(0, 1, dtype=torch.int64, device=device))
        self.used = 0

    def __len__(self) -> int:
        return len(self.rows)

    def edits(self, x: torch.Tensor, shards: torch.Tensor) -> torch.Tensor:
        """``delta_s x``, ``(n, d_out)``, for tokens ``x (n, d_in)`` and their shards ``(n,)``; zero where that is negative."""
        return shard_edits(x, shards, self.rows, self.left, self.right)

    def _size(self, count: int) -> int:
        """Rows of the storage for so many."""
        return len(self.left) if count <= len(self.left) else count + max(64, count // GROWTH)

    def nbytes_with(self, more: int) -> int:
        """Bytes of the storage once so many rows more are written."""
        return self._size(self.used + more) * sum(part.shape[1] * part.element_size() for part in (self.left, self.right))

    @torch.no_grad()
    def append(self, left: torch.Tensor, right: torch.Tensor) -> torch.Tensor:
        """Store factors ``(n, d_out)`` and ``(n, d_in)``; where they are, ``(n,)`` int64 on the CPU."""
        start, end = self.used, self.used + len(left)
        with torch.inference_mode(False):
            if end > len(self.left):
                size = self._size(end)
                for name in ("left", "right"):
                    old = getattr(self, name)
                    grown = old.new_zeros(size, old.shape[1])
                    grown[:start] = old[:start]
                    setattr(self, name, grown)
            self.left[start:end], self.right[start:end] = left.to(self.left), right.to(self.right)
        self.used = end
        return torch.arange(start, end)

    @torch.no_grad()
    def assign(self, found: dict[int, torch.Tensor], count: int) -> None:
        """Say in which rows some shards' factors are (none: it is empty), of ``count`` shards in all."""
        width = max([self.rows.shape[1], *(len(own) for own in found.values())])
        with torch.inference_mode(False):
            rows = torch.full((count, width), -1)
            kept = min(len(self.rows), count)
            rows[:kept, : self.rows.shape[1]] = self.rows[:kept].cpu()
            for n, own in found.items():
                rows[n] = -1
                rows[n, : len(own)] = own
            self.rows = rows.to(self.rows.device)

    def tensors(self) -> dict[str, torch.Tensor]:
        """The factors shard by shard, without what counts no more: ``shard_left (n, d_out)``, ``shard_right (n, d_in)``,
        ``shard_sizes (shards,)``."""
        there = self.rows >= 0
        order = self.rows[there]
        return {"shard_left": self.left[order], "shard_right": self.right[order], "shard_sizes": there.sum(1)}

    @torch.no_grad()
    def restore(self, tensors: dict[str, torch.Tensor]) -> None:
        """Raises :class:`ValueError` for what does not fit."""
        left, right, sizes = (tensors[name] for name in ("shard_left", "shard_right", "shard_sizes"))
        n = len(left)
        fit = left.shape[1:] == self.left.shape[1:] and right.shape == (n, self.right.shape[1]) and sizes.dim() == 1
        if not fit or sizes.is_floating_point() or (len(sizes) and sizes.min() < 0) or sizes.sum() != n:
            raise ValueError(f"shards {tuple(left.shape)}, {tuple(right.shape)}, {tuple(sizes.shape)} do not fit")
        self.clear()
        places = self.append(left, right).split(sizes.tolist())
        self.assign(dict(enumerate(places)), len(sizes))

    def compact(self) -> None:
        """Leave behind what counts no more, once that is most of the storage."""
        there = self.rows >= 0
        count = int(there.sum())
        if self.used > 2 * count + 256:
            order, rows = self.rows[there], self.rows.clone()
            left, right = self.left[order], self.right[order]
            self.clear()
            rows[there] = self.append(left, right).to(rows.device)
            self.rows = rows

    def forget(self) -> None:
        """No shard is left; the storage is."""
        with torch.inference_mode(False):
            self.rows = self.rows.new_zeros(0, 1)

    def clear(self) -> None:
        """No shard is left. (The storage is another one: who shares the old one goes on reading it.)"""
        with torch.inference_mode(False):
            self.left, self.right = self.left.new_zeros(0, self.left.shape[1]), self.right.new_zeros(0, self.right.shape[1])
        self.forget()
        self.used = 0

    def take_over(self, other: Shards) -> None:
        """The shards of another layer of this shape; the storage is shared from then on."""
        self.left, self.right, self.rows, self.used = other.left, other.right, other.rows.clone(), other.used

    def _load_from_state_dict(self, state_dict, prefix, *args, **kwargs):
        """Buffers take the shape they are loaded with, if it fits the layer. A version before had none; where nothing of the layer is
        loaded (PEFT's adapters), all is left as it is."""
        if f"{prefix.removesuffix('shards.')}delta" in state_dict:
            for name, own in self.named_buffers():
                state_dict.setdefault(prefix + name, own[:0])
        given = {name: state_dict.get(prefix + name) for name in ("left", "right", "rows")}
        if all(given[name] is not None and given[name].shape[1:] == getattr(self, name).shape[1:] for name in ("left", "right")):
            for name, tensor in given.items():
                if tensor is not None:
                    setattr(self, name, getattr(self, name).new_zeros(tensor.shape))
            self.used = len(given["left"])
        super()._load_from_state_dict(state_dict, prefix, *args, **kwargs)
