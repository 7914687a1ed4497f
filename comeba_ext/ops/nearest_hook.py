"""The decision by similarity to an edited key: a token is in scope when its input is like one that was edited.

Responses ``delta·x`` stop telling edited tokens from others once there are about as many edits as dimensions: ``delta`` is
then of full rank and answers everything. The inputs themselves do not: those of one subject stay close together. Closeness
is the cosine in the metric of ``C0⁻¹``, in which corpus keys have no preferred direction (with ``C0 = L Lᵀ``, whitened keys
``L⁻¹k`` are uncorrelated), between a token and the nearest live key:

    s_t = max over edited keys kᵢ of cos(L⁻¹x_t, L⁻¹kᵢ) − eᵢ

where eᵢ ≥ 0 is what key ``i`` asks beyond the layer's threshold α: some keys have more look-alikes in ordinary text than
others, so each has a threshold of its own, ``α + eᵢ`` (:mod:`comeba_ext.editing.anchors`).

``d_in`` is large and so is the number of keys. Both shrink under one projection ``P = S L⁻¹`` on a few random orthonormal
directions (Johnson–Lindenstrauss): the error of a cosine ``c`` has a standard deviation of about ``(1 − c²)/√rows``, so close
keys stay close. Most tokens are like no key at all, which a few rows show already: a *coarse* cosine from the first of them
bounds the score, and only where that bound reaches the threshold is the score under all rows computed. A score costs
``COARSE·(d_in + keys)`` multiplications a token, ``ROWS·(d_in + keys)`` more where it may matter, where the layer costs
``d_in·d_out``; only tokens in scope pay for their edit. (On an accelerator the second look is taken at every token: to choose
would mean waiting for the device.) Like the reference score it needs no other token: prefill, decode, padding and batch do
not matter.
Similarity to stored keys decides scope in GRACE (arXiv 2211.11031) too, by Euclidean distance and for whole outputs; here it
gates the least-squares edit.
"""

from __future__ import annotations

import math

import torch
from torch.nn import functional as F

from comeba_ext.ops.hooked_linear import _dispatched, _needs_grad, add_edits_, in_scope, swap
from comeba_ext.ops.shard_edits import shard_edits

# As measured (bench/bench_nearest.py, 1,000 facts, the worst of four blocks): of other subjects' prompts 3.8 % come above
# 0.7, as against 3.3 % with all 1,408 directions; 6.5 % with 128 rows, 7.3 % with 64, 10 % with 48.
ROWS = 256
# A coarse cosine of 0.68, where thresholds lie, has a standard deviation of 0.055; ABOVE is three of them. With 1,000 unrelated
# keys the largest coarse cosine is expected 3.2 standard deviations above 0: at 0.33, out of the way; with 64 rows at 0.4.
COARSE = 96
ABOVE = 0.17
SAME = 0.92  # cosine (23°) above which a key stands for another: half of the angle that thresholds lie near
_CHUNK = 4096  # keys compared at a time: bounds the table of similarities, (tokens, keys)
_SEED = 0xC0EBA


def projection_of(covariance: torch.Tensor, rows: int = ROWS) -> torch.Tensor:
    """``P = S L⁻¹`` up to a factor, ``(min(rows, d_in), d_in)`` in the covariance's dtype; the same for the same covariance.

    No cosine depends on the factor. It puts the largest entry of ``P`` as far above 1 as whitened inputs come out below it,
    so that both stay within the range of half precision.

    Args:
        covariance: ``C0``, ``(d_in, d_in)``, symmetric positive definite.

    Raises:
        torch.linalg.LinAlgError: it is not positive definite.
    """
    width = covariance.shape[0]
    lower = torch.linalg.cholesky(covariance)
    if rows >= width:
        directions = torch.eye(width, dtype=covariance.dtype)
    else:
        generator = torch.Generator().manual_seed(_SEED)
        directions = torch.linalg.qr(torch.randn(width, rows, generator=generator, dtype=torch.float64))[0]
    projection = torch.linalg.solve_triangular(lower.mT, directions.to(lower), upper=True).mT
    return projection.div(projection.abs().max().sqrt()).contiguous()


