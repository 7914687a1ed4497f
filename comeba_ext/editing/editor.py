"""Editor: consecutive batch editing of one model (COMEBA-HK, arXiv 2403.05330, algorithm 1)."""

from __future__ import annotations

import contextlib
import copy
import functools
import logging
import math
import threading
from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Mapping
from pathlib import Path

import torch
from torch import nn
from tqdm.auto import tqdm

from comeba_ext import distributed, saved_edits
from comeba_ext.covariance import Covariance, collect_covariance
from comeba_ext.editing.answers import answered
from comeba_ext.editing.batches import check_consistent, handled, with_ids
from comeba_ext.editing.config import EditConfig, is_int
from comeba_ext.editing.keys import KeyReader, LayerReading, subject_keys
from comeba_ext.editing.recognition import KeyRecognition, Recognition
from comeba_ext.editing.report import EditReport, Phases, peak_memory
from comeba_ext.editing.sharing import shared_target_values
from comeba_ext.editing.target_values import TargetValues, optimise_target_values
from comeba_ext.errors import ComebaError, ConfigError, CovarianceError, RequestError
from comeba_ext.forward.activation_recorder import ActivationRecorder
from comeba_ext.forward.architectures import Architecture, context_length
from comeba_ext.forward.budget import token_budget
from comeba_ext.forward.partial import evaluating
from comeba_ext.interrupts import uninterrupted
from comeba_ext.layers import hooked_linear
from comeba_ext.layers.twin import twin_of
from comeba_ext.memory.key_memory import KeyMemory
from comeba_ext.memory.ledger import Entry, Ledger, stacked, without
from comeba_ext.scores import score_named
from comeba_ext.text.encoding import pad_id
from comeba_ext.text.prefixes import sample_prefixes
from comeba_ext.text.request import EditRequest, Ids, as_requests, consecutive_batches
from comeba_ext.text.rows import check_length, essence_rows, prompt_rows, target_rows

log = logging.getLogger(__name__)

def _step(method):
    """A method that changes the edits: all of it happens or nothing, one step at a time, and whoever generates from the model
    meanwhile sees the state before or the state after."""

    @functools.wraps(method)
    def whole(self, *args, **kwargs):
        with self._one_step:
            work = self._apart()
            result = method(work, *args, **kwargs)
            self._adopt(work)
            return result

    return whole


