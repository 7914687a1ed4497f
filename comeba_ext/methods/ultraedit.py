"""UltraEdit: one backward pass a batch, no subject, no covariance (Gu et al. 2025, arXiv 2505.14679), and StableEdit (arXiv 2605.11836)."""

from __future__ import annotations

from dataclasses import dataclass, field
from pathlib import Path

import torch

from comeba_ext.editing.config import EditConfig, check_fields, is_int
from comeba_ext.editing.report import Phases
from comeba_ext.editing.session import Session
from comeba_ext.errors import ConfigError, RequestError
from comeba_ext.forward.architectures import Architecture
from comeba_ext.forward.partial import evaluating, frozen
from comeba_ext.methods.base import OnProgress
from comeba_ext.methods.deltas import Deltas
from comeba_ext.methods.in_context import read_records
from comeba_ext.methods.row_passes import TrainingRows, factors_of
from comeba_ext.text.request import EditRequest
from comeba_ext.text.rows import Row, answer_rows

CLOSE = torch.finfo(torch.float32).eps  # added to a spread that is divided by
LEAST = 1e-6  # of the largest variance: bound on what is divided by when whitening (the authors' code bounds the variances themselves)
WARMED = 100  # records of a warm-up whose statistics are taken at a time, which bounds memory (as many as in a step of the authors' runs)


@dataclass(frozen=True)
class UltraEditConfig(EditConfig):
    """Settings of UltraEdit; ``lr`` is the share of the gradient that is taken.

    Args:
        modules: name of a linear layer inside a block to the blocks in which it is edited; empty: the MLP output projections of ``layers``.
        ridge: weight of the identity.
        whiten: gradients are multiplied by the inverse root of their running covariance, not divided by their spread, as soon as more
            than ``d_out + 1`` tokens were seen.
        warm_up_records: file of records whose statistics are taken before the first edit, none of which is to be edited or asked.
        warm_up_count: how many of them, the first, at most (published: 2,000).
    """

    lr: float = 1e-6
    modules: dict = field(default_factory=dict)
    ridge: float = 1.0
    whiten: bool = False
    warm_up_records: str | None = None
    warm_up_count: int = 2000

    def __post_init__(self) -> None:
        super().__post_init__()
        known = isinstance(self.modules, dict) and all(
            isinstance(name, str) and isinstance(blocks, (list, tuple)) and blocks and all(is_int(n) and n >= 0 for n in blocks)
            for name, blocks in self.modules.items()
        )
        if not known:
            raise ConfigError(f"modules must map a layer's name inside a block to a list of block numbers, got {self.modules!r}")
        check_fields(self, positive=("ridge",), flags=("whiten",), texts_or_none=("warm_up_records",), counts=("warm_up_count",))

    @classmethod
    def from_dict(cls, values: dict, where: str = "configuration") -> UltraEditConfig:
        if isinstance(values, dict) and values.get("warm_up") == 0:  # a setting of 0.1.0, where edits could be lost to it
            values = {key: value for key, value in values.items() if key != "warm_up"}
        return super().from_dict(values, where)


@dataclass(frozen=True)
class StableEditConfig(UltraEditConfig):
    """Settings of StableEdit: UltraEdit's, with another ridge, and whitened."""

    ridge: float = 10.0
    whiten: bool = True


