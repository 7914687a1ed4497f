"""KnowledgeEditor: the gradient under a mask that a network reads off the edit's text (De Cao et al. 2021, arXiv 2104.08164)."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import nn
from torch.nn import functional as F
from torch.nn.utils.parametrizations import weight_norm

from comeba_ext.editing.config import check_fields
from comeba_ext.editing.session import Session
from comeba_ext.layers.hooked_linear import shape_of
from comeba_ext.methods.trained import FactorLearner, Factors, TrainedConfig, TrainedOnGradients
from comeba_ext.text.rows import Row


@dataclass(frozen=True)
class KnowledgeEditorConfig(TrainedConfig):
    """Settings of KnowledgeEditor.

    Args:
        hidden: width of the LSTM's directions and of each layer's network; ``condition``: of what lies between them.
        scale: bound on the gate σ(η).
        margin: on the KL of unrelated prompts, which training keeps below it by a Lagrange multiplier.
        multiplier_rate: rate of that multiplier.
    """

    hidden: int = 128
    condition: int = 1024
    scale: float = 1.0
    margin: float = 1e-3
    multiplier_rate: float = 0.1

    def __post_init__(self) -> None:
        super().__post_init__()
        check_fields(self, positive=("scale", "margin", "multiplier_rate"), counts=("hidden", "condition"))


class KnowledgeEditorLearner(FactorLearner):
    """A bidirectional LSTM over the embeddings of prompt and new object, and for every layer a network to two pairs of vectors and a
    gate: ``ΔW = σ(η) · (softmax(α) βᵀ ⊙ ∇W + softmax(γ) δᵀ)`` (section 4.2), which of factors is factors again."""

    lr = 3e-3  # published: 3e-4, for many more steps

    def __init__(self, session: Session, layers: dict[str, nn.Module]):
        super().__init__(session, layers)
        config: KnowledgeEditorConfig = session.config
        self.shapes = {name: shape_of(getattr(layer, "base_layer", layer)) for name, layer in layers.items()}
        with torch.random.fork_rng(devices=[]):
            torch.default_generator.manual_seed(config.seed)  # the CPU's, not those of the user's GPUs
            width = session.model.get_input_embeddings().weight.shape[1]
            self.lstm = nn.LSTM(width, config.hidden, batch_first=True, bidirectional=True)
            self.condense = nn.Sequential(nn.Linear(2 * config.hidden, config.condition), nn.Tanh())
            self.conditioners = nn.ModuleList(
                nn.Sequential(
                    weight_norm(nn.Linear(config.condition, config.hidden)),
                    nn.Tanh(),
                    weight_norm(nn.Linear(config.hidden, 2 * (d_in + d_out) + 1)),
                )
                for d_in, d_out in self.shapes.values()
            )
        self.multiplier = nn.Parameter(torch.zeros(()))  # softplus of it is λ
        self.to(session.device)

    def conditions(self, row: Row) -> torch.Tensor:
        """What the layers' networks read: the LSTM's last states over an edit's text, ``(condition,)``."""
        ids = torch.tensor([[*row.ids, row.target[-1]]], device=self.session.device)
        with torch.no_grad():
            embedded = self.session.model.get_input_embeddings()(ids).float()
        _, (last, _) = self.lstm(embedded)
        return self.condense(last.flatten())

    def rewrite(self, rows: list[Row], factors: Factors) -> Factors:
        read = [self.conditions(row) for row in rows]
        lengths, found = [len(row.ids) for row in rows], {}
        for (name, (x, g)), conditioner in zip(factors.items(), self.conditioners, strict=True):
            d_in, d_out = self.shapes[name]
            xs, gs = [], []
            for own, own_x, own_g in zip(read, x.split(lengths), g.split(lengths), strict=True):
                alpha, gamma, beta, delta, eta = conditioner(own).split([d_out, d_out, d_in, d_in, 1])
                gate = self.session.config.scale * eta.sigmoid()
                xs += [own_x * beta, delta[None]]
                gs += [gate * own_g * alpha.softmax(0), (gate * gamma.softmax(0))[None]]
            found[name] = torch.cat(xs), torch.cat(gs)
        return found

    def weigh(self, edit: torch.Tensor, far: torch.Tensor) -> torch.Tensor:
        """In training the Lagrangian, which falls in the parameters and rises in the multiplier; else what can be compared over time."""
        if not self.training:
            return edit + far
        factor, over = F.softplus(self.multiplier), far - self.session.config.margin
        return edit + factor.detach() * over - (factor * over.detach() - (factor * over).detach())

    def groups(self) -> list[dict]:
        others = [own for name, own in self.named_parameters() if name != "multiplier"]
        return [{"params": others}, {"params": [self.multiplier], "lr": self.session.config.multiplier_rate}]


class KnowledgeEditor(TrainedOnGradients):
    """Writes the fine-tuning gradient of some layers under a rank-one mask, plus a matrix of rank one, both read off the edit's text, and
    trained so that edit and other wordings are answered while the KL of unrelated prompts stays below a margin. Edits of a batch are
    summed, each under its own mask.

    Published: the margin is lowered in the course of training; the text holds the model's old answer too.
    """

    name = "KE"
    aliases = ("KnowledgeEditor",)
    config_class = KnowledgeEditorConfig
    learner = KnowledgeEditorLearner
