"""Which tokens are in scope of an edit that is of their subject, and which that is of another: by how thresholds are set.

    python bench/anchors.py models/smollm2-135m-instruct --covariance smol.cov

Three rules: one threshold for all keys, set on the corpus sample; each anchor's own, as before names were read (the nearest of corpus and
decoys, as far as the subject's own prompts let it); the product's (:mod:`comeba_ext.editing.anchors`), near enough where the text names
the subject, else nearer than any look-alike. And whether the first look, at 96 of 256 directions, which keys of subjects that are not
named must pass (:mod:`comeba_ext.ops.subject_hook`), decides as all directions do. Subjects and wordings are CounterFact's training
records, text is Wikipedia's validation articles; neither is reported on elsewhere. The covariance is one of ``comeba covariance``;
nothing is edited, so keys are those of the unedited model, at the value layer.
"""

from __future__ import annotations

import argparse
import itertools
from pathlib import Path

import torch
from common import DATA, counterfact, finish, target

from comeba_ext import EditConfig, Editor, EditRequest
from comeba_ext.covariance import Covariance
from comeba_ext.data import read_texts
from comeba_ext.editing import anchors
from comeba_ext.editing.keys import KeyReader
from comeba_ext.forward.partial import run_until
from comeba_ext.loading import load_model
from comeba_ext.ops.nearest_hook import coarse_limit, coarse_rows
from comeba_ext.text.encoding import encode, micro_batches, pad, pad_id
from comeba_ext.text.names import names_of
from comeba_ext.text.rows import prompt_rows

RATE = 1e-3  # of corpus tokens that one threshold for all lets in
FLOOR, MARGIN, CAP = 0.6, 0.6, 0.9  # of the rule before names were read


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


def misspelt(name: str) -> str:
    """With two letters in its middle exchanged."""
    n = len(name) // 2
    return name[:n] + name[n + 1 : n + 2] + name[n : n + 1] + name[n + 2 :]


FORMS = {
    "as it is": lambda name: name,
    "in small letters": str.lower,
    "its last word": lambda name: name.split()[-1] if " " in name else None,
    "misspelt": misspelt,
}


def named(ids: list[int], names: list[list[int]]) -> list[bool]:
    """Where one of the names ends."""
    return [any(ids[max(0, t + 1 - len(own)) : t + 1] == own for own in names) for t in range(len(ids))]


