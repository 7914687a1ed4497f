"""The paper's score against the reference score, the sketched gate against the exact one:
``python bench/bench_scope.py [--records NAME=FILE ...] [--quick] [--json]``

The same 200 consecutive edits (batches of 10) of the embedded model, everything else equal, on facts that the demo does
not use, and on records that are given (100 of each; the embedded model does not know their subjects). Beside the metrics:
the share of next-token predictions on unrelated text that changed, and for the sketched gate the share of scope decisions
(every layer, every token of the edited, rephrased, other and unrelated prompts) on which it agrees with the exact gate,
and of the tokens in scope by the exact gate those that are in scope by the sketch too.
"""

from __future__ import annotations

import argparse
import itertools

import torch
from common import finish, target

from comeba_ext import EditConfig, Editor, evaluate, testbed
from comeba_ext.data import read_requests
from comeba_ext.evaluation import predict_base
from comeba_ext.testbed.diagnose import single_edits

METRICS = ("reliability", "generality", "locality")


@torch.no_grad()
def predictions(model, tokenizer, texts: list[str]) -> torch.Tensor:
    return torch.cat([model(**tokenizer(t, return_tensors="pt")).logits[0].argmax(-1) for t in texts])


@torch.no_grad()
def decisions(model, tokenizer, layers: dict, texts: list[str]) -> torch.Tensor:
    """Whether a token's output was edited, for every text, layer and token, in one flat bool tensor."""
    found = []

    def note(layer, inputs, output):
        found.append((output != layer.base_layer(inputs[0])).any(-1).flatten())

    handles = [layer.register_forward_hook(note) for layer in layers.values()]
    for text in texts:
        model(**tokenizer(text, return_tensors="pt"))
    for handle in handles:
        handle.remove()
    return torch.cat(found)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--records", metavar="NAME=FILE", action="append", default=[], help="ZsRE, CounterFact, …")
    parser.add_argument("--quick", action="store_true", help="60 edits, 30 records")
    parser.add_argument("--json", action="store_true")
    args = parser.parse_args()
    model, tokenizer = testbed.load()
    edits = 60 if args.quick else 200
    sets = {"embedded model's facts": testbed.facts()[600 : 600 + edits]}
    for name, _, path in (given.partition("=") for given in args.records):
        sets[name] = read_requests(path, 30 if args.quick else 100).requests
    settings = [
        ("zscore", 1.0, "exact"),
        ("zscore", 1.0, "sketch"),
        ("reference", 1.0, "exact"),
        ("reference", 0.25, "exact"),
        ("reference", 0.25, "sketch"),
    ]
    rows = []
    for dataset, requests in sets.items():
        own = dataset == next(iter(sets))
        edited = {r.subject for r in requests}
        unrelated = (t for t in itertools.islice(testbed.texts(seed=9), 600) if not any(s in t for s in edited))
        texts = list(itertools.islice(unrelated, 200))
        prompts = texts + [p for r in requests for p in (r.text, *r.rephrase_prompts, *(q for q, _ in r.locality_prompts))]
        exact = {}
        for scope, margin, gate in settings if own else [s for s in settings if s[:2] != ("reference", 1.0)]:
            config = EditConfig.for_model(model, scope=scope, alpha_margin=margin, gate=gate)
            row = {"dataset": dataset, "scope": scope, "alpha_margin": margin, "gate": gate, "edits": len(requests)}
            if own:
                row |= single_edits(model, tokenizer, 10 if args.quick else 20, 1000, config)
            editor = Editor(model, tokenizer, config)
            editor.collect_covariance(testbed.texts(), progress=False)
            base = predict_base(model, tokenizer, requests, generate=False)
            before = predictions(model, tokenizer, texts)
            for _ in editor.edit_all(requests, 10, progress=not args.json):
                pass
            scores = evaluate(model, tokenizer, requests, base, generate=False)
            decided = decisions(model, tokenizer, editor.layers, prompts)
            reference = exact.setdefault((scope, margin), decided)
            row |= {name: scores[name] for name in METRICS}
            row |= {f"{name}_interval": scores[f"{name}_interval"] for name in METRICS}
            row["text_changed"] = (predictions(model, tokenizer, texts) != before).float().mean().item()
            row["scope_agreement"] = (decided == reference).float().mean().item()
            row["share_of_exact_scope"] = decided[reference].float().mean().item()
            editor.close()
            rows.append(row)
            if not args.json:
                print("  ".join(f"{k} {v:.4f}" if isinstance(v, float) else f"{k} {v}" for k, v in row.items()), flush=True)
    targets = []
    for row in rows:
        if (row["dataset"], row["scope"], row["alpha_margin"]) == (next(iter(sets)), "reference", 0.25):
            targets += [
                target(f"{name}, reference with margin, {row['gate']} gate", row[name], limit, row[name] >= limit)
                for name, limit in zip(METRICS, (0.95, 0.80, 0.95))
            ]
    finish(rows, targets, args.json)


if __name__ == "__main__":
    main()
