"""Target values ``v*``: the hidden state that makes the model say the new object (paper section 3.1, DESIGN §3 step 1).

For every request, ``v* = h + δ`` where δ, added at the subject's last token after the value layer in every row,
minimises

    mean over prefixes and wordings of NLL(new object) + end_factor · NLL(it ends there)
    + kl_factor · KL("{subject} is a") + weight_decay · ‖δ‖/‖h‖²

with ‖δ‖ ≤ clamp · ‖h‖, until the loss falls below ``early_stop``, or ``lead_steps`` after the new object has come to lead
everywhere (ENCORE, arXiv 2502.01636). Polyak's few long steps sometimes end where the new object does not lead; such a
request is tried again with Adam, from zero, and where that does not help either, without asking for the end. Requests never
meet in this objective, so a batch of them is optimised at once, with the result each would have alone. What δ cannot reach
is computed once (:mod:`cached_suffix`), logits only where they are read, and a request that is done leaves the batch.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass, field
from operator import mul

import torch
from torch import nn
from torch.nn import functional as F

from comeba_ext.editing.config import EditConfig
from comeba_ext.editing.optimisers import OPTIMISERS, Descent
from comeba_ext.errors import ArchitectureError, RequestError
from comeba_ext.forward.activation_recorder import ActivationRecorder
from comeba_ext.forward.architectures import Architecture, context_length
from comeba_ext.forward.budget import token_budget
from comeba_ext.forward.cached_suffix import CachedRows, Suffix
from comeba_ext.forward.half_compute import products_behind
from comeba_ext.forward.partial import frozen
from comeba_ext.text.encoding import dense_batches, pad_id
from comeba_ext.text.ends import end_tokens
from comeba_ext.text.rows import Row, check_length, essence_rows, target_rows


@dataclass
class TargetValues:
    """Result of the optimisation.

    Attributes:
        values: ``v*``, ``(u, d_model)`` in float32 or better.
        losses: final loss of every request.
        steps: optimiser steps every request took.
    """

    values: torch.Tensor
    losses: list[float] = field(default_factory=list)
    steps: list[int] = field(default_factory=list)


def checked_values(values: torch.Tensor, count: int, width: int) -> torch.Tensor:
    """Target values that were given: ``(count, width)``, finite.

    Raises:
        RequestError: they are anything else.
    """
    if not isinstance(values, torch.Tensor):
        raise RequestError(f"target_values must be a tensor, got {type(values).__name__}")
    if tuple(values.shape) != (count, width):
        raise RequestError(f"target_values are {tuple(values.shape)}, expected {(count, width)}")
    if not torch.isfinite(values).all():
        raise RequestError("target_values have NaN or infinite entries")
    return values


def optimise_target_values(
    model: nn.Module,
    tokenizer,
    architecture: Architecture,
    config: EditConfig,
    requests: list,
    prefixes: list[str],
    on_progress: Callable[[int, float], None] = lambda done, loss: None,
    trace: ActivationRecorder | None = None,
    together: list[list[int]] | None = None,
) -> TargetValues:
    """Target values of a batch against the model as it stands (validated hooks active).

    Args:
        together: groups of request numbers, each number in one, that share one δ, found for all their rows: facts of one
            subject, whose keys are nearly the same, so that values found apart would overwrite each other. Where no δ serves
            all of a group (they contradict each other), each has its own after all. Default: none share.
        prefixes: from :func:`prefixes.sample_prefixes`, the empty one first.
        on_progress: called after every step with the number of requests that are done and the mean loss of those begun.
        trace: records what the rows show at an edited block, for :class:`keys.KeyReader`.

    Raises:
        RequestError: a row is longer than the model's context, or an optimisation ended in NaN.
        ArchitectureError: the model's layers pass no gradients back.
    """
    rows = target_rows(tokenizer, requests, prefixes, wordings=True, whole=config.end_factor > 0, chat=config.chat)
    over = torch.tensor(end_tokens(tokenizer) if config.end_factor else [], dtype=torch.long, device=model.device)
    essence = essence_rows(tokenizer, requests)
    check_length(rows + essence, requests, context_length(model))
    together = [[n] for n in range(len(requests))] if together is None else together
    of_request: list[list[Row]] = [[] for _ in requests]
    for row in rows:
        of_request[row.request].append(row)
    budget = token_budget(model, config.max_tokens)
    suffix = Suffix(model, architecture, config.value_layer, pad_id(tokenizer), budget, trace)
    results: list[tuple[torch.Tensor, float, int, bool] | None] = [None] * len(requests)

    def solve(
        groups: list[list[int]], optimiser: str, progress: Callable[[int, float], None] = lambda done, loss: None, ends: bool = True
    ) -> None:
        """Values of groups of requests, with what is asked of their ends or without; where there are some already, the better ones
        stay."""
        by_group = [[row for n in group for row in of_request[n]] + [essence[group[0]]] for group in groups]
        done, losses = 0, 0.0
        for chosen in _dense(by_group, suffix.max_tokens):
            sizes = [len(groups[k]) for k in chosen]

            def on_step(open_: torch.Tensor, loss: torch.Tensor, done=done, losses=losses, sizes=sizes) -> None:
                closed = sum(size for size, still in zip(sizes, open_.tolist(), strict=True) if not still)
                progress(done + closed, (losses + sum(map(mul, sizes, loss.tolist()))) / (done + sum(sizes)))

            descent = Descent(_Objective(suffix, config, [by_group[k] for k in chosen], over if ends else None), config, on_step)
            OPTIMISERS[optimiser](descent)
            for n, value, loss, steps, leads in _found(descent, [groups[k] for k in chosen]):
                known = results[n]
                if known is not None and not (leads or loss < known[1]):
                    value, loss = known[:2]
                results[n] = (value, loss, steps + (known[2] if known else 0), leads)
                done, losses = done + 1, losses + loss
            progress(done, losses / done)

    def missed(groups: list[list[int]]) -> list[list[int]]:
        """Those in whose rows the new object does not lead."""
        return [group for group in groups if not all(results[n][3] for n in group) and math.isfinite(results[group[0]][1])]

    with frozen(model), products_behind(config.value_layer, model, suffix.blocks, config.compute_dtype):
        suffix.prepare(rows + essence)
        solve(together, config.optimizer, on_progress)
        second = config.optimizer == "polyak" and config.steps > 1
        if second:
            solve(missed(together), "adam")
        apart = [[n] for group in missed(together) if len(group) > 1 for n in group]  # facts that contradict each other
        if apart:
            for (n,) in apart:
                results[n] = None
            solve(apart, config.optimizer)
            if second:
                solve(missed(apart), "adam")
        if config.end_factor and second:  # an object that leads and goes on is better than none
            left = [group for group in together if not {n for (n,) in apart} & set(group)] + apart
            solve(missed(left), config.optimizer, ends=False)
            solve(missed(left), "adam", ends=False)
    bad = [requests[n].text for n, (value, loss, *_) in enumerate(results) if not (torch.isfinite(value).all() and math.isfinite(loss))]
    if bad:
        raise RequestError(f"target values are not finite for {len(bad)} requests, first {bad[0]!r}; lower the learning rate")
    return TargetValues(torch.stack([r[0] for r in results]), [r[1] for r in results], [r[2] for r in results])


def _found(descent: Descent, groups: list[list[int]]):
    """``(request, value, loss, steps, whether the target leads)`` of every request of the groups."""
    per_group = zip(groups, descent.delta, descent.losses.tolist(), descent.steps.tolist(), descent.leads.tolist(), strict=True)
    for group, delta, *rest in per_group:
        for n in group:
            yield n, descent.objective.hidden[n] + delta, *rest


def _dense(by_group: list[list[Row]], max_tokens: int) -> list[list[int]]:
    """Which groups run together: with like numbers of tokens to run at every step, and at most ``max_tokens``."""
    tokens = [len(rows) * max(len(row.ids) for row in rows) for rows in by_group]
    width = [max(row.end - row.subject_last for row in rows) for rows in by_group]
    groups: list[list[int]] = []
    total = 0
    for n in sorted(range(len(by_group)), key=lambda n: (width[n], tokens[n])):
        total += tokens[n]
        if groups and total <= max_tokens:
            groups[-1].append(n)
        else:
            groups.append([n])
            total = tokens[n]
    return groups


class _Objective:
    """The losses of groups of requests as functions of each group's δ; an :class:`optimisers.Objective`, whose "requests" are
    these groups.

    Attributes:
        hidden: request number to its own ``h``, in float32 or better; ``h``: the first request's of each group.
    """

    def __init__(self, suffix: Suffix, config: EditConfig, by_request: list[list[Row]], ends: torch.Tensor | None = None):
        self.config = config
        owned = [(n, row) for n, rows in enumerate(by_request) for row in rows]
        lengths = [row.end - (0 if suffix.whole else row.subject_last) for _, row in owned]
        groups = dense_batches(lengths, suffix.max_tokens, suffix.launch)
        self.parts = [_Part(suffix, config, [owned[i] for i in group], by_request, ends) for group in groups]
        self.hidden = {n: h.to(torch.promote_types(h.dtype, torch.float32)) for part in self.parts for n, h in part.plain_states()}
        self.h = torch.stack([self.hidden[rows[0].request] for rows in by_request])  # (u, d_model)
        self.rows = torch.tensor([sum(bool(row.target) for row in rows) for rows in by_request], device=self.h.device)
        self.leads = torch.zeros(len(by_request), dtype=torch.bool, device=self.h.device)

    def evaluate(self, delta: torch.Tensor, gradient: bool) -> tuple[torch.Tensor, torch.Tensor | None]:
        square = self.h.norm(dim=-1) ** 2
        size = delta.norm(dim=-1)
        loss = self.config.weight_decay * size / square
        slope = self.config.weight_decay * delta / (size.clamp(min=torch.finfo(size.dtype).tiny) * square)[:, None]
        leading = torch.zeros_like(self.rows)
        for part in self.parts:  # one graph at a time
            with torch.set_grad_enabled(gradient):
                own = delta.detach().requires_grad_(gradient)
                share = part.losses(own)
                if gradient:
                    slope = slope + _gradient(share.sum(), own)
            loss = loss + share.detach()
            leading += part.leading
        self.leads = leading == self.rows
        return loss, slope if gradient else None

    def close(self, requests: torch.Tensor) -> None:
        closed = requests.nonzero().flatten().tolist()
        for part in self.parts:
            part.close(set(closed))
        self.parts = [part for part in self.parts if part.owners]


def _gradient(loss: torch.Tensor, delta: torch.Tensor) -> torch.Tensor:
    found = torch.autograd.grad(loss, delta, allow_unused=True)[0] if loss.requires_grad else None
    if found is None:
        raise ArchitectureError(
            "the model's layers pass no gradients back (int8 kernels, such as dynamic quantisation's, do not); edit the model "
            "before it is quantised, then load_edits into the quantised one"
        )
    return found


class _Part:
    """One dense batch of rows and what its outputs contribute to the losses of their requests."""

    def __init__(self, suffix: Suffix, config: EditConfig, owned: list[tuple[int, Row]], by_request: list, ends: torch.Tensor | None):
        self.ends = ends  # ids of the tokens that end an object
        owner = {id(row): n for n, row in owned}
        self.rows = CachedRows(suffix, [row for _, row in owned])
        self.owners = [owner[id(row)] for row in self.rows.rows]  # request of every row, in the continuation's order
        self.head, self.config = suffix.head, config
        self.row_counts = [sum(bool(row.target) for row in rows) for rows in by_request]
        self.before: torch.Tensor | None = None  # (essence rows, vocab)
        self._index()

    def plain_states(self):
        """``(request, h)`` of the rows with the empty prefix."""
        return [(row.request, h) for row, h in zip(self.rows.rows, self.rows.h, strict=True) if row.plain]

    def losses(self, delta: torch.Tensor) -> torch.Tensor:
        """This part's share of every request's loss, ``(u,)``, without weight decay."""
        logits = self.head(self.rows.run(delta[self.owner], self.read)).to(delta.device)
        logits = logits.to(torch.promote_types(logits.dtype, delta.dtype))
        tokens, closed = len(self.target), len(self.target) + self.closing
        loss = torch.zeros(len(delta), dtype=logits.dtype, device=delta.device)
        self.leading = torch.zeros(len(delta), dtype=torch.long, device=delta.device)  # rows in which the target leads
        if tokens:  # mean over a row's target tokens, then over a request's rows
            nll = F.cross_entropy(logits[:tokens], self.target, reduction="none")
            loss = loss.index_add(0, self.loss_owner[:tokens], nll * self.share.to(nll))
            right = (logits[:tokens].argmax(-1) == self.target).long()
            if self.closing:  # the mass of all tokens that end it, whichever
                over = F.log_softmax(logits[tokens:closed], dim=-1)[:, self.ends.to(logits.device)].logsumexp(-1)
                loss = loss.index_add(0, self.loss_owner[tokens:closed], -over * self.end_share.to(over))
                right = torch.cat((right, (over > math.log(0.5)).long()))
            rows = torch.ones(len(self.owner), dtype=torch.long, device=delta.device)
            rows = rows.scatter_reduce(0, self.read[0][:closed].to(rows.device), right, "amin")
            self.leading.index_add_(0, self.owner.to(delta.device), rows * self.targeted)
        if closed < len(logits):
            # KL(now ‖ before) at the subject's last token of the essence row; before: the first evaluation, at δ = 0.
            now = F.log_softmax(logits[closed:], dim=-1)
            if self.before is None:
                self.before = now.detach()
            divergence = (now.exp() * (now - self.before)).sum(-1)
            loss = loss.index_add(0, self.loss_owner[closed:], self.config.kl_factor * divergence)
        return loss

    def close(self, requests: set[int]) -> None:
        """Drop the rows of these requests."""
        kept = [n for n, owner in enumerate(self.owners) if owner not in requests]
        if len(kept) == len(self.owners):
            return
        if self.before is not None:
            essence = [owner for owner, row in zip(self.owners, self.rows.rows, strict=True) if not row.target]
            self.before = self.before[[n for n, owner in enumerate(essence) if owner not in requests]]
        self.owners = [self.owners[n] for n in kept]
        if kept:
            self.rows.keep(kept)
            self._index()

    def _index(self) -> None:
        """Where in the output to read logits: first all target tokens, then what comes behind them, then the essence rows."""
        rows, device = self.rows.rows, self.rows.h.device
        read = [(n, column) for n, columns in enumerate(self.rows.columns()) for column in columns]
        behind = [(n, columns[-1] + 1) for n, columns in enumerate(self.rows.columns()) if rows[n].whole]
        behind = behind if self.ends is not None else []
        self.closing = len(behind)
        essence = [(n, column) for n, column in enumerate(self.rows.at.tolist()) if not rows[n].target]
        at = torch.tensor(read + behind + essence, device=device)
        self.read = (at[:, 0], at[:, 1])
        self.owner = torch.tensor(self.owners, device=device)
        self.loss_owner = self.owner[at[:, 0]]
        self.targeted = torch.tensor([bool(row.target) for row in rows], device=device).long()
        self.target = torch.tensor([token for row in rows for token in row.target], dtype=torch.long, device=device)
        share = [1 / len(row.target) / self.row_counts[n] for n, row in zip(self.owners, rows, strict=True) for _ in row.target]
        self.share = torch.tensor(share, dtype=torch.float64, device=device)
        end_share = [self.config.end_factor / self.row_counts[self.owners[n]] for n, _ in behind]
        self.end_share = torch.tensor(end_share, dtype=torch.float64, device=device)
