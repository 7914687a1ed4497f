"""A sketch of delta: few rows whose response has nearly the norm of delta's, to tell which tokens are in scope."""

from __future__ import annotations

import functools

import numpy as np
import torch

ROWS = 48  # as measured (bench/bench_scope.py); 32 begin to cost reliability


def rows_for(d_out: int) -> int:
    """Rows of the sketch of a ``(d_out, d_in)`` delta: 48, less where that is no saving."""
    return max(1, min(ROWS, d_out // 4))


def sketch_of(delta: torch.Tensor, rows: int) -> torch.Tensor:
    """``S · delta``, with which ``‖S·delta·x‖ ≈ ‖delta·x‖`` (Johnson–Lindenstrauss).

    ``S`` is a count sketch (Charikar, Chen, Farach-Colton 2002): each output belongs to one row of the sketch, with a
    random sign. The squared norm is unbiased with relative standard deviation at most ``√(2/rows)``, and the error
    of nearby keys is nearly the same, so an α set from sketched scores holds for other wordings too.

    Args:
        delta: ``(d_out, d_in)``.
        rows: ``m``.

    Returns:
        ``(m, d_in)`` in delta's dtype, accumulated in float32 or better; the same for the same delta everywhere.
    """
    wide = torch.promote_types(delta.dtype, torch.float32)
    signs = _signs(rows, delta.shape[0]).to(delta.device, wide)
    return (signs @ delta.to(wide)).to(delta.dtype)


@functools.cache
def _signs(rows: int, d_out: int) -> torch.Tensor:
    """``S``, ``(rows, d_out)`` int8 with one ±1 in every column; balanced, so that no row is left empty."""
    raw = np.random.PCG64(0xC0EBA).random_raw(d_out)  # a raw stream: the same in every version of numpy
    order = np.argsort(raw, kind="stable")
    matrix = np.zeros((rows, d_out), np.int8)
    matrix[np.arange(d_out) % rows, order] = np.where(raw[order] & 1, 1, -1)
    return torch.from_numpy(matrix)
