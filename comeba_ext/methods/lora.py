"""LoRA fine-tuning, the plain baseline: one low-rank change of many layers (Hu et al. 2022, arXiv 2106.09685)."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import nn

from comeba_ext.editing.config import EditConfig, check_fields
from comeba_ext.editing.report import Phases
from comeba_ext.layers.attachment import Attachment
from comeba_ext.layers.hooked_linear import device_of, shape_of
from comeba_ext.methods.base import OnProgress
from comeba_ext.methods.row_passes import TrainingRows
from comeba_ext.methods.snapshots import Snapshots
from comeba_ext.text.request import EditRequest
from comeba_ext.text.rows import answer_rows


@dataclass(frozen=True)
class LoraConfig(EditConfig):
    """Settings of LoRA fine-tuning; ``lr``, ``steps`` and ``early_stop`` mean Adam on the adapter, ``seed`` its start.

    Args:
        parts: linear layers inside a block that get an adapter; empty: the MLP output projection.
        rank: of the adapter, and ``lora_alpha``: its scale times the rank.
    """

    lr: float = 5e-3
    steps: int = 70
    early_stop: float = 0.01
    parts: tuple[str, ...] = ()
    rank: int = 8
    lora_alpha: float = 32.0

    def __post_init__(self) -> None:
        super().__post_init__()
        check_fields(self, positive=("lora_alpha",), counts=("rank",), parts=("parts",))
        object.__setattr__(self, "parts", tuple(self.parts))


class Adapter(Attachment):
    """``base_layer(x) + scale · up down x`` for every token.

    Attributes:
        down: ``(rank, d_in)``, drawn as PEFT does; up: ``(d_out, rank)``, zero before any edit; float32.
    """

    precise = ("down", "up")
    grows = False

    def __init__(self, base: nn.Module, rank: int, scale: float, seed: int):
        super().__init__(base)
        (d_in, d_out), self.scale = shape_of(base), scale
        down = (2 * torch.rand(rank, d_in, generator=torch.Generator().manual_seed(seed)) - 1) * d_in**-0.5
        self.register_buffer("down", down.to(device_of(base)))
        self.register_buffer("up", torch.zeros(d_out, rank, device=self.down.device))

    def forward(self, x: torch.Tensor, *args, **kwargs) -> torch.Tensor:
        output = self.base_layer(x, *args, **kwargs)
        if self.mode == "off":
            return output
        return output + (self.scale * (x.to(self.down.dtype) @ self.down.mT @ self.up.mT)).to(output.dtype)

    def weight_change(self) -> tuple[torch.Tensor, torch.Tensor]:
        return self.scale * self.up, self.down


class LoRA(Snapshots):
    """Adam on one adapter, at most ``steps`` passes over a batch, until its mean loss falls below ``early_stop``; the next batch trains
    on where the last one ended, with a new optimiser. The loss is the new object's NLL behind the prompt alone.

    A trained adapter has no share of a single request: retraction is refused, and a rollback reaches the latest ten steps or fewer.
    """

    name = "LoRA"
    config_class = LoraConfig

    @classmethod
    def targets(cls, config: LoraConfig, architecture) -> list[str]:
        if not config.parts:
            return super().targets(config, architecture)
        return [f"{architecture.blocks}.{block}.{part}" for block in config.layers for part in config.parts]

    @classmethod
    def check(cls, config: LoraConfig, model: nn.Module, architecture) -> None:
        super().check(config, model, architecture)
        cls.check_named(cls.targets(config, architecture), model, "parts")

    @classmethod
    def build(cls, model: nn.Module, config: LoraConfig, architecture) -> dict[str, Adapter]:
        scale, names = config.lora_alpha / config.rank, cls.targets(config, architecture)
        return {name: Adapter(model.get_submodule(name), config.rank, scale, config.seed + n) for n, name in enumerate(names)}

    def apply(self, batch: list[EditRequest], phases: Phases, on_progress: OnProgress) -> tuple[list[float], list[int]]:
        session, config = self.session, self.config
        rows = answer_rows(session.tokenizer, [(request.text, request.target_new) for request in batch])
        trained = [own for adapter in self.attachments.values() for own in (adapter.down, adapter.up)]
        optimiser = torch.optim.Adam(trained, lr=config.lr)
        with phases("update"), session.training():
            running = TrainingRows(session, rows, config.layers[0])
            try:
                for own in trained:
                    own.requires_grad_(True)
                for step in range(config.steps + 1):
                    optimiser.zero_grad()
                    found = running.losses(backward=step < config.steps)
                    on_progress(0 if step < config.steps else len(batch), sum(found) / len(found))
                    if step == config.steps or sum(found) / len(found) < config.early_stop:
                        break
                    optimiser.step()
            finally:
                for own in trained:
                    own.requires_grad_(False)
                    own.grad = None
        return found, [step] * len(batch)
