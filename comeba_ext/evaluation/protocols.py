"""Editing protocols: single-round, consecutive, sequential; resumable, with every prediction in a log.

* single-round batch: every batch is edited into the unedited model, evaluated, and rolled back;
* consecutive batch: batch after batch into the same model; at checkpoints everything edited so far is evaluated
  (retention), a fact edited twice against its latest target, locality against the unedited model;
* sequential: consecutive with batches of one.

A run's folder holds ``log.jsonl`` (the run's identity, a line an edit step, a line a record at every checkpoint with the
answer to every prompt) and, for consecutive runs, ``edits/``, where a killed run goes on. The log is cut back to the
saved step, so an interrupted run gives the same numbers as one that never stopped, times excepted (to the last bit where
``config.max_tokens`` is given; otherwise rows are grouped by the memory that is free, which rounding sees).

A method may come to an end before its records do: weights that were overwritten a hundred times hold infinities, or an
update does. That is a result, not a mistake: it is logged, and the run is complete with what was measured until then.
"""

from __future__ import annotations

import dataclasses
import hashlib
import json
import shutil
import time
from collections.abc import Callable, Iterable
from dataclasses import dataclass, field
from pathlib import Path

import torch
from tqdm.auto import tqdm

from comeba_ext import __version__
from comeba_ext.covariance import Covariance
from comeba_ext.editing.config import EditConfig, is_int
from comeba_ext.editing.report import EditReport, reset_peak_memory
from comeba_ext.editor import Editor
from comeba_ext.errors import ComebaError, ConfigError, RequestError, StorageError
from comeba_ext.evaluation.base import BasePredictions, predict_base
from comeba_ext.evaluation.metrics import Metrics, evaluate, summarise
from comeba_ext.evaluation.run_log import RunLog
from comeba_ext.evaluation.written import Writing, likeness
from comeba_ext.forward.architectures import Architecture
from comeba_ext.methods import Method, default_config, method_named
from comeba_ext.storage import MANIFEST, alone, digest_of
from comeba_ext.storage import identity as identity_of
from comeba_ext.text.request import EditRequest, Ids, as_requests, consecutive_batches, latest

PROTOCOLS = ("single_round", "consecutive", "sequential")
SAVE_SECONDS = 300.0  # of editing that a killed run may have to do again
Measure = Callable[[Editor, list[EditRequest]], dict]


@dataclass(frozen=True)
class Protocol:
    """How a run edits and when it evaluates.

    Args:
        name: one of ``PROTOCOLS``.
        batch_size: requests a batch; sequential means 1.
        checkpoints: numbers of edits at which a consecutive run is evaluated; its end always is.
        generate: evaluate greedy generation too, cut at the answer's length.
        writing: let the model write to a natural end too, so (:mod:`comeba_ext.evaluation.written`).
        save_every: batches between saves of a consecutive run, at most; slow ones are saved every ``SAVE_SECONDS``.
        seed: of the intervals.

    Raises:
        ConfigError: an unknown protocol or a number out of range.
    """

    name: str = "consecutive"
    batch_size: int = 10
    checkpoints: tuple[int, ...] = ()
    generate: bool = True
    writing: Writing | None = None
    save_every: int = 20
    seed: int = 0

    def __post_init__(self) -> None:
        if self.name not in PROTOCOLS:
            raise ConfigError(f"unknown protocol {self.name!r}; choose one of {', '.join(PROTOCOLS)}")
        if self.name == "sequential":
            object.__setattr__(self, "batch_size", 1)
        object.__setattr__(self, "checkpoints", tuple(self.checkpoints))
        for value in (self.batch_size, self.save_every, *self.checkpoints):
            if not is_int(value) or value < 1:
                raise ConfigError(f"batch_size, save_every and checkpoints must be whole numbers of 1 or more, got {value!r}")


