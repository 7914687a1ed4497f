"""Rows of text after the value layer: what δ cannot reach is computed once, what it reaches at every step.

δ is added at the subject's last token after the value layer. Blocks up to there never see it, nor, causally, do the
tokens before it in any block. So a batch of rows runs once through the lower blocks (whole rows, because the scopes of
earlier edits may depend on every token), the earlier tokens once through the upper blocks, which leaves their keys and
values (:class:`Past`), and each step runs only the upper blocks on the tokens from the subject's last one to the last
position whose output is read.

Rows differ in where that is. Their pasts are aligned to the right and what follows to the left, so that both are dense::

    column      0 … P−1 (past)            P … P+S−1 (run at every step)
    row 1       ·  ·  The  mother         Marie  is      ·
    row 2       I  think  that  Mrs       Curie  speaks  the

Where a norm lies between the value layer's MLP and the hidden state (Gemma 2 and 3, OLMo 2), δ is added before it, to the
projection's output y: what the block adds is bounded there, whatever y is, and a hidden state outside that bound could be
found but not written. The hidden state changes by ``norm(y + δ) − norm(y)``.

The attention mask covers both sides, positions are given explicitly. This needs nothing of a family beyond
Transformers' cache and mask interface, and agrees with whole rows for:

    =============================================  =================================================
    families                                       earlier tokens
    =============================================  =================================================
    GPT-2, GPT-J, GPT-Neo (also local attention),  cached
    GPT-NeoX, OPT, Phi, Phi-3, Llama, Mistral,
    Qwen 2/2.5/3, Gemma 1/2/3 (sliding windows,
    soft caps), OLMo 2, Granite, SmolLM 3
    any other                                      cached if a trial on the first rows agrees with
                                                   whole rows, else run again at every step
    no ``position_ids`` (BLOOM, MPT)               run again at every step
    =============================================  =================================================
"""

from __future__ import annotations

import contextlib
import inspect
import logging
from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import nn

from comeba_ext.forward.activation_recorder import ActivationRecorder
from comeba_ext.forward.architectures import FAMILIES, Architecture
from comeba_ext.forward.budget import launch_tokens
from comeba_ext.forward.grouped_attention import can_group, grouped
from comeba_ext.forward.partial import hidden_of, only_at, resumed, run_until, watched, with_hidden
from comeba_ext.forward.past import Past, States, cache_name, right_aligned
from comeba_ext.forward.shared_prefix import SharedPrefix, can_share, own_inputs
from comeba_ext.text.encoding import dense_batches, input_device
from comeba_ext.text.rows import Row

log = logging.getLogger(__name__)


@dataclass
class Suffix:
    """The blocks above the value layer of a model, and how they are run.

    Args:
        model: the model.
        architecture: its parts.
        value_layer: index of the last block below.
        pad_token: id to pad with.
        max_tokens: padded tokens in one pass.
        trace: records what rows and contexts show at one of the blocks below, if given.
    """

    model: nn.Module
    architecture: Architecture
    value_layer: int
    pad_token: int
    max_tokens: int
    trace: ActivationRecorder | None = None

    def __post_init__(self) -> None:
        self.decoder = self.model.get_submodule(self.architecture.decoder)
        self.blocks = list(self.model.get_submodule(self.architecture.blocks))
        self.head = self.architecture.head(self.model)
        self.norm = self.architecture.after_norm(self.model, self.value_layer)
        self.projection = self.model.get_submodule(self.architecture.projection_name(self.value_layer))
        self.device = input_device(self.model)
        # Above the value layer nothing but the last block's MLP is read position by position. Parts of families in the
        # table are known; OPT's MLP has no module of its own.
        mlp = self.architecture.projection.rpartition(".")[0]
        known = self.model.config.model_type in FAMILIES and mlp and len(self.blocks) > self.value_layer + 1
        self.last_mlp = self.blocks[-1].get_submodule(mlp) if known else None
        below, above = self.blocks[: self.value_layer + 1], self.blocks[self.value_layer + 1 :]
        self.launch_below, self.launch = launch_tokens(below, self.device), launch_tokens(above, self.device, self.last_mlp)
        self.attention = grouped if can_group(self.decoder) else contextlib.nullcontext  # of the decoder
        self.whole = True  # run every token at every step
        self.contexts: SharedPrefix | None = None
        self.context_states: States = {}

    def prepare(self, rows: list[Row]) -> None:
        """Find out whether earlier tokens can be cached, and run what rows have in common; ``rows``: all to come."""
        self.whole = not self.caches(rows)
        contexts = SharedPrefix(rows, self.pad_token, self.device)
        if self.whole or not contexts.length or not can_share(self.model):
            return
        past = Past({}, 0)
        with torch.no_grad(), self.only_states(), self.recorded(ActivationRecorder.contexts, dict(zip(contexts.place, contexts.ids))):
            self.decoder(**contexts.inputs, **{cache_name(self.decoder): past}, use_cache=True)
        self.contexts, self.context_states = contexts, past.new

    def only_states(self):
        """Inside, runs serve their keys and values, to which the last block's MLP adds nothing: it does not run."""
        nowhere = torch.zeros(0, dtype=torch.long, device=self.device)
        return contextlib.nullcontext() if self.last_mlp is None else only_at(self.last_mlp, (nowhere, nowhere))

    def recorded(self, what: Callable, *args):
        """Inside, ``what`` of the trace, if there is one."""
        return contextlib.nullcontext() if self.trace is None else what(self.trace, *args)

    def caches(self, rows: list[Row]) -> bool:
        """Whether this model can run the end of a row from cached keys and values; see the table above."""
        if "position_ids" not in inspect.signature(self.decoder.forward).parameters:
            return False
        config = self.model.config
        if config.model_type in FAMILIES and getattr(config, "_attn_implementation", None) in ("eager", "sdpa"):
            return True
        trial = sorted(rows, key=lambda row: len(row.ids))[:: max(1, len(rows) - 1)]  # the shortest and the longest
        try:
            with torch.no_grad():
                ends = []
                for self.whole in (True, False):
                    ends.append(CachedRows(self, trial).read_last())
        except Exception as error:
            log.info("%s: earlier tokens are run again at every step (%s)", config.model_type, error)
            return False
        difference = ((ends[0] - ends[1]).norm() / ends[0].norm()).item()
        if not difference <= 0.5 * torch.finfo(ends[0].dtype).eps ** 0.5:
            log.info("%s: earlier tokens are run again at every step (cached: off by %.1e)", config.model_type, difference)
            return False
        return True


