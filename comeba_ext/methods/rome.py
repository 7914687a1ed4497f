"""ROME: rank-one model editing (Meng et al. 2022, arXiv 2202.05262)."""

from __future__ import annotations

import torch

from comeba_ext.editing.report import Phases
from comeba_ext.methods.additive import Additive
from comeba_ext.text.request import EditRequest


class ROME(Additive):
    """One layer; per request ``delta ← delta + (v* − W k)(C0⁻¹k̄)ᵀ / (kᵀ C0⁻¹k̄)`` (equation 2), so that ``W k = v*``.

    ``k`` is the key behind the prompt alone, where ``v* − W k`` is read, and ``k̄`` its mean over context prefixes, whose
    direction is what the update answers to (as in the published code; equation 2 knows one key only).

    A batch is a sequence of requests: each one's key and residual are read from the model as the ones before left it.
    Their target values are optimised together before the first (the published code optimises each right before its
    update; with a batch of one there is no difference). ``v* − W k`` is taken as the difference of hidden states after
    the block, which is the same wherever the MLP's output is added to the residual stream as it is. ``clamp`` and
    ``weight_decay`` are relative to that hidden state, as with all methods here; the published code's to the MLP's output.

    Raises:
        ConfigError: the settings name more than one layer.
    """

    name = "ROME"
    one_layer = True

    def _write(self, batch: list[EditRequest], values: torch.Tensor, phases: Phases, trace=None):
        parts = [super(ROME, self)._write([r], values[n : n + 1], phases) for n, r in enumerate(batch)]
        return tuple({name: torch.cat([part[i][name] for part in parts]) for name in self.layers} for i in (0, 1))

    def _directions(self, name: str, keys: torch.Tensor, plain: torch.Tensor, residual: torch.Tensor):
        solved = self.key_memory[name].solve(keys)  # (λ·C0)⁻¹ k̄; λ falls out
        return solved / (plain * solved).sum(0), residual
