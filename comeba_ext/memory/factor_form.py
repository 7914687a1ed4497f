"""A key memory held as the Cholesky factor of ``C``: backward stable whatever the keys and the conditioning."""

from __future__ import annotations

from typing import NamedTuple

import torch

from comeba_ext.ops.cholesky_update import cholesky_update, cholesky_update_ref


class FactorForm(NamedTuple):
    """A value, like :class:`InverseForm`, with the same methods.

    Attributes:
        lower: ``L`` with ``L Lᵀ = C``, ``(d, d)``.
    """

    lower: torch.Tensor

    def solve(self, keys: torch.Tensor) -> torch.Tensor:
        """``C⁻¹ K``, ``(d, u)``."""
        return torch.cholesky_solve(keys, self.lower)

    def change(self, keys: torch.Tensor, sign: int) -> tuple[FactorForm, torch.Tensor]:
        """The form of ``C + sign·K Kᵀ``, and that matrix's inverse times ``K``, for keys ``(d, u)``.

        Raises:
            torch.linalg.LinAlgError: not positive definite, or not finite.
        """
        try:
            form = FactorForm(cholesky_update(self.lower, keys, sign))
        except torch.linalg.LinAlgError:
            if sign < 0:
                raise
            # An update cannot fail but by rounding: huge, nearly parallel keys. Refactorising bears more of them.
            form = FactorForm(cholesky_update_ref(self.lower, keys, sign))
        solved = form.solve(keys)
        if not torch.isfinite(solved).all():
            raise torch.linalg.LinAlgError("not finite")
        return form, solved

    def factor(self) -> torch.Tensor:
        return self.lower
