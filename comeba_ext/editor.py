"""Editor: consecutive editing of one model, batch after batch, with COMEBA-HK (arXiv 2403.05330) or another method."""

from __future__ import annotations

import contextlib
import copy
import functools
import threading
from collections.abc import Callable, Iterable, Iterator, Mapping
from pathlib import Path
from typing import TypeVar, cast

import torch
from torch import nn
from tqdm.auto import tqdm

from comeba_ext import saved_edits
from comeba_ext.covariance import Covariance, collect_covariance
from comeba_ext.editing.batches import check_consistent, live_entries, with_ids
from comeba_ext.editing.config import EditConfig, is_int
from comeba_ext.editing.report import EditReport, Phases, peak_memory, values_bar
from comeba_ext.editing.session import Session
from comeba_ext.errors import ComebaError, ConfigError, CovarianceError, RequestError
from comeba_ext.forward.architectures import Architecture
from comeba_ext.interrupts import uninterrupted
from comeba_ext.layers.attachment import Attachment, between_passes, detach, disabled
from comeba_ext.layers.twin import twin_of
from comeba_ext.memory.key_memory import KeyMemory
from comeba_ext.memory.ledger import Ledger
from comeba_ext.methods import Method, default_config, method_named
from comeba_ext.text.request import EditRequest, Ids, as_requests, consecutive_batches

Function = TypeVar("Function", bound=Callable)


def _step(method: Function) -> Function:
    """A method that changes the edits: all of it happens or nothing, one step at a time, and whoever generates from the model
    meanwhile sees the state before or the state after."""

    @functools.wraps(method)
    def whole(self, *args, **kwargs):
        with self._on_twin() as work:
            result = method(work, *args, **kwargs)
            self._adopt(work)
            return result

    return cast(Function, whole)


