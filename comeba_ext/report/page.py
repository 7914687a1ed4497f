"""The page itself: figures as images within, tables that sort, examples that fold."""

from __future__ import annotations

import base64
import io
import json
from collections.abc import Sequence
from pathlib import Path

from comeba_ext import __version__
from comeba_ext.data import place_of
from comeba_ext.evaluation.comparing import AGE, LESS_IS_BETTER, best, differences, retention_over
from comeba_ext.evaluation.ways import WAYS
from comeba_ext.experiments.table import COLUMNS, MEGABYTES, by_column, number
from comeba_ext.report.results import EVALUATION, Results, examples, scores

TEMPLATE = Path(__file__).parent / "page.html"
PLAIN = ("hallucination", "fluency", "text_changed", "perplexity", "perplexity_before", "seconds_per_edit", "training_seconds", *MEGABYTES)


def build(found: Sequence[Results], title: str = "Knowledge editing: results") -> str:
    """The page as HTML.

    Args:
        found: experiments, in the order of the page.
    """
    import jinja2

    environment = jinja2.Environment(autoescape=True, undefined=jinja2.StrictUndefined, trim_blocks=True, lstrip_blocks=True)
    sections = [_section(results, dataset, f"s{n}-{m}") for n, results in enumerate(found) for m, dataset in enumerate(results.records)]
    page = environment.from_string(TEMPLATE.read_text(encoding="utf-8"))
    return page.render(title=title, sections=sections, ways=WAYS, place_of=place_of, version=__version__)


def _section(results: Results, dataset: str, anchor: str) -> dict:
    """What the page says of one data set of one experiment."""
    result, way, cases = results.result, results.way(dataset), results.cases(dataset)
    records = {case: rows for case, rows in results.records[dataset].items() if any(row["case"] == case for row in cases)}
    last = max((row["edits"] for row in cases), default=0)
    level = {row["case"] for row in cases if row["edits"] == last}  # one that failed on the way was asked after fewer edits
    compared = {case: rows for case, rows in records.items() if case in level}
    keys = [
        pair
        for pair in (*scores(way), ("hallucination", "hallucination"))
        if any(pair[0] in row for own in compared.values() for row in own)
    ]
    failed = {row["case"]: row["error"] for row in result["rows"] if row["dataset"] == dataset and "error" in row}
    aged = len(records) > 0 and result["protocol"] not in ("single_round", EVALUATION) and max(map(len, records.values())) >= 2 * AGE
    ages = (
        {case: retention_over(results.orders[dataset][case], f"reliability{way}") for case in records if case not in failed} if aged else {}
    )
    return {
        "anchor": anchor,
        "title": result["title"],
        "dataset": dataset,
        "protocol": result["protocol"].replace("_", " "),
        "note": result.get("note", ""),
        "used": result["records"][dataset]["used"],
        "skipped": result["records"][dataset]["skipped"],
        "edits": max((row["edits"] for row in cases), default=0),
        "way": way,
        "table": _table(cases, compared, way),
        "failed": failed,
        "figures": _figures(result, dataset, ages),
        "differences": [(name, -1 if key in LESS_IS_BETTER else 1, differences(compared, key)) for key, name in keys]
        if len(compared) > 1
        else [],
        "examples": {case: examples(rows, way) for case, rows in records.items()},
        "settings": {row["case"]: json.dumps(row.get("settings", {}), indent=1) for row in cases},
        "machine": ", ".join(f"{name} {value}" for name, value in {**result.get("machine", {}), **result.get("versions", {})}.items()),
        "command": result.get("command"),
    }


def _table(cases: list[dict], records: dict[str, list[dict]], way: str) -> dict:
    """``head`` and ``rows`` of cells: ``text``, ``sort`` (a number), ``interval``, ``top`` (no other case is ahead)."""
    named = dict(COLUMNS)
    ways = [way, *(other for other in ("_written", "") if other != way)]
    columns = [pair for own in ways for pair in scores(own)] + [(key, named[key]) for key in ("score", *PLAIN)]
    criteria = list(dict.fromkeys(name for row in cases for name in row.get("questions", ())))
    flat = [row | by_column(row.get("questions", {})) for row in cases]
    columns[4:4] = [(f"{name}_written", f"{name}, written") for name in criteria]
    columns = [(key, head) for key, head in columns if any(row.get(key) is not None for row in flat)]
    tops = {key: best(records, key) for key, _ in columns if any(row.get(key) is not None for rows in records.values() for row in rows)}
    several = len(cases) > 1
    rows = [
        {
            "case": row["case"],
            "edits": row["edits"],
            "cells": [_cell(row, key, several and row["case"] in tops.get(key, ())) for key, _ in columns],
        }
        for row in flat
    ]
    return {"head": [head for _, head in columns], "rows": rows}


def _cell(row: dict, key: str, top: bool) -> dict:
    value, interval = row.get(key), row.get(f"{key}_interval")
    if value is None:
        return {"text": "–", "sort": "", "interval": "", "top": False}
    text = f"{value / 1e6:.1f}" if key in MEGABYTES else number(value)
    if (spread := row.get(f"{key}_spread")) is not None:
        text += f" ± {spread:.3f}"
    return {"text": text, "sort": value, "interval": f"{interval[0]:.3f} – {interval[1]:.3f}" if interval else "", "top": top}


def _figures(result: dict, dataset: str, ages: dict[str, list[dict]]) -> list[dict]:
    """Images in the page's order, each with what it shows."""
    from comeba_ext.experiments import plots

    kinds = dict.fromkeys(kind for kind in ("bars", result.get("plot", "bars")) if kind in plots.KINDS_OF_PLOT)
    several = len({row["edits"] for row in result["rows"] if row["dataset"] == dataset and "error" not in row}) > 1
    if several:
        kinds["edits"] = None
    if any("peak_scores" in row for row in result["rows"] if row["dataset"] == dataset):
        kinds["scores"] = None
    said = {
        "bars": "Scores at the end",
        "settings": "Scores at the end, by setting",
        "edits": "Scores of all edits so far",
        "scores": "The highest score of every prompt, layer by layer",
    }
    forced = {"-forced": ", teacher-forced", "": ""}
    found = []
    for kind in kinds:
        for end, figure in plots.figures(result, kind, dataset).items():
            found.append({"title": said[kind] + forced[end], "image": _image(figure)})
    own = [row for row in result["rows"] if row["dataset"] == dataset and row["reliability"] is not None]
    if any("abilities" in row for row in own) or (several and any(row.get("perplexity") is not None for row in own)):
        found.append({"title": "What the model can do beside its edits", "image": _image(plots.abilities(own))})
    if ages:
        found.insert(1, {"title": "Retention: edits by their age, asked after the last one", "image": _image(plots.retention(ages))})
    return found


def _image(figure) -> str:
    """A figure as a data URL."""
    from matplotlib import pyplot as plt

    buffer = io.BytesIO()
    figure.savefig(buffer, format="png", dpi=100)
    plt.close(figure)
    return "data:image/png;base64," + base64.b64encode(buffer.getvalue()).decode()
