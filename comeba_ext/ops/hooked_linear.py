"""The decision a hook layer takes for every token: edited output or original output (paper section 3.3, DESIGN §3).

``edit`` is ``x @ deltaᵀ``, the token's response to all edits so far; its L2 norm ``n_t`` is what both scores are made
of. Three ways to the same result, chosen by :class:`~comeba_ext.layers.hooked_linear.HookedLinear`:

- :func:`exact_hook`: the edit of every token is computed, the norm decides, the base output is changed in scope.
- :func:`gated_hook`: a few rows that keep the norm (a *sketch* of delta) decide, and only the tokens in scope pay for
  their edit.
- :func:`decode_hook`: few tokens; base product, edit and decision in one pass over both weights (CUDA).

Each is an operator ``comeba::…`` whose default implementation is plain torch and whose CUDA implementation
(``csrc/hooked_linear.*``) takes over once it is compiled. On an accelerator nothing synchronises with the host and no
shape depends on data. Where a gradient is wanted, the ``*_ref`` functions run instead: plain differentiable torch.
"""

from __future__ import annotations

import math

import torch
from torch.nn import functional as F

from comeba_ext.kernels import loader

# A score is known only up to rounding, and the request that set α has a score of exactly α: in another batch or with
# other padding it would fall out of scope by its last bits. A score within this share of α counts as reaching it.
SLACK = {torch.float64: 1e-12, torch.float32: 1e-5, torch.float16: 4e-3, torch.bfloat16: 3e-2}
# More tokens than this are a matrix product's business: deciding by the edit itself, and by its sketch (H100,
# bench/results/nvidia-h100-80gb-hbm3-hooked_linear.json).
DECODE_TOKENS, DECODE_TOKENS_GATED = 16, 32
DECODE_MOST = 64  # what the kernel can take


# -- public functions ----------------------------------------------------------------------------------------------


def exact_hook(
    output: torch.Tensor,
    edit: torch.Tensor,
    mask: torch.Tensor | None,
    statistics: torch.Tensor | None,
    alpha: torch.Tensor,
    reference_scale: torch.Tensor,
    score: str,
    inplace: bool = False,
) -> tuple[torch.Tensor, torch.Tensor | None]:
    """``output + edit`` for tokens in scope, ``output`` elsewhere, bit for bit.

    Args:
        output: base output ``(batch, seq, d_out)``.
        edit: ``x @ deltaᵀ``, ``(batch, seq, d_out)``.
        mask: ``(batch, seq)`` bool of real tokens; ``None`` when all are.
        statistics: of the sequence's earlier tokens, see :func:`zscore`.
        alpha, reference_scale: scalar tensors.
        score: ``"zscore"`` or ``"reference"``.
        inplace: the result may take the place of ``output``.

    Returns:
        The layer's output, and the statistics after these tokens (``None`` for the reference score).
    """
    arguments = (mask, statistics, alpha, reference_scale, score)
    if _needs_grad(output, edit):
        return exact_hook_ref(output, edit, *arguments)
    output = output if inplace else output.clone()
    operator = torch.ops.comeba.exact_hook_ if _dispatched(output) else _exact_hook_
    after = operator(output, edit, *arguments)
    return output, after if score == "zscore" else None


def gated_hook(
    output: torch.Tensor,
    x: torch.Tensor,
    delta: torch.Tensor,
    sketch: torch.Tensor,
    mask: torch.Tensor | None,
    statistics: torch.Tensor | None,
    alpha: torch.Tensor,
    reference_scale: torch.Tensor,
    score: str,
    inplace: bool = False,
) -> tuple[torch.Tensor, torch.Tensor | None]:
    """As :func:`exact_hook`, but ``‖x @ sketchᵀ‖`` decides and edits are computed for the tokens in scope only.

    Args:
        x: ``(batch, seq, d_in)``.
        delta: ``(d_out, d_in)``.
        sketch: ``(m, d_in)``, see :mod:`comeba_ext.ops.sketch`. ``alpha`` must have been set from its scores.
    """
    arguments = (mask, statistics, alpha, reference_scale, score)
    if _needs_grad(output, x, delta):
        return gated_hook_ref(output, x, delta, sketch, *arguments)
    output = output if inplace else output.clone()
    same = x.dtype == delta.dtype == sketch.dtype  # not under autocast
    operator = torch.ops.comeba.gated_hook_ if same and _dispatched(output) else _gated_hook_
    after = operator(output, x, delta, sketch, *arguments)
    return output, after if score == "zscore" else None


