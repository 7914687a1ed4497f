"""What saved edits change in text that names no edited subject: ``python bench/text_changed.py MODEL EDITS TEXTS [TEXTS …]``

10,000 tokens of every file, as the experiments' measure ``text`` reads them: the share of greedy next tokens that are others than the
unedited model's, perplexity with and without the edits, and the share of tokens in scope of any edit (scores that compare keys).
"""

from __future__ import annotations

import argparse
import json

import torch
from common import machine, versions

from comeba_ext import Editor
from comeba_ext.data import read_texts
from comeba_ext.experiments import measures
from comeba_ext.loading import load_model
from comeba_ext.ops.hooked_linear import in_scope


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("model")
    parser.add_argument("edits", help="folder of Editor.save_pretrained")
    parser.add_argument("texts", nargs="+")
    args = parser.parse_args()
    model, tokenizer = load_model(args.model)
    editor = Editor.from_pretrained(model, tokenizer, args.edits)
    requests = [entry.request for entry in editor.ledger.live()]
    for path in args.texts:
        seen = {"tokens": 0, "in_scope": 0}

        def count(layer, inputs, seen=seen):
            if layer.mode == "validated":
                scores = layer.scores(inputs[0])
                seen["tokens"] += scores.numel()
                seen["in_scope"] += int(in_scope(scores, layer.alpha, None, layer.delta.dtype).sum())

        handles = [layer.register_forward_pre_hook(count) for layer in editor.layers.values() if getattr(layer, "shards", None) is not None]
        with torch.no_grad():
            found = measures.make(("text",), list(read_texts(path)), True)(editor, requests)
        for handle in handles:
            handle.remove()
        print(json.dumps({"file": path.rpartition("/")[2], "edits": len(requests), **found, **seen, **machine(), **versions()}))


if __name__ == "__main__":
    main()
