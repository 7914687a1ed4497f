"""Running an experiment: every case on every data set, into JSON, a Markdown table and plots; resumable."""

from __future__ import annotations

import dataclasses
import json
import logging
import re
from dataclasses import dataclass, field
from pathlib import Path

import torch

from comeba_ext import methods
from comeba_ext.covariance import Covariance
from comeba_ext.editing.config import EditConfig
from comeba_ext.editing.editor import Editor
from comeba_ext.editing.request import EditRequest
from comeba_ext.errors import ComebaError, RequestError
from comeba_ext.evaluation import Protocol, predict_base, run_protocol
from comeba_ext.evaluation.metrics import METRICS
from comeba_ext.evaluation.queries import check_context, record_queries
from comeba_ext.experiments import measures, table
from comeba_ext.experiments.definition import Case, Experiment
from comeba_ext.storage import write_text

log = logging.getLogger(__name__)


@dataclass(frozen=True)
class Dataset:
    """Records to edit, under a name."""

    name: str
    requests: list[EditRequest]
    read: int = 0
    skipped: list[dict] = field(default_factory=list)


def run(
    experiment: Experiment,
    model: torch.nn.Module,
    tokenizer,
    datasets: list[Dataset],
    out: str | Path,
    *,
    covariance: Covariance | None = None,
    texts=None,
    plain_texts: list[str] = (),
    samples: int | None = None,
    seed: int = 0,
    progress: bool = False,
) -> dict:
    """Run every case on every data set.

    Args:
        model: unedited; given back as it came.
        out: folder for ``<name>.json``, ``<name>.md``, the plots, and a folder a case with its log. A run that was
            interrupted goes on there.
        covariance: of all layers that are edited; or
        texts: corpus to collect it from (kept in ``out``).
        plain_texts: for the measure ``text``.
        samples: records a data set, default the experiment's.

    Returns:
        JSON-serialisable: ``experiment``, ``title``, ``protocol``, ``samples``, ``rows`` (``dataset``, ``method``,
        ``case``, ``edits``, every metric with its interval, efficiency, what was measured beside), ``records`` by data
        set, ``plots`` (file names).

    Raises:
        ComebaError: no usable record, no covariance, or ``out`` holds another run.
    """
    out = Path(out)
    out.mkdir(parents=True, exist_ok=True)
    samples = samples or experiment.samples
    configs = {case.label: case.config(model) for case in experiment.cases}
    needing = [c for case, c in zip(experiment.cases, configs.values()) if methods.get(case.method).needs_covariance]
    if needing and covariance is None:
        covariance = _collect(model, tokenizer, texts, needing, out / "covariance.safetensors", progress)
    rows, records = [], {}
    for dataset in datasets:
        used, skipped = _usable(model, tokenizer, dataset, samples)
        records[dataset.name] = {"read": max(dataset.read, len(dataset.requests)), "used": len(used), "skipped": skipped}
        base = predict_base(model, tokenizer, used, generate=experiment.generate)
        for case in experiment.cases:
            protocol = _protocol(experiment, case, len(used), seed)
            method = methods.get(case.method)
            result = run_protocol(
                model, tokenizer, used, protocol, out / _slug(dataset.name) / _slug(case.label), method=method,
                config=configs[case.label], covariance=covariance if method.needs_covariance else None, base=base,
                measure=measures.make(experiment.measures, list(plain_texts)), progress=progress,
            )  # fmt: skip
            efficiency = result.efficiency()
            for edits, metrics in sorted(result.checkpoints.items()):
                rows.append(
                    {"dataset": dataset.name, "method": case.method, "case": case.label, "edits": edits,
                     "batch_size": protocol.batch_size, **_plain(metrics), **efficiency, **result.extra.get(edits, {}),
                     "settings": configs[case.label].to_dict()}
                )  # fmt: skip
            log.info("%s, %s: reliability %.3f", dataset.name, case.label, rows[-1]["reliability"])
    result = {
        "experiment": experiment.name, "title": experiment.title, "paper": experiment.paper, "note": experiment.note,
        "protocol": experiment.protocol, "samples": samples, "rows": rows, "records": records,
        "expected": list(experiment.expected),
    }  # fmt: skip
    result["plots"] = _plots(result, experiment, out)
    write_text(out / f"{experiment.name}.json", json.dumps(result, indent=1) + "\n")
    write_text(out / f"{experiment.name}.md", table.markdown(result))
    return result


def _usable(model, tokenizer, dataset: Dataset, samples: int) -> tuple[list[EditRequest], list[dict]]:
    """The first ``samples`` records that can be edited and asked, and why those passed over cannot."""
    editor = Editor(model, tokenizer)
    try:
        return _checked(editor, dataset, samples)
    finally:
        editor.close()


def _checked(editor: Editor, dataset: Dataset, samples: int) -> tuple[list[EditRequest], list[dict]]:
    model, tokenizer = editor.model, editor.tokenizer
    used, skipped, ids = [], list(dataset.skipped), {}
    for position, request in enumerate(dataset.requests):
        if len(used) == samples:
            break
        try:
            queries = record_queries(tokenizer, request, position)
            check_context(model, [q for own in queries.values() for q in own], position, request)
            editor.check([dataclasses.replace(request, request_id=None)])  # with the prefixes that editing puts before it
            if request.request_id is not None and ids.setdefault(request.request_id, request.fact) != request.fact:
                raise RequestError(f"record {position}: request_id {request.request_id!r} is used by another record")
            used.append(request)
        except ComebaError as error:
            skipped.append({"index": position, "reason": str(error)})
    if not used:
        raise ComebaError(f"{dataset.name}: no record can be used; {skipped[0]['reason'] if skipped else 'it is empty'}")
    return used, skipped


def _protocol(experiment: Experiment, case: Case, count: int, seed: int) -> Protocol:
    size = min(case.settings.get("batch_size", experiment.batch_size), count)
    stops = {max(1, round(count * (n + 1) / experiment.evaluations)) for n in range(experiment.evaluations)}
    return Protocol(experiment.protocol, size, tuple(sorted(stops)), generate=experiment.generate, seed=seed)


def _collect(model, tokenizer, texts, configs: list[EditConfig], path: Path, progress: bool) -> Covariance:
    """The covariance of every layer that any case edits, from one corpus pass."""
    if texts is None and not path.exists():
        raise ComebaError("no covariance and no texts to collect it from")
    layers = sorted({layer for config in configs for layer in config.layers})
    editor = Editor(model, tokenizer, EditConfig.for_model(model, layers=layers))
    try:
        editor.collect_covariance(texts or [], path=path, progress=progress)
    finally:
        editor.close()
    return editor.covariance


def _plain(metrics) -> dict:
    names = [f"{name}{suffix}" for name in METRICS for suffix in ("", "_exact", "_generation")]
    found = {key: metrics[key] for name in names for key in (name, f"{name}_interval") if metrics[name] is not None}
    return {"records": metrics.records, **found}


def _slug(text: str) -> str:
    """A folder's name: letters, digits, dots and dashes, other signs spelled by their code."""
    return re.sub(r"[^\w.=-]+", "-", text).strip("-") or "case"


def _plots(result: dict, experiment: Experiment, out: Path) -> list[str]:
    from comeba_ext.experiments import plots  # matplotlib takes a second to import

    return plots.draw(result, experiment.plot, out)
