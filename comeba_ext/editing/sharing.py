"""Target values of a batch, found by several processes together."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable

import torch

from comeba_ext import distributed
from comeba_ext.editing.target_values import TargetValues
from comeba_ext.text.request import EditRequest


def shared_target_values(
    find: Callable[[list[EditRequest], list[list[int]]], TargetValues],
    batch: list[EditRequest],
    groups: list[list[int]],
    device: torch.device,
) -> TargetValues:
    """Of several processes each finds every n-th group's, and all return all of them.

    Args:
        find: target values of some requests, with the groups of their numbers that share a δ.
        groups: numbers of requests in the batch that share a δ, each in one.
        device: of the values, where they come from other processes.
    """
    rank, world = distributed.rank(), distributed.world_size()
    numbers = [sorted(n for group in groups[r::world] for n in group) for r in range(world)]  # of every process
    own = [batch[n] for n in numbers[rank]]
    together = [[numbers[rank].index(n) for n in group] for group in groups[rank::world]]

    def work() -> TargetValues | None:
        found = find(own, together) if own else None
        return found if world == 1 or found is None else dataclasses.replace(found, values=found.values.cpu())

    shares = distributed.together(work)
    if world == 1:
        return shares[0]
    place = {n: (shares[r], k) for r, own in enumerate(numbers) for k, n in enumerate(own)}
    rows = [place[n] for n in range(len(batch))]
    return TargetValues(
        torch.stack([share.values[k] for share, k in rows]).to(device),
        [share.losses[k] for share, k in rows],
        [share.steps[k] for share, k in rows],
    )
