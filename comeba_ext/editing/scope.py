"""Thresholds: the smallest score that still lets every edited prompt use its edit (DESIGN §3, step 3)."""

from __future__ import annotations

import torch

from comeba_ext.editing.keys import LayerReading
from comeba_ext.hooked_linear import HookedLinear


def peak_scores(layer: HookedLinear, reading: LayerReading) -> torch.Tensor:
    """Every request's highest score over the tokens of its prompt, ``(u,)`` float64."""
    peaks: dict[int, torch.Tensor] = {}
    for requests, x, mask in reading.prompts:
        peaks |= dict(zip(requests, layer.peak_scores(x, mask), strict=True))
    return torch.stack([peaks[n] for n in range(len(peaks))]).double()


def reference_scale(delta: torch.Tensor, covariance: torch.Tensor) -> torch.Tensor:
    """``tr(delta·C0·deltaᵀ) = E‖delta·k‖²`` over corpus keys: scalar float64, from products in delta's precision.

    Args:
        delta: ``(d_out, d_in)``.
        covariance: ``C0``, ``(d_in, d_in)``.
    """
    wide = torch.promote_types(delta.dtype, torch.float32)
    delta = delta.to(wide)
    return ((delta @ covariance.to(wide)) * delta).sum(dtype=torch.float64)
