"""Fine-tuning one layer's projection, the baseline of ROME's and of the paper's tables."""

from __future__ import annotations

from dataclasses import dataclass

import torch

from comeba_ext.editing.config import EditConfig, check_fields
from comeba_ext.editing.report import Phases
from comeba_ext.errors import ConfigError
from comeba_ext.methods.base import OnProgress
from comeba_ext.methods.deltas import Deltas
from comeba_ext.methods.row_passes import TrainingRows
from comeba_ext.text.request import EditRequest
from comeba_ext.text.rows import Row, target_rows


@dataclass(frozen=True)
class FTConfig(EditConfig):
    """Settings of fine-tuning: ``layers`` (one), ``lr``, ``steps`` and ``early_stop`` mean Adam on the weight.

    Args:
        norm_constraint: bound ε on every entry of a batch's change of the weight; ``None``: no bound.
        weight_decay: Adam's L2 on ``delta``, the change, so that it pulls towards the model's own weight.
        chunk: requests a step of Adam, so that one of the ``steps`` passes over a batch takes several; ``None``: all.
    """

    lr: float = 5e-4
    weight_decay: float = 0.0
    early_stop: float = 0.01
    norm_constraint: float | None = None
    chunk: int | None = None

    def __post_init__(self) -> None:
        super().__post_init__()
        check_fields(self, positive_or_none=("norm_constraint",), counts_or_none=("chunk",))
        if self.lr_unit != "absolute":
            raise ConfigError(f"lr_unit must be absolute: it is a weight that is trained, got {self.lr_unit!r}")


class FT(Deltas):
    """Adam on the whole weight of one MLP output projection, at most ``steps`` passes over a batch.

    The loss is the new object's NLL behind the prompt alone: mean over its tokens, teacher-forced, then over the
    requests; a step is left out below ``early_stop``, and training ends when a whole pass is. (ROME's code, and EasyEdit's
    ``prompt_last``, ask for all object tokens at the prompt's last position; with objects of one token there is no
    difference.) Adam starts anew with every batch. Nothing of the covariance is used.

    A trained weight has no share of a single request: retraction is refused, an earlier request about the same fact is simply
    trained over, and a rollback reaches step 0 and the latest ten steps or fewer, as far back as the one that was loaded.

    Raises:
        ConfigError: the settings name more than one layer.
    """

    name = "FT"
    config_class = FTConfig
    one_layer = True

    def apply(self, batch: list[EditRequest], phases: Phases, on_progress: OnProgress) -> tuple[list[float], list[int]]:
        ((name, layer),) = self.layers.items()
        with phases("update"), self.session.training():
            found, passes = self._train(layer, self.masters[name], target_rows(self.session.tokenizer, batch, [""]))
        return found, [passes] * len(batch)

    def _train(self, layer, weight: torch.Tensor, rows: list[Row]) -> tuple[list[float], int]:
        """Train ``weight`` (``delta``, or its float32 master); returns the last losses ``(u,)`` and the passes made."""
        start = weight.clone()
        size = self.config.chunk or len(rows)
        (block,), config = self.config.layers, self.config
        chunks = [TrainingRows(self.session, rows[n : n + size], block) for n in range(0, len(rows), size)]
        optimiser = torch.optim.Adam([weight], lr=config.lr, weight_decay=config.weight_decay)
        layer.delta.requires_grad_(True)
        try:
            for done in range(config.steps + 1):
                last: list[float] = []
                for chunk in chunks:
                    layer.delta.grad = None
                    found = chunk.losses(backward=done < config.steps)
                    last += found
                    if done < config.steps and not sum(found) / len(found) < config.early_stop:  # a NaN goes on
                        weight.grad = layer.delta.grad.to(weight)
                        self._step(optimiser, layer, weight, start)
                if sum(last) / len(last) < config.early_stop:
                    break
        finally:
            layer.delta.requires_grad_(False)
            layer.delta.grad = weight.grad = None
        return last, done

    @torch.no_grad()
    def _step(self, optimiser, layer, weight: torch.Tensor, start: torch.Tensor) -> None:
        optimiser.step()
        if self.config.norm_constraint is not None:
            bound = self.config.norm_constraint
            weight.copy_(torch.maximum(torch.minimum(weight, start + bound), start - bound))
        if layer.delta is not weight:
            layer.delta.copy_(weight)


class FTL(FT):
    """FT with every entry of a batch's change bounded by ``norm_constraint`` (FT+L in ROME's appendix E.1; the bound
    is taken against the weight as the batch found it).

    Raises:
        ConfigError: the settings hold no ``norm_constraint``.
    """

    name = "FT-L"

    @classmethod
    def check(cls, config, model, architecture) -> None:
        super().check(config, model, architecture)
        if config.norm_constraint is None:
            raise ConfigError("FT-L bounds every entry's change: give norm_constraint a number, or use FT")
