"""Keys and values of earlier tokens, computed once and read by any number of later runs.

Transformers' own caches grow with every run and drop what a sliding window no longer needs. Here a past is fixed: runs
append their tokens to it only for themselves, so that gradients flow through the appended part and the same past serves
the next run. Masks stay the model's business; it asks the cache for lengths, and gets those of full attention, over
which the model's own mask functions lay sliding windows.
"""

from __future__ import annotations

import functools
import inspect

import torch
from torch import nn
from transformers.cache_utils import Cache

States = dict[int, tuple[torch.Tensor, torch.Tensor]]  # block -> keys and values, each (rows, heads, tokens, width)


def cache_name(decoder: nn.Module) -> str:
    """The argument that a decoder takes its cache by."""
    return _cache_name(type(decoder))


@functools.cache
def _cache_name(kind: type[nn.Module]) -> str:
    return "cache" if "cache" in inspect.signature(kind.forward).parameters else "past_key_values"  # before Transformers 5.24


class Past(Cache):
    """A fixed past.

    Args:
        states: keys and values of every block that is going to run; right-aligned, so that the last column is the
            token before the first new one. Columns before a row's first token are zero and to be masked.
        length: number of columns; 0 for no past.
        ids: their tokens, ``(rows, length)``, −1 before a row's first one: a name may begin there. ``None``: not known.

    Attributes:
        new: what the last run would have appended.
    """

    def __init__(self, states: States, length: int, ids: torch.Tensor | None = None):
        super().__init__(layers=[])
        self.states, self.length, self.comeba_ids = states, length, ids
        self.new: States = {}

    def update(self, key_states, value_states, layer_idx, *args, **kwargs):
        self.new[layer_idx] = (key_states.detach(), value_states.detach())
        if not self.length:
            return key_states, value_states
        keys, values = self.states[layer_idx]
        return torch.cat((keys.to(key_states), key_states), -2), torch.cat((values.to(value_states), value_states), -2)

    def get_seq_length(self, layer_idx: int = 0) -> int:
        return self.length

    def get_query_offset(self, layer_idx: int = 0) -> int:
        return self.length

    def get_mask_sizes(self, query, layer_idx: int = 0) -> tuple[int, int]:
        """``query``: number of new tokens, or their positions (earlier versions of Transformers)."""
        return self.length + (query if isinstance(query, int) else len(query)), 0

    def rows(self, chosen: torch.Tensor) -> Past:
        """The past of some rows; ``chosen``: their indices."""
        return Past(each(self.states, lambda s: s[chosen.to(s.device)]), self.length)


def each(states: States, change) -> States:
    """``change`` applied to every tensor."""
    return {block: (change(keys), change(values)) for block, (keys, values) in states.items()}


def right_aligned(states: torch.Tensor, first: torch.Tensor, counts: torch.Tensor, length: int) -> torch.Tensor:
    """Every row's columns ``first … first + counts − 1`` at the right end of ``length`` columns, zeros before them.

    Args:
        states: ``(rows, heads, seq, width)``.
        first, counts: ``(rows,)``.
    """
    first, counts = first.to(states.device), counts.to(states.device)
    column = torch.arange(length, device=states.device)[None] - (length - counts)[:, None]  # (rows, length)
    index = (column + first[:, None]).clamp(0, states.shape[2] - 1)[:, None, :, None]
    index = index.expand(-1, states.shape[1], -1, states.shape[3])
    return states.gather(2, index).masked_fill((column < 0)[:, None, :, None], 0)
