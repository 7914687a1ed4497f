"""What a question floor takes off of other questions about edited subjects, and off of other wordings: one edited model, several floors.

    python bench/question_floors.py models/smollm2-135m-instruct other_relations.json --covariance smol.cov --count 50

COMEBA-HK with its defaults for the model, in batches of ten, asked at the end as written (``bench/experiments/other_relations.yaml``). The
records (of ``other_relations.py``) should be others than those that are reported on: this is how a floor is chosen.
"""

from __future__ import annotations

import argparse
from pathlib import Path

from common import finish

from comeba_ext import EditConfig, Editor, evaluate
from comeba_ext.data import read_requests
from comeba_ext.evaluation import Writing, predict_base
from comeba_ext.layers.edit_table import QUESTIONS
from comeba_ext.loading import load_model

SHOWN = {
    "reliability": "reliability_written",
    "generality": "generality_written",
    "others": "hallucination",
    "unedited": "locality_written",
}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("model", help="folder or name of a model")
    parser.add_argument("records", type=Path, help="records that other_relations.py wrote")
    parser.add_argument("--covariance", type=Path, required=True)
    parser.add_argument("--count", type=int, default=50)
    parser.add_argument("--floors", type=float, nargs="+", default=[0.0, 0.1, 0.15, 0.2, 0.3])
    parser.add_argument("--json", action="store_true")
    args = parser.parse_args()
    model, tokenizer = load_model(args.model)
    records = read_requests(args.records, args.count).requests
    editor = Editor(model, tokenizer, EditConfig.for_model(model, question_floor=0.0))
    editor.load_covariance(args.covariance)
    for _ in editor.edit_all(records, batch_size=10):
        pass
    how = {"generate": False, "writing": Writing(answer_tokens=24)}
    base = predict_base(model, tokenizer, records, **how)
    gate, rows = editor.method.attachments[QUESTIONS], []
    for floor in (None, *args.floors):
        gate.mode = "off" if floor is None else "on"
        gate.questions = gate.questions._replace(floor=floor)
        found = evaluate(model, tokenizer, records, base, **how)
        rows.append({"floor": floor, **{name: found[key] for name, key in SHOWN.items()}})
        if not args.json:
            print(f"floor {floor}:", ", ".join(f"{name} {rows[-1][name]:.3f}" for name in SHOWN), flush=True)
    finish(rows, [], args.json)


if __name__ == "__main__":
    main()
