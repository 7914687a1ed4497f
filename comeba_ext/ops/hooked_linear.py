"""The decision a hook layer takes for every token: edited output or original output (paper section 3.3, DESIGN §3).

``edit`` is ``x @ deltaᵀ``, the token's response to all edits so far; its L2 norm ``n_t`` is what both scores are made
of. Everything is device-side: no host synchronisation, no data-dependent shapes.
"""

from __future__ import annotations

import torch

# A score is known only up to rounding, and the request that set α has a score of exactly α: in another batch or with
# other padding it would fall out of scope by its last bits. A score within this share of α counts as reaching it.
SLACK = {torch.float64: 1e-12, torch.float32: 1e-5, torch.float16: 4e-3, torch.bfloat16: 3e-2}


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
    real = torch.ones_like(norm, dtype=torch.bool) if mask is None else mask.bool()
    count = real.sum(-1).to(norm.dtype)  # (batch,)
    mean = torch.where(real, norm, 0.0).sum(-1) / count.clamp(min=1)  # where, not *: padding may overflow to inf
    deviation = torch.where(real, (norm - mean[:, None]) ** 2, 0.0).sum(-1)
    if statistics is not None:  # merge two samples (Chan, Golub, LeVeque 1979, equation 2.1)
        old_count, old_mean, old_deviation = statistics.to(norm.dtype).unbind(-1)
        total = old_count + count
        shift = mean - old_mean
        deviation = old_deviation + deviation + shift**2 * old_count * count / total.clamp(min=1)
        mean = old_mean + shift * count / total.clamp(min=1)
        count = total
    std = (deviation / (count - 1).clamp(min=1)).sqrt()
    defined = (count > 1) & (std > 8 * torch.finfo(norm.dtype).eps * mean)  # less is the rounding of equal norms
    score = torch.where(defined[:, None], (norm - mean[:, None]) / torch.where(defined, std, 1.0)[:, None], 0.0)
    return score, torch.stack((count, mean, deviation), -1)


def reference_score(norm: torch.Tensor, reference_scale: torch.Tensor) -> torch.Tensor:
    """``s_t = n_t² / tr(delta·C0·deltaᵀ)``: the response against that of an average corpus token (DESIGN §3).

    Args:
        norm: ``(batch, seq)``.
        reference_scale: scalar ``tr(delta·C0·deltaᵀ)``; not positive means that nothing was edited, and scores 0.

    Returns:
        ``(batch, seq)``; independent of every other token.
    """
    scale = reference_scale.to(norm.dtype)
    return torch.where(scale > 0, norm**2 / torch.where(scale > 0, scale, 1.0), 0.0)


def in_scope(score: torch.Tensor, alpha: torch.Tensor, mask: torch.Tensor | None, dtype: torch.dtype) -> torch.Tensor:
    """Tokens whose edited output goes on: real ones with ``score ≥ α`` up to the rounding of ``dtype`` (``SLACK``)."""
    slack = SLACK.get(dtype, 1e-5) * alpha.sign()  # alpha itself may be infinite
    scope = score >= (alpha * (1.0 - slack)).to(score.dtype)
    return scope if mask is None else scope & mask.bool()


def swap(output: torch.Tensor, edit: torch.Tensor, scope: torch.Tensor) -> torch.Tensor:
    """``output + edit`` in scope, ``output`` elsewhere, bit for bit; ``(batch, seq, d_out)``."""
    return torch.where(scope[..., None], output + edit.to(output.dtype), output)
