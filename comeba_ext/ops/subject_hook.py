"""The decision by what a text names: a token meets the edits of a subject whose name ends there, if its input is like the edited one.

A token is compared with few keys only: of those subjects whose name ends in just this token ("… Kumar"). Where the whole name stands there,
its key asks for less than where only the end does, ``eᵢ'`` instead of ``eᵢ`` above the layer's threshold α
(:mod:`comeba_ext.editing.anchors`), and it comes first; of others the nearest one is meant:

    s_t = max over keys kᵢ of subjects that end in token t of cos(L⁻¹x_t, L⁻¹kᵢ) − eᵢ   (:mod:`comeba_ext.ops.nearest_hook`)

Keys of subjects that the text does not name are left out where a first look, at the coarse directions, already tells that they will not
do. Both look-ups are binary searches by a hash of token ids (:mod:`comeba_ext.ops.mentions`), so what a text costs hardly grows with the
subjects: of 18,688 subjects of CounterFact a token of Wikipedia meets 11, and two tokens in three none at all
(``bench/bench_subjects.py``); only for the third one is the input projected. On a GPU the projection is a library product, and one
kernel does the rest, a block a token (``csrc/subject_hook.cuh``), without waiting for the host.

Where the text is not known, every token is compared with every key (:func:`~comeba_ext.ops.nearest_hook.nearest_hook`).
"""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch.nn import functional as F

from comeba_ext.ops.hooked_linear import _dispatched, _needs_grad, in_scope, scope_limit, swap
from comeba_ext.ops.mentions import mentions
from comeba_ext.ops.nearest_hook import coarse_directions, coarse_limit, coarse_rows, directions, product_dtype
from comeba_ext.ops.shard_edits import shard_edits

_TOGETHER = 16  # tokens whose keys are compared with all of them at once
_FIRST = 4.0  # above any difference of two cosines


class Subjects(NamedTuple):
    """What is known of the edited subjects.

    Attributes:
        names: ``(n,)`` int64, sorted, hashes of all names; of_name: ``(n,)``, the shard of each.
        ends: ``(e,)`` int64, sorted, hashes of their last tokens, each as often as shards have it; of_end: ``(e,)``, the shard of each.
        first: ``(shards,)`` int64, where a shard's anchors begin; count: ``(shards,)``, how many there are, side by side.
    """

    names: torch.Tensor
    of_name: torch.Tensor
    ends: torch.Tensor
    of_end: torch.Tensor
    first: torch.Tensor
    count: torch.Tensor


def subject_scores(
    x: torch.Tensor,
    hashes: torch.Tensor,
    projection: torch.Tensor,
    anchors: torch.Tensor,
    thresholds: tuple[torch.Tensor, torch.Tensor],
    alpha: torch.Tensor,
    subjects: Subjects,
    most: tuple[int, int],
) -> tuple[torch.Tensor, torch.Tensor]:
    """Every token's score, and the shard it is of.

    Args:
        x: ``(batch, seq, d_in)``.
        hashes: ``(batch, seq, LONGEST)``, :func:`~comeba_ext.ops.mentions.suffix_hashes` of the text.
        projection, anchors: see :func:`~comeba_ext.ops.nearest_hook.nearest_scores`.
        thresholds: every key's own, ``(keys,)``, and where its subject is named; they count where they lie above α.
        alpha: scalar.
        subjects: whose keys these are.
        most: how many shards share an end at most, and how many anchors a shard has.

    Returns:
        ``(batch, seq)`` in float32 or better, 0 where nothing ends; ``(batch, seq)`` int64, −1 there.
    """
    how = (x, hashes, projection, anchors, thresholds, alpha, subjects)
    if x.device.type != "cpu" or torch.compiler.is_compiling():  # to choose would mean waiting for the device
        return _every(*how, most)
    score = x.new_zeros(x.shape[:-1], dtype=torch.promote_types(x.dtype, torch.float32))
    shard = torch.full_like(score, -1, dtype=torch.int64)
    if found := _chosen(*how):
        which, *found = found
        score[which], shard[which] = found
    return score, shard


def _places(hashes: torch.Tensor, subjects: Subjects) -> tuple[torch.Tensor, torch.Tensor]:
    """From where to where among the ends each token's are."""
    end = hashes[..., 0].contiguous()
    return torch.searchsorted(subjects.ends, end), torch.searchsorted(subjects.ends, end, right=True)


def _chosen(x, hashes, projection, anchors, thresholds, alpha, subjects) -> tuple:
    """The tokens that some names end in, their scores and shards; empty where there are none."""
    low, high = _places(hashes, subjects)
    there = high > low
    if not there.any():  # most tokens of a decoding
        return ()
    if there.numel() == 1:
        first = torch.zeros(1, dtype=torch.int64)
        return (first, first), *_some(x[0], hashes[0], low[0], high[0], projection, anchors, thresholds, alpha, subjects)
    which = there.nonzero(as_tuple=True)
    chosen = x.flatten(0, 1).index_select(0, which[0] * x.shape[1] + which[1])  # quicker than x[which]
    return which, *_some(chosen, hashes[which], low[which], high[which], projection, anchors, thresholds, alpha, subjects)


