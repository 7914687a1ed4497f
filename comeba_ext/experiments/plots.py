"""Plots made for reading: every axis labelled, intervals drawn, cases told apart by colour and by marker."""

from __future__ import annotations

from functools import partial
from pathlib import Path

import matplotlib

matplotlib.use("Agg")

import numpy as np
from matplotlib import pyplot as plt
from matplotlib.ticker import MaxNLocator

# Okabe and Ito's colours, which stay apart under the common kinds of colour blindness.
COLOURS = ("#0072B2", "#D55E00", "#009E73", "#CC79A7", "#E69F00", "#56B4E9", "#000000", "#999999", "#F0E442")
MARKERS = ("o", "s", "^", "D", "v", "P", "X", "*", "<")
METRICS = ("reliability", "generality", "locality")
KINDS = {"edited": ("edited prompts", 0), "rephrased": ("rephrased prompts", 2), "other": ("other facts' prompts", 1)}


def draw(result: dict, kind: str, files: dict[str, Path]) -> list[str]:
    """Write a PNG file for every data set, of written answers where there are some, and then a second one, ``…-forced``, of
    teacher-forced ones; returns the names of those written: none where nothing was measured."""
    written = []
    for dataset, file in files.items():
        used = result["records"][dataset]["used"]
        for end, figure in figures(result, kind, dataset).items():
            path = file.with_stem(file.stem + end)
            intervals = "" if kind == "scores" else "; bars and bands: 95 % bootstrap intervals"
            figure.suptitle(f"{result['title']}\n{dataset}, {used} records{intervals}", fontsize=11)
            figure.savefig(path, dpi=130)
            plt.close(figure)
            written.append(path.name)
    return written


def figures(result: dict, kind: str, dataset: str) -> dict:
    """A data set's figures without titles, by the end of their file's name: of written answers where there are some, and of
    teacher-forced ones."""
    rows = [row for row in result["rows"] if row["dataset"] == dataset and row["reliability"] is not None]
    if not rows:
        return {}
    if kind == "scores":
        return {"": _scores(rows)} if any("peak_scores" in row for row in rows) else {}
    make = KINDS_OF_PLOT[kind]
    asked = [row for row in rows if row.get("reliability_written") is not None]
    found = {"": make(_scored(asked, "_written"), "share of answers right, as written")} if asked else {}
    return found | {"-forced" if asked else "": make(rows, "share of tokens right (teacher-forced)")}


def _scored(rows: list[dict], way: str) -> list[dict]:
    """Rows whose metrics, and whose questions by their names, are those scored in one way."""
    ends = ("", "_interval")
    questions = [{f"{name}{end}": own.get(way[1:] + end) for name, own in row.get("questions", {}).items() for end in ends} for row in rows]
    return [row | own | {f"{m}{end}": row.get(f"{m}{way}{end}") for m in METRICS for end in ends} for row, own in zip(rows, questions)]


def _last(rows: list[dict]) -> list[dict]:
    """Each case at its last checkpoint."""
    return list({row["case"]: row for row in rows}.values())


def _bars(rows: list[dict], label: str):
    """What was asked of any case: a group of bars for each, questions behind several edits (``questions``) too."""
    rows = _last(rows)
    asked = dict.fromkeys([*METRICS, *(name for row in rows for name in row.get("questions", {}))])
    groups = [name for name in asked if any(row.get(name) is not None for row in rows)]
    figure, axis = plt.subplots(figsize=(max(10, 2 * len(groups)), 5.2), layout="constrained")
    width = 0.84 / len(rows)
    for n, row in enumerate(rows):
        places = np.arange(len(groups)) + (n - (len(rows) - 1) / 2) * width
        values = [_value(row, m) for m in groups]
        bars = axis.bar(
            places,
            values,
            width * 0.92,
            yerr=_errors([row], groups),
            color=_colour(n),
            label=row["case"],
            error_kw={"lw": 1, "capsize": 2},
            hatch="//" if n >= len(COLOURS) else None,
        )
        high = [_interval(row, m)[1] for m in groups]
        for bar, value, top in zip(bars, values, high, strict=True):
            if np.isnan(value):
                continue
            axis.text(
                bar.get_x() + bar.get_width() / 2,
                top + 0.01,
                f"{value:.2f}",
                ha="center",
                va="bottom",
                fontsize=7,
                rotation=90 if len(rows) > 5 else 0,
            )
    axis.set_xticks(range(len(groups)), groups)
    _shares(axis, label, 1.1)
    columns = _legend_columns([row["case"] for row in rows])
    axis.legend(ncols=columns, fontsize=8, loc="upper center", bbox_to_anchor=(0.5, -0.06), frameon=False)
    return figure