class CachedRows:
    """A batch of rows, prepared to be run above the value layer any number of times.

    Args:
        suffix: the blocks to run.
        rows: the rows.

    Attributes:
        rows: the rows, in the order in which they are kept.
        h: ``(rows, d_model)``, what δ is added to at the subject's last token: the value layer's output, or its projection's
            where a norm follows that.
        starts: ``(rows,)``, the first token that is run at every step.
        at: ``(rows,)``, the column of the subject's last token among those.
    """

    def __init__(self, suffix: Suffix, rows: list[Row]):
        self.suffix, device = suffix, suffix.device
        shared = [0] * len(rows) if suffix.contexts is None else suffix.contexts.counts(rows)
        own = [len(row.ids) - count for row, count in zip(rows, shared, strict=True)]
        chunks = dense_batches(own, suffix.max_tokens, suffix.launch_below)
        self.rows = [rows[n] for chunk in chunks for n in chunk]
        starts = [0 if suffix.whole else row.subject_last for row in self.rows]
        self.starts = torch.tensor(starts, device=device)
        self.at = torch.tensor([row.subject_last for row in self.rows], device=device) - self.starts
        past, width = max(starts), max(row.end - start for row, start in zip(self.rows, starts, strict=True))
        base, states, outputs = [], [], []
        for part in torch.arange(len(rows), device=device).split([len(chunk) for chunk in chunks]):
            below, kept, output = self._prepare([self.rows[n] for n in part.tolist()], self.starts[part], past, width)
            base.append(below)
            states.append(kept)
            outputs.append(output)
        self.base = torch.cat(base)  # (rows, S, d_model)
        self.past = None
        if past:
            joined = {n: tuple(map(torch.cat, zip(*(s[n] for s in states), strict=True))) for n in states[0]}
            self.past = Past(joined, past)
        self.h = self.base[self._index(), self.at.to(self.base.device)] if suffix.norm is None else torch.cat(outputs)
        self.inputs = own_inputs(self.rows, [row.end for row in self.rows], starts, past, suffix.pad_token, device)
        # Padding after a row is not masked: no earlier token sees it, and its own softmax must be over something.
        self.inputs["attention_mask"][:, past:] = 1

    def run(self, shift: torch.Tensor, read: tuple[torch.Tensor, torch.Tensor]) -> torch.Tensor:
        """The decoder's output at some positions, with a shift of the hidden state at the subject's last token.

        Args:
            shift: ``(rows, d_model)``.
            read: rows and columns of the positions, each ``(n,)``.

        Returns:
            ``(n, d_model)``.
        """

        def hidden() -> torch.Tensor:
            spread = torch.zeros_like(self.base)
            moved = shift if suffix.norm is None else suffix.norm(self.h + shift.to(self.h)) - suffix.norm(self.h)
            spread[self._index(), self.at.to(spread.device)] = moved.to(spread)
            return self.base + spread

        suffix = self.suffix
        cache = {"use_cache": False} if self.past is None else {cache_name(suffix.decoder): self.past, "use_cache": True}
        few = suffix.last_mlp is not None and 2 * len(read[0]) < self.base.shape[0] * self.base.shape[1]
        with resumed(suffix.blocks, suffix.value_layer, hidden, self.form):
            with only_at(suffix.last_mlp, read) if few else contextlib.nullcontext(), suffix.attention(suffix.decoder):
                out = suffix.decoder(**self.inputs, **cache)[0]
        return out[tuple(i.to(out.device) for i in read)]

    def columns(self) -> list[list[int]]:
        """For every row, the columns of :meth:`run`'s output whose next token is a target token."""
        return [[p - start for p in row.predicts] for row, start in zip(self.rows, self.starts.tolist(), strict=True)]

    def keep(self, chosen: list[int]) -> None:
        """Drop all rows but these."""
        index = torch.tensor(chosen, device=self.base.device)
        self.rows = [self.rows[n] for n in chosen]
        self.base, self.h = self.base[index], self.h[index]
        self.at, self.starts = self.at[index.to(self.at.device)], self.starts[index.to(self.starts.device)]
        self.inputs = {name: value[index.to(value.device)] for name, value in self.inputs.items()}
        self.past = None if self.past is None else self.past.rows(index)

    def read_last(self) -> torch.Tensor:
        """Every row's output at its last position, with no shift: ``(rows, d_model)``."""
        last = torch.tensor([row.end - 1 for row in self.rows], device=self.starts.device) - self.starts
        return self.run(torch.zeros_like(self.h), (self._index(), last))

    def _index(self) -> torch.Tensor:
        return torch.arange(len(self.rows), device=self.base.device)

    @torch.no_grad()
    def _prepare(self, rows: list[Row], starts: torch.Tensor, past: int, width: int) -> tuple[torch.Tensor, States, torch.Tensor | None]:
        """One pass over rows up to the value layer, and over the tokens before their starts above it.

        Returns:
            hidden states after the value layer from every row's start on, ``(rows, width, d_model)``; keys and values
            of the tokens before, right-aligned in ``past`` columns; with a norm behind the MLP, the projection's output at
            the subject's last token, ``(rows, d_model)``.
        """
        suffix, caught, contexts = self.suffix, {}, self.suffix.contexts
        shared = [0] * len(rows) if contexts is None else contexts.counts(rows)
        length = 0 if contexts is None else contexts.length
        states = contexts.past(suffix.context_states, rows) if length else {}
        inputs = own_inputs(rows, [len(row.ids) for row in rows], shared, length, suffix.pad_token, suffix.device)
        block = suffix.blocks[suffix.value_layer]
        cache = {cache_name(suffix.decoder): Past(states, length, contexts.before(rows))} if length else {}
        with suffix.recorded(ActivationRecorder.rows, rows, shared), watched(block, suffix.projection) as seen:
            run_until(suffix.decoder, block, inputs | cache, {}, lambda output: caught.__setitem__("output", output))
        self.form = with_hidden(caught["output"], None)
        hidden = hidden_of(caught["output"])
        output = None
        if suffix.norm is not None:
            last = [row.subject_last - count for row, count in zip(rows, shared, strict=True)]
            output = seen["y"].reshape(hidden.shape)[torch.arange(len(rows)), last]
        real = inputs["attention_mask"][:, length:].bool().to(hidden.device)
        hidden = hidden.masked_fill(~real[..., None], 0)
        first = torch.tensor(shared, device=suffix.device)
        base = _columns(hidden, starts - first, width)
        if not past:
            return base, {}, output
        before = max(1, int((starts - first).max()))
        inputs = {name: value[:, :before] for name, value in inputs.items() if name != "attention_mask"} | {
            "attention_mask": inputs["attention_mask"][:, : length + before].clone()
        }
        inputs["attention_mask"][:, length:] = 1
        own = Past(states, length)
        with resumed(suffix.blocks, suffix.value_layer, lambda: hidden[:, :before], self.form), suffix.only_states():
            suffix.decoder(**inputs, **{cache_name(suffix.decoder): own}, use_cache=True)

        def whole(before: torch.Tensor | None, after: torch.Tensor) -> torch.Tensor:
            together = after if before is None else torch.cat((before.to(after), after), -2)
            return right_aligned(together, length - first, starts, past)

        none = (None, None)
        return base, {n: tuple(map(whole, states.get(n, none), new)) for n, new in own.new.items()}, output


def _columns(states: torch.Tensor, starts: torch.Tensor, width: int) -> torch.Tensor:
    """``width`` columns of every row from its start on, the last one repeated: ``(rows, width, d)``."""
    index = starts.to(states.device)[:, None] + torch.arange(width, device=states.device)
    return states.gather(1, index.clamp(max=states.shape[1] - 1)[..., None].expand(-1, -1, states.shape[2]))
