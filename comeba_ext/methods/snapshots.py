"""Methods whose edits cannot be told apart afterwards: a rollback returns to a state that was kept."""

from __future__ import annotations

import copy
from abc import abstractmethod

import torch

from comeba_ext.editing.report import Phases
from comeba_ext.editing.session import Session
from comeba_ext.errors import RequestError
from comeba_ext.memory.ledger import Entry
from comeba_ext.methods.base import Method, OnProgress, Outcome, of_layer
from comeba_ext.text.request import EditRequest

KEPT = 10  # latest steps a rollback can reach, each a copy of the state on the host
KEPT_BYTES = 4 << 30  # that all copies may take; of what is larger the latest two are kept: before a step and after it


class Snapshots(Method):
    """Keeps the state at step 0 and after the latest ten steps (of large models fewer), as far back as the one that was loaded.

    A subclass edits with :meth:`apply`, and names its state with :meth:`memory` where that is more than its attachments' buffers,
    and with ``notes`` where it is no tensors. It may take single edits out with :meth:`take_out`, which then also happens to those
    whose place a batch takes.

    Attributes:
        notes: what else it must know to go on, as JSON can hold it.
    """

    def __init__(self, session: Session):
        super().__init__(session)
        self.notes: dict = self.blank()
        self.kept: dict[int, tuple[dict[str, torch.Tensor], dict]] = {}  # step -> state and notes after it
        self.first = self._copy()

    def blank(self) -> dict:
        """Notes before any edit."""
        return {}

    def renewed(self, notes: dict) -> dict:
        """Notes as this version has them, of those that any version has saved."""
        return notes

    @abstractmethod
    def apply(self, batch: list[EditRequest], phases: Phases, on_progress: OnProgress) -> tuple[list[float], list[int]]:
        """Edit a batch; returns its final losses and optimiser steps, one each a request (or none)."""

    def take_out(self, entries: list[Entry]) -> None:
        """Take single edits out.

        Raises:
            RequestError: that cannot be done here.
        """
        raise RequestError(f"{self.name} trains on whole batches, so no single request can be taken back; use rollback")

    def memory(self) -> dict[str, torch.Tensor]:
        """The state, by names."""
        return {f"{name}.{what}": own for name, a in self.attachments.items() for what, own in a.own_buffers().items()}

    def recall(self, tensors: dict[str, torch.Tensor]) -> None:
        """Return to a state that :meth:`memory` gave."""
        for name, attachment in self.attachments.items():
            attachment.restore(of_layer(tensors, name))

    # -- what follows for every such method ---------------------------------------------------------------------

    def edit(self, batch: list[EditRequest], values: None, phases: Phases, on_progress: OnProgress) -> Outcome:
        replaced = self.superseded(batch)
        self._keep(self.session.step)
        if replaced and type(self).take_out is not Snapshots.take_out:
            self.take_out(replaced)
        losses, steps = self.apply(batch, phases, on_progress)
        if any(not torch.isfinite(own).all() for own in self.memory().values() if own.is_floating_point()):
            raise RequestError(f"{self.name} diverged on this batch; lower the learning rate")
        self._keep(self.session.step + 1)
        entries = [Entry(request, self.session.step + 1) for request in batch]
        return Outcome(batch, entries, len(batch), replaced, losses=losses, optimizer_steps=steps)

    def retract(self, entries: list[Entry]) -> None:
        self._keep(self.session.step)
        self.take_out(entries)
        self._keep(self.session.step + 1)

    def revert(self, step: int, added: list[Entry], removed: list[Entry]) -> None:
        if step == self.session.step:
            return
        if step and step not in self.kept:
            there = [s for s in sorted(self.kept) if s < self.session.step]
            raise RequestError(f"{self.name} keeps the latest steps; cannot roll back to step {step}, only to {[0, *there]}")
        tensors, self.notes = copy.deepcopy(self.kept[step] if step else self.first)
        self.recall(tensors)
        self.kept = {kept: state for kept, state in self.kept.items() if kept <= step}

    def on(self, session: Session) -> Snapshots:
        other = super().on(session)
        other.kept, other.notes = dict(self.kept), copy.deepcopy(self.notes)
        return other

    def state(self) -> tuple[dict[str, torch.Tensor], dict]:
        return self.memory(), {"notes": self.notes}

    def load_state(self, tensors: dict[str, torch.Tensor], manifest: dict) -> None:
        notes = manifest.get("notes", self.notes)
        notes = self.renewed(notes) if isinstance(notes, dict) else notes
        if not isinstance(notes, dict) or set(notes) != set(self.notes):
            raise ValueError("notes is malformed")
        self.recall(tensors)
        self.notes = notes

    def _copy(self) -> tuple[dict[str, torch.Tensor], dict]:
        """The state on the host; what has not changed since it was kept last is the same tensor, and of one that has only grown the rows
        that were kept are a part of what is."""
        last = self.kept[max(self.kept)][0] if self.kept else {}
        found = {}
        for name, own in self.memory().items():
            own, before = own.detach().cpu(), last.get(name)
            alike = before is not None and before.dtype == own.dtype and before.dim() == own.dim() > 0 and len(before) <= len(own)
            begins = alike and before.shape[1:] == own.shape[1:] and torch.equal(before, own[: len(before)])
            if not own.any():
                found[name] = own.new_zeros(()).expand(own.shape)  # a matrix before any edit takes no memory
            else:
                found[name] = before if begins and len(before) == len(own) else own.clone()
            if begins and 0 < len(before) < len(own):
                last[name] = found[name][: len(before)]
        return found, copy.deepcopy(self.notes)

    def _keep(self, step: int) -> None:
        """Note the state as it is now, after ``step`` (of which there is one already in the course of a run)."""
        if step and step not in self.kept:  # step 0 is `first`
            self.kept[step] = self._copy()
            for old in sorted(self.kept)[:-2]:
                if len(self.kept) > KEPT or self._bytes() > KEPT_BYTES:
                    del self.kept[old]

    def _bytes(self) -> int:
        """Of all states that are kept, what they share counted once."""
        tensors = (own.untyped_storage() for tensors, _ in self.kept.values() for own in tensors.values())
        return sum({own.data_ptr(): own.nbytes() for own in tensors}.values())
