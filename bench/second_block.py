"""Whether a shallower block tells false alarms of ``nearest`` from other wordings: ``python bench/second_block.py MODEL --covariance FILE``

What is in scope at the value layer (training subjects' other wordings, other subjects' wordings, validation text), and how close those
tokens come, at shallower blocks, to the keys of the very subject they were taken for. The covariance must hold all of these blocks;
nothing is edited. On SmolLM2: docs/findings.md, "What unrelated text still meets".
"""

from __future__ import annotations

import argparse
import itertools
from pathlib import Path

import torch
from bench_anchors import inputs_of, reader_of
from common import DATA, counterfact, finish

from comeba_ext import EditConfig, Editor, EditRequest
from comeba_ext.covariance import Covariance
from comeba_ext.data import read_texts
from comeba_ext.editing import anchors
from comeba_ext.loading import load_model
from comeba_ext.text.encoding import encode


@torch.no_grad()
def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("model", help="folder or .gguf file")
    parser.add_argument("--covariance", type=Path, required=True)
    parser.add_argument("--blocks", type=int, nargs="+", default=[1, 2, 3, 4, 6, 8], help="in increasing order, the value layer last")
    parser.add_argument("--subjects", type=int, default=400)
    parser.add_argument("--texts", type=int, default=110)
    parser.add_argument("--json", action="store_true")
    args = parser.parse_args()
    model, tokenizer = load_model(args.model)
    editor = Editor(model, tokenizer, EditConfig.for_model(model, scope="nearest", layers=tuple(args.blocks)))
    editor.set_covariance(Covariance.load(args.covariance))
    recognition = editor.method.recognition
    _, placed, _ = recognition.placed(editor._named([EditRequest.from_record(r) for r in counterfact("train", args.subjects)]))
    requests = [request for request in placed if request.fact_token == "subject_last"]
    reader = reader_of(editor, requests)
    wordings = [(n, p) for n, r in enumerate(requests) for p in r.rephrase_prompts if r.subject in p]
    names = {request.subject for request in requests}
    texts = itertools.islice(read_texts(DATA / "text" / "wikipedia_val_500.csv"), args.texts)
    texts = [tokenizer(text)["input_ids"][:256] for text in texts if not any(name in text for name in names)]
    units = inputs_of(editor, [encode(tokenizer, p).ids for _, p in wordings] + texts)
    subjects, decoys, keys = recognition.subjects(requests), recognition.decoys(requests), {}
    for number, (name, layer) in enumerate(editor.layers.items()):
        each, background = reader.read(number).each, recognition.backgrounds[name]
        unit = layer.score.directions(each)
        mean = layer.score.directions((each * anchors.tells(unit, background, subjects)[..., None]).sum(1))
        keys[name] = torch.cat([unit, mean[:, None]], 1)
        found = anchors.anchors_of(unit, mean, background, subjects, decoys[name], editor.config.alpha_floor, editor.config.margin)
    inside = set()  # what is in scope at the value layer: kind, request it was taken for, row, token
    for row, tokens in enumerate(units[name]):
        for token, anchor in (tokens @ found.unit.T >= found.thresholds).nonzero().tolist():
            request = found.owner[anchor].item()
            kind = "text" if row >= len(wordings) else "own wording" if wordings[row][0] == request else "another's wording"
            inside.add((kind, request, row, token))
    rows = []
    for block, (name, own) in zip(args.blocks, keys.items(), strict=True):
        for kind in ("own wording", "another's wording", "text"):
            near = torch.tensor([(own[r] @ units[name][row][t]).max().item() for k, r, row, t in sorted(inside) if k == kind])
            if not len(near):
                continue
            quantiles = {f"q{q:02d}": round(near.quantile(q / 100).item(), 3) for q in (1, 5, 50, 95)}
            rows.append({"block": block, "kind": kind, "tokens": len(near), **quantiles, "highest": round(near.max().item(), 3)})
            if not args.json:
                print(rows[-1], flush=True)
    finish(rows, [], args.json)


if __name__ == "__main__":
    main()
