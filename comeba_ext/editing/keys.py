"""Keys and current hidden states of a batch, from one run per edited layer that ends at the value layer."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import nn

from comeba_ext.editing.encoding import micro_batches
from comeba_ext.editing.rows import Row, batch_inputs
from comeba_ext.partial_forward import hidden_of, run_until


@dataclass
class LayerReading:
    """What one run shows at an edited layer.

    Attributes:
        keys: ``(u, d_in)``, the layer's input at the subject's last token, averaged over context prefixes.
        hidden: ``(u, d_model)``, the value layer's output at the subject's last token behind the empty prefix.
        prompts: the layer's whole input and the mask of real tokens for the rows with the empty prefix, as a list of
            ``(requests, x (rows, seq, d_in), mask (rows, seq))``, what thresholds are calibrated on.
    """

    keys: torch.Tensor
    hidden: torch.Tensor
    prompts: list[tuple[list[int], torch.Tensor, torch.Tensor]]


def read_layer(
    decoder: nn.Module, layer: nn.Module, value_block: nn.Module, rows: list[Row], pad_token: int, max_tokens: int, device
) -> LayerReading:
    """Run all rows up to the value layer.

    Args:
        decoder: receives token ids and mask.
        layer: the hooked layer whose keys are wanted.
        value_block: block of the last edited layer.
        rows: :func:`rows.prompt_rows` of the batch.
    """
    count = max(row.request for row in rows) + 1
    sums: list[torch.Tensor | None] = [None] * count
    seen = [0] * count
    hidden: list[torch.Tensor | None] = [None] * count
    prompts = []
    for group in micro_batches([len(row.ids) for row in rows], max_tokens):
        batch = [rows[i] for i in group]
        inputs = batch_inputs(batch, pad_token, device)
        mask = inputs["attention_mask"].bool()
        index = torch.arange(len(batch), device=device)
        last = torch.tensor([row.subject_last for row in batch], device=device)
        caught: dict[str, torch.Tensor] = {}
        run_until(decoder, value_block, inputs, {layer: lambda x, c=caught: c.__setitem__("x", x)},
                  lambda h, c=caught: c.__setitem__("h", hidden_of(h)))  # fmt: skip
        x = caught["x"].reshape(*mask.shape, -1)
        keys, states = x[index.to(x.device), last.to(x.device)], caught["h"][index.to(caught["h"].device), last.to(caught["h"].device)]
        plain = [n for n, row in enumerate(batch) if row.plain]
        if plain:
            prompts.append(([batch[n].request for n in plain], x[plain], mask[plain]))
        for n, row in enumerate(batch):
            wide = keys[n].to(torch.promote_types(keys.dtype, torch.float32))
            sums[row.request] = wide if sums[row.request] is None else sums[row.request] + wide
            seen[row.request] += 1
            if row.plain:
                hidden[row.request] = states[n].to(torch.promote_types(states.dtype, torch.float32))
    keys = torch.stack([s / n for s, n in zip(sums, seen, strict=True)])
    return LayerReading(keys, torch.stack(hidden), prompts)