def directions(x: torch.Tensor, projection: torch.Tensor) -> torch.Tensor:
    """Unit vectors along ``P x``, ``(..., rows)``, for ``x (..., d_in)``; zero stays zero.

    The coarse rows and the others are normalised apart and have the same share of every vector, so that an inner product
    of two is the mean of two cosines, weighted by rows, and the first entries alone are an estimate of it.
    """
    projected = F.linear(x, projection)
    wide = projected.to(torch.promote_types(projected.dtype, torch.float32))  # in float16 normalize divides zero by zero
    unit = torch.empty_like(wide)
    for part in slice(coarse_rows(projection)), slice(coarse_rows(projection), None):
        size = unit[..., part].shape[-1]
        unit[..., part] = F.normalize(wide[..., part], dim=-1) * math.sqrt(size / max(len(projection), 1))
    return unit.to(projected.dtype)


def coarse_rows(projection: torch.Tensor) -> int:
    """How many rows a first look takes: all where they are few, or every dimension's own."""
    rows, width = projection.shape
    return COARSE if COARSE < rows < width else rows


def coarse_directions(x: torch.Tensor, projection: torch.Tensor) -> torch.Tensor:
    """The coarse entries of :func:`directions` alone, ``(..., coarse)``."""
    coarse = coarse_rows(projection)
    return directions(x, projection[:coarse]) * math.sqrt(coarse / max(len(projection), 1))


def coarse_limit(limit: torch.Tensor, projection: torch.Tensor) -> torch.Tensor:
    """What the inner product of the coarse entries alone must reach where a cosine that reaches ``limit`` is to be found."""
    return (limit - ABOVE) * (coarse_rows(projection) / max(len(projection), 1))


def stands_for(unit: torch.Tensor, known: torch.Tensor) -> torch.Tensor:
    """Which directions add a neighbourhood, farther than ``SAME`` from every known one and from one another, and which do not.

    Several facts about one subject, or one fact in several wordings, have nearly the same key. One of them serves all, so
    that scores cost by the number of subjects and not of edits.

    Args:
        unit: ``(n, rows)``, unit vectors, in order of precedence.
        known: ``(keys, rows)``.

    Returns:
        ``(n,)`` int64 on the CPU: which row of ``known``, or of ``unit`` counted on from there, stands for each direction;
        a direction that adds a neighbourhood stands for itself.
    """
    count = len(known)
    own = torch.arange(count, count + len(unit))
    if not len(unit):
        return own
    if count:
        most = F.linear(unit, known).max(-1)
        own = torch.where(most.values.cpu() > SAME, most.indices.cpu(), own)
    near = (F.linear(unit, unit) > SAME).cpu()
    for n in range(len(unit)):
        earlier = (near[n, :n] & (own[:n] == torch.arange(count, count + n))).nonzero()
        if own[n] == count + n and len(earlier):
            own[n] = count + earlier[0, 0]
    return own


def nearest_scores(x: torch.Tensor, projection: torch.Tensor, anchors: torch.Tensor, excess: torch.Tensor | None = None) -> torch.Tensor:
    """Every token's largest cosine with an edited key, less that key's excess; at most ``ABOVE`` the same of the coarse ones.

    Args:
        x: ``(..., d_in)``.
        projection: ``(rows, d_in)``, see :func:`projection_of`.
        anchors: ``(keys, rows)``, :func:`directions` of the edited keys; rows of zeros stand for no key.
        excess: ``(keys,)``, what each key's own threshold lies above α; ``None``: nothing.

    Returns:
        ``(...)``, at least 0, in float32 or better.
    """
    unit, coarse = directions(x, projection), coarse_rows(projection)
    score = _largest(unit, anchors, excess)
    return score if coarse == len(projection) else score.minimum(_bound(unit[..., :coarse], anchors, excess))


