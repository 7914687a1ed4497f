"""AlphaEdit: updates in the null space of what is to be preserved (Fang et al. 2025, arXiv 2410.02355), and BetaEdit's switch."""

from __future__ import annotations

from dataclasses import dataclass

import torch

from comeba_ext.covariance import Covariance
from comeba_ext.editing.config import EditConfig, check_fields
from comeba_ext.editing.keys import LayerReading
from comeba_ext.editing.session import Session
from comeba_ext.errors import ConfigError, CovarianceError
from comeba_ext.memory.ledger import Entry
from comeba_ext.methods.additive import Additive


@dataclass(frozen=True)
class AlphaEditConfig(EditConfig):
    """Settings of AlphaEdit.

    Args:
        null_threshold: directions in which the covariance has a smaller eigenvalue may be written to. Published: 0.02, in the units
            of the models it was chosen on.
        null_share: instead of it, the share of directions that may be written to, those with the smallest eigenvalues: a threshold
            that means the same on every model.
        ridge: ``L2``, weight of the identity.
        preserve: BetaEdit's ``λ₁``, weight of ``C0`` beside the keys of earlier edits; 0: AlphaEdit.
        refresh: BetaEdit: so many edits after which the null space is found again, with the earlier edits' keys in it; ``None``: never.
    """

    null_threshold: float | None = 0.02
    null_share: float | None = None
    ridge: float = 10.0
    preserve: float = 0.0
    refresh: int | None = None

    def __post_init__(self) -> None:
        super().__post_init__()
        if (self.null_threshold is None) == (self.null_share is None):
            raise ConfigError("give one of null_threshold and null_share, and null for the other")
        check_fields(
            self,
            positive=("ridge",),
            positive_or_none=("null_threshold",),
            shares_or_none=("null_share",),
            not_negative=("preserve",),
            counts_or_none=("refresh",),
        )


class AlphaEdit(Additive):
    """Per batch and layer ``Δᵀ = (P (K Kᵀ + Cp + λ₁·C0) + L2·I)⁻¹ P K Rᵀ`` (equation 12; λ₁ = 0), where ``P`` projects onto the null
    space of ``C0`` and ``Cp`` is the sum of ``k kᵀ`` over the live edits' keys. Projector and sum are this editor's own.

    The ledger keeps, behind each direction, the key itself (with a response of zero, so that it adds nothing to ``delta``): ``Cp``
    follows from it wherever edits are taken back.
    """

    name = "AlphaEdit"
    config_class = AlphaEditConfig

    def __init__(self, session: Session):
        super().__init__(session)
        # Layer name to P, and the keys of the edits that it was found with.
        self.projectors: dict[str, tuple[list[torch.Tensor], torch.Tensor]] = {}

    def set_covariance(self, covariance: Covariance) -> None:
        super().set_covariance(covariance)
        self.projectors = {}
        for name in self.layers:
            self._projector(name)

    def _directions(self, name: str, keys: torch.Tensor, plain: torch.Tensor, residual: torch.Tensor):
        config, projector = self.config, self._projector(name).to(keys)
        kept = keys @ keys.mT + self._past(name, self.standing, keys)
        if config.preserve:
            kept += config.preserve * self.covariance[name].to(keys)
        system = projector @ kept
        system.diagonal().add_(config.ridge)
        return torch.linalg.solve(system, projector @ keys), residual

    def _add(self, name: str, keys: torch.Tensor, reading: LayerReading, residual: torch.Tensor) -> torch.Tensor:
        responses = super()._add(name, keys, reading, residual)  # (u, 1, d_out)
        directions = self._batch_directions[name]  # (u, 1, d_in)
        self._batch_directions[name] = torch.cat([directions, reading.keys[:, None].to(directions)], 1)
        return torch.cat([responses, torch.zeros_like(responses)], 1)

    def _past(self, name: str, entries: list[Entry], like: torch.Tensor) -> torch.Tensor:
        """``Cp`` of some entries."""
        keys = torch.stack([entry.keys[name][1] for entry in entries], 1).to(like) if entries else like[:, :0]
        return keys @ keys.mT

    def _projector(self, name: str) -> torch.Tensor:
        """``P`` of a layer, found anew after every ``refresh`` edits, with all but the latest ``len(standing) % refresh``, and where one
        of those was taken back."""
        config, covariance = self.config, self.covariance[name]
        seen = 0 if config.refresh is None else len(self.standing) // config.refresh * config.refresh
        keys = [entry.keys[name] for entry in self.standing[:seen]]
        found = self.projectors.get(name)
        if found is None or len(found[0]) != seen or any(a is not b for a, b in zip(found[0], keys)):
            moment = covariance.to(self.layers[name].delta.device, torch.float64)  # there it takes seconds
            if seen:
                past = self._past(name, self.standing[:seen], moment) / seen
                moment = (past + config.preserve * moment) / (config.preserve + 1)
            values, vectors = torch.linalg.eigh(moment)  # increasing
            share, below = config.null_share, config.null_threshold
            count = max(1, round(share * len(values))) if share else int((values < below).sum())
            if not count:
                raise CovarianceError(
                    f"{name}: no direction has an eigenvalue below {config.null_threshold} (they are {values[0]:.3g} to {values[-1]:.3g}), "
                    "so nothing may be written; give null_share instead of null_threshold"
                )
            null = vectors[:, :count]
            self.projectors[name] = (keys, (null @ null.mT).to(covariance.device))  # kept beside C0
        return self.projectors[name][1]

    def on(self, session: Session) -> AlphaEdit:
        other = super().on(session)
        other.projectors = dict(self.projectors)
        return other


class BetaEdit(AlphaEdit):
    """AlphaEdit with ``λ₁·C0`` kept beside the earlier keys, and the null space found anew every ``refresh`` edits from
    ``(Cp/n + λ₁·C0)/(λ₁ + 1)`` of the edits until then."""

    name = "BetaEdit"
