"""Which text a token stands in, where the tokens of many sequences come as one row and earlier ones are in a paged cache."""

from __future__ import annotations

import torch

from comeba_ext.errors import ComebaError
from comeba_ext.exporting.modeling import LONGEST, UNKNOWN, suffix_hashes


class PagedText:
    """Token ids beside a paged key-value cache: one a slot, written whenever the slot's token is read.

    A sequence finds its earlier ids as attention finds its earlier keys, through its row of the block table. So they are right wherever
    keys are: in prompts read in pieces, blocks that several sequences share or that were kept from an earlier one, and in sequences that
    were put aside and begun again.
    """

    def __init__(self):
        self.ids = torch.empty(0, dtype=torch.int64)  # by slot
        self.size = None  # slots of a block

    def hashes(
        self, ids: torch.Tensor, positions: torch.Tensor, slots: torch.Tensor, starts: torch.Tensor, blocks: torch.Tensor
    ) -> torch.Tensor:
        """Hashes of the last tokens up to every one, as :func:`~comeba_ext.exporting.modeling.suffix_hashes`.

        Args:
            ids: of the tokens that are read now, ``(n,)``, the sequences' one behind another.
            positions: of every token in its sequence, ``(n,)``.
            slots: of every token in the cache, ``(n,)``; −1 for padding.
            starts: where every sequence's tokens begin, and the end, ``(sequences + 1,)``.
            blocks: every sequence's blocks in order, ``(sequences, any)``.

        Returns:
            ``(n, LONGEST)``, of padding as if nothing were known.

        Raises:
            ComebaError: slots and blocks do not fit together, or an earlier token was never read here.
        """
        ids, positions, slots, starts, blocks = (own.long() for own in (ids, positions, slots, starts, blocks))
        number = torch.arange(len(ids), device=ids.device)
        owner = torch.searchsorted(starts[1:].contiguous(), number, right=True).clamp(max=len(blocks) - 1)
        real = slots >= 0
        self._make_room(slots, ids.device)
        if self.size is None:
            self.size = self._size_of_a_block(real & (positions == 0), slots, blocks[owner, 0])
        if self.size is None:
            return suffix_hashes(torch.full_like(ids, UNKNOWN)[:, None], ids.new_full((len(ids), LONGEST - 1), UNKNOWN))[:, 0]
        self.ids[slots[real]] = ids[real]
        before = torch.arange(1 - LONGEST, 1, device=ids.device)
        at = positions[:, None] + before  # (n, LONGEST)
        known = real[:, None] & (at >= 0)
        at = at.clamp(min=0)
        block, place = at // self.size, at % self.size
        inside = block < blocks.shape[1]
        slot = blocks[owner[:, None], block.clamp(max=blocks.shape[1] - 1)] * self.size + place
        inside &= slot < len(self.ids)
        found = self.ids[slot.clamp(max=len(self.ids) - 1)]
        wrong = (real & (slot[:, -1] != slots)).any() | (known & ~(inside & (found != UNKNOWN))).any()
        if wrong:
            raise ComebaError("the earlier tokens of a sequence cannot be told from the cache's block table, so edits cannot be recognised")
        window = torch.where(known, found, UNKNOWN)
        return suffix_hashes(window[:, -1:], window[:, :-1])[:, 0]

    def _make_room(self, slots: torch.Tensor, device: torch.device) -> None:
        """At least one slot, and all that are named."""
        needed = int(slots.max()) + 1 if len(slots) else 1
        if needed > len(self.ids) or self.ids.device != device:
            grown = torch.full((max(needed, 2 * len(self.ids), 1),), UNKNOWN, device=device)
            grown[: len(self.ids)] = self.ids.to(device)
            self.ids = grown

    @staticmethod
    def _size_of_a_block(begins: torch.Tensor, slots: torch.Tensor, first: torch.Tensor) -> int | None:
        """A sequence's first token has the first slot of its first block; block 0 is nobody's."""
        begins = (begins & (first > 0)).nonzero()[:, 0]
        return int(slots[begins[0]] // first[begins[0]]) if len(begins) else None
