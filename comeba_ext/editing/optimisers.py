"""Optimisers of δ, all requests of a group at once; requests never meet, so each takes the path it would take alone."""

from __future__ import annotations

from collections.abc import Callable
from typing import TYPE_CHECKING, Protocol

import torch

if TYPE_CHECKING:  # which looks up the names below here
    from comeba_ext.editing.config import EditConfig


class Objective(Protocol):
    """The losses of a group of requests.

    Attributes:
        h: ``(u, d_model)``, the hidden states that δ is added to.
        leads: ``(u,)`` bool, whether at the last evaluation every target token was the model's first choice in every row.
    """

    h: torch.Tensor
    leads: torch.Tensor

    def evaluate(self, delta: torch.Tensor, gradient: bool) -> tuple[torch.Tensor, torch.Tensor | None]:
        """Losses ``(u,)`` and gradients ``(u, d_model)`` at ``delta (u, d_model)``; of no meaning for closed requests.

        The first evaluation must be at zero: it tells what the model says of the subjects before the edit.
        """

    def close(self, requests: torch.Tensor) -> None:
        """These requests, ``(u,)`` bool, need no more evaluations."""


class Descent:
    """Where the optimisation of a group stands: what every optimiser keeps, and the rule when a request is done.

    Attributes:
        delta: ``(u, d_model)``.
        losses: ``(u,)``, at the last evaluation.
        steps: ``(u,)``, optimiser steps taken.
        leads: ``(u,)`` bool, whether the target led in all rows at the last evaluation; in the end: at ``delta``.
        open: ``(u,)`` bool.
        rate: ``(u, 1)``, the learning rate in absolute units.
        bound: ``(u, 1)``, the largest ‖δ‖.
    """

    def __init__(self, objective: Objective, config: EditConfig, on_step: Callable[[torch.Tensor, torch.Tensor], None]):
        self.objective, self.config, self.on_step = objective, config, on_step
        h = objective.h
        norm = h.norm(dim=-1, keepdim=True)
        self.bound = config.clamp * norm
        self.rate = config.lr * (norm / h.shape[-1] ** 0.5 if config.lr_unit == "hidden_rms" else torch.ones_like(norm))
        self.delta = torch.zeros_like(h)
        self.losses = torch.full_like(norm[:, 0], torch.inf)
        self.steps = torch.zeros(len(h), dtype=torch.long, device=h.device)
        self.open = torch.ones(len(h), dtype=torch.bool, device=h.device)
        self.leads = torch.zeros(len(h), dtype=torch.bool, device=h.device)
        self.led = torch.zeros(len(h), dtype=torch.long, device=h.device)  # evaluations in a row that the target leads

    def evaluate(self, delta: torch.Tensor, gradient: bool) -> tuple[torch.Tensor, torch.Tensor | None]:
        """Losses and gradients at ``delta``; what falls below ``early_stop``, or has led long enough, is closed, with its loss
        noted."""
        loss, slope = self.objective.evaluate(delta, gradient)
        self.losses = torch.where(self.open, loss, self.losses)
        self.leads = torch.where(self.open, self.objective.leads, self.leads)
        done = loss < self.config.early_stop  # NaN stays open, to be reported
        if self.config.lead_steps is not None:
            self.led = torch.where(self.leads, self.led + 1, 0)
            done |= (self.led > self.config.lead_steps) & torch.isfinite(loss)
        self.finish(done & self.open)
        self.on_step(self.open, self.losses)
        return loss, slope

    def finish(self, done: torch.Tensor) -> None:
        """These open requests, ``(u,)`` bool, stay as they are."""
        if done.any():
            self.open &= ~done
            self.objective.close(done)

    def projected(self, delta: torch.Tensor) -> torch.Tensor:
        """``delta`` in the ball ‖δ‖ ≤ clamp·‖h‖."""
        return delta / (delta.norm(dim=-1, keepdim=True) / self.bound).clamp(min=1)


NEAR = 3.0  # loss below which curvature is looked at
STALLED = (2, 0.8)  # evaluations, and what they leave of the loss of a request that is done
SETTLED = 1.0  # above it, an object that leads does so by a hair: rounding, or another batch mate, and it does not


def adam(descent: Descent) -> None:
    """Adam (β 0.9 and 0.999, ε 1e-8) with projection after every step, as in the paper.

    ``steps`` evaluations at most, with a step between two.
    """
    first, second = torch.zeros_like(descent.delta), torch.zeros_like(descent.delta)
    for step in range(descent.config.steps):
        last = step == descent.config.steps - 1
        _, slope = descent.evaluate(descent.delta, gradient=not last)
        if last or not descent.open.any():
            return
        first = 0.9 * first + 0.1 * slope
        second = 0.999 * second + 0.001 * slope**2
        move = (first / (1 - 0.9 ** (step + 1))) / ((second / (1 - 0.999 ** (step + 1))).sqrt() + 1e-8)
        descent.delta = torch.where(descent.open[:, None], descent.projected(descent.delta - descent.rate * move), descent.delta)
        descent.steps += descent.open