def peak_scores(
    x: torch.Tensor, mask: torch.Tensor, projection: torch.Tensor, anchors: torch.Tensor, excess: torch.Tensor | None = None
) -> torch.Tensor:
    """The highest of :func:`nearest_scores` over the real tokens of every row, ``(batch,)``.

    Args:
        x: ``(batch, seq, d_in)``.
        mask: ``(batch, seq)`` bool, one real token a row or more.
    """
    bound = _first_look(x, projection, anchors, excess)
    if bound is None:
        return nearest_scores(x, projection, anchors, excess).masked_fill(~mask, -torch.inf).amax(-1)
    bound = bound.masked_fill(~mask, -torch.inf)
    # The token with the highest bound first; then only those whose bound its score does not reach.
    first = (torch.arange(len(x)), bound.argmax(-1))
    best = _second_look(x, projection, anchors, excess, bound, first)
    bound[first] = -torch.inf
    others = (bound > best[:, None]).nonzero(as_tuple=True)
    return best.scatter_reduce(0, others[0], _second_look(x, projection, anchors, excess, bound, others), "amax")


def _bound(unit: torch.Tensor, anchors: torch.Tensor, excess: torch.Tensor | None) -> torch.Tensor:
    """What the score is at most, from the coarse entries of :func:`directions`."""
    coarse, rows = unit.shape[-1], anchors.shape[-1]
    return _largest(unit * (rows / coarse), anchors[:, :coarse], excess) + ABOVE


def _first_look(x: torch.Tensor, projection: torch.Tensor, anchors: torch.Tensor, excess) -> torch.Tensor | None:
    """Every token's bound, in the dtype of its score, where a second look at some tokens is cheaper than one at all."""
    if x.device.type != "cpu" or coarse_rows(projection) == len(projection):
        return None
    return _bound(coarse_directions(x, projection), anchors, excess)


def _second_look(x, projection, anchors, excess, bound, which: tuple[torch.Tensor, ...]) -> torch.Tensor:
    """The scores of the tokens ``x[which]``, whose bounds are known."""
    return _largest(directions(x[which], projection), anchors, excess).minimum(bound[which])


def _largest(unit: torch.Tensor, anchors: torch.Tensor, excess: torch.Tensor | None) -> torch.Tensor:
    """The largest inner product of each vector with an anchor, less the anchor's excess; at least 0."""
    best = unit.new_zeros(unit.shape[:-1], dtype=torch.promote_types(unit.dtype, torch.float32))
    for start in range(0, len(anchors), _CHUNK):
        best = best.maximum(_less_excess(unit, anchors, excess, start).amax(-1).to(best.dtype))
    return best


def _nearest(unit: torch.Tensor, anchors: torch.Tensor, excess: torch.Tensor | None) -> torch.Tensor:
    """The anchor whose inner product with each vector, less its excess, is the largest; int64."""
    best = unit.new_zeros(unit.shape[:-1], dtype=torch.promote_types(unit.dtype, torch.float32))
    found = torch.zeros_like(best, dtype=torch.int64)
    for start in range(0, len(anchors), _CHUNK):
        own = _less_excess(unit, anchors, excess, start).max(-1)
        better = own.values > best
        best, found = torch.where(better, own.values, best), torch.where(better, own.indices + start, found)
    return found


def _less_excess(unit, anchors, excess, start: int) -> torch.Tensor:
    less = None if excess is None else -excess[start : start + _CHUNK].to(anchors.dtype)
    return F.linear(unit, anchors[start : start + _CHUNK], less)


def nearest_hook(
    output: torch.Tensor,
    x: torch.Tensor,
    delta: torch.Tensor | None,
    projection: torch.Tensor,
    anchors: torch.Tensor,
    excess: torch.Tensor | None,
    mask: torch.Tensor | None,
    alpha: torch.Tensor,
    shards: tuple[torch.Tensor, torch.Tensor, torch.Tensor, torch.Tensor] | None = None,
    inplace: bool = False,
) -> torch.Tensor:
    """``output`` plus the edit for tokens in scope, ``output`` elsewhere, bit for bit.

    The edit is that of the nearest anchor's shard (:func:`~comeba_ext.ops.shard_edits.shard_edits`), or, where it is in none,
    ``x @ deltaᵀ``.

    Args:
        output: base output ``(batch, seq, d_out)``.
        x: ``(batch, seq, d_in)``.
        delta: ``(d_out, d_in)``; ``None`` where every anchor is in a shard, of which there are some.
        projection, anchors, excess: see :func:`nearest_scores`.
        mask: ``(batch, seq)`` bool of real tokens; ``None`` when all are.
        alpha: scalar.
        shards: ``(keys,)`` int64, every anchor's shard, −1: none; the shards' ``rows``, ``left`` and ``right``. ``None``: there are
            none.
        inplace: the result may take the place of ``output``.
    """
    belongs, *factors = shards or (None, None, None, None)
    matrices = [part for part in (delta, *factors[1:]) if part is not None]
    if _needs_grad(output, x, *matrices):
        return nearest_hook_ref(output, x, delta, projection, anchors, excess, mask, alpha, shards)
    output = output if inplace else output.clone()
    operator = torch.ops.comeba.nearest_hook_ if _dispatched(output) else _nearest_hook_
    operator(output, x, delta, projection, anchors, excess, mask, alpha, belongs, *factors)
    return output


