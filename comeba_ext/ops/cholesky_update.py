"""Cholesky factor of ``C ± K Kᵀ`` from that of ``C``, in O(d²·u)."""

from __future__ import annotations

import torch

PANEL = 64  # columns eliminated at a time: enough for matrix products to dominate, little enough to stay O(d²·u)


def cholesky_update(factor: torch.Tensor, k: torch.Tensor, sign: int = 1) -> torch.Tensor:
    """Blocked rank-u update (+1) or downdate (−1).

    A panel ``L11`` of the factor, with the rows below it ``L21`` and the keys' rows ``X1``, ``X2`` and
    ``P = L11⁻¹ X1``, becomes ``L11' = chol(L11 L11ᵀ ± X1 X1ᵀ)`` and ``L21' = (L21 L11ᵀ ± X2 X1ᵀ) L11'⁻ᵀ``; what remains
    for the trailing factor is again an update of the same form (Schur complement, Woodbury), by
    ``X2' = (X2 − L21 P) G⁻ᵀ`` with ``G Gᵀ = I ± Pᵀ P``. Refactorises where that is cheaper.

    Args:
        factor: lower-triangular ``L``, ``(d, d)``.
        k: ``(d, u)``.
        sign: +1 or −1.

    Returns:
        The new factor ``(d, d)``; the old one is left as it is.

    Raises:
        torch.linalg.LinAlgError: the result is not positive definite.
    """
    d, u = k.shape
    if 4 * u > d:
        return cholesky_update_ref(factor, k, sign)
    new, x = factor.clone(), k.clone()
    eye = torch.eye(u, dtype=k.dtype, device=k.device)
    for start in range(0, d, PANEL):
        end = min(start + PANEL, d)
        diagonal, below = factor[start:end, start:end], factor[end:, start:end]
        x1, x2 = x[start:end], x[end:]
        p = torch.linalg.solve_triangular(diagonal, x1, upper=False)
        corner = torch.linalg.cholesky(torch.addmm(diagonal @ diagonal.mT, x1, x1.mT, alpha=float(sign)))
        shrink = torch.linalg.cholesky(torch.addmm(eye, p.mT, p, alpha=float(sign)))
        column = torch.addmm(below @ diagonal.mT, x2, x1.mT, alpha=float(sign))
        new[start:end, start:end] = corner
        new[end:, start:end] = torch.linalg.solve_triangular(corner.mT, column, upper=True, left=False)
        x[end:] = torch.linalg.solve_triangular(shrink.mT, x2 - below @ p, upper=True, left=False)
    return new


def cholesky_update_ref(factor: torch.Tensor, k: torch.Tensor, sign: int = 1) -> torch.Tensor:
    """The same by refactorising ``L Lᵀ + sign · k kᵀ``, O(d³) whatever the rank."""
    return torch.linalg.cholesky(torch.addmm(factor @ factor.mT, k, k.mT, alpha=float(sign)))
