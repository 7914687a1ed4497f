"""Which keys share a shard (:mod:`comeba_ext.layers.shards`), layer by layer.

A request's keys are in one shard, and so are requests that have a direction each so close to the other's that one anchor may stand for
both (:func:`~comeba_ext.ops.nearest_hook.stands_for`): a token there cannot say which of them it means. These are facts of one
subject, and subjects with nearly the same key. Where a new request is close to two shards, they become one; where one goes, what it held
together comes apart. So which requests share a shard depends on which there are, and not on what was edited between.
"""

from __future__ import annotations

import copy
from typing import NamedTuple

import torch
from torch.nn import functional as F

from comeba_ext.errors import RequestError
from comeba_ext.layers.hooked_linear import HookedLinear
from comeba_ext.memory.key_memory import KeyMemory
from comeba_ext.memory.ledger import Entry
from comeba_ext.ops.nearest_hook import SAME


class Member(NamedTuple):
    """A request in a layer, on the host.

    Attributes:
        name: its id and the step that wrote it.
        keys: ``(m, d_in)``, responses: ``(m, d_out)``, what they are to answer.
        unit, thresholds: its directions ``(n, rows)`` and their thresholds ``(n,)``, as :meth:`NearestScore.add_anchors` takes them.
        order: its place among all requests, which decides whose directions become anchors.
    """

    name: tuple[str, int]
    keys: torch.Tensor
    responses: torch.Tensor
    unit: torch.Tensor
    thresholds: torch.Tensor
    order: int = 0


