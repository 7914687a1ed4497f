"""Anchors: the directions that the score ``nearest`` compares tokens with, each with thresholds of its own.

A request leaves two anchors in a layer: the direction of its key averaged over context prefixes, which other wordings come
close to, and that of its key behind the prompt alone, which is often another one (a prompt that begins with its subject
puts it where models without a start token keep an attention sink). How close is close enough depends on what the text says
(:mod:`comeba_ext.ops.mentions`): where it names the subject, ``floor`` is; other names, which may be all but the same to a
shallow block ("1976 Summer Olympics" for "1960 Summer Olympics"), must come closer than any that is known to be another,

    τ = max(unnamed_floor, corpus + STEP, decoys + STEP)

with the highest cosine of a corpus token (:mod:`key_sample`, mentions of the subject left out) and of another name that ends
as the subject does (:mod:`decoys`). A request that is edited at its prompt's last token, of which no name tells, leaves the plain
key's anchor alone, half-way between its own prompt and the nearest of corpus and decoys (the same prompt about others): it is that
prompt or it is not. Where more than ``RATE`` of all corpus tokens come above ``CEILING``, a
key says nothing: ordinary tokens look like it (its *leverage* ``kᵀ C0⁻¹ k`` is a fiftieth of what a subject's key has). Such
an anchor is left out, and so is such a key from the mean; a request of which nothing is left where its own prompt would be
recognised cannot be edited in that layer.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch

from comeba_ext.covariance.key_sample import KeySample

CEILING = 0.85  # of a corpus token's cosine: closer ones are the same but for rounding and position
RATE = 1e-3  # of corpus tokens: a name that the corpus has now and then is not what most texts share
STEP = 0.05  # above the nearest token that is another's, because there are more than were looked at
APART = 0.95  # more alike, a prompt about another subject cannot be told from it where both end
_CHUNK = 256  # directions compared with the corpus at a time: bounds the table of cosines


@dataclass
class Background:
    """What a layer's scores look like on ordinary text.

    Attributes:
        unit: ``(n, rows)``, directions of corpus tokens.
        sample: the tokens they are of.
        scale: of squared projected norms, so that they are leverages.
    """

    unit: torch.Tensor
    sample: KeySample
    scale: float

    def highest(self, unit: torch.Tensor, subjects: list[list[list[int]]]) -> tuple[torch.Tensor, torch.Tensor]:
        """The highest cosine of a corpus token, and the highest that more than ``RATE`` of them reach, each ``(n,)``; 0 where
        there are no tokens.

        Args:
            unit: ``(n, rows)``, one direction a subject.
            subjects: of each, its token ids (one list a form that text may hold it in); tokens that end one are not counted.
        """
        highest, common = unit.new_zeros(len(unit)), unit.new_zeros(len(unit))
        if not len(self.unit):
            return highest, common
        count = math.floor(RATE * len(self.unit)) + 1
        corpus = self.unit.to(unit)
        for start in range(0, len(unit), _CHUNK):
            part = slice(start, start + _CHUNK)
            own = torch.stack([self.sample.mentions(forms) for forms in subjects[part]]).to(unit.device)
            best = (unit[part] @ corpus.mT).masked_fill_(own, 0).topk(count).values
            highest[part], common[part] = best[:, 0], best[:, -1]
        return highest, common


@dataclass
class Anchors:
    """What a batch leaves in a layer.

    Attributes:
        unit: ``(m, rows)`` directions.
        thresholds: ``(m,)``; named: ``(m,)``, where the text names the subject.
        owner: ``(m,)`` the request of each.
    """

    unit: torch.Tensor
    thresholds: torch.Tensor
    named: torch.Tensor
    owner: torch.Tensor

    def of(self, request: int) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
        """Directions and thresholds of one request."""
        own = self.owner == request
        return self.unit[own], self.thresholds[own], self.named[own]


def tells(units: torch.Tensor, background: Background, subjects: list[list[list[int]]]) -> torch.Tensor:
    """Which keys say something, ``(u, P)`` bool, for directions ``(u, P, rows)`` behind every context prefix."""
    count, prefixes, rows = units.shape
    flat = [forms for forms in subjects for _ in range(prefixes)]
    return (background.highest(units.reshape(-1, rows), flat)[1] <= CEILING).reshape(count, prefixes)


def anchors_of(
    units: torch.Tensor,
    mean: torch.Tensor,
    background: Background,
    subjects: list[list[list[int]]],
    decoys: tuple[torch.Tensor, torch.Tensor],
    floor: float,
    unnamed_floor: float,
    at_end: torch.Tensor | None = None,
) -> Anchors:
    """Anchors of a batch in one layer; see the module docstring.

    Args:
        units: ``(u, P, rows)``, directions of every request's key behind every prefix, the empty one first.
        mean: ``(u, rows)``, direction of the mean key.
        subjects: see :meth:`Background.highest`.
        decoys: ``(D, rows)`` directions, and ``(D,)`` the request of each.
        floor: threshold where the text names the subject; ``unnamed_floor``: least threshold elsewhere.
        at_end: ``(u,)`` bool, requests that are edited at their prompt's last token; default: none.
    """
    both = torch.stack([mean, units[:, 0]])  # (2, u, rows)
    corpus, common = (torch.stack(found) for found in zip(*(background.highest(unit, subjects) for unit in both), strict=True))
    cosines = both @ decoys[0].to(both).mT  # (2, u, D)
    foreign = decoys[1].to(both.device) != torch.arange(len(mean), device=both.device)[:, None]
    other = torch.maximum(corpus, cosines.masked_fill(foreign, 0).amax(-1)) if cosines.shape[-1] else corpus
    thresholds = (other + STEP).clamp(min=unnamed_floor)
    named = torch.full_like(thresholds, floor)
    kept = common <= CEILING
    if at_end is not None:
        at_end = at_end.to(kept.device)
        thresholds[1] = torch.where(at_end, (1 + other[1]) / 2, thresholds[1])
        named[1] = torch.where(at_end, thresholds[1], named[1])
        kept[0] &= ~at_end
    # Request by request, the mean first: of near directions the first stands for the others.
    chosen = lambda pair: torch.stack(tuple(pair), 1)[kept.mT]  # noqa: E731
    owner = torch.arange(len(mean), device=mean.device)
    return Anchors(chosen(both), chosen(thresholds), chosen(named), chosen((owner, owner)))
