"""Keys and values of earlier tokens, computed once and read by any number of later runs.

Transformers' own caches grow with every run and drop what a sliding window no longer needs. Here a past is fixed: runs
append their tokens to it only for themselves, so that gradients flow through the appended part and the same past serves
the next run. Masks stay the model's business; it asks the cache for lengths, and gets those of full attention, over
which the model's own mask functions lay sliding windows.
"""

from __future__ import annotations

import torch
from transformers.cache_utils import Cache


class _FixedLength(Cache):
    """What models ask of a cache before they build positions and masks."""

    def __init__(self, length: int):
        super().__init__(layers=[])
        self.length = length

    def get_seq_length(self, layer_idx: int = 0) -> int:
        return self.length

    def get_query_offset(self, layer_idx: int = 0) -> int:
        return self.length

    def get_mask_sizes(self, query, layer_idx: int = 0) -> tuple[int, int]:
        """``query``: number of new tokens, or their positions (earlier versions of Transformers)."""
        return self.length + (query if isinstance(query, int) else len(query)), 0


class Recorder(_FixedLength):
    """An empty cache that keeps what each layer wants to put into it.

    Attributes:
        seen: layer index to keys and values, each ``(batch, heads, seq, width)``.
    """

    def __init__(self):
        super().__init__(0)
        self.seen: dict[int, tuple[torch.Tensor, torch.Tensor]] = {}

    def update(self, key_states, value_states, layer_idx, *args, **kwargs):
        self.seen[layer_idx] = (key_states, value_states)
        return key_states, value_states


class Past(_FixedLength):
    """A fixed past.

    Args:
        layers: layer index to keys and values, each ``(batch, heads, length, width)``; right-aligned, so that the last
            column is the token before the first new one. Columns before a row's first token are zero and masked.
    """

    def __init__(self, layers: dict[int, tuple[torch.Tensor, torch.Tensor]]):
        super().__init__(next(iter(layers.values()))[0].shape[-2])
        self.states = layers

    def update(self, key_states, value_states, layer_idx, *args, **kwargs):
        keys, values = self.states[layer_idx]
        return torch.cat((keys.to(key_states), key_states), -2), torch.cat((values.to(value_states), value_states), -2)

    def rows(self, chosen: torch.Tensor) -> Past:
        """The past of some rows; ``chosen``: their indices."""
        return Past({n: tuple(s[chosen.to(s.device)] for s in states) for n, states in self.states.items()})


def right_aligned(states: torch.Tensor, counts: torch.Tensor, length: int) -> torch.Tensor:
    """Move every row's first ``counts`` of ``seq`` columns to the right end of ``length`` columns, zeros before them.

    Args:
        states: ``(rows, heads, seq, width)``.
        counts: ``(rows,)``, each at most ``seq`` and ``length``.
    """
    counts = counts.to(states.device)
    column = torch.arange(length, device=states.device)[None] - (length - counts)[:, None]  # (rows, length)
    index = column.clamp(0, states.shape[2] - 1)[:, None, :, None].expand(-1, states.shape[1], -1, states.shape[3])
    return states.gather(2, index).masked_fill((column < 0)[:, None, :, None], 0)
