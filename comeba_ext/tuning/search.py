"""The search: candidates for the value block from patching, then trial edits, one kind of setting after another."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterable
from dataclasses import asdict, dataclass, field
from pathlib import Path

from torch import nn
from tqdm.auto import tqdm

from comeba_ext import __version__
from comeba_ext.covariance import Covariance, covariance_of_blocks
from comeba_ext.editing.config import EditConfig
from comeba_ext.editor import Editor
from comeba_ext.errors import ComebaError
from comeba_ext.evaluation import evaluate, predict_base
from comeba_ext.evaluation.protocols import digest_of_covariance, digest_of_model
from comeba_ext.evaluation.run_log import RunLog
from comeba_ext.forward.architectures import Architecture
from comeba_ext.text.request import EditRequest
from comeba_ext.tuning import probes

CANDIDATES = 4  # value blocks that are tried
SPAN = 5  # edited blocks at most, up to the value block
# Polyak's steps need no rate; Adam's are in units of the hidden state's root mean square.
OPTIMISER_SETTINGS = ({"optimizer": "polyak"}, *({"optimizer": "adam", "lr": rate, "lr_unit": "hidden_rms"} for rate in (0.1, 0.4)))
RATIOS = (0.25, 1.0, 4.0)  # times the default
DECIDES = 0.75  # of the highest share of answers that a block decides
BATCH = 10


@dataclass
class Trial:
    """One setting and what it did; ``score`` is the mean of reliability as written, generality and locality."""

    settings: dict
    reliability: float
    written: float
    generality: float
    locality: float
    seconds: float
    loss: float

    @property
    def score(self) -> float:
        return (self.written + self.generality + self.locality) / 3


@dataclass
class Tuning:
    """What a search found.

    Attributes:
        facts, known: number of facts asked, and of those the model answers.
        patching: share of answers that each block's state at the subject's last token decides; empty with too few facts.
        trials: in the order they were made.
        best: settings that differ from :meth:`EditConfig.for_model`, for a file that ``--config`` takes.
        seconds: wall time of it all, covariance included, of this run.
    """

    facts: int
    known: int
    patching: list[float]
    trials: list[Trial] = field(default_factory=list)
    best: dict = field(default_factory=dict)
    seconds: float = 0.0

    def to_dict(self) -> dict:
        return asdict(self) | {"trials": [asdict(trial) | {"score": trial.score} for trial in self.trials]}


def tune(
    model: nn.Module,
    tokenizer,
    texts: Iterable[str] | None,
    *,
    records: list[EditRequest] | None = None,
    covariance: Covariance | None = None,
    folder: str | Path | None = None,
    edits: int = 20,
    scope: str | None = None,
    progress: bool = False,
    on_trial: Callable[[Trial], None] = lambda trial: None,
) -> Tuning:
    """Find settings for a model.

    Args:
        texts: corpus for the covariance of all candidates' layers, unless ``covariance`` is given.
        records: edits to try instead of the shipped ones; those that name their true answer also serve to find candidates.
        folder: where the covariance and every trial are kept; a search that was interrupted goes on there.
        edits: trial edits a setting.
        scope: score to tune for.
        on_trial: called after every trial.

    Raises:
        ComebaError: no usable record, or a folder of another search.
        CovarianceError: as :func:`collect_covariance`.
    """
    start = time.perf_counter()
    scoped = {"scope": scope} if scope else {}
    default = EditConfig.for_model(model, **scoped)
    architecture = Architecture.of(model, default.blocks, default.projection)
    asked = probes.shipped() if records is None else probes.of_records(records)
    right = probes.known(model, tokenizer, asked, progress=progress) if asked else []
    flips = probes.patching(model, tokenizer, architecture, right)
    found = Tuning(len(asked), len(right), flips)
    if records is None:
        known = set(right)
        # What the model knows first: there an edit has something to overcome.
        order = [fact for fact in asked if fact in known] + [fact for fact in asked if fact not in known]
        chosen = probes.trial_edits(order[::2], right[1::2], edits)  # what must stay is never edited
    else:
        chosen = list(records)[:edits]
    if not chosen:
        raise ComebaError("no record to try edits with")
    values = _candidates(flips, architecture.num_blocks(model), default)
    width = min(SPAN, len(default.layers))
    spans = [tuple(range(max(0, value - width + 1), value + 1)) for value in values]
    layers = sorted({layer for span in spans for layer in span} | set(default.layers))
    if covariance is None:
        path = None if folder is None else Path(folder) / "covariance.safetensors"
        covariance = covariance_of_blocks(model, tokenizer, texts or [], layers, architecture, path=path, progress=progress)
    log, made_before = None, []
    if folder is not None:
        log = RunLog(
            Path(folder) / "trials.jsonl",
            {
                "edits": [r.to_record() for r in chosen],
                "scope": default.scope,
                "model": digest_of_model(model, default),
                "covariance": digest_of_covariance(covariance),
                "version": __version__,
            },
        )
        log.keep(log.records)
        made_before = [Trial(**record["trial"]) for record in log.records]
    base = predict_base(model, tokenizer, chosen, generate=False)
    stages = [
        [{"layers": list(span)} for span in spans],
        OPTIMISER_SETTINGS,
        [{"leverage_ratio": factor * default.ratio, "lam": None} for factor in RATIOS],
    ]
    best: dict = {}
    with tqdm(total=sum(map(len, stages)), unit="trial", desc="tune", disable=not progress) as bar:
        for stage in stages:
            made = []
            for changes in stage:
                settings = best | changes
                trial = next((trial for trial in made_before if trial.settings == settings), None)
                if trial is None:
                    trial = _try(model, tokenizer, default.replace(**settings), settings, chosen, covariance, base)
                    if log is not None:
                        log.append([{"event": "trial", "trial": asdict(trial)}])
                made.append(trial)
                if trial not in found.trials:
                    found.trials.append(trial)
                    on_trial(trial)
                bar.update()
            best = max(made, key=lambda trial: trial.score).settings
    found.best = {**scoped, **{key: value for key, value in best.items() if value is not None}}
    found.seconds = time.perf_counter() - start
    return found


def _candidates(flips: list[float], depth: int, default: EditConfig) -> list[int]:
    """Value blocks to try: spread over those that decide the answer, and the default's own."""
    deciding = [n for n, share in enumerate(flips[:-1]) if share >= DECIDES * max(flips[:-1])] if flips and max(flips) > 0 else []
    last = deciding[-1] if deciding else depth // 2
    low = min(2, last)
    spread = {round(low + (last - low) * n / max(1, CANDIDATES - 2)) for n in range(CANDIDATES - 1)}
    return sorted(spread | {default.value_layer})


def blocks(settings: dict) -> str:
    """``"4-8"``, or ``"8"`` where it is one block."""
    first, last = settings["layers"][0], settings["layers"][-1]
    return f"{first}-{last}" if first != last else f"{first}"


def _try(model, tokenizer, config: EditConfig, settings: dict, edits: list[EditRequest], covariance: Covariance, base) -> Trial:
    editor = Editor(model, tokenizer, config)
    start = time.perf_counter()
    try:
        editor.set_covariance(covariance)
        losses = [loss for report in editor.edit_all(edits, min(BATCH, len(edits)), progress=False) for loss in report.losses]
        seconds = time.perf_counter() - start
        metrics = evaluate(model, tokenizer, edits, base, generate=False)
        # Exact teacher-forced answers are those that greedy generation writes, but for ties; a tenth of the time.
        number = lambda name: metrics[name] if metrics[name] is not None else 1.0  # noqa: E731
        return Trial(
            settings,
            metrics.reliability,
            metrics.reliability_exact,
            number("generality_exact"),
            number("locality"),
            seconds / len(edits),
            sum(losses) / max(1, len(losses)),
        )
    finally:
        editor.close()
