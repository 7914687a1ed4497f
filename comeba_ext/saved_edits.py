"""Edits on disk: what :meth:`Editor.save_pretrained` writes and :func:`load_edits` reads.

A folder holds the manifest (JSON), ``comeba_adapter-*.safetensors`` (all that inference needs: per layer ``delta``,
factored while there are few edits, and the thresholds; with the nearest score also the projection, 256 rows or ``256·d_in``
values whatever the number of edits, and 256 values a subject), and, to go on editing, ``comeba_state-*.safetensors`` (key
memory, ledger) and ``comeba_log-*.jsonl``.
"""

from __future__ import annotations

import dataclasses
import json
import math
from contextlib import contextmanager
from pathlib import Path

import torch
from torch import nn

from comeba_ext.covariance import Covariance
from comeba_ext.covariance.key_sample import KeySample
from comeba_ext.editing.config import EditConfig, is_int, is_number
from comeba_ext.errors import StorageError
from comeba_ext.forward.architectures import Architecture
from comeba_ext.layers import hooked_linear
from comeba_ext.memory.key_memory import KeyMemory
from comeba_ext.memory.ledger import Entry, stacked
from comeba_ext.storage import check_identity, identity, read_folder, write_folder
from comeba_ext.text.request import EditRequest


def load_edits(model: nn.Module, folder: str | Path) -> nn.Module:
    """Put saved edits onto a model, to use it: no tokenizer, no key memory.

    Args:
        model: the base model the edits were made on, in any floating dtype.
        folder: written by :meth:`Editor.save_pretrained`.

    Returns:
        The same model object, edited.

    Raises:
        StorageError: truncated, foreign, or of another base model; the model is as it was.
    """
    whole = model
    manifest, (tensors,) = read_folder(folder, "adapter")
    with _complete(folder):
        model = _named_as(model, manifest)
        check_identity(manifest["model"], model, f"the folder {folder}")
        names = list(manifest["layers"])
        config = EditConfig.from_dict(manifest["config"], str(folder))
        architecture = Architecture.of(model, config.blocks, config.projection)
        _check(model, architecture, config, names, tensors)
        deltas = {name: _delta(tensors, name, folder) for name in names}
        mode = manifest.get("mode", "validated")
        if mode not in hooked_linear.MODES:
            raise ValueError(f"mode {mode!r}")
    layers = hooked_linear.install(model, names, architecture.decoder, config.scope, config.alpha, config.gate)
    with _complete(folder, model):
        for name, layer in layers.items():
            layer.delta.copy_(deltas[name])
            layer.alpha.copy_(tensors[f"{name}.alpha"])
            layer.score.restore(_of_layer(tensors, name))
            layer.mode = mode
            layer.score.refresh(layer)
    return whole


def _named_as(model: nn.Module, manifest: dict) -> nn.Module:
    """The model, or the one that PEFT has wrapped, whichever has the layers that a folder names."""
    known = dict(model.named_modules())
    inner = model.get_base_model() if hasattr(model, "get_base_model") else None
    layers = manifest.get("layers")
    missing = isinstance(layers, list) and any(name not in known for name in layers)
    return inner if missing and isinstance(inner, nn.Module) else model


@contextmanager
def _complete(folder: str | Path, hooked: nn.Module | None = None):
    """Inside, what is missing or malformed in a folder's files is a :class:`StorageError`, and ``hooked`` is unhooked."""
    try:
        yield
    except BaseException as error:
        if hooked is not None:
            hooked_linear.uninstall(hooked)
        if isinstance(error, StorageError) or not isinstance(error, _MALFORMED):
            raise
        raise StorageError(f"{folder} is incomplete or damaged: {type(error).__name__}: {error}") from None


_MALFORMED = (KeyError, IndexError, ValueError, TypeError, AttributeError, RuntimeError)  # RuntimeError: shapes


_SHARED = {field.name for field in dataclasses.fields(EditConfig)}  # settings that every method has


