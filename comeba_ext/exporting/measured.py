"""What it costs that every token meets the edits."""

from __future__ import annotations

from pathlib import Path

import torch
from torch import nn

from comeba_ext.errors import ComebaError
from comeba_ext.evaluation import Metrics, evaluate, predict_base
from comeba_ext.layers.attachment import detach
from comeba_ext.saved_edits import load_edits


def measure(
    model: nn.Module, tokenizer, edits: str | Path, out: str | Path, to: str, records, *, progress: bool = False
) -> dict[str, Metrics]:
    """Scores of the unedited model, of the model with its edits as they were saved, and of what was exported, loaded as its users will.

    Args:
        model: the base model; it is as it came afterwards.
        edits, out: folder of edits, and what it was exported to.
        to: ``"merged"`` or ``"lora"``.
        records: as :func:`~comeba_ext.evaluation.evaluate` takes them; locality is measured against the unedited model.

    Raises:
        ComebaError: an adapter, and PEFT is not installed.
    """
    base = predict_base(model, tokenizer, records, generate=False, progress=progress)
    found = {"unedited": evaluate(model, tokenizer, records, base, generate=False, progress=progress)}
    try:
        load_edits(model, edits, tokenizer=tokenizer)
        found["edited"] = evaluate(model, tokenizer, records, base, generate=False, progress=progress)
    finally:
        detach(model)
    loaded = LOADERS[to](model, Path(out))
    try:
        found[f"exported ({to})"] = evaluate(loaded, tokenizer, records, base, generate=False, progress=progress)
    finally:
        if hasattr(loaded, "unload"):  # the adapter out of the model again
            loaded.unload()
    return found


def _merged(model: nn.Module, out: Path) -> nn.Module:
    loaded = type(model).from_pretrained(out, dtype=model.dtype)
    return loaded.to(next(model.parameters()).device).eval()


def _lora(model: nn.Module, out: Path) -> nn.Module:
    try:
        import peft
    except ImportError:
        raise ComebaError("measuring an adapter needs peft: pip install 'comeba_ext[lora]'; the export itself does not") from None
    with torch.no_grad():
        return peft.PeftModel.from_pretrained(model, out).eval()


LOADERS = {"merged": _merged, "lora": _lora}