class SubjectShards:
    """The shards of one layer.

    Attributes:
        members: shard number to the requests in it, in order.
        units: ``(n, rows)``, all their directions, of_unit: the shard of each.
        of_anchor: the shard of every anchor, by number.
        count: number of shards; free: numbers below it that none has, while something changes.
    """

    def __init__(self) -> None:
        self.members: dict[int, tuple[Member, ...]] = {}
        self.units: torch.Tensor | None = None
        self.of_unit: list[int] = []
        self.of_anchor: list[int] = []
        self.count = self.requests = 0
        self.free: list[int] = []

    def copy(self) -> SubjectShards:
        """Changes to one are not seen in the other."""
        other = copy.copy(self)
        other.members, other.free = dict(self.members), list(self.free)
        other.of_unit, other.of_anchor = list(self.of_unit), list(self.of_anchor)
        return other

    @classmethod
    def loaded(cls, layer: HookedLinear, entries: list[Entry], name: str, shards: list[int]) -> SubjectShards:
        """Those of a layer that holds its anchors and shards already, for live entries and the number of each one's shard."""
        own = cls()
        own.of_anchor = layer.score.shards[: layer.score.known_keys()].tolist()
        own.count = len(layer.shards)
        there = [(_member(entry, name, n), shard) for n, (entry, shard) in enumerate(zip(entries, shards, strict=True)) if shard >= 0]
        own.requests = len(entries)
        for member, shard in there:
            own.members[shard] = (*own.members.get(shard, ()), member)
        if there:
            own.units = torch.cat([member.unit for member, _ in there])
            own.of_unit = [shard for member, shard in there for _ in member.unit]
        own.free = [n for n in range(own.count) if n not in own.members]
        return own

    def of_requests(self) -> dict[str, int]:
        """Request id to shard number."""
        return {member.name[0]: shard for shard, members in self.members.items() for member in members}

    def rebuild(self, layer: HookedLinear, memory: KeyMemory, entries: list[Entry], name: str) -> None:
        """The shards of these entries, in order, in place of all there are. One whose requests stay keeps its factors."""
        rows = layer.shards.rows.cpu()
        before = {tuple(member.name for member in own): rows[n][rows[n] >= 0] for n, own in self.members.items()}
        SubjectShards.__init__(self)
        layer.score.set_anchors(torch.zeros(0, len(layer.score.projection)))
        if not entries:
            layer.shards.clear()
            return
        layer.shards.forget()
        changed = self._place(layer, [_member(entry, name, n) for n, entry in enumerate(entries)])
        kept = {n: before.get(tuple(member.name for member in own)) for n, own in self.members.items()}
        kept = {n: rows for n, rows in kept.items() if rows is not None}
        self._solve(layer, memory, changed - kept.keys(), kept)

    def add(self, layer: HookedLinear, memory: KeyMemory, members: list[Member]) -> None:
        """More requests.

        Raises:
            RequestError: an update is not finite.
        """
        members = [member._replace(order=self.requests + n) for n, member in enumerate(members)]
        self._solve(layer, memory, self._place(layer, members), {})

    def remove(self, layer: HookedLinear, memory: KeyMemory, names: set[tuple[str, int]]) -> None:
        """Take requests out: what is left of their shards is placed anew."""
        gone = {n for n, own in self.members.items() if any(member.name in names for member in own)}
        left = [member for n in gone for member in self.members.pop(n) if member.name not in names]
        if not left and not self.members:
            self.rebuild(layer, memory, [], "")
            return
        self.free += sorted(gone)
        self.units = self.units[torch.tensor([shard not in gone for shard in self.of_unit])]
        self.of_unit = [shard for shard in self.of_unit if shard not in gone]
        self._forget_anchors(layer, gone)
        self._solve(layer, memory, self._place(layer, sorted(left, key=lambda member: member.order)) | gone, {})

    def _place(self, layer: HookedLinear, members: list[Member]) -> set[int]:
        """A shard for every request that has a direction, and their anchors; the numbers of shards that are other ones now, or none
        any more."""
        changed: set[int] = set()
        members = [member for member in members if len(member.unit)]  # without one, no token is ever in its scope
        if not members:
            return changed
        self.requests = max(self.requests, members[-1].order + 1)
        new = torch.cat([member.unit for member in members])
        self.units = new if self.units is None else torch.cat([self.units, new])
        near = F.linear(new, self.units) > SAME
        start = 0
        for member in members:
            rows = slice(start, start + len(member.unit))
            linked = near[rows, : len(self.of_unit)].any(0).nonzero()[:, 0].tolist()
            known = sorted({self.of_unit[n] for n in linked})
            shard = known[0] if known else self.free.pop() if self.free else self.count
            self.count = max(self.count, shard + 1)
            joined = [self.members.pop(n) for n in known]
            self.members[shard] = tuple(sorted((one for own in (*joined, (member,)) for one in own), key=lambda one: one.order))
            self.free += known[1:]
            if known[1:]:
                self.of_unit = [shard if n in known else n for n in self.of_unit]
            self.of_unit += [shard] * len(member.unit)
            changed |= {shard, *known}
            start = rows.stop
        self._forget_anchors(layer, changed)
        anchored = [(member, n) for n in sorted(changed & self.members.keys()) for member in self.members[n]]
        places = layer.score.add_anchors(*(torch.cat([getattr(one, part) for one, _ in anchored]) for part in ("unit", "thresholds")))
        for place, shard in zip(places.tolist(), (n for member, n in anchored for _ in member.unit), strict=True):
            if place == len(self.of_anchor):  # an anchor of its own
                self.of_anchor.append(shard)
        return changed

    def _forget_anchors(self, layer: HookedLinear, shards: set[int]) -> None:
        if shards.intersection(self.of_anchor):
            layer.score.keep_anchors(torch.tensor([shard not in shards for shard in self.of_anchor]))
            self.of_anchor = [shard for shard in self.of_anchor if shard not in shards]

    def _solve(self, layer: HookedLinear, memory: KeyMemory, shards: set[int], kept: dict[int, torch.Tensor]) -> None:
        """Factors of some shards anew, of others where they are; and what a token near an anchor gets."""
        chosen = sorted(shards & self.members.keys())
        found = {n: torch.zeros(0) for n in shards - self.members.keys()} | kept
        if chosen:
            keys, responses = (
                [torch.cat([getattr(one, part) for one in self.members[n]]).to(memory.device, memory.dtype) for n in chosen]
                for part in ("keys", "responses")
            )
            solved = memory.solve(torch.cat(keys).mT).mT.split([len(own) for own in keys])
            factors = [_least_squares(*own) for own in zip(keys, responses, solved, strict=True)]
            sizes = [len(left) for left, _ in factors]
            left, right = (torch.cat(part) for part in zip(*factors, strict=True))
            if not (torch.isfinite(left).all() and torch.isfinite(right).all()):
                raise RequestError("an update is not finite; check the target values and the covariance")
            found |= dict(zip(chosen, layer.shards.append(left, right).split(sizes), strict=True))
        while self.free:  # the last shard takes a number that is free, so that no table has room for none
            last, number = self.count - 1, min(self.free)
            if last in self.members:
                self.members[number] = self.members.pop(last)
                self.of_unit = [number if n == last else n for n in self.of_unit]
                self.of_anchor = [number if n == last else n for n in self.of_anchor]
                found[number] = found[last] if last in found else layer.shards.rows[last][layer.shards.rows[last] >= 0].cpu()
                self.free.remove(number)
            else:
                self.free.remove(last)
            self.count -= 1
        layer.shards.assign({n: rows for n, rows in found.items() if n < self.count}, self.count)
        layer.shards.compact()
        layer.score.assign(torch.tensor(self.of_anchor, dtype=torch.int64))


def _least_squares(keys: torch.Tensor, responses: torch.Tensor, solved: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """The factors of ``V Kᵀ (A + K Kᵀ)⁻¹``, ``(m, d_out)`` and ``(m, d_in)``, for keys ``(m, d_in)``, responses ``(m, d_out)`` and
    ``A⁻¹ K`` in rows, ``(m, d_in)``; the matrix itself where more keys than outputs would make it larger."""
    inner = keys @ solved.mT
    inner.diagonal().add_(1)
    right = torch.linalg.solve(inner, solved)
    if len(right) > responses.shape[1]:
        return torch.eye(responses.shape[1], dtype=right.dtype, device=right.device), responses.mT @ right
    return responses, right


def _member(entry: Entry, name: str, order: int) -> Member:
    return Member((entry.request.request_id, entry.step), entry.keys[name], entry.responses[name], *entry.anchors[name], order)
