"""R-ROME: ROME with one key (Gupta et al. 2024, arXiv 2403.07175)."""

from __future__ import annotations

import torch

from comeba_ext.methods.rome import ROME


class RROME(ROME):
    """``delta ← delta + (v* − W k̄)(C0⁻¹k̄)ᵀ / (k̄ᵀ C0⁻¹k̄)``: the mean key over context prefixes in every place.

    ROME's published code reads ``v* − W k`` and the denominator behind the prompt alone; where the two keys differ, the denominator can
    be small and a single edit destroys the model ("disabling edits"). With one key it cannot: ``k̄ᵀ C0⁻¹ k̄ > 0``.
    """

    name = "R-ROME"

    def _directions(self, name: str, keys: torch.Tensor, plain: torch.Tensor, residual: torch.Tensor):
        layer, solved = self.layers[name], self.key_memory[name].solve(keys)
        output = lambda inputs: layer(inputs.mT.to(layer.delta)).to(residual).mT  # noqa: E731
        residual = residual - (output(keys) - output(plain))  # what was read behind the prompt, as of the mean key
        return solved / (keys * solved).sum(0), residual
