"""What every format asks of a model and a folder of edits."""

from __future__ import annotations

from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import nn
from transformers import AutoTokenizer

from comeba_ext.editor import Editor
from comeba_ext.errors import ArchitectureError, ComebaError
from comeba_ext.layers.attachment import Attachment, attachments, detach
from comeba_ext.layers.edit_table import QuestionGate
from comeba_ext.saved_edits import load_edits
from comeba_ext.storage import read_manifest


@dataclass(frozen=True)
class Exported:
    """What was written.

    Attributes:
        out: the folder.
        edits: how many are in it.
        layers: names of the edited layers.
        bytes: size of the folder's files.
        rank: of a LoRA adapter.
        notes: what its users must know.
    """

    out: Path
    edits: int
    layers: list[str]
    bytes: int
    rank: int | None = None
    notes: tuple[str, ...] = ()


def write_tokenizer(tokenizer, folder: Path) -> tuple[str, ...]:
    """Save a tokenizer; says so where ``AutoTokenizer``, which goes by the kind of model, will take it for another one."""
    tokenizer.save_pretrained(folder)
    try:
        read = AutoTokenizer.from_pretrained(folder, trust_remote_code=False)
        same = read(SAMPLE)["input_ids"] == tokenizer(SAMPLE)["input_ids"]
    except Exception:  # whatever a tokenizer of somebody's own raises; it was saved as it saves itself
        return ()
    name = type(tokenizer).__name__
    how = f"{name}.from_pretrained(folder), of {type(tokenizer).__module__.partition('.')[0]}, is right"
    return () if same else (f"AutoTokenizer reads this folder's tokenizer as {type(read).__name__}, with other tokens; {how}",)


SAMPLE = "The capital of Norway (Oslo) had 709,037 people in 2023;  a naïve façade – so what's 東京?\n\tNew"


def size_of(folder: Path) -> int:
    return sum(file.stat().st_size for file in folder.rglob("*") if file.is_file())


def check_base(model: nn.Module) -> None:
    """A model whose weights are there to be written, and none of them wrapped.

    Raises:
        ArchitectureError: it is edited, quantised, adapted by PEFT, or partly on disk.
    """
    if attachments(model):
        raise ArchitectureError("give the base model as it came: this one has edits on it, and what is exported is a saved folder")
    if (
        not hasattr(model, "save_pretrained")
        or type(model).__module__.startswith("peft")
        or getattr(model, "_hf_peft_config_loaded", False)
    ):
        raise ArchitectureError("the model has adapters, or is none of Transformers': merge them into it first (merge_and_unload)")
    if getattr(model, "hf_quantizer", None) is not None:
        raise ArchitectureError("the model is quantised, so its weights cannot be written with edits: load it in a floating dtype")
    if any(weight.device.type == "meta" for weight in model.parameters()):
        raise ArchitectureError("parts of the model are on disk (device_map); load it whole, on the CPU if need be")


@contextmanager
def edited(model: nn.Module, edits: str | Path, tokenizer=None):
    """Inside, the model has a folder's edits; yields the manifest, and, where there is a tokenizer and the edits were not saved for
    inference only, the method that made them (else ``None``). Afterwards the model is as it came.

    Raises:
        ArchitectureError: as :func:`check_base`.
        StorageError: as :func:`~comeba_ext.saved_edits.load_edits`.
        ComebaError: there are no edits in the folder.
    """
    check_base(model)
    manifest = read_manifest(edits)
    if not manifest.get("edits"):
        raise ComebaError(f"{edits} holds no edits, so there is nothing to export")
    try:
        if tokenizer is not None and "state" in manifest["files"]:
            yield manifest, Editor.from_pretrained(model, tokenizer, edits).method
        else:
            load_edits(model, edits)
            yield manifest, None
    finally:
        detach(model)


def edited_layers(model: nn.Module) -> dict[str, Attachment]:
    """What of the edits can be exported, by names: all but the gate of their questions, which reads every prompt with the model."""
    return {name: own for name, own in attachments(model).items() if not isinstance(own, QuestionGate)}


Change = torch.Tensor | tuple[torch.Tensor, torch.Tensor]  # (d_out, d_in), or factors (d_out, n) and (n, d_in)


def weight_changes(model: nn.Module, tokenizer, edits: str | Path) -> tuple[int, dict[str, Change]]:
    """How many edits there are, and by layer what they come to in its weight if every token meets them.

    Raises:
        ComebaError: the method's edits are no change of weights; and as :func:`edited`.
    """
    with edited(model, edits, tokenizer) as (manifest, method):
        found: dict[str, Change] = {}
        for name, own in edited_layers(model).items():
            try:
                change = own.weight_change() if method is None else method.weight_change(name)
            except ComebaError as error:
                raise ComebaError(f"{manifest.get('method', 'COMEBA-HK')}: {error}") from None
            # A copy: the layer's own buffer goes with it.
            found[name] = tuple(part.clone() for part in change) if isinstance(change, tuple) else change.clone()
    return manifest["edits"], found
