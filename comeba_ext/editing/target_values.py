"""Target values ``v*``: the hidden state that makes the model say the new object (paper section 3.1, DESIGN §3 step 1).

For every request, ``v* = h + δ`` where δ, added at the subject's last token after the value layer in every row,
minimises

    mean over prefixes of NLL(new object) + kl_factor · KL("{subject} is a") + weight_decay · ‖δ‖/‖h‖²

by Adam, projected onto ‖δ‖ ≤ clamp · ‖h‖, until the loss falls below ``early_stop``. Requests never meet in this
objective, so a batch of them is optimised at once, with the result each would have alone. Blocks up to the value layer
run once: δ cannot reach them.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass, field

import torch
from torch import nn
from torch.nn import functional as F

from comeba_ext.architectures import Architecture, context_length
from comeba_ext.editing.config import EditConfig
from comeba_ext.editing.encoding import pad_id
from comeba_ext.editing.rows import Row, batch_inputs, check_length, essence_rows, target_rows
from comeba_ext.errors import RequestError
from comeba_ext.partial_forward import hidden_of, resumed


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


def optimise_target_values(
    model: nn.Module,
    tokenizer,
    architecture: Architecture,
    config: EditConfig,
    requests: list,
    prefixes: list[str],
    on_progress: Callable[[int, float], None] = lambda done, loss: None,
) -> TargetValues:
    """Target values of a batch against the model as it stands (validated hooks active).

    Args:
        prefixes: from :func:`prefixes.sample_prefixes`, the empty one first.
        on_progress: called with the number of requests finished and the mean loss.

    Raises:
        RequestError: a row is longer than the model's context, or an optimisation ended in NaN.
    """
    rows = target_rows(tokenizer, requests, prefixes)
    essence = essence_rows(tokenizer, requests)
    check_length(rows + essence, requests, context_length(model))
    by_request = [[row for row in rows if row.request == n] + [essence[n]] for n in range(len(requests))]
    results: list[tuple[torch.Tensor, float, int] | None] = [None] * len(requests)
    done = 0
    for group in _request_groups(by_request, config.max_tokens):
        group_rows = [row for n in group for row in by_request[n]]
        problem = _Problem(model, architecture, config, group_rows, group, pad_id(tokenizer))
        for n, result in zip(group, problem.solve(), strict=True):
            results[n] = result
        done += len(group)
        on_progress(done, sum(r[1] for r in results if r is not None) / done)
    bad = [
        requests[n].text
        for n, (value, loss, _) in enumerate(results)
        if not (torch.isfinite(value).all() and math.isfinite(loss))
    ]
    if bad:
        raise RequestError(f"target values are not finite for {len(bad)} requests, first {bad[0]!r}; lower the learning rate")
    return TargetValues(torch.stack([r[0] for r in results]), [r[1] for r in results], [r[2] for r in results])


def _request_groups(by_request: list[list[Row]], max_tokens: int) -> list[list[int]]:
    """Requests of like length together, all rows of a request in one group."""
    longest = [max(len(row.ids) for row in rows) for rows in by_request]
    groups: list[list[int]] = []
    rows_in_group = 0
    for n in sorted(range(len(by_request)), key=longest.__getitem__):
        rows_in_group += len(by_request[n])
        if groups and rows_in_group * longest[n] <= max_tokens:
            groups[-1].append(n)
        else:
            groups.append([n])
            rows_in_group = len(by_request[n])
    return groups


class _Problem:
    """The optimisation of one group of requests, all rows in one batch."""

    def __init__(self, model, architecture: Architecture, config: EditConfig, rows: list[Row], group: list[int], pad_token: int):
        self.config = config
        self.decoder = model.get_submodule(architecture.decoder)
        self.head = architecture.head(model)
        self.blocks = list(model.get_submodule(architecture.blocks))
        self.device = model.get_input_embeddings().weight.device
        self.rows, self.pad_token = rows, pad_token
        self.owner = torch.tensor([group.index(row.request) for row in rows], device=self.device)  # (rows,)
        self.count = len(group)
        self._run_lower_blocks()

    def _run_lower_blocks(self) -> None:
        """Hidden states after the value layer, and its output's type; plus ``h`` of every request."""
        inputs = batch_inputs(self.rows, self.pad_token, self.device)
        caught = {}
        handle = self.blocks[self.config.value_layer].register_forward_hook(
            lambda module, args, output: caught.__setitem__("output", output)
        )
        try:
            with torch.no_grad():
                self.decoder(**inputs, use_cache=False)
        finally:
            handle.remove()
        self.template = caught["output"]
        self.base = hidden_of(self.template).detach()  # (rows, seq, d_model)
        self.inputs = inputs
        self.last = torch.tensor([row.subject_last for row in self.rows], device=self.base.device)
        index = torch.arange(len(self.rows), device=self.base.device)
        states = self.base[index, self.last]
        plain = [n for n, row in enumerate(self.rows) if row.plain]
        order = torch.empty(self.count, dtype=torch.long)
        order[self.owner[plain].cpu()] = torch.tensor(plain)
        self.h = states[order].to(torch.promote_types(states.dtype, torch.float32))  # (u, d_model)

    def solve(self) -> list[tuple[torch.Tensor, float, int]]:
        """``(v*, final loss, steps)`` of every request in the group."""
        config = self.config
        norm = self.h.norm(dim=-1, keepdim=True)  # (u, 1)
        rate = torch.full_like(norm, config.lr)
        if config.lr_unit == "hidden_rms":
            rate = rate * norm / self.h.shape[-1] ** 0.5
        delta = torch.zeros_like(self.h)
        first, second = torch.zeros_like(delta), torch.zeros_like(delta)  # Adam's moments
        losses = torch.full((self.count,), torch.inf, dtype=delta.dtype)
        steps = torch.zeros(self.count, dtype=torch.long)
        active = torch.arange(self.count, device=delta.device)
        essence_start: dict[int, torch.Tensor] = {}
        for step in range(config.steps):
            current = delta[active].requires_grad_(True)
            loss = self._loss(current, active, norm[active], essence_start)  # (active,)
            losses[active.cpu()] = loss.detach().cpu()
            if step == config.steps - 1:
                break
            open_ = ~(loss.detach() < config.early_stop)  # NaN stays open, to be reported
            if not open_.any():
                break
            (gradient,) = torch.autograd.grad(loss.sum(), current)
            active, gradient = active[open_], gradient[open_]
            first[active] = 0.9 * first[active] + 0.1 * gradient
            second[active] = 0.999 * second[active] + 0.001 * gradient**2
            move = (first[active] / (1 - 0.9 ** (step + 1))) / ((second[active] / (1 - 0.999 ** (step + 1))).sqrt() + 1e-8)
            moved = delta[active] - rate[active] * move
            excess = (moved.norm(dim=-1, keepdim=True) / (config.clamp * norm[active])).clamp(min=1)
            delta[active] = moved / excess
            steps[active.cpu()] += 1
        values = self.h + delta
        return [(values[n], float(losses[n]), int(steps[n])) for n in range(self.count)]

    def _loss(self, delta: torch.Tensor, active: torch.Tensor, norm: torch.Tensor, essence_start: dict) -> torch.Tensor:
        """Loss of the active requests, ``(len(active),)``; ``delta`` is ``(len(active), d_model)``."""
        place = torch.full((self.count,), -1, device=self.device)
        place[active] = torch.arange(len(active), device=self.device)
        chosen = (place[self.owner] >= 0).nonzero().squeeze(-1)  # rows of active requests
        owner = place[self.owner[chosen]]
        rows = [self.rows[n] for n in chosen.tolist()]
        index = torch.arange(len(rows), device=self.device)

        def hidden() -> torch.Tensor:
            base = self.base[chosen]
            shift = torch.zeros_like(base)
            shift[index, self.last[chosen]] = delta[owner].to(base.dtype)
            return base + shift

        inputs = {name: value[chosen] for name, value in self.inputs.items()}
        with resumed(self.blocks, self.config.value_layer, hidden, self.template):
            out = self.decoder(**inputs, use_cache=False)[0]  # (rows, seq, d_model)
        where = [(r, p) for r, row in enumerate(rows) for p in row.predicts]
        targets = torch.tensor([t for row in rows for t in row.target], device=out.device)
        essence = [(r, row.subject_last) for r, row in enumerate(rows) if not row.target]
        at = torch.tensor(where + essence, device=out.device)
        logits = self.head(out[at[:, 0], at[:, 1]])
        log_p = F.log_softmax(logits, dim=-1, dtype=torch.promote_types(logits.dtype, torch.float32))
        token_nll = -log_p[: len(where)].gather(1, targets[:, None]).squeeze(1)

        # Mean over a row's target tokens, then over a request's rows.
        spoken = [row for row in rows if row.target]
        share = [1 / len(row.target) for row in spoken for _ in row.target]
        share = torch.tensor(share, dtype=log_p.dtype, device=out.device)
        token_owner = torch.tensor([o for o, row in zip(owner.tolist(), rows, strict=True) for _ in row.target], device=out.device)
        rows_each = torch.zeros(len(active), device=out.device).index_add_(
            0, owner[[r for r, row in enumerate(rows) if row.target]], torch.ones(len(spoken), device=out.device))
        loss = torch.zeros(len(active), dtype=log_p.dtype, device=out.device)
        loss = loss.index_add(0, token_owner, token_nll * share) / rows_each.to(log_p)

        # KL(now ‖ before) at the subject's last token of the essence row; before: the first step, where δ = 0.
        kept = active[owner[[r for r, _ in essence]]].tolist()
        now = log_p[len(where) :]
        for n, request in enumerate(kept):
            essence_start.setdefault(request, now[n].detach())
        before = torch.stack([essence_start[request] for request in kept])
        divergence = (now.exp() * (now - before)).sum(-1)
        loss = loss.index_add(0, owner[[r for r, _ in essence]], self.config.kl_factor * divergence)
        return loss + self.config.weight_decay * delta.norm(dim=-1) / norm.squeeze(-1) ** 2
