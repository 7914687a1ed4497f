"""The README's picture, from results that are committed: ``python bench/plot_written.py OUT.png``.

One circle a method after 200 consecutive CounterFact edits of SmolLM2-135M-Instruct, as written (findings, R9 and R10).
"""

from __future__ import annotations

import argparse
import json
from pathlib import Path

import matplotlib

matplotlib.use("Agg")
from matplotlib import pyplot as plt

RESULTS = Path(__file__).parent / "results" / "experiments" / "smollm2"
# Files, and of each method what it is called here and where its name stands (points from the circle's middle).
METHODS = {
    "COMEBA-HK (nearest)": ("COMEBA-HK (nearest)", (-100, 20)),
    "GRACE": ("GRACE", (8, -12)),
    "SERAC": ("SERAC", (22, 2)),
    "ICE": ("ICE", (18, 2)),
    "IKE": ("IKE; inside it MEMOIR, MEMIT-seq", (24, 8)),
    "MEMOIR": ("", (0, 0)),
    "COMEBA-HK (z-score)": ("COMEBA-HK (z-score)", (18, -12)),
    "UltraEdit": ("UltraEdit", (11, -4)),
    "WISE": ("WISE", (8, 3)),
    "FT-L": ("FT-L", (8, 0)),
    "MEMIT-seq (COMEBA without hooks)": ("", (0, 0)),
    "AlphaEdit": ("AlphaEdit", (14, -12)),
}


def rows() -> dict[str, dict]:
    """The last row of every case of the files."""
    found = {}
    for name in ("written200_counterfact", "trained200_counterfact"):
        for row in json.loads((RESULTS / f"{name}.json").read_text(encoding="utf-8"))["rows"]:
            if row["edits"] == 200:
                found[row["case"]] = row
    return found


def draw(out: Path) -> None:
    figure, axis = plt.subplots(figsize=(8.4, 5.0), layout="constrained")
    for case, (label, offset) in METHODS.items():
        row = rows()[case]
        x, y, size = (row[f"{metric}_written"] for metric in ("locality", "reliability", "generality"))
        own = case == "COMEBA-HK (nearest)"
        axis.scatter(x, y, s=20 + 900 * size, color="#0072B2" if own else "#999999", alpha=0.75, edgecolor="black", linewidth=0.6, zorder=3)
        axis.annotate(label, (x, y), offset, textcoords="offset points", weight="bold" if own else "normal", zorder=4)
    axis.set(xlim=(-0.05, 1.1), ylim=(-0.08, 1.12), xlabel="locality: other subjects are answered as before")
    axis.set_ylabel("reliability: edited prompts get the new answer")
    what = "200 consecutive CounterFact edits of SmolLM2-135M-Instruct, as written"
    axis.set_title(f"{what}\narea: generality, other wordings get the new answer")
    axis.grid(color="#dddddd")
    axis.spines[["top", "right"]].set_visible(False)
    figure.savefig(out, dpi=130)


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("out", type=Path)
    draw(parser.parse_args().out)