class UltraEdit(Deltas):
    """For every edited layer, with the inputs ``h`` and the loss's gradients ``g`` with respect to the outputs at the tokens that give
    the new object, and ``ĥ`` and ``ĝ`` normalised by their running mean and spread over all edits so far (a lifelong normalisation):

        V = −lr · ‖ĥ‖² · ĝ,    Δᵀ = (Hᵀ H + ridge·I)⁻¹ Hᵀ V    (equations 5 to 8)

    Values are found from what is normalised; ``H``, which they are regressed on, is the inputs as the layer is given them, in the paper
    and in the authors' code. Statistics are each layer's own (the code's are shared by layers of one shape), and of every request's own
    loss, so that they do not depend on how many share a batch. A first batch of one token has no spread, and moves nothing: take
    several requests for it, or ``warm_up_records``.

    A batch is one forward and one backward pass; requests are not looked at one by one, so none can be taken back alone.
    """

    name = "UltraEdit"
    config_class = UltraEditConfig

    @classmethod
    def implied(cls, changes: dict) -> dict:
        """Blocks that a user names are those of the output projections, whatever modules are published."""
        return {"modules": {}} if "layers" in changes else {}

    @classmethod
    def files(cls, config: UltraEditConfig) -> dict[str, Path]:
        return {"warm_up_records": Path(config.warm_up_records)} if config.warm_up_records else {}

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

    def ready(self) -> None:
        if self._cold():
            self._records()

    def apply(self, batch: list[EditRequest], phases: Phases, on_progress: OnProgress) -> tuple[list[float], list[int]]:
        with phases("calibrate"):
            self.warm_up()
        with phases("keys"):
            rows = self._rows(batch)
            found = self._factors(rows)
        with phases("update"):
            for name, (inputs, gradients) in found.items():
                self._write_layer(name, inputs.double(), gradients.double())
            first = min(block for blocks in (self.config.modules.values() or [self.config.layers]) for block in blocks)
            with torch.no_grad(), evaluating(self.session.model):
                losses = TrainingRows(self.session, rows, first).losses()
        on_progress(len(batch), sum(losses) / len(losses))
        return losses, [1] * len(batch)

    def warm_up(self) -> None:
        """Take the statistics of ``warm_up_records``, if that was asked for and is to come.

        Raises:
            ConfigError: the file holds no usable record.
        """
        records = self._records() if self._cold() else []
        for start in range(0, len(records), WARMED):
            for name, (inputs, gradients) in self._factors(self._rows(records[start : start + WARMED])).items():
                self._note(name, torch.cat([inputs, gradients], 1).double())

    def _cold(self) -> bool:
        """Whether a warm-up is asked for, and to come."""
        return self.config.warm_up_records is not None and not any(own[0].any() for own in self.statistics.values())

    def _records(self) -> list[EditRequest]:
        return read_records(self.config.warm_up_records, "warm_up_records", self.config.warm_up_count)

    def _rows(self, requests: list[EditRequest]) -> list[Row]:
        return answer_rows(self.session.tokenizer, [(request.text, request.target_new) for request in requests])

    def _factors(self, rows: list[Row]) -> dict[str, tuple[torch.Tensor, torch.Tensor]]:
        """Layer name to ``h (tokens, d_in)`` and ``g (tokens, d_out)``, each of its request's loss."""
        with evaluating(self.session.model), frozen(self.session.model):
            found, _ = factors_of(self.session, self.layers, rows)
        return {name: (inputs, len(rows) * gradients) for name, (inputs, gradients) in found.items()}

    def _note(self, name: str, both: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
        """Take tokens ``[h, g]`` into the statistics; count, mean and sum of squares then, of every feature."""
        d_in = self.layers[name].in_features
        count, mean, squares = self.statistics[name].to(both).unbind()
        total = count + len(both)  # of every feature the same
        after = mean + (both - mean).sum(0) / total
        squares = squares + ((both - mean) * (both - after)).sum(0)  # Welford's, of a batch
        self.statistics[name] = torch.stack([total, after, squares]).to(self.statistics[name])
        if self.config.whiten:
            before, now = both[:, d_in:] - mean[d_in:], both[:, d_in:] - after[d_in:]
            self.scatters[name] = self.scatters[name] + (before.mT @ now).to(self.scatters[name])
        return total, after, squares

    def _write_layer(self, name: str, inputs: torch.Tensor, gradients: torch.Tensor) -> None:
        d_in, both = inputs.shape[1], torch.cat([inputs, gradients], 1)
        total, mean, squares = self._note(name, both)
        normal = (both - mean) / ((squares / (total - 1).clamp(min=1)).sqrt() + CLOSE)
        h, g = normal[:, :d_in], normal[:, d_in:]
        free = total[0].item() - g.shape[1] - 1  # of a covariance that is to be inverted
        if self.config.whiten and free > 0:
            spread, axes = torch.linalg.eigh(self.scatters[name].to(both) / free)
            g = (both - mean)[:, d_in:] @ (axes * spread.clamp(min=LEAST * spread.max()).rsqrt()) @ axes.mT
        values = -self.config.lr * h.square().sum(1, keepdim=True) * g
        change = _ridge(inputs, values, self.config.ridge).mT  # (d_out, d_in)
        if not torch.isfinite(change).all():
            raise RequestError(f"the update of {name} is not finite")
        self.write(name, self.masters[name] + change.to(self.masters[name]))


def _ridge(inputs: torch.Tensor, values: torch.Tensor, ridge: float) -> torch.Tensor:
    """``(Hᵀ H + ridge·I)⁻¹ Hᵀ V``, ``(d_in, d_out)``, of ``inputs`` H ``(tokens, d_in)`` and ``values`` V ``(tokens, d_out)``.

    Of few tokens ``Hᵀ (H Hᵀ + ridge·I)⁻¹ V``, which is the same: a system of as many unknowns as there are tokens.
    """
    few = len(inputs) <= inputs.shape[1]
    system = inputs @ inputs.mT if few else inputs.mT @ inputs
    system.diagonal().add_(ridge)
    return inputs.mT @ torch.linalg.solve(system, values) if few else torch.linalg.solve(system, inputs.mT @ values)


class StableEdit(UltraEdit):
    """UltraEdit with a larger ridge, whitened gradients, and ``warm_up_records``: without it, statistics begin with the first edit.

    The authors' runs warm up on 20 steps of 100 records of a training part, and their code writes what UltraEdit finds for these records
    into the weights too (editor/base.py, sequential_valid). Here nothing of them is written.
    """

    name = "StableEdit"
    config_class = StableEditConfig
