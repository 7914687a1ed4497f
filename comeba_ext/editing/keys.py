"""Keys and current hidden states of a batch, layer by layer, while the layers are being edited."""

from __future__ import annotations

import contextlib
from dataclasses import dataclass

import torch
from torch import nn

from comeba_ext.forward.activation_recorder import NAMES, ActivationRecorder
from comeba_ext.forward.budget import launch_tokens
from comeba_ext.forward.partial import hidden_of, inputs_at_ends, resumed, run_until, watched, with_hidden
from comeba_ext.forward.past import Past, cache_name
from comeba_ext.forward.shared_prefix import SharedPrefix, own_inputs
from comeba_ext.layers.hooked_linear import HookedLinear
from comeba_ext.text.encoding import dense_batches
from comeba_ext.text.rows import Row


@dataclass
class LayerReading:
    """What one run shows at an edited layer.

    Attributes:
        keys: ``(u, d_in)``, the layer's input at the subject's last token, averaged over context prefixes.
        plain_keys: ``(u, d_in)``, the same behind the empty prefix alone, where ``hidden`` is read.
        hidden: ``(u, d_model)``, the value layer's output at the subject's last token behind the empty prefix.
        each: ``(u, prefixes, d_in)``, the keys that ``keys`` is the mean of; ``None`` unless asked for.
        prompts: the layer's whole input and the mask of real tokens for the rows with the empty prefix, as a list of
            ``(requests, x (rows, seq, d_in), mask (rows, seq))``, what thresholds are calibrated on.
    """

    keys: torch.Tensor
    plain_keys: torch.Tensor
    hidden: torch.Tensor
    prompts: list[tuple[list[int], torch.Tensor, torch.Tensor]]
    each: torch.Tensor | None = None

    def peak_scores(self, layer: HookedLinear) -> torch.Tensor:
        """Every request's highest score over the tokens of its prompt, ``(u,)`` float64: the smallest threshold that still lets it
        use its edit (DESIGN §3, step 3)."""
        peaks: dict[int, torch.Tensor] = {}
        for requests, x, mask in self.prompts:
            peaks |= dict(zip(requests, layer.peak_scores(x, mask), strict=True))
        return torch.stack([peaks[n] for n in range(len(peaks))]).double()


@dataclass
class _Batch:
    """Rows that run together, and what an edited block left behind.

    Attributes:
        shared: number of tokens that run elsewhere, in the prefix they share.
        seen: which edited block it was, as an index of ``layers``; −1: none yet.
        before: hidden states before that block.
        after: hidden states after it, as it was then; ``x`` and ``y``: its projection's input and output.
    """

    rows: list[Row]
    inputs: dict[str, torch.Tensor]
    shared: list[int]
    seen: int = -1
    before: torch.Tensor | None = None
    after: torch.Tensor | None = None
    x: torch.Tensor | None = None
    y: torch.Tensor | None = None


