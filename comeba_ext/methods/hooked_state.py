"""The state of methods with hooked projections as tensors: what a saved folder holds of them, checked before it is used.

The adapter has ``delta`` (as its factors ``left`` and ``right`` while there are few edits), ``alpha``, and what the score keeps. The
state has ``delta`` in full, the key memory, the covariance, and every entry's keys, responses and directions. Where every subject's edits
are kept apart there is no ``delta`` and no key memory beyond ``λ·C0``; the adapter has the shards, the state which entry is in which.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import TYPE_CHECKING

import torch
from torch import nn

from comeba_ext.covariance import Covariance
from comeba_ext.covariance.key_sample import KeySample
from comeba_ext.editing.config import is_number
from comeba_ext.editing.subject_shards import SubjectShards
from comeba_ext.layers.hooked_linear import shape_of
from comeba_ext.memory.key_memory import KeyMemory
from comeba_ext.memory.ledger import Entry, stacked
from comeba_ext.methods.base import of_layer
from comeba_ext.text.request import EditRequest

if TYPE_CHECKING:
    from comeba_ext.methods.comeba_hk import ComebaHK

# What a layer's tensors must be like, by the ends of their names; n is any number. Thresholds may be infinite where nothing
# is in scope.
_SHAPES = {
    "delta": ("d_out", "d_in"),
    "left": ("d_out", "n"),
    "right": ("n", "d_in"),
    "alpha": (),
    "reference_scale": (),
    "projection": ("rows", "d_in"),
    "anchors": ("keys", "rows"),
    "thresholds": ("keys",),
    "named_thresholds": ("keys",),
    "shard_left": ("factors", "d_out"),
    "shard_right": ("factors", "d_in"),
    "moment": ("d_in", "d_in"),
    "keys": ("any", "entries"),
    "responses": ("other", "entries"),
    "directions": ("units", "rows"),
    "direction_thresholds": ("units",),
    "named_direction_thresholds": ("units",),
}
_MAY_BE_INFINITE = ("alpha", "thresholds", "named_thresholds", "direction_thresholds", "named_direction_thresholds")


def check(model: nn.Module, wanted: list[str], names: list[str], tensors: dict, beside: Sequence[str] = ()) -> None:
    """Everything a layer is going to hold, before the first one is touched: shapes, dtypes, finite numbers.

    Args:
        wanted: the layers that the settings name, and
        names: those that the folder does; and
        beside: what else it must name, behind them, that checks what it restores.

    Raises:
        ValueError: something is not what this package saves for this model.
    """
    if names != [*wanted, *beside]:
        raise ValueError(f"layers {names}, but the settings name {[*wanted, *beside]}")
    for name in wanted:
        d_in, d_out = shape_of(model.get_submodule(name))
        sizes = {"d_in": d_in, "d_out": d_out}
        if f"{name}.alpha" not in tensors:
            raise ValueError(f"no tensors of layer {name}")
        for end, wants in _SHAPES.items():
            tensor = tensors.get(f"{name}.{end}")
            if tensor is None:
                continue
            if not tensor.is_floating_point():
                raise ValueError(f"{name}.{end} is {tensor.dtype}")
            if tensor.dim() != len(wants) or any(
                sizes.setdefault(what, size) != size for what, size in zip(wants, tensor.shape, strict=True)
            ):
                known = ", ".join(str(sizes.get(what, what)) for what in wants)
                raise ValueError(f"{name}.{end} is {tuple(tensor.shape)}, expected ({known})")
            bad = torch.isnan(tensor) if end in _MAY_BE_INFINITE else ~torch.isfinite(tensor)
            if bad.any():
                raise ValueError(f"{name}.{end} has NaN or infinite entries")


def adapter(method: ComebaHK) -> dict[str, torch.Tensor]:
    """All that inference needs."""
    tensors, live = {}, method.session.ledger.live()
    for name, layer in method.layers.items():
        own = layer.tensors()
        del own["delta"]
        delta = method.masters[name]
        d_out, d_in = delta.shape
        small = (
            live
            and not method.recognition.compares
            and sum(len(entry.keys.get(name, ())) for entry in live) * (d_out + d_in) < d_out * d_in
        )
        if small:
            own["left"], own["right"] = (factor.to(delta.dtype) for factor in method.factors(name, live))  # (d_out, n), (n, d_in)
        elif live and not method.recognition.compares:
            own["delta"] = delta
        tensors |= {f"{name}.{what}": tensor for what, tensor in own.items()}
    for name in method.attachments.keys() - method.layers.keys():  # beside them
        tensors |= {f"{name}.{what}": tensor for what, tensor in method.attachments[name].tensors().items()}
    return tensors


def state(method: ComebaHK) -> tuple[dict[str, torch.Tensor], dict]:
    """What is needed beside the adapter to go on editing."""
    tensors, covariance, entries = {}, method.covariance, method.session.ledger.entries
    for name, layer in method.layers.items():
        tensors[f"{name}.alpha"] = layer.alpha
        if method.recognition.compares:  # the memory is λ·C0, whatever was edited
            shards = method.recognition.shards[name].of_requests()
            numbers = [shards.get(entry.request.request_id, -1) if entry.removed is None else -1 for entry in entries]
            tensors[f"{name}.entry_shards"] = torch.tensor(numbers, dtype=torch.int64)
        else:
            tensors[f"{name}.delta"] = method.masters[name]
        if name in method.key_memory and not method.recognition.compares:
            tensors |= {f"{name}.memory.{part}": t for part, t in method.key_memory[name].tensors().items()}
        if covariance is not None:
            tensors[f"{name}.moment"] = covariance.moments[name]
        if entries and name in entries[0].keys:
            tensors[f"{name}.keys"], tensors[f"{name}.responses"] = stacked(entries, name)
            tensors[f"{name}.key_counts"] = torch.tensor([len(entry.keys[name]) for entry in entries])
            marks = [entry.anchors.get(name) for entry in entries]
            if any(own is not None for own in marks):
                tensors[f"{name}.directions"] = torch.cat([own[0] for own in marks])
                tensors[f"{name}.direction_thresholds"] = torch.cat([own[1] for own in marks])
                tensors[f"{name}.named_direction_thresholds"] = torch.cat([own[2] for own in marks])
                tensors[f"{name}.direction_counts"] = torch.tensor([len(own[1]) for own in marks])
    manifest: dict = {"alphas": _finite(method.alphas)}
    if covariance is not None:
        tensors |= covariance.sample.tensors()
        manifest |= {"covariance_tokens": covariance.tokens, "corpus": {"digest": covariance.corpus, "texts": covariance.texts}}
    return tensors, manifest


def load(method: ComebaHK, tensors: dict[str, torch.Tensor], manifest: dict) -> None:
    """The state back into a method whose layers hold their adapter.

    Raises:
        KeyError, ValueError, …: something is missing or malformed.
    """
    alphas = manifest["alphas"]
    good = isinstance(alphas, list) and len(alphas) == manifest["step"] + 1
    if not good or not all(isinstance(t, dict) and set(t) == set(method.layers) and all(map(_threshold, t.values())) for t in alphas):
        raise ValueError("alphas is malformed")
    covariance = _covariance(manifest, tensors, list(method.layers))
    memory = {}
    for name, layer in method.layers.items():
        layer.alpha.copy_(tensors[f"{name}.alpha"])
        parts = of_layer(tensors, f"{name}.memory")
        if parts and not method.recognition.compares:  # none when it was saved before there was a covariance
            memory[name] = KeyMemory.from_tensors(parts).to(layer.delta.device)
        delta = torch.zeros_like(layer.delta) if method.recognition.compares else tensors[f"{name}.delta"]
        method.masters[name].copy_(delta)
        layer.delta.copy_(delta)
    method.alphas, method.key_memory, method.covariance = _with_infinity(alphas), memory, covariance
    if covariance is not None:
        method.recognition.learn()
    if method.recognition.compares and method.session.ledger.entries:
        _load_shards(method, tensors)


def _load_shards(method: ComebaHK, tensors: dict[str, torch.Tensor]) -> None:
    """Which edit is in which shard; found anew where the folder is of a version that had one ``delta`` for all."""
    entries, names = method.session.ledger.entries, list(method.layers)
    if any(f"{name}.entry_shards" not in tensors for name in names):
        method.recognition.compare_with(method.session.ledger.live())
        return
    for name, layer in method.layers.items():
        numbers = tensors[f"{name}.entry_shards"].tolist()
        if len(numbers) != len(entries) or any(n >= len(layer.shards) for n in numbers):
            raise ValueError(f"{name}.entry_shards is malformed")
        live = [(entry, n) for entry, n in zip(entries, numbers, strict=True) if entry.removed is None]
        members = method.recognition.members(name, [entry for entry, _ in live])
        method.recognition.shards[name] = SubjectShards.loaded(layer, members, [n for _, n in live])


def entries(requests: list[tuple[EditRequest, int]], tensors: dict[str, torch.Tensor], names: list[str]) -> list[Entry]:
    """The ledger's entries with their keys, responses and directions."""
    found = []
    marks = {name: _marks(tensors, name) for name in names if f"{name}.directions" in tensors}
    written = {name: _written(tensors, name) for name in names} if requests else {}
    for n, (request, step) in enumerate(requests):
        keys, responses = ({name: own[part][n] for name, own in written.items()} for part in (0, 1))
        found.append(Entry(request, step, keys, responses, anchors={name: own[n] for name, own in marks.items()}))
    return found


