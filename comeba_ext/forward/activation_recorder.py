"""What the target values' run through the first edited block shows, kept for the keys of the same batch.

Target values and keys begin alike: with the same tokens through the same blocks, up to the first edited layer. Its input
and the hidden states around it are kept from the first run, so that no block up to there runs twice in a step.
"""

from __future__ import annotations

from collections.abc import Sequence
from contextlib import contextmanager
from dataclasses import dataclass

import torch
from torch import nn
from torch.nn.utils.rnn import pad_sequence

from comeba_ext.forward.partial import watched, with_hidden

# A block's output here and in keys: before, after: the block's input and output; x, y: the same of its projection.
NAMES = ("before", "after", "x", "y")


@dataclass
class _Run:
    """One row of a run: ``states[name][row]`` are of tokens ``first, first + 1, …`` of ``ids``."""

    ids: list[int]
    first: int
    row: int
    states: dict[str, torch.Tensor]


class ActivationRecorder:
    """A recording of one block, token by token, that forgets everything when it gets too long.

    Args:
        block: the block; ``projection``: its hooked layer.
        limit: tokens to hold at most, padding included; none behind it.

    Attributes:
        form: an output of the block without its hidden states; ``None`` when nothing was recorded.
    """

    def __init__(self, block: nn.Module, projection: nn.Module, limit: int):
        self.block, self.projection, self.limit = block, projection, limit
        self.form = None
        self._runs: dict[tuple[int, int], _Run] = {}  # (request, prefix) of a row
        self._contexts: dict[int, _Run] = {}  # prefix, for what rows share
        self._tokens = 0

    @contextmanager
    def rows(self, rows: Sequence, shared: list[int]):
        """Inside, one run of ``rows`` (:class:`rows.Row`) without their first ``shared`` tokens is recorded."""
        with self._recorded() as states:
            yield
        if states:
            for n, (row, first) in enumerate(zip(rows, shared, strict=True)):
                if row.prefix >= 0:
                    self._runs[row.request, row.prefix] = _Run(row.ids, first, n, states)

    @contextmanager
    def contexts(self, ids: dict[int, list[int]]):
        """Inside, one run of what the rows of each prefix begin with is recorded; ``ids``: prefix to token ids, in the
        run's order."""
        with self._recorded() as states:
            yield
        if states:
            self._contexts |= {prefix: _Run(own, 0, n, states) for n, (prefix, own) in enumerate(ids.items())}

    @contextmanager
    def _recorded(self):
        states: dict[str, torch.Tensor] = {}
        with watched(self.block, self.projection) as seen:
            yield states
        form, shape = with_hidden(seen["after"], None), seen["before"].shape[:2]
        self._tokens += shape.numel()
        if self._tokens > self.limit:
            self._runs, self._contexts, self.form = {}, {}, None
            return
        self.form = form
        states |= {name: value.reshape(*shape, -1) for name, value in seen.hidden().items()}

    def padded(self, rows: Sequence, first: list[int], ends: list[int]) -> dict[str, torch.Tensor] | None:
        """Tokens ``first … ends − 1`` of every row, each ``(rows, longest, d)`` with zeros behind a row's end.

        Returns:
            ``before``, ``after``, ``x`` and ``y``, or ``None`` if not all of it was recorded.
        """
        found = [self._parts(row, a, b) for row, a, b in zip(rows, first, ends, strict=True)]
        if not all(found):
            return None
        join = lambda parts, name: torch.cat([run.states[name][run.row, a:b] for run, a, b in parts])  # noqa: E731
        return {name: pad_sequence([join(parts, name) for parts in found], batch_first=True) for name in NAMES}

    def _parts(self, row, first: int, end: int) -> list[tuple[_Run, int, int]]:
        """Where tokens ``first … end − 1`` of a row are: runs with the columns to take of them; empty if nowhere."""
        run = self._runs.get((row.request, row.prefix))
        if run is None or len(run.ids) < end or run.ids[:end] != row.ids[:end]:
            return []
        own = [(run, max(first - run.first, 0), end - run.first)]
        if first >= run.first:
            return own
        context = self._contexts.get(row.prefix)
        return [(context, first, run.first), *own] if context is not None else []
