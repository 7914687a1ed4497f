"""COMEBA-HK: consecutive batch editing with hook layers (arXiv 2403.05330, algorithm 1)."""

from __future__ import annotations

import copy
import math

import torch
from torch import nn

from comeba_ext import distributed
from comeba_ext.covariance import Covariance
from comeba_ext.editing.keys import KeyReader, LayerReading, subject_keys
from comeba_ext.editing.recognition import KeyRecognition, Recognition
from comeba_ext.editing.report import Phases
from comeba_ext.editing.session import Session
from comeba_ext.editing.sharing import shared_target_values
from comeba_ext.editing.target_values import TargetValues, checked_values, optimise_target_values
from comeba_ext.errors import ConfigError, CovarianceError, RequestError
from comeba_ext.forward.activation_recorder import ActivationRecorder
from comeba_ext.forward.architectures import Architecture, context_length
from comeba_ext.forward.partial import evaluating
from comeba_ext.layers.attachment import Attachment
from comeba_ext.layers.edit_table import QUESTIONS, QuestionGate, questions_in
from comeba_ext.layers.hooked_linear import HookedLinear
from comeba_ext.memory.key_memory import KeyMemory
from comeba_ext.memory.ledger import Entry, stacked, without
from comeba_ext.methods import hooked_state
from comeba_ext.methods.base import Method, OnProgress, Outcome
from comeba_ext.methods.deltas import adopt_masters, hooked, master_of, masters_on
from comeba_ext.scores import score_named
from comeba_ext.text.encoding import input_device
from comeba_ext.text.request import EditRequest
from comeba_ext.text.rows import check_length, essence_rows, prompt_rows, target_rows