def nearest_hook_ref(output, x, delta, projection, anchors, excess, mask, alpha, shards=None):
    """:func:`nearest_hook` in plain, differentiable torch, with every token's edit computed."""
    scope = _scope(x.detach(), projection, anchors, excess, mask, alpha)
    if shards is None:
        return swap(output, F.linear(x, delta), scope)
    edit, own = _shard_edits(x, scope, projection, anchors, excess, *shards)
    if delta is not None:
        edit = torch.where((own < 0)[..., None], F.linear(x, delta), edit)
    return swap(output, edit, scope)


def _shard_edits(x, scope, projection, anchors, excess, belongs, *factors) -> tuple[torch.Tensor, torch.Tensor]:
    """The edit of every token in scope whose nearest anchor is in a shard, ``(batch, seq, d_out)``, and that shard, or −1."""
    own = torch.where(scope, belongs[_nearest(directions(x.detach(), projection), anchors, excess)], -1)
    return shard_edits(x.flatten(0, 1), own.flatten(), *factors).unflatten(0, x.shape[:2]), own


def product_dtype(x: torch.Tensor) -> torch.dtype:
    """Of what products with ``x`` give."""
    return torch.get_autocast_dtype(x.device.type) if torch.is_autocast_enabled(x.device.type) else x.dtype


def _scope(x, projection, anchors, excess, mask, alpha) -> torch.Tensor:
    dtype = product_dtype(x)
    bound = _first_look(x, projection, anchors, excess)
    if bound is None:
        return in_scope(nearest_scores(x, projection, anchors, excess), alpha, mask, dtype)
    scope = in_scope(bound, alpha, mask, dtype)
    which = scope.nonzero(as_tuple=True)
    if len(which[0]):
        scope[which] = in_scope(_second_look(x, projection, anchors, excess, bound, which), alpha, None, dtype)
    return scope


def _nearest_hook_(output, x, delta, projection, anchors, excess, mask, alpha, belongs, rows, left, right) -> None:
    scope = _scope(x, projection, anchors, excess, mask, alpha)
    if belongs is not None:
        if x.device.type == "cpu":
            which = scope.nonzero(as_tuple=True)
            if len(which[0]):
                own = belongs[_nearest(directions(x[which], projection), anchors, excess)]
                output[which] += shard_edits(x[which], own, rows, left, right).to(output.dtype)
                scope[which] = own < 0
        else:  # every token: to choose would mean waiting for the device
            edit, own = _shard_edits(x, scope, projection, anchors, excess, belongs, rows, left, right)
            output.copy_(swap(output, edit, own >= 0))
            scope = scope & (own < 0)
    if delta is not None:
        add_edits_(output, x, delta, scope)


torch.library.define(
    "comeba::nearest_hook_",
    "(Tensor(a!) output, Tensor x, Tensor? delta, Tensor projection, Tensor anchors, Tensor? excess, Tensor? mask, Tensor alpha, "
    "Tensor? belongs, Tensor? rows, Tensor? left, Tensor? right) -> ()",
)
torch.library.impl("comeba::nearest_hook_", "CompositeExplicitAutograd")(_nearest_hook_)


@torch.library.register_fake("comeba::nearest_hook_")
def _(output, x, delta, projection, anchors, excess, mask, alpha, belongs, rows, left, right):
    return None
