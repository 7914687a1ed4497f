"""Which tokens anchors let in: other wordings of a subject, other subjects' prompts, unseen text, by how thresholds are set.

    python bench/bench_anchors.py models/smollm2-135m-instruct --covariance smol.cov

One threshold for all keys, set on the corpus sample (as before); thresholds of each anchor's own, from its prompts and the
corpus sample; the same with decoys, the product's (:mod:`comeba_ext.editing.anchors`). Subjects and wordings are
CounterFact's training records, text is Wikipedia's validation articles; neither is reported on elsewhere. The covariance is
one of ``comeba covariance``; nothing is edited, so keys are those of the unedited model.
"""

from __future__ import annotations

import argparse
import itertools
from pathlib import Path

import torch
from common import DATA, counterfact, finish, target
from torch.nn import functional as F

from comeba_ext import EditConfig, Editor, EditRequest
from comeba_ext.covariance import Covariance
from comeba_ext.data import read_texts
from comeba_ext.editing import anchors
from comeba_ext.editing.keys import KeyReader
from comeba_ext.forward.partial import run_until
from comeba_ext.loading import load_model
from comeba_ext.text.encoding import encode, micro_batches, pad, pad_id
from comeba_ext.text.rows import prompt_rows

RATE = 1e-3  # of corpus tokens that one threshold for all lets in


def inputs_of(editor: Editor, texts: list[list[int]]) -> dict[str, list[torch.Tensor]]:
    """Every layer's inputs to whole texts, ``(tokens, rows)`` directions each."""
    found = {name: [None] * len(texts) for name in editor.layers}
    for group in micro_batches([len(ids) for ids in texts], 2048):
        ids, mask = pad([texts[n] for n in group], pad_id(editor.tokenizer))

        def keep(x, name, group=group, mask=mask):
            unit = editor.layers[name].score.directions(x.reshape(*mask.shape, -1))
            for row, n in enumerate(group):
                found[name][n] = unit[row, : int(mask[row].sum())]

        taps = {layer: lambda x, name=name, keep=keep: keep(x, name) for name, layer in editor.layers.items()}
        run_until(editor.session.decoder, list(editor.layers.values())[-1], {"input_ids": ids, "attention_mask": mask}, taps, before=True)
    return found


def reader_of(editor: Editor, requests: list[EditRequest]) -> KeyReader:
    """Of the requests' keys behind every context prefix, in every edited layer."""
    return KeyReader(
        editor.session.decoder,
        editor.session.blocks,
        editor.config.layers,
        list(editor.layers.values()),
        prompt_rows(editor.tokenizer, requests, editor.prefixes),
        whole=False,
        pad_token=editor.session.pad_token,
        max_tokens=2048,
        device=torch.device("cpu"),
        apart=True,
    )


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("model", help="folder or .gguf file")
    parser.add_argument("--covariance", type=Path, required=True)
    parser.add_argument("--subjects", type=int, default=200)
    parser.add_argument("--quick", action="store_true")
    parser.add_argument("--json", action="store_true")
    args = parser.parse_args()
    count = 40 if args.quick else args.subjects
    requests = [EditRequest.from_record(record) for record in counterfact("train", count)]
    model, tokenizer = load_model(args.model)
    editor = Editor(model, tokenizer, EditConfig.for_model(model, scope="nearest"))
    editor.set_covariance(Covariance.load(args.covariance))
    _kept, placed, declined = editor.method.recognition.placed(editor._named(requests))
    requests = [request for request in placed if request.fact_token == "subject_last"]
    subjects, decoys = editor.method.recognition.subjects(requests), editor.method.recognition.decoys(requests)
    reader = reader_of(editor, requests)
    wordings = [(n, p) for n, r in enumerate(requests) for p in r.rephrase_prompts if r.subject in p]
    others = [p for r in requests for p, _ in r.locality_prompts]
    texts = [
        tokenizer(text)["input_ids"][:256]
        for text in itertools.islice(read_texts(DATA / "text" / "wikipedia_val_500.csv"), 20 if args.quick else 60)
    ]
    asked = [encode(tokenizer, p).ids for _, p in wordings] + [encode(tokenizer, p).ids for p in others] + texts
    units = inputs_of(editor, asked)
    inside: dict[str, list] = {}
    for number, (name, layer) in enumerate(editor.layers.items()):
        background, each = editor.method.recognition.backgrounds[name], reader.read(number).each
        unit = layer.score.directions(each)
        told = anchors.tells(unit, background, subjects)
        mean = layer.score.directions((each * told[..., None]).sum(1))
        none = (torch.zeros(0, unit.shape[-1]), torch.zeros(0, dtype=torch.long))
        how = {
            "own, without decoys": anchors.anchors_of(unit, mean, background, subjects, none, 0.6, 0.6),
            "own, with decoys": anchors.anchors_of(unit, mean, background, subjects, decoys[name], 0.6, 0.6),
        }
        common = torch.quantile((background.unit @ mean.T).amax(-1), 1 - RATE)
        one = F.normalize(mean, dim=-1)
        how["one for all"] = anchors.Anchors(one, common.expand(len(one)), torch.arange(len(one)))
        for label, found in how.items():
            hits = [tokens @ found.unit.T >= found.thresholds for tokens in units[name]]
            first, rest = hits[: len(wordings)], hits[len(wordings) :]
            own = [bool(hit[:, found.owner == n].any()) for (n, _), hit in zip(wordings, first, strict=True)]
            inside.setdefault(label, []).append(
                (own, [bool(h.any()) for h in rest[: len(others)]], torch.cat([h.any(-1) for h in rest[len(others) :]]))
            )
    rows = []
    for label in ("one for all", "own, without decoys", "own, with decoys"):
        own, other, text = zip(*inside[label], strict=True)
        share = lambda values: torch.tensor(values, dtype=torch.float64).mean().item()  # noqa: E731
        rows.append(
            {
                "thresholds": label,
                "wordings in scope": share([share(v) for v in own]),
                "other subjects' prompts, any layer": share([any(v) for v in zip(*other, strict=True)]),
                "text tokens, per layer": share([v.double().mean().item() for v in text]),
                "text tokens, any layer": torch.stack(text).any(0).double().mean().item(),
            }
        )
    if not args.json:
        print(
            f"{len(requests)} subjects ({len(declined)} declined), {len(wordings)} other wordings, {len(others)} prompts of other "
            f"subjects, {sum(map(len, texts))} tokens of text, blocks {list(editor.config.layers)}"
        )
        for row in rows:
            print("  ".join(f"{key} {value if isinstance(value, str) else f'{value:.4f}'}" for key, value in row.items()))
    last = rows[-1]["text tokens, per layer"]
    finish(rows, [target("text tokens in scope of any key, per layer", last, 1e-3, last <= 1e-3)], args.json)


if __name__ == "__main__":
    main()
