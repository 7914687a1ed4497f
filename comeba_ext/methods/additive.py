"""Methods whose every request adds a share of its own to ``delta``, and nothing remembers earlier requests."""

from __future__ import annotations

import torch

from comeba_ext.editing.keys import LayerReading
from comeba_ext.editing.report import Phases
from comeba_ext.memory.ledger import Entry, stacked
from comeba_ext.methods.without_hooks import WithoutHooks
from comeba_ext.text.request import EditRequest


class Additive(WithoutHooks):
    """``delta = Σ rᵢ dᵢᵀ``: a residual times a direction, one pair a live request.

    The ledger keeps the direction ``dᵢ`` in the key's place and the residual ``rᵢ`` in the response's, so a request is
    taken back by subtracting its share. A request about a fact edited before takes the earlier one's place as with
    COMEBA-HK: the earlier share is subtracted first. (The published methods, which cannot take anything back, would
    leave it in the weights.)
    """

    def _directions(self, name: str, keys: torch.Tensor, plain: torch.Tensor, residual: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """What a batch adds to a layer; everything in the key memory's dtype.

        Args:
            keys: ``(d_in, u)``, averaged over context prefixes.
            plain: ``(d_in, u)``, the keys behind the empty prefix, where ``h`` is read.
            residual: ``(d_out, u)``, ``(v* − h) / (layers left)``.

        Returns:
            directions ``(d_in, u)`` and residuals ``(d_out, u)``; their product ``residuals @ directionsᵀ`` is added.
        """
        raise NotImplementedError

    def _write(self, batch: list[EditRequest], values: torch.Tensor, phases: Phases, trace=None):
        self._batch_directions: dict[str, torch.Tensor] = {}
        _, residuals = super()._write(batch, values, phases, trace)
        return self._batch_directions, residuals

    def _add(self, name: str, keys: torch.Tensor, reading: LayerReading, residual: torch.Tensor) -> torch.Tensor:
        memory, delta = self.key_memory[name], self.masters[name]
        parts = (t.to(memory.device, memory.dtype).mT for t in (reading.keys, reading.plain_keys, residual))
        directions, residual = self._directions(name, *parts)
        self._shift(name, residual @ directions.mT)
        wide = torch.promote_types(delta.dtype, torch.float32)
        self._batch_directions[name] = directions.mT.to(wide)[:, None]
        return residual.mT.to(wide)[:, None]

    def _exchange(self, name: str, remove: list[Entry], add: list[Entry]) -> None:
        directions, residuals = (t.to(self.masters[name].device).double() for t in stacked(add + remove, name))
        residuals[:, sum(len(entry.keys[name]) for entry in add) :] *= -1
        self._shift(name, residuals @ directions.mT)

    def factors(self, name: str, live: list[Entry]):
        directions, residuals = stacked(live, name)
        return residuals, directions.mT
