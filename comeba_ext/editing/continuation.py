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

import inspect
import logging
from dataclasses import dataclass

import torch
from torch import nn

from comeba_ext.architectures import FAMILIES, Architecture
from comeba_ext.editing.encoding import dense_batches
from comeba_ext.editing.rows import Row, batch_inputs
from comeba_ext.partial_forward import hidden_of, resumed, run_until, with_hidden
from comeba_ext.past import Past, Recorder, right_aligned

log = logging.getLogger(__name__)


@dataclass
class Upper:
    """The blocks above the value layer of a model, and how they are run.

    Args:
        model: the model.
        architecture: its parts.
        value_layer: index of the last block below.
        pad_token: id to pad with.
        max_tokens: padded tokens in one pass.
    """

    model: nn.Module
    architecture: Architecture
    value_layer: int
    pad_token: int
    max_tokens: int

    def __post_init__(self) -> None:
        self.decoder = self.model.get_submodule(self.architecture.decoder)
        self.blocks = list(self.model.get_submodule(self.architecture.blocks))
        self.head = self.architecture.head(self.model)
        self.device = self.model.get_input_embeddings().weight.device

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
                ends = [Continuation(self, trial, whole).read_last() for whole in (True, False)]
        except Exception as error:
            log.info("%s: earlier tokens are run again at every step (%s)", config.model_type, error)
            return False
        difference = ((ends[0] - ends[1]).norm() / ends[0].norm()).item()
        if not difference <= 0.5 * torch.finfo(ends[0].dtype).eps ** 0.5:
            log.info("%s: earlier tokens are run again at every step (cached: off by %.1e)", config.model_type, difference)
            return False
        return True


class Continuation:
    """A batch of rows, prepared to be run above the value layer any number of times.

    Args:
        upper: the blocks to run.
        rows: the rows.
        whole: run every token at every step.

    Attributes:
        rows: the rows in it.
        h: ``(rows, d_model)``, the value layer's output at the subject's last token.
    """

    def __init__(self, upper: Upper, rows: list[Row], whole: bool = False):
        self.upper, device = upper, upper.device
        chunks = dense_batches([len(row.ids) for row in rows], upper.max_tokens, device)
        self.rows = [rows[n] for chunk in chunks for n in chunk]
        starts = [0 if whole else row.subject_last for row in self.rows]
        self.starts = torch.tensor(starts, device=device)
        self.at = torch.tensor([row.subject_last for row in self.rows], device=device) - self.starts
        past, width = max(starts), max(row.end - start for row, start in zip(self.rows, starts, strict=True))
        base, states = [], []
        for part in torch.arange(len(rows), device=device).split([len(chunk) for chunk in chunks]):
            below = self._below(part)
            base.append(_columns(below, self.starts[part], width))
            if past:
                states.append(self._past(part, below, past))
        self.base = torch.cat(base)  # (rows, S, d_model)
        self.past = None
        if past:
            self.past = Past({n: tuple(map(torch.cat, zip(*(s[n] for s in states), strict=True))) for n in states[0]})
        self.h = self.base[self._index(), self.at.to(self.base.device)]
        self.inputs = self._inputs(past, width)

    def run(self, shift: torch.Tensor) -> torch.Tensor:
        """The decoder's output ``(rows, S, d_model)`` with ``shift (rows, d_model)`` added at the subject's last token."""

        def hidden() -> torch.Tensor:
            spread = torch.zeros_like(self.base)
            spread[self._index(), self.at.to(spread.device)] = shift.to(spread)
            return self.base + spread

        upper = self.upper
        with resumed(upper.blocks, upper.value_layer, hidden, self.form):
            if self.past is None:
                return upper.decoder(**self.inputs, use_cache=False)[0]
            return upper.decoder(**self.inputs, past_key_values=self.past, use_cache=True)[0]

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
        out = self.run(torch.zeros_like(self.h))
        last = torch.tensor([row.end - 1 for row in self.rows], device=out.device) - self.starts.to(out.device)
        return out[self._index().to(out.device), last]

    def _index(self) -> torch.Tensor:
        return torch.arange(len(self.rows), device=self.base.device)

    @torch.no_grad()
    def _below(self, part: torch.Tensor) -> torch.Tensor:
        """Hidden states of whole rows after the value layer, ``(rows, seq, d_model)``; ``part``: indices of rows."""
        upper, caught = self.upper, {}
        inputs = batch_inputs([self.rows[n] for n in part.tolist()], upper.pad_token, upper.device)
        block = upper.blocks[upper.value_layer]
        run_until(upper.decoder, block, inputs, {}, lambda output: caught.__setitem__("output", output))
        self.form = with_hidden(caught["output"], None)
        hidden = hidden_of(caught["output"])
        return hidden.masked_fill(~inputs["attention_mask"].bool().to(hidden.device)[..., None], 0)

    @torch.no_grad()
    def _past(self, part: torch.Tensor, below: torch.Tensor, length: int) -> dict:
        """Keys and values of the tokens before every row's start in all upper layers, right-aligned in ``length``."""
        upper, counts = self.upper, self.starts[part]
        width = max(1, int(counts.max()))
        inputs = batch_inputs([self.rows[n] for n in part.tolist()], upper.pad_token, upper.device)
        ids = inputs["input_ids"][:, :width]
        recorder = Recorder()
        with resumed(upper.blocks, upper.value_layer, lambda: below[:, :width], self.form):
            upper.decoder(input_ids=ids, attention_mask=torch.ones_like(ids), past_key_values=recorder, use_cache=True)
        return {n: tuple(right_aligned(s, counts, length) for s in states) for n, states in recorder.seen.items()}

    def _inputs(self, past: int, width: int) -> dict[str, torch.Tensor]:
        """Ids ``(rows, S)``, mask ``(rows, P+S)`` and positions ``(rows, S)`` of the part that is run at every step.

        Padding after a row is not masked: no earlier token sees it, and it sees something, so that its own softmax is
        defined.
        """
        device = self.upper.device
        ids = torch.full((len(self.rows), width), self.upper.pad_token)
        for n, (row, start) in enumerate(zip(self.rows, self.starts.tolist(), strict=True)):
            ids[n, : row.end - start] = torch.tensor(row.ids[start : row.end])
        count = torch.tensor([row.end for row in self.rows], device=device) - self.starts
        before = torch.arange(past, device=device) >= (past - self.starts)[:, None]
        mask = torch.cat((before, torch.ones_like(ids, dtype=torch.bool, device=device)), 1).long()
        inputs = {"input_ids": ids.to(device), "attention_mask": mask}
        if past:
            # Padding repeats the last position, so that a table of positions is never left.
            inputs["position_ids"] = self.starts[:, None] + torch.arange(width, device=device).minimum(count[:, None] - 1)
        return inputs


def _columns(states: torch.Tensor, starts: torch.Tensor, width: int) -> torch.Tensor:
    """``width`` columns of every row from its start on, the last one repeated: ``(rows, width, d)``."""
    index = starts.to(states.device)[:, None] + torch.arange(width, device=states.device)
    return states.gather(1, index.clamp(max=states.shape[1] - 1)[..., None].expand(-1, -1, states.shape[2]))
