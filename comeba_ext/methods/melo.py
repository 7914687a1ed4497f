"""MELO: blocks of one LoRA, each switched on by clusters of keys (Yu et al. 2024, arXiv 2312.11795)."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import nn

from comeba_ext.editing.config import EditConfig, check_fields
from comeba_ext.editing.report import Phases
from comeba_ext.errors import ConfigError
from comeba_ext.forward.partial import evaluating
from comeba_ext.layers.attachment import Attachment
from comeba_ext.layers.hooked_linear import device_of, shape_of
from comeba_ext.memory.ledger import Entry
from comeba_ext.methods.base import OnProgress
from comeba_ext.methods.row_passes import TrainingRows, outputs_of
from comeba_ext.methods.snapshots import Snapshots
from comeba_ext.text.request import EditRequest
from comeba_ext.text.rows import answer_rows

SPLIT = 1e-5  # what is left between two clusters
WAY = "melo"  # under which the router tells the layers behind it where every token goes


@dataclass(frozen=True)
class MeloConfig(EditConfig):
    """Settings of MELO: the first of ``layers`` is looked at for keys, the others have the LoRA; ``lr``, ``steps`` and ``early_stop``
    mean Adam on a block.

    Args:
        rank: of a block, and ``edits_per_block``: requests of a batch that share one.
        blocks_in_all: number of blocks that the scale ``√blocks_in_all`` is for.
        radius: of a new cluster, in the units of the first layer's outputs.
    """

    lr: float = 1e-3
    steps: int = 50
    early_stop: float = 0.01
    rank: int = 2
    edits_per_block: int = 4
    blocks_in_all: int = 350
    radius: float = 0.5

    def __post_init__(self) -> None:
        super().__post_init__()
        check_fields(self, positive=("radius",), counts=("rank", "edits_per_block", "blocks_in_all"))


class Router(Attachment):
    """Leaves a layer's output as it is, and tells the LoRA behind it each token's block: that of the nearest point of the cluster whose
    ball the output lies in, if any.

    Attributes:
        points: ``(n, d_out)``, with ``cluster`` and ``block`` ``(n,)``: where each belongs.
        centres: ``(clusters, d_out)``, radii: ``(clusters,)``.
    """

    alone = True  # the layers behind it listen to one
    precise = ("points", "centres", "radii")

    def __init__(self, base: nn.Module):
        super().__init__(base)
        device, width = device_of(base), shape_of(base)[1]
        for name in ("points", "centres"):
            self.register_buffer(name, torch.zeros(0, width, device=device))
        self.register_buffer("radii", torch.zeros(0, device=device))
        for name in ("cluster", "block"):
            self.register_buffer(name, torch.zeros(0, dtype=torch.long, device=device))

    def forward(self, x: torch.Tensor, *args, **kwargs) -> torch.Tensor:
        output = self.base_layer(x, *args, **kwargs)
        if self.mode != "off" and self.context is not None:
            self.context.here.told[WAY] = self.way(output.float()) if len(self.points) else None
        return output

    def way(self, output: torch.Tensor) -> torch.Tensor:
        """Block of every token, −1 for none, for outputs ``(…, d_out)``."""
        flat = output.reshape(-1, output.shape[-1])
        near = _distances(flat, self.centres).argmin(1)
        points = _distances(flat, self.points).masked_fill(self.cluster[None] != near[:, None], torch.inf).argmin(1)
        inside = (flat - self.centres[near]).norm(dim=-1) <= self.radii[near]  # as radii are measured
        found = torch.where(inside, self.block[points], -1)
        return found.reshape(output.shape[:-1])


def _distances(these: torch.Tensor, those: torch.Tensor) -> torch.Tensor:
    """Pair by pair: as a product, which torch takes beyond a few rows, they would be off by more than a small radius, and a token's way
    would depend on how many stand beside it."""
    return torch.cdist(these, those, compute_mode="donot_use_mm_for_euclid_dist")


class LoraBlocks(Attachment):
    """``base_layer(x) + scale · B_b A_b x`` for tokens that go to block b.

    Attributes:
        down: ``(blocks, rank, d_in)``, up: ``(blocks, d_out, rank)``, float32.
        trained: while editing, ``down`` and ``up`` that take the place of the last block's.
    """

    precise = ("down", "up")

    def __init__(self, base: nn.Module, rank: int, scale: float):
        super().__init__(base)
        self.scale, (d_in, d_out), device = scale, shape_of(base), device_of(base)
        self.register_buffer("down", torch.zeros(0, rank, d_in, device=device))
        self.register_buffer("up", torch.zeros(0, d_out, rank, device=device))
        self.trained: tuple[torch.Tensor, torch.Tensor] | None = None

    def forward(self, x: torch.Tensor, *args, **kwargs) -> torch.Tensor:
        output = self.base_layer(x, *args, **kwargs)
        self.refuse_recomputing("which block of MELO a token goes to")
        way = self.context.here.told.get(WAY) if self.context is not None else None
        if self.mode == "off" or way is None:
            return output
        flat, way = x.reshape(-1, x.shape[-1]).float(), way.reshape(-1).to(x.device)  # the router may be on another device
        changed = torch.zeros(len(flat), output.shape[-1], device=x.device)
        if self.trained is not None:  # a gradient, if only zero, where no token goes to the block that is trained
            changed = changed + 0 * self.trained[1].sum()
        with torch.autocast(x.device.type, enabled=False):
            for block in way.unique().tolist():
                if block >= 0:
                    last = self.trained is not None and block == len(self.down) - 1
                    down, up = self.trained if last else (self.down[block], self.up[block])
                    tokens = (way == block).nonzero()[:, 0]
                    changed = changed.index_put((tokens,), self.scale * (flat[tokens] @ down.mT @ up.mT))
        return output + changed.reshape(output.shape).to(output.dtype)


class MELO(Snapshots):
    """Every few requests of a batch train a LoRA block of their own behind a layer whose outputs, at the prompts' last tokens, are
    kept as points of clusters: a point near a cluster of the same object joins it (its centre becomes the mean, its radius grows), one near
    a cluster of another object halves the distance with it, and points that are then outside of that one are forgotten.

    Every token is its own query (published: the prompt's last token, whose position it is told). Labels are compared as texts. An edit that
    is taken out leaves its cluster's centre and radius as they have become.

    Raises:
        ConfigError: the settings name fewer than two layers.
    """

    name = "MELO"
    config_class = MeloConfig

    @classmethod
    def check(cls, config, model: nn.Module, architecture) -> None:
        super().check(config, model, architecture)
        if len(config.layers) < 2:
            raise ConfigError(f"{cls.name} looks at one layer and edits others behind it, got layers {list(config.layers)}")

    @classmethod
    def build(cls, model: nn.Module, config: MeloConfig, architecture) -> dict[str, Attachment]:
        first, *others = cls.targets(config, architecture)
        lora = {name: LoraBlocks(model.get_submodule(name), config.rank, config.blocks_in_all**0.5) for name in others}
        return {first: Router(model.get_submodule(first)), **lora}

    def blank(self) -> dict:
        return {"labels": [], "owners": []}  # of every cluster: the object; of every point: the request's id

    def apply(self, batch: list[EditRequest], phases: Phases, on_progress: OnProgress) -> tuple[list[float], list[int]]:
        session, config = self.session, self.config
        router, *lora = self.attachments.values()
        rows = answer_rows(session.tokenizer, [(request.text, request.target_new) for request in batch])
        with phases("keys"), evaluating(session.model):
            keys = [own[row.predicts.start] for own, row in zip(outputs_of(session, router, rows), rows, strict=True)]
        losses, steps = [], []
        for start in range(0, len(batch), config.edits_per_block):
            part = slice(start, start + config.edits_per_block)
            with phases("update"):
                for request, key in zip(batch[part], keys[part], strict=True):
                    self._place(router, key.float(), request, len(lora[0].down))
                generator = torch.Generator().manual_seed(config.seed + len(lora[0].down))
                for layer in lora:
                    new = torch.randn(config.rank, layer.down.shape[-1], generator=generator) / layer.down.shape[-1] ** 0.5
                    layer.down = torch.cat([layer.down, new.to(layer.down)[None]])
                    layer.up = torch.cat([layer.up, layer.up.new_zeros(1, layer.up.shape[1], config.rank)])
            with phases("values"), session.training():
                found, step = self._train(lora, rows[part])
            losses += found
            steps += [step] * len(found)
            on_progress(len(losses), sum(losses) / len(losses))
        return losses, steps

    def _train(self, lora: list[LoraBlocks], rows: list) -> tuple[list[float], int]:
        """Adam on the last block, its rate halved every 20 steps."""
        config = self.config
        running = TrainingRows(self.session, rows, config.layers[0])
        for layer in lora:
            layer.trained = (layer.down[-1].clone().requires_grad_(True), layer.up[-1].clone().requires_grad_(True))
        optimiser = torch.optim.Adam([part for layer in lora for part in layer.trained], lr=config.lr)
        schedule = torch.optim.lr_scheduler.StepLR(optimiser, 20, 0.5)
        try:
            for step in range(config.steps + 1):
                optimiser.zero_grad()
                found = running.losses(backward=step < config.steps)
                if step == config.steps or sum(found) / len(found) < config.early_stop:
                    break
                optimiser.step()
                schedule.step()
        finally:
            for layer in lora:
                (down, up), layer.trained = layer.trained, None
                layer.down[-1], layer.up[-1] = down.detach(), up.detach()
        return found, step

    def _place(self, router: Router, key: torch.Tensor, request: EditRequest, block: int) -> None:
        """Put a request's key into a cluster."""
        config, notes = self.config, self.notes
        near, distance = None, float("inf")
        if len(router.centres):
            (distance,), (near,) = (own.tolist() for own in (router.centres - key).norm(dim=1).topk(1, largest=False))
        if near is None or distance > config.radius + router.radii[near].item():
            cluster = self._open(router, key, config.radius, request.target_new)
        elif notes["labels"][near] == request.target_new:
            cluster, own = near, torch.cat([router.points[router.cluster == near], key[None]])
            router.centres[near] = own.mean(0)
            router.radii[near] = max((own - router.centres[near]).norm(dim=1).max().item(), config.radius)
        else:
            router.radii[near] = distance / 2 - SPLIT
            inside = (router.points - router.centres[near]).norm(dim=1) <= router.radii[near]
            self._keep_points(router, inside | (router.cluster != near))
            cluster = self._open(router, key, distance / 2 + SPLIT, request.target_new)
        router.points = torch.cat([router.points, key[None]])
        router.cluster = torch.cat([router.cluster, router.cluster.new_tensor([cluster])])
        router.block = torch.cat([router.block, router.block.new_tensor([block])])
        notes["owners"].append(request.request_id)

    def _open(self, router: Router, centre: torch.Tensor, radius: float, label: str) -> int:
        """A new cluster's number."""
        router.centres = torch.cat([router.centres, centre[None]])
        router.radii = torch.cat([router.radii, router.radii.new_tensor([radius])])
        self.notes["labels"].append(label)
        return len(router.centres) - 1

    def _keep_points(self, router: Router, which: torch.Tensor) -> None:
        """Forget all other points, and the clusters that have none left."""
        self.notes["owners"] = [own for own, kept in zip(self.notes["owners"], which.tolist(), strict=True) if kept]
        router.points, router.block = router.points[which], router.block[which]
        left, router.cluster = router.cluster[which].unique(return_inverse=True)  # numbered anew, in the same order
        router.centres, router.radii = router.centres[left], router.radii[left]
        self.notes["labels"] = [self.notes["labels"][n] for n in left.tolist()]

    def take_out(self, entries: list[Entry]) -> None:
        gone, router = {entry.request.request_id for entry in entries}, next(iter(self.attachments.values()))
        self._keep_points(
            router, torch.tensor([own not in gone for own in self.notes["owners"]], dtype=torch.bool, device=router.points.device)
        )
