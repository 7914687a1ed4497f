"""The ledger: every request ever edited, with what each edited layer must know to take it back.

For each of a request's keys ``k_i`` (one, or two where keys are compared) a layer keeps its *response* ``v_i = delta·k_i + R_i``,
what it was asked to answer to that key. Sequential updates ``delta ← delta + R Kᵀ C⁻¹`` are recursive least squares, so at any time

    delta · C = Σ v_i k_iᵀ   over the keys of the live requests,

and a request can be removed, or put back, exactly: see :meth:`ComebaHK._exchange`. Memory: ``d_in + d_out`` floats a key
and layer, on the host.
"""

from __future__ import annotations

import dataclasses
from dataclasses import dataclass, field

import torch

from comeba_ext.text.request import EditRequest

SHOWN = 5  # live edits that a printed ledger names


@dataclass
class Entry:
    """One edited request.

    Attributes:
        step: the step that added it.
        removed: the step that superseded or retracted it, ``None`` while live.
        keys, responses: layer name to ``(m, d_in)`` and ``(m, d_out)``, float32 or better, on the host; empty with methods that
            keep none.
        anchors: layer name to directions ``(m, rows)``, thresholds ``(m,)`` and thresholds where the subject is named (:mod:`anchors`),
            on the host; empty with scores that do not compare keys.
    """

    request: EditRequest
    step: int
    keys: dict[str, torch.Tensor] = field(default_factory=dict)
    responses: dict[str, torch.Tensor] = field(default_factory=dict)
    removed: int | None = None
    anchors: dict[str, tuple[torch.Tensor, torch.Tensor, torch.Tensor]] = field(default_factory=dict)


class Ledger:
    """Entries in the order they were edited; at most one live entry a fact and a request id."""

    def __init__(self) -> None:
        self.entries: list[Entry] = []
        self._by_fact: dict[tuple[str, str], list[Entry]] = {}
        self._by_id: dict[str, Entry] = {}

    def __len__(self) -> int:
        """Number of live requests."""
        return len(self._by_id)

    def __repr__(self) -> str:
        live = self.live()
        shown = [f"{e.request.request_id}: {e.request.text!r} -> {e.request.target_new!r}" for e in live[:SHOWN]]
        more = [f"… {len(live) - SHOWN} more"] * (len(live) > SHOWN)
        return f"<Ledger of {len(self.entries)} edits, {len(live)} live{'; ' * bool(live)}{', '.join(shown + more)}>"

    def live(self) -> list[Entry]:
        return [entry for entry in self.entries if entry.removed is None]

    def of_fact(self, fact: tuple[str, str]) -> list[Entry]:
        """Live entries of a fact."""
        return list(self._by_fact.get(fact, ()))

    def by_id(self, request_id: str) -> Entry | None:
        """The live entry of that id."""
        return self._by_id.get(request_id)

    def copy(self) -> Ledger:
        """Changes to one are not seen in the other."""
        other = Ledger()
        other.entries = [dataclasses.replace(entry) for entry in self.entries]
        for entry in other.entries:
            if entry.removed is None:
                other._index(entry)
        return other

    def add(self, entry: Entry) -> None:
        self.entries.append(entry)
        self._index(entry)

    def remove(self, entry: Entry, step: int) -> None:
        entry.removed = step
        self._by_fact[entry.request.fact].remove(entry)
        if self._by_id.get(entry.request.request_id) is entry:
            del self._by_id[entry.request.request_id]

    def changes_since(self, step: int) -> tuple[list[Entry], list[Entry]]:
        """``(added, removed)`` after ``step`` among the live and the once live then: what a rollback must undo."""
        added = [e for e in self.entries if e.step > step and e.removed is None]
        removed = [e for e in self.entries if e.step <= step and e.removed is not None and e.removed > step]
        return added, removed

    def rewind(self, step: int) -> None:
        """Forget everything after ``step``."""
        self.entries = [e for e in self.entries if e.step <= step]
        self._by_fact, self._by_id = {}, {}
        for entry in self.entries:
            if entry.removed is not None and entry.removed > step:
                entry.removed = None
            if entry.removed is None:
                self._index(entry)

    def _index(self, entry: Entry) -> None:
        self._by_fact.setdefault(entry.request.fact, []).append(entry)
        self._by_id[entry.request.request_id] = entry


def stacked(entries: list[Entry], layer: str) -> tuple[torch.Tensor, torch.Tensor]:
    """Keys ``(d_in, n)`` and responses ``(d_out, n)`` of a layer, in the entries' order."""
    return torch.cat([e.keys[layer] for e in entries]).mT, torch.cat([e.responses[layer] for e in entries]).mT


def without(entries: list[Entry], others: list[Entry]) -> list[Entry]:
    """The entries that are none of the others."""
    left_out = set(map(id, others))
    return [entry for entry in entries if id(entry) not in left_out]
