"""Which keys share a shard (:mod:`comeba_ext.layers.shards`), layer by layer.

A request's keys are in one shard, and so are requests of which one's anchor stands for a direction of the other
(:func:`~comeba_ext.ops.nearest_hook.stands_for`): a token near that anchor cannot say which of them it means. These are facts of one
subject, and subjects with nearly the same key. Where a new request joins what were two shards, they become one.
"""

from __future__ import annotations

import copy
from typing import NamedTuple

import torch

from comeba_ext.errors import RequestError
from comeba_ext.layers.hooked_linear import HookedLinear
from comeba_ext.memory.key_memory import KeyMemory
from comeba_ext.memory.ledger import Entry


class Member(NamedTuple):
    """A request in a layer, on the host.

    Attributes:
        name: its id and the step that wrote it.
        keys: ``(m, d_in)``, responses: ``(m, d_out)``, what they are to answer.
        unit, thresholds: its directions ``(n, rows)`` and their thresholds ``(n,)``, as :meth:`NearestScore.add_anchors` takes them.
    """

    name: tuple[str, int]
    keys: torch.Tensor
    responses: torch.Tensor
    unit: torch.Tensor
    thresholds: torch.Tensor


class SubjectShards:
    """The shards of one layer.

    Attributes:
        members: shard number to the requests in it.
        of_anchor: the shard of every anchor, by number.
        count: shard numbers given so far, free: those of them that no shard has any more.
    """

    def __init__(self) -> None:
        self.members: dict[int, tuple[Member, ...]] = {}
        self.of_anchor: list[int] = []
        self.count = 0
        self.free: list[int] = []

    def copy(self) -> SubjectShards:
        """Changes to one are not seen in the other."""
        other = copy.copy(self)
        other.members, other.of_anchor, other.free = dict(self.members), list(self.of_anchor), list(self.free)
        return other

    @classmethod
    def loaded(cls, layer: HookedLinear, entries: list[Entry], name: str, shards: list[int]) -> SubjectShards:
        """Those of a layer that holds its anchors and shards already, for live entries and the number of each one's shard."""
        own = cls()
        own.of_anchor = layer.score.shards[: layer.score.known_keys()].tolist()
        own.count = len(layer.shards)
        for entry, shard in zip(entries, shards, strict=True):
            if shard >= 0:
                own.members[shard] = (*own.members.get(shard, ()), _member(entry, name))
        own.free = [n for n in range(own.count) if n not in own.members]
        return own

    def of_requests(self) -> dict[str, int]:
        """Request id to shard number."""
        return {member.name[0]: shard for shard, members in self.members.items() for member in members}

    def rebuild(self, layer: HookedLinear, memory: KeyMemory, entries: list[Entry], name: str) -> None:
        """The shards of these entries, in order, in place of all there are. One whose requests stay keeps its factors."""
        rows = layer.shards.rows.cpu()
        before = {tuple(member.name for member in own): rows[n][rows[n] >= 0] for n, own in self.members.items()}
        self.members, self.of_anchor, self.count, self.free = {}, [], 0, []
        layer.score.set_anchors(torch.zeros(0, len(layer.score.projection)))
        if not entries:
            layer.shards.clear()
            return
        layer.shards.forget()
        changed = self._place(layer, [_member(entry, name) for entry in entries])
        kept = {n: before.get(tuple(member.name for member in own)) for n, own in self.members.items()}
        kept = {n: rows for n, rows in kept.items() if rows is not None}
        self._solve(layer, memory, changed - kept.keys(), kept)

    def add(self, layer: HookedLinear, memory: KeyMemory, members: list[Member]) -> None:
        """More requests.

        Raises:
            RequestError: an update is not finite.
        """
        self._solve(layer, memory, self._place(layer, members), {})

    def remove(self, layer: HookedLinear, memory: KeyMemory, names: set[tuple[str, int]]) -> None:
        """Take requests out: what is left of their shards is placed anew."""
        gone = {n for n, own in self.members.items() if any(member.name in names for member in own)}
        left = [member for n in sorted(gone) for member in self.members.pop(n) if member.name not in names]
        if not left and not self.members:
            self.rebuild(layer, memory, [], "")
            return
        self.free += sorted(gone)
        stays = torch.tensor([shard not in gone for shard in self.of_anchor], dtype=torch.bool)
        self.of_anchor = [shard for shard in self.of_anchor if shard not in gone]
        layer.score.keep_anchors(stays)
        self._solve(layer, memory, self._place(layer, left) | gone, {})

    def _place(self, layer: HookedLinear, members: list[Member]) -> set[int]:
        """Anchors, and a shard for every request that has one; the numbers of shards that are other ones now, or none any more."""
        changed: set[int] = set()
        if not members:
            return changed
        places = layer.score.add_anchors(torch.cat([one.unit for one in members]), torch.cat([one.thresholds for one in members]))
        places = places.split([len(one.thresholds) for one in members])
        for member, own in zip(members, places, strict=True):
            anchors = own.tolist()
            if not anchors:
                continue  # no token is ever in its scope
            self.of_anchor += [-1] * (max(anchors) + 1 - len(self.of_anchor))
            known = sorted({self.of_anchor[anchor] for anchor in anchors} - {-1})
            shard = known[0] if known else self.free.pop() if self.free else self.count
            self.count = max(self.count, shard + 1)
            for other in known[1:]:
                self.members[shard] += self.members.pop(other)
                self.free.append(other)
                self.of_anchor = [shard if n == other else n for n in self.of_anchor]
            changed |= {shard, *known[1:]}
            for anchor in anchors:
                self.of_anchor[anchor] = shard
            self.members[shard] = (*self.members.get(shard, ()), member)
        return changed

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
        layer.shards.assign(found, self.count)
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


def _member(entry: Entry, name: str) -> Member:
    return Member((entry.request.request_id, entry.step), entry.keys[name], entry.responses[name], *entry.anchors[name])
