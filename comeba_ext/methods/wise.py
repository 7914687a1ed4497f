"""WISE: a side memory beside one projection, and a router between the two (Wang et al. 2024, arXiv 2405.14768)."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import nn
from torch.nn import functional as F

from comeba_ext.editing.config import EditConfig, check_fields
from comeba_ext.editing.report import Phases
from comeba_ext.errors import RequestError
from comeba_ext.methods.base import OnProgress
from comeba_ext.methods.row_passes import TrainingRows, inputs_of
from comeba_ext.methods.side_memory import SideMemory, mean_over_tokens
from comeba_ext.methods.snapshots import Snapshots
from comeba_ext.text.request import EditRequest
from comeba_ext.text.rows import Row, answer_rows, target_rows


@dataclass(frozen=True)
class WiseConfig(EditConfig):
    """Settings of WISE: ``layers`` (one), ``lr``, ``steps`` and ``early_stop`` mean SGD on the side memory.

    Args:
        weight_decay: of SGD, towards the weight (see :class:`WISE`).
        norm_constraint: bound on every entry's distance from the weight.
        mask_ratio: share ρ of the entries that a shard's edits may change.
        low, high, margin_loss: the routing loss's bounds for unrelated and for edited prompts, and their distance (α, β, γ), in the units
            of the layer's outputs.
        threshold_share: share of the lowest activation of an edit that a prompt must exceed.
        save_every: edits a shard takes, and ``merge_every``: edits after which the shards that they are in are merged into one.
        density: of the merge: share of the largest entries of each shard that counts (TIES).
    """

    lr: float = 1.0
    steps: int = 70
    weight_decay: float = 1e-5
    early_stop: float = 0.01
    norm_constraint: float = 1.0
    mask_ratio: float = 0.2
    low: float = 5.0
    high: float = 20.0
    margin_loss: float = 10.0
    threshold_share: float = 0.88
    save_every: int = 500
    merge_every: int = 1000
    density: float = 0.53

    def __post_init__(self) -> None:
        super().__post_init__()
        check_fields(
            self,
            positive=("norm_constraint", "low", "high", "margin_loss"),
            shares=("mask_ratio", "threshold_share", "density"),
            counts=("save_every", "merge_every"),
        )


class WiseMemory(SideMemory):
    """Routes a sequence to the shard whose activation, ``‖(W′ − W) x‖`` in the mean over tokens, is the highest of those that exceed their
    own threshold, as the authors' code does.

    Attributes:
        thresholds: ``(memories,)``; infinite before a shard's first edit.
    """

    precise = ("delta", "thresholds")

    def __init__(self, base: nn.Module):
        super().__init__(base, 0)
        self.register_buffer("thresholds", torch.zeros(0, device=self.delta.device))

    def activations(self, x: torch.Tensor, mask: torch.Tensor | None, memory: int) -> torch.Tensor:
        """``(batch,)`` for rows ``(batch, seq, d_in)``."""
        return mean_over_tokens(F.linear(x, self.weight_of(memory)).norm(dim=-1), mask)

    def route(self, x: torch.Tensor, mask: torch.Tensor | None) -> torch.Tensor:
        found = torch.stack([self.activations(x, mask, n) for n in range(len(self.delta))], 1)  # (batch, memories)
        best = found.masked_fill(found <= self.thresholds, -torch.inf).max(1)
        return torch.where(best.values > -torch.inf, best.indices, -1)


class WISE(Snapshots):
    """Edits go into a copy of one projection's weight, the side memory, by SGD on a random share of its entries; a sequence takes it
    when it changes the layer's output as much as edits do. Every shard of ``save_every`` edits has entries of its own; every
    ``merge_every`` edits those since the last merge are merged (TIES), and stand beside earlier merges.

    Requests are trained one after another, as published. The loss is the new object's NLL, mean over all context prefixes, plus, with d
    the activation of the edited text behind each and d̄ that of the record's locality prompt, the means of the positive entries of
    ``d̄ − d + γ``, ``d̄ − α`` and ``β − d`` (equation 6). A shard's threshold is a share of the lowest activation of its edits, each in the
    mean over its prefixes. Training stops early by the whole loss.

    Where it differs from the authors' code (EasyEdit, models/wise): weight decay pulls W′ towards W; the code's pulls every entry to zero,
    those too that a shard is not to touch. Activations are the paper's; the code applies the model's activation function to both outputs
    first, counts padding, and takes the largest of more than 100 tokens instead of the mean. A running shard below its threshold
    hides no other shard. Replaying earlier edits (appendix B.3) is not done, as by default there.

    As with fine-tuning no single edit can be taken back.

    Raises:
        ConfigError: the settings name more than one layer.
    """

    name = "WISE"
    config_class = WiseConfig
    one_layer = True

    @classmethod
    def build(cls, model: nn.Module, config: WiseConfig, architecture) -> dict[str, WiseMemory]:
        return {name: WiseMemory(model.get_submodule(name)) for name in cls.targets(config, architecture)}

    def blank(self) -> dict:
        # How many edits every shard holds; how many shards, the first, are merges; how many were ever opened.
        return {"shards": [], "merged": 0, "opened": 0}

    def validate(self, batch: list[EditRequest]) -> None:
        super().validate(batch)
        for request in batch:
            if not request.locality_prompts:
                raise RequestError(
                    f"{self.name} learns from a prompt that an edit is not to touch, and {request.text!r} has no locality prompt"
                )

    def renewed(self, notes: dict) -> dict:
        if set(notes) != {"shards", "unmerged"}:
            return notes
        shards, merged = list(notes["shards"]), len(notes["shards"])
        while merged and sum(shards[merged - 1 :]) <= notes["unmerged"]:  # a merge took all shards into the first
            merged -= 1
        return {"shards": shards, "merged": merged, "opened": len(shards)}

    def apply(self, batch: list[EditRequest], phases: Phases, on_progress: OnProgress) -> tuple[list[float], list[int]]:
        session, notes, allowed = self.session, self.notes, None
        losses, steps, prefixes = [], [], session.prefixes  # as the model itself writes them
        with session.training():
            for request in batch:
                if len(notes["shards"]) == notes["merged"] or notes["shards"][-1] >= self.config.save_every:
                    self._open()
                    allowed = None
                allowed = self._mask() if allowed is None else allowed
                rows = target_rows(session.tokenizer, [request], prefixes)
                prompt, answer = request.locality_prompts[0]
                local = answer_rows(session.tokenizer, [(prompt, answer or ".")])  # a row's last token is not read
                with phases("keys"):
                    inputs, (other,) = ([x.float() for x in inputs_of(session, self.attachment, own)] for own in (rows, local))
                with phases("update"):
                    loss, step = self._train(rows, inputs, other, allowed)
                    self._lower(inputs)
                notes["shards"][-1] += 1
                if sum(notes["shards"][notes["merged"] :]) >= self.config.merge_every:
                    self._merge()
                losses.append(loss)
                steps.append(step)
                on_progress(len(losses), sum(losses) / len(losses))
        return losses, steps

    def _train(self, rows: list[Row], inputs: list[torch.Tensor], other: torch.Tensor, allowed: torch.Tensor) -> tuple[float, int]:
        """SGD on the last shard for one request; its last NLL, and the steps made.

        Args:
            rows: a request's, one a prefix.
            inputs: the layer's inputs ``(tokens, d_in)`` at every token of every row, and
            other: of the locality prompt.
            allowed: the entries that may change, ``(d_out, d_in)``.
        """
        config, layer = self.config, self.attachment
        (block,) = config.layers
        running = TrainingRows(self.session, rows, block)
        weight = layer.delta[-1].clone().requires_grad_(True)
        optimiser = torch.optim.SGD([weight], lr=config.lr, weight_decay=config.weight_decay)
        layer.trained, layer.forced = weight, len(layer.delta) - 1
        try:
            for step in range(config.steps + 1):
                optimiser.zero_grad()
                found = running.losses(backward=step < config.steps)
                loss, routing = sum(found) / len(found), self._routing_loss(inputs, other)
                if step == config.steps or loss + routing.item() < config.early_stop:
                    break
                routing.backward()
                weight.grad *= allowed
                optimiser.step()
                with torch.no_grad():
                    weight.clamp_(-config.norm_constraint, config.norm_constraint)
        finally:
            layer.trained = layer.forced = None
        layer.delta[-1] = weight.detach()
        return loss, step

    @torch.no_grad()
    def _lower(self, inputs: list[torch.Tensor]) -> None:
        """The last shard's threshold, so that a request with these rows exceeds it."""
        layer, mean = self.attachment, torch.stack([self._activation(x) for x in inputs]).mean()
        layer.thresholds[-1] = torch.minimum(layer.thresholds[-1], mean * self.config.threshold_share)

    def _activation(self, x: torch.Tensor) -> torch.Tensor:
        """``‖(W′ − W) x‖`` of the last shard, mean over the tokens ``(tokens, d_in)``."""
        weight = self.attachment.weight_of(len(self.attachment.delta) - 1)
        with torch.autocast(x.device.type, enabled=False):  # as a sequence is routed
            return ((x @ weight.mT).square().sum(-1) + 1e-12).sqrt().mean()  # at zero the norm has no gradient

    def _routing_loss(self, inputs: list[torch.Tensor], other: torch.Tensor) -> torch.Tensor:
        """Equation 6: means of the positive entries of ``d̄ − d + γ``, ``d̄ − α``, ``β − d``."""
        inside = torch.stack([self._activation(x) for x in inputs])  # (rows,)
        outside = self._activation(other)[None]
        terms = (outside - inside + self.config.margin_loss, outside - self.config.low, self.config.high - inside)
        return sum(term[term > 0].mean() for term in terms if (term > 0).any()) + 0.0 * inside.sum()

    def _mask(self) -> torch.Tensor:
        """The entries that the last shard may change, ``(d_out, d_in)``."""
        layer, generator = self.attachment, torch.Generator().manual_seed(self.config.seed + self.notes["opened"] - 1)
        allowed = torch.rand(layer.out_features, layer.in_features, generator=generator) < self.config.mask_ratio
        return allowed.to(layer.delta.device)

    def _open(self) -> None:
        """A new shard, equal to the weight."""
        layer = self.attachment
        layer.delta = torch.cat([layer.delta, layer.delta.new_zeros(1, layer.out_features, layer.in_features)])
        layer.thresholds = torch.cat([layer.thresholds, layer.thresholds.new_full((1,), float("inf"))])
        self.notes["shards"].append(0)
        self.notes["opened"] += 1

    def _merge(self) -> None:
        """The shards since the last merge into one."""
        layer, notes, first = self.attachment, self.notes, self.notes["merged"]
        layer.delta = torch.cat([layer.delta[:first], ties(layer.delta[first:], self.config.density)[None]])
        layer.thresholds = torch.cat([layer.thresholds[:first], layer.thresholds[first:].min()[None]])
        notes["shards"][first:] = [sum(notes["shards"][first:])]
        notes["merged"] += 1


def ties(deltas: torch.Tensor, density: float) -> torch.Tensor:
    """TIES merging (Yadav et al. 2023, arXiv 2306.01708) of ``(n, …)`` changes of one weight: of each the share ``density`` of its largest
    entries, the sign that has more weight in every entry, and the mean of those that agree with it."""
    count = max(1, round(density * deltas[0].numel()))
    least = deltas.abs().flatten(1).topk(count, 1).values[:, -1]
    trimmed = torch.where(deltas.abs() >= least.reshape(-1, *[1] * (deltas.dim() - 1)), deltas, 0)
    sign = trimmed.sum(0).sign()
    agree = (trimmed.sign() == sign) & (trimmed != 0)
    return (trimmed * agree).sum(0) / agree.sum(0).clamp(min=1)
