"""Edits on disk: what :meth:`Editor.save_pretrained` writes and :func:`load_edits` reads.

A folder holds the manifest (JSON), a model card (``README.md``), ``comeba_adapter-*.safetensors`` (all that inference needs; with
COMEBA-HK per layer ``delta``, factored while there are few edits, and the thresholds; with the nearest score also the projection, 256
rows or ``256·d_in`` values whatever the number of edits, and 256 values a subject), and, to go on editing,
``comeba_state-*.safetensors`` (what else the method knows, and the ledger) and ``comeba_log-*.jsonl``.
"""

from __future__ import annotations

import dataclasses
import json
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import nn

from comeba_ext.editing.config import EditConfig, is_int
from comeba_ext.editing.session import Session
from comeba_ext.errors import ConfigError, StorageError
from comeba_ext.forward.architectures import Architecture
from comeba_ext.hub import local_folder
from comeba_ext.layers.attachment import Attachment, detach, refuse_edited
from comeba_ext.layers.prompts import give_tokenizer
from comeba_ext.methods import Method, method_named
from comeba_ext.methods.base import of_layer
from comeba_ext.model_card import card, write_card
from comeba_ext.named_edits import EditSet, loading
from comeba_ext.storage import FORMATS, alone, check_identity, identity, read_folder, write_folder
from comeba_ext.text.request import EditRequest

_SHARED = {field.name for field in dataclasses.fields(EditConfig)}  # settings that every method has


def load_edits(
    model: nn.Module,
    folder: str | Path,
    name: str | None = None,
    *,
    tokenizer=None,
    revision: str | None = None,
    token: str | bool | None = None,
) -> nn.Module:
    """Put saved edits onto a model, to use it: no key memory, and a tokenizer only where edits stand in the prompt.

    Args:
        model: the base model the edits were made on, in any floating dtype.
        folder: written by :meth:`Editor.save_pretrained`; or, where there is no such folder, its name on the hub (``"user/name"``).
        name: of these edits among others on the same model (:mod:`comeba_ext.named_edits`); they are on, and those loaded before wait
            until :func:`~comeba_ext.named_edits.set_edits` puts them on. ``None``: the only ones, to stay.
        tokenizer: the model's, with which ``model.generate`` puts edits of in-context methods and SERAC into the prompts it is given;
            no other method needs it.
        revision, token: of the hub (:func:`~comeba_ext.hub.local_folder`).

    Returns:
        The same model object, edited.

    Raises:
        StorageError: not there, truncated, foreign, of another base model, or made by a method that is not known here; the model is
            as it was.
        ArchitectureError: the model is edited already, and with ``name``, not by sets that have one.
        ComebaError: the name is taken.
    """
    folder = local_folder(folder, "adapter", revision=revision, token=token)
    manifest, (adapter,) = read_folder(folder, "adapter")
    with _complete(folder):
        inner = _named_as(model, manifest)
    if name is not None:
        with loading(inner, name) as add:
            kind, config, architecture = _checked(inner, manifest, folder, adapter)
            with _complete(folder):
                add(EditSet(name, str(folder), manifest["edits"], kind, config, architecture, adapter, _facts(manifest), tokenizer))
        return model
    refuse_edited(inner)
    kind, config, architecture = _checked(inner, manifest, folder, adapter)
    with _complete(folder):
        attachments = kind.attach(inner, config, architecture)
    with _complete(folder, inner):
        _restore(attachments, adapter)
    give_tokenizer(attachments, tokenizer)
    return model


def save(session: Session, method: Method, folder: str | Path, log: list[dict], next_id: int | None) -> None:
    """Write edits; see the module docstring for the files.

    Args:
        next_id: the next id's number; ``None``: what inference needs, and no more.
    """
    live, settings = session.ledger.live(), session.config.to_dict()
    wrapped = [name for name, attachment in method.attachments.items() if hasattr(attachment, "base_layer")]
    manifest = {
        "model": identity(session.model, wrapped),
        "method": method.name,
        "config": {key: value for key, value in settings.items() if key in _SHARED},
        "settings": {key: value for key, value in settings.items() if key not in _SHARED},
        "edits": len(live),
        "layers": list(method.attachments),
        "step": session.step,
    }
    tensors, texts = {"adapter": method.adapter()}, {}
    if next_id is not None:
        tensors["state"], own = method.state()
        manifest |= {**own, "prefixes": session.sampled, "next_id": next_id}
        manifest["ledger"] = [{"request": e.request.to_record(), "step": e.step, "removed": e.removed} for e in session.ledger.entries]
        texts["log"] = "".join(json.dumps(record) + "\n" for record in log)
    apart = any(name.endswith((".shard_left", ".entry_shards")) for own in tensors.values() for name in own)
    with alone(folder):
        write_folder(folder, {"format": FORMATS[apart], **manifest}, tensors, texts)
        write_card(folder, card(session.model, type(method), session.config, session.ledger, log))


