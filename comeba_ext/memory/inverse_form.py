"""A key memory held as ``C⁻¹ = P − Uᵀ diag(s) U``: the inverse, and the rank-r part not yet folded into it."""

from __future__ import annotations

import math
from typing import NamedTuple

import torch

CHUNK = 1024  # keys taken in at once: bounds the (u, u) and (u, d) intermediates
TOLERANCE = {torch.float64: 1e-9, torch.float32: 1e-3}  # relative error of C⁻¹ y beyond which the form gives up


SLACK = 10  # how much less a change costs, as measured, than the bound by which it is foreseen


class Unfit(ArithmeticError):
    """The change would cost the inverse more accuracy than ``TOLERANCE``."""


class InverseForm(NamedTuple):
    """A value: every change gives a new one, and none writes into a tensor of an old one.

    An update by ``K`` is the Woodbury identity: with ``W = C⁻¹K`` and ``G Gᵀ = I ± Kᵀ W``, ``U`` gains the rows
    ``G⁻¹ Wᵀ``, and ``C_new⁻¹ K = W (I ± KᵀW)⁻¹``. Reading ``P`` once for ``W`` is all that touches d² numbers; writing
    it (:meth:`_folded`) is put off until ``U`` has enough rows to make that one large product.

    Its error is watched by a probe: ``y = C z``, drawn as keys are, is kept beside it at O(d·u) a change, and ``C⁻¹ y``,
    one more row of the same product, must give ``z`` back. (Both are made with the Cholesky factor, so what is seen is
    error beyond that of a factorisation, which no form can do without.) What a change adds is foreseen: where an update makes C⁻¹
    smaller by a factor, the rounding error of P there stays, and so grows by that factor relative to it.

    Attributes:
        inverse: ``P``, ``(d, d)``.
        pending: ``U``, ``(r, d)``, ``signs`` ``(r,)``.
        probe: rows ``z``, ``y``, and what rounding has so far taken from ``y`` (Kahan); ``(3, d)``.
        fresh: relative error of ``C⁻¹ y`` at the beginning, a scalar.
    """

    inverse: torch.Tensor
    pending: torch.Tensor
    signs: torch.Tensor
    probe: torch.Tensor
    fresh: torch.Tensor

    @classmethod
    def of(cls, factor: torch.Tensor) -> InverseForm | None:
        """From the Cholesky factor of ``C``; ``None`` where already the fresh inverse is not accurate enough."""
        noise = torch.randn(len(factor), 1, generator=torch.Generator().manual_seed(0), dtype=torch.float64).to(factor)
        z = torch.linalg.solve_triangular(factor.mT, noise, upper=True)[:, 0]
        y = (factor @ noise)[:, 0]
        probe = torch.stack([z, y, torch.zeros_like(y)])
        inverse = torch.cholesky_inverse(factor).mT.contiguous()  # row-major, as after loading: equal bits follow
        form = cls(inverse, inverse[:0].clone(), inverse[0, :0].clone(), probe, z.new_zeros(()))
        fresh = form._drift(form._times(y[None])[0]).clamp_min(torch.finfo(factor.dtype).eps)
        return form._replace(fresh=fresh) if fresh.item() <= TOLERANCE[factor.dtype] else None

    def solve(self, keys: torch.Tensor) -> torch.Tensor:
        """``C⁻¹ K``, ``(d, u)``."""
        return self._times(keys.mT.contiguous()).mT

    def change(self, keys: torch.Tensor, sign: int) -> tuple[InverseForm, torch.Tensor]:
        """The form of ``C + sign·K Kᵀ``, and that matrix's inverse times ``K``, for keys ``(d, u)``.

        Raises:
            torch.linalg.LinAlgError: not positive definite, or not finite.
            Unfit: not accurate enough in this form.
        """
        if keys.shape[1] <= CHUNK:
            form, solved = self._change(keys.mT.contiguous(), sign)
            return form, solved.mT
        form = self
        for part in keys.split(CHUNK, dim=1):
            form, _ = form._change(part.mT.contiguous(), sign)
        return form, form.solve(keys)

    def factor(self) -> torch.Tensor:
        """The Cholesky factor of ``C``, O(d³): ``P = A Aᵀ`` with upper-triangular ``A``, so ``L = A⁻ᵀ``.

        (Inverting P first would square what its condition number costs.)
        """
        backwards = torch.linalg.cholesky(self._folded().inverse.flip(0, 1))
        eye = torch.eye(len(backwards), dtype=backwards.dtype, device=backwards.device)
        return torch.linalg.solve_triangular(backwards, eye, upper=False).flip(0, 1).mT.contiguous()

    def _times(self, rows: torch.Tensor) -> torch.Tensor:
        """``(C⁻¹ rowsᵀ)ᵀ`` for ``(n, d)``. P is symmetric; transposed is how BLAS reads it fastest for few rows."""
        product = rows @ self.inverse.mT
        if len(self.pending):
            product = product.addmm_((rows @ self.pending.mT) * self.signs, self.pending, alpha=-1)
        return product

    def _change(self, rows: torch.Tensor, sign: int) -> tuple[InverseForm, torch.Tensor]:
        u = len(rows)
        z, y, lost = self.probe
        w = self._times(torch.cat([rows, y[None]]))
        drift, w = self._drift(w[u]), w[:u]
        eye = torch.eye(u, dtype=rows.dtype, device=rows.device)
        inner = torch.addmm(eye, w, rows.mT, alpha=sign)
        corner, info = torch.linalg.cholesky_ex(inner)
        new = torch.linalg.solve_triangular(corner, w, upper=False)
        solved = torch.linalg.solve_triangular(corner.mT, new, upper=True)
        if sign > 0:  # C⁻¹ shrinks by up to the norm of I + KᵀW; the error it has already shrinks with it
            loss = drift + self.fresh * torch.linalg.matrix_norm(inner) / SLACK
        else:  # C⁻¹ grows, and so does all its error
            loss = drift + drift / corner.diagonal().square().amin() / SLACK
        more = torch.add(lost, (z @ rows.mT) @ rows, alpha=sign)
        total = y + more
        probe = torch.stack([z, total, more - (total - y)])
        failed, finite, loss = torch.stack([info.to(loss), torch.isfinite(solved).all().to(loss), loss]).tolist()
        if failed and sign > 0 and math.isfinite(loss):  # mathematically impossible: rounding did it
            raise Unfit("the keys are too large for the inverse")
        if failed or not finite:
            raise torch.linalg.LinAlgError("not positive definite")
        if not loss <= TOLERANCE[rows.dtype]:
            raise Unfit(f"expected relative error {loss:.0e}")
        pending, signs = torch.cat([self.pending, new]), torch.cat([self.signs, eye.new_full((u,), sign)])
        form = self._replace(pending=pending, signs=signs, probe=probe)
        return (form._folded() if len(pending) >= _most_pending(rows.shape[1]) else form), solved

    def _drift(self, found: torch.Tensor) -> torch.Tensor:
        """Relative error of a solution ``(d,)`` of the probe."""
        z = self.probe[0]
        return torch.linalg.vector_norm(found - z) / torch.linalg.vector_norm(z)

    def _folded(self) -> InverseForm:
        """The same matrix with nothing pending."""
        if not len(self.pending):
            return self
        scaled = self.pending * self.signs[:, None]
        inverse = torch.addmm(self.inverse, scaled.mT, self.pending, alpha=-1)
        return self._replace(inverse=inverse, pending=self.pending[:0].clone(), signs=self.signs[:0].clone())


def _most_pending(d: int) -> int:
    """Where reading U with every batch begins to cost what folding it less often saves (measured, flat around it)."""
    return min(512, max(64, d // 16))
