"""The key memory ``C = λ·C0 + Σ k kᵀ`` of one edited layer, held as a Cholesky factor (DESIGN §2)."""

from __future__ import annotations

import torch

from comeba_ext.errors import CovarianceError
from comeba_ext.ops.cholesky_update import cholesky_update


class KeyMemory:
    """What a layer must keep answering as before: the corpus, and every key ever edited.

    An update makes a new factor and then takes its place, so ``factor`` read before is a snapshot that
    ``memory.factor = snapshot`` restores.

    Args:
        matrix: symmetric positive definite ``(d_in, d_in)``, e.g. ``λ·C0``.
        dtype: of the factor; float64 by default, because thousands of rank-u updates accumulate in it.

    Raises:
        CovarianceError: the matrix has NaN or infinity, or is not positive definite.
    """

    def __init__(self, matrix: torch.Tensor, dtype: torch.dtype = torch.float64):
        if not torch.isfinite(matrix).all():
            raise CovarianceError("covariance has NaN or infinite entries; collect it again")
        factor, info = torch.linalg.cholesky_ex(matrix.to(dtype))
        if info.item() != 0:
            raise CovarianceError(
                f"covariance is not positive definite (leading minor {info.item()} of {len(matrix)}); it needs more "
                f"tokens than dimensions: collect at least 10 x {len(matrix)}"
            )
        self.factor = factor

    @classmethod
    def from_factor(cls, factor: torch.Tensor) -> KeyMemory:
        memory = object.__new__(cls)
        memory.factor = factor
        return memory

    def matrix(self) -> torch.Tensor:
        """``C``, ``(d_in, d_in)``."""
        return self.factor @ self.factor.mT

    def solve(self, keys: torch.Tensor) -> torch.Tensor:
        """``C⁻¹ K`` for keys ``(d_in, u)``, in the factor's dtype."""
        return torch.cholesky_solve(keys.to(self.factor), self.factor)

    def update(self, keys: torch.Tensor) -> None:
        """``C ← C + K Kᵀ`` for keys ``(d_in, u)``."""
        self._change(keys, 1)

    def downdate(self, keys: torch.Tensor) -> None:
        """``C ← C − K Kᵀ`` for keys that were put in before.

        Raises:
            CovarianceError: the result is not positive definite; C is as it was.
        """
        self._change(keys, -1)

    def _change(self, keys: torch.Tensor, sign: int) -> None:
        keys = keys.to(self.factor)
        if not torch.isfinite(keys).all():
            raise CovarianceError("keys have NaN or infinite entries; the key memory is unchanged")
        if keys.shape[1] == 0:
            return
        try:
            self.factor = cholesky_update(self.factor, keys, sign)
        except torch.linalg.LinAlgError:
            raise CovarianceError("the key memory would lose positive definiteness; it is unchanged") from None