def add_edits_(output: torch.Tensor, x: torch.Tensor, delta: torch.Tensor, scope: torch.Tensor) -> None:
    """Add ``x @ deltaᵀ`` to ``output`` for the tokens in scope, computed for those only; in place, without a graph.

    Args:
        output: ``(batch, seq, d_out)``.
        x: ``(batch, seq, d_in)``.
        delta: ``(d_out, d_in)``.
        scope: ``(batch, seq)`` bool.
    """
    # One dtype for the kernel; under autocast a product takes what it is given.
    operator = torch.ops.comeba.add_edits_ if _dispatched(output) and x.dtype == delta.dtype else _add_edits_
    operator(output, x, delta, scope)


def decode_hook(
    x: torch.Tensor,
    weight: torch.Tensor,
    bias: torch.Tensor | None,
    delta: torch.Tensor,
    sketch: torch.Tensor | None,
    mask: torch.Tensor | None,
    statistics: torch.Tensor | None,
    alpha: torch.Tensor,
    reference_scale: torch.Tensor,
    score: str,
) -> tuple[torch.Tensor, torch.Tensor | None]:
    """The whole hooked layer for few tokens: ``x @ weightᵀ + bias``, plus the edit in scope.

    Args:
        x: ``(batch, seq, d_in)``, at most ``DECODE_MOST`` tokens; one dtype for it and all matrices.
        weight, delta: ``(d_out, d_in)``.
        sketch: ``(m, d_in)`` to decide by it, or ``None`` to decide by the edit itself.

    Returns:
        As :func:`exact_hook`.
    """
    output, after = torch.ops.comeba.decode_hook(x, weight, bias, delta, sketch, mask, statistics, alpha, reference_scale, score)
    return output, after if score == "zscore" else None


def decode_hook_pays(x: torch.Tensor, delta: torch.Tensor, gated: bool) -> bool:
    """Whether :func:`decode_hook` is compiled for this input, not merely defined, and faster than two products."""
    return (
        loader.available(x.device.type)
        and 0 < x.numel() <= (DECODE_TOKENS_GATED if gated else DECODE_TOKENS) * x.shape[-1]
        and x.dtype == delta.dtype
        and x.dtype in (torch.float32, torch.float16, torch.bfloat16)
        and x.shape[-1] % 8 == 0  # rows start at 16-byte boundaries
    )


def _needs_grad(*tensors: torch.Tensor) -> bool:
    return torch.is_grad_enabled() and any(tensor.requires_grad for tensor in tensors)


def _dispatched(tensor: torch.Tensor) -> bool:
    """Whether to go through the dispatcher: to a compiled implementation (built on first use), or because
    ``torch.compile`` must see one operator. In plain torch it would only cost time."""
    compiled = loader.available(tensor.device.type) and tensor.dtype != torch.float64  # kernels compute in float32
    return compiled or torch.compiler.is_compiling()


# -- references: what the operators must equal ---------------------------------------------------------------------


def exact_hook_ref(output, edit, mask, statistics, alpha, reference_scale, score):
    """:func:`exact_hook` in plain, differentiable torch."""
    scope, after = decide(edit, mask, statistics, alpha, reference_scale, score)
    return swap(output, edit, scope), after


def gated_hook_ref(output, x, delta, sketch, mask, statistics, alpha, reference_scale, score):
    """:func:`gated_hook` in plain, differentiable torch, with every token's edit computed."""
    scope, after = decide(F.linear(x, sketch), mask, statistics, alpha, reference_scale, score)
    return swap(output, F.linear(x, delta), scope), after


def decide(response, mask, statistics, alpha, reference_scale, score):
    """Scope ``(batch, seq)`` bool from the response ``(batch, seq, rows)`` of delta or its sketch, and statistics."""
    value, after = scores(response, mask, statistics, reference_scale, score)
    return in_scope(value, alpha, mask, response.dtype), after


def scores(response, mask, statistics, reference_scale, score):
    """Score of every token ``(batch, seq)``, and the statistics after them (``None`` for the reference score)."""
    norm = edit_norm(response)
    if score == "reference":
        return reference_score(norm, reference_scale), None
    return zscore(norm, mask, statistics)


def edit_norm(edit: torch.Tensor) -> torch.Tensor:
    """``‖edit_t‖₂`` of every token, in float32 or better.

    Args:
        edit: ``(batch, seq, d_out)``.

    Returns:
        ``(batch, seq)``, float64 for float64 input, else float32.
    """
    wide = torch.promote_types(edit.dtype, torch.float32)
    return torch.linalg.vector_norm(edit, dim=-1, dtype=wide)