@torch.no_grad()
def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("model", help="folder or .gguf file")
    parser.add_argument("--covariance", type=Path, required=True)
    parser.add_argument("--subjects", type=int, default=900)
    parser.add_argument("--texts", type=int, default=500)
    parser.add_argument("--quick", action="store_true")
    parser.add_argument("--json", action="store_true")
    args = parser.parse_args()
    count, texts = (40, 20) if args.quick else (args.subjects, args.texts)
    model, tokenizer = load_model(args.model)
    editor = Editor(model, tokenizer, EditConfig.for_model(model, scope="nearest"))
    editor.set_covariance(Covariance.load(args.covariance))
    recognition, (name, layer) = editor.method.recognition, list(editor.layers.items())[-1]
    _, placed, declined = recognition.placed(editor._named([EditRequest.from_record(record) for record in counterfact("train", count)]))
    requests = [request for request in placed if request.fact_token == "subject_last"]
    subjects, decoys, names = recognition.subjects(requests), recognition.decoys(requests)[name], names_of(tokenizer, requests)

    # Keys, anchors, thresholds.
    each = reader_of(editor, requests).read(len(editor.layers) - 1).each
    unit, background = layer.score.directions(each), recognition.background(name)
    mean = layer.score.directions((each * anchors.tells(unit, background, subjects)[..., None]).sum(1))
    found = anchors.anchors_of(unit, mean, background, subjects, decoys, editor.config.alpha_floor, editor.config.unnamed_floor)
    both = torch.stack([mean, unit[:, 0]])
    lowest = (unit[:, 1:] * mean[:, None]).sum(-1).amin(-1)
    own = torch.stack([lowest, torch.ones_like(lowest)])
    corpus = torch.stack([background.highest(part, subjects)[0] for part in both])
    decoy = (both @ decoys[0].T).masked_fill(decoys[1] != torch.arange(len(mean))[:, None], 0).amax(-1)
    before = torch.stack([MARGIN * lowest, torch.zeros_like(lowest)])
    before = before.maximum(torch.maximum(corpus + anchors.STEP, decoy).minimum(CAP * own)).clamp(min=FLOOR)
    plain = (found.unit != mean[found.owner]).any(-1).long()  # which of a request's two anchors each is
    common = torch.quantile((background.unit @ mean.T).amax(-1), 1 - RATE)
    rules = {
        "one for all": (common.expand(len(found.unit)), None),
        "each its own": (before[plain, found.owner], None),
        "names are read": (found.thresholds, found.named),
    }

    # What is asked: kind, request (of other prompts and texts: every one), text.
    asked = [(kind, n, p.replace(r.subject, form(r.subject)))
             for kind, form in FORMS.items() for n, r in enumerate(requests) for p in r.rephrase_prompts
             if r.subject in p and form(r.subject)]  # fmt: skip
    asked += [("other prompts", None, p) for r in requests for p, _ in r.locality_prompts]
    asked += [("text", None, text) for text in itertools.islice(read_texts(DATA / "text" / "wikipedia_val_500.csv"), texts)]
    ids = [encode(tokenizer, text).ids[:200] for _, _, text in asked]
    units = inputs_of(editor, ids)[name]
    counts = {rule: {} for rule in rules}
    coarse = coarse_rows(layer.score.projection)
    least = coarse_limit(found.thresholds, layer.score.projection)
    looks = {"decisions": 0, "in scope, unnamed": 0, "in scope after the first look": 0}
    lowest_of_all = min(thresholds.min() for rule in rules.values() for thresholds in rule if thresholds is not None)
    for (kind, request, text), row, tokens in zip(asked, ids, units, strict=True):
        cosines = tokens @ found.unit.T
        near = (cosines >= lowest_of_all).any(0).nonzero()[:, 0]  # few of the anchors
        cosines, owner = cosines[:, near], found.owner[near]
        passed = tokens[:, :coarse] @ found.unit[near, :coarse].T >= least[near]
        whole, end = (torch.zeros(cosines.shape, dtype=torch.bool) for _ in range(2))
        for column, n in enumerate(owner.tolist()):
            whole[:, column] = torch.tensor(named(row, names[n].names))
            end[:, column] = torch.isin(torch.tensor(row), torch.tensor(names[n].ends))
        for rule, (far, close) in rules.items():
            inside = cosines >= far[near]
            if close is not None:
                unnamed = inside & end & ~whole
                looks["decisions"] += len(tokens)
                looks["in scope, unnamed"] += int(unnamed.any(1).sum())
                looks["in scope after the first look"] += int((unnamed & passed).any(1).sum())
                inside = (inside & end) | (whole & (cosines >= close[near]))
            if request is not None:
                value, size = bool(inside[:, owner == request].any()), 1
            else:  # of subjects that the text does not name
                value = inside[:, torch.tensor([requests[n].subject not in text for n in owner.tolist()], dtype=torch.bool)].any(1)
                value, size = (bool(value.any()), 1) if kind == "other prompts" else (int(value.sum()), len(row))
            total = counts[rule].setdefault(kind, [0, 0])
            total[0], total[1] = total[0] + value, total[1] + size
    rows = [{"thresholds": rule, **{kind: {"in scope": a, "of": b} for kind, (a, b) in own.items()}} for rule, own in counts.items()]
    hits, kept = looks["in scope, unnamed"], looks["in scope after the first look"]
    alike = 1 - (hits - kept) / looks["decisions"]
    last = rows[-1]["text"]["in scope"] / rows[-1]["text"]["of"]
    rows.append({"first look": looks, "recall": kept / hits if hits else None, "decisions alike": alike})
    if not args.json:
        print(f"{len(requests)} subjects ({len(declined)} declined), block {editor.config.value_layer}")
        print(f"first look: {kept} of {hits} tokens in scope of a subject that is not named there are found; decisions alike {alike:.6f}")
        for row in rows[:-1]:
            own = {kind: part for kind, part in row.items() if kind != "thresholds"}
            shares = (f"{kind} {part['in scope']}/{part['of']} = {part['in scope'] / part['of']:.5f}" for kind, part in own.items())
            print(f"{row['thresholds']}: {'  '.join(shares)}")
    targets = [
        target("text tokens in scope of a subject that is not named", last, 1e-3, last <= 1e-3),
        target("decisions that the first look leaves as they are", alike, 0.999, alike >= 0.999),
    ]
    finish(rows, targets, args.json)


if __name__ == "__main__":
    main()
