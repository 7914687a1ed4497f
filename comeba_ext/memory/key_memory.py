"""The key memory ``C = λ·C0 + Σ k kᵀ`` of one edited layer (DESIGN §2)."""

from __future__ import annotations

import torch

from comeba_ext.errors import CovarianceError
from comeba_ext.memory.factor_form import FactorForm
from comeba_ext.memory.inverse_form import InverseForm, Unfit


class KeyMemory:
    """What a layer must keep answering as before: the corpus, and every key ever edited.

    Held as the inverse (:class:`InverseForm`: a batch costs about one read of it, in a few large products) for as long
    as that is accurate, which is measured with every batch; from the first batch that would cost it more than
    ``TOLERANCE``, as the Cholesky factor (:class:`FactorForm`: several times slower, backward stable). With the λ of
    the paper (10³ to 10⁴) the inverse stays as accurate as a new factorisation; keys that raise ``C`` by many orders
    of magnitude in some direction, which takes a λ near zero, are what it cannot follow. What is never changed is better
    held as the factor from the beginning: to invert it costs twice the factorisation, which the first solves do not gain back.

    Args:
        matrix: symmetric positive definite ``(d_in, d_in)``, e.g. ``λ·C0``.
        dtype: of all sums; float64 by default, because thousands of rank-u updates accumulate.
        form: ``"inverse"``, or ``"factor"`` for one that is only solved with.

    Attributes:
        state: everything it holds; an update makes a new one, so one read before is a snapshot that
            ``memory.state = snapshot`` restores, bit for bit.

    Raises:
        CovarianceError: the matrix has NaN or infinity, or is not positive definite.
    """

    def __init__(self, matrix: torch.Tensor, dtype: torch.dtype = torch.float64, form: str = "inverse"):
        if not torch.isfinite(matrix).all():
            raise CovarianceError("covariance has NaN or infinite entries; collect it again")
        matrix = matrix.to(dtype)
        factor, info = torch.linalg.cholesky_ex(matrix)
        if info.item() != 0:
            raise CovarianceError(
                f"covariance is not positive definite (leading minor {info.item()} of {len(matrix)}); it needs more "
                f"tokens than dimensions: collect at least 10 x {len(matrix)}"
            )
        self.state: InverseForm | FactorForm = FactorForm(factor.contiguous())
        if form == "inverse":
            self.state = InverseForm.of(factor) or self.state

    @property
    def form(self) -> str:
        """``"inverse"`` or ``"factor"``."""
        return "inverse" if isinstance(self.state, InverseForm) else "factor"

    @property
    def dtype(self) -> torch.dtype:
        return self.state[0].dtype

    @property
    def device(self) -> torch.device:
        return self.state[0].device

    def matrix(self) -> torch.Tensor:
        """``C``, ``(d_in, d_in)``; O(d³), for inspection."""
        factor = self.state.factor()
        return factor @ factor.mT

    def solve(self, keys: torch.Tensor) -> torch.Tensor:
        """``C⁻¹ K`` for keys ``(d_in, u)``, in the memory's dtype."""
        return self.state.solve(keys.to(self.device, self.dtype))

    def update(self, keys: torch.Tensor) -> torch.Tensor:
        """``C ← C + K Kᵀ`` for keys ``(d_in, u)``, any u; returns ``C⁻¹ K`` with the new ``C``, which costs nothing more.

        Raises:
            CovarianceError: the keys have NaN or infinity; C is as it was.
        """
        return self._change(keys, 1)

    def downdate(self, keys: torch.Tensor) -> torch.Tensor:
        """``C ← C − K Kᵀ`` for keys that were put in before; returns ``C⁻¹ K`` with the new ``C``.

        Raises:
            CovarianceError: the keys have NaN or infinity, or the result is not positive definite; C is as it was.
        """
        return self._change(keys, -1)

    def tensors(self) -> dict[str, torch.Tensor]:
        """The state by names, for :meth:`from_tensors`."""
        return self.state._asdict()

    @classmethod
    def from_tensors(cls, tensors: dict[str, torch.Tensor]) -> KeyMemory:
        """The memory that :meth:`tensors` was read from, bit for bit.

        Raises:
            TypeError: tensors are missing, or are not its own.
        """
        memory = object.__new__(cls)
        # Copied, because where a file's tensors begin decides how BLAS sums them: aligned, equal bits follow.
        tensors = {name: tensor.clone() for name, tensor in tensors.items()}
        memory.state = (FactorForm if "lower" in tensors else InverseForm)(**tensors)
        return memory

    def to(self, device: torch.device | str) -> KeyMemory:
        """Itself, moved to a device."""
        self.state = type(self.state)(*(tensor.to(device) for tensor in self.state))
        return self

    def _change(self, keys: torch.Tensor, sign: int) -> torch.Tensor:
        keys = keys.to(self.device, self.dtype)
        if keys.shape[1] == 0:
            return keys.clone()
        try:
            try:
                state, solved = self.state.change(keys, sign)
            except Unfit:
                state, solved = FactorForm(self.state.factor()).change(keys, sign)
        except torch.linalg.LinAlgError:
            # Looked at only now: each look is a wait for the device.
            if not torch.isfinite(keys).all():
                raise CovarianceError("keys have NaN or infinite entries; the key memory is unchanged") from None
            raise CovarianceError("the key memory would lose positive definiteness; it is unchanged") from None
        self.state = state
        return solved
