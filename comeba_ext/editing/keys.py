"""Keys and current hidden states of a batch, layer by layer, while the layers are being edited."""

from __future__ import annotations

import contextlib
from dataclasses import dataclass

import torch
from torch import nn

from comeba_ext.editing.contexts import Contexts, own_inputs
from comeba_ext.editing.encoding import dense_batches
from comeba_ext.editing.rows import Row
from comeba_ext.partial_forward import hidden_of, resumed, run_until, with_hidden
from comeba_ext.past import Past


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


@dataclass
class _Batch:
    """Rows that run together, and what the block that was read last left behind.

    Attributes:
        shared: number of tokens that run elsewhere, with a context they share.
        before: hidden states before that block.
        after: hidden states after it, as it was then; ``x`` and ``y``: its projection's input and output.
    """

    rows: list[Row]
    inputs: dict[str, torch.Tensor]
    shared: list[int]
    before: torch.Tensor | None = None
    after: torch.Tensor | None = None
    x: torch.Tensor | None = None
    y: torch.Tensor | None = None


class KeyReader:
    """Reads each edited layer of a batch once, in increasing order, between the edits of two layers.

    No block whose layer was read runs again. After its layer is edited, the block's output is what it was plus what the
    layer's own output has changed by, because an MLP's output is added to the hidden state. Where a norm follows the
    layer (Gemma 2 and 3, OLMo 2; found out by a trial), the block runs again from its kept input. Rows with a context
    prefix serve keys only, so they run to the last layer's input; rows with the empty prefix go on to the value layer.
    What rows with a prefix begin with runs once for all of them (:class:`Contexts`).

    Args:
        decoder: receives token ids and mask.
        blocks: all blocks of the model.
        layers: the edited blocks, increasing; the last one is the value layer.
        projections: their hooked layers, whose inputs are the keys.
        rows: :func:`rows.prompt_rows` of the batch.
        whole: run rows from end to end, where the scope of a token may depend on all others (zscore); otherwise rows
            with a prefix end at the subject's last token and share their contexts.
    """

    def __init__(
        self,
        decoder: nn.Module,
        blocks: list[nn.Module],
        layers: tuple[int, ...],
        projections: list[nn.Module],
        rows: list[Row],
        *,
        whole: bool,
        pad_token: int,
        max_tokens: int,
        device: torch.device,
    ):
        self.decoder, self.blocks, self.layers, self.projections = decoder, blocks, layers, projections
        self.count = max(row.request for row in rows) + 1
        self.form = None  # of a block's output; the first batches run whole blocks
        self.adds: bool | None = None  # whether a layer's output is added to the hidden state as it is
        self.batches: list[_Batch] = []
        behind = [row for row in rows if not row.plain]
        contexts = Contexts([] if whole else behind, pad_token, device)
        self.contexts = contexts
        for chosen in ([row for row in rows if row.plain], behind):
            ends = [len(row.ids) if row.plain or whole else row.end for row in chosen]
            shared = contexts.counts(chosen)
            own = [end - count for end, count in zip(ends, shared, strict=True)]
            for group in dense_batches(own, max_tokens, device) if chosen else []:
                part, counts = [chosen[n] for n in group], [shared[n] for n in group]
                length = contexts.length if any(counts) else 0
                inputs = own_inputs(part, [ends[n] for n in group], counts, length, pad_token, device)
                self.batches.append(_Batch(part, inputs, counts))
        self.shared = _Batch([], contexts.inputs, []) if contexts.length else None

    def read(self, number: int) -> LayerReading:
        """Keys of the layer ``layers[number]``, and hidden states of the model as it is now; once for each number."""
        keys, hidden, prompts = None, None, []
        each = torch.zeros(self.count)
        states = None
        for batch in self.batches:
            if any(batch.shared) and states is None:
                past = Past({}, 0)
                self._run(self.shared, number, past)
                states = past.new
            past = Past(self.contexts.past(states, batch.rows), self.contexts.length) if any(batch.shared) else None
            x, output = self._run(batch, number, past)
            requests = torch.tensor([row.request for row in batch.rows])
            index = torch.arange(len(batch.rows), device=x.device)
            last = [row.subject_last - count for row, count in zip(batch.rows, batch.shared, strict=True)]
            last = torch.tensor(last, device=x.device)
            own = x[index, last].to(torch.promote_types(x.dtype, torch.float32))
            keys = own.new_zeros(self.count, own.shape[1]) if keys is None else keys
            keys.index_add_(0, requests.to(own.device), own)
            each.index_add_(0, requests, torch.ones(len(requests)))
            if output is not None:
                now = output[index.to(output.device), last.to(output.device)]
                now = now.to(torch.promote_types(now.dtype, torch.float32))
                hidden = now.new_zeros(self.count, now.shape[1]) if hidden is None else hidden
                hidden[requests.to(now.device)] = now
                prompts.append((requests.tolist(), x, batch.inputs["attention_mask"].bool()))
        return LayerReading(keys / each[:, None].to(keys), hidden, prompts)

    def _run(self, batch: _Batch, number: int, past: Past | None) -> tuple[torch.Tensor, torch.Tensor | None]:
        """The layer's input ``(rows, seq, d_in)``, and for rows with the empty prefix the value layer's output."""
        plain = any(row.plain for row in batch.rows)
        projection, block, caught = self.projections[number], self.blocks[self.layers[number]], {}
        final = number + 1 == len(self.layers)
        taps = {projection: lambda x: caught.__setitem__("x", x), block: lambda h: caught.__setitem__("before", h)}
        inputs = batch.inputs if past is None else batch.inputs | {"past_key_values": past}
        note = lambda name: lambda module, args, out: caught.__setitem__(name, out)  # noqa: E731
        with contextlib.ExitStack() as stack:
            done, hidden = self._start(batch, number)
            if hidden is not None:
                stack.enter_context(resumed(self.blocks, done, lambda: hidden, self.form))
            if not final:
                for name, module in (("y", projection), ("after", block)):
                    stack.callback(module.register_forward_hook(note(name)).remove)
            if final and not plain:
                run_until(self.decoder, projection, inputs, taps, before=True)
            else:
                last = self.blocks[self.layers[-1]] if plain else block
                run_until(self.decoder, last, inputs, taps, lambda out: caught.__setitem__("out", out))
                self.form = with_hidden(caught["out"], None)
        x = caught["x"].reshape(*batch.inputs["input_ids"].shape, -1)  # OPT flattens tokens before the MLP
        batch.before = batch.after = batch.x = batch.y = None
        if not final:
            batch.before, batch.after, batch.x, batch.y = caught["before"], hidden_of(caught["after"]), x, caught["y"]
            if self.adds is None:
                self.adds = self._adds(batch, number)
        return x, hidden_of(caught["out"]) if plain else None

    @torch.no_grad()
    def _start(self, batch: _Batch, number: int) -> tuple[int, torch.Tensor | None]:
        """The last block whose output is known, and that output for the model as it is now; ``None``: from the start."""
        if number == 0:
            return -1, None
        read = self.layers[number - 1]
        if not self.adds:
            return read - 1, batch.before if read else None
        mask = batch.inputs["attention_mask"][:, -batch.x.shape[1] :].bool()
        now = self.projections[number - 1](batch.x, mask=mask)
        return read, batch.after + (now - batch.y.reshape(now.shape)).to(batch.after)

    def _adds(self, batch: _Batch, number: int) -> bool:
        """Whether block ``layers[number]`` without its projection's output gives what that output is added to: a trial
        on one row."""
        row = lambda value: value[:1] if isinstance(value, torch.Tensor) else value  # noqa: E731
        inputs = {name: row(value) for name, value in batch.inputs.items()}
        index, caught = self.layers[number], {}
        silent = self.projections[number].register_forward_hook(lambda module, args, out: torch.zeros_like(out))
        before = row(batch.before)
        start = resumed(self.blocks, index - 1, lambda: before, self.form) if index else contextlib.nullcontext()
        try:
            with start:
                run_until(self.decoder, self.blocks[index], inputs, {}, lambda out: caught.__setitem__("out", out))
        finally:
            silent.remove()
        after = row(batch.after)
        sum_ = hidden_of(caught["out"]) + batch.y.reshape(*batch.after.shape[:2], -1)[:1]
        return bool((sum_ - after).norm() <= torch.finfo(after.dtype).eps ** 0.5 * after.norm())