def save(editor, folder: str | Path, inference_only: bool) -> None:
    """Write an editor's edits; see the module docstring for the files."""
    live, settings = editor.ledger.live(), editor.config.to_dict()
    manifest = {
        "format": 1,
        "model": identity(editor.model, list(editor.layers)),
        "method": editor.method,
        "mode": editor.serving,
        "config": {key: value for key, value in settings.items() if key in _SHARED},
        "settings": {key: value for key, value in settings.items() if key not in _SHARED},
        "edits": len(live),
        "layers": list(editor.layers),
        "step": editor.step,
    }
    tensors = {"adapter": _adapter(editor, live)}
    texts = {}
    if not inference_only:
        manifest |= {"alphas": _finite(editor._alphas), "prefixes": editor._prefixes, "next_id": editor._next_id}
        manifest["ledger"] = [
            {"request": e.request.to_record(), "step": e.step, "removed": e.removed} for e in editor.ledger.entries
        ]
        if editor.covariance is not None:
            own = editor.covariance
            manifest["covariance_tokens"], manifest["corpus"] = own.tokens, {"digest": own.corpus, "texts": own.texts}
        tensors["state"] = _state(editor)
        texts["log"] = "".join(json.dumps(record) + "\n" for record in editor.log)
    write_folder(folder, manifest, tensors, texts)


def load_editor(cls, model: nn.Module, tokenizer, folder: str | Path):
    """An editor as it was when saved."""
    manifest, (adapter, state, log) = read_folder(folder, "adapter", "state", "log")
    with _complete(folder):
        check_identity(manifest["model"], model, f"the folder {folder}")
    try:
        log = [json.loads(line) for line in log.splitlines()]
    except ValueError as error:
        raise StorageError(f"{Path(folder) / manifest['files']['log']} is truncated or not JSON ({error})") from None
    made_by = manifest.get("method", "COMEBA-HK")
    if made_by != cls.method:
        raise StorageError(f"{folder} holds edits made by {made_by}, not {cls.method}; comeba_ext.methods.load finds the method")
    with _complete(folder):
        config = cls.config_class.from_dict({**manifest["config"], **manifest.get("settings", {})}, str(folder))
        architecture = Architecture.of(model, config.blocks, config.projection)
        for tensors in (adapter, state):
            _check(model, architecture, config, list(manifest["layers"]), tensors)
        covariance = _covariance(manifest, state)
        entries = _entries(manifest, state)
        saved = _progress(manifest)
        deltas = {name: state[f"{name}.delta"] for name in manifest["layers"]}
        alphas = {name: state[f"{name}.alpha"] for name in manifest["layers"]}
        tensors = {name: _memory(state, name) for name in manifest["layers"]}
        memory = {name: KeyMemory.from_tensors(parts) for name, parts in tensors.items() if parts}
        removals = [record["removed"] for record in manifest["ledger"]]
    editor = cls(model, tokenizer, config)
    with _complete(folder, model):
        for name, layer in editor.layers.items():
            editor._delta[name].copy_(deltas[name])
            layer.delta.copy_(deltas[name])
            layer.alpha.copy_(alphas[name])
            layer.score.restore(_of_layer(adapter, name))
        editor.key_memory = {name: m.to(editor.layers[name].delta.device) for name, m in memory.items()}
        editor.covariance = covariance
        if covariance is not None:
            editor.recognition.learn()
        for entry in entries:
            editor.ledger.add(entry)
        for entry, removed in zip(entries, removals, strict=True):
            if removed is not None:
                editor.ledger.remove(entry, removed)
    editor.step, editor._alphas, editor._prefixes, editor._next_id = saved
    editor.log = log
    return editor


def _progress(manifest: dict) -> tuple[int, list[dict[str, float]], list[str] | None, int]:
    """Step, every step's thresholds, context prefixes, the next id's number.

    Raises:
        ValueError: one of them is not what this package saves.
    """
    names = set(manifest["layers"])
    step, alphas, prefixes, next_id = (manifest[key] for key in ("step", "alphas", "prefixes", "next_id"))
    fits = {
        "step": is_int(step) and step >= 0,
        "alphas": isinstance(alphas, list)
        and len(alphas) == step + 1
        and all(isinstance(table, dict) and set(table) == names and all(map(_threshold, table.values())) for table in alphas),
        "prefixes": prefixes is None or (isinstance(prefixes, list) and all(isinstance(text, str) for text in prefixes)),
        "next_id": is_int(next_id) and next_id >= 0,
        "ledger": all(
            is_int(record["step"]) and (record["removed"] is None or is_int(record["removed"])) for record in manifest["ledger"]
        ),
    }
    for name, good in fits.items():
        if not good:
            raise ValueError(f"{name} is malformed")
    return step, _with_infinity(alphas), prefixes, next_id


