"""What a method is: how a batch of requests gets into a model, out of it again, and onto disk.

An editor *has* a method. The editor checks requests and gives them ids, runs every step on a twin of the model and takes it over
when it is whole, keeps the ledger and the log, saves and loads. A method says what it puts into the model (:meth:`Method.build`),
edits a batch (:meth:`Method.edit`), takes it back (:meth:`Method.revert`, :meth:`Method.retract`), and hands over its state as
tensors. Formulas and settings are a method's; nothing outside of its file knows its name.
"""

from __future__ import annotations

import copy
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import ClassVar

import torch
from torch import nn

from comeba_ext.covariance import Covariance
from comeba_ext.editing.answers import answered
from comeba_ext.editing.config import EditConfig
from comeba_ext.editing.report import Phases
from comeba_ext.editing.session import Session
from comeba_ext.errors import ConfigError, RequestError
from comeba_ext.forward.architectures import Architecture, context_length
from comeba_ext.forward.partial import evaluating
from comeba_ext.layers.attachment import Attachment, attach, attachments, detach
from comeba_ext.layers.prompts import give_tokenizer, prompt_rewriter
from comeba_ext.memory.ledger import Entry
from comeba_ext.text.request import EditRequest
from comeba_ext.text.rows import answer_rows, check_length, target_rows

OnProgress = Callable[[int, float], None]  # requests done, loss


@dataclass
class Outcome:
    """What a method did with a batch.

    Attributes:
        edited: the requests that are in the model now, as they were written; those of the batch first, then, if there are more,
            earlier ones that were written anew with them.
        entries: what the ledger keeps of each of them.
        asked: how many of them are of the batch.
        replaced: live entries whose place they took, those written anew among them.
        declined, moved, losses, optimizer_steps, leverage, share: as in :class:`~comeba_ext.editing.report.EditReport`, the last
            four of the batch's own requests.
    """

    edited: list[EditRequest]
    entries: list[Entry]
    asked: int
    replaced: list[Entry] = field(default_factory=list)
    declined: list[dict] = field(default_factory=list)
    moved: list[str] = field(default_factory=list)
    losses: list[float] = field(default_factory=list)
    optimizer_steps: list[int] = field(default_factory=list)
    leverage: dict[str, float] = field(default_factory=dict)
    share: dict[str, float] = field(default_factory=dict)