@dataclass
class Result:
    """What a run measured.

    Attributes:
        checkpoints: number of edits to :class:`Metrics` at that point; single-round runs have one, over all records.
        extra: number of edits to what the measures returned, and ``saved_bytes``, what the edits take on disk (with all that going on
            with them needs).
        steps: a record an edit step: ``step``, ``edits``, ``seconds`` by phase, ``loss``, ``peak_memory``, ``alpha``.
        failed: number of edits after which the method could not go on, and ``error`` why; ``None`` where it could.
    """

    checkpoints: dict[int, Metrics] = field(default_factory=dict)
    extra: dict[int, dict] = field(default_factory=dict)
    steps: list[dict] = field(default_factory=list)
    failed: int | None = None
    error: str | None = None

    @property
    def final(self) -> Metrics:
        return self.checkpoints[max(self.checkpoints)]

    def efficiency(self, edits: int | None = None) -> dict:
        """Of the steps up to so many edits, default all: ``seconds_per_edit`` (all phases, without evaluation) and
        ``peak_memory``, the highest of a step in bytes (see :class:`EditReport`; marks are reset before every step)."""
        steps = [step for step in self.steps if edits is None or step["edits"] <= edits]
        count = sum(step["requests"] for step in steps)
        seconds = sum(sum(step["seconds"].values()) for step in steps)
        return {
            "seconds_per_edit": seconds / count if count else None,
            "peak_memory": max((step["peak_memory"] for step in steps), default=None),
        }


def run_protocol(
    model: torch.nn.Module,
    tokenizer,
    requests: Iterable,
    protocol: Protocol,
    folder: str | Path,
    *,
    method: str | type[Method] = "COMEBA-HK",
    config: EditConfig | None = None,
    covariance: Covariance | None = None,
    base: BasePredictions | Callable[[], BasePredictions] | None = None,
    measure: Measure | None = None,
    identity: dict | None = None,
    progress: bool = False,
) -> Result:
    """Run a protocol, or go on with one that was interrupted in ``folder``.

    Args:
        model: unedited; hooked meanwhile, and given back as it came.
        requests: anything :func:`as_requests` accepts.
        method: name or class of one of :mod:`comeba_ext.methods`; config: default: its own for the model.
        covariance: needed by every method but fine-tuning.
        base: predictions of the unedited model for these requests, where they are known already; or what makes them, called if
            anything is left to run.
        measure: called with the editor and the requests edited so far at every checkpoint of a consecutive run; returns
            a plain JSON-serialisable mapping.
        identity: what else tells this run from others, beside model, records, covariance, settings, version; JSON-serialisable.

    Raises:
        StorageError: the folder holds another run, or another process is running in it.
        ComebaError: a request cannot be used, or what the likeness of long answers needs is not installed; nothing was run.
    """
    requests = as_requests(requests)
    if not requests:
        raise RequestError("there is no request to edit")
    Ids(requests)
    if protocol.writing is not None and protocol.writing.long:
        likeness()
    method = method_named(method)
    config = config or default_config(method, model)
    header = _header(model, requests, protocol, method, config, covariance, identity)
    folder = Path(folder)
    with alone(folder):
        if (folder / "edits" / MANIFEST).exists() and not (folder / "log.jsonl").exists():
            raise StorageError(f"{folder / 'edits'} holds edits that no run here has made; choose another folder")
        log = RunLog(folder / "log.jsonl", header)
        if not _finished(log.records, len(requests)):
            if base is None:
                base = predict_base(model, tokenizer, requests, generate=protocol.generate, writing=protocol.writing, progress=progress)
            elif callable(base):
                base = base()
            run = _single_round if protocol.name == "single_round" else _consecutive
            run(model, tokenizer, requests, protocol, folder, log, method, config, covariance, base, measure, progress)
        shutil.rmtree(folder / "edits", ignore_errors=True)  # the log has everything
    return read_result(log.records, protocol)


def complete_result(
    model: torch.nn.Module,
    requests: list[EditRequest],
    protocol: Protocol,
    folder: str | Path,
    *,
    method: type[Method],
    config: EditConfig,
    covariance: Covariance | None = None,
    identity: dict | None = None,
) -> Result | None:
    """The result of a run that is complete in ``folder``, from its log; ``None`` where it is not, nothing is there, or a
    file that its settings name is gone.

    Raises:
        StorageError: the folder holds another run.
    """
    path = Path(folder) / "log.jsonl"
    if not path.exists() or not all(file.exists() for file in method.files(config).values()):
        return None
    log = RunLog(path, _header(model, requests, protocol, method, config, covariance, identity))
    return read_result(log.records, protocol) if _finished(log.records, len(requests)) else None


