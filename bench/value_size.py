"""What the size of target values buys, and what it costs where an edit is met by text that does not ask for it.

    python bench/value_size.py models/smollm2-135m-instruct --covariance smol.cov

Records of CounterFact's training file, edited in batches of ten with bounds on ‖δ‖/‖h‖. Reliability, generality and locality as
always; and, for what one false alarm costs, the share of next tokens that change in unrelated text (Wikipedia's training articles)
which follows the bare subject, where every edit is in scope.
"""

from __future__ import annotations

import argparse
import itertools
from pathlib import Path

import torch
from common import DATA, counterfact, finish, target

from comeba_ext import EditConfig, Editor, EditRequest, evaluate
from comeba_ext.covariance import Covariance
from comeba_ext.data import read_texts
from comeba_ext.editing import optimisers
from comeba_ext.loading import load_model

LENGTH = 80  # tokens, subject and text


@torch.no_grad()
def changed_behind(editor: Editor, requests: list[EditRequest], texts: list[str]) -> float:
    """Mean share of next tokens that the edits change behind the subject."""
    shares = []
    for request, text in zip(requests, texts, strict=True):
        begin = len(editor.tokenizer(request.subject)["input_ids"])
        ids = torch.tensor([editor.tokenizer(f"{request.subject} {text}")["input_ids"][:LENGTH]])
        edited = editor.model(ids).logits[0, begin:].argmax(-1)
        with editor.disabled():
            before = editor.model(ids).logits[0, begin:].argmax(-1)
        shares.append((edited != before).double().mean().item())
    return sum(shares) / len(shares)


def middle(text: str) -> str:
    """300 characters from the first sentence that begins behind character 150."""
    start = text.find(". ", 150) + 2
    return text[start : start + 300]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("model", help="folder or .gguf file")
    parser.add_argument("--covariance", type=Path, required=True)
    parser.add_argument("--records", type=int, default=40)
    parser.add_argument("--bounds", type=float, nargs="+", default=[4.0, 2.0])
    parser.add_argument("--quick", action="store_true")
    parser.add_argument("--json", action="store_true")
    args = parser.parse_args()
    count = 4 if args.quick else args.records
    requests = [EditRequest.from_record(record) for record in counterfact("train", count)]
    texts = [middle(text) for text in itertools.islice(read_texts(DATA / "text" / "wikipedia_train_1000.csv"), count)]
    model, tokenizer = load_model(args.model)
    rows = []
    for bound in args.bounds:
        sizes: list[float] = []

        def measured(path, run=optimisers.polyak, sizes=sizes):
            run(path)
            sizes += (path.delta.norm(dim=-1) / path.objective.h.norm(dim=-1)).tolist()

        optimisers.OPTIMISERS["polyak"] = measured
        editor = Editor(model, tokenizer, EditConfig.for_model(model, clamp=bound))
        editor.set_covariance(Covariance.load(args.covariance))
        for _ in editor.edit_all(requests, batch_size=10, progress=not args.json):
            pass
        found = evaluate(model, tokenizer, requests)
        rows.append(
            {
                "bound": bound,
                "mean ‖δ‖/‖h‖": sum(sizes) / len(sizes),
                **{name: found[name] for name in ("reliability", "generality", "locality")},
                "changed behind a subject": changed_behind(editor, requests, texts),
            }
        )
        editor.close()
        if not args.json:
            print("  ".join(f"{key} {value:.3f}" for key, value in rows[-1].items()))
    lowest = min(row["reliability"] for row in rows)
    finish(rows, [target("reliability at every bound", lowest, 0.95, lowest >= 0.95)], args.json)


if __name__ == "__main__":
    main()
