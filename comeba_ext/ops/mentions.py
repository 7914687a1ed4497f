"""Where a text names a subject: the last tokens up to every position, compared with the tokens of known names.

What a block knows of "1976 Summer Olympics" where it ends is much like what it knows of "1960 Summer Olympics"; the text itself
leaves no doubt. A name is looked up by a hash of its token ids, last token first,

    h_n(t) = Σ_{j<n} (id_{t−j} + 1) B^j  mod 2⁶⁴,

which for all n is one running sum a token, and one binary search among the sorted hashes of all names: what that costs grows with the
logarithm of their number.
"""

from __future__ import annotations

import torch
from torch.nn import functional as F

LONGEST = 16  # tokens of a name that are compared, its last ones
UNKNOWN = -1  # token id of padding, and of what came before the text that is known; part of no name
_BASE = 0x9E3779B97F4A7C15  # odd, so that no power of it vanishes


def _signed(value: int) -> int:
    value %= 1 << 64
    return value - (1 << 64) if value >> 63 else value


_POWERS = [_signed(_BASE**j) for j in range(LONGEST)]


def name_hash(ids: list[int]) -> int:
    """Of a name's token ids, which are its last ``LONGEST`` at most; as int64."""
    return _signed(sum((token + 1) * power for token, power in zip(reversed(ids[-LONGEST:]), _POWERS, strict=False)))


def suffix_hashes(ids: torch.Tensor, past: torch.Tensor | None = None) -> torch.Tensor:
    """The hash of the last 1, 2, … ``LONGEST`` tokens up to every one, ``(batch, seq, LONGEST)`` int64.

    Args:
        ids: ``(batch, seq)`` token ids; ``UNKNOWN`` for padding.
        past: ``(batch, n)`` the tokens before them; ``None``: none.
    """
    ids = ids.long()  # models take int32 as well
    before = ids[:, :0] if past is None else past[:, -(LONGEST - 1) :]
    before = F.pad(before, (LONGEST - 1 - before.shape[1], 0), value=UNKNOWN)
    whole = torch.cat([before, ids], 1) - UNKNOWN  # 0 where unknown
    powers = whole.new_full((LONGEST,), _signed(_BASE))  # made where they are needed: a copy from the host would make a GPU wait
    powers[0] = 1
    return (whole.unfold(1, LONGEST, 1).flip(-1) * powers.cumprod(0)).cumsum(-1)


def without(hashes: torch.Tensor, names: torch.Tensor, kept: torch.Tensor | None = None) -> torch.Tensor:
    """:func:`suffix_hashes` as if nothing were known at the tokens that one of a text's own ``names (batch, n)`` ends in, unless one of
    those ``kept (batch, m)`` that ends there too is at least as long ("New York", where only "York" is to go); 0 is no name."""
    gone = _longest(hashes, names)
    return hashes.masked_fill(gone > (0 if kept is None else _longest(hashes, kept)), 0)


def _longest(hashes: torch.Tensor, names: torch.Tensor) -> torch.Tensor:
    """Tokens of the longest of a text's own ``names (batch, n)`` that ends at every token, ``(batch, seq, 1)``; 0: none does."""
    same = ((hashes[..., None] == names[:, None, None]) & (names != 0)[:, None, None]).any(-1)
    return torch.where(same, torch.arange(1, LONGEST + 1, device=hashes.device), 0).amax(-1, keepdim=True)


def mentions(hashes: torch.Tensor, names: torch.Tensor, shards: torch.Tensor) -> torch.Tensor:
    """The shard of the longest name that ends at every token, ``(...)`` int64; −1: none does.

    Args:
        hashes: ``(..., LONGEST)``, :func:`suffix_hashes`.
        names: ``(n,)`` int64, :func:`name_hash` of the names, sorted.
        shards: ``(n,)`` int64, whose each is.
    """
    if not len(names):
        return hashes.new_full(hashes.shape[:-1], -1)
    place = torch.searchsorted(names, hashes).clamp(max=len(names) - 1)
    length = torch.arange(1, LONGEST + 1, device=hashes.device)
    longest = torch.where(names[place] == hashes, length, 0).amax(-1, keepdim=True)
    found = shards[place.gather(-1, (longest - 1).clamp(min=0))]
    return torch.where(longest > 0, found, -1)[..., 0]