def _threshold(value) -> bool:
    return value is None or is_number(value)


# What a layer's tensors must be like, by the ends of their names; n is any number. Thresholds may be infinite where nothing
# is in scope.
_SHAPES = {
    "delta": ("d_out", "d_in"), "left": ("d_out", "n"), "right": ("n", "d_in"), "alpha": (), "reference_scale": (),
    "projection": ("rows", "d_in"), "anchors": ("keys", "rows"), "thresholds": ("keys",), "moment": ("d_in", "d_in"),
    "keys": ("any", "entries"), "responses": ("other", "entries"), "directions": ("units", "rows"), "direction_thresholds": ("units",),
}  # fmt: skip
_MAY_BE_INFINITE = ("alpha", "thresholds", "direction_thresholds")


def _check(model: nn.Module, architecture: Architecture, config: EditConfig, names: list[str], tensors: dict) -> None:
    """Everything a layer is going to hold, before the first one is touched: shapes, dtypes, finite numbers.

    Raises:
        ValueError: something is not what this package saves for this model.
    """
    wanted = [architecture.projection_name(index) for index in config.layers]
    if names != wanted:
        raise ValueError(f"layers {names}, but the settings name {wanted}")
    for name in names:
        d_in, d_out = hooked_linear.shape_of(model.get_submodule(name))
        sizes = {"d_in": d_in, "d_out": d_out}
        for end, wants in _SHAPES.items():
            tensor = tensors.get(f"{name}.{end}")
            if tensor is None:
                continue
            if not tensor.is_floating_point():
                raise ValueError(f"{name}.{end} is {tensor.dtype}")
            if tensor.dim() != len(wants) or any(sizes.setdefault(what, size) != size for what, size in zip(wants, tensor.shape, strict=True)):
                known = ", ".join(str(sizes.get(what, what)) for what in wants)
                raise ValueError(f"{name}.{end} is {tuple(tensor.shape)}, expected ({known})")
            bad = torch.isnan(tensor) if end in _MAY_BE_INFINITE else ~torch.isfinite(tensor)
            if bad.any():
                raise ValueError(f"{name}.{end} has NaN or infinite entries")


def _adapter(editor, live: list[Entry]) -> dict[str, torch.Tensor]:
    tensors = {}
    for name, layer in editor.layers.items():
        delta = editor._delta[name]
        d_out, d_in = delta.shape
        small = live and sum(len(entry.keys[name]) for entry in live) * (d_out + d_in) < d_out * d_in
        factors = editor._factors(name, live) if small else None
        if factors is not None:
            left, right = (factor.to(delta.dtype) for factor in factors)  # (d_out, n), (n, d_in)
            tensors |= {f"{name}.left": left, f"{name}.right": right}
        elif live:
            tensors[f"{name}.delta"] = delta
        tensors[f"{name}.alpha"] = layer.alpha
        tensors |= {f"{name}.{what}": tensor for what, tensor in layer.score.tensors().items()}
    return tensors


def _of_layer(tensors: dict[str, torch.Tensor], name: str) -> dict[str, torch.Tensor]:
    """A layer's tensors by their own names."""
    return {key[len(name) + 1 :]: tensor for key, tensor in tensors.items() if key.startswith(f"{name}.")}


def _delta(tensors: dict[str, torch.Tensor], name: str, folder) -> torch.Tensor:
    if f"{name}.alpha" not in tensors:
        raise StorageError(f"{folder} is incomplete: no tensors of layer {name}")
    if f"{name}.delta" in tensors:
        return tensors[f"{name}.delta"]
    if f"{name}.left" in tensors:
        return tensors[f"{name}.left"] @ tensors[f"{name}.right"]
    return torch.zeros(())  # saved before the first edit


