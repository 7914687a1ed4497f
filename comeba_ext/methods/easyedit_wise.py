"""What EasyEdit's WISE saved, put onto the model that it edited: to measure what EasyEdit serves.

    read_wise("wise.pt").onto(model)                  # comeba eval wise.pt records.json --base model

Such a file (``save_path`` in its hparams) is a pickle. It is read with torch's ``weights_only``, and the two classes of EasyEdit's that
are named in it are empty ones of our own meanwhile: nothing in the file is run, and EasyEdit need not be there. What the numbers in it
mean, EasyEdit's layer says (``easyeditor/models/wise/WISE.py``); its rule, which is written anew here, is not the one of our own WISE
(:mod:`comeba_ext.methods.wise`).
"""

from __future__ import annotations

import pickle
import re
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path

import torch
from torch import nn
from torch.nn import functional as F
from transformers.activations import ACT2FN

from comeba_ext.editing.config import is_int, is_number
from comeba_ext.errors import ArchitectureError, StorageError
from comeba_ext.forward.architectures import Architecture
from comeba_ext.layers.attachment import Attachment, attach, refuse_edited
from comeba_ext.layers.hooked_linear import device_of, shape_of, turned
from comeba_ext.methods.side_memory import mean_over_tokens

LONG = 100  # tokens: of a longer sequence the greatest distance counts, not the mean
ROUNDING = 2.0**-8  # of a weight that was stored in half precision, relative to its norm


def _stand_in(module: str, name: str) -> type:
    """An empty class that torch takes for EasyEdit's: what is unpickled as one has attributes and does nothing."""
    return type(name, (), {"__module__": f"easyeditor.models.wise.{module}"})


_CONFIG, _ACTIVATION = _stand_in("wise_hparams", "WISEHyperParams"), _stand_in("utils", "EditingMeanAct")


class EasyEditWise(Attachment):
    """A layer as EasyEdit's ``WISEAdapter`` answers: every sequence goes through one of several weights.

    The distance of a weight's output from the base layer's is ``‖a(W x) − a(W₀ x)‖``, a the model's activation function, in the mean over
    the sequence's tokens in this pass (of more than ``LONG`` the greatest). What is decoded behind a cache is a pass of its own, so each
    of its tokens is sent by itself.

    * With memories (``retrieve``): the side weight, if its distance reaches its limit, else the base layer; then every memory in turn
      that is farther than the farthest so far and than its own limit.
    * With a merged weight: the base layer, if both that and the side weight stay below the limit; else whichever of the two is farther.

    Args:
        base: the layer.
        side: the weight that the latest edits are in, laid out as the base's.
        memories, merged: others; one of the two is there.
        limits: of the side weight, then of every memory.
        activation: a.
    """

    def __init__(
        self, base: nn.Module, side: torch.Tensor, memories: list, merged: torch.Tensor | None, limits: list[float], activation: Callable
    ):
        super().__init__(base)
        self.transposed, self.limits, self.activation = turned(base), limits, activation
        kind = {"device": device_of(base), "dtype": base.weight.dtype}
        self.register_buffer("side", side.to(**kind))
        stacked = torch.stack(memories) if memories else side.new_zeros(0, *side.shape)
        self.register_buffer("memories", stacked.to(**kind))
        self.register_buffer("merged", None if merged is None else merged.to(**kind))

    @property
    def reads_sequence(self) -> bool:
        return self.mode != "off"

    def forward(self, x: torch.Tensor, *args, **kwargs) -> torch.Tensor:
        output = self.base_layer(x, *args, **kwargs)
        if self.mode == "off":
            return output
        self.refuse_recomputing("where a sequence is sent")
        rows, mask = self.as_sequences(x, None, True)
        plain = output.reshape(*rows.shape[:-1], output.shape[-1])
        # The side weight and the memories are used without the layer's bias, except in GPT-2's layers.
        side = self._through(rows, self.side, self.bias if self.transposed else None)
        far = self._distance(side, plain, mask)
        if self.merged is not None:
            merged = self._through(rows, self.merged, self.bias)
            other = self._distance(merged, plain, mask)
            chosen = _where(other > far, merged, side)
            chosen = _where((other < self.limits[0]) & (far < self.limits[0]), plain, chosen)
            return chosen.reshape(output.shape)
        chosen = _where(far < self.limits[0], plain, side)
        for memory, limit in zip(self.memories, self.limits[1:], strict=True):
            found = self._through(rows, memory, None)
            distance = self._distance(found, plain, mask)
            better = (distance > far) & (distance > limit)
            chosen, far = _where(better, found, chosen), torch.where(better, distance, far)
        return chosen.reshape(output.shape)

    def _through(self, x: torch.Tensor, weight: torch.Tensor, bias: torch.Tensor | None) -> torch.Tensor:
        return F.linear(x, weight.T if self.transposed else weight, bias)

    def _distance(self, output: torch.Tensor, plain: torch.Tensor, mask: torch.Tensor | None) -> torch.Tensor:
        """``(batch,)`` for outputs ``(batch, seq, d_out)``."""
        apart = (self.activation(output) - self.activation(plain)).norm(dim=-1).float()
        real = torch.ones_like(apart, dtype=torch.bool) if mask is None else mask
        return torch.where(real.sum(1) > LONG, apart.masked_fill(~real, 0).amax(1), mean_over_tokens(apart, mask))