def _some(x, hashes, low, high, projection, anchors, thresholds, alpha, subjects):
    """Of tokens that some names end in. Those that are the same word meet the same keys, which are gathered once."""
    wide, dtype, coarse = torch.promote_types(x.dtype, torch.float32), product_dtype(x), coarse_rows(projection)
    named = mentions(hashes, subjects.names, subjects.of_name)
    start, word = low.unique(return_inverse=True) if len(low) > 1 else (low, torch.zeros_like(low))
    of_word, place = _spread(start, torch.empty_like(start).scatter_(0, word, high))
    shard = subjects.of_end[place]
    again, anchor = _spread(subjects.first[shard], subjects.first[shard] + subjects.count[shard])
    of_word, shard = of_word[again], shard[again]
    # First look, at a few directions; what is named needs none.
    rough, keys = coarse_directions(x, projection).to(wide), anchors[:, :coarse]
    least = coarse_limit(scope_limit(alpha, dtype) + _asked(thresholds[0][anchor], alpha, wide), projection)
    near = []
    for part, theirs in _together(word, of_word):
        likely = F.linear(rough[part], keys.index_select(0, anchor[theirs]).to(wide)) >= least[theirs]
        token, pair = likely.logical_and_(of_word[theirs] == word[part][:, None]).nonzero(as_tuple=True)
        token, pair = part[token], pair + theirs.start
        other = shard[pair] != named[token]
        near.append((token[other], pair[other]))
    token, pair = (torch.cat(parts) for parts in zip(*near, strict=True))
    called = (named >= 0).nonzero()[:, 0]
    best, best_shard = x.new_full((len(x),), -_FIRST, dtype=wide), torch.full_like(low, -1)
    if not len(token) + len(called):
        return _unranked(best), best_shard
    again, own = _spread(subjects.first[named[called]], subjects.first[named[called]] + subjects.count[named[called]])
    token, anchor, shard = (torch.cat(both) for both in ((token, called[again]), (anchor[pair], own), (shard[pair], named[called][again])))
    own = torch.arange(len(token), device=x.device) >= len(pair)
    # Second look, at all.
    looked, row = token.unique(return_inverse=True)
    cosine = (directions(x[looked], projection)[row] * anchors[anchor]).sum(-1, dtype=wide)
    rank = cosine - _asked(torch.where(own, thresholds[1][anchor], thresholds[0][anchor]), alpha, wide)
    rank += _FIRST * (own & in_scope(rank, alpha, None, dtype))
    best.scatter_reduce_(0, token, rank, "amax")
    first = torch.where(rank == best[token], shard, len(subjects.first))  # of equal ones
    best_shard[looked] = torch.full_like(looked, len(subjects.first)).scatter_reduce(0, row, first, "amin")
    return _unranked(best), best_shard


def _together(word: torch.Tensor, of_word: torch.Tensor):
    """Tokens in the order of their words, a few at a time, and where among all keys, which are in that order, those of these words are."""
    if len(word) == 1:
        yield torch.zeros_like(word), slice(0, len(of_word))
        return
    order = word.argsort()
    begin = torch.searchsorted(of_word, torch.arange(int(word[order[-1]]) + 2, device=word.device)).tolist()
    for part in order.split(_TOGETHER):
        yield part, slice(begin[word[part[0]]], begin[word[part[-1]] + 1])


def _asked(thresholds: torch.Tensor, alpha: torch.Tensor, dtype: torch.dtype) -> torch.Tensor:
    """What these lie above α."""
    return (thresholds - alpha).clamp(min=0).to(dtype)


def _every(x, hashes, projection, anchors, thresholds, alpha, subjects, most):
    """Of every token, one of its pairs at a time, as many times as the token with the most of them has some."""
    low, high = _places(hashes, subjects)
    unit, dtype, wide = directions(x, projection), product_dtype(x), torch.promote_types(x.dtype, torch.float32)
    named, coarse = mentions(hashes, subjects.names, subjects.of_name), coarse_rows(projection)
    best, shard = torch.full_like(low, -_FIRST, dtype=wide), torch.full_like(low, -1)
    for n in range(most[0] if len(subjects.of_end) else 0):
        there, pair = low + n < high, subjects.of_end[(low + n).clamp(max=len(subjects.of_end) - 1)]
        for m in range(most[1]):
            anchor = subjects.first[pair] + m
            inside = there & (m < subjects.count[pair])
            anchor = torch.where(inside, anchor, 0)
            own, parts = pair == named, unit * anchors[anchor]
            asked = _asked(torch.where(own, thresholds[1][anchor], thresholds[0][anchor]), alpha, wide)
            least = coarse_limit(scope_limit(alpha, dtype) + asked, projection)
            inside &= own | (parts[..., :coarse].sum(-1, dtype=wide) >= least)
            found = parts.sum(-1, dtype=wide) - asked
            rank = torch.where(own & in_scope(found, alpha, None, dtype), found + _FIRST, found)
            better = inside & (rank > best)  # of equal ones the first
            best, shard = torch.where(better, rank, best), torch.where(better, pair, shard)
    return _unranked(best), shard


