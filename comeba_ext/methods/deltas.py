"""Hooked layers whose ``delta`` a method writes."""

from __future__ import annotations

import torch
from torch import nn

from comeba_ext.editing.config import EditConfig
from comeba_ext.editing.session import Session
from comeba_ext.layers.hooked_linear import HookedLinear
from comeba_ext.methods import hooked_state
from comeba_ext.methods.snapshots import Snapshots


def hooked(model: nn.Module, names: list[str], config: EditConfig, mode: str) -> dict[str, HookedLinear]:
    """Hooked layers for the named ones of a model."""
    found = {name: HookedLinear(model.get_submodule(name), config.scope, config.alpha, gate=config.gate) for name in names}
    for layer in found.values():
        layer.mode = mode
        if mode == "temporary":
            layer.alpha.zero_()  # decides nothing; a finite number, where the score's start may be infinite
    return found


def master_of(layer: HookedLinear) -> torch.Tensor:
    """delta in the precision sums are kept in: the buffer itself, or a float32 master of a half-precision one."""
    return layer.delta if layer.delta.dtype.itemsize >= 4 else layer.delta.float()


def masters_on(
    masters: dict[str, torch.Tensor], layers: dict[str, HookedLinear], others: dict[str, HookedLinear]
) -> dict[str, torch.Tensor]:
    """Masters for the same layers of a twin: its buffer where the master is the buffer, else a copy."""
    return {name: layer.delta if masters[name] is layers[name].delta else masters[name].clone() for name, layer in others.items()}


def adopt_masters(masters: dict[str, torch.Tensor], layers: dict[str, HookedLinear], others: dict[str, torch.Tensor]) -> None:
    """Take over a twin's masters; those that are buffers come with their layers."""
    for name, master in masters.items():
        if master is not layers[name].delta:
            master.copy_(others[name])


class Deltas(Snapshots):
    """Writes the weights of some layers, for every token: ``delta`` is what is added to the weight.

    Attributes:
        layers: the hooked layers by name.
        masters: layer name to delta in the precision sums are kept in.
    """

    def __init__(self, session: Session):
        self.masters: dict[str, torch.Tensor] = {}
        super().__init__(session)

    @classmethod
    def build(cls, model: nn.Module, config: EditConfig, architecture) -> dict[str, HookedLinear]:
        return hooked(model, cls.targets(config, architecture), config, "temporary")

    def write(self, name: str, delta: torch.Tensor) -> None:
        """Another delta for a layer, through its master."""
        self.masters[name].copy_(delta)
        if self.layers[name].delta is not self.masters[name]:
            self.layers[name].delta.copy_(self.masters[name])

    def memory(self) -> dict[str, torch.Tensor]:
        if not self.masters:
            self.masters = {name: master_of(layer) for name, layer in self.layers.items()}
        return {f"{name}.delta": master for name, master in self.masters.items()}

    def recall(self, tensors: dict[str, torch.Tensor]) -> None:
        for name in self.layers:
            self.write(name, tensors[f"{name}.delta"])

    def on(self, session: Session) -> Deltas:
        other = super().on(session)
        other.masters = masters_on(self.masters, self.layers, other.layers)
        return other

    def adopt(self, other: Deltas) -> None:
        masters = self.masters
        adopt_masters(masters, self.layers, other.masters)
        super().adopt(other)
        self.masters = masters

    @classmethod
    def check_saved(cls, model: nn.Module, config: EditConfig, architecture, names: list[str], tensors: dict) -> None:
        hooked_state.check(model, cls.targets(config, architecture), names, tensors)

    def state(self) -> tuple[dict[str, torch.Tensor], dict]:
        alphas = {f"{name}.alpha": layer.alpha for name, layer in self.layers.items()}
        tensors, notes = super().state()
        return {**tensors, **alphas}, notes
