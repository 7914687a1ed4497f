"""A model's logits where they are read, and no others: with a large vocabulary they are most of a pass's memory and much of its time."""

from __future__ import annotations

import inspect
from collections.abc import Sequence

import torch
from torch import nn

LOGITS = 2**29  # bytes of one pass's logits, at most


def logits_at(model: nn.Module, inputs: dict[str, torch.Tensor], places: Sequence[Sequence[int]]) -> list[torch.Tensor]:
    """Logits of every row at its places, each ``(places, vocabulary)``.

    Args:
        inputs: of the model, ``(rows, seq)`` each.
        places: increasing positions, one list a row.
    """
    if "logits_to_keep" not in inspect.signature(model.forward).parameters:
        logits = model(**inputs, use_cache=False).logits
        return [own[list(row)] for own, row in zip(logits, places, strict=True)]
    kept = sorted({place for row in places for place in row})
    if len(set((getattr(model, "hf_device_map", None) or {}).values())) > 1:  # where the last states are, is not where the inputs are
        first = kept[0]
        logits = model(**inputs, use_cache=False, logits_to_keep=next(iter(inputs.values())).shape[1] - first).logits
        return [own[[place - first for place in row]] for own, row in zip(logits, places, strict=True)]
    number = {place: n for n, place in enumerate(kept)}
    device = next(iter(inputs.values())).device
    logits = model(**inputs, use_cache=False, logits_to_keep=torch.tensor(kept, device=device)).logits  # (rows, kept, vocabulary)
    return [own[[number[place] for place in row]] for own, row in zip(logits, places, strict=True)]


def room_for_logits(model: nn.Module, max_tokens: int) -> int:
    """At most ``max_tokens`` tokens, fewer where their float32 logits would take more than ``LOGITS`` bytes."""
    config = model.config.get_text_config() if hasattr(model.config, "get_text_config") else model.config
    return max(1, min(max_tokens, LOGITS // (4 * getattr(config, "vocab_size", 1))))
