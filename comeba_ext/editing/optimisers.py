"""Optimisers of δ, all requests of a group at once; requests never meet, so each takes the path it would take alone."""

from __future__ import annotations

from collections.abc import Callable
from typing import Protocol

import torch

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
        done &= self.open
        if done.any():
            self.open &= ~done
            self.objective.close(done)
        self.on_step(self.open, self.losses)
        return loss, slope

    def projected(self, delta: torch.Tensor) -> torch.Tensor:
        """``delta`` in the ball ‖δ‖ ≤ clamp·‖h‖."""
        return delta / (delta.norm(dim=-1, keepdim=True) / self.bound).clamp(min=1)


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
    """Gradient steps whose length follows from the loss alone: no learning rate, a few evaluations.

    The loss is bounded below by zero, and once the new object is likely it falls exponentially along the gradient. So a
    step aims where the linear model of the *logarithm* of the loss meets a target a little below ``early_stop``: Polyak's
    step ``loss/‖g‖²`` (Introduction to Optimization, 1987, section 5.3), times ``log(loss/target)``. A step is at most
    half the ball's radius. When a loss did not fall, the request returns to its best point and halves its step.

    Far from the paper's descent, and shorter: ‖δ‖ is smaller too, because nothing is taken from the signs of small slopes.
    """
    # Without early stop there is no loss to aim at; a hundredth of the present one keeps the steps bounded.
    aim = 0.8 * descent.config.early_stop
    best, slope_there = descent.delta.clone(), torch.zeros_like(descent.delta)
    least, led = torch.full_like(descent.losses, torch.inf), descent.leads
    share = torch.ones_like(least)
    for step in range(descent.config.steps):
        last = step == descent.config.steps - 1
        loss, slope = descent.evaluate(descent.delta, gradient=not last)
        better = ~(loss >= least)  # NaN, to be reported, counts as better
        least = torch.where(better, loss, least)
        best = torch.where(better[:, None], descent.delta, best)
        led = torch.where(better, descent.leads, led)
        if last or not descent.open.any():
            break
        slope_there = torch.where(better[:, None], slope, slope_there)
        share = torch.where(better, (1.5 * share).clamp(max=1), 0.5 * share)
        goal = torch.full_like(least, aim) if aim > 0 else 0.01 * least
        size = least / slope_there.square().sum(-1).clamp(min=torch.finfo(least.dtype).tiny)
        size = share * size * (least / goal).log().clamp(min=1)
        move = size[:, None] * slope_there
        move = move / (2 * move.norm(dim=-1, keepdim=True) / descent.bound).clamp(min=1)
        descent.delta = torch.where(descent.open[:, None], descent.projected(best - move), descent.delta)
        descent.steps += descent.open
    descent.delta = torch.where(descent.open[:, None], best, descent.delta)
    descent.losses = torch.where(descent.open, least, descent.losses)
    descent.leads = torch.where(descent.open, led, descent.leads)


OPTIMISERS = {"adam": adam, "polyak": polyak}
