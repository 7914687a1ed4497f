"""Fine-tuning one layer's projection, the baseline of ROME's and of the paper's tables."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import nn
from torch.nn import functional as F

from comeba_ext.editing.config import EditConfig, is_int
from comeba_ext.editing.report import Phases
from comeba_ext.editing.target_values import TargetValues
from comeba_ext.errors import ConfigError, RequestError
from comeba_ext.forward.partial import evaluating, frozen
from comeba_ext.memory.ledger import Entry
from comeba_ext.methods.settings import only_layer
from comeba_ext.methods.without_hooks import WithoutHooks
from comeba_ext.text.encoding import micro_batches, pad_id
from comeba_ext.text.request import EditRequest
from comeba_ext.text.rows import Row, batch_inputs, target_rows

KEPT = 10  # latest steps a rollback can reach, each a copy of delta on the host


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
        bound = self.norm_constraint
        if bound is not None and not (isinstance(bound, (int, float)) and not isinstance(bound, bool) and bound > 0):
            raise ConfigError(f"norm_constraint must be null or a number > 0, got {bound!r}")
        if self.chunk is not None and not (is_int(self.chunk) and self.chunk > 0):
            raise ConfigError(f"chunk must be null or a whole number > 0, got {self.chunk!r}")
        if self.lr_unit != "absolute":
            raise ConfigError(f"lr_unit must be absolute: it is a weight that is trained, got {self.lr_unit!r}")


class FT(WithoutHooks):
    """Adam on the whole weight of one MLP output projection, at most ``steps`` passes over a batch.

    The loss is the new object's NLL behind the prompt alone: mean over its tokens, teacher-forced, then over the
    requests; a step is left out below ``early_stop``, and training ends when a whole pass is. (ROME's code, and EasyEdit's
    ``prompt_last``, ask for all object tokens at the prompt's last position; with objects of one token there is no
    difference.) Adam starts anew with every batch. Nothing of the covariance is used.

    A trained weight has no share of a single request: :meth:`retract` is refused, an earlier request about the same
    fact is simply trained over, and :meth:`rollback` reaches step 0 and the latest ten steps, as far back as the
    one that was loaded.

    Raises:
        ConfigError: the settings name more than one layer.
    """

    method = "FT"
    config_class = FTConfig
    needs_covariance = False

    def __init__(self, model: nn.Module, tokenizer, config: FTConfig | None = None):
        super().__init__(model, tokenizer, only_layer(config or self.default_config(model), self.method))
        self._states: dict[int, dict[str, torch.Tensor]] = {}  # step -> delta after it

    def retract(self, request_ids) -> None:
        """Raises :class:`RequestError`."""
        raise RequestError(f"{self.method} trains a weight on whole batches, so no single request can be taken back; use rollback")

    def target_values(self, requests, *, progress: bool = False) -> torch.Tensor:
        """Raises :class:`RequestError`."""
        raise RequestError(f"{self.method} has no target values")

    def _check_values(self, values, count: int):
        raise RequestError(f"{self.method} has no target values")

    def _optimise(self, batch: list[EditRequest], on_progress, trace=None) -> TargetValues:
        self._trained = TargetValues(torch.zeros(len(batch), 0))  # losses and steps follow when it has been trained
        return self._trained

    def _write(self, batch: list[EditRequest], values: torch.Tensor, phases: Phases, trace=None):
        ((name, layer),) = self.layers.items()
        if self.step and self.step not in self._states:  # loaded; step 0 needs no copy
            self._states[self.step] = {name: self._delta[name].cpu().clone()}
        with phases("update"), evaluating(self.model), frozen(self.model):
            losses, passes = self._train(layer, self._delta[name], target_rows(self.tokenizer, batch, [""]))
        self._trained.losses += losses
        self._trained.steps += [passes] * len(batch)
        if not torch.isfinite(self._delta[name]).all():
            raise RequestError(f"fine-tuning {name} diverged; lower the learning rate")
        self._states[self.step + 1] = {name: self._delta[name].cpu().clone()}
        for step in sorted(self._states)[:-KEPT]:
            del self._states[step]
        return {name: torch.zeros(len(batch), 1, 0)}, {name: torch.zeros(len(batch), 1, 0)}

    def _train(self, layer, weight: torch.Tensor, rows: list[Row]) -> tuple[list[float], int]:
        """Train ``weight`` (``delta``, or its float32 master); returns the last losses ``(u,)`` and the passes made."""
        start = weight.clone()
        size = self.config.chunk or len(rows)
        chunks = [rows[n : n + size] for n in range(0, len(rows), size)]
        optimiser = torch.optim.Adam([weight], lr=self.config.lr, weight_decay=self.config.weight_decay)
        layer.delta.requires_grad_(True)
        try:
            for done in range(self.config.steps + 1):
                losses: list[float] = []
                for chunk in chunks:
                    layer.delta.grad = None
                    found = self._losses(chunk, train=done < self.config.steps)
                    losses += found
                    if done < self.config.steps and not sum(found) / len(found) < self.config.early_stop:  # a NaN goes on
                        weight.grad = layer.delta.grad.to(weight)
                        self._step(optimiser, layer, weight, start)
                if sum(losses) / len(losses) < self.config.early_stop:
                    break
        finally:
            layer.delta.requires_grad_(False)
            layer.delta.grad = weight.grad = None
        return losses, done

    @torch.no_grad()
    def _step(self, optimiser, layer, weight: torch.Tensor, start: torch.Tensor) -> None:
        optimiser.step()
        if self.config.norm_constraint is not None:
            bound = self.config.norm_constraint
            weight.copy_(torch.maximum(torch.minimum(weight, start + bound), start - bound))
        if layer.delta is not weight:
            layer.delta.copy_(weight)

    def _losses(self, rows: list[Row], train: bool) -> list[float]:
        """Loss of every request; with ``train`` the gradient of their mean is left in ``layer.delta.grad``."""
        losses = [0.0] * len(rows)
        for group in micro_batches([len(row.ids) for row in rows], self.max_tokens):
            chosen = [rows[n] for n in group]
            with torch.set_grad_enabled(train):
                logits = self.model(**batch_inputs(chosen, pad_id(self.tokenizer), self._device), use_cache=False).logits
                wide = torch.promote_types(logits.dtype, torch.float32)
                found = [
                    F.cross_entropy(logits[i, row.predicts.start : row.predicts.stop].to(wide), _ids(row, logits))
                    for i, row in enumerate(chosen)
                ]
                if train:
                    (sum(found) / len(rows)).backward()
            for n, loss in zip(group, found, strict=True):
                losses[n] = loss.item()
        return losses

    def _exchange(self, name: str, remove: list[Entry], add: list[Entry]) -> None:
        pass  # the earlier request is trained over

    def _revert(self, name: str, step: int, added: list[Entry], removed: list[Entry]) -> None:
        if step == self.step:
            return
        if step == 0:
            state = torch.zeros_like(self._delta[name])
        elif step in self._states:
            state = self._states[step][name]
        else:
            kept = [s for s in sorted(self._states) if s < self.step]
            raise RequestError(f"{self.method} keeps the latest {KEPT} steps; cannot roll back to step {step}, only to {[0, *kept]}")
        self._delta[name].copy_(state)
        self.layers[name].delta.copy_(state)
        self._states = {kept: value for kept, value in self._states.items() if kept <= step}

    def _factors(self, name: str, live: list[Entry]):
        return None


class FTL(FT):
    """FT with every entry of a batch's change bounded by ``norm_constraint`` (FT+L in ROME's appendix E.1; the bound
    is taken against the weight as the batch found it).

    Raises:
        ConfigError: the settings hold no ``norm_constraint``.
    """

    method = "FT-L"

    def __init__(self, model: nn.Module, tokenizer, config: FTConfig | None = None):
        config = only_layer(config or self.default_config(model), self.method)
        if config.norm_constraint is None:
            raise ConfigError("FT-L bounds every entry's change: give norm_constraint a number, or use FT")
        super().__init__(model, tokenizer, config)


def _ids(row: Row, logits: torch.Tensor) -> torch.Tensor:
    return torch.tensor(row.target, device=logits.device)
