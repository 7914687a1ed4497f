"""The nearest score: how well keys tell prompts apart, and what comparing costs a layer:
``python bench/bench_nearest.py [--quick] [--json] [--plot FILE]``

Apart: facts of the embedded model stand for edits. Their keys are what the editor would average; nothing is edited, so inputs
are the untouched model's. A prompt's score is its highest token's, per edited block, with projections on fewer and fewer
directions, without whitening (metric ``none``) and with all values rounded to bfloat16. ``others``: the facts' locality prompts,
about other subjects in the same templates, without those that name an edited subject. ``auc``: chance that an edited prompt
has a higher score than another subject's (0.5: not told apart).

Cost: a layer of GPT2-XL's shape on the CPU, nothing in scope, against the plain linear layer and both gates of the response
scores in turn (``bench_hooked_linear.py``): medians of ratios of neighbours in time, caches cold.
"""

from __future__ import annotations

import argparse
import statistics
import sys

import torch
from bench_hooked_linear import Clock
from common import finish, target
from torch import nn

from comeba_ext import Editor, HookedLinear, testbed
from comeba_ext.ops.nearest_hook import ROWS, directions, nearest_scores, projection_of
from comeba_ext.text.encoding import pad_id
from comeba_ext.text.rows import batch_inputs, prompt_rows

SIZES = (48, 64, 128, 256, 512)
KEYS = (100, 1_000, 10_000)
D_IN, D_OUT = 6400, 1600


class Inputs:
    """The edited layers' inputs for texts, all tokens one after another.

    Attributes:
        x: layer name to ``(tokens, d_in)``.
        owner: ``(tokens,)``, the text that a token belongs to.
        count: number of texts.
    """

    @torch.no_grad()
    def __init__(self, editor: Editor, texts: list[str]):
        tokenizer, parts = editor.tokenizer, {name: [] for name in editor.layers}
        owner, self.count = [], len(texts)
        with editor.disabled():
            for start in range(0, len(texts), 256):
                part = [text.rstrip() for text in texts[start : start + 256]]
                batch = tokenizer(part, padding=True, padding_side="right", return_tensors="pt")
                real = batch["attention_mask"].bool()
                for name, x in layer_inputs(editor, batch["input_ids"], batch["attention_mask"]).items():
                    parts[name].append(x[real])
                owner.append(start + real.nonzero()[:, 0])
        self.x, self.owner = {name: torch.cat(x) for name, x in parts.items()}, torch.cat(owner)

    def peaks(self, name: str, projection: torch.Tensor, anchors: torch.Tensor) -> torch.Tensor:
        """Every text's highest score, ``(texts,)`` float32."""
        best = torch.zeros(self.count)
        for x, owner in zip(self.x[name].split(8192), self.owner.split(8192), strict=True):
            best.scatter_reduce_(0, owner, nearest_scores(x.to(projection.dtype), projection, anchors).float(), "amax")
        return best


def layer_inputs(editor: Editor, ids: torch.Tensor, mask: torch.Tensor) -> dict[str, torch.Tensor]:
    """Layer name to ``(batch, seq, d_in)``."""
    seen = {}

    def note(name):
        return lambda layer, args: seen.__setitem__(name, args[0])

    handles = [layer.register_forward_pre_hook(note(name)) for name, layer in editor.layers.items()]
    editor.model(input_ids=ids, attention_mask=mask, use_cache=False)
    for handle in handles:
        handle.remove()
    return seen


@torch.no_grad()
def keys_of(editor: Editor, facts: list) -> dict[str, torch.Tensor]:
    """Layer name to ``(facts, d_in)``: inputs at the subject's last token, averaged over the editor's prefixes."""
    rows = prompt_rows(editor.tokenizer, facts, editor.prefixes)
    keys = {name: torch.zeros(len(facts), layer.in_features) for name, layer in editor.layers.items()}
    with editor.disabled():
        for start in range(0, len(rows), 256):
            part = rows[start : start + 256]
            inputs = batch_inputs(part, pad_id(editor.tokenizer), "cpu")
            request, last = (torch.tensor(column) for column in zip(*((row.request, row.subject_last) for row in part)))
            for name, x in layer_inputs(editor, inputs["input_ids"], inputs["attention_mask"]).items():
                keys[name].index_add_(0, request, x[torch.arange(len(part)), last] / len(editor.prefixes))
    return keys


