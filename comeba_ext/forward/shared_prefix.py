"""What all rows behind one context prefix begin with: run once for all of them.

The five sampled prefixes are longer than most prompts, and every request's rows repeat them. Causally, their tokens'
states do not depend on what follows, except where the scope of an earlier edit does: with zscore, all tokens of a row
decide together, so nothing is shared there.
"""

from __future__ import annotations

import torch
from torch import nn

from comeba_ext.forward.past import States, each, right_aligned
from comeba_ext.text.encoding import pad
from comeba_ext.text.rows import Row


class SharedPrefix:
    """The shared beginnings of rows.

    Args:
        rows: all rows that will be run; those of one prefix that share a beginning before the subject's last token.

    Attributes:
        length: of the longest beginning; 0 when nothing is shared.
        inputs: the beginnings as right-padded decoder inputs, each ``(contexts, length)``.
    """

    def __init__(self, rows: list[Row], pad_token: int, device: torch.device):
        groups: dict[int, list[Row]] = {}
        for row in rows:
            groups.setdefault(row.prefix, []).append(row)
        shared = {p: _beginning(g) for p, g in groups.items()}
        shared = {p: ids for p, ids in shared.items() if ids and len(groups[p]) > 1}
        self.device = device
        self.place = {p: n for n, p in enumerate(shared)}
        self.ids = list(shared.values())
        self.length = max(map(len, self.ids), default=0)
        if self.length:
            ids, mask = pad(self.ids, pad_token, device=device)
            self.inputs = {"input_ids": ids, "attention_mask": mask}

    def counts(self, rows: list[Row]) -> list[int]:
        """Number of tokens that each row shares."""
        return [len(self.ids[self.place[row.prefix]]) if row.prefix in self.place else 0 for row in rows]

    def before(self, rows: list[Row]) -> torch.Tensor:
        """The token ids that each row shares, ``(rows, length)``, right-aligned, −1 before them: names may begin there."""
        shared = [self.ids[self.place[row.prefix]] if row.prefix in self.place else [] for row in rows]
        return torch.tensor([[-1] * (self.length - len(own)) + own for own in shared], device=self.device)

    def past(self, states: States, rows: list[Row]) -> States:
        """``states`` of the beginnings, ``(contexts, heads, length, width)``, laid out for rows, right-aligned."""
        counts = torch.tensor(self.counts(rows), device=self.device)
        chosen = torch.tensor([self.place.get(row.prefix, 0) for row in rows], device=self.device)
        zero = torch.zeros_like(counts)
        return each(states, lambda s: right_aligned(s[chosen.to(s.device)], zero, counts, self.length))


def can_share(model: nn.Module) -> bool:
    """Whether every token's scope depends on that token alone."""
    return not any(getattr(module, "reads_sequence", False) for module in model.modules())


def _beginning(rows: list[Row]) -> list[int]:
    """The token ids that all rows begin with, before the subject's last token of any."""
    texts = [row.ids[: row.subject_last] for row in rows]
    first, last = min(texts), max(texts)  # in lexical order: whatever these two share, all share
    return first[: next((n for n, (a, b) in enumerate(zip(first, last)) if a != b), min(len(first), len(last)))]


def own_inputs(rows: list[Row], ends: list[int], counts: list[int], length: int, pad_token: int, device) -> dict:
    """Decoder inputs of every row's tokens ``counts … ends − 1`` behind a past of ``length`` columns.

    Returns:
        ``input_ids (rows, S)``; ``attention_mask (rows, length + S)``; with a past also ``position_ids (rows, S)``.
    """
    ids, now = pad([row.ids[a:b] for row, a, b in zip(rows, counts, ends, strict=True)], pad_token, device=device)
    if not length:
        return {"input_ids": ids, "attention_mask": now}
    start = torch.tensor(counts, device=device)[:, None]
    before = torch.arange(length, device=device) >= length - start
    # Padding repeats the last position, so that a table of positions is never left.
    positions = start + torch.arange(ids.shape[1], device=device).minimum(now.sum(1, keepdim=True) - 1)
    return {"input_ids": ids, "attention_mask": torch.cat((before.long(), now), 1), "position_ids": positions}