def _where(which: torch.Tensor, these: torch.Tensor, others: torch.Tensor) -> torch.Tensor:
    """Of sequences ``(batch, seq, d)``, by ``(batch,)``."""
    return torch.where(which[:, None, None], these, others)


@dataclass(frozen=True)
class SavedWise:
    """A file that was read; weights in it are laid out as the edited layer's own.

    Attributes:
        layer: its name in the model.
        original, side, main: its weight before, the one that the latest edits are in, and what merges were written to.
        memories: weights put aside.
        limits: what a distance must reach, of the side weight and then of every memory.
        biased: whether the edited output has the layer's bias.
        edits: how many were made.
        settings: hparams.
    """

    path: str
    layer: str
    original: torch.Tensor = field(repr=False)
    side: torch.Tensor = field(repr=False)
    main: torch.Tensor = field(repr=False)
    memories: list[torch.Tensor] = field(repr=False)
    limits: list[float]
    biased: bool
    edits: int
    settings: dict = field(repr=False)

    def onto(self, model: nn.Module) -> nn.Module:
        """Put it onto its base model, to use it (``attachment.disabled`` switches it off, ``attachment.detach`` takes it out).

        Returns:
            The same model object, edited.

        Raises:
            StorageError: it was not made on this model, or EasyEdit itself could not use it; the model is as it was.
            ArchitectureError: the model is edited already, or none that can be edited.
        """
        refuse_edited(model)
        decoder = Architecture.of(model).decoder
        base = self._layer_of(model, decoder)
        if self.settings["retrieve"]:
            side, memories, merged = self.side, self.memories, None
        else:
            (side, merged), memories = self._settled(), []
        edited = EasyEditWise(base, side, memories, merged, self.limits, self._activation(model))
        attach(model, {self.layer: edited}, decoder)
        return model

    def _layer_of(self, model: nn.Module, decoder: str) -> nn.Module:
        """The layer that was edited, if it is as it was before."""
        try:
            base = model.get_submodule(self.layer)
            shape_of(base)
        except (AttributeError, ArchitectureError):
            base = None
        if base is None or not self.layer.startswith(f"{decoder}."):
            raise StorageError(f"{self.path} was not made on this model, which has no linear layer {self.layer!r} in its blocks")
        weight = getattr(base, "weight", None)
        if not isinstance(weight, torch.Tensor) or not weight.is_floating_point() or weight.is_meta:
            raise StorageError(f"{self.path}: {self.layer} must be in memory and not quantised, to be compared with the file")
        shapes = {tuple(own.shape) for own in (self.original, self.side, self.main, *self.memories)}
        if shapes != {tuple(weight.shape)}:
            raise StorageError(
                f"{self.path} was not made on this model: {self.layer} is {tuple(weight.shape)}, in the file {sorted(shapes)}"
            )
        if not all(torch.isfinite(own).all() for own in (self.original, self.side, self.main, *self.memories)):
            raise StorageError(f"{self.path}: a weight has NaN or infinite entries")
        own, there = weight.detach().float().cpu(), self.original.float()
        if (own - there).norm() > ROUNDING * own.norm():
            raise StorageError(f"{self.path} was not made on this model: the weight of {self.layer} was another one before it was edited")
        transposed = turned(base)
        if transposed != self.biased or (transposed and self.memories and self.settings["retrieve"]):
            raise StorageError(f"{self.path}: EasyEdit itself fails on such weights beside a {type(base).__name__}, as {self.layer} is")
        return base

    def _settled(self) -> tuple[torch.Tensor, torch.Tensor]:
        """Side and merged weight: EasyEdit merges what is not merged yet when its model is first called."""
        every = self.settings["save_freq"]
        if not is_int(every):
            raise StorageError(f"{self.path}: save_freq {every!r} is no number, and EasyEdit's merge needs one")
        shards = [*self.memories, *([] if self.side.equal(self.original) else [self.side])]
        if self.edits < every or not shards:
            return self.side, self.main
        density, how = self.settings["densities"], self.settings["merge_alg"]
        if how != "ties" or not is_number(density) or int(min(density, 1) * self.original.numel()) < 1:
            raise StorageError(
                f"{self.path} holds edits that EasyEdit merges when it is first used, and of its merges only 'ties' is done here "
                f"(merge_alg {how!r}, densities {density!r}): use it once there, and save it then"
            )
        shares = [1 / len(shards)] * len(shards)
        if not self.main.equal(self.original):  # merged into before
            shards, shares = [*shards, self.main], [*(0.4 * share for share in shares), 0.6]
        return self.original, ties_of(self.original, shards, shares, density)

    def _activation(self, model: nn.Module) -> Callable:
        named = (getattr(model.config, name, None) for name in ("hidden_act", "activation_function"))
        name = next(filter(None, named), self.settings["hidden_act"])
        if not isinstance(name, str) or name not in ACT2FN:
            raise StorageError(f"{self.path}: neither the model's config nor the file names an activation function ({name!r})")
        return ACT2FN[name]


