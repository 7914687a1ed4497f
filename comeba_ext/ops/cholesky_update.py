"""Cholesky factors of ``C ± K Kᵀ`` from those of ``C``, in O(d²·u) each (Gill, Golub, Murray, Saunders 1974, blocked).

The operator ``comeba::cholesky_update_`` has a default implementation in plain torch; its CUDA implementation
(``csrc/cholesky_update.*``) takes over once it is compiled. Neither waits for the device: what went wrong is returned
as a tensor, as :func:`torch.linalg.cholesky_ex` does.
"""

from __future__ import annotations

import torch

from comeba_ext.kernels import loader

CHUNK = 256  # keys eliminated together


def cholesky_update_(factor: torch.Tensor, k: torch.Tensor, sign: int = 1) -> torch.Tensor:
    """Update (``sign`` +1) or downdate (−1) factors in place.

    Args:
        factor: lower-triangular ``L``, ``(..., d, d)``, float32 or float64. What is above the diagonal is neither read
            nor written.
        k: ``(..., d, u)``, any u, same batch, dtype and device.
        sign: +1 or −1.

    Returns:
        int32 ``(...)``: 0 where all is well; i > 0 where the leading minor of order i (to the end of a panel of at most
        128) is not positive or not a number, and then that member's factor is as it was.

    Raises:
        ValueError: shapes, dtypes or devices that do not fit, or another sign.
    """
    _check(factor, k, sign)
    if 4 * k.shape[-1] > factor.shape[-1] > 0:  # refactorising is cheaper
        return _refactorise_(factor, k, sign)
    loader.available(factor.device.type)  # compiles on first use; without a compiler the torch implementation stays
    return torch.ops.comeba.cholesky_update_(factor, k, sign)


def cholesky_update(factor: torch.Tensor, k: torch.Tensor, sign: int = 1) -> torch.Tensor:
    """The new factors, in new memory.

    Raises:
        ValueError: as :func:`cholesky_update_`.
        torch.linalg.LinAlgError: a result is not positive definite, or not a number.
    """
    new = factor.clone(memory_format=torch.contiguous_format)
    info = cholesky_update_(new, k, sign)
    if info.any():
        raise torch.linalg.LinAlgError(f"not positive definite: leading minors {info.tolist()}")
    return new


def cholesky_update_ref(factor: torch.Tensor, k: torch.Tensor, sign: int = 1) -> torch.Tensor:
    """:func:`cholesky_update` by refactorising ``L Lᵀ + sign · k kᵀ``, O(d³) whatever the rank."""
    lower = factor.tril()
    return torch.linalg.cholesky(lower @ lower.mT + float(sign) * (k @ k.mT))


def _check(factor: torch.Tensor, k: torch.Tensor, sign: int) -> None:
    if sign not in (1, -1):
        raise ValueError(f"sign must be 1 or -1, got {sign}")
    if factor.ndim < 2 or factor.shape[-1] != factor.shape[-2] or k.shape[:-1] != factor.shape[:-1]:
        raise ValueError(f"factor {tuple(factor.shape)} and k {tuple(k.shape)} must be (..., d, d) and (..., d, u)")
    if factor.dtype not in (torch.float32, torch.float64) or (k.dtype, k.device) != (factor.dtype, factor.device):
        raise ValueError(
            f"factor and k must be both float32 or both float64 on one device, got {factor.dtype} on {factor.device} "
            f"and {k.dtype} on {k.device}"
        )


def _refactorise_(factor: torch.Tensor, k: torch.Tensor, sign: int) -> torch.Tensor:
    lower = factor.tril()
    new, info = torch.linalg.cholesky_ex(lower @ lower.mT + float(sign) * (k @ k.mT))
    info = _not_finite(new, info)
    factor.copy_(torch.where((info == 0)[..., None, None], new + factor.triu(1), factor))
    return info


# -- default implementation of the operator ------------------------------------------------------------------------


def _cholesky_update_(factor: torch.Tensor, k: torch.Tensor, sign: int) -> torch.Tensor:
    d, u = k.shape[-2:]
    info = torch.zeros(factor.shape[:-2], dtype=torch.int32, device=factor.device)
    if d == 0 or u == 0 or info.numel() == 0:
        return info
    new = factor.clone()
    for chunk in k.split(CHUNK, dim=-1):
        info = _eliminate_(new, chunk, sign, info)
    factor.copy_(torch.where((info == 0)[..., None, None], new, factor))
    return info


def _eliminate_(factor: torch.Tensor, x: torch.Tensor, sign: int, info: torch.Tensor) -> torch.Tensor:
    """Take the columns ``x`` into the factor, panel by panel.

    A panel ``L11``, with the rows below it ``L21`` and the keys' rows ``X1``, ``X2`` and ``P = L11⁻¹ X1``, becomes
    ``L11' = chol(L11 L11ᵀ ± X1 X1ᵀ)`` and ``L21' = (L21 L11ᵀ ± X2 X1ᵀ) L11'⁻ᵀ``; what remains for the trailing factor is
    again an update of the same form (Schur complement, Woodbury), by ``X2' = (X2 − L21 P) G⁻ᵀ`` with
    ``G Gᵀ = I ± Pᵀ P``. So one product per panel does it: ``[L21' X2'] = [L21 X2] T`` with a small ``T``.
    """
    d, u = x.shape[-2:]
    panel = 64 if u <= 32 else 128  # the work is least where the panel is as wide as x, the overhead where it is wide
    eye = torch.eye(u, dtype=x.dtype, device=x.device)
    for start in range(0, d, panel):
        end = min(start + panel, d)
        block = factor[..., start:end, start:end]
        diagonal, x1 = block.tril(), x[..., : end - start, :]
        p = torch.linalg.solve_triangular(diagonal, x1, upper=False)
        corner, failed = torch.linalg.cholesky_ex(diagonal @ diagonal.mT + float(sign) * (x1 @ x1.mT))
        shrink, lost = torch.linalg.cholesky_ex(eye + float(sign) * (p.mT @ p))
        failed = _not_finite(corner, torch.where((failed == 0) & (lost != 0), end - start, failed))
        info = torch.where((info == 0) & (failed != 0), start + failed, info)
        block.copy_(corner + block.triu(1))
        if end < d:
            left = torch.linalg.solve_triangular(corner.mT, torch.cat([diagonal.mT, float(sign) * x1.mT], -2), upper=True, left=False)
            right = torch.linalg.solve_triangular(shrink.mT, torch.cat([-p, eye.expand(*p.shape[:-2], u, u)], -2), upper=True, left=False)
            below = factor[..., end:, start:end]
            both = torch.cat([below, x[..., end - start :, :]], -1) @ torch.cat([left, right], -1)
            below.copy_(both[..., : end - start])
            x = both[..., end - start :]
    return info.to(torch.int32)


def _not_finite(lower: torch.Tensor, info: torch.Tensor) -> torch.Tensor:
    """``info``, with the first pivot that is NaN or infinite where it says that all is well."""
    bad = ~torch.isfinite(lower.diagonal(dim1=-2, dim2=-1))
    first = 1 + bad.int().argmax(-1)
    return torch.where((info == 0) & bad.any(-1), first, info).to(torch.int32)


torch.library.define("comeba::cholesky_update_", "(Tensor(a!) factor, Tensor k, int sign) -> Tensor")
torch.library.impl("comeba::cholesky_update_", "CompositeExplicitAutograd", _cholesky_update_)


@torch.library.register_fake("comeba::cholesky_update_")
def _(factor, k, sign):
    return factor.new_empty(factor.shape[:-2], dtype=torch.int32)