def _state(editor) -> dict[str, torch.Tensor]:
    tensors = {}
    for name, layer in editor.layers.items():
        tensors[f"{name}.delta"] = editor._delta[name]
        tensors[f"{name}.alpha"] = layer.alpha
        if name in editor.key_memory:
            tensors |= {f"{name}.memory.{part}": t for part, t in editor.key_memory[name].tensors().items()}
        if editor.covariance is not None:
            tensors[f"{name}.moment"] = editor.covariance.moments[name]
        if editor.ledger.entries:
            tensors[f"{name}.keys"], tensors[f"{name}.responses"] = stacked(editor.ledger.entries, name)
            tensors[f"{name}.key_counts"] = torch.tensor([len(entry.keys[name]) for entry in editor.ledger.entries])
            marks = [entry.anchors.get(name) for entry in editor.ledger.entries]
            if any(own is not None for own in marks):
                tensors[f"{name}.directions"] = torch.cat([own[0] for own in marks])
                tensors[f"{name}.direction_thresholds"] = torch.cat([own[1] for own in marks])
                tensors[f"{name}.direction_counts"] = torch.tensor([len(own[1]) for own in marks])
    if editor.covariance is not None:
        tensors |= editor.covariance.sample.tensors()
    return tensors


def _memory(state: dict[str, torch.Tensor], name: str) -> dict[str, torch.Tensor]:
    """The tensors of a layer's key memory; none when it was saved before there was a covariance."""
    prefix = f"{name}.memory."
    return {key[len(prefix) :]: tensor for key, tensor in state.items() if key.startswith(prefix)}


def _covariance(manifest: dict, state: dict[str, torch.Tensor]) -> Covariance | None:
    tokens = manifest.get("covariance_tokens")
    if tokens is None:
        return None
    moments = {name: state[f"{name}.moment"] for name in manifest["layers"]}
    sample = KeySample.from_tensors(dict(state))
    corpus = manifest.get("corpus", {"digest": "", "texts": 0})
    return Covariance(moments, tokens, manifest["model"], corpus["texts"], tokens, sample=sample, corpus=corpus["digest"])


def _entries(manifest: dict, state: dict[str, torch.Tensor]) -> list[Entry]:
    entries = []
    marks = {name: _marks(state, name) for name in manifest["layers"] if f"{name}.directions" in state}
    written = {name: _written(state, name) for name in manifest["layers"]} if manifest["ledger"] else {}
    for n, saved in enumerate(manifest["ledger"]):
        keys, responses = ({name: own[part][n] for name, own in written.items()} for part in (0, 1))
        anchors = {name: own[n] for name, own in marks.items()}
        entries.append(Entry(EditRequest.from_record(saved["request"]), saved["step"], keys, responses, anchors=anchors))
    return entries


def _written(state: dict[str, torch.Tensor], name: str) -> tuple[list[torch.Tensor], list[torch.Tensor]]:
    """Every entry's keys and responses in a layer."""
    keys, responses = state[f"{name}.keys"].mT, state[f"{name}.responses"].mT
    counts = state[f"{name}.key_counts"].tolist() if f"{name}.key_counts" in state else [1] * len(keys)  # one a request, before
    return tuple([part.clone() for part in both.split(counts)] for both in (keys, responses))


def _marks(state: dict[str, torch.Tensor], name: str) -> list[tuple[torch.Tensor, torch.Tensor]]:
    """Every entry's anchors in a layer."""
    counts = state[f"{name}.direction_counts"].tolist()
    parts = (state[f"{name}.{what}"].split(counts) for what in ("directions", "direction_thresholds"))
    return [(unit.clone(), thresholds.clone()) for unit, thresholds in zip(*parts, strict=True)]


def _finite(alphas: list[dict[str, float]]) -> list[dict[str, float | None]]:
    """JSON has no infinity, which is where the reference score's thresholds start: null."""
    return [{name: None if math.isinf(a) else a for name, a in table.items()} for table in alphas]


def _with_infinity(alphas: list[dict[str, float | None]]) -> list[dict[str, float]]:
    return [{name: math.inf if a is None else a for name, a in table.items()} for table in alphas]
