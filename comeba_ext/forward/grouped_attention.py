"""Attention of a few queries where several heads share their keys, with gradients, on a CPU.

Transformers copies keys and values once a head where there is a mask, and sums the copies' gradients; torch's kernel for the CPU is made
for long sequences. Target values run a few tokens of many rows at every step, and those two took a quarter of the time
(SmolLM2, nine heads on three). One product a key head, with the queries of its group side by side, gives the same in a quarter
of that.
"""

from __future__ import annotations

from contextlib import contextmanager

import torch
from torch import nn
from transformers import AttentionInterface
from transformers.integrations.sdpa_attention import sdpa_attention_forward
from transformers.masking_utils import AttentionMaskInterface, sdpa_mask

from comeba_ext.forward.architectures import FAMILIES

NAME = "comeba_grouped"


def grouped_attention(module, query, key, value, attention_mask, dropout=0.0, scaling=None, is_causal=None, **options):
    """Attention as Transformers calls it; what is not of this case goes to torch's.

    Args:
        query: ``(rows, heads, queries, d)``; key, value: ``(rows, key heads, keys, d)``.
        attention_mask: ``(rows, 1, queries, keys)``, bool or added.

    Returns:
        ``(rows, queries, heads, d)`` and ``None``.
    """
    unusual = dropout or any(options.get(name) is not None for name in ("softcap", "s_aux"))
    if attention_mask is None or unusual or not torch.is_grad_enabled():
        how = {"dropout": dropout, "scaling": scaling, "is_causal": is_causal}
        return sdpa_attention_forward(module, query, key, value, attention_mask, **how, **options)
    rows, heads, queries, width = query.shape
    shared, keys = key.shape[1:3]
    together = (query * (width**-0.5 if scaling is None else scaling)).reshape(rows, shared, -1, width)
    score = (together @ key.mT).view(rows, shared, -1, queries, keys)
    mask = attention_mask[:, :, None]
    score = score.masked_fill(~mask, -torch.inf) if mask.dtype == torch.bool else score + mask
    share = score.softmax(-1).view(rows, shared, -1, keys)
    return (share @ value).view(rows, heads, queries, width).transpose(1, 2), None


AttentionInterface.register(NAME, grouped_attention)
AttentionMaskInterface.register(NAME, sdpa_mask)


def can_group(decoder: nn.Module) -> bool:
    """Whether this is a decoder of a known family on a CPU whose heads share keys, and that uses torch's attention."""
    config = decoder.config
    heads = getattr(config, "num_attention_heads", None)
    shares = getattr(config, "num_key_value_heads", heads) != heads
    known = config.model_type in FAMILIES and getattr(config, "_attn_implementation", None) == "sdpa"
    return known and shares and all(p.device.type == "cpu" for p in decoder.parameters())


@contextmanager
def grouped(decoder: nn.Module):
    """Inside, a decoder that :func:`can_group` uses :func:`grouped_attention`."""
    decoder.config._attn_implementation = NAME
    try:
        yield
    finally:
        decoder.config._attn_implementation = "sdpa"
