"""The paper's score against the reference score, the sketched gate against the exact one:
``python bench/bench_scope.py [--quick] [--json]``

The same 200 consecutive edits (batches of 10) of the embedded model, everything else equal, on facts that the demo does
not use. Beside the metrics: the share of next-token predictions on unrelated text that changed, and for the sketched
gate the share of scope decisions (every layer, every token of the edited, rephrased, other and unrelated prompts) on
which it agrees with the exact gate, and of those in scope by the exact gate that are in scope by the sketch too.
"""

from __future__ import annotations

import argparse
import itertools

import torch
from common import finish, target

from comeba_ext import EditConfig, Editor, evaluate, testbed
from comeba_ext.evaluation import predict_base
from comeba_ext.testbed.diagnose import single_edits


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
    parser.add_argument("--quick", action="store_true", help="60 edits")
    parser.add_argument("--json", action="store_true")
    args = parser.parse_args()
    model, tokenizer = testbed.load()
    edits = 60 if args.quick else 200
    requests = testbed.facts()[600 : 600 + edits]
    edited = {r.subject for r in requests}
    stream = testbed.texts(seed=9)
    texts = [t for t in itertools.islice(stream, 600) if not any(s in t for s in edited)][:200]
    prompts = texts + [p for r in requests for p in (r.text, *r.rephrase_prompts, *(q for q, _ in r.locality_prompts))]
    rows, exact = [], {}
    settings = [("zscore", 1.0), ("reference", 1.0), ("reference", 0.25)]
    for scope, margin, gate in [(*s, "exact") for s in settings] + [(*s, "sketch") for s in settings[::2]]:
        config = EditConfig.for_model(model, scope=scope, alpha_margin=margin, gate=gate)
        alone = single_edits(model, tokenizer, 10 if args.quick else 20, 1000, config)
        editor = Editor(model, tokenizer, config)
        editor.collect_covariance(testbed.texts(), progress=False)
        base = predict_base(model, tokenizer, requests, generate=False)
        before = predictions(model, tokenizer, texts)
        for _ in editor.edit_all(requests, 10, progress=not args.json):
            pass
        scores = evaluate(model, tokenizer, requests, base, generate=False)
        changed = (predictions(model, tokenizer, texts) != before).float().mean().item()
        decided = decisions(model, tokenizer, editor.layers, prompts)
        reference = exact.setdefault((scope, margin), decided)
        agreement = {"scope_agreement": (decided == reference).float().mean().item(),
                     "share_of_exact_scope": decided[reference].float().mean().item()}  # fmt: skip
        editor.close()
        names = ("reliability", "generality", "locality")
        rows.append({"scope": scope, "alpha_margin": margin, "gate": gate, "edits": edits, "text_changed": changed,
                     **agreement, **alone,
                     **{n: scores[n] for n in names}, **{f"{n}_interval": scores[f"{n}_interval"] for n in names}})  # fmt: skip
        if not args.json:
            print(scope, margin, gate, *(f"{n} {scores[n]:.3f}" for n in names), f"text changed {changed:.4f}",
                  *(f"{n} {v:.4f}" for n, v in {**agreement, **alone}.items()), flush=True)  # fmt: skip
    best, sketched = rows[2], rows[-1]
    finish(rows, [target(f"{n}, reference with margin, {row['gate']} gate", row[n], limit, row[n] >= limit)
                  for row in (best, sketched)
                  for n, limit in (("reliability", 0.95), ("generality", 0.80), ("locality", 0.95))], args.json)  # fmt: skip


if __name__ == "__main__":
    main()