def zscore(
    norm: torch.Tensor, mask: torch.Tensor | None = None, statistics: torch.Tensor | None = None
) -> tuple[torch.Tensor, torch.Tensor]:
    """``z_t = (n_t − mean)/std`` over the real tokens of a token's own sequence, std with n−1 (paper equation 9).

    Args:
        norm: ``(batch, seq)``.
        mask: ``(batch, seq)`` bool, True at real tokens; ``None`` when all are.
        statistics: ``(batch, 3)`` count, mean and sum of squared deviations of the sequence's earlier tokens, as
            returned by the previous call; they count as part of the sequence.

    Returns:
        Scores ``(batch, seq)`` (0 where fewer than two tokens or no spread define no deviation) and the updated
        statistics ``(batch, 3)``.
    """
    if mask is None:
        count = norm.new_full((norm.shape[0], 1), norm.shape[1])
        mean = norm.sum(-1, keepdim=True) / max(norm.shape[1], 1)
        deviation = (norm - mean).square().sum(-1, keepdim=True)
    else:  # where, not *: padding may overflow to inf
        mask = mask.bool()
        count = mask.sum(-1, keepdim=True).to(norm.dtype)
        mean = torch.where(mask, norm, 0.0).sum(-1, keepdim=True) / count.clamp(min=1)
        deviation = torch.where(mask, (norm - mean).square(), 0.0).sum(-1, keepdim=True)
    if statistics is not None:  # merge two samples (Chan, Golub, LeVeque 1979, equation 2.1)
        old_count, old_mean, old_deviation = statistics.to(norm.dtype).split(1, -1)
        total = old_count + count
        share = count / total.clamp(min=1)
        shift = mean - old_mean
        deviation = old_deviation + deviation + shift.square() * old_count * share
        mean = old_mean + shift * share
        count = total
    std = (deviation / (count - 1).clamp(min=1)).sqrt()
    spread = std > 8 * torch.finfo(norm.dtype).eps * mean  # less is the rounding of equal norms; one token has none
    score = torch.where(spread, (norm - mean) / torch.where(spread, std, 1.0), 0.0)
    return score, torch.cat((count, mean, deviation), -1)


def reference_score(norm: torch.Tensor, reference_scale: torch.Tensor | float) -> torch.Tensor:
    """``s_t = n_t² / tr(delta·C0·deltaᵀ)``: the response against that of an average corpus token (DESIGN §3).

    Args:
        norm: ``(batch, seq)``.
        reference_scale: scalar ``tr(delta·C0·deltaᵀ)``; not positive means that nothing was edited, and scores 0.

    Returns:
        ``(batch, seq)``; independent of every other token.
    """
    if isinstance(reference_scale, float):
        return norm.square() / reference_scale if reference_scale > 0 else torch.zeros_like(norm)
    scale = reference_scale.to(norm.dtype)
    return torch.where(scale > 0, norm**2 / torch.where(scale > 0, scale, 1.0), 0.0)


def in_scope(score: torch.Tensor, alpha: torch.Tensor | float, mask: torch.Tensor | None, dtype: torch.dtype) -> torch.Tensor:
    """Tokens whose edited output goes on: real ones with ``score ≥ α`` up to the rounding of ``dtype`` (``SLACK``)."""
    scope = score >= scope_limit(alpha, dtype)
    return scope if mask is None else scope & mask.bool()


def scope_limit(alpha: torch.Tensor | float, dtype: torch.dtype) -> torch.Tensor | float:
    """What a score must reach to be in scope."""
    slack = SLACK.get(dtype, 1e-5)
    if isinstance(alpha, float):
        return alpha * (1.0 - math.copysign(slack, alpha))
    wide = torch.promote_types(dtype, torch.float32)
    return (alpha * (1.0 - slack * alpha.sign())).to(wide)  # alpha itself may be infinite


def swap(output: torch.Tensor, edit: torch.Tensor, scope: torch.Tensor) -> torch.Tensor:
    """``output + edit`` in scope, ``output`` elsewhere, bit for bit; ``(batch, seq, d_out)``."""
    return torch.where(scope[..., None], output + edit.to(output.dtype), output)


# -- operators -----------------------------------------------------------------------------------------------------
# Every one returns statistics (batch, 3) for "zscore" and an empty tensor for "reference".


def _exact_hook_(output, edit, mask, statistics, alpha, reference_scale, score):
    scope, after = _decide(edit, mask, statistics, alpha, reference_scale, score)
    _add_in_scope_(output, scope, lambda rows: edit.flatten(0, 1)[rows], lambda: edit)
    return after


