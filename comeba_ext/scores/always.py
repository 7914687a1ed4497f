"""The score of methods without one: every token takes its edit."""

from __future__ import annotations

import torch

from comeba_ext.scores.base import Score


class AlwaysScore(Score):
    """1 for every token, which is where α begins: the edited output everywhere, as in the paper's ablation without hooks."""

    name = "always"
    start = 1.0

    def scores(self, x, layer, mask=None, past=None):
        return torch.ones(x.shape[:-1], dtype=torch.float32, device=x.device), None
