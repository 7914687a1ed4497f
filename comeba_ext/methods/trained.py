"""Methods that are trained to edit: what is learned, and how a trained editor is kept and found again.

A trained editor is one safetensors file (``editor.safetensors`` in the folder that ``comeba train`` writes): the learner's weights,
and what it was trained for: method, settings, base model. It is no part of saved edits, which hold the weights' change alone.
"""

from __future__ import annotations

import json
from abc import abstractmethod
from collections.abc import Callable
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import ClassVar

import torch
from torch import nn
from torch.nn import functional as F

from comeba_ext.editing.config import EditConfig, check_fields
from comeba_ext.editing.report import Phases
from comeba_ext.editing.session import Session
from comeba_ext.errors import ConfigError, StorageError
from comeba_ext.forward.partial import evaluating, frozen
from comeba_ext.methods.base import OnProgress
from comeba_ext.methods.deltas import Deltas
from comeba_ext.methods.row_passes import LowerStates, TrainingRows, factors_of
from comeba_ext.methods.snapshots import Snapshots
from comeba_ext.storage import check_identity, digest_of, identity, read_tensors, write_tensors
from comeba_ext.text.episodes import Episode
from comeba_ext.text.request import EditRequest
from comeba_ext.text.rows import Row, answer_rows

Factors = dict[str, tuple[torch.Tensor, torch.Tensor]]
FILE, ABOUT = "editor.safetensors", "train.json"


class Learner(nn.Module):
    """What is learned: parameters of its own, for one base model and its layers.

    Class attributes:
        lr: Adam's rate, where none is asked for.

    Args:
        session: the unedited model; its layers by name, hooked and unedited.
    """

    lr: ClassVar[float] = 1e-4

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


class FactorLearner(Learner):
    """Learns to rewrite a weight's gradient, which is kept as factors: ``Σ g xᵀ`` over tokens."""

    def __init__(self, session: Session, layers: dict[str, nn.Module]):
        super().__init__(session, layers)
        self.lower = LowerStates(session, session.config.layers[0])  # of the unedited model, which is trained on

    def on(self, session: Session, layers: dict[str, nn.Module]) -> FactorLearner:
        other = super().on(session, layers)
        other.lower = LowerStates(session, self.lower.block)
        return other

    @abstractmethod
    def rewrite(self, rows: list[Row], factors: Factors) -> Factors:
        """What weights change by, from their gradients.

        Args:
            rows: of the edits, which are made together.
            factors: layer name to ``x (tokens, d_in)`` and ``g (tokens, d_out)``, float32, at every token of every row; each row's
                gradient is that of its own loss.

        Returns:
            Factors whose ``Σ g xᵀ`` is added to the weight.
        """

    @abstractmethod
    def weigh(self, edit: torch.Tensor, far: torch.Tensor) -> torch.Tensor:
        """The loss: of the edits' mean NLL and the unrelated prompts' mean KL."""

    def changes(self, rows: list[Row], logits: Callable | None = None) -> Factors:
        """What each layer's weight changes by for edits that are made together; ``logits``: see :func:`factors_of`."""
        with evaluating(self.session.model), frozen(self.session.model), torch.enable_grad():
            found, _ = factors_of(self.session, self.layers, rows, everywhere=True, logits=logits)
        here = lambda own: own.to(self.session.device, torch.float32)  # noqa: E731  (layers may be on several GPUs)
        return self.rewrite(rows, {name: (here(x), here(g) * len(rows)) for name, (x, g) in found.items()})

    def forward(self, episodes: list[Episode]) -> tuple[torch.Tensor, dict[str, float]]:
        edit, far, _ = self._run(episodes)
        loss = self.weigh(edit, far)
        return loss, {"loss": loss.item(), "edit": edit.item(), "locality": far.item()}

    @torch.no_grad()
    def measure(self, episode: Episode) -> dict[str, float]:
        edit, far, shares = self._run([episode])
        return {"loss": self.weigh(edit, far).item(), **shares}

    def _run(self, episodes: list[Episode]) -> tuple[torch.Tensor, torch.Tensor, dict[str, float]]:
        """Mean NLL of edits and their other wordings, KL of unrelated prompts, and what share of tokens is right or as before."""
        session = self.session
        tokenize = lambda asked: answer_rows(session.tokenizer, asked)  # noqa: E731
        own = tokenize([(e.request.text, e.request.target_new) for e in episodes])
        reworded = tokenize([(e.wording, e.request.target_new) for e in episodes])
        apart = tokenize([(prompt, answer or ".") for prompt, answer in (e.unrelated for e in episodes)])
        with torch.no_grad(), evaluating(session.model):
            before = self.lower.logits(apart)
        changes = self.changes(own, self.lower.logits)
        with evaluating(session.model), frozen(session.model), added(self.layers, changes):
            logits = self.lower.logits([*apart, *own, *reworded])
        count = len(episodes)
        after, *asked = (logits[n : n + count] for n in range(0, 3 * count, count))
        targets = [[torch.tensor(row.target, device=session.device) for row in rows] for rows in (own, reworded)]
        nll = [F.cross_entropy(logits, target) for each, theirs in zip(asked, targets) for logits, target in zip(each, theirs)]
        kl = [F.kl_div(a.log_softmax(-1), b.log_softmax(-1), reduction="batchmean", log_target=True) for a, b in zip(after, before)]
        share = lambda pairs: sum((a.argmax(-1) == b).float().mean().item() for a, b in pairs) / len(episodes)  # noqa: E731
        shares = {
            "reliability": share(zip(asked[0], targets[0])),
            "generality": share(zip(asked[1], targets[1])),
            "locality": share((a, b.argmax(-1)) for a, b in zip(after, before)),
        }
        return sum(nll) / len(nll), sum(kl) / len(kl), shares