def _gated_hook_(output, x, delta, sketch, mask, statistics, alpha, reference_scale, score):
    scope, after = _decide(F.linear(x, sketch), mask, statistics, alpha, reference_scale, score)
    _add_edits_(output, x, delta, scope)
    return after


def _add_edits_(output, x, delta, scope):
    _add_in_scope_(output, scope, lambda rows: F.linear(x.flatten(0, 1)[rows], delta), lambda: F.linear(x, delta))


def _decode_hook(x, weight, bias, delta, sketch, *decision):
    output = F.linear(x, weight, bias)
    if sketch is None:
        return output, _exact_hook_(output, F.linear(x, delta), *decision)
    return output, _gated_hook_(output, x, delta, sketch, *decision)


def _decide(response, mask, statistics, alpha, reference_scale, score):
    """:func:`decide`; on the CPU, where reading a scalar costs less than computing with it, by few operations."""
    if response.device.type == "cpu":
        alpha, reference_scale = alpha.item(), reference_scale.item()
        if score == "reference" and mask is None and alpha > 0 and reference_scale > 0:  # n² / scale ≥ α
            return edit_norm(response) >= math.sqrt(scope_limit(alpha, response.dtype) * reference_scale), None
    return decide(response, mask, statistics, alpha, reference_scale, score)


def _add_in_scope_(output, scope, edit_of_rows, edit_of_all) -> None:
    """Add the edit to ``output`` in scope: row by row on the CPU, where a look at the scope costs nothing; elsewhere
    everywhere at once, because reading the number of rows would stall the device."""
    if output.device.type == "cpu" and output.stride(0) == output.shape[1] * output.stride(1):
        index = scope.nonzero()  # (n, 2)
        if len(index):
            rows = index[:, 0] * scope.shape[1] + index[:, 1]
            output.view(-1, output.shape[-1]).index_add_(0, rows, edit_of_rows(rows).to(output.dtype))
    else:
        output.copy_(swap(output, edit_of_all(), scope))


def _statistics(tensor, after):
    return tensor.new_empty(0, dtype=_wide(tensor)) if after is None else after


def _wide(tensor) -> torch.dtype:
    return torch.promote_types(tensor.dtype, torch.float32)


def _fake_statistics(response, score):
    return response.new_empty((response.shape[0], 3) if score == "zscore" else 0, dtype=_wide(response))


_DECISION = "Tensor? mask, Tensor? statistics, Tensor alpha, Tensor reference_scale, str score"
torch.library.define("comeba::exact_hook_", f"(Tensor(a!) output, Tensor edit, {_DECISION}) -> Tensor")
torch.library.define("comeba::gated_hook_", f"(Tensor(a!) output, Tensor x, Tensor delta, Tensor sketch, {_DECISION}) -> Tensor")
torch.library.define("comeba::add_edits_", "(Tensor(a!) output, Tensor x, Tensor delta, Tensor scope) -> ()")
torch.library.define(
    "comeba::decode_hook",
    f"(Tensor x, Tensor weight, Tensor? bias, Tensor delta, Tensor? sketch, {_DECISION}) -> (Tensor, Tensor)",
)


@torch.library.impl("comeba::exact_hook_", "CompositeExplicitAutograd")
def _(output, edit, *decision):
    return _statistics(edit, _exact_hook_(output, edit, *decision))


@torch.library.impl("comeba::gated_hook_", "CompositeExplicitAutograd")
def _(output, x, *matrices_and_decision):
    return _statistics(x, _gated_hook_(output, x, *matrices_and_decision))


torch.library.impl("comeba::add_edits_", "CompositeExplicitAutograd")(_add_edits_)


@torch.library.impl("comeba::decode_hook", "CompositeExplicitAutograd")
def _(x, *matrices_and_decision):
    output, after = _decode_hook(x, *matrices_and_decision)
    return output, _statistics(x, after)


@torch.library.register_fake("comeba::exact_hook_")
def _(output, edit, mask, statistics, alpha, reference_scale, score):
    return _fake_statistics(edit, score)


@torch.library.register_fake("comeba::gated_hook_")
def _(output, x, delta, sketch, mask, statistics, alpha, reference_scale, score):
    return _fake_statistics(x, score)


@torch.library.register_fake("comeba::add_edits_")
def _(output, x, delta, scope):
    return None


@torch.library.register_fake("comeba::decode_hook")
def _(x, weight, bias, delta, sketch, mask, statistics, alpha, reference_scale, score):
    return x.new_empty(*x.shape[:-1], weight.shape[0]), _fake_statistics(x, score)