def polyak(descent: Descent) -> None:
    """Gradient steps whose length follows from the loss alone, and near the goal curvature: no learning rate, a few evaluations.

    The loss is bounded below by zero, and once the new object is likely it falls exponentially along the gradient. So a
    step aims where the linear model of the *logarithm* of the loss meets a target a little below ``early_stop``: Polyak's
    step ``loss/‖g‖²`` (Introduction to Optimization, 1987, section 5.3), times ``log(loss/target)``. Where KL keeps the loss above
    that target such steps only jump about; so below ``NEAR`` they are limited-memory BFGS's (Nocedal 1980) on the logarithm. A step
    is at most half the ball's radius. When a loss did not fall, the request returns to its best point and halves its step. It is
    done when the new object leads everywhere, the loss is below ``SETTLED``, and it has hardly fallen in the last few evaluations
    (``STALLED``).

    Far from the paper's descent, and shorter: ‖δ‖ is smaller too, because nothing is taken from the signs of small slopes.
    """
    # Without early stop there is no loss to aim at; a hundredth of the present one keeps the steps bounded.
    aim = 0.8 * descent.config.early_stop
    best, slope_there = descent.delta.clone(), torch.zeros_like(descent.delta)
    least, led = torch.full_like(descent.losses, torch.inf), descent.leads
    share, curvature, course = torch.ones_like(least), _Curvature(best), []

    def settle(which: torch.Tensor) -> None:
        """End at the best point."""
        descent.delta = torch.where(which[:, None], best, descent.delta)
        descent.losses = torch.where(which, least, descent.losses)
        descent.leads = torch.where(which, led, descent.leads)

    for step in range(descent.config.steps):
        last = step == descent.config.steps - 1
        loss, slope = descent.evaluate(descent.delta, gradient=not last)
        if step and not last:
            bend = _of_log(slope, loss) - _of_log(slope_there, least)
            curvature.add(descent.delta - best, bend, descent.open & (loss.maximum(least) < NEAR))
        better = ~(loss >= least)  # NaN, to be reported, counts as better
        least = torch.where(better, loss, least)
        best = torch.where(better[:, None], descent.delta, best)
        led = torch.where(better, descent.leads, led)
        course.append(least)
        if last or not descent.open.any():
            break
        if len(course) > STALLED[0]:
            stalled = descent.open & led & (least < SETTLED) & (least > STALLED[1] * course[-1 - STALLED[0]])
            settle(stalled)
            descent.finish(stalled)
            if not descent.open.any():
                return
        slope_there = torch.where(better[:, None], slope, slope_there)
        share = torch.where(better, (1.5 * share).clamp(max=1), 0.5 * share)
        goal = torch.full_like(least, aim) if aim > 0 else 0.01 * least
        size = least / slope_there.square().sum(-1).clamp(min=torch.finfo(least.dtype).tiny)
        size = size * (least / goal).log().clamp(min=1)
        bent = curvature.known & (least < NEAR)
        move = torch.where(bent[:, None], curvature(_of_log(slope_there, least)), size[:, None] * slope_there) * share[:, None]
        move = move / (2 * move.norm(dim=-1, keepdim=True) / descent.bound).clamp(min=1)
        descent.delta = torch.where(descent.open[:, None], descent.projected(best - move), descent.delta)
        descent.steps += descent.open
    settle(descent.open)


def _of_log(slope: torch.Tensor, loss: torch.Tensor) -> torch.Tensor:
    """The slope of the loss's logarithm."""
    return slope / loss.clamp(min=torch.finfo(loss.dtype).tiny)[:, None]


class _Curvature:
    """What a function's slopes along the way tell of its curvature: for every request the inverse Hessian times a slope, by
    limited-memory BFGS (Nocedal 1980; Nocedal and Wright, Numerical Optimization, algorithm 7.4).

    Attributes:
        known: ``(u,)`` bool, of which requests something is.
    """

    def __init__(self, like: torch.Tensor, size: int = 6):
        self.steps, self.changes = like.new_zeros(size, *like.shape), like.new_zeros(size, *like.shape)
        self.inverse = like.new_zeros(size, len(like))  # 1/(s·y); 0: none
        self.scale = like.new_zeros(len(like))
        self.known = torch.zeros(len(like), dtype=torch.bool, device=like.device)

    def add(self, step: torch.Tensor, change: torch.Tensor, where: torch.Tensor) -> None:
        """A step and what it changed of the slope, each ``(u, d)``, for the requests ``where``, if it shows upward curvature."""
        product = (step * change).sum(-1)
        where = where & (product > 1e-4 * step.norm(dim=-1) * change.norm(dim=-1))
        tiny = torch.finfo(step.dtype).tiny
        inverse = 1 / product.clamp(min=tiny)
        for name, own in (("steps", step), ("changes", change), ("inverse", inverse)):
            kept = getattr(self, name)
            there = where[:, None] if own.dim() > 1 else where
            setattr(self, name, torch.where(there, torch.cat([kept[1:], own[None]]), kept))
        self.scale = torch.where(where, product / change.square().sum(-1).clamp(min=tiny), self.scale)
        self.known |= where

    def __call__(self, slope: torch.Tensor) -> torch.Tensor:
        """The step downhill is this with its sign changed, ``(u, d)``; zero where nothing is known."""
        memory, shares = list(zip(self.steps, self.changes, self.inverse, strict=True)), []
        for step, change, inverse in reversed(memory):
            shares.append(inverse * (step * slope).sum(-1))
            slope = slope - shares[-1][:, None] * change
        slope = slope * self.scale[:, None]
        for (step, change, inverse), share in zip(memory, reversed(shares), strict=True):
            slope = slope + (share - inverse * (change * slope).sum(-1))[:, None] * step
        return slope


OPTIMISERS = {"adam": adam, "polyak": polyak}  # by what `optimizer` in the settings says
