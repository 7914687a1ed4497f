"""EMMET: ROME for a batch, by equality constraints (Gupta et al. 2024, arXiv 2403.14236)."""

from __future__ import annotations

from dataclasses import dataclass

import torch

from comeba_ext.editing.config import EditConfig, check_fields
from comeba_ext.methods.additive import Additive


@dataclass(frozen=True)
class EmmetConfig(EditConfig):
    """Settings of EMMET.

    Args:
        ridge: added to ``Kᵀ C⁻¹ K``, without which near keys of a batch make it singular.
    """

    ridge: float = 0.1

    def __post_init__(self) -> None:
        super().__post_init__()
        check_fields(self, not_negative=("ridge",))


class EMMET(Additive):
    """One layer; per batch ``Δ = R (Kᵀ C⁻¹ K + ridge·I)⁻¹ Kᵀ C⁻¹`` with ``C = λ·C0`` (equation 9), so that without the ridge every key
    of the batch gets its value exactly. With one request, which needs no ridge and in the authors' code gets none, it is ROME.

    Raises:
        ConfigError: the settings name more than one layer.
    """

    name = "EMMET"
    config_class = EmmetConfig
    one_layer = True

    def _directions(self, name: str, keys: torch.Tensor, plain: torch.Tensor, residual: torch.Tensor):
        solved = self.key_memory[name].solve(keys)  # C⁻¹ K
        among = keys.mT @ solved
        if len(among) > 1:
            among.diagonal().add_(self.config.ridge)
        return torch.linalg.solve(among, solved.mT).mT, residual