def ties_of(original: torch.Tensor, weights: list[torch.Tensor], shares: list[float], density: float) -> torch.Tensor:
    """TIES merging (arXiv 2306.01708) of weights that were ``original``, float32: of each change the share ``density`` of its largest
    entries; in every entry the sign that has more, by ``shares``, and the mean of those of that sign, likewise."""
    changes = [weight.float() - original.float() for weight in weights]
    for change in changes if density < 1 else ():
        small = change.abs().flatten().topk(change.numel() - int(density * change.numel()), largest=False).indices
        change.view(-1)[small] = 0
    positive = sum(share * change for share, change in zip(shares, changes, strict=True)) >= 0
    total, count = torch.zeros_like(changes[0]), torch.zeros_like(changes[0])
    for share, change in zip(shares, changes, strict=True):
        agrees = (change != 0) & ((change > 0) == positive)
        total += share * change * agrees
        count += share * agrees
    return original.float() + total / torch.where(count == 0, 1, count)


def read_wise(path: str | Path) -> SavedWise:
    """Read what EasyEdit's ``WISE.save`` wrote; nothing in it is run.

    Raises:
        StorageError: it is missing, damaged, something else, or asks for other classes or functions than EasyEdit's WISE does.
    """
    saved = _unpickled(path)
    foreign = f"{path} is not what EasyEdit's WISE saves"
    if not isinstance(saved, dict):
        raise StorageError(f"{foreign}: it holds a {type(saved).__name__}")

    def take(values: dict, name: str, good: Callable[[object], bool]):
        if name not in values:
            raise StorageError(f"{foreign}: {name} is missing")
        if not good(values[name]):
            raise StorageError(f"{foreign}: {name} is malformed")
        return values[name]

    state, info = (take(saved, name, lambda value: isinstance(value, dict)) for name in ("adapter_state_dict", "additional_info"))
    config = vars(take(saved, "config", lambda value: isinstance(value, _CONFIG)))
    (name, *_) = take(config, "inner_params", lambda value: isinstance(value, list) and value and isinstance(value[0], str))
    share = take(config, "act_ratio", is_number)
    retrieve = take(config, "retrieve", lambda value: isinstance(value, bool))
    memories = take(info, "memory_weight", lambda value: isinstance(value, list) and all(map(_is_weight, value)))
    every = [take(info, "editing_mean_act", _is_limit)]
    if retrieve:
        every += take(
            info, "memory_mean_act", lambda value: isinstance(value, list) and len(value) == len(memories) and all(map(_is_limit, value))
        )
    return SavedWise(
        str(path),
        re.sub(r"\[(\d+)\]", r".\1", re.sub(r"\.(weight|bias)$", "", name)),
        *(take(state, own, _is_weight).detach() for own in ("original_layer.weight", "new_weight", "layer.weight")),
        memories=[memory.detach() for memory in memories],
        limits=[own.min_a * share for own in every],
        biased="bias" in state,
        edits=take(info, "editing_total_cnt", is_int),
        settings={"retrieve": retrieve} | {own: config.get(own) for own in ("save_freq", "merge_alg", "densities", "hidden_act")},
    )


def _is_weight(value: object) -> bool:
    plain = isinstance(value, torch.Tensor) and value.layout == torch.strided and value.device.type == "cpu"
    return plain and value.is_floating_point() and value.dim() == 2


def _is_limit(value: object) -> bool:
    return isinstance(value, _ACTIVATION) and is_number(vars(value).get("min_a"))


def _unpickled(path: str | Path) -> object:
    if not Path(path).is_file():
        raise StorageError(f"{path}: no such file")
    try:
        with torch.serialization.safe_globals([_CONFIG, _ACTIVATION]):
            return torch.load(path, map_location="cpu", weights_only=True)
    except pickle.UnpicklingError as error:
        # What else torch says is how to run the file all the same.
        asked = re.search(r"GLOBAL ([\w.]+)", str(error))
        why = f"it asks for {asked[1]}" if asked else "it is no such pickle"
        raise StorageError(f"{path} is not what EasyEdit's WISE saves: {why}, and nothing was run") from None
    except Exception as error:  # what a damaged file makes its reader raise is of no particular kind
        cause = (str(error).strip() or type(error).__name__).splitlines()[0]
        raise StorageError(f"{path} is truncated, or not what EasyEdit's WISE saves: {cause}") from None