def _edits(rows: list[dict], label: str):
    figure, axes = plt.subplots(1, 3, figsize=(12, 4.4), sharey=True, layout="constrained")
    for axis, metric in zip(axes, METRICS, strict=True):
        for n, case in enumerate(dict.fromkeys(row["case"] for row in rows)):
            own = [row for row in rows if row["case"] == case]
            x = [row["edits"] for row in own]
            axis.plot(x, [_value(row, metric) for row in own], label=case, **_style(n))
            low, high = zip(*(_interval(row, metric) for row in own), strict=True)
            axis.fill_between(x, low, high, color=_colour(n), alpha=0.18, lw=0)
        axis.set_xlabel("edits so far")
        axis.xaxis.set_major_locator(MaxNLocator(6, integer=True))
        axis.set_title(metric, fontsize=10)
        _shares(axis, label)
        axis.label_outer()
    handles, labels = axes[0].get_legend_handles_labels()
    figure.legend(handles, labels, ncols=_legend_columns(labels), loc="outside lower center", fontsize=9, frameon=False)
    return figure


def _settings(rows: list[dict], label: str):
    rows = _last(rows)
    figure, axis = plt.subplots(figsize=(8, 4.8), layout="constrained")
    x = np.arange(len(rows))
    for n, metric in enumerate(METRICS):
        axis.errorbar(
            x + (n - 1) * 0.06,
            [_value(row, metric) for row in rows],
            yerr=_errors(rows, [metric] * len(rows)),
            color=_colour(n),
            marker=_marker(n),
            label=metric,
            lw=1.4,
            ms=6,
            capsize=3,
        )
    axis.set_xticks(x, [row["case"] for row in rows])
    if max(len(row["case"]) for row in rows) > 12:
        plt.setp(axis.get_xticklabels(), rotation=20, ha="right")
    _shares(axis, label)
    axis.legend(fontsize=9, frameon=False)
    return figure


KINDS_OF_PLOT = {"bars": _bars, "edits": _edits, "settings": _settings}  # of scores


def retention(ages: dict[str, list[dict]]):
    """Reliability of every case's edits by when they were made (:func:`comeba_ext.evaluation.comparing.retention_over`); of those that
    have a score."""
    figure, axis = plt.subplots(figsize=(9, 4.4), layout="constrained")
    for n, (case, groups) in enumerate(ages.items()):
        if not groups:
            continue
        x = [(group["first"] + group["last"]) / 2 for group in groups]
        axis.plot(x, [group["value"] for group in groups], label=case, **_style(n))
        low, high = zip(*(group["interval"] for group in groups), strict=True)
        if len(ages) <= 5:
            axis.fill_between(x, low, high, color=_colour(n), alpha=0.12, lw=0)
    axis.set_xlabel("which edit (left the oldest)")
    axis.xaxis.set_major_locator(MaxNLocator(8, integer=True))
    _shares(axis, "reliability after the last edit")
    figure.legend(ncols=_legend_columns(list(ages)), loc="outside lower center", fontsize=9, frameon=False)
    return figure


def _ability(task: str, state: str, row: dict) -> float | None:
    return row.get("abilities", {}).get(task, {}).get(state)


def abilities(rows: list[dict]):
    """Perplexity of plain text and results of tasks over the edits so far, every case's beside the unedited model's."""
    panels: dict[str, tuple] = {}
    if any(row.get("perplexity") is not None for row in rows):
        panels["perplexity of plain text"] = (lambda row: row.get("perplexity"), lambda row: row.get("perplexity_before"))
    for task, own in {task: own for row in rows for task, own in row.get("abilities", {}).items()}.items():
        panels[f"{task} ({own['metric']})"] = (partial(_ability, task, "edited"), partial(_ability, task, "unedited"))
    figure, axes = plt.subplots(1, len(panels), figsize=(4.2 * len(panels) + 1, 4.2), squeeze=False, layout="constrained")
    cases = list(dict.fromkeys(row["case"] for row in rows))
    for axis, (title, (edited, unedited)) in zip(axes[0], panels.items(), strict=True):
        for n, case in enumerate(cases):
            points = [(row["edits"], edited(row)) for row in rows if row["case"] == case and edited(row) is not None]
            if points:
                axis.plot(*zip(*points), label=case, **_style(n))
        before = [value for row in rows if (value := unedited(row)) is not None]
        if before:
            axis.axhline(sum(before) / len(before), color="black", ls="--", lw=1)
        if title.startswith("perplexity"):
            axis.set_yscale("log")
        axis.set_title(f"{title}; dashed: unedited", fontsize=9)
        axis.set_xlabel("edits so far")
        axis.xaxis.set_major_locator(MaxNLocator(6, integer=True))
        axis.spines[["top", "right"]].set_visible(False)
    handles, labels = axes[0][0].get_legend_handles_labels()
    figure.legend(handles, labels, ncols=_legend_columns(labels), loc="outside lower center", fontsize=9, frameon=False)
    return figure


