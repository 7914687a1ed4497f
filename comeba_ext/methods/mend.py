"""MEND: a network that turns fine-tuning's gradient into an edit (Mitchell et al. 2022, arXiv 2110.11309)."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import nn
from torch.nn import functional as F

from comeba_ext.editing.config import check_fields
from comeba_ext.editing.session import Session
from comeba_ext.layers.hooked_linear import shape_of
from comeba_ext.methods.trained import FactorLearner, Factors, TrainedConfig, TrainedOnGradients
from comeba_ext.text.rows import Row

CLOSE = 1e-7  # added to a spread that is divided by
HELD = 8192  # tokens of which running statistics are taken


@dataclass(frozen=True)
class MendConfig(TrainedConfig):
    """Settings of MEND.

    Args:
        rank: of the networks' layers, at most half of their width.
        edit_rate: α of every layer at the start; they are learned.
        edit_weight, locality_weight: of the loss's two parts, c_edit and 1 in the paper.
    """

    rank: int = 1920
    edit_rate: float = 1e-4
    edit_weight: float = 0.1
    locality_weight: float = 1.0

    def __post_init__(self) -> None:
        super().__post_init__()
        check_fields(self, positive=("edit_rate", "edit_weight", "locality_weight"), counts=("rank",))


class Transform(nn.Module):
    """The network of all layers of one shape: two low-rank layers with residuals, the identity at the start, with every layer's own
    scales and offsets (section 3.2, equation 3)."""

    def __init__(self, width: int, layers: int, rank: int):
        super().__init__()
        rank = min(rank, width // 2)
        self.down = nn.ParameterList([nn.init.xavier_normal_(torch.empty(rank, width)) for _ in range(2)])
        self.up = nn.ParameterList([torch.zeros(width, rank) for _ in range(2)])
        self.bias = nn.Parameter(torch.zeros(width))
        self.scale = nn.ParameterList([torch.ones(layers, width) for _ in range(2)])
        self.offset = nn.ParameterList([torch.zeros(layers, width) for _ in range(2)])
        for name in ("mean", "squares"):
            self.register_buffer(name, torch.zeros(layers, width))
        self.register_buffer("count", torch.zeros(layers))

    def forward(self, layers: torch.Tensor, z: torch.Tensor) -> torch.Tensor:
        """``(tokens, width)``, inputs and gradients side by side; ``layers (tokens,)``: the number of each token's layer."""
        seen = self.count > 1  # normalised by what was seen in training
        spread = torch.where(seen[:, None], (self.squares / (self.count - 1).clamp(min=1)[:, None]).sqrt() + CLOSE, 1.0)
        z = (z - (self.mean * seen[:, None])[layers]) / spread[layers]
        for n in range(2):
            inner = z @ self.down[n].mT @ self.up[n].mT
            inner = inner + self.bias if n == 0 else inner
            z = z + F.relu(self.scale[n][layers] * inner + self.offset[n][layers])
        return z

    @torch.no_grad()
    def note(self, layer: int, z: torch.Tensor) -> None:
        """Take tokens into the running mean and spread (Welford's, of a batch)."""
        if self.count[layer] >= HELD:
            return
        count = self.count[layer] + len(z)
        mean = self.mean[layer] + (z - self.mean[layer]).sum(0) / count
        self.squares[layer] += ((z - self.mean[layer]) * (z - mean)).sum(0)
        self.count[layer], self.mean[layer] = count, mean


class MendLearner(FactorLearner):
    """Networks that rewrite a weight's gradient ``Σ g xᵀ`` factor by factor, and each layer's rate α:
    ``W ← W − α Σ g̃ x̃ᵀ`` with ``x̃, g̃`` from the network (equations 3 and 4)."""

    def __init__(self, session: Session, layers: dict[str, nn.Module]):
        super().__init__(session, layers)
        config: MendConfig = session.config
        shapes = {name: shape_of(getattr(layer, "base_layer", layer)) for name, layer in layers.items()}
        kinds = list(dict.fromkeys(shapes.values()))
        alike = {shape: [name for name in layers if shapes[name] == shape] for shape in kinds}
        self.places = {name: (kinds.index(shape), alike[shape].index(name)) for name, shape in shapes.items()}
        with torch.random.fork_rng(devices=[]):
            torch.default_generator.manual_seed(config.seed)  # the CPU's, not those of the user's GPUs
            self.networks = nn.ModuleList([Transform(sum(shape), len(alike[shape]), config.rank) for shape in kinds])
        self.rates = nn.Parameter(torch.full((len(layers),), config.edit_rate))
        self.to(session.device)

    def rewrite(self, rows: list[Row], factors: Factors) -> Factors:
        """``x̃ (tokens, d_in)`` and ``−α g̃ (tokens, d_out)``; in training what was seen is taken into the running statistics first."""
        rates, found = dict(zip(factors, self.rates, strict=True)), {}
        for kind, network in enumerate(self.networks):  # once for all layers of a shape: of its weights there is one gradient
            names = [name for name in factors if self.places[name][0] == kind]
            each = [torch.cat(factors[name], 1)[(factors[name][1] != 0).any(1)] for name in names]  # tokens that the loss depends on
            numbers = [self.places[name][1] for name in names]
            if self.training:
                for number, z in zip(numbers, each, strict=True):
                    network.note(number, z)
            lengths = torch.tensor([len(z) for z in each])
            layers = torch.tensor(numbers).repeat_interleave(lengths).to(each[0].device)
            rewritten = network(layers, torch.cat(each)).split(lengths.tolist())
            for name, z in zip(names, rewritten, strict=True):
                x, g = z.split([own.shape[1] for own in factors[name]], 1)
                found[name] = x, -rates[name] * g
        return {name: found[name] for name in factors}

    def weigh(self, edit: torch.Tensor, far: torch.Tensor) -> torch.Tensor:
        config = self.session.config
        return config.edit_weight * edit + config.locality_weight * far

    def groups(self) -> list[dict]:
        """The rates learn with a rate of their own, as published: as large as they are at the start, which moves them at once and lets
        them wander later."""
        return [{"params": list(self.networks.parameters())}, {"params": [self.rates], "lr": self.session.config.edit_rate}]


class MEND(TrainedOnGradients):
    """Writes the MLP weights of some blocks by a network that was trained to rewrite fine-tuning's gradient: its factors at every
    token, normalised by what training saw, through two low-rank layers with residuals, shared by layers of one shape, and a learned
    rate a layer. The edits of a batch are summed. Trained on ``edit_weight`` times the NLL of the edit and of another wording, plus the
    KL of an unrelated prompt, after one batch of edits into the unedited model; nothing prepares it for a second one.

    Published: rates of 1e-6 for the networks, a hundred thousand steps and more, running statistics over all layers of a shape (here
    each layer has its own). ``rank`` is half of the width at most.
    """

    name = "MEND"
    config_class = MendConfig
    learner = MendLearner