class Editor:
    """Edits facts in a model, batch after batch. The model object itself is what has been edited.

    Args:
        model: a Hugging Face causal language model; hook layers are put in place, weights are never written.
        tokenizer: its tokenizer.
        config: default :meth:`EditConfig.for_model`.

    Raises:
        ArchitectureError: not a decoder-only language model, its parts cannot be found, or it is hooked already.
        ConfigError: edited blocks that the model does not have, or several where a norm follows every MLP.

    Attributes:
        layers: hooked layers by name, in increasing order.
        key_memory: layer name to :class:`KeyMemory`; empty until a covariance is there.
        step: number of steps taken (edits and retractions).
        log: append-only list of plain records, one an edit, retraction or rollback.

    Class attributes, which the baselines in :mod:`comeba_ext.methods` override:
        method: name in saved folders and tables.
        serving: mode of the layers between edits, ``"validated"`` or ``"temporary"`` (edited output everywhere).
        config_class: of ``config``.
        needs_covariance: whether nothing can be edited without one.
    """

    method = "COMEBA-HK"
    serving = "validated"
    config_class = EditConfig
    needs_covariance = True

    def __init__(self, model: nn.Module, tokenizer, config: EditConfig | None = None):
        self.model, self.tokenizer = model, tokenizer
        self.config = config or self.default_config(model)
        self.architecture = Architecture.of(model, self.config.blocks, self.config.projection)
        depth = self.architecture.num_blocks(model)
        if self.config.value_layer >= depth:
            raise ConfigError(f"layers {list(self.config.layers)}: the model has blocks 0 to {depth - 1}")
        if len(self.config.layers) > 1 and self.architecture.after_norm(model, self.config.value_layer) is not None:
            raise ConfigError(
                f"layers {list(self.config.layers)}: in {model.config.model_type} a norm follows every MLP, so edits of several "
                "blocks do not add up; give one block"
            )
        names = [self.architecture.projection_name(index) for index in self.config.layers]
        self.layers = hooked_linear.install(
            model, names, self.architecture.decoder, self.config.scope, self.config.alpha, self.config.gate
        )
        for layer in self.layers.values():
            layer.mode = self.serving
        self.key_memory: dict[str, KeyMemory] = {}
        self.covariance: Covariance | None = None
        self.ledger = Ledger()
        self.step = 0
        self.log: list[dict] = []
        self._one_step = threading.RLock()
        self._alphas: list[dict[str, float]] = [self._alpha()]  # after every step, from step 0
        self._prefixes: list[str] | None = None
        self._next_id = 0
        compares = score_named(self.config.scope).compares_keys and self.serving == "validated"
        self.recognition = (KeyRecognition if compares else Recognition)(self)
        # delta in the precision sums are kept in: the buffer itself, or a float32 master of a half-precision one.
        self._delta = {
            name: layer.delta if layer.delta.dtype.itemsize >= 4 else layer.delta.float()
            for name, layer in self.layers.items()
        }

    @classmethod
    def default_config(cls, model: nn.Module) -> EditConfig:
        """Settings for a model that is given without any."""
        return EditConfig.for_model(model)

    # -- covariance ---------------------------------------------------------------------------------------------

    def collect_covariance(
        self, texts: Iterable[str], tokens: int | None = None, path: str | Path | None = None, progress: bool = True
    ) -> None:
        """Collect ``C0`` of all edited layers in one pass over a corpus.

        Where a process group is initialised (``torchrun``), its processes share the work and each ends with the whole.

        Args:
            texts: plain texts, e.g. Wikipedia articles.
            tokens: how many; default 10 per input dimension (arXiv 2506.04226).
            path: checkpoint file; an unfinished one is resumed, by any number of processes.

        Raises:
            CovarianceError: too little text, or edits were made already.
        """
        with self.disabled():
            covariance = collect_covariance(
                self.model, self.tokenizer, texts, self.layers, self._decoder, tokens=tokens,
                max_tokens=self.max_tokens, path=path, progress=progress,
            )  # fmt: skip
        self.set_covariance(covariance)

    def load_covariance(self, path: str | Path) -> None:
        """Raises :class:`CovarianceError`/:class:`StorageError` for another model's, a broken or a foreign file."""
        self.set_covariance(Covariance.load(path))

    def save_covariance(self, path: str | Path) -> None:
        if self.covariance is None:
            raise CovarianceError("there is no covariance to save; call collect_covariance(texts) first")
        self.covariance.save(path)

    def set_covariance(self, covariance: Covariance) -> None:
        """Start the key memories at ``λ·C0``.

        Raises:
            CovarianceError: it does not fit the model or is not positive definite, or edits were made already.
        """
        if self.step:
            raise CovarianceError("edits were made with another covariance already; start from a new Editor")
        covariance.check(self.model, {name: layer.in_features for name, layer in self.layers.items()})
        memory, fitted = {}, {}
        for name, layer in self.layers.items():
            moment = covariance[name].to(layer.delta.device)
            try:
                memory[name] = KeyMemory(self.config.lam_of(layer.in_features) * moment)
                if self.serving == "validated":  # else no score decides
                    fitted[name] = copy.deepcopy(layer.score)
                    fitted[name].fit(moment)
            except (CovarianceError, torch.linalg.LinAlgError) as error:
                raise CovarianceError(f"{name}: {error}") from None
        self.key_memory, self.covariance = memory, covariance
        for name, score in fitted.items():
            self.layers[name].score.take_over(score)
        self.recognition.learn()

    # -- editing ------------------------------------------------------------------------------------------------

    def edit(
        self,
        requests: Iterable[EditRequest | Mapping],
        target_values: torch.Tensor | None = None,
        *,
        progress: bool = False,
    ) -> EditReport:
        """One consecutive batch (algorithm 1; DESIGN §3). Either all of it happens or nothing.

        Args:
            requests: any number; see :meth:`EditRequest.from_record` for the forms. A request about a fact edited
                before (same prompt and subject) takes the earlier one's place.
            target_values: ``(u, d_model)``, to skip their optimisation.

        Raises:
            RequestError: an unusable request or batch; nothing was changed.
            CovarianceError: there is no covariance yet.
        """
        with self._one_step:
            batch = self._prepare(requests)
            self._need_covariance()
            with _values_bar(len(batch), progress and target_values is None) as on_progress:
                return self._edit(batch, target_values, on_progress)

    @_step
    def _edit(
        self, batch: list[EditRequest], target_values: torch.Tensor | None, on_progress: Callable[[int, float], None]
    ) -> EditReport:
        phases = Phases(self._device)
        with phases("check"):
            given = batch
            kept, batch, declined = self.recognition.placed(batch)
            given = [given[n] for n in kept]
        if declined and target_values is not None:
            target_values = self._check_values(target_values, len(kept) + len(declined))[kept]
        if not batch:
            return self._close_step(EditReport(self.step + 1, [], declined, alpha=self._alpha(), seconds=phases.seconds), [], [])
        asked = len(batch)  # behind them, other facts of the same subjects, whose values must be found anew together with theirs
        companions = self.recognition.companions(batch) if target_values is None else []
        batch = batch + [entry.request for entry in companions]
        found = trace = None
        with phases("values"):
            if target_values is None:
                if distributed.world_size() == 1:  # else this process runs only its own requests
                    first = self.architecture.block(self.model, self.config.layers[0])
                    trace = ActivationRecorder(first, next(iter(self.layers.values())), self.max_tokens)
                found = self._optimise(batch, on_progress, trace)
                values = found.values
            else:
                values = self._check_values(target_values, len(batch))
        facts = dict.fromkeys(request.fact for request in batch)  # a fact given twice replaces its entries once
        replaced = [entry for fact in facts for entry in self.ledger.of_fact(fact)]
        again = {id(entry) for entry in companions}
        if replaced:
            with phases("update"):
                for name in self.layers:
                    self._exchange(name, remove=replaced, add=[])
                self.recognition.compare_with(without(self.ledger.live(), replaced))
        written = self._write(batch, values, phases, trace)
        with phases("check"):
            took = self._answered(batch)
        leverage = {name: own.median().item() for name, own in self.recognition.leverage.items()}
        report = EditReport(
            step=self.step + 1,
            request_ids=[request.request_id for request in batch[:asked]],
            declined=declined,
            moved=[request.request_id for request, own in zip(batch, given, strict=False) if request != own],
            answered=took[:asked],
            superseded=[entry.request.request_id for entry in replaced if id(entry) not in again],
            rewritten=[entry.request.request_id for entry in companions],
            losses=found.losses[:asked] if found else [],
            optimizer_steps=found.steps[:asked] if found else [],
            alpha=self._alpha(),
            leverage=leverage,
            share={n: own / (self.config.lam_of(self.layers[n].in_features) + own) for n, own in leverage.items()},
            seconds=phases.seconds,
            peak_memory=peak_memory(self._device),
        )
        entries = []
        for n, request in enumerate(batch):
            keys, responses = ({name: rows[n].cpu() for name, rows in table.items()} for table in written)  # (m, d)
            entries.append(Entry(request, report.step, keys, responses, anchors=self.recognition.marks(n)))
        return self._close_step(report, batch[:asked], entries, replaced)

    def _close_step(
        self, report: EditReport, batch: list[EditRequest], entries: list[Entry], replaced: list[Entry] = ()
    ) -> EditReport:
        """Note what a step did."""
        record = {"event": "edit", **report.to_dict(), "requests": [r.to_record() for r in batch]}
        self.step += 1
        for entry in replaced:
            self.ledger.remove(entry, self.step)
        for entry in entries:
            self.ledger.add(entry)
        self._alphas.append(dict(report.alpha))
        self.log.append(record)
        return report

    def subject_keys(self, rows: list, names: list[str]) -> dict[str, torch.Tensor]:
        """Layer name to the keys at rows' subjects' last tokens, ``(rows, d_in)``."""
        layers = {name: self.layers[name] for name in names}
        with evaluating(self.model):
            return subject_keys(self._decoder, layers, rows, pad_id(self.tokenizer), self.max_tokens, self._device)

    def _answered(self, batch: list[EditRequest]) -> list[bool]:
        rows = target_rows(self.tokenizer, batch, [""])
        with evaluating(self.model):
            return answered(self.model, rows, pad_id(self.tokenizer), self.max_tokens)

    def edit_all(
        self, requests: Iterable[EditRequest | Mapping], batch_size: int = 10, *, progress: bool = True
    ) -> Iterator[EditReport]:
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

    def _edit_batches(
        self, batches: list[list[EditRequest]], given: set[str], total: int, progress: bool
    ) -> Iterator[EditReport]:
        with tqdm(total=total, unit="edit", desc="editing", disable=not progress) as bar:

            def on_progress(done: int, loss: float) -> None:
                bar.set_postfix(loss=f"{loss:.3f}")

            for batch in batches:
                with self._one_step:
                    # The rest was checked. Ids are given batch by batch, so that a run that goes on later gives the same.
                    report = self._edit(self._named(check_consistent(batch, self.ledger), given), None, on_progress)
                bar.update(len(batch))
                yield report

    def handled(self) -> Counter[tuple[str, str, str]]:
        """What the steps so far were asked for, edited or declined: ``(text, subject, new object)``, how often. What was rolled
        back does not count; what was superseded or retracted does."""
        return handled(self.log)

    def check(self, requests: Iterable[EditRequest | Mapping]) -> None:
        """Raise what :meth:`edit` would raise on this batch before it starts; changes nothing."""
        self._validate(as_requests(requests))

    def target_values(self, requests: Iterable[EditRequest | Mapping], *, progress: bool = False) -> torch.Tensor:
        """``v*`` of every request against the model as edited so far, ``(u, d_model)``; nothing is edited."""
        batch = self._prepare(requests)
        with _values_bar(len(batch), progress) as on_progress:
            return self._optimise(batch, on_progress).values

    @_step
    def retract(self, request_ids: str | Iterable[str]) -> None:
        """Take edits back: their keys leave ``C`` and their share leaves ``delta``.

        The result is what the remaining requests' keys and responses give on their own, to the rounding of ``delta``
        (1e-5 relative in float32, tested); with none remaining, the state before any edit. Thresholds keep the lowest
        response they let through. Counts as a step.

        Raises:
            RequestError: an id that is not live; nothing was changed.
        """
        ids = [request_ids] if isinstance(request_ids, str) else list(request_ids)
        entries = [self.ledger.by_id(request_id) for request_id in ids]
        unknown = [request_id for request_id, entry in zip(ids, entries, strict=True) if entry is None]
        if unknown or not ids or len(set(ids)) != len(ids):
            what = f"no live edit has the id {', '.join(map(repr, unknown))}" if unknown else "no or repeated ids given"
            raise RequestError(f"{what}; ids are in every report's request_ids")
        for name in self.layers:
            self._exchange(name, remove=entries, add=[])
            if len(entries) == len(self.ledger):
                self._clear(name)
        self.recognition.compare_with(without(self.ledger.live(), entries))
        self.step += 1
        for entry in entries:
            self.ledger.remove(entry, self.step)
        self._alphas.append(self._alpha())
        self.log.append({"event": "retract", "step": self.step, "request_ids": ids})

    @_step
    def rollback(self, step: int) -> None:
        """Return to the state after ``step`` (0: unedited); later steps are forgotten, except in the log.

        Raises:
            ComebaError: there was no such step.
        """
        if not 0 <= step <= self.step:
            raise RequestError(f"cannot roll back to step {step}; steps 0 to {self.step} exist")
        added, removed = self.ledger.changes_since(step)
        for name, layer in self.layers.items():
            self._revert(name, step, added, removed)
            if len(added) == len(self.ledger) and not removed:
                self._clear(name)
            layer.alpha.fill_(self._alphas[step][name])
        # In the order they were added: of near keys the first stands for the others.
        entries = [entry for entry in self.ledger.entries if entry.step <= step]
        self.recognition.compare_with([entry for entry in entries if entry.removed is None or entry.removed > step])
        self.ledger.rewind(step)
        self._alphas = self._alphas[: step + 1]
        self.log.append({"event": "rollback", "step": step, "from_step": self.step})
        self.step = step

    @contextlib.contextmanager
    def disabled(self):
        """Inside, the original model, bit for bit."""
        with hooked_linear.disabled(self.model):
            yield self.model

    def close(self) -> None:
        """Take the hook layers out again: the model as it came."""
        hooked_linear.uninstall(self.model)

    # -- saving -------------------------------------------------------------------------------------------------

    def save_pretrained(self, folder: str | Path, *, inference_only: bool = False) -> None:
        """Save all edits, and unless ``inference_only`` what is needed to go on editing; atomic."""
        with self._one_step:
            saved_edits.save(self, folder, inference_only)

    @classmethod
    def from_pretrained(cls, model: nn.Module, tokenizer, folder: str | Path) -> Editor:
        """Go on editing where :meth:`save_pretrained` stopped.

        Raises:
            StorageError: truncated, foreign, saved for inference only, or of another base model.
        """
        return saved_edits.load_editor(cls, model, tokenizer, folder)

    # -- parts --------------------------------------------------------------------------------------------------

    @property
    def prefixes(self) -> list[str]:
        """Context prefixes, the empty one first; sampled once, from the unedited model."""
        if self._prefixes is None:
            with self.disabled(), evaluating(self.model):
                self._prefixes = sample_prefixes(
                    self.model, self.tokenizer, self.config.prefixes, self.config.prefix_length, self.config.seed
                )
        return self._prefixes

    @property
    def max_tokens(self) -> int:
        """Padded tokens per forward pass: the configuration's, or what the free memory has room for now."""
        return token_budget(self.model, self.config.max_tokens)

    @property
    def _decoder(self) -> nn.Module:
        return self.model.get_submodule(self.architecture.decoder)

    @property
    def _device(self) -> torch.device:
        return self.model.get_input_embeddings().weight.device

    def _alpha(self) -> dict[str, float]:
        return {name: layer.alpha.item() for name, layer in self.layers.items()}

    def _prepare(self, requests) -> list[EditRequest]:
        """The batch with ids, after every check that needs no forward pass."""
        return self._named(self._validate(as_requests(requests)))

    def _named(self, batch: list[EditRequest], given: Iterable[str] = ()) -> list[EditRequest]:
        """The same requests, each with an id that is not ``given`` to another."""
        named, self._next_id = with_ids(batch, self.ledger, self._next_id, given)
        return named

    def _validate(self, batch: list[EditRequest]) -> list[EditRequest]:
        check_consistent(batch, self.ledger)
        rows = target_rows(self.tokenizer, batch, self.prefixes, wordings=True) + essence_rows(self.tokenizer, batch)
        check_length(rows, batch, context_length(self.model))
        return batch

    def _need_covariance(self) -> None:
        if self.needs_covariance and not self.key_memory:
            raise CovarianceError("no covariance yet: call collect_covariance(texts) or load_covariance(path) first")

    def _check_values(self, values: torch.Tensor, count: int) -> torch.Tensor:
        width = self.model.get_submodule(self.architecture.projection_name(self.config.value_layer)).out_features
        if not isinstance(values, torch.Tensor):
            raise RequestError(f"target_values must be a tensor, got {type(values).__name__}")
        if tuple(values.shape) != (count, width):
            raise RequestError(f"target_values are {tuple(values.shape)}, expected {(count, width)}")
        if not torch.isfinite(values).all():
            raise RequestError("target_values have NaN or infinite entries")
        return values.to(self._device)

    def _optimise(
        self, batch: list[EditRequest], on_progress: Callable[[int, float], None], trace: ActivationRecorder | None = None
    ) -> TargetValues:
        """Target values of the batch, shared among processes; facts of one subject together (:meth:`Recognition.together`)."""
        if distributed.world_size() > 1:
            distributed.require_replicated(self.model)
            distributed.require_same((batch, self.prefixes, self.step), "the requests, prefixes or steps")

        def find(own: list[EditRequest], together: list[list[int]]) -> TargetValues:
            with evaluating(self.model):
                return optimise_target_values(
                    self.model, self.tokenizer, self.architecture, self.config, own, self.prefixes, on_progress, trace, together
                )

        return shared_target_values(find, batch, self.recognition.together(batch), self._device)

    def _write(self, batch: list[EditRequest], values: torch.Tensor, phases: Phases, trace: ActivationRecorder | None = None):
        """Step 2 and 3 of DESIGN §3: per layer keys, residual, update, threshold.

        Returns:
            keys ``(u, m, d_in)`` and responses ``(u, m, d_out)`` by layer.
        """
        rows = prompt_rows(self.tokenizer, batch, self.prefixes)
        keys: dict[str, torch.Tensor] = {}
        responses: dict[str, torch.Tensor] = {}
        with phases("calibrate"):
            self.recognition.begin(batch)
        for layer in self.layers.values():
            layer.mode = "temporary"
        reader = KeyReader(
            self._decoder, list(self.model.get_submodule(self.architecture.blocks)), self.config.layers,
            list(self.layers.values()), rows, whole=score_named(self.config.scope).whole_sequence, pad_token=pad_id(self.tokenizer),
            max_tokens=self.max_tokens, device=self._device, trace=trace, apart=self.recognition.compares,
        )  # fmt: skip
        with evaluating(self.model):
            for number, (name, layer) in enumerate(self.layers.items()):
                with phases("keys"):
                    reading = reader.read(number)
                with phases("calibrate"):
                    keys[name] = self.recognition.keys(name, reading)
                with phases("update"):
                    residual = (values.to(reading.hidden) - self._valued(layer, reading)) / (len(self.layers) - number)
                    responses[name] = self._add(name, keys[name], reading, residual)
                layer.mode = self.serving
                with phases("calibrate"):
                    self.recognition.tell(name, layer)
                    self._calibrate(name, layer, reading)
        return keys, responses

    def _valued(self, layer: hooked_linear.HookedLinear, reading: LayerReading) -> torch.Tensor:
        """What target values are compared with, ``(u, d_model)``: the hidden state after the value layer, or, where a norm
        lies before that, the projection's output."""
        if self.architecture.after_norm(self.model, self.config.value_layer) is None:
            return reading.hidden
        return layer(reading.plain_keys.to(layer.delta)[:, None])[:, 0].to(reading.hidden)

    def _add(self, name: str, keys: torch.Tensor, reading: LayerReading, residual: torch.Tensor) -> torch.Tensor:
        """``C ← C + K Kᵀ``, ``delta ← delta + R Kᵀ C⁻¹``; returns the responses ``delta·k + R``, ``(u, m, d_out)``.

        Args:
            keys: ``(u, m, d_in)``; m of a request.
            reading: where they are from.
            residual: ``(u, d_out)``, of every key of a request.
        """
        memory, delta = self.key_memory[name], self._delta[name]
        device, dtype = memory.device, memory.dtype
        count, each, _ = keys.shape
        keys, residual = keys.flatten(0, 1).to(device, dtype), residual.to(device, dtype).repeat_interleave(each, 0)
        responses = keys @ delta.to(dtype).mT + residual
        self._shift(name, residual.mT @ memory.update(keys.mT).mT)
        return responses.to(torch.promote_types(delta.dtype, torch.float32)).unflatten(0, (count, each))

    def _exchange(self, name: str, remove: list[Entry], add: list[Entry]) -> None:
        """Least squares with some requests taken out and others put back.

        From ``delta·C = Σ v kᵀ`` over live requests follows, with ``C' = C + Σ_add k kᵀ − Σ_remove k kᵀ``,
        ``delta' = delta + (Σ_add − Σ_remove)(v − delta·k) kᵀ C'⁻¹``.
        """
        memory = self.key_memory[name]
        keys, responses = stacked(add + remove, name)
        keys, responses = (t.to(memory.device, memory.dtype) for t in (keys, responses))  # (d_in, n), (d_out, n)
        added = sum(len(entry.keys[name]) for entry in add)
        solved = memory.update(keys[:, :added])
        if remove:
            solved = memory.downdate(keys[:, added:])
        if add and remove:
            solved = memory.solve(keys)
        sign = torch.ones_like(keys[0])
        sign[added:] = -1
        missing = (responses - self._delta[name].to(keys) @ keys) * sign
        self._shift(name, missing @ solved.mT)
        self._rescale(name)

    def _revert(self, name: str, step: int, added: list[Entry], removed: list[Entry]) -> None:
        """Undo what the steps after ``step`` added and removed."""
        if added or removed:
            self._exchange(name, remove=added, add=removed)

    def _factors(self, name: str, live: list[Entry]) -> tuple[torch.Tensor, torch.Tensor] | None:
        """``delta = left @ right``, ``(d_out, n)`` and ``(n, d_in)`` for n keys; ``None`` where it has no such factors.

        ``delta = V Kᵀ C⁻¹`` over the live requests (see ledger), so the factors are V and C⁻¹K.
        """
        keys, responses = stacked(live, name)
        return responses, self.key_memory[name].solve(keys).mT

    def _shift(self, name: str, change: torch.Tensor) -> None:
        """``delta ← delta + change``."""
        delta, layer = self._delta[name], self.layers[name]
        if not torch.isfinite(change).all():
            raise RequestError(f"the update of {name} is not finite; check the target values and the covariance")
        delta += change.to(delta)
        if layer.delta is not delta:
            layer.delta.copy_(delta)

    def _clear(self, name: str) -> None:
        """No live edit is left: exactly no delta, and the threshold as it started."""
        layer = self.layers[name]
        self._delta[name].zero_()
        layer.delta.zero_()
        layer.score.clear()
        layer.alpha.fill_(self._alphas[0][name])

    def _rescale(self, name: str) -> None:
        """Tell a layer's score that delta is another one."""
        layer = self.layers[name]
        if self.covariance is not None:
            layer.score.delta_changed(layer, lambda: self.covariance[name].to(layer.delta.device))

    def _calibrate(self, name: str, layer: hooked_linear.HookedLinear, reading: LayerReading) -> None:
        """``α ← min(α, margin · min over requests of max over tokens of the score)``; where keys are compared, the lowest anchor's."""
        lowest = self.recognition.lowest(name)
        if lowest is not None:
            layer.alpha.fill_(min(layer.alpha.item(), lowest))
            return
        self._rescale(name)
        lowest = reading.peak_scores(layer).min().item()
        if not math.isfinite(lowest):
            raise RequestError(f"the scope scores of {name} are not finite")
        layer.alpha.fill_(min(layer.alpha.item(), self.config.margin * lowest))

    def _apart(self) -> Editor:
        """This editor at work on a twin of its model: whatever happens there, here all is as it was until
        :meth:`_adopt`.

        Raises:
            ComebaError: its layers are no longer in the model.
        """
        modules = dict(self.model.named_modules())
        if any(modules.get(name) is not layer for name, layer in self.layers.items()):
            raise ComebaError("this editor was closed, or its hooked layers were taken out of the model; make a new one")
        work = copy.copy(self)
        work.model = twin_of(self.model)
        work.layers = {name: work.model.get_submodule(name) for name in self.layers}
        for layer in work.layers.values():
            layer.mode = self.serving
        own = lambda name, layer: layer.delta if self._delta[name] is self.layers[name].delta else self._delta[name].clone()  # noqa: E731
        work._delta = {name: own(name, layer) for name, layer in work.layers.items()}
        work.key_memory = {name: copy.copy(memory) for name, memory in self.key_memory.items()}
        work.ledger, work.log, work._alphas = self.ledger.copy(), list(self.log), list(self._alphas)
        work.recognition = self.recognition.of(work)
        return work

    def _adopt(self, work: Editor) -> None:
        """Take over what a step has made; readers of the model see it between two passes, and an interruption waits."""
        kept = {name: self.__dict__[name] for name in ("model", "layers", "_delta", "recognition")}
        with hooked_linear.between_passes(self.model), uninterrupted():
            for name, layer in self.layers.items():
                layer.take_over(work.layers[name])
                if self._delta[name] is not layer.delta:
                    self._delta[name].copy_(work._delta[name])
            self.__dict__.update(work.__dict__, **kept)


@contextlib.contextmanager
def _values_bar(total: int, progress: bool):
    """A progress bar over the target values of one batch, in the first process only."""
    with tqdm(total=total, unit="value", desc="target values", disable=not progress or distributed.rank() > 0) as bar:

        def on_progress(done: int, loss: float) -> None:
            bar.update(done - bar.n)
            bar.set_postfix(loss=f"{loss:.3f}")

        yield on_progress
