"""MEMIT: mass-editing memory in a transformer (Meng et al. 2023, arXiv 2210.07229)."""

from __future__ import annotations

import torch

from comeba_ext.methods.additive import Additive


class MEMIT(Additive):
    """Per batch and layer ``Δ = R Kᵀ (λ·C0 + K Kᵀ)⁻¹`` (equation 14), with the keys of this batch only.

    The key memory stays at ``λ·C0``: what earlier batches edited is not among the things to be preserved.
    """

    name = "MEMIT"

    def _directions(self, name: str, keys: torch.Tensor, plain: torch.Tensor, residual: torch.Tensor):
        memory = self.key_memory[name]
        before = memory.state
        try:
            return memory.update(keys), residual
        finally:
            memory.state = before