def _threshold(value) -> bool:
    return value is None or is_number(value)


def _covariance(manifest: dict, tensors: dict[str, torch.Tensor], names: list[str]) -> Covariance | None:
    tokens = manifest.get("covariance_tokens")
    if tokens is None:
        return None
    moments = {name: tensors[f"{name}.moment"] for name in names}
    corpus = manifest.get("corpus", {"digest": "", "texts": 0})
    sample = KeySample.from_tensors(dict(tensors))
    return Covariance(moments, tokens, manifest["model"], corpus["texts"], tokens, sample=sample, corpus=corpus["digest"])


def _written(tensors: dict[str, torch.Tensor], name: str) -> tuple[list[torch.Tensor], list[torch.Tensor]]:
    """Every entry's keys and responses in a layer."""
    keys, responses = tensors[f"{name}.keys"].mT, tensors[f"{name}.responses"].mT
    counts = tensors[f"{name}.key_counts"].tolist() if f"{name}.key_counts" in tensors else [1] * len(keys)  # one a request, before
    return tuple([part.clone() for part in both.split(counts)] for both in (keys, responses))


def _marks(tensors: dict[str, torch.Tensor], name: str) -> list[tuple[torch.Tensor, torch.Tensor, torch.Tensor]]:
    """Every entry's anchors in a layer."""
    counts = tensors[f"{name}.direction_counts"].tolist()
    thresholds = tensors[f"{name}.direction_thresholds"]
    named = tensors.get(f"{name}.named_direction_thresholds", thresholds)  # a version before made no difference
    parts = (own.split(counts) for own in (tensors[f"{name}.directions"], thresholds, named))
    return [tuple(part.clone() for part in own) for own in zip(*parts, strict=True)]


def _finite(alphas: list[dict[str, float]]) -> list[dict[str, float | None]]:
    """JSON has no infinity, which is where the reference score's thresholds start: null."""
    return [{name: None if math.isinf(a) else a for name, a in table.items()} for table in alphas]


def _with_infinity(alphas: list[dict[str, float | None]]) -> list[dict[str, float]]:
    return [{name: math.inf if a is None else a for name, a in table.items()} for table in alphas]
