"""The reference score: the response to all edits, relative to that of an average corpus token."""

from __future__ import annotations

import math

import torch

from comeba_ext.scores.response import ResponseScore


class ReferenceScore(ResponseScore):
    """``s_t = ‖delta·x_t‖² / tr(delta·C0·deltaᵀ)`` (DESIGN §3); independent of every other token."""

    name = "reference"
    start = math.inf
    margin = 0.25

    def delta_changed(self, layer, covariance):
        """Keep ``tr(delta·C0·deltaᵀ)`` in step with delta.

        α follows: it is the lowest score an edited prompt had, and when the scale grows all those scores shrink with
        it. Left alone, α would stay above earlier prompts' scores and put them out of scope one by one.
        """
        scale = reference_scale(self.scored_matrix(layer.delta), covariance())
        if self.scale > 0 and scale > 0:
            layer.alpha.mul_(self.scale / scale)
        self.scale.copy_(scale)

    def carried(self, layer):
        sketch = {} if self.gate == "exact" else {"sketch": self.sketch(layer.delta)}
        return {"delta": layer.delta, "alpha": layer.alpha, "scale": self.scale, **sketch}


def reference_scale(delta: torch.Tensor, covariance: torch.Tensor) -> torch.Tensor:
    """``tr(delta·C0·deltaᵀ) = E‖delta·k‖²`` over corpus keys: scalar float64, from products in delta's precision.

    Args:
        delta: ``(d_out, d_in)``.
        covariance: ``C0``, ``(d_in, d_in)``.
    """
    wide = torch.promote_types(delta.dtype, torch.float32)
    delta = delta.to(wide)
    return ((delta @ covariance.to(wide)) * delta).sum(dtype=torch.float64)