class Editor:
    """Edits facts in a model, batch after batch. The model object itself is what has been edited.

    Args:
        model: a Hugging Face causal language model; a method's attachments are put in place, weights are never written.
        tokenizer: its tokenizer.
        config: default: the method's own for the model (:func:`~comeba_ext.methods.default_config`).
        method: name or class of a :class:`~comeba_ext.methods.Method`.

    Raises:
        ArchitectureError: not a decoder-only language model, its parts cannot be found, or it is edited already.
        ConfigError: an unknown method, or settings that it cannot use on this model.

    Attributes:
        method: the :class:`~comeba_ext.methods.Method` at work; log: plain records, one an edit, retraction or rollback.
    """

    def __init__(self, model: nn.Module, tokenizer, config: EditConfig | None = None, *, method: str | type[Method] = "COMEBA-HK"):
        kind = method_named(method)
        if config is None:
            config = default_config(kind, model)
        elif not isinstance(config, kind.config_class):
            raise ConfigError(f"{kind.name} takes settings of {kind.config_class.__name__}, got {type(config).__name__}")
        self.session = Session(model, tokenizer, config)
        self.method = kind.made(self.session)
        self.log: list[dict] = []
        self._one_step = threading.RLock()
        self._next_id = 0
        self._fit: set[EditRequest] = set()

    @property
    def model(self) -> nn.Module:
        return self.session.model

    @property
    def tokenizer(self):
        return self.session.tokenizer

    @property
    def config(self) -> EditConfig:
        return self.session.config

    @property
    def architecture(self) -> Architecture:
        return self.session.architecture

    @property
    def ledger(self) -> Ledger:
        """Every request that was edited, and when."""
        return self.session.ledger

    @property
    def step(self) -> int:
        """Number of steps taken (edits and retractions)."""
        return self.session.step

    @property
    def prefixes(self) -> list[str]:
        """Context prefixes, the empty one first; sampled once, from the unedited model."""
        return self.session.prefixes

    @property
    def max_tokens(self) -> int:
        """Padded tokens per forward pass (:attr:`Session.max_tokens`)."""
        return self.session.max_tokens

    @property
    def layers(self) -> dict[str, Attachment]:
        """The edited layers by name, as the method has wrapped them: with COMEBA-HK the hooked layers, in increasing order."""
        return self.method.layers

    @property
    def key_memory(self) -> dict[str, KeyMemory]:
        """Layer name to :class:`KeyMemory`; empty until a covariance is there, and with methods that keep none."""
        return getattr(self.method, "key_memory", {})

    # -- covariance ---------------------------------------------------------------------------------------------

    @property
    def covariance(self) -> Covariance | None:
        return getattr(self.method, "covariance", None)

    def collect_covariance(
        self, texts: Iterable[str], tokens: int | None = None, path: str | Path | None = None, progress: bool = True
    ) -> None:
        """Collect ``C0`` of all edited layers in one pass over a corpus; nothing is done for a method that needs none.

        Where a process group is initialised (``torchrun``), its processes share the work and each ends with the whole.

        Args:
            texts: plain texts, e.g. Wikipedia articles.
            tokens: how many; default 10 per input dimension (arXiv 2506.04226).
            path: checkpoint file; an unfinished one is resumed, by any number of processes.

        Raises:
            CovarianceError: too little text, or edits were made already.
        """
        if not self.method.needs_covariance:
            return
        self._check_unedited()  # before the corpus is read
        how = {"tokens": tokens, "max_tokens": self.max_tokens, "path": path, "progress": progress}
        with self.disabled():
            self.set_covariance(collect_covariance(self.model, self.tokenizer, texts, self.layers, self.session.decoder, **how))

    def load_covariance(self, path: str | Path) -> None:
        """Raises :class:`CovarianceError`/:class:`StorageError` for another model's, a broken or a foreign file."""
        self.set_covariance(Covariance.load(path))

    def save_covariance(self, path: str | Path) -> None:
        if self.covariance is None:
            raise CovarianceError("there is no covariance to save; call collect_covariance(texts) first")
        self.covariance.save(path)

    def set_covariance(self, covariance: Covariance) -> None:
        """Start the key memories at ``λ·C0``; of a covariance of more layers only those that are edited are kept.

        Raises:
            CovarianceError: it does not fit the model or is not positive definite, or edits were made already.
        """
        if not self.method.needs_covariance:
            return
        self._check_unedited()
        covariance.check(self.model, {name: layer.in_features for name, layer in self.layers.items()})
        self.method.set_covariance(covariance.of(self.layers))  # a file may hold a whole model's, which no folder of edits needs

    def _check_unedited(self) -> None:
        if self.step:
            raise CovarianceError("edits were made with another covariance already; start from a new Editor")

    # -- editing ------------------------------------------------------------------------------------------------

    def edit(
        self,
        requests: Iterable[EditRequest | Mapping],
        target_values: torch.Tensor | None = None,
        *,
        progress: bool | Callable[[int, float], None] = False,
    ) -> EditReport:
        """One consecutive batch (algorithm 1 of arXiv 2403.05330). Either all of it happens or nothing.

        Args:
            requests: any number; see :meth:`EditRequest.from_record` for the forms. One about a fact edited before (same prompt and
                subject) takes the earlier one's place.
            target_values: ``(u, d_model)``, to skip their optimisation.
            progress: show a bar; or what to call with the number of requests that are done and the mean loss.

        Raises:
            RequestError: an unusable request or batch; nothing was changed.
            CovarianceError: there is no covariance yet.
        """
        with self._one_step:
            batch = self._prepare(requests)
            self._need_covariance()
            if target_values is not None and not self.method.takes_values:
                raise RequestError(f"{self.method.name} has no target values")
            with values_bar(len(batch), progress if target_values is None else False) as on_progress:
                return self._edit(batch, target_values, on_progress)

    @_step
    def _edit(self, batch: list[EditRequest], target_values: torch.Tensor | None, on_progress: Callable[[int, float], None]) -> EditReport:
        phases = Phases(self.session.device)
        done = self.method.edit(batch, target_values, phases, on_progress)
        with phases("check"):
            took = self.method.answered(done.edited[: done.asked]) if done.asked else []
        name = lambda requests: [request.request_id for request in requests]  # noqa: E731
        rewritten = done.edited[done.asked :]
        report = EditReport(
            step=self.step + 1,
            request_ids=name(done.edited[: done.asked]),
            declined=done.declined,
            moved=done.moved,
            answered=took,
            superseded=[own for own in name(entry.request for entry in done.replaced) if own not in name(rewritten)],
            rewritten=name(rewritten),
            losses=done.losses,
            optimizer_steps=done.optimizer_steps,
            alpha=self.method.thresholds(),
            leverage=done.leverage,
            share=done.share,
            seconds=phases.seconds,
            peak_memory=peak_memory(self.session.device),
        )
        record = {"event": "edit", **report.to_dict(), "requests": [r.to_record() for r in done.edited[: done.asked]]}
        self.session.step += 1
        for entry in done.replaced:
            self.ledger.remove(entry, self.step)
        for entry in done.entries:
            self.ledger.add(entry)
        self.log.append(record)
        return report

    def edit_all(self, requests: Iterable[EditRequest | Mapping], batch_size: int = 10, *, progress: bool = True) -> Iterator[EditReport]:
        """Edit many requests in consecutive batches, a report each; all are checked before the first is edited.

        A batch ends early before a request about a fact it already holds, which thereby supersedes the earlier one.
        Stopping the iteration, or Ctrl-C, leaves the last complete batch.
        """
        if not is_int(batch_size) or batch_size < 1:
            raise ConfigError(f"batch_size must be a whole number of at least 1, got {batch_size!r}")
        checked = as_requests(requests)
        ids = Ids(checked)
        batches = consecutive_batches(checked, batch_size) or [[]]  # no request is refused as an empty batch is
        for number, batch in enumerate(batches):
            try:
                self._validate(batch)
            except RequestError as error:
                raise RequestError(f"batch {number + 1} of {len(batches)}: {error}") from None
        self._need_covariance()
        return self._edit_batches(batches, set(ids.facts), len(checked), progress)

    def _edit_batches(self, batches: list[list[EditRequest]], given: set[str], total: int, progress: bool) -> Iterator[EditReport]:
        with tqdm(total=total, unit="edit", desc="editing", disable=not progress) as bar:

            def on_progress(done: int, loss: float) -> None:
                bar.set_postfix(loss=f"{loss:.3f}")

            for batch in batches:
                with self._one_step:
                    # The rest was checked. Ids are given batch by batch, so that a run that goes on later gives the same.
                    report = self._edit(self._named(check_consistent(batch, self.ledger), given), None, on_progress)
                bar.update(len(batch))
                yield report

    def check(self, requests: Iterable[EditRequest | Mapping]) -> None:
        """Raise what :meth:`edit` would raise on this batch before it starts; changes nothing."""
        self._validate(as_requests(requests))

    def target_values(self, requests: Iterable[EditRequest | Mapping], *, progress: bool = False) -> torch.Tensor:
        """``v*`` of every request against the model as edited so far, ``(u, d_model)``; nothing is edited."""
        with self._on_twin() as work:
            batch = work._prepare(requests)
            with values_bar(len(batch), progress) as on_progress:
                return work.method.target_values(batch, on_progress)

    @_step
    def retract(self, request_ids: str | Iterable[str]) -> None:
        """Take edits back: their keys leave ``C`` and their share leaves ``delta``.

        The result is what the remaining requests' keys and responses give on their own, to the rounding of ``delta``
        (1e-5 relative in float32, tested); with none remaining, the state before any edit. Thresholds keep the lowest
        response they let through. Counts as a step.

        Raises:
            RequestError: an id that is not live, or the method cannot take single edits back; nothing was changed.
        """
        entries = live_entries(request_ids, self.ledger)
        self.method.retract(entries)
        self.session.step += 1
        for entry in entries:
            self.ledger.remove(entry, self.step)
        self.log.append({"event": "retract", "step": self.step, "request_ids": [entry.request.request_id for entry in entries]})

    @_step
    def rollback(self, step: int) -> None:
        """Return to the state after ``step`` (0: unedited); later steps are forgotten, except in the log.

        Raises:
            RequestError: there was no such step, or the method does not keep it any more; nothing was changed.
        """
        if not is_int(step) or not 0 <= step <= self.step:
            raise RequestError(f"cannot roll back to step {step!r}; steps 0 to {self.step} exist")
        self.method.revert(step, *self.ledger.changes_since(step))
        self.ledger.rewind(step)
        self.log.append({"event": "rollback", "step": step, "from_step": self.step})
        self.session.step = step

    @contextlib.contextmanager
    def disabled(self):
        """Inside, the original model, bit for bit."""
        with disabled(self.model):
            yield self.model

    def close(self) -> None:
        """Take everything out again: the model as it came. Waits for other threads' steps and passes."""
        with self._one_step, between_passes(self.model):
            detach(self.model)

    # -- saving -------------------------------------------------------------------------------------------------

    def save_pretrained(self, folder: str | Path, *, inference_only: bool = False) -> None:
        """Save all edits, and unless ``inference_only`` what is needed to go on editing; atomic."""
        with self._one_step:
            saved_edits.save(self.session, self.method, folder, self.log, None if inference_only else self._next_id)

    @classmethod
    def from_pretrained(cls, model: nn.Module, tokenizer, folder: str | Path) -> Editor:
        """Go on editing where :meth:`save_pretrained` stopped, with the method that it was.

        Raises:
            StorageError: truncated, foreign, saved for inference only, of another base model, or of an unknown method.
        """
        saved = saved_edits.open_saved(model, folder)
        editor = cls(model, tokenizer, saved.config, method=saved.method)
        saved.restore(editor.session, editor.method)
        editor.log, editor._next_id = saved.log, saved.next_id
        return editor

    def _prepare(self, requests) -> list[EditRequest]:
        """The batch with ids, after every check that needs no forward pass."""
        return self._named(self._validate(as_requests(requests)))

    def _named(self, batch: list[EditRequest], given: Iterable[str] = ()) -> list[EditRequest]:
        """The same requests, each with an id that is not ``given`` to another."""
        named, self._next_id = with_ids(batch, self.ledger, self._next_id, given)
        return named

    def _validate(self, batch: list[EditRequest]) -> list[EditRequest]:
        check_consistent(batch, self.ledger)
        if not self._fit.issuperset(batch):  # a request is tokenised once to be checked, however often it is asked about
            self.method.validate(batch)
            self._fit.update(batch)
        return batch

    def _need_covariance(self) -> None:
        if self.method.needs_covariance and self.covariance is None and not self.key_memory:
            raise CovarianceError("no covariance yet: call collect_covariance(texts) or load_covariance(path) first")

    def apart(self) -> Editor:
        """This editor at work on a twin of its model: whatever happens there, here all is as it was.

        Raises:
            ComebaError: its layers are no longer in the model.
        """
        modules = dict(self.model.named_modules())
        if any(modules.get(name) is not own for name, own in self.method.attachments.items()):
            raise ComebaError("this editor was closed, or its hooked layers were taken out of the model; make a new one")
        work = copy.copy(self)
        work.session = self.session.on(twin_of(self.model))
        work.method = self.method.on(work.session)
        work.log = list(self.log)
        return work

    @contextlib.contextmanager
    def _on_twin(self) -> Iterator[Editor]:
        """Inside, this editor :meth:`apart`, one step at a time. The twin's parts know each other: they are taken apart afterwards, and so
        freed then, not when Python looks for such circles, which a full GPU does not make it do."""
        with self._one_step:
            work = self.apart()
            try:
                yield work
            finally:
                detach(work.model)
                vars(work.method).clear()

    def _adopt(self, work: Editor) -> None:
        """Take over what a step has made; readers of the model see it between two passes, and an interruption waits."""
        with between_passes(self.model), uninterrupted():
            self.method.adopt(work.method)
            self.session.adopt(work.session)
            self.log, self._next_id = work.log, work._next_id