def auc(high: torch.Tensor, low: torch.Tensor) -> float:
    """Chance that one of ``high`` exceeds one of ``low``; a tie counts half."""
    low = low.sort().values
    below = torch.searchsorted(low, high, right=False) + torch.searchsorted(low, high, right=True)
    return (below.double() / 2 / len(low)).mean().item()


def apart(count: int, sizes: tuple[int, ...], as_json: bool) -> list[dict]:
    model, tokenizer = testbed.load()
    editor = Editor(model, tokenizer)
    editor.collect_covariance(testbed.texts(), progress=False)
    facts = testbed.facts()[:count]
    subjects = {fact.subject for fact in facts}
    others = dict.fromkeys(prompt for fact in facts for prompt, _ in fact.locality_prompts)
    sets = {
        "edited": Inputs(editor, [fact.text for fact in facts]),
        "rephrased": Inputs(editor, [prompt for fact in facts for prompt in fact.rephrase_prompts]),
        "others": Inputs(editor, [prompt for prompt in others if not any(subject in prompt for subject in subjects)]),
    }
    keys = keys_of(editor, facts)
    rows = []
    for block, name in zip(editor.config.layers, editor.layers, strict=True):
        moment = editor.covariance[name]
        width = len(moment)
        cases = [("C0", size, torch.float32) for size in (*sizes, width)]
        cases += [("C0", ROWS, torch.bfloat16), ("none", width, torch.float32)]
        for metric, size, dtype in cases:
            wide = projection_of(moment if metric == "C0" else torch.eye(width), size).float()
            projection, anchors = wide.to(dtype), directions(keys[name], wide).to(dtype)
            edited, rephrased, other = (inputs.peaks(name, projection, anchors) for inputs in sets.values())
            row = {
                "part": "apart",
                "block": block,
                "metric": metric,
                "rows": size,
                "dtype": str(dtype)[6:],
                "facts": len(facts),
                "rephrased": len(rephrased),
                "others": len(other),
                "edited_lowest": edited.min(),
                "rephrased_q01": rephrased.quantile(0.01),
                "others_median": other.median(),
                "others_q95": other.quantile(0.95),
                "others_above_0.6": (other > 0.6).float().mean(),
                "others_above_0.7": (other > 0.7).float().mean(),
                "auc": auc(edited, other),
                "auc_rephrased": auc(rephrased, other),
            }
            rows.append(rounded(row, as_json))
    return rows