def _header(model, requests, protocol, method, config, covariance, identity) -> dict:
    """What a run is: its log's first line."""
    return {
        "method": method.name,
        "protocol": protocol.name,
        "batch_size": protocol.batch_size,
        "seed": protocol.seed,
        "checkpoints": list(protocol.checkpoints),
        "generate": protocol.generate,
        "writing": None if protocol.writing is None else dataclasses.asdict(protocol.writing),
        "records": len(requests),
        "requests": digest([r.to_record() for r in requests]),
        "config": config.to_dict(),
        "files": {name: digest_of(file) for name, file in method.files(config).items()} or None,  # may come to hold something else
        "version": __version__,
        "model": digest_of_model(model, config),
        "covariance": digest_of_covariance(covariance),
        **(identity or {}),
    }


def read_result(records: list[dict], protocol: Protocol) -> Result:
    """The result of a run's complete log."""
    result = Result(steps=[r for r in records if r["event"] == "edit"])
    rows: dict[int, list[dict]] = {}
    for record in records:
        if record["event"] == "record":
            rows.setdefault(record["edits"], []).append({k: v for k, v in record.items() if k not in ("event", "edits")})
        elif record["event"] == "checkpoint":
            result.extra[record["edits"]] = record["extra"]
        elif record["event"] == "failed":
            result.failed, result.error = record["edits"], record["error"]
    if protocol.name == "single_round":
        rows = {sum(map(len, rows.values())): [row for own in rows.values() for row in own]}
    result.checkpoints = {edits: summarise(own, protocol.seed) for edits, own in rows.items()}
    return result


def _single_round(model, tokenizer, requests, protocol, folder, log, method, config, covariance, base, measure, progress) -> None:
    done = _up_to_last_checkpoint(log.records)
    log.keep(done)
    edited = max((r["edits"] for r in done if r["event"] == "checkpoint"), default=0)
    editor = Editor(model, tokenizer, config, method=method)
    try:
        if covariance is not None:
            editor.set_covariance(covariance)
        plan = _checked(editor, requests, protocol)
        start = {name: memory.state for name, memory in editor.key_memory.items()}
        count = 0
        with tqdm(total=len(requests), initial=edited, disable=not progress, unit="edit", desc=method.name) as bar:
            for batch in plan:
                count += len(batch)
                if count <= edited:
                    continue
                report = _edited(editor, batch, count, log)
                if report is None:
                    return
                metrics = evaluate(model, tokenizer, batch, base, generate=protocol.generate, writing=protocol.writing)
                editor.rollback(0)
                for name, state in start.items():  # to the bit, so that a resumed run sees the same
                    editor.key_memory[name].state = state
                log.append([_step(report, count, len(batch)), *_rows(metrics, count), _checkpoint(count, {})])
                bar.update(len(batch))
    finally:
        editor.close()


def _consecutive(model, tokenizer, requests, protocol, folder, log, method, config, covariance, base, measure, progress) -> None:
    saved = folder / "edits"
    if (saved / MANIFEST).exists():
        editor = Editor.from_pretrained(model, tokenizer, saved)
    else:
        editor = Editor(model, tokenizer, config, method=method)
    try:
        if not editor.step and covariance is not None and editor.covariance is None:
            editor.set_covariance(covariance)
        log.keep([r for r in _up_to_last_checkpoint(log.records, steps=editor.step) if r.get("step", 0) <= editor.step])
        evaluated = {r["edits"] for r in log.records if r["event"] == "checkpoint"}
        plan = _checked(editor, requests, protocol)
        ends = [sum(map(len, plan[: n + 1])) for n in range(len(plan))]
        stops = {next(end for end in ends if end >= wanted) for wanted in protocol.checkpoints if wanted <= ends[-1]}
        stops.add(ends[-1])
        since = time.monotonic()
        with tqdm(total=len(requests), disable=not progress, unit="edit", desc=method.name) as bar:
            for number, (batch, end) in enumerate(zip(plan, ends, strict=True), 1):
                if number > editor.step:
                    report = _edited(editor, batch, end, log)
                    if report is None:
                        return
                    log.append([_step(report, end, len(batch))])
                    if number % protocol.save_every == 0 or end in stops or time.monotonic() - since >= SAVE_SECONDS:
                        editor.save_pretrained(saved)
                        since = time.monotonic()
                if end in stops and end not in evaluated:
                    asked = latest(requests[:end])
                    metrics = evaluate(
                        model, tokenizer, asked, base, generate=protocol.generate, writing=protocol.writing, progress=progress
                    )
                    size = sum(path.stat().st_size for path in saved.rglob("*") if path.is_file())
                    extra = {"saved_bytes": size, **(measure(editor, asked) if measure is not None else {})}
                    log.append([*_rows(metrics, end), _checkpoint(end, extra)])
                bar.update(len(batch))
    finally:
        editor.close()


