"""Passes over rows: the loss of their targets, its gradients as factors of layers, and what layers are given and give at every token."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import nn
from torch.nn import functional as F
from torch.nn.utils.rnn import pad_sequence

from comeba_ext.editing.session import Session
from comeba_ext.forward.logits import logits_at
from comeba_ext.forward.partial import evaluating, hidden_of, resumed, run_until, with_hidden
from comeba_ext.text.encoding import micro_batches
from comeba_ext.text.rows import Row, batch_inputs


class TrainingRows:
    """Rows that are run again and again while something in one block is trained: what lies below it runs once.

    Args:
        rows: with targets (:func:`~comeba_ext.text.rows.target_rows`, :func:`~comeba_ext.text.rows.answer_rows`).
        block: number of the first block whose output may change.
    """

    def __init__(self, session: Session, rows: list[Row], block: int):
        self.session, self.rows, self.block = session, rows, block
        self.groups = []  # numbers of rows, their inputs, and the output of the block below
        for group in micro_batches([len(row.ids) for row in rows], session.max_tokens):
            inputs = batch_inputs([rows[n] for n in group], session.pad_token, session.device)
            below: list = [None]
            if block:
                run_until(session.decoder, session.blocks[block - 1], inputs, {}, lambda output, below=below: below.__setitem__(0, output))
            self.groups.append((group, inputs, below[0]))

    def losses(self, *, backward: bool = False) -> list[float]:
        """NLL of every row's target, mean over its tokens.

        Args:
            backward: leave the gradient of the rows' mean where gradients are kept.
        """
        found = [0.0] * len(self.rows)
        for group, inputs, below in self.groups:
            with torch.set_grad_enabled(backward):
                read = self._logits(inputs, below, [self.rows[n].predicts for n in group])
                wide = torch.promote_types(read[0].dtype, torch.float32)
                targets = [torch.tensor(self.rows[n].target, device=read[0].device) for n in group]
                own = [F.cross_entropy(logits.to(wide), target) for logits, target in zip(read, targets, strict=True)]
                if backward:
                    (sum(own) / len(self.rows)).backward()
            for n, loss in zip(group, own, strict=True):
                found[n] = loss.item()
        return found

    def _logits(self, inputs: dict, below, places: list[range]) -> list[torch.Tensor]:
        model = self.session.model
        if below is None:
            return logits_at(model, inputs, places)
        with resumed(self.session.blocks, self.block - 1, lambda: hidden_of(below), below):
            return logits_at(model, inputs, places)


KEPT = 2**30  # bytes of states that are kept, at most


class LowerStates:
    """Runs rows of which only blocks from one on differ from time to time: what the block below gives is computed once a row and kept.

    A row is run by itself the first time, in full precision, so that its state does not depend on when and beside what that is.

    Args:
        block: number of the first block that may differ; nothing below it may.
    """

    def __init__(self, session: Session, block: int):
        self.session, self.block = session, block
        self.kept: dict[tuple[int, ...], torch.Tensor] = {}  # token ids to (tokens, d_model)
        self.room = KEPT
        self.output = None  # one of the block below, for its type

    def logits(self, rows: list[Row]) -> list[torch.Tensor]:
        """As :meth:`Session.logits`."""
        session = self.session
        if not self.block:
            return session.logits(rows)
        hidden = pad_sequence([self._of(row) for row in rows], batch_first=True)
        with resumed(session.blocks, self.block - 1, lambda: hidden, self.output):
            return session.logits(rows)

    @torch.no_grad()
    def _of(self, row: Row) -> torch.Tensor:
        session, ids = self.session, tuple(row.ids)
        if (state := self.kept.get(ids)) is not None:
            return state
        seen: list = []
        inputs = batch_inputs([row], session.pad_token, session.device)
        with evaluating(session.model), torch.autocast(session.device.type, enabled=False):
            run_until(session.decoder, session.blocks[self.block - 1], inputs, {}, seen.append)
        state = hidden_of(seen[0])[0]
        self.output = with_hidden(seen[0], None)
        if state.nbytes <= self.room:
            self.kept[ids] = state
            self.room -= state.nbytes
        return state


def factors_of(
    session: Session, layers: dict[str, nn.Module], rows: list[Row], everywhere: bool = False, logits: Callable | None = None
) -> tuple[dict[str, tuple[torch.Tensor, torch.Tensor]], list[float]]:
    """The loss's gradients with respect to layers' weights, as factors: of one backward pass a micro-batch, never as matrices.

    Args:
        layers: by name, in the order in which they run.
        rows: with targets; a row's loss is the mean over its target's tokens, and the whole's the mean over rows.
        everywhere: at every token, so that ``Σ g xᵀ`` is the whole gradient; else at those that give the target.
        logits: runs rows; ``None``: :meth:`Session.logits`.

    Returns:
        Layer name to inputs ``x (tokens, d_in)`` and gradients ``g (tokens, d_out)`` with respect to the layer's outputs, row after row;
        rows' losses.
    """
    inputs: dict[str, dict[int, torch.Tensor]] = {name: {} for name in layers}
    gradients: dict[str, dict[int, torch.Tensor]] = {name: {} for name in layers}
    losses = [0.0] * len(rows)
    for group in micro_batches([len(row.ids) for row in rows], session.max_tokens):
        chosen = [rows[n] for n in group]
        seen: dict[str, tuple[torch.Tensor, torch.Tensor]] = {}
        handles = [layer.register_forward_hook(_noting(name, seen)) for name, layer in layers.items()]
        try:
            read = (logits or session.logits)(chosen)
        finally:
            for handle in handles:
                handle.remove()
        own = [F.cross_entropy(logits, torch.tensor(row.target, device=logits.device)) for logits, row in zip(read, chosen, strict=True)]
        found = torch.autograd.grad(sum(own) / len(rows), [output for _, output in seen.values()])
        for (name, (x, _)), gradient in zip(seen.items(), found, strict=True):
            for both, whole in ((inputs, x), (gradients, gradient)):
                for i, (n, row) in enumerate(zip(group, chosen, strict=True)):
                    own_tokens = whole.reshape(len(chosen), -1, whole.shape[-1])[i]  # some families flatten tokens before the MLP
                    both[name][n] = own_tokens[: len(row.ids)] if everywhere else own_tokens[list(row.predicts)]
        for n, loss in zip(group, own, strict=True):
            losses[n] = loss.item()
    in_order = lambda found: torch.cat([found[n] for n in range(len(rows))])  # noqa: E731
    return {name: (in_order(inputs[name]), in_order(gradients[name])) for name in layers}, losses


def _noting(name: str, seen: dict):
    def note(module, args, output):
        output = output if output.requires_grad else output.detach().requires_grad_(True)  # the first layer's starts the graph
        seen[name] = (args[0].detach(), output)
        return output

    return note


def inputs_of(session: Session, layer: nn.Module, rows: list[Row]) -> list[torch.Tensor]:
    """A layer's inputs at every token of every row, each ``(tokens, d_in)``."""
    return _seen(session, layer, rows, lambda inputs, seen: run_until(session.decoder, layer, inputs, {layer: seen.append}, before=True))


def outputs_of(session: Session, layer: nn.Module, rows: list[Row]) -> list[torch.Tensor]:
    """A layer's outputs at every token of every row, each ``(tokens, d_out)``."""
    return _seen(session, layer, rows, lambda inputs, seen: run_until(session.decoder, layer, inputs, {}, seen.append))


@torch.no_grad()
def _seen(session: Session, layer: nn.Module, rows: list[Row], look: Callable[[dict, list], None]) -> list[torch.Tensor]:
    found: list[torch.Tensor | None] = [None] * len(rows)
    for group in micro_batches([len(row.ids) for row in rows], session.max_tokens):
        seen: list[torch.Tensor] = []
        look(batch_inputs([rows[n] for n in group], session.pad_token, session.device), seen)
        whole = seen[0].reshape(len(group), -1, seen[0].shape[-1])  # some families flatten tokens before the MLP
        for place, n in enumerate(group):
            found[n] = whole[place, : len(rows[n].ids)]
    return found
