"""A search as a picture: where the model keeps its answers, and what every trial did."""

from __future__ import annotations

from pathlib import Path

import matplotlib
from matplotlib.figure import Figure

from comeba_ext.tuning.search import Tuning, blocks

COLOURS = {"written": "tab:blue", "generality": "tab:orange", "locality": "tab:green"}


def draw(found: Tuning, file: str | Path) -> None:
    """Write a PNG."""
    with matplotlib.rc_context({"font.size": 9}):
        figure = Figure(figsize=(10, 3.6), layout="constrained")
        left, right = figure.subplots(1, 2, width_ratios=(1, 1.6))
        if found.patching:
            left.plot(range(len(found.patching)), found.patching, marker="o", markersize=3, color="tab:purple")
        for layer in found.best.get("layers", ()):
            left.axvspan(layer - 0.5, layer + 0.5, color="0.9", zorder=0)
        left.set(xlabel="block", ylabel="share of answers", ylim=(0, 1.03), title="decided by the subject's last token (grey: edited)")
        names = [_label(trial.settings) for trial in found.trials]
        for place, (name, colour) in enumerate(COLOURS.items()):
            at = [n + 0.27 * (place - 1) for n in range(len(names))]
            right.bar(at, [getattr(trial, name) for trial in found.trials], 0.25, color=colour, label=name)
        right.set_xticks(range(len(names)), names, rotation=60, ha="right")
        right.set(ylim=(0, 1.03))
        right.legend(loc="lower center", bbox_to_anchor=(0.5, 1.0), ncols=len(COLOURS), fontsize=8, frameon=False, title="trial edits")
        figure.savefig(file, dpi=130)


def _label(settings: dict) -> str:
    optimiser = settings.get("optimizer", "")
    rest = [optimiser + (f" {settings['lr']:g}" if optimiser == "adam" else "")] if optimiser else []
    rest += [f"ratio {settings['leverage_ratio']:g}"] if settings.get("leverage_ratio") else []
    return ", ".join([blocks(settings), *rest])