def _checked(editor: Editor, requests: list[EditRequest], protocol: Protocol) -> list[list[EditRequest]]:
    """The batches, after the method and every request were found usable: what fails later is the method."""
    editor.method.ready()
    plan = consecutive_batches(requests, protocol.batch_size)
    for batch in plan:
        editor.check([dataclasses.replace(request, request_id=None) for request in batch])
    return plan


def _edited(editor: Editor, batch: list[EditRequest], end: int, log: RunLog) -> EditReport | None:
    """The report of a batch; ``None``, and a line in the log, where the method could not go on."""
    reset_peak_memory(editor.model.device)
    try:
        return editor.edit(batch)
    except ComebaError as error:
        log.append([{"event": "failed", "edits": end - len(batch), "error": str(error)}])
        return None


def _finished(records: list[dict], count: int) -> bool:
    return any(r["event"] == "failed" or (r["event"] == "checkpoint" and r["edits"] == count) for r in records)


def digest_of_model(model: torch.nn.Module, config: EditConfig) -> str:
    """What tells a model from others, by the layers that are edited, and by its precision."""
    architecture = Architecture.of(model, blocks=config.blocks, projection=config.projection)
    known = identity_of(model, [architecture.projection_name(n) for n in config.layers])
    return digest([known, str(model.dtype)])


def digest_of_covariance(covariance: Covariance | None) -> str | None:
    """What tells a covariance from others."""
    if covariance is None:
        return None
    return digest([covariance.tokens, {name: moments.diagonal().tolist() for name, moments in covariance.moments.items()}])


def digest(value) -> str:
    """Sixteen digits that tell one JSON value from another."""
    return hashlib.sha256(json.dumps(value, sort_keys=True).encode()).hexdigest()[:16]


def _up_to_last_checkpoint(records: list[dict], steps: int = 0) -> list[dict]:
    """Complete records: no ``record`` line of a checkpoint that did not end, and edit lines only where their step is
    kept (up to the last checkpoint, or up to ``steps``)."""
    ended = {r["edits"] for r in records if r["event"] == "checkpoint"}
    last = max(ended, default=0)
    return [
        r
        for r in records
        if (r["event"] == "edit" and (r["edits"] <= last or r["step"] <= steps)) or (r["event"] != "edit" and r["edits"] in ended)
    ]


def _step(report, edits: int, requests: int) -> dict:
    mean = lambda values: sum(values) / len(values) if values else None  # noqa: E731
    return {
        "event": "edit",
        "step": report.step,
        "edits": edits,
        "requests": requests,
        "seconds": report.seconds,
        "loss": mean(report.losses),
        "optimizer_steps": mean(report.optimizer_steps),
        "peak_memory": report.peak_memory,
        "alpha": list(report.alpha.values()),
        "answered": sum(report.answered),
        "declined": len(report.declined),
    }


def _rows(metrics: Metrics, edits: int) -> list[dict]:
    return [{"event": "record", "edits": edits, **row} for row in metrics.per_record]


def _checkpoint(edits: int, extra: dict) -> dict:
    return {"event": "checkpoint", "edits": edits, "extra": extra}
