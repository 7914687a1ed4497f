"""Cholesky factor of ``C ± K Kᵀ`` from that of ``C``."""

from __future__ import annotations

import torch


def cholesky_update_ref(factor: torch.Tensor, k: torch.Tensor, sign: int = 1) -> torch.Tensor:
    """Refactorise: ``chol(L Lᵀ + sign · k kᵀ)``, O(d³) whatever the rank.

    Args:
        factor: lower-triangular ``L``, ``(d, d)``.
        k: ``(d, u)``.
        sign: +1 to update, −1 to downdate.

    Returns:
        The new factor ``(d, d)``; the old one is left as it is.

    Raises:
        torch.linalg.LinAlgError: the result is not positive definite.
    """
    return torch.linalg.cholesky(torch.addmm(factor @ factor.mT, k, k.mT, alpha=float(sign)))


cholesky_update = cholesky_update_ref