class KeyReader:
    """Reads each edited layer of a batch once, in increasing order, between the edits of two layers.

    No block whose layer was read, or whose states a trace holds, runs again. After its layer is edited, the block's output
    is what it was plus what the layer's own output has changed by, because an MLP's output is added to the hidden state.
    Where a norm follows the layer (Gemma 2 and 3, OLMo 2; found out by a trial), the block runs again from its kept input.
    Rows with a context prefix serve keys only, so they run to the last layer's input; rows with the empty prefix go on to
    the value layer. What rows with a prefix begin with runs once for all of them (:class:`SharedPrefix`).

    Args:
        decoder: receives token ids and mask.
        blocks: all blocks of the model.
        layers: the edited blocks, increasing; the last one is the value layer.
        projections: their hooked layers, whose inputs are the keys.
        rows: :func:`rows.prompt_rows` of the batch.
        whole: run rows from end to end, where the scope of a token may depend on all others (zscore); otherwise rows
            with a prefix end at the subject's last token and share what they begin with.
        trace: a recording of the first edited block that holds these rows; what it holds is not run again.
        apart: also read the keys behind every prefix apart.
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
        trace: ActivationRecorder | None = None,
        apart: bool = False,
    ):
        self.apart, self.prefixes = apart, max(row.prefix for row in rows) + 1
        self.decoder, self.blocks, self.layers, self.projections = decoder, blocks, layers, projections
        self.count = max(row.request for row in rows) + 1
        self.form = None  # of a block's output; the first batches run whole blocks
        self.adds: bool | None = None  # whether a layer's output is added to the hidden state as it is
        self.batches: list[_Batch] = []
        behind = [row for row in rows if not row.plain]
        shared_prefix = SharedPrefix([] if whole else behind, pad_token, device)
        self.shared_prefix = shared_prefix
        launch = launch_tokens(blocks[layers[0] : layers[0] + 1], device)
        for chosen in ([row for row in rows if row.plain], behind):
            ends = [len(row.ids) if row.plain or whole else row.end for row in chosen]
            shared = shared_prefix.counts(chosen)
            own = [end - count for end, count in zip(ends, shared, strict=True)]
            for group in dense_batches(own, max_tokens, launch) if chosen else []:
                part, counts = [chosen[n] for n in group], [shared[n] for n in group]
                length = shared_prefix.length if any(counts) else 0
                inputs = own_inputs(part, [ends[n] for n in group], counts, length, pad_token, device)
                self.batches.append(_Batch(part, inputs, counts))
                self._recall(trace, self.batches[-1], part, counts, [ends[n] for n in group])
        self.beginnings: _Batch | None = None  # of the shared prefix
        if shared_prefix.length:
            self.beginnings = _Batch([], shared_prefix.inputs, [])
            if not all(batch.seen == 0 for batch in self.batches):
                trace = None  # some rows start from the first block, and need the keys and values of all
            some = [next(row for row in behind if row.prefix == prefix) for prefix in shared_prefix.place]
            self._recall(trace, self.beginnings, some, [0] * len(some), [len(ids) for ids in shared_prefix.ids])

    def _recall(self, trace: ActivationRecorder | None, batch: _Batch, rows: list[Row], first: list[int], ends: list[int]) -> None:
        """Take from the trace what this batch would show at the first edited block."""
        states = trace.padded(rows, first, ends) if trace is not None else None
        if states is not None:
            batch.seen, self.form = 0, trace.form
            for name in NAMES:
                setattr(batch, name, states[name])

    def read(self, number: int) -> LayerReading:
        """Keys of the layer ``layers[number]``, and hidden states of the model as it is now; once for each number."""
        keys, plain_keys, hidden, each, prompts = None, None, None, None, []
        counts = torch.zeros(self.count)
        before: Past | None = None  # what the shared prefix leaves
        for batch in self.batches:
            past = None
            if any(batch.shared) and batch.seen != number:
                if before is None:
                    before = Past({}, 0)
                    self._run(self.beginnings, number, before)
                shared = self.shared_prefix
                past = Past(shared.past(before.new, batch.rows), shared.length, shared.before(batch.rows))
            x, output = self._run(batch, number, past)
            requests = torch.tensor([row.request for row in batch.rows])
            index = torch.arange(len(batch.rows), device=x.device)
            last = [row.subject_last - count for row, count in zip(batch.rows, batch.shared, strict=True)]
            last = torch.tensor(last, device=x.device)
            own = x[index, last].to(torch.promote_types(x.dtype, torch.float32))
            keys = own.new_zeros(self.count, own.shape[1]) if keys is None else keys
            keys.index_add_(0, requests.to(own.device), own)
            counts.index_add_(0, requests, torch.ones(len(requests)))
            if self.apart:
                each = own.new_zeros(self.count, self.prefixes, own.shape[1]) if each is None else each
                each[requests.to(own.device), torch.tensor([row.prefix for row in batch.rows], device=own.device)] = own
            if output is not None:
                plain_keys = torch.zeros_like(keys) if plain_keys is None else plain_keys
                plain_keys[requests.to(own.device)] = own
                now = output[index.to(output.device), last.to(output.device)]
                now = now.to(torch.promote_types(now.dtype, torch.float32))
                hidden = now.new_zeros(self.count, now.shape[1]) if hidden is None else hidden
                hidden[requests.to(now.device)] = now
                prompts.append((requests.tolist(), x, batch.inputs["attention_mask"].bool()))
        return LayerReading(keys / counts[:, None].to(keys), plain_keys, hidden, prompts, each)

    def _run(self, batch: _Batch, number: int, past: Past | None) -> tuple[torch.Tensor, torch.Tensor | None]:
        """The layer's input ``(rows, seq, d_in)``, and for rows with the empty prefix the value layer's output."""
        final = number + 1 == len(self.layers)
        output = None
        if batch.seen < number:
            output = self._read(batch, number, past)
        elif any(row.plain for row in batch.rows):
            output = self._go_on(batch, number)
        x = batch.x
        if final:
            batch.before = batch.after = batch.x = batch.y = None
        return x, output

    def _read(self, batch: _Batch, number: int, past: Past | None) -> torch.Tensor | None:
        """Run a batch through the block of this layer, with an empty prefix to the value layer, whose output is returned."""
        plain, final = any(row.plain for row in batch.rows), number + 1 == len(self.layers)
        projection, block, output = self.projections[number], self.blocks[self.layers[number]], None
        inputs = batch.inputs if past is None else batch.inputs | {cache_name(self.decoder): past}
        start, _ = self._start(batch)
        with watched(block, projection) as seen, start:
            if final and not plain:
                run_until(self.decoder, projection, inputs, {}, before=True)
            else:
                output = self._output(self.blocks[self.layers[-1]] if plain else block, inputs)
        batch.seen = number
        for name, value in seen.hidden().items():
            setattr(batch, name, value)
        batch.x = batch.x.reshape(*batch.inputs["input_ids"].shape, -1)  # OPT flattens tokens before the MLP
        if self.adds is None and not final:
            self.adds = self._adds(batch, number)
        return output if plain else None

    def _go_on(self, batch: _Batch, number: int) -> torch.Tensor:
        """Run a batch from the block of this layer, which the trace shows, to the value layer and return its output."""
        if self.adds is None:
            self.adds = self._adds(batch, number)
        start, known = self._start(batch)
        if self.adds and number + 1 == len(self.layers):
            return known
        with start:
            return self._output(self.blocks[self.layers[-1]], batch.inputs)

    def _output(self, block: nn.Module, inputs: dict) -> torch.Tensor:
        """The hidden states after a block."""
        found = []
        run_until(self.decoder, block, inputs, {}, found.append)
        self.form = with_hidden(found[0], None)
        return hidden_of(found[0])

    @torch.no_grad()
    def _start(self, batch: _Batch):
        """A context in which runs start behind what is known of a batch, and the hidden states that they start from, for the
        model as it is now."""
        if batch.seen < 0:
            return contextlib.nullcontext(), None
        done = self.layers[batch.seen]
        if self.adds:
            mask = batch.inputs["attention_mask"][:, -batch.x.shape[1] :].bool()
            layer = self.projections[batch.seen]
            before = self.shared_prefix.before(batch.rows) if any(batch.shared) else None
            with layer.context.reading(batch.inputs["input_ids"], mask, before):
                now = layer(batch.x, mask=mask)
            hidden = batch.after + (now - batch.y.reshape(now.shape)).to(batch.after)
        elif done:
            done, hidden = done - 1, batch.before
        else:
            return contextlib.nullcontext(), None
        return resumed(self.blocks, done, lambda: hidden, self.form), hidden

    def _adds(self, batch: _Batch, number: int) -> bool:
        """Whether block ``layers[number]`` without its projection's output gives what that output is added to: a trial
        on one row."""
        row = lambda value: value[:1] if isinstance(value, torch.Tensor) else value  # noqa: E731
        inputs = {name: row(value) for name, value in batch.inputs.items()}
        index = self.layers[number]
        silent = self.projections[number].register_forward_hook(lambda module, args, out: torch.zeros_like(out))
        before = row(batch.before)
        start = resumed(self.blocks, index - 1, lambda: before, self.form) if index else contextlib.nullcontext()
        try:
            with start:
                output = self._output(self.blocks[index], inputs)
        finally:
            silent.remove()
        real = inputs["attention_mask"][:, -output.shape[1] :].bool().to(output.device)
        after = row(batch.after)[real]
        sum_ = (output + batch.y.reshape(*batch.after.shape[:2], -1)[:1])[real]
        return bool((sum_ - after).norm() <= torch.finfo(after.dtype).eps ** 0.5 * after.norm())


def subject_keys(
    decoder: nn.Module, layers: dict[str, nn.Module], rows: list[Row], pad_token: int, max_tokens: int, device
) -> dict[str, torch.Tensor]:
    """Every layer's input at the subject's last token of every row, ``(len(rows), d_in)``, of the model as it stands.

    Args:
        layers: in the order in which they run.
    """
    return inputs_at_ends(decoder, layers, [row.ids[: row.subject_last + 1] for row in rows], pad_token, max_tokens, device)