@dataclass
class Saved:
    """A folder that was read and found to fit a model.

    Attributes:
        method, config: what to make an editor with, which :meth:`restore` then brings to where it was.
        log, next_id: as saved.
    """

    folder: Path
    manifest: dict
    adapter: dict[str, torch.Tensor]
    state: dict[str, torch.Tensor]
    method: type[Method]
    config: EditConfig
    log: list[dict]
    next_id: int

    def restore(self, session: Session, method: Method) -> None:
        """Raises :class:`StorageError` for what is missing or malformed; the model is unedited then."""
        ledger = self.manifest["ledger"]
        with _complete(self.folder, session.model):
            requests = [(EditRequest.from_record(saved["request"]), saved["step"]) for saved in ledger]
            entries = method.load_entries(requests, self.state, list(method.layers))
            _restore(method.attachments, self.adapter)
            session.step, session.sampled = self.manifest["step"], self.manifest["prefixes"]
            for entry in entries:
                session.ledger.add(entry)
            for entry, saved in zip(entries, ledger, strict=True):
                if saved["removed"] is not None:
                    session.ledger.remove(entry, saved["removed"])
            method.load_state(self.state, self.manifest)


def open_saved(model: nn.Module, folder: str | Path) -> Saved:
    """Read a folder with everything that is needed to go on editing, and check it; the model is not touched.

    Raises:
        StorageError: truncated, foreign, saved for inference only, of another base model, or made by an unknown method.
    """
    folder = local_folder(folder, "adapter", "state", "log")
    manifest, (adapter, state, log) = read_folder(folder, "adapter", "state", "log")
    try:
        log = [json.loads(line) for line in log.splitlines()]
    except ValueError as error:
        raise StorageError(f"{Path(folder) / manifest['files']['log']} is truncated or not JSON ({error})") from None
    kind, config, _ = _checked(model, manifest, folder, adapter, state)
    with _complete(folder):
        _check_progress(manifest)
        return Saved(Path(folder), manifest, adapter, state, kind, config, log, manifest["next_id"])


def _checked(model: nn.Module, manifest: dict, folder: str | Path, *files: dict) -> tuple[type[Method], EditConfig, Architecture]:
    """The method and settings that a folder's edits were made with; everything in it fits this model."""
    with _complete(folder):
        check_identity(manifest["model"], model, f"the folder {folder}")
        try:
            kind = method_named(manifest.get("method", "COMEBA-HK"))
        except ConfigError as error:
            raise StorageError(f"the edits in {folder} were made by a method that is not here: {error}") from None
        config = kind.config_class.from_dict({**manifest["config"], **manifest.get("settings", {})}, str(folder))
        architecture = Architecture.of(model, config.blocks, config.projection)
        for tensors in files:
            kind.check_saved(model, config, architecture, list(manifest["layers"]), tensors)
    return kind, config, architecture


def _facts(manifest: dict) -> frozenset[tuple[str, str]]:
    """Of the live edits, where the folder names them."""
    live = [saved["request"] for saved in manifest.get("ledger", ()) if saved["removed"] is None]
    return frozenset(EditRequest.from_record(request).fact for request in live)


def _restore(attachments: dict[str, Attachment], adapter: dict[str, torch.Tensor]) -> None:
    for name, attachment in attachments.items():
        attachment.restore(of_layer(adapter, name))


def _named_as(model: nn.Module, manifest: dict) -> nn.Module:
    """The model, or the one that PEFT has wrapped, whichever has the layers that a folder names."""
    known = dict(model.named_modules())
    inner = model.get_base_model() if hasattr(model, "get_base_model") else None
    layers = manifest.get("layers")
    missing = isinstance(layers, list) and any(name not in known for name in layers)
    return inner if missing and isinstance(inner, nn.Module) else model


@contextmanager
def _complete(folder: str | Path, edited: nn.Module | None = None):
    """Inside, what is missing or malformed in a folder's files is a :class:`StorageError`, and ``edited`` is left unedited."""
    try:
        yield
    except BaseException as error:
        if edited is not None:
            detach(edited)
        if isinstance(error, StorageError) or not isinstance(error, _MALFORMED):
            raise
        raise StorageError(f"{folder} is incomplete or damaged: {type(error).__name__}: {error}") from None


_MALFORMED = (KeyError, IndexError, ValueError, TypeError, AttributeError, RuntimeError)  # RuntimeError: shapes


def _check_progress(manifest: dict) -> None:
    """Raises :class:`ValueError` where step, context prefixes, the next id's number or the ledger are not what is saved here."""
    step, prefixes, next_id = (manifest[key] for key in ("step", "prefixes", "next_id"))
    fits = {
        "step": is_int(step) and step >= 0,
        "prefixes": prefixes is None or (isinstance(prefixes, list) and all(isinstance(text, str) for text in prefixes)),
        "next_id": is_int(next_id) and next_id >= 0,
        "ledger": all(is_int(record["step"]) and (record["removed"] is None or is_int(record["removed"])) for record in manifest["ledger"]),
    }
    for name, good in fits.items():
        if not good:
            raise ValueError(f"{name} is malformed")
