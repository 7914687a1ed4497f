"""Layers with a second weight beside the first, and the choice between the two for a whole sequence."""

from __future__ import annotations

from abc import abstractmethod

import torch
from torch import nn
from torch.nn import functional as F

from comeba_ext.layers.attachment import Attachment
from comeba_ext.layers.hooked_linear import device_of, shape_of


class SideMemory(Attachment):
    """``base_layer(x)``, plus ``x @ delta[i]ᵀ`` (or what :meth:`edit_output` makes of it) for sequences that are routed to memory i.

    A sequence is routed when its first tokens come (a prompt; teacher-forced, the answer with it), by all of them; what is decoded
    behind them from a cache goes the same way.

    Attributes:
        delta: ``(memories, d_out, d_in)`` float32.
        forced: while editing, where every row of a pass goes: a memory's number, or one a row, ``(batch,)``.
        trained: while editing, what takes the place of the last memory.
    """

    precise = ("delta",)
    # Assisted decoding reads its first draft together with the prompt, and nobody says where that ends.
    keeps = "where a side memory (WISE, MEMOIR) sends a sequence, which all tokens of its first pass decide,"

    def __init__(self, base: nn.Module, memories: int = 0):
        super().__init__(base)
        self.in_features, self.out_features = shape_of(base)
        self.register_buffer("delta", torch.zeros(memories, self.out_features, self.in_features, device=device_of(base)))
        self.forced: int | torch.Tensor | None = None
        self.trained: torch.Tensor | None = None

    @property
    def reads_sequence(self) -> bool:
        return self.mode != "off"

    def forward(self, x: torch.Tensor, *args, **kwargs) -> torch.Tensor:
        output = self.base_layer(x, *args, **kwargs)
        if self.mode == "off" or not len(self.delta):
            return output
        self.refuse_recomputing("where a side memory sends a sequence")
        rows, mask = self.as_sequences(x, None, True)
        with torch.autocast(x.device.type, enabled=False):  # thresholds were found, and overlaps are counted, in full precision
            if self.forced is not None:
                route = torch.as_tensor(self.forced, device=x.device).expand(len(rows))
            else:
                route = self.past()
                if route is None:
                    route = self.route(rows.float(), mask)
                self.leave(route)
            changed = torch.zeros(*rows.shape[:-1], self.out_features, device=x.device)
            for way in route.unique().tolist():
                if way >= 0:
                    chosen = route == way
                    changed = changed.index_put((chosen.nonzero()[:, 0],), self.edit_output(rows[chosen].float(), way))
        return output + changed.reshape(output.shape).to(output.dtype)

    def weight_of(self, memory: int) -> torch.Tensor:
        return self.trained if self.trained is not None and memory == len(self.delta) - 1 else self.delta[memory]

    def edit_output(self, x: torch.Tensor, way: int) -> torch.Tensor:
        """``(batch, seq, d_out)`` for rows that are routed to memory ``way``."""
        return F.linear(x, self.weight_of(way))

    @abstractmethod
    def route(self, x: torch.Tensor, mask: torch.Tensor | None) -> torch.Tensor:
        """Where each of the rows ``(batch, seq, d_in)`` goes, ``(batch,)`` long; −1: the base layer alone."""


def mean_over_tokens(values: torch.Tensor, mask: torch.Tensor | None) -> torch.Tensor:
    """Mean of ``(batch, seq, …)`` over the real tokens, ``(batch, …)``."""
    if mask is None:
        return values.mean(1)
    weight = mask.to(values).reshape(*mask.shape, *[1] * (values.dim() - 2))
    return (values * weight).sum(1) / weight.sum(1).clamp(min=1)
