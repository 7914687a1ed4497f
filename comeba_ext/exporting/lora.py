"""A PEFT adapter: delta in the factors that it has, beside weights that stay as they are."""

from __future__ import annotations

import json
from pathlib import Path

import torch
from torch import nn

from comeba_ext.errors import ComebaError
from comeba_ext.exporting.base import Change, Exported, size_of, weight_changes
from comeba_ext.exporting.new_folder import must_be_new, new_folder
from comeba_ext.layers.hooked_linear import turned
from comeba_ext.storage import write_tensors, write_text


def export_lora(model: nn.Module, tokenizer, edits: str | Path, out: str | Path) -> Exported:
    """Write what the edits come to in the weights as a LoRA adapter, for ``peft.PeftModel.from_pretrained`` and the servers that take
    such. To rounding it is what :func:`~comeba_ext.exporting.merged.export_merged` writes.

    The factors are exact (a singular value decomposition), of the rank that delta has: at most the number of keys that were edited.

    Args:
        model, tokenizer, edits, out: as :func:`~comeba_ext.exporting.merged.export_merged`; no tokenizer is written.

    Raises:
        ComebaError: the method's edits are no change of weights, or one of so high a rank that an adapter is no smaller.
        ArchitectureError, StorageError: the model or a folder cannot be used; nothing was written.
    """
    must_be_new(out)
    count, changes = weight_changes(model, tokenizer, edits)
    factors = {name: _factors(name, change) for name, change in changes.items()}
    rank = max(len(down) for _, down in factors.values())
    tensors = {}
    for name, (up, down) in factors.items():
        # One rank for all: not every server takes one for each layer.
        more, prefix = rank - len(down), f"base_model.model.{name}"
        tensors[f"{prefix}.lora_A.weight"] = nn.functional.pad(down, (0, 0, 0, more)).float()
        tensors[f"{prefix}.lora_B.weight"] = nn.functional.pad(up, (0, more)).float()
    config = {
        "peft_type": "LORA",
        "task_type": "CAUSAL_LM",
        "base_model_name_or_path": model.name_or_path,
        "r": rank,
        "lora_alpha": rank,  # times 1
        "lora_dropout": 0.0,
        "bias": "none",
        "target_modules": list(factors),
        "fan_in_fan_out": any(turned(model.get_submodule(name)) for name in factors),
        "inference_mode": True,
    }
    with new_folder(out) as staging:
        write_tensors(staging / "adapter_model.safetensors", tensors)
        write_text(staging / "adapter_config.json", json.dumps(config, indent=2) + "\n")
        size = size_of(staging)
    return Exported(Path(out), count, list(changes), size, rank)


def _factors(name: str, change: Change) -> tuple[torch.Tensor, torch.Tensor]:
    """``(d_out, r)`` and ``(r, d_in)``, of the rank that their product has; equal shares of every singular value in both."""
    if isinstance(change, tuple):  # of the small matrix between two bases
        left, first = torch.linalg.qr(change[0].double())
        right, second = torch.linalg.qr(change[1].double().mT)
        up, values, down = torch.linalg.svd(first @ second.mT, full_matrices=False)
        up, down = left @ up, down @ right.mT
    else:
        up, values, down = torch.linalg.svd(change.double(), full_matrices=False)
    width, depth = len(up), down.shape[1]
    # Below that the dtype that it is kept in (of factors: float32, that they are written in) does not tell it from zero.
    eps = torch.finfo(torch.float32 if isinstance(change, tuple) else change.dtype).eps
    rank = max(1, int((values > values.max() * eps * max(width, depth) ** 0.5).sum()))
    if rank * (width + depth) >= width * depth:
        raise ComebaError(
            f"{name}: what was edited has rank {rank} of {min(width, depth)}, so that an adapter would be no smaller than the weight; "
            "export it as merged"
        )
    root = values[:rank].sqrt()
    return up[:, :rank] * root, root[:, None] * down[:rank]
