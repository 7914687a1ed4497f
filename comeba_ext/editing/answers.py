"""Whether an edit took: what the edited model says behind the prompts that were edited."""

from __future__ import annotations

import torch
from torch import nn

from comeba_ext.forward.logits import logits_at, room_for_logits
from comeba_ext.layers.prompts import as_asked
from comeba_ext.text.encoding import input_device, micro_batches
from comeba_ext.text.rows import Row, batch_inputs


@torch.no_grad()
def answered(model: nn.Module, rows: list[Row], pad_token: int, max_tokens: int) -> list[bool]:
    """Whether every target token is the model's first choice, teacher-forced, for every row of :func:`rows.target_rows`; with those edits
    muted that ``generate`` would mute behind its prompt."""
    device = input_device(model)
    found = [False] * len(rows)
    for group in micro_batches([len(row.ids) for row in rows], room_for_logits(model, max_tokens)):
        with as_asked(model, [rows[n].ids[: rows[n].predicts.start + 1] for n in group]):
            logits = logits_at(model, batch_inputs([rows[n] for n in group], pad_token, device), [rows[n].predicts for n in group])
        for own, n in zip(logits, group, strict=True):
            found[n] = own.argmax(-1).tolist() == rows[n].target
    return found
