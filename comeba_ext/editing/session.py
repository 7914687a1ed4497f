"""What an editor and its method work on: one model with its tokenizer, settings, and the ledger of what was edited."""

from __future__ import annotations

import copy
from collections.abc import Iterator
from contextlib import contextmanager

import torch
from torch import nn

from comeba_ext.editing.config import EditConfig
from comeba_ext.forward.architectures import Architecture
from comeba_ext.forward.budget import token_budget
from comeba_ext.forward.half_compute import products_behind
from comeba_ext.forward.logits import logits_at
from comeba_ext.forward.partial import evaluating, frozen
from comeba_ext.layers.attachment import disabled
from comeba_ext.memory.ledger import Ledger
from comeba_ext.text.encoding import input_device, pad_id
from comeba_ext.text.prefixes import sample_prefixes
from comeba_ext.text.rows import Row, batch_inputs


class Session:
    """A model in the course of its edits.

    Attributes:
        model: edited through a method's attachments; during a step the editor's twin of it.
        architecture: where the model's parts are.
        ledger: every request that was edited, and when.
        step: number of steps taken.
        sampled: context prefixes, once they are (:attr:`prefixes`).
    """

    def __init__(self, model: nn.Module, tokenizer, config: EditConfig):
        self.model, self.tokenizer, self.config = model, tokenizer, config
        self.architecture = Architecture.of(model, config.blocks, config.projection)
        self.ledger = Ledger()
        self.step = 0
        self.sampled: list[str] | None = None

    def on(self, model: nn.Module) -> Session:
        """The same with another model and a ledger of its own: what happens there is not seen here."""
        other = copy.copy(self)
        other.model, other.ledger = model, self.ledger.copy()
        return other

    def adopt(self, other: Session) -> None:
        """Take over what has happened on another model."""
        self.__dict__.update(other.__dict__, model=self.model)

    @property
    def prefixes(self) -> list[str]:
        """Context prefixes, the empty one first; sampled once, from the unedited model."""
        if self.sampled is None:
            with disabled(self.model), evaluating(self.model):
                self.sampled = sample_prefixes(
                    self.model, self.tokenizer, self.config.prefixes, self.config.prefix_length, self.config.seed
                )
        return self.sampled

    @property
    def max_tokens(self) -> int:
        """Padded tokens per forward pass: the configuration's, or what the free memory has room for now."""
        return token_budget(self.model, self.config.max_tokens)

    def logits(self, rows: list[Row]) -> list[torch.Tensor]:
        """What predicts the targets of rows, run in one pass: ``(target, vocabulary)`` each, float32 or better."""
        read = logits_at(self.model, batch_inputs(rows, self.pad_token, self.device), [row.predicts for row in rows])
        return [own.to(torch.promote_types(own.dtype, torch.float32)) for own in read]

    @property
    def decoder(self) -> nn.Module:
        return self.model.get_submodule(self.architecture.decoder)

    @property
    def blocks(self) -> list[nn.Module]:
        return list(self.model.get_submodule(self.architecture.blocks))

    @contextmanager
    def training(self) -> Iterator[None]:
        """Inside, what the settings' layers hold can be trained: the model is in eval mode, its parameters are frozen, and behind the last
        of those layers it multiplies as ``compute_dtype`` says."""
        behind = products_behind(max(self.config.layers), self.model, self.blocks, self.config.compute_dtype)
        with evaluating(self.model), frozen(self.model), behind:
            yield

    @property
    def device(self) -> torch.device:
        return input_device(self.model)

    @property
    def pad_token(self) -> int:
        return pad_id(self.tokenizer)
