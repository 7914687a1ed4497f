"""UltraEdit: one backward pass a batch, no subject, no covariance (Gu et al. 2025, arXiv 2505.14679), and StableEdit's switches."""

from __future__ import annotations

from dataclasses import dataclass, field

import torch

from comeba_ext.editing.config import EditConfig, check_fields, is_int
from comeba_ext.editing.report import Phases
from comeba_ext.editing.session import Session
from comeba_ext.errors import ConfigError, RequestError
from comeba_ext.forward.architectures import Architecture
from comeba_ext.forward.partial import evaluating, frozen
from comeba_ext.methods.base import OnProgress
from comeba_ext.methods.deltas import Deltas
from comeba_ext.methods.row_passes import factors_of
from comeba_ext.text.request import EditRequest
from comeba_ext.text.rows import answer_rows

CLOSE = torch.finfo(torch.float32).eps  # added to a spread that is divided by
LEAST = 1e-6  # of the largest variance: bound on what is divided by when whitening (the authors' code bounds the variances themselves)


@dataclass(frozen=True)
class UltraEditConfig(EditConfig):
    """Settings of UltraEdit; ``lr`` is the share of the gradient that is taken.

    Args:
        modules: name of a linear layer inside a block to the blocks in which it is edited; empty: the MLP output projections of ``layers``.
        ridge: weight of the identity: 1, or StableEdit's 10.
        warm_up: StableEdit: so many edits whose statistics are taken before any is written.
        whiten: StableEdit: gradients are multiplied by the inverse root of their running covariance, not divided by their spread, as
            soon as more than ``d_out + 1`` tokens were seen.
    """

    lr: float = 1e-6
    modules: dict = field(default_factory=dict)
    ridge: float = 1.0
    warm_up: int = 0
    whiten: bool = False

    def __post_init__(self) -> None:
        super().__post_init__()
        known = isinstance(self.modules, dict) and all(
            isinstance(name, str) and isinstance(blocks, (list, tuple)) and blocks and all(is_int(n) and n >= 0 for n in blocks)
            for name, blocks in self.modules.items()
        )
        if not known:
            raise ConfigError(f"modules must map a layer's name inside a block to a list of block numbers, got {self.modules!r}")
        check_fields(self, positive=("ridge",))
        if not is_int(self.warm_up) or self.warm_up < 0:
            raise ConfigError(f"warm_up must be a whole number >= 0, got {self.warm_up!r}")
        if not isinstance(self.whiten, bool):
            raise ConfigError(f"whiten must be true or false, got {self.whiten!r}")


class UltraEdit(Deltas):
    """For every edited layer, with the inputs ``h`` and the loss's gradients ``g`` with respect to the outputs at the tokens that give
    the new object, both normalised by their running mean and spread over all edits so far (a lifelong normalisation):

        V = −lr · ‖ĥ‖² · ĝ,    Δᵀ = (Ĥᵀ Ĥ + ridge·I)⁻¹ Ĥᵀ V    (equations 5 to 8)

    With ``warm_up``, ``whiten`` and a ``ridge`` of 10 it is StableEdit (2026, arXiv 2605.11836).

    A batch is one forward and one backward pass; requests are not looked at one by one, so none can be taken back alone.
    """

    name = "UltraEdit"
    config_class = UltraEditConfig

    @classmethod
    def check(cls, config: UltraEditConfig, model, architecture: Architecture) -> None:
        super().check(config, model, architecture)
        cls.check_named(cls.targets(config, architecture), model, "modules")

    @classmethod
    def targets(cls, config: UltraEditConfig, architecture: Architecture) -> list[str]:
        if not config.modules:
            return super().targets(config, architecture)
        return [f"{architecture.blocks}.{block}.{name}" for name, blocks in config.modules.items() for block in blocks]

    def __init__(self, session: Session):
        self.statistics: dict[str, torch.Tensor] = {}  # layer name to count, mean and sum of squares of [h, g], (3, d_in + d_out)
        self.scatters: dict[str, torch.Tensor] = {}  # and, to whiten, to the sum of squares of g with itself, (d_out, d_out)
        super().__init__(session)

    def memory(self) -> dict[str, torch.Tensor]:
        deltas = super().memory()
        for name, layer in self.layers.items():
            self.statistics.setdefault(name, torch.zeros(3, layer.in_features + layer.out_features, dtype=torch.float64))
            if self.config.whiten:
                self.scatters.setdefault(name, torch.zeros(layer.out_features, layer.out_features, dtype=torch.float64))
        return {
            **deltas,
            **{f"{name}.statistics": own for name, own in self.statistics.items()},
            **{f"{name}.scatter": own for name, own in self.scatters.items()},
        }

    def recall(self, tensors: dict[str, torch.Tensor]) -> None:
        super().recall(tensors)
        for kind, sums in (("statistics", self.statistics), ("scatter", self.scatters)):
            for name, own in sums.items():
                found = tensors[f"{name}.{kind}"]
                if found.shape != own.shape:
                    raise ValueError(f"{name}.{kind} is {tuple(found.shape)}, expected {tuple(own.shape)}")
                sums[name] = found.to(own).clone()

    def on(self, session: Session) -> UltraEdit:
        other = super().on(session)
        other.statistics, other.scatters = dict(self.statistics), dict(self.scatters)
        return other

    def apply(self, batch: list[EditRequest], phases: Phases, on_progress: OnProgress) -> tuple[list[float], list[int]]:
        with phases("keys"), evaluating(self.session.model), frozen(self.session.model):
            rows = answer_rows(self.session.tokenizer, [(request.text, request.target_new) for request in batch])
            found, losses = factors_of(self.session, self.layers, rows)
        with phases("update"):
            for name, (inputs, gradients) in found.items():
                self._write_layer(name, inputs.double(), gradients.double())
        on_progress(len(batch), sum(losses) / len(losses))
        return losses, [1] * len(batch)

    def _write_layer(self, name: str, inputs: torch.Tensor, gradients: torch.Tensor) -> None:
        d_in = inputs.shape[1]
        both = torch.cat([inputs, gradients], 1)
        count, mean, squares = self.statistics[name].to(both).unbind()
        total = count + len(both)  # of every feature the same
        after = mean + (both - mean).sum(0) / total
        squares = squares + ((both - mean) * (both - after)).sum(0)  # Welford's, of a batch
        self.statistics[name] = torch.stack([total, after, squares]).to(self.statistics[name])
        if self.config.whiten:
            before, now = both[:, d_in:] - mean[d_in:], both[:, d_in:] - after[d_in:]
            self.scatters[name] = self.scatters[name] + (before.mT @ now).to(self.scatters[name])
        if len(self.session.ledger.entries) < self.config.warm_up:
            return
        normal = (both - after) / ((squares / (total - 1).clamp(min=1)).sqrt() + CLOSE)
        h, g = normal[:, :d_in], normal[:, d_in:]
        free = total[0].item() - g.shape[1] - 1  # of a covariance that is to be inverted
        if self.config.whiten and free > 0:
            spread, axes = torch.linalg.eigh(self.scatters[name].to(both) / free)
            g = (both - after)[:, d_in:] @ (axes * spread.clamp(min=LEAST * spread.max()).rsqrt()) @ axes.mT
        values = -self.config.lr * h.square().sum(1, keepdim=True) * g
        system = h.mT @ h
        system.diagonal().add_(self.config.ridge)
        change = torch.linalg.solve(system, h.mT @ values).mT  # (d_out, d_in)
        if not torch.isfinite(change).all():
            raise RequestError(f"the update of {name} is not finite")
        self.write(name, self.masters[name] + change.to(self.masters[name]))