@dataclass(frozen=True)
class TrainedConfig(EditConfig):
    """Settings that all trained methods have; ``layers`` are the blocks that are written.

    Args:
        editor: folder of a trained editor (``comeba train``).
        parts: linear layers inside a block that are written beside the MLP output projection, such as ``mlp.up_proj``.
    """

    editor: str | None = None
    parts: tuple[str, ...] = ()

    def __post_init__(self) -> None:
        super().__post_init__()
        check_fields(self, texts_or_none=("editor",), parts=("parts",))
        object.__setattr__(self, "parts", tuple(self.parts))


class Trained(Snapshots):
    """Edits as a :class:`Learner` has learned to.

    Class attributes:
        learner: its class.
    """

    learner: ClassVar[type[Learner]]

    def __init__(self, session: Session):
        self.trained: Learner | None = None  # read when it is first needed: what was edited can be taken back without it
        self.editor_digest: str | None = None  # of the file, as it was read first: saved with the edits
        super().__init__(session)

    @classmethod
    def targets(cls, config: TrainedConfig, architecture) -> list[str]:
        blocks = [(block, f"{architecture.blocks}.{block}") for block in config.layers]
        return [name for n, prefix in blocks for name in (*(f"{prefix}.{part}" for part in config.parts), architecture.projection_name(n))]

    @classmethod
    def check(cls, config: TrainedConfig, model: nn.Module, architecture) -> None:
        super().check(config, model, architecture)
        cls.check_named(cls.targets(config, architecture), model, "parts")

    @classmethod
    def implied(cls, changes: dict) -> dict:
        """The settings that the editor was trained with."""
        return _read(changes["editor"], cls.name)[1]["config"] if changes.get("editor") else {}

    @classmethod
    def files(cls, config: TrainedConfig) -> dict[str, Path]:
        return {"editor": _file(config.editor)} if config.editor else {}

    @classmethod
    def preparation(cls, config: TrainedConfig) -> dict:
        """What the training took, where the editor's folder says it."""
        if config.editor is None or not (path := Path(config.editor) / ABOUT).is_file():
            return {}
        try:
            known = json.loads(path.read_text(encoding="utf-8"))
        except (OSError, ValueError):
            return {}
        return {f"training_{name}": known[name] for name in ("seconds", "steps", "peak_memory", "bytes") if name in known}

    def new_learner(self) -> Learner:
        """One that has learned nothing yet."""
        return self.learner(self.session, self.layers)

    def needed(self) -> Learner:
        """The trained editor, ready to be used.

        Raises:
            ConfigError: none was given.
            StorageError: it cannot be read, was trained for something else, or is not the one that edits were made with before.
        """
        if self.trained is None:
            if self.config.editor is None:
                raise ConfigError(f"{self.name} has to be trained first ('comeba train {self.name} MODEL …'), then give --editor DIR")
            path = _file(self.config.editor)
            digest = digest_of(path)
            if self.editor_digest not in (None, digest):
                raise StorageError(f"{path} is another editor than these edits were made with; bring that one back, or begin other edits")
            learner = self.new_learner()
            load_learner(learner, path, self.name)
            self.trained, self.editor_digest = learner.eval(), digest
        return self.trained

    def ready(self) -> None:
        self.needed()

    def state(self) -> tuple[dict[str, torch.Tensor], dict]:
        tensors, own = super().state()
        return tensors, {**own, **({"editor_digest": self.editor_digest} if self.editor_digest else {})}

    def load_state(self, tensors: dict[str, torch.Tensor], manifest: dict) -> None:
        digest = manifest.get("editor_digest")
        if digest is not None and not isinstance(digest, str):
            raise ValueError("editor_digest is malformed")
        super().load_state(tensors, manifest)
        self.editor_digest = digest

    def on(self, session: Session) -> Trained:
        other = super().on(session)
        if self.trained is not None:
            other.trained = self.trained.on(session, other.layers)
        return other

    def adopt(self, other: Trained) -> None:
        super().adopt(other)
        if self.trained is not None:
            self.trained = self.trained.on(self.session, self.layers)


