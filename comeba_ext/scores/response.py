"""Scores made of a token's response to all edits, ``‖delta·x‖``: the paper's z-score and the reference score.

A response may be computed from all of ``delta`` (``gate="exact"``), a second product of the layer's size, or from a few rows with
nearly the same norm (``gate="sketch"``, :mod:`comeba_ext.ops.sketch`), after which only tokens in scope pay for their edit.
"""

from __future__ import annotations

import torch
from torch.nn import functional as F

from comeba_ext.ops import hooked_linear as ops
from comeba_ext.ops import sketch as sketches
from comeba_ext.scores.base import Score


class ResponseScore(Score):
    """A score of the response.

    Attributes:
        scale: scalar buffer, float64, ``tr(delta·C0·deltaᵀ)``: the response of an average corpus token, squared.
    """

    decodes = True
    precise = ("scale",)

    def __init__(self, d_in: int, *, gate: str = "exact", dtype: torch.dtype = torch.float32, device="cpu"):
        super().__init__(d_in, gate=gate, dtype=dtype, device=device)
        self.register_buffer("scale", torch.tensor(0.0, dtype=torch.float64, device=device))
        self._sketch, self._sketched = None, None  # the sketch, and the version of delta it was made from

    def sketch(self, delta: torch.Tensor) -> torch.Tensor:
        """The rows that decide under ``gate="sketch"``, ``(m, d_in)``, made anew when delta has changed.

        ``torch.compile`` does not see a change; call this once, outside, after writing ``delta``.
        """
        if not torch.compiler.is_compiling():
            version = None if delta.is_inference() else (delta._version, delta.data_ptr())
            if version is None or version != self._sketched:
                rows = sketches.rows_for(len(delta))
                self._sketch, self._sketched = sketches.sketch_of(delta.detach(), rows), version
        return self._sketch

    def scored_matrix(self, delta: torch.Tensor) -> torch.Tensor:
        """The matrix whose response is measured: ``delta`` or its sketch, ``(rows, d_in)``."""
        return delta if self.gate == "exact" else self.sketch(delta)

    def scores(self, x, layer, mask=None, past=None):
        return ops.scores(F.linear(x, self.scored_matrix(layer.delta)), mask, past, self.scale, self.name)

    def hook(self, output, x, layer, mask, past, inplace):
        delta, decision = layer.delta, (mask, past, layer.alpha, self.scale, self.name)
        if self.gate == "exact":
            return ops.exact_hook(output, F.linear(x, delta), *decision, inplace=inplace)
        return ops.gated_hook(output, x, delta, self.sketch(delta), *decision, inplace=inplace)

    def decode(self, x, layer, mask, past):
        sketch = self.sketch(layer.delta) if self.gate == "sketch" else None
        decision = (mask, past, layer.alpha, self.scale, self.name)
        return ops.decode_hook(x, layer.weight, layer.bias, layer.delta, sketch, *decision)

    def refresh(self, layer):
        self.scored_matrix(layer.delta)

    def clear(self):
        self.scale.zero_()

    def tensors(self):
        return {"reference_scale": self.scale}

    def restore(self, tensors):
        self.scale.copy_(tensors["reference_scale"])