def _unranked(best: torch.Tensor) -> torch.Tensor:
    return torch.where(best > _FIRST / 2, best - _FIRST, best).clamp(min=0)


def _spread(low: torch.Tensor, high: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """All numbers from each ``low`` up to its ``high``: whose each is, and they."""
    if len(low) == 1:
        number = torch.arange(int(low), int(high), device=low.device)
        return torch.zeros_like(number), number
    end = (high - low).cumsum(0)
    number = torch.arange(int(end[-1]) if len(end) else 0, device=low.device)
    owner = torch.searchsorted(end, number, right=True)  # repeat_interleave wakes threads for it
    return owner, number - (end - high)[owner]


def subject_hook(
    output: torch.Tensor,
    x: torch.Tensor,
    hashes: torch.Tensor,
    projection: torch.Tensor,
    anchors: torch.Tensor,
    thresholds: tuple[torch.Tensor, torch.Tensor],
    mask: torch.Tensor | None,
    alpha: torch.Tensor,
    subjects: Subjects,
    most: tuple[int, int],
    shards: tuple[torch.Tensor, torch.Tensor, torch.Tensor],
    inplace: bool = False,
) -> torch.Tensor:
    """``output`` plus the edit of their subject's shard for tokens in scope, ``output`` elsewhere, bit for bit.

    Args:
        output: base output ``(batch, seq, d_out)``.
        mask: ``(batch, seq)`` bool of real tokens; ``None`` when all are.
        shards: the shards' ``rows``, ``left`` and ``right`` (:func:`~comeba_ext.ops.shard_edits.shard_edits`).
        inplace: the result may take the place of ``output``.
        Others: see :func:`subject_scores`.
    """
    arguments = (x, hashes, projection, anchors, *thresholds, mask, alpha, *subjects, *most, *shards)
    if _needs_grad(output, x, *shards[1:]):
        return subject_hook_ref(output, *arguments)
    output = output if inplace else output.clone()
    one_dtype = all(part.dtype == x.dtype for part in (projection, anchors, *shards[1:]))  # for the kernel
    operator = torch.ops.comeba.subject_hook_ if _dispatched(output) and one_dtype else _subject_hook_
    operator(output, *arguments)
    return output


def subject_hook_ref(output, *arguments):
    """:func:`subject_hook` in plain, differentiable torch."""
    x, (*_, rows, left, right) = arguments[0], arguments
    own = _in_scope(x.detach(), *arguments[1:-3])
    edit = shard_edits(x.flatten(0, 1), own.flatten(), rows, left, right).unflatten(0, x.shape[:2])
    return swap(output, edit, own >= 0)


def _in_scope(x, hashes, projection, anchors, thresholds, named_thresholds, mask, alpha, *rest) -> torch.Tensor:
    """The shard of every token in scope, ``(batch, seq)``; −1: none."""
    *subjects, shared, width = rest
    both = (thresholds, named_thresholds)
    score, shard = subject_scores(x, hashes, projection, anchors, both, alpha, Subjects(*subjects), (shared, width))
    return torch.where(in_scope(score, alpha, mask, product_dtype(x)), shard, -1)


def _subject_hook_(output, x, *arguments) -> None:
    *how, rows, left, right = arguments
    if x.device.type != "cpu":
        own = _in_scope(x, *how)
        edit = shard_edits(x.flatten(0, 1), own.flatten(), rows, left, right).unflatten(0, x.shape[:2])
        output.copy_(swap(output, edit, own >= 0))
        return
    hashes, projection, anchors, thresholds, named_thresholds, mask, alpha, *subjects, _, _ = how
    found = _chosen(x, hashes, projection, anchors, (thresholds, named_thresholds), alpha, Subjects(*subjects))
    if not found:
        return
    which, *found = found
    inside = in_scope(found[0], alpha, None if mask is None else mask[which], product_dtype(x))
    which = tuple(part[inside] for part in which)
    if len(which[0]):
        output[which] += shard_edits(x[which], found[1][inside], rows, left, right).to(output.dtype)


torch.library.define(
    "comeba::subject_hook_",
    "(Tensor(a!) output, Tensor x, Tensor hashes, Tensor projection, Tensor anchors, Tensor thresholds, Tensor named_thresholds, "
    "Tensor? mask, Tensor alpha, Tensor names, Tensor of_name, Tensor ends, Tensor of_end, Tensor first, Tensor count, int shared, "
    "int width, Tensor rows, Tensor left, Tensor right) -> ()",
)
torch.library.impl("comeba::subject_hook_", "CompositeExplicitAutograd")(_subject_hook_)


@torch.library.register_fake("comeba::subject_hook_")
def _(output, x, *arguments):
    return None
