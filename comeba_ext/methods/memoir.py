"""MEMOIR: a side memory whose columns every edit has a few of to itself (Wang et al. 2025, arXiv 2506.07899)."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import nn
from torch.nn import functional as F

from comeba_ext.editing.config import EditConfig, check_fields
from comeba_ext.editing.report import Phases
from comeba_ext.forward.partial import evaluating
from comeba_ext.layers.attachment import disabled
from comeba_ext.memory.ledger import Entry
from comeba_ext.methods.base import OnProgress
from comeba_ext.methods.row_passes import TrainingRows, inputs_of
from comeba_ext.methods.side_memory import SideMemory, mean_over_tokens
from comeba_ext.methods.snapshots import Snapshots
from comeba_ext.text.prefixes import sample_prefixes
from comeba_ext.text.request import EditRequest
from comeba_ext.text.rows import Row, prompt_rows, target_rows


@dataclass(frozen=True)
class MemoirConfig(EditConfig):
    """Settings of MEMOIR: ``layers`` (one), ``lr``, ``steps`` and ``early_stop`` mean SGD on the side memory.

    Args:
        weight_decay: of SGD.
        clip: bound on the norm of a step's gradient.
        active: share of the inputs that an edit has (k of d_in; published: 4,096 of 14,336).
        overlap: share τ of an edit's inputs that a prompt must have too, to take it.
        irrelevant: how many texts the mean input is taken from.
    """

    lr: float = 1.0
    steps: int = 30
    weight_decay: float = 1e-5
    early_stop: float = 0.01
    clip: float = 1.0
    active: float = 0.286
    overlap: float = 0.4
    irrelevant: int = 100

    def __post_init__(self) -> None:
        super().__post_init__()
        check_fields(self, positive=("clip",), shares=("active", "overlap"), counts=("irrelevant",))


class MemoirMemory(SideMemory):
    """One side memory, zero at first. A sequence's features are its mean input, less that of irrelevant texts; its mask is the k largest
    of them by size, in a random order of the inputs. It goes where the stored mask is that shares the most with its own, if that is
    at least the share ``overlap``; then the memory sees its inputs through that mask.

    Attributes:
        masks: ``(edits, d_in)`` bool.
        centre: ``(d_in,)``, mean input of irrelevant texts.
    """

    precise = ("delta", "centre")

    def __init__(self, base: nn.Module, active: float, overlap: float, seed: int):
        super().__init__(base, 1)
        device = self.delta.device
        self.count, self.overlap = max(1, round(active * self.in_features)), overlap
        self.order = torch.randperm(self.in_features, generator=torch.Generator().manual_seed(seed)).to(device)
        self.register_buffer("masks", torch.zeros(0, self.in_features, dtype=torch.bool, device=device))
        self.register_buffer("centre", torch.zeros(self.in_features, device=device))

    def mask_of(self, features: torch.Tensor) -> torch.Tensor:
        """``(n, d_in)`` bool, for mean inputs ``(n, d_in)``."""
        chosen = (features - self.centre).abs().topk(self.count, -1).indices
        return torch.zeros(features.shape, dtype=torch.bool, device=features.device).scatter_(
            -1, self.order.to(chosen.device)[chosen], True
        )

    def route(self, x: torch.Tensor, mask: torch.Tensor | None) -> torch.Tensor:
        if not len(self.masks):
            return torch.full((len(x),), -1, device=x.device)
        shared = self.mask_of(mean_over_tokens(x, mask)).float() @ self.masks.float().mT / self.count
        best = shared.max(1)
        return torch.where(best.values >= self.overlap, best.indices, -1)

    def edit_output(self, x: torch.Tensor, way: int) -> torch.Tensor:
        return F.linear(x * self.masks[way], self.weight_of(0))


class MEMOIR(Snapshots):
    """Every request trains the side memory behind its own prompt's mask, so that edits touch different columns of it; see
    :class:`MemoirMemory` for who takes it.

    Requests are trained one after another, as published, under all context prefixes. What irrelevant texts look like is taken
    from texts that the unedited model writes (published: 100 prompts of a data set). An edit that is taken out leaves the memory as it is;
    its mask goes, so that nothing takes that way any more.

    Raises:
        ConfigError: the settings name more than one layer.
    """

    name = "MEMOIR"
    config_class = MemoirConfig
    one_layer = True

    @classmethod
    def build(cls, model: nn.Module, config: MemoirConfig, architecture) -> dict[str, MemoirMemory]:
        return {
            name: MemoirMemory(model.get_submodule(name), config.active, config.overlap, config.seed)
            for name in cls.targets(config, architecture)
        }

    def blank(self) -> dict:
        return {"owners": []}  # of every mask: the request's id

    def apply(self, batch: list[EditRequest], phases: Phases, on_progress: OnProgress) -> tuple[list[float], list[int]]:
        session, side = self.session, self.attachment
        if not len(side.masks):
            with phases("calibrate"):
                side.centre = self._centre()
        with phases("keys"), evaluating(session.model):
            features = torch.stack([x.float().mean(0) for x in inputs_of(session, side, prompt_rows(session.tokenizer, batch, [""]))])
        losses, steps, prefixes = [], [], session.prefixes  # as the model itself writes them
        with phases("update"), session.training():
            for request, mask in zip(batch, side.mask_of(features), strict=True):
                side.masks = torch.cat([side.masks, mask[None]])
                self.notes["owners"].append(request.request_id)
                loss, step = self._train(target_rows(session.tokenizer, [request], prefixes))
                losses.append(loss)
                steps.append(step)
                on_progress(len(losses), sum(losses) / len(losses))
        return losses, steps

    def _centre(self) -> torch.Tensor:
        """Mean input of texts that the unedited model writes."""
        session, count = self.session, self.config.irrelevant
        with disabled(session.model), evaluating(session.model):
            texts = sample_prefixes(session.model, session.tokenizer, count, self.config.prefix_length, self.config.seed + 1)[1:]
            encoded = session.tokenizer(texts)["input_ids"]
            rows = [Row(n, ids, -1, [], -1) for n, ids in enumerate(encoded)]
            return torch.stack([x.float().mean(0) for x in inputs_of(session, self.attachment, rows)]).mean(0)

    def _train(self, rows: list[Row]) -> tuple[float, int]:
        """SGD on the memory behind the last mask, for one request's rows; the last loss, and the steps made."""
        config, side = self.config, self.attachment
        running = TrainingRows(self.session, rows, config.layers[0])
        weight = side.delta[0].clone().requires_grad_(True)
        optimiser = torch.optim.SGD([weight], lr=config.lr, weight_decay=config.weight_decay)
        side.trained, side.forced = weight, len(side.masks) - 1
        try:
            for step in range(config.steps + 1):
                optimiser.zero_grad()
                found = running.losses(backward=step < config.steps)
                loss = sum(found) / len(found)
                if step == config.steps or loss < config.early_stop:
                    break
                torch.nn.utils.clip_grad_norm_([weight], config.clip)
                optimiser.step()
        finally:
            side.trained = side.forced = None
        side.delta = weight.detach()[None]
        return loss, step

    def take_out(self, entries: list[Entry]) -> None:
        gone = {entry.request.request_id for entry in entries}
        kept = [n for n, owner in enumerate(self.notes["owners"]) if owner not in gone]
        self.notes = {"owners": [self.notes["owners"][n] for n in kept]}
        self.attachment.masks = self.attachment.masks[kept]

    def load_state(self, tensors: dict[str, torch.Tensor], manifest: dict) -> None:
        super().load_state(tensors, manifest)
        if len(self.notes["owners"]) != len(self.attachment.masks):
            raise ValueError("masks and owners are not equally many")
