"""Plain weights: every token meets the edits, and every program loads them."""

from __future__ import annotations

from pathlib import Path

import torch
from torch import nn

from comeba_ext.exporting.base import Exported, size_of, weight_changes, write_tokenizer
from comeba_ext.exporting.new_folder import must_be_new, new_folder
from comeba_ext.layers.hooked_linear import turned


def export_merged(model: nn.Module, tokenizer, edits: str | Path, out: str | Path) -> Exported:
    """Write the model with ``W + delta`` in place of the edited layers' weights.

    Edits that a gate keeps from other tokens reach all of them then. Where every subject has a delta of its own, delta is the least
    squares of all of them together (DESIGN §3, step 2), as without a gate. What that costs: measure it.

    Args:
        model: the base model; it is as it came afterwards.
        tokenizer: its tokenizer, written too.
        edits: folder of :meth:`Editor.save_pretrained`.
        out: a new folder, for ``from_pretrained`` of Transformers as it is.

    Raises:
        ComebaError: the method's edits are no change of weights.
        ArchitectureError, StorageError: the model or a folder cannot be used; nothing was written.
    """
    must_be_new(out)
    count, changes = weight_changes(model, tokenizer, edits)
    state = model.state_dict()
    for name, change in changes.items():
        delta = (change[0].double() @ change[1].double()) if isinstance(change, tuple) else change.double()
        weight = state[f"{name}.weight"]
        if turned(model.get_submodule(name)):
            delta = delta.mT
        state[f"{name}.weight"] = (weight.double() + delta.to(weight.device)).to(weight.dtype)
    with new_folder(out) as staging, torch.no_grad():
        type(model).save_pretrained(model, staging, state_dict=state)
        notes = write_tokenizer(tokenizer, staging)
        size = size_of(staging)
    return Exported(Path(out), count, list(changes), size, notes=notes)
