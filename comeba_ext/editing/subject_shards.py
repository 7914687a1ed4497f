"""Which edits share a shard (:mod:`comeba_ext.layers.shards`), layer by layer.

Those of one subject: a request's keys are in one shard, and so are requests that have a name in common, directly or through others.
Where a new request goes by the names of two shards, they become one; where one goes, what it held together comes apart. So which
requests share a shard depends on which there are, and not on what was edited between. A request that no name tells of has a shard of
its own. Subjects with nearly the same key stay apart: at a token of either the text says which is meant, and elsewhere the nearer one is.
"""

from __future__ import annotations

import copy
from typing import NamedTuple

import torch

from comeba_ext.errors import RequestError
from comeba_ext.layers.hooked_linear import HookedLinear
from comeba_ext.memory.key_memory import KeyMemory
from comeba_ext.ops.nearest_hook import stands_for


class Member(NamedTuple):
    """A request in a layer, on the host.

    Attributes:
        name: its id and the step that wrote it.
        keys: ``(m, d_in)``, responses: ``(m, d_out)``, what they are to answer.
        unit, thresholds, named: its directions ``(n, rows)`` and their thresholds ``(n,)``, in general and where the text names the
            subject.
        names, ends: :func:`~comeba_ext.ops.mentions.name_hash` of what its subject is called, and of the tokens that this ends in.
        order: its place among all requests, which decides whose directions become anchors.
    """

    name: tuple[str, int]
    keys: torch.Tensor
    responses: torch.Tensor
    unit: torch.Tensor
    thresholds: torch.Tensor
    named: torch.Tensor
    names: tuple[int, ...] = ()
    ends: tuple[int, ...] = ()
    order: int = 0


class Table(NamedTuple):
    """Which shards hashes stand for, on the host.

    Attributes:
        hashes: ``(n,)`` int64, sorted; shards: ``(n,)`` int64, of each.
    """

    hashes: torch.Tensor = torch.zeros(0, dtype=torch.int64)
    shards: torch.Tensor = torch.zeros(0, dtype=torch.int64)

    def find(self, hashes: list[int]) -> dict[int, int]:
        """Those of these hashes that there are, and the shard of each."""
        if not len(self.hashes) or not hashes:
            return {}
        wanted = torch.tensor(hashes)
        place = torch.searchsorted(self.hashes, wanted).clamp(max=len(self.hashes) - 1)
        there = self.hashes[place] == wanted
        return dict(zip(wanted[there].tolist(), self.shards[place[there]].tolist(), strict=True))

    def insert(self, pairs: list[tuple[int, int]]) -> Table:
        """With more hashes; all that is known keeps its order, so that nothing is sorted anew."""
        if not pairs:
            return self
        own, shards = (torch.tensor(part) for part in zip(*sorted(pairs), strict=True))
        new = torch.zeros(len(self.hashes) + len(own), dtype=torch.bool)
        new[torch.searchsorted(self.hashes, own, right=True) + torch.arange(len(own))] = True
        found = Table(*(torch.empty(len(new), dtype=torch.int64) for _ in range(2)))
        for part, known, added in zip(found, self, (own, shards), strict=True):
            part[~new], part[new] = known, added
        return found

    def without(self, shards: set[int]) -> Table:
        stays = ~_among(self.shards, shards)
        return Table(self.hashes[stays], self.shards[stays])

    def renumbered(self, old, new: int) -> Table:
        """What stood for the shards ``old`` stands for ``new``."""
        return self._replace(shards=torch.where(_among(self.shards, old), new, self.shards))


