"""Which value of one setting a method should take on a model for which nobody has published one.

    python bench/one_setting.py models/smollm2-135m-instruct UltraEdit lr 3e-5 1e-4 3e-4 1e-3
    python bench/one_setting.py models/smollm2-135m-instruct MEMIT-seq lam 1e3 1e4 1e5 --covariance smollm2.safetensors
    python bench/one_setting.py models/smollm2-135m-instruct AlphaEdit ridge 10 100 --with clamp=0.75 --covariance smollm2.safetensors
    python bench/one_setting.py models/smollm2-135m-instruct COMEBA-HK clamp 0.75 4 --with scope=zscore --covariance smollm2.safetensors

The records of CounterFact's training file from the 700th on (from 0), in batches of ten, everything asked after the last:
teacher-forced, and as written. The value taken has the highest mean of reliability, generality and locality, teacher-forced. StableEdit is
warmed up on the file's first records, so many that it whitens.

UltraEdit's and StableEdit's rates were chosen so (``comeba_ext/methods/defaults``): UltraEdit's after twenty records (0.0003; after a
hundred 0.0001 has the higher mean, 0.362 to 0.324, and half of the reliability, 0.262 to 0.485), StableEdit's after a hundred, as the best
after twenty (0.003) leaves nothing of the model after two hundred.
"""

from __future__ import annotations

import argparse

from common import DATA, counterfact, finish

from comeba_ext import Editor, evaluate
from comeba_ext.covariance import Covariance
from comeba_ext.evaluation import Writing, predict_base
from comeba_ext.loading import load_model
from comeba_ext.methods import default_config
from comeba_ext.text.request import as_requests

FIRST = 700  # record to edit
FORCED = ("reliability", "generality", "locality")
WARM = {"warm_up_records": str(DATA / "counterfact" / "counterfact-train.json"), "warm_up_count": 600}


def value(text: str) -> int | float | str:
    """A whole number, a number, or a word."""
    for kind in (int, float):
        try:
            return kind(text)
        except ValueError:
            pass
    return text


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("model", help="folder or name of a model")
    parser.add_argument("method")
    parser.add_argument("setting", help="as in the method's configuration")
    parser.add_argument("values", nargs="+", type=value)
    parser.add_argument("--with", dest="others", action="append", default=[], metavar="SETTING=VALUE", help="the same for all values")
    parser.add_argument("--records", type=int, default=100)
    parser.add_argument("--covariance", help="of comeba covariance, where the method needs one")
    parser.add_argument("--quick", action="store_true", help="two records, the first value, no warm-up")
    parser.add_argument("--json", action="store_true")
    args = parser.parse_args()
    count = 2 if args.quick else args.records
    requests = as_requests(counterfact("train", FIRST + count)[FIRST:])
    model, tokenizer = load_model(args.model)
    covariance = None if args.covariance is None else Covariance.load(args.covariance)
    how = {"generate": False, "writing": Writing(answer_tokens=12)}
    base = predict_base(model, tokenizer, requests, **how)
    others = {name: value(own) for name, _, own in (text.partition("=") for text in args.others)}
    warm = WARM if args.method == "StableEdit" and not args.quick else {}
    known, rows = None, []
    for own in args.values[: 1 if args.quick else None]:
        chosen = others | {args.setting: own}
        editor = Editor(model, tokenizer, default_config(args.method, model, **warm | chosen), method=args.method)
        if warm and known is None:  # the same for every value
            editor.method.warm_up()
            known = editor.method.state()
        elif warm:
            editor.method.load_state(*known)
        if covariance is not None:
            editor.set_covariance(covariance)
        for _ in editor.edit_all(requests, batch_size=10, progress=False):
            pass
        found = evaluate(model, tokenizer, requests, base, **how)
        scores = {name: found[name] for name in FORCED} | {f"{name}_written": found[f"{name}_written"] for name in FORCED}
        rows.append({"method": args.method, **chosen, "records": count, "layers": len(editor.layers), **scores})
        editor.close()
        if not args.json:
            named = " ".join(f"{name} {setting}" for name, setting in chosen.items())
            print(f"{args.method} {named}:", ", ".join(f"{k} {v:.3f}" for k, v in scores.items()), flush=True)
    finish(rows, [], args.json)


if __name__ == "__main__":
    main()