def _scores(rows: list[dict]):
    """Histograms of the highest score of every prompt, a row of panels a case, a column a layer that any case edits."""
    rows = [row for row in _last(rows) if "peak_scores" in row]
    layers = sorted({name for row in rows for name in row["peak_scores"]["edited"]}, key=_by_number)
    figure, axes = plt.subplots(
        len(rows), len(layers), figsize=(3.1 * len(layers) + 0.6, 2.9 * len(rows) + 1), squeeze=False, layout="constrained"
    )
    for line, row in zip(axes, rows, strict=True):
        positive = np.array([v for own in row["peak_scores"].values() for layer in own.values() for v in layer if v > 0 and np.isfinite(v)])
        wide = len(positive) > 0 and positive.max() > 1000 * positive.min() and positive.max() > 20  # spans orders of magnitude
        for axis, name in zip(line, layers, strict=True):
            if name not in row["peak_scores"]["edited"]:
                axis.set_visible(False)
                continue
            values = {kind: np.array(own[name]) for kind, own in row["peak_scores"].items()}
            everything = np.concatenate([v[np.isfinite(v)] for v in values.values()])
            if wide:
                low = max(everything[everything > 0].min(), everything.max() * 1e-6)
                bins = np.geomspace(low, everything.max() * 1.01, 40)
                axis.set_xscale("log")
            else:
                bins = np.linspace(everything.min(), everything.max() + 1e-9, 40)
            for kind, (label, colour) in KINDS.items():
                own = values[kind]
                weights = np.full(len(own), 1 / max(1, len(own)))
                axis.hist(
                    np.clip(own, bins[0], bins[-1]),
                    bins,
                    weights=weights,
                    histtype="step",
                    lw=1.6,
                    color=COLOURS[colour],
                    label=label,
                    ls={"edited": "-", "rephrased": "--", "other": ":"}[kind],
                )
            alpha = row["alpha"][name]
            if np.isfinite(alpha):
                axis.axvline(alpha, color="black", lw=1)
                axis.annotate(
                    f"α = {alpha:.2g}", (alpha, 0.97), xycoords=("data", "axes fraction"), rotation=90, va="top", ha="right", fontsize=7
                )
            axis.set_title(f"{row['case']}, block {_block(name)}", fontsize=8)
            axis.set_xlabel("highest score of the prompt's tokens" + (" (log)" if wide else ""), fontsize=8)
            axis.tick_params(labelsize=7)
        shown = [axis for axis in line if axis.get_visible()]
        shown[0].set_ylabel("share of prompts", fontsize=8)
    figure.legend(*shown[0].get_legend_handles_labels(), ncols=3, loc="outside lower center", fontsize=9, frameon=False)
    return figure


def _legend_columns(labels: list[str]) -> int:
    """At most four, and as many as fit side by side below a plot ten inches wide."""
    return max(1, min(4, len(labels), 130 // (max(map(len, labels)) + 8)))


def _errors(rows: list[dict], metrics) -> np.ndarray:
    """Distances to the interval's ends, ``(2, n)``; several metrics of one row, or one of several rows."""
    pairs = [(rows[0] if len(rows) == 1 else rows[i], m) for i, m in enumerate(metrics)]
    ends = [(_value(row, m), *_interval(row, m)) for row, m in pairs]
    return np.array([[max(0.0, value - low), max(0.0, high - value)] for value, low, high in ends]).T


def _value(row: dict, metric: str) -> float:
    """Not a number where there was nothing to ask."""
    return np.nan if row.get(metric) is None else row[metric]


def _interval(row: dict, metric: str) -> list[float]:
    return row.get(f"{metric}_interval") or [np.nan, np.nan]


def _shares(axis, label: str, top: float = 1.03) -> None:
    axis.set_ylim(-0.02, top)
    axis.set_ylabel(label)
    axis.grid(axis="y", lw=0.5, alpha=0.5)
    axis.set_axisbelow(True)
    axis.spines[["top", "right"]].set_visible(False)


def _by_number(name: str) -> list:
    return [(part.isdigit(), int(part) if part.isdigit() else part) for part in name.split(".")]


def _block(name: str) -> str:
    return next((part for part in name.split(".") if part.isdigit()), name)


def _colour(n: int) -> str:
    return COLOURS[n % len(COLOURS)]


def _style(n: int) -> dict:
    """Of a case's line; when the colours are used up they come again, broken."""
    return {"color": _colour(n), "marker": _marker(n), "ls": "-" if n < len(COLOURS) else "-.", "lw": 1.6, "ms": 5}


def _marker(n: int) -> str:
    return MARKERS[n % len(MARKERS)]
