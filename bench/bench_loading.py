"""How long saved edits take to come back: ``python bench/bench_loading.py MODEL EDITS [--rounds N] [--json]``

To use them (``load_edits``), to go on from them (``Editor.from_pretrained``), and what the next edit of a loaded editor takes beside one
after it: what is factorised when an edit first asks for it is in the difference. Medians over the rounds; the model is loaded once, and
what was edited stays. Without a folder of edits, one fact of the embedded model is edited first.
"""

from __future__ import annotations

import argparse
import statistics
import tempfile
import time

from common import finish

from comeba_ext import EditConfig, Editor, load_edits, testbed
from comeba_ext.layers.attachment import detach
from comeba_ext.loading import load_model
from comeba_ext.text.request import EditRequest

FACTS = (  # of subjects that no folder is likely to hold
    EditRequest("{} was born in the city of", "Wenceslas Hollar", "Lima"),
    EditRequest("{} was born in the city of", "Johann Gottlieb Goldberg", "Oslo"),
)


def clocked(what) -> tuple:
    """Seconds, and what came of it."""
    start = time.perf_counter()
    found = what()
    return time.perf_counter() - start, found


def timed(model, tokenizer, folder: str) -> dict:
    used, _ = clocked(lambda: load_edits(model, folder))
    detach(model)
    back, editor = clocked(lambda: Editor.from_pretrained(model, tokenizer, folder))
    first, following = (clocked(lambda own=fact: editor.edit([own]))[0] for fact in FACTS)
    editor.close()
    return {"load_edits": used, "editor": back, "first_edit": first, "next_edit": following}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("model", nargs="?", default="testbed")
    parser.add_argument("edits", nargs="?", help="folder of Editor.save_pretrained")
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--quick", action="store_true", help="one round")
    parser.add_argument("--json", action="store_true")
    args = parser.parse_args()
    if args.edits is None and args.model != "testbed":
        parser.error(f"EDITS is missing: a folder of edits of {args.model}")
    model, tokenizer = testbed.load() if args.model == "testbed" else load_model(args.model)
    with tempfile.TemporaryDirectory() as made:
        folder = args.edits or made
        if args.edits is None:
            editor = Editor(model, tokenizer, EditConfig.for_model(model))
            editor.set_covariance(testbed.covariance(model, tokenizer))
            editor.edit(testbed.facts()[:1])
            editor.save_pretrained(made)
            editor.close()
        rounds = [timed(model, tokenizer, folder) for _ in range(1 if args.quick else args.rounds)]
    row = {"model": args.model, "rounds": len(rounds), **{name: statistics.median(own[name] for own in rounds) for name in rounds[0]}}
    if not args.json:
        print(", ".join(f"{name} {value:.2f} s" for name, value in row.items() if isinstance(value, float)))
    finish([row], [], args.json)


if __name__ == "__main__":
    main()