@torch.no_grad()
def cost(tokens: int, seconds: float, clock: Clock, as_json: bool) -> list[dict]:
    generator = torch.Generator().manual_seed(0)
    random = lambda *shape: torch.randn(*shape, generator=generator)  # noqa: E731
    base, x, delta = nn.Linear(D_IN, D_OUT), random(1, tokens, D_IN), random(D_OUT, D_IN) * D_IN**-0.5
    layers = {gate: HookedLinear(base, "reference", gate=gate) for gate in ("exact", "sketch")}
    projection, keys = random(ROWS, D_IN), random(max(KEYS), D_IN)
    for size in (ROWS, ROWS // 2):
        for count in KEYS:
            layers[size, count] = layer = HookedLinear(base, "nearest", 2.0)
            layer.score.set_projection(projection[:size])
            layer.score.set_keys(keys[:count])
    del keys
    for layer in layers.values():
        layer.delta = delta
        layer.score.scale.fill_(float(D_OUT))
    calls = {"plain": lambda: base(x)} | {name: (lambda layer=layer: layer(x)) for name, layer in layers.items()}
    taken = clock(calls, seconds, 7)
    plain = taken.pop("plain")
    rows = []
    for name, times in taken.items():
        ratios = sorted(own / other for own, other in zip(times, plain, strict=True))
        gate, (size, count) = ("nearest", name) if isinstance(name, tuple) else (name, (None, None))
        row = {
            "part": "cost",
            "hook": gate,
            "rows": size,
            "keys": count,
            "tokens": tokens,
            "calls": len(plain),
            "plain_ms": statistics.median(plain) * 1e3,
            "ratio": statistics.median(ratios),
            "spread": [round(ratios[len(ratios) // 10], 4), round(ratios[-1 - len(ratios) // 10], 4)],
        }
        rows.append(rounded(row, as_json))
    return rows


def rounded(row: dict, as_json: bool) -> dict:
    row = {k: v.item() if isinstance(v, torch.Tensor) else v for k, v in row.items()}
    row = {k: round(v, 4) if isinstance(v, float) else v for k, v in row.items()}
    print("  ".join(f"{k} {v}" for k, v in row.items()), file=sys.stderr if as_json else sys.stdout, flush=True)
    return row


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--quick", action="store_true", help="300 facts instead of 1,000, fewer projections")
    parser.add_argument("--json", action="store_true")
    parser.add_argument("--plot", metavar="PNG", help="also draw both parts")
    args = parser.parse_args()
    rows = apart(*((300, (64, 128, 256)) if args.quick else (1000, SIZES)), args.json)
    clock = Clock("cpu")
    for tokens in (1, 512):
        rows += cost(tokens, 3.0 if args.quick else 20.0, clock, args.json)
    if args.plot:
        plot(rows, args.plot)
    own = [r for r in rows if r["part"] == "apart" and (r["metric"], r["rows"], r["dtype"]) == ("C0", ROWS, "float32")]
    worst = min(row["auc"] for row in own)
    ratio = next(r["ratio"] for r in rows if r["part"] == "cost" and (r["rows"], r["keys"], r["tokens"]) == (ROWS, 1000, 512))
    finish(
        rows,
        [
            target(f"AUC of edited against other prompts, {ROWS} rows, worst block", worst, 0.99, worst >= 0.99),
            target(f"nearest / plain, {ROWS} rows, 1,000 keys, 512 tokens, nothing in scope", ratio, 1.5, ratio <= 1.5),
        ],
        args.json,
    )


def plot(rows: list[dict], path: str) -> None:
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    figure, (scores, costs) = plt.subplots(1, 2, figsize=(9, 3.4), constrained_layout=True)
    apart = [r for r in rows if r["part"] == "apart" and r["metric"] == "C0" and r["dtype"] == "float32"]
    sizes = sorted({r["rows"] for r in apart})
    for column, label, colour, worst in (
        ("edited_lowest", "edited, lowest", "#009E73", min),
        ("rephrased_q01", "rephrased, 1 % quantile", "#0072B2", min),
        ("others_q95", "other subjects, 95 % quantile", "#D55E00", max),
        ("others_median", "other subjects, median", "#E69F00", max),
    ):
        values = [worst(r[column] for r in apart if r["rows"] == size) for size in sizes]
        scores.plot(sizes, values, "o-", color=colour, label=label)
    scores.set_xscale("log", base=2)
    scores.set(xlabel="rows of the projection (the last: all dimensions)", ylabel="score, worst block", ylim=(0, 1.02))
    scores.set_title(f"{apart[0]['facts']} facts of the embedded model", fontsize=10)
    scores.legend(fontsize=8, loc="lower right")
    cost = [r for r in rows if r["part"] == "cost" and r["tokens"] == 512]
    for size, colour in ((ROWS, "#0072B2"), (ROWS // 2, "#56B4E9")):
        own = [r for r in cost if r["rows"] == size]
        costs.plot([r["keys"] for r in own], [r["ratio"] for r in own], "o-", color=colour, label=f"nearest, {size} rows")
    for row, colour in zip((r for r in cost if r["rows"] is None), ("#D55E00", "#E69F00")):
        costs.axhline(row["ratio"], color=colour, label=f"{row['hook']} gate of a response score")
    costs.axhline(1, color="black", linewidth=0.8)
    costs.set_xscale("log")
    costs.set(xlabel="edited keys", ylabel="time / plain linear layer", ylim=(0, None))
    costs.set_title(f"{D_IN}→{D_OUT}, 512 tokens, nothing in scope", fontsize=10)
    costs.legend(fontsize=8, loc="lower right")
    figure.savefig(path, dpi=130)


if __name__ == "__main__":
    main()
