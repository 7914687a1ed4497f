"""PMET: precise model editing in a transformer (Li et al. 2024, arXiv 2308.08742)."""

from __future__ import annotations

import torch

from comeba_ext.methods.memit import MEMIT


class PMET(MEMIT):
    """MEMIT with the residual spread by square root over the layers: ``R = (v* − h) / √(layers left)``.

    Followed: only MLP weights are written, by MEMIT's closed form and with this batch's keys only; the square root,
    which moves more of the change into earlier layers than MEMIT's division by the number of layers left.

    Not followed: the paper optimises two additions at the value layer at once, to the attention's and to the MLP's
    output, and writes only the MLP's, so that what belongs to attention stays out of the weights. Target values here
    are those all methods share: one δ on the residual stream after the value layer. So what is compared is the rule of
    writing, not the rule of optimising.
    """

    name = "PMET"

    def _directions(self, name: str, keys: torch.Tensor, plain: torch.Tensor, residual: torch.Tensor):
        left = len(self.layers) - list(self.layers).index(name)
        return super()._directions(name, keys, plain, residual * left**0.5)  # it came divided by `left`
