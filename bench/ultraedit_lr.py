"""Which share of the gradient UltraEdit and StableEdit should take on a model for which nobody has published one.

    python bench/ultraedit_lr.py models/smollm2-135m-instruct

The records of CounterFact's training file from the 700th on (from 0), in batches of ten, everything asked after the last:
teacher-forced, and as written. StableEdit is warmed up on the file's first records, so many that it whitens. The rate taken has the
highest mean of reliability, generality and locality, teacher-forced: UltraEdit's after twenty records (0.0003; after a hundred 0.0001 has
the higher mean, 0.362 to 0.324, and half of the reliability, 0.262 to 0.485), StableEdit's after a hundred, as the best after twenty
(0.003) leaves nothing of the model after two hundred.
"""

from __future__ import annotations

import argparse

from common import DATA, counterfact, finish

from comeba_ext import Editor, evaluate
from comeba_ext.evaluation import Writing, predict_base
from comeba_ext.loading import load_model
from comeba_ext.methods import default_config
from comeba_ext.text.request import as_requests

FIRST = 700  # record to edit
RATES = (1e-6, 1e-5, 3e-5, 1e-4, 3e-4, 1e-3, 3e-3, 1e-2, 1e-1)
FORCED = ("reliability", "generality", "locality")
WARM = {"warm_up_records": str(DATA / "counterfact" / "counterfact-train.json"), "warm_up_count": 600}


def warmed(method: str, model, tokenizer) -> tuple:
    """What a method knows before its first edit: a warm-up is the same for every rate."""
    editor = Editor(model, tokenizer, default_config(method, model, **(WARM if method == "StableEdit" else {})), method=method)
    editor.method.warm_up()
    state = editor.method.state()
    editor.close()
    return state


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("model", help="folder or name of a model")
    parser.add_argument("--methods", nargs="+", default=["UltraEdit", "StableEdit"])
    parser.add_argument("--records", type=int, default=100)
    parser.add_argument("--rates", type=float, nargs="+", default=RATES)
    parser.add_argument("--quick", action="store_true", help="two records, one rate, no warm-up")
    parser.add_argument("--json", action="store_true")
    args = parser.parse_args()
    count = 2 if args.quick else args.records
    requests = as_requests(counterfact("train", FIRST + count)[FIRST:])
    model, tokenizer = load_model(args.model)
    how = {"generate": False, "writing": Writing(answer_tokens=12)}
    base = predict_base(model, tokenizer, requests, **how)
    rows = []
    for method in args.methods[: 1 if args.quick else None]:
        state = warmed(method, model, tokenizer)
        for rate in args.rates[: 1 if args.quick else None]:
            editor = Editor(model, tokenizer, default_config(method, model, lr=rate), method=method)
            editor.method.load_state(*state)
            for _ in editor.edit_all(requests, batch_size=10, progress=False):
                pass
            found = evaluate(model, tokenizer, requests, base, **how)
            scores = {name: found[name] for name in FORCED} | {f"{name}_written": found[f"{name}_written"] for name in FORCED}
            rows.append({"method": method, "lr": rate, "records": count, "layers": len(editor.layers), **scores})
            editor.close()
            if not args.json:
                print(f"{method} lr {rate:g}:", ", ".join(f"{name} {value:.3f}" for name, value in scores.items()), flush=True)
    finish(rows, [], args.json)


if __name__ == "__main__":
    main()
