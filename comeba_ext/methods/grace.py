"""GRACE: a codebook of keys and values beside one layer (Hartvigsen et al. 2023, arXiv 2211.11031)."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import nn

from comeba_ext.editing.config import EditConfig, check_fields
from comeba_ext.editing.report import Phases
from comeba_ext.forward.partial import evaluating
from comeba_ext.layers.attachment import Attachment
from comeba_ext.layers.hooked_linear import device_of, shape_of
from comeba_ext.memory.ledger import Entry
from comeba_ext.methods.base import OnProgress
from comeba_ext.methods.row_passes import TrainingRows, inputs_of
from comeba_ext.methods.snapshots import Snapshots
from comeba_ext.text.request import EditRequest
from comeba_ext.text.rows import answer_rows

SPLIT = 1e-5  # what is left between the balls of two neighbours


@dataclass(frozen=True)
class GraceConfig(EditConfig):
    """Settings of GRACE: ``layers`` (one), ``lr``, ``steps`` and ``early_stop`` mean Adam on the values.

    Args:
        radius: ε, of a new key's ball, in the units of the layer's inputs.
        warm: start a value as the layer's own output instead of at random.
    """

    lr: float = 1.0
    steps: int = 50
    early_stop: float = 0.01
    radius: float = 1.0
    warm: bool = False

    def __post_init__(self) -> None:
        super().__post_init__()
        check_fields(self, positive=("radius",), flags=("warm",))


class Codebook(Attachment):
    """A layer whose output is another one for inputs close to a key: the nearest key's value, if it lies within its radius.

    Attributes:
        keys: ``(n, d_in)``, values: ``(n, d_out)``, radii: ``(n,)``, all float32.
        trained: values that are being found and take the others' place meanwhile.
    """

    precise = ("keys", "values", "radii")

    def __init__(self, base: nn.Module):
        super().__init__(base)
        (self.in_features, self.out_features), device = shape_of(base), device_of(base)
        for name, width in (("keys", (self.in_features,)), ("values", (self.out_features,)), ("radii", ())):
            self.register_buffer(name, torch.zeros(0, *width, device=device))
        self.trained: torch.Tensor | None = None

    def forward(self, x: torch.Tensor, *args, **kwargs) -> torch.Tensor:
        output = self.base_layer(x, *args, **kwargs)
        if self.mode == "off" or not len(self.keys):
            return output
        index, distance = self.nearest(x.reshape(-1, self.in_features))
        values = self.values if self.trained is None else self.trained
        changed = torch.where(
            (distance <= self.radii[index])[:, None], values[index].to(output.dtype), output.reshape(-1, self.out_features)
        )
        return changed.reshape(output.shape)

    def nearest(self, x: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """Number of the nearest key and its distance, for inputs ``(tokens, d_in)``."""
        x = x.float()
        with torch.autocast(x.device.type, enabled=False):  # neighbours differ by less than half precision keeps
            index = (self.keys.square().sum(-1) - 2 * x @ self.keys.mT).argmin(-1)  # the same order as distances
        return index, (x - self.keys[index]).norm(dim=-1)  # exact: a radius may be as small as rounding


class GRACE(Snapshots):
    """The layer's output at the prompt's last token is replaced by a value that gives the new object; a new token takes it if its
    input lies in a key's ball.

    A new key within ``radius`` of an old one's ball shares its value where both ask for the same object (the ball grows), and halves the
    distance with it where they do not (algorithm 1). Labels are compared as texts (the published code compares means of token ids).

    Every token is its own query, so that teacher-forced and cached passes answer alike; the published code looks at the prompt's last
    token alone, whose position it is told. A batch's values are found together, which for each of them is the same as alone.

    An edit that is taken out leaves its neighbours' balls as small as they have become. Two objects for one and the same text leave no room
    for either, as published.

    Raises:
        ConfigError: the settings name more than one layer.
    """

    name = "GRACE"
    config_class = GraceConfig
    one_layer = True

    @classmethod
    def build(cls, model: nn.Module, config: GraceConfig, architecture) -> dict[str, Codebook]:
        return {name: Codebook(model.get_submodule(name)) for name in cls.targets(config, architecture)}

    def blank(self) -> dict:
        return {"labels": [], "owners": []}  # of every key: the object, and the ids of the requests that use it

    def apply(self, batch: list[EditRequest], phases: Phases, on_progress: OnProgress) -> tuple[list[float], list[int]]:
        session, codebook = self.session, self.attachment
        rows = answer_rows(session.tokenizer, [(request.text, request.target_new) for request in batch])
        with phases("keys"), evaluating(session.model):
            queries = [own[row.predicts.start] for own, row in zip(inputs_of(session, codebook, rows), rows, strict=True)]
        self.batch_ids = [request.request_id for request in batch]
        with phases("update"), torch.no_grad():
            for request, query in zip(batch, queries, strict=True):
                self._place(request, query)
        with phases("values"), session.training():
            return self._train(rows, on_progress)

    def _keys_of(self, left: list[int]) -> torch.Tensor:
        """Which keys the requests of these numbers in the batch use, ``(n,)`` bool."""
        ids = {self.batch_ids[n] for n in left}
        return torch.tensor([bool(ids & set(own)) for own in self.notes["owners"]], device=self.attachment.keys.device)

    def _place(self, request: EditRequest, query: torch.Tensor) -> None:
        """Give a request's key a ball (algorithm 1)."""
        codebook, notes, radius = self.attachment, self.notes, self.config.radius
        if len(codebook.keys):
            (index,), (distance,) = codebook.nearest(query[None])
            own = codebook.radii[index]
            if distance <= radius + own:
                if notes["labels"][index] == request.target_new:
                    codebook.radii[index] = torch.maximum(own, distance)
                    notes["owners"][index].append(request.request_id)
                    return
                radius = distance / 2
                codebook.radii[index] = (radius - SPLIT).clamp(min=0)
        value = torch.rand(codebook.out_features, generator=torch.Generator().manual_seed(self.config.seed + len(codebook.keys)))
        if self.config.warm:
            value = codebook.base_layer(query[None])[0]  # as it came: a quantised weight's type is not that of inputs
        key = query.float()
        for name, new in (("keys", key), ("values", value.to(key)), ("radii", key.new_tensor(float(radius)))):
            setattr(codebook, name, torch.cat([getattr(codebook, name), new[None]]))
        notes["labels"].append(request.target_new)
        notes["owners"].append([request.request_id])

    def _train(self, rows: list, on_progress: OnProgress) -> tuple[list[float], list[int]]:
        """Adam on the values; a request is done when its loss falls below ``early_stop``."""
        codebook = self.attachment
        values = codebook.values.clone().requires_grad_(True)
        optimiser = torch.optim.Adam([values], lr=self.config.lr)
        (block,) = self.config.layers
        found, steps = [float("inf")] * len(rows), [0] * len(rows)
        todo, running = list(range(len(rows))), TrainingRows(self.session, rows, block)
        codebook.trained = values
        try:
            for step in range(self.config.steps + 1):
                optimiser.zero_grad()
                for n, loss in zip(todo, running.losses(backward=step < self.config.steps), strict=True):
                    found[n], steps[n] = loss, step
                left = [n for n in todo if not found[n] < self.config.early_stop]
                on_progress(len(rows) - len(left), sum(found) / len(found))
                if step == self.config.steps or not left:
                    break
                values.grad *= len(todo)  # of a request's own loss, not of the mean
                before, still = values.detach().clone(), self._keys_of(left)
                optimiser.step()
                with torch.no_grad():  # Adam's momentum would go on without a gradient: a value that is done stays
                    values[~still] = before[~still]
                if len(left) < len(todo):
                    todo, running = left, TrainingRows(self.session, [rows[n] for n in left], block)
        finally:
            codebook.trained = None
        codebook.values = values.detach()
        return found, steps

    def take_out(self, entries: list[Entry]) -> None:
        gone = {entry.request.request_id for entry in entries}
        owners = [[own for own in ids if own not in gone] for ids in self.notes["owners"]]
        kept = [n for n, ids in enumerate(owners) if ids]
        self.notes = {"labels": [self.notes["labels"][n] for n in kept], "owners": [owners[n] for n in kept]}
        for name in ("keys", "values", "radii"):
            setattr(self.attachment, name, getattr(self.attachment, name)[kept])

    def load_state(self, tensors: dict[str, torch.Tensor], manifest: dict) -> None:
        super().load_state(tensors, manifest)
        count = len(self.attachment.keys)
        if {len(own) for own in (*self.notes.values(), self.attachment.values, self.attachment.radii)} != {count}:
            raise ValueError("keys, values, radii, labels and owners are not equally many")