class ComebaHK(Method):
    """Target values at the value layer, written by least squares into the hooked projections of the edited blocks, for the tokens
    that a score finds in scope.

    Attributes:
        layers: the hooked projections by name, in increasing order.
        masters: layer name to delta in the precision sums are kept in: the buffer itself, or a float32 master of a
            half-precision one.
        alphas: every layer's threshold after every step, from step 0.
        recognition: what a score that compares keys is told of a batch.

    Class attributes, which the weight-writing methods override:
        serving: mode of the layers between edits, ``"validated"`` or ``"temporary"`` (edited output everywhere).
    """

    name = "COMEBA-HK"
    needs_covariance = True
    scored = True
    takes_values = True
    tells_questions = True
    serving = "validated"

    def __init__(self, session: Session):
        super().__init__(session)
        self._key_memory: dict[str, KeyMemory] = {}
        self.covariance: Covariance | None = None
        self.standing: list[Entry] = []  # live entries whose place the batch that is being written does not take
        self.alphas: list[dict[str, float]] = [self.thresholds()]
        compares = score_named(session.config.scope).compares_keys and self.serving == "validated"
        self.recognition = (KeyRecognition if compares else Recognition)(self)
        self.masters = {name: master_of(layer) for name, layer in self.layers.items()}

    @classmethod
    def check(cls, config, model: nn.Module, architecture: Architecture) -> None:
        super().check(config, model, architecture)
        if config.question_floor is not None and not score_named(config.scope).compares_keys:
            raise ConfigError(f"question_floor: the score {config.scope!r} knows no subjects that could be muted; 'nearest' does")
        if len(config.layers) > 1 and architecture.after_norm(model, config.value_layer) is not None:
            raise ConfigError(
                f"layers {list(config.layers)}: a norm follows every MLP of {model.config.model_type}, edits do not add up; give one block"
            )

    @classmethod
    def build(cls, model: nn.Module, config, architecture: Architecture) -> dict[str, Attachment]:
        found: dict[str, Attachment] = hooked(model, cls.targets(config, architecture), config, cls.serving)
        questions = questions_in(model, config.question_floor, architecture)
        return found if questions is None else {**found, QUESTIONS: QuestionGate(input_device(model), questions)}

    def set_covariance(self, covariance: Covariance) -> None:
        memory, fitted = {}, {}
        for name, layer in self.layers.items():
            moment = covariance[name].to(layer.delta.device)
            try:
                memory[name] = self.memory_of(name, covariance)
                if self.serving == "validated":  # else no score decides
                    fitted[name] = copy.deepcopy(layer.score)
                    fitted[name].fit(moment)
            except (CovarianceError, torch.linalg.LinAlgError) as error:
                raise CovarianceError(f"{name}: {error}") from None
        self._key_memory, self.covariance = memory, covariance
        for name, score in fitted.items():
            self.layers[name].score.take_over(score)
        self.recognition.learn()

    @property
    def key_memory(self) -> dict[str, KeyMemory]:
        """Layer name to :class:`KeyMemory`; empty until a covariance is there. Where keys are compared it is ``λ·C0`` whatever was
        edited, and what was loaded makes it when it is first asked for: edits that are only used need none."""
        if self.recognition.compares and self.covariance is not None and not self._key_memory:
            self._key_memory = {name: self.memory_of(name, self.covariance) for name in self.layers}
        return self._key_memory

    @key_memory.setter
    def key_memory(self, memory: dict[str, KeyMemory]) -> None:
        self._key_memory = memory

    def memory_of(self, name: str, covariance: Covariance) -> KeyMemory:
        """A layer's key memory before any edit, ``λ·C0``."""
        layer, form = self.layers[name], "factor" if self.recognition.compares else "inverse"
        return KeyMemory(self.config.lam_of(layer.in_features) * covariance[name].to(layer.delta.device), form=form)

    # -- a batch ------------------------------------------------------------------------------------------------

    def validate(self, batch: list[EditRequest]) -> None:
        tokenizer, config = self.session.tokenizer, self.config
        rows = target_rows(tokenizer, batch, self.session.prefixes, wordings=True, whole=config.end_factor > 0, chat=config.chat)
        rows += essence_rows(tokenizer, batch)
        check_length(rows, batch, context_length(self.session.model))

    def edit(self, batch: list[EditRequest], values: torch.Tensor | None, phases: Phases, on_progress: OnProgress) -> Outcome:
        with phases("check"):
            if values is not None:
                values = checked_values(values, len(batch), next(iter(self.layers.values())).out_features).to(self.session.device)
            kept, placed, declined = self.recognition.placed(batch)
            given, batch, values = [batch[n] for n in kept], placed, None if values is None else values[kept]
        if not batch:
            self.alphas.append(self.thresholds())
            return Outcome([], [], 0, declined=declined)
        asked = len(batch)  # behind them, other facts of the same subjects, whose values must be found anew together with theirs
        companions = self.recognition.companions(batch) if values is None else []
        batch = batch + [entry.request for entry in companions]
        self.recognition.check_memory(batch)
        found = trace = None
        with phases("values"):
            if values is None:
                if distributed.world_size() == 1:  # else this process runs only its own requests
                    first, layer = self.session.blocks[self.config.layers[0]], next(iter(self.layers.values()))
                    trace = ActivationRecorder(first, layer, self.session.max_tokens)
                found = self.optimise(batch, on_progress, trace)
                values = found.values
        replaced = self.superseded(batch)
        if replaced:
            with phases("update"):
                for name in self.layers:
                    self._exchange(name, remove=replaced, add=[])
                self.recognition.forget(replaced)
        self.standing = without(self.session.ledger.live(), replaced)
        written = self._write(batch, values, phases, trace)
        entries = []
        for n, request in enumerate(batch):
            keys, responses = ({name: rows[n].cpu() for name, rows in table.items()} for table in written)  # (m, d)
            entries.append(Entry(request, self.session.step + 1, keys, responses, anchors=self.recognition.marks(n)))
        self.alphas.append(self.thresholds())
        leverage = {name: own.median().item() for name, own in self.recognition.leverage.items()}
        lam = {name: self.config.lam_of(layer.in_features) for name, layer in self.layers.items()}
        return Outcome(
            batch,
            entries,
            asked,
            replaced,
            declined,
            moved=[request.request_id for request, own in zip(batch, given, strict=False) if request != own],
            losses=found.losses[:asked] if found else [],
            optimizer_steps=found.steps[:asked] if found else [],
            leverage=leverage,
            share={name: own / (lam[name] + own) for name, own in leverage.items()},
        )

    def target_values(self, batch: list[EditRequest], on_progress: OnProgress) -> torch.Tensor:
        kept, placed, _ = self.recognition.placed(batch)  # as they would be edited
        return self.optimise([*(dict(enumerate(batch)) | dict(zip(kept, placed))).values()], on_progress).values

    def optimise(self, batch: list[EditRequest], on_progress: OnProgress, trace: ActivationRecorder | None = None) -> TargetValues:
        """Target values of the batch, shared among processes; facts of one subject together (:meth:`Recognition.together`)."""
        session = self.session
        if distributed.world_size() > 1:
            distributed.require_replicated(session.model)
            distributed.require_same((batch, session.prefixes, session.step), "the requests, prefixes or steps")

        def find(own: list[EditRequest], together: list[list[int]]) -> TargetValues:
            with evaluating(session.model):
                return optimise_target_values(
                    session.model, session.tokenizer, session.architecture, self.config, own, session.prefixes, on_progress, trace, together
                )

        return shared_target_values(find, batch, self.recognition.together(batch), session.device)

    def retract(self, entries: list[Entry]) -> None:
        for name in self.layers:
            self._exchange(name, remove=entries, add=[])
            if len(entries) == len(self.session.ledger):
                self._clear(name)
        self.recognition.forget(entries)
        self.alphas.append(self.thresholds())

    def revert(self, step: int, added: list[Entry], removed: list[Entry]) -> None:
        ledger = self.session.ledger
        for name, layer in self.layers.items():
            self._undo(name, step, added, removed)
            if len(added) == len(ledger) and not removed:
                self._clear(name)
            layer.alpha.fill_(self.alphas[step][name])
        # In the order they were added: of near keys the first stands for the others.
        entries = [entry for entry in ledger.entries if entry.step <= step]
        self.recognition.compare_with([entry for entry in entries if entry.removed is None or entry.removed > step])
        self.alphas = self.alphas[: step + 1]

    def thresholds(self) -> dict[str, float]:
        return {name: layer.alpha.item() for name, layer in self.layers.items()}

    def subject_keys(self, rows: list, names: list[str]) -> dict[str, torch.Tensor]:
        """Layer name to the keys at rows' subjects' last tokens, ``(rows, d_in)``."""
        session, layers = self.session, {name: self.layers[name] for name in names}
        with evaluating(session.model):
            return subject_keys(session.decoder, layers, rows, session.pad_token, session.max_tokens, session.device)

    # -- parts --------------------------------------------------------------------------------------------------

    def _write(self, batch: list[EditRequest], values: torch.Tensor, phases: Phases, trace: ActivationRecorder | None = None):
        """Step 2 and 3 of DESIGN §3: per layer keys, residual, update, threshold.

        Returns:
            keys ``(u, m, d_in)`` and responses ``(u, m, d_out)`` by layer.
        """
        session = self.session
        rows = prompt_rows(session.tokenizer, batch, session.prefixes)
        keys: dict[str, torch.Tensor] = {}
        responses: dict[str, torch.Tensor] = {}
        with phases("calibrate"):
            self.recognition.begin(batch)
        for layer in self.layers.values():
            layer.mode = "temporary"
        reader = KeyReader(
            session.decoder,
            session.blocks,
            session.config.layers,
            list(self.layers.values()),
            rows,
            whole=score_named(session.config.scope).whole_sequence,
            pad_token=session.pad_token,
            max_tokens=session.max_tokens,
            device=session.device,
            trace=trace,
            apart=self.recognition.compares,
        )
        with evaluating(session.model):
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
                    self.recognition.write(name, layer, batch, keys[name], responses[name])
                    self._calibrate(name, layer, reading)
        return keys, responses

    def _valued(self, layer: HookedLinear, reading: LayerReading) -> torch.Tensor:
        """What target values are compared with, ``(u, d_model)``: the hidden state after the value layer, or, where a norm
        lies before that, the projection's output."""
        if self.session.architecture.after_norm(self.session.model, self.config.value_layer) is None:
            return reading.hidden
        return layer(reading.plain_keys.to(layer.delta)[:, None])[:, 0].to(reading.hidden)

    def _add(self, name: str, keys: torch.Tensor, reading: LayerReading, residual: torch.Tensor) -> torch.Tensor:
        """``C ← C + K Kᵀ``, ``delta ← delta + R Kᵀ C⁻¹``; returns the responses ``delta·k + R``, ``(u, m, d_out)``.

        Args:
            keys: ``(u, m, d_in)``; m of a request.
            reading: where they are from.
            residual: ``(u, d_out)``, of every key of a request.
        """
        memory, delta, (count, each, _) = self.key_memory[name], self.masters[name], keys.shape
        device, dtype = memory.device, memory.dtype
        if self.recognition.compares:  # nothing else is in a request's shard that a token at its key would get
            return residual.to(torch.promote_types(delta.dtype, torch.float32))[:, None].expand(count, each, -1)
        keys, residual = keys.flatten(0, 1).to(device, dtype), residual.to(device, dtype).repeat_interleave(each, 0)
        responses = keys @ delta.to(dtype).mT + residual
        self._shift(name, residual.mT @ memory.update(keys.mT).mT)
        return responses.to(torch.promote_types(delta.dtype, torch.float32)).unflatten(0, (count, each))

    def _exchange(self, name: str, remove: list[Entry], add: list[Entry]) -> None:
        """Least squares with some requests taken out and others put back.

        From ``delta·C = Σ v kᵀ`` over live requests (none of which is in a shard) follows, with ``C' = C + Σ_add k kᵀ − Σ_remove k kᵀ``,
        ``delta' = delta + (Σ_add − Σ_remove)(v − delta·k) kᵀ C'⁻¹``.
        """
        if self.recognition.compares:
            return
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
        missing = (responses - self.masters[name].to(keys) @ keys) * sign
        self._shift(name, missing @ solved.mT)
        self._rescale(name)

    def _undo(self, name: str, step: int, added: list[Entry], removed: list[Entry]) -> None:
        """Take out of a layer what the steps after ``step`` added, and put back what they removed."""
        if added or removed:
            self._exchange(name, remove=added, add=removed)

    def factors(self, name: str, live: list[Entry]) -> tuple[torch.Tensor, torch.Tensor]:
        """``delta = V Kᵀ C⁻¹`` over the live requests (see ledger) as ``V (d_out, n)`` and ``(C⁻¹ K)ᵀ (n, d_in)`` for n keys. (Where every
        subject has its own delta, this is that of all of them together.)"""
        keys, responses = stacked(live, name)
        memory = copy.copy(self.key_memory[name])
        return responses, (memory.update(keys) if self.recognition.compares else memory.solve(keys)).mT

    def weight_change(self, name: str):
        live = self.session.ledger.live()
        return self.factors(name, live) if live else self.masters[name]

    def _shift(self, name: str, change: torch.Tensor) -> None:
        """``delta ← delta + change``."""
        delta, layer = self.masters[name], self.layers[name]
        if not torch.isfinite(change).all():
            raise RequestError(f"the update of {name} is not finite; check the target values and the covariance")
        delta += change.to(delta)
        if layer.delta is not delta:
            layer.delta.copy_(delta)

    def _clear(self, name: str) -> None:
        """No live edit is left: exactly no delta, and the threshold as it started."""
        layer = self.layers[name]
        self.masters[name].zero_()
        layer.delta.zero_()
        layer.score.clear()
        layer.alpha.fill_(self.alphas[0][name])

    def _rescale(self, name: str) -> None:
        """Tell a layer's score that delta is another one."""
        layer = self.layers[name]
        if self.covariance is not None:
            layer.score.delta_changed(layer, lambda: self.covariance[name].to(layer.delta.device))

    def _calibrate(self, name: str, layer: HookedLinear, reading: LayerReading) -> None:
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

    # -- steps on a twin, and disk ------------------------------------------------------------------------------

    def on(self, session: Session) -> ComebaHK:
        other = super().on(session)
        for layer in other.layers.values():
            layer.mode = self.serving
        other.masters = masters_on(self.masters, self.layers, other.layers)
        other.key_memory = {name: copy.copy(memory) for name, memory in self._key_memory.items()}
        other.alphas = list(self.alphas)
        other.recognition = self.recognition.of(other)
        return other

    def adopt(self, other: ComebaHK) -> None:
        masters, recognition = self.masters, self.recognition
        adopt_masters(masters, self.layers, other.masters)
        recognition.adopt(other.recognition)
        super().adopt(other)
        self.masters, self.recognition = masters, recognition

    def adapter(self) -> dict[str, torch.Tensor]:
        return hooked_state.adapter(self)

    @classmethod
    def check_saved(cls, model: nn.Module, config, architecture: Architecture, names: list[str], tensors: dict) -> None:
        beside = [QUESTIONS] if config.question_floor is not None else []
        hooked_state.check(model, cls.targets(config, architecture), names, tensors, beside)

    def state(self) -> tuple[dict[str, torch.Tensor], dict]:
        return hooked_state.state(self)

    def load_state(self, tensors: dict[str, torch.Tensor], manifest: dict) -> None:
        hooked_state.load(self, tensors, manifest)

    @classmethod
    def load_entries(cls, requests: list[tuple[EditRequest, int]], tensors: dict[str, torch.Tensor], names: list[str]) -> list[Entry]:
        return hooked_state.entries(requests, tensors, names)
