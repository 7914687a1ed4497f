"""Methods that are trained to edit: what is learned, and how a trained editor is kept and found again.

A trained editor is one safetensors file (``editor.safetensors`` in the folder that ``comeba train`` writes): the learner's weights,
and what it was trained for: method, settings, base model. It is no part of saved edits, which hold the weights' change alone.
"""

from __future__ import annotations

from abc import abstractmethod
from contextlib import contextmanager
from pathlib import Path
from typing import ClassVar

import torch
from torch import nn

from comeba_ext.editing.config import EditConfig
from comeba_ext.editing.session import Session
from comeba_ext.errors import ConfigError, StorageError
from comeba_ext.methods.deltas import Deltas
from comeba_ext.storage import check_identity, identity, read_tensors, write_tensors
from comeba_ext.text.episodes import Episode

FILE = "editor.safetensors"


class Learner(nn.Module):
    """What is learned: parameters of its own, for one base model and its layers.

    Args:
        session: the unedited model; its layers by name, hooked and unedited.
    """

    def __init__(self, session: Session, layers: dict[str, nn.Module]):
        super().__init__()
        self.session, self.layers = session, layers  # in a dictionary, so that the model's parts are no parts of this

    @abstractmethod
    def forward(self, episodes: list[Episode]) -> tuple[torch.Tensor, dict[str, float]]:
        """The loss of episodes whose edits are made together, with a graph to the parameters, and its parts by name."""

    @abstractmethod
    def measure(self, episode: Episode) -> dict[str, float]:
        """``loss``, and ``reliability``, ``generality``, ``locality``, shares of tokens, after the episode's edit alone."""

    def on(self, session: Session, layers: dict[str, nn.Module]) -> Learner:
        """The same weights for another session of the model."""
        other = type(self).__new__(type(self))
        other.__dict__.update(self.__dict__, session=session, layers=layers)
        return other

    def groups(self) -> list[dict]:
        """Parameter groups, with rates of their own where they have some (``lr``)."""
        return [{"params": list(self.parameters())}]


class Trained(Deltas):
    """Writes weights as a :class:`Learner` says.

    Class attributes:
        learner: its class.
    """

    learner: ClassVar[type[Learner]]

    def __init__(self, session: Session):
        self.trained: Learner | None = None  # read when it is first needed: what was edited can be taken back without it
        super().__init__(session)

    @classmethod
    def implied(cls, changes: dict) -> dict:
        """The settings that the editor was trained with."""
        return _read(changes["editor"], cls.name)[1]["config"] if changes.get("editor") else {}

    def new_learner(self) -> Learner:
        """One that has learned nothing yet."""
        return self.learner(self.session, self.layers)

    def needed(self) -> Learner:
        """The trained editor, ready to be used.

        Raises:
            ConfigError: none was given.
            StorageError: it cannot be read, or was trained for something else.
        """
        if self.trained is None:
            if self.config.editor is None:
                raise ConfigError(f"{self.name} has to be trained first ('comeba train {self.name} MODEL …'), then give --editor DIR")
            learner = self.new_learner()
            load_learner(learner, self.config.editor, self.name)
            self.trained = learner.eval()
        return self.trained

    def ready(self) -> None:
        self.needed()

    def on(self, session: Session) -> Trained:
        other = super().on(session)
        if self.trained is not None:
            other.trained = self.trained.on(session, other.layers)
        return other

    def adopt(self, other: Trained) -> None:
        super().adopt(other)
        if self.trained is not None:
            self.trained = self.trained.on(self.session, self.layers)


def save_learner(learner: Learner, path: Path, about: dict) -> None:
    """Write a learner with what it is for, in one step."""
    session = learner.session
    metadata = {
        "kind": "editor",
        "config": session.config.to_dict(),
        "model": identity(session.model, list(learner.layers)),
        "layers": list(learner.layers),
        **about,
    }
    write_tensors(path, {name: own for name, own in learner.state_dict().items()}, metadata)


def load_learner(learner: Learner, folder: str | Path, method: str) -> dict:
    """A trained editor's weights into a learner; returns what was written beside them.

    Raises:
        StorageError: there is none, it is truncated, or another method's, model's or other layers'.
    """
    (tensors, about), path = _read(folder, method), _file(folder)
    check_identity(about["model"], learner.session.model, f"the trained editor {path}")
    if about["layers"] != list(learner.layers):
        raise StorageError(f"{path} was trained for the layers {about['layers']}, and these are {list(learner.layers)}")
    own = learner.state_dict()
    wrong = [name for name in {**own, **tensors} if name not in own or name not in tensors or own[name].shape != tensors[name].shape]
    if wrong:
        raise StorageError(f"{path} does not fit its settings: {wrong[0]} is missing or of another shape; were rank or parts changed?")
    if any(not torch.isfinite(own).all() for own in tensors.values() if own.is_floating_point()):
        raise StorageError(f"{path} holds NaN or infinite numbers")
    learner.load_state_dict(tensors)
    return about


def _file(folder: str | Path) -> Path:
    return Path(folder) / FILE if Path(folder).is_dir() else Path(folder)


def _read(folder: str | Path, method: str) -> tuple[dict[str, torch.Tensor], dict]:
    tensors, about = read_tensors(_file(folder))
    if about.get("kind") != "editor" or about.get("method") != method:
        raise StorageError(f"{_file(folder)} is no editor that was trained for {method}, but {about.get('method') or about.get('kind')!r}")
    return tensors, about


@contextmanager
def added(layers: dict[str, nn.Module], changes: dict[str, tuple[torch.Tensor, torch.Tensor]]):
    """Inside, layers multiply with their weight plus ``Σ g xᵀ``, kept as factors ``x (tokens, d_in)``, ``g (tokens, d_out)``, so that
    gradients flow to these."""

    def adding(x: torch.Tensor, g: torch.Tensor):
        return lambda module, args, output: output + ((args[0].to(x.dtype) @ x.mT) @ g).to(output.dtype)

    handles = [layers[name].register_forward_hook(adding(*change)) for name, change in changes.items()]
    try:
        yield
    finally:
        for handle in handles:
            handle.remove()


def check_editor(config: EditConfig) -> None:
    """Raises :class:`ConfigError` unless ``editor`` is a path or nothing."""
    if config.editor is not None and not isinstance(config.editor, str):
        raise ConfigError(f"editor must be the path of a trained editor, got {config.editor!r}")