class Method:
    """A way to edit a model.

    Class attributes:
        name: in ``--method``, saved folders and tables; ``aliases``: other names that it is found by.
        config_class: of its settings.
        needs_covariance: whether nothing can be edited without one.
        scored: whether a score decides which tokens are in scope (so ``scope`` is a setting of it).
        takes_values: whether target values can be given to it and asked of it.
        one_layer: whether it edits a single layer.
        in_prompt: whether its edits stand in the prompt (:mod:`comeba_ext.layers.prompts`).
        tells_questions: whether it heeds ``question_floor``.

    Attributes:
        session: what it works on.
        attachments: what it has put into the model, by name; layers: those of them that wrap layers that it edits.
    """

    name: ClassVar[str] = ""
    aliases: ClassVar[tuple[str, ...]] = ()
    config_class: ClassVar[type[EditConfig]] = EditConfig
    needs_covariance: ClassVar[bool] = False
    scored: ClassVar[bool] = False
    takes_values: ClassVar[bool] = False
    one_layer: ClassVar[bool] = False
    in_prompt: ClassVar[bool] = False
    tells_questions: ClassVar[bool] = False

    def __init__(self, session: Session):
        self.session = session
        self.attachments: dict[str, Attachment] = self.attach(session.model, session.config, session.architecture)
        give_tokenizer(self.attachments, session.tokenizer)

    @classmethod
    def made(cls, session: Session) -> Method:
        """One at work on a session; if that fails, however late, the model is as it was."""
        edited = bool(attachments(session.model))
        try:
            return cls(session)
        except BaseException:
            if not edited:
                detach(session.model)
            raise

    @property
    def config(self) -> EditConfig:
        return self.session.config

    @property
    def layers(self) -> dict[str, Attachment]:
        return {name: own for name, own in self.attachments.items() if hasattr(own, "base_layer")}

    @property
    def attachment(self) -> Attachment:
        """The only one, of methods that have one."""
        (found,) = self.attachments.values()
        return found

    # -- what it puts into a model ------------------------------------------------------------------------------

    @classmethod
    def check(cls, config: EditConfig, model: nn.Module, architecture: Architecture) -> None:
        """Raises :class:`ConfigError` for settings that this method cannot use on this model."""
        depth = architecture.num_blocks(model)
        if config.value_layer >= depth:
            raise ConfigError(f"layers {list(config.layers)}: the model has blocks 0 to {depth - 1}")
        if config.question_floor is not None and not cls.tells_questions:
            raise ConfigError(f"question_floor: {cls.name} does not tell what is asked; COMEBA-HK (nearest), ICE, IKE and SERAC can")
        if cls.one_layer and len(config.layers) != 1:
            raise ConfigError(f"{cls.name} edits one layer, got layers {list(config.layers)}")

    @staticmethod
    def check_named(names: list[str], model: nn.Module, setting: str) -> None:
        """Raises :class:`ConfigError`, about the setting that named it, for a layer that the model has not."""
        known = dict(model.named_modules())
        for name in names:
            if name not in known:
                raise ConfigError(f"{setting}: the model has no {name!r}; see model.named_modules()")

    @classmethod
    def implied(cls, changes: dict) -> dict:
        """Settings that follow from those a user gives, such as a file that was made with some; what is given itself comes before."""
        return {}

    @classmethod
    def preparation(cls, config: EditConfig) -> dict:
        """What was done before the first edit and belongs beside its cost, such as ``training_seconds``; JSON-serialisable."""
        return {}

    @classmethod
    def files(cls, config: EditConfig) -> dict[str, Path]:
        """Files that its settings name, by setting, where what they hold decides what an edit does."""
        return {}

    @classmethod
    def targets(cls, config: EditConfig, architecture: Architecture) -> list[str]:
        """Names of the layers that it wraps; by default the configured blocks' MLP output projections."""
        return [architecture.projection_name(index) for index in config.layers]

    @classmethod
    def build(cls, model: nn.Module, config: EditConfig, architecture: Architecture) -> dict[str, Attachment]:
        """What it puts into a model, by the names of the layers it wraps (or new names); nothing is changed yet."""
        raise NotImplementedError

    @classmethod
    def attach(cls, model: nn.Module, config: EditConfig, architecture: Architecture) -> dict[str, Attachment]:
        """Put it there.

        Raises:
            ConfigError: as :meth:`check`.
            ArchitectureError: the model is edited already.
        """
        cls.check(config, model, architecture)
        return attach(model, cls.build(model, config, architecture), architecture.decoder)

    # -- what it does with requests -----------------------------------------------------------------------------

    def ready(self) -> None:
        """Raises :class:`ConfigError` where something is missing that its settings should name."""

    def validate(self, batch: list[EditRequest]) -> None:
        """Raises :class:`RequestError` for a request it cannot edit; needs no forward pass."""
        rows = target_rows(self.session.tokenizer, batch, [""])
        check_length(rows, batch, context_length(self.session.model))

    def edit(self, batch: list[EditRequest], values: torch.Tensor | None, phases: Phases, on_progress: OnProgress) -> Outcome:
        """Edit a batch, each request with an id.

        Args:
            values: target values ``(u, d_model)`` that were given; always ``None`` without ``takes_values``.
            phases: times what is done inside ``with phases("values")`` and the like.
            on_progress: called with the number of requests that are done and the mean loss.

        Raises:
            RequestError: it cannot be edited; the editor then forgets everything that was done here.
        """
        raise NotImplementedError

    def superseded(self, batch: list[EditRequest]) -> list[Entry]:
        """Live entries of the batch's facts, whose place it takes."""
        facts = dict.fromkeys(request.fact for request in batch)  # a fact given twice replaces its entries once
        return [entry for fact in facts for entry in self.session.ledger.of_fact(fact)]

    def retract(self, entries: list[Entry]) -> None:
        """Take single edits back.

        Raises:
            RequestError: it cannot.
        """
        raise RequestError(f"{self.name} cannot take a single edit back; use rollback")

    def revert(self, step: int, added: list[Entry], removed: list[Entry]) -> None:
        """Return to the state after ``step``.

        Args:
            added, removed: live entries that later steps have added, and entries that they have taken out.

        Raises:
            RequestError: that state is not there any more.
        """
        raise NotImplementedError

    def answered(self, batch: list[EditRequest]) -> list[bool]:
        """Whether the edited model gives each request's object behind its prompt (teacher-forced, every token)."""
        session = self.session
        asked = prompt_rewriter(session.model) or (lambda prompt: prompt)
        rows = answer_rows(session.tokenizer, [(asked(request.text), request.target_new) for request in batch])
        with evaluating(session.model):
            return answered(session.model, rows, session.pad_token, session.max_tokens)

    def target_values(self, batch: list[EditRequest], on_progress: OnProgress) -> torch.Tensor:
        """Raises :class:`RequestError` where there are none."""
        raise RequestError(f"{self.name} has no target values")

    def set_covariance(self, covariance: Covariance) -> None:
        """Use a covariance that was found to fit; methods without a need for one let it be."""

    def thresholds(self) -> dict[str, float]:
        """What decides scope, by layer; empty where nothing has a threshold."""
        return {}

    # -- steps on a twin, and disk ------------------------------------------------------------------------------

    def on(self, session: Session) -> Method:
        """The same on another session, with state of its own: what happens there is not seen here."""
        other = copy.copy(self)
        other.session = session
        other.attachments = {name: session.model.get_submodule(name) for name in self.attachments}
        return other

    def adopt(self, other: Method) -> None:
        """Take over what has happened on another session."""
        for name, attachment in self.attachments.items():
            attachment.take_over(other.attachments[name])
        self.__dict__.update(other.__dict__, session=self.session, attachments=self.attachments)

    def weight_change(self, name: str) -> torch.Tensor | tuple[torch.Tensor, torch.Tensor]:
        """What the edits come to in the weight of a layer, if every token is to meet them (:meth:`Attachment.weight_change`)."""
        return self.attachments[name].weight_change()

    def adapter(self) -> dict[str, torch.Tensor]:
        """All that is needed to use the edits: every attachment's tensors, as ``<name>.<what>``."""
        return {f"{name}.{what}": tensor for name, own in self.attachments.items() for what, tensor in own.tensors().items()}

    @classmethod
    def check_saved(cls, model: nn.Module, config: EditConfig, architecture: Architecture, names: list[str], tensors: dict) -> None:
        """Raises :class:`ValueError` for an adapter's or a state's tensors that this method has not saved for this model."""

    def state(self) -> tuple[dict[str, torch.Tensor], dict]:
        """What is needed beside the adapter to go on editing: tensors, and what JSON can hold."""
        return {}, {}

    def load_state(self, tensors: dict[str, torch.Tensor], manifest: dict) -> None:
        """The state back; the attachments hold their adapter already, and the ledger its entries.

        Raises:
            KeyError, ValueError, …: what is missing or malformed.
        """

    @classmethod
    def load_entries(cls, requests: list[tuple[EditRequest, int]], tensors: dict[str, torch.Tensor], names: list[str]) -> list[Entry]:
        """The ledger's entries, from requests with their steps and the state's tensors."""
        return [Entry(request, step) for request, step in requests]


def of_layer(tensors: dict[str, torch.Tensor], name: str) -> dict[str, torch.Tensor]:
    """A layer's tensors by their own names."""
    return {key[len(name) + 1 :]: tensor for key, tensor in tensors.items() if key.startswith(f"{name}.")}