class SubjectShards:
    """The shards of one layer.

    Attributes:
        members: shard number to the requests in it, in order; place: request to the number of its shard.
        names: all their names; ends: the last tokens of these, each once a shard.
        of_anchor: ``(keys,)`` int64, the shard of every anchor.
        count: number of shards; free: numbers below it that none has, while something changes.
        requests: number of requests that were ever placed.
    """

    def __init__(self) -> None:
        self.members: dict[int, tuple[Member, ...]] = {}
        self.place: dict[tuple[str, int], int] = {}
        self.names, self.ends, self.of_anchor = Table(), Table(), torch.zeros(0, dtype=torch.int64)  # replaced, never written
        self.count = self.requests = 0
        self.free: list[int] = []

    def copy(self) -> SubjectShards:
        """Changes to one are not seen in the other."""
        other = copy.copy(self)
        other.members, other.place, other.free = dict(self.members), dict(self.place), list(self.free)
        return other

    @classmethod
    def loaded(cls, layer: HookedLinear, members: list[Member], shards: list[int]) -> SubjectShards:
        """Those of a layer that holds its anchors and shards already, for its live requests and the number of each one's shard."""
        own, score = cls(), layer.score
        own.of_anchor = score.shards[: score.known_keys()].cpu()
        own.names, own.ends = Table(score.names.cpu(), score.of_name.cpu()), Table(score.ends.cpu(), score.of_end.cpu())
        own.count, own.requests = len(layer.shards), len(members)
        for order, (member, shard) in enumerate(zip(members, shards, strict=True)):
            if shard >= 0:
                own._hold(shard, (*own.members.get(shard, ()), member._replace(order=order)))
        own.free = [n for n in range(own.count) if n not in own.members]
        return own

    def of_requests(self) -> dict[str, int]:
        """Request id to shard number."""
        return {name: shard for (name, _), shard in self.place.items()}

    def _hold(self, shard: int, members: tuple[Member, ...]) -> None:
        self.members[shard] = members
        self.place.update(dict.fromkeys((member.name for member in members), shard))

    def rebuild(self, layer: HookedLinear, memory: KeyMemory | None, members: list[Member]) -> None:
        """The shards of these requests, in order, in place of all there are. One whose requests stay keeps its factors."""
        rows = layer.shards.rows.cpu()
        before = {tuple(member.name for member in own): rows[n][rows[n] >= 0] for n, own in self.members.items()}
        SubjectShards.__init__(self)
        layer.score.set_anchors(torch.zeros(0, len(layer.score.projection)))
        if not members:
            layer.shards.clear()
            return
        layer.shards.forget()
        changed = self._place(layer, [member._replace(order=n) for n, member in enumerate(members)])
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
        gone = {self.place.pop(name) for name in names & self.place.keys()}
        left = [member for n in gone for member in self.members.pop(n) if member.name not in names]
        if not left and not self.members:
            self.rebuild(layer, memory, [])
            return
        self.free += sorted(gone)
        self.names, self.ends = self.names.without(gone), self.ends.without(gone)
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
        called = self.names.find([name for member in members for name in member.names])
        for member in members:
            known = sorted({called[name] for name in member.names if name in called})
            shard = known[0] if known else self.free.pop() if self.free else self.count
            self.count = max(self.count, shard + 1)
            joined = [self.members.pop(n) for n in known]
            self._hold(shard, tuple(sorted((one for own in (*joined, (member,)) for one in own), key=lambda one: one.order)))
            self.free += known[1:]
            if known[1:]:
                self.names = self.names.renumbered(known[1:], shard)
                called = {name: shard if own in known[1:] else own for name, own in called.items()}
            called |= dict.fromkeys(member.names, shard)
            changed |= {shard, *known}
        known = self.names.find(list(called))
        self.names = self.names.insert([(name, n) for name, n in called.items() if name not in known])
        there = sorted(changed & self.members.keys())
        ends = {(end, n) for n in there for member in self.members[n] for end in member.ends}
        self.ends = self.ends.without(changed).insert(list(ends))
        self._forget_anchors(layer, changed)
        found = [_anchors(self.members[n]) for n in there]
        layer.score.append_anchors(*(torch.cat(part) for part in zip(*found, strict=True)))
        sizes = torch.tensor([len(unit) for unit, *_ in found])
        self.of_anchor = torch.cat([self.of_anchor, torch.tensor(there).repeat_interleave(sizes)])
        return changed

    def _forget_anchors(self, layer: HookedLinear, shards: set[int]) -> None:
        gone = _among(self.of_anchor, shards)
        if gone.any():
            layer.score.keep_anchors(~gone)
            self.of_anchor = self.of_anchor[~gone]

    def _solve(self, layer: HookedLinear, memory: KeyMemory | None, shards: set[int], kept: dict[int, torch.Tensor]) -> None:
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
                self._hold(number, self.members.pop(last))
                self.names, self.ends = (table.renumbered([last], number) for table in (self.names, self.ends))
                self.of_anchor = torch.where(self.of_anchor == last, number, self.of_anchor)
                found[number] = found[last] if last in found else layer.shards.rows[last][layer.shards.rows[last] >= 0].cpu()
                self.free.remove(number)
            else:
                self.free.remove(last)
            self.count -= 1
        layer.shards.assign({n: rows for n, rows in found.items() if n < self.count}, self.count)
        layer.shards.compact()
        layer.score.assign(self.of_anchor, (*self.names, *self.ends))


def _among(numbers: torch.Tensor, some) -> torch.Tensor:
    return torch.isin(numbers, torch.tensor(sorted(some), dtype=torch.int64))


def _anchors(members: tuple[Member, ...]) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """The directions of one subject's requests that add a neighbourhood, and their thresholds, the lowest where one stands for others."""
    unit, thresholds, named = (torch.cat([getattr(one, part) for one in members]) for part in ("unit", "thresholds", "named"))
    first, own = stands_for(unit, unit[:0]).unique(return_inverse=True)  # increasing: in order
    lowest = lambda of: of.new_full((len(first),), torch.inf).scatter_reduce(0, own, of, "amin")  # noqa: E731
    return unit[first], lowest(thresholds), lowest(named)


def _least_squares(keys: torch.Tensor, responses: torch.Tensor, solved: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """The factors of ``V Kᵀ (A + K Kᵀ)⁻¹``, ``(m, d_out)`` and ``(m, d_in)``, for keys ``(m, d_in)``, responses ``(m, d_out)`` and
    ``A⁻¹ K`` in rows, ``(m, d_in)``; the matrix itself where more keys than outputs would make it larger."""
    inner = keys @ solved.mT
    inner.diagonal().add_(1)
    right = torch.linalg.solve(inner, solved)
    if len(right) > responses.shape[1]:
        return torch.eye(responses.shape[1], dtype=right.dtype, device=right.device), responses.mT @ right
    return responses, right