class TrainedOnGradients(Trained, Deltas):
    """Writes what a :class:`FactorLearner` makes of a batch's gradient at the weights as they are by then."""

    def apply(self, batch: list[EditRequest], phases: Phases, on_progress: OnProgress) -> tuple[list[float], list[int]]:
        learner = self.needed()
        rows = answer_rows(self.session.tokenizer, [(request.text, request.target_new) for request in batch])
        with phases("keys"), torch.no_grad():
            changes = learner.changes(rows)
        with phases("update"), torch.no_grad(), evaluating(self.session.model):
            for name, (x, g) in changes.items():
                master = self.masters[name]
                self.write(name, master + (g.mT @ x).to(master))
            losses = TrainingRows(self.session, rows, self.config.layers[0]).losses()
        on_progress(len(batch), sum(losses) / len(losses))
        return losses, [1] * len(batch)


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
    write_tensors(path, learner.state_dict(), metadata)


def load_learner(learner: Learner, folder: str | Path, method: str) -> None:
    """A trained editor's weights into a learner.

    Raises:
        StorageError: there is none, it is truncated, or another method's, model's or other layers'.
    """
    (tensors, about), path = _read(folder, method), _file(folder)
    check_identity(about["model"], learner.session.model, f"the trained editor {path}")
    if about["layers"] != list(learner.layers):
        known, here = (f"{own[0]} and {len(own) - 1} more" for own in (about["layers"], list(learner.layers)))
        raise StorageError(
            f"{path} was trained for other layers ({known}), not {here}; default_config({method!r}, model, editor=…) has its settings"
        )
    own = learner.state_dict()
    wrong = [name for name in {**own, **tensors} if name not in own or name not in tensors or own[name].shape != tensors[name].shape]
    if wrong:
        raise StorageError(f"{path} does not fit its settings: {wrong[0]} is missing or of another shape; were rank or parts changed?")
    if any(not torch.isfinite(own).all() for own in tensors.values() if own.is_floating_point()):
        raise StorageError(f"{path} holds NaN or infinite numbers")
    learner.load_state_dict(tensors)


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
        return lambda module, args, output: output + ((args[0].to(x) @ x.mT) @ g).to(output)

    handles = [layers[name].register_forward_hook(adding(*change)) for name, change in changes.items()]
    try:
        yield
    finally:
        for handle in handles:
            handle.remove()
