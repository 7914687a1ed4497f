"""What ``nearest`` costs a layer by the number of subjects it knows: ``python bench/bench_subjects.py [--quick] [--json] [--plot FILE]``

GPT2-XL's shape (6,400 to 1,600), float32 on a CPU and bfloat16 on a GPU, two keys a subject, names and text real: subjects of
CounterFact, beyond those the first words of one with the last word of another; tokens of Wikipedia's validation articles; GPT-2's
tokenizer. Inputs and keys are random, so nothing is in scope, as for almost all text, but every token whose id ends a name is looked at.
Layer and plain layer take turns, on 512 tokens and on 32 single ones. Beside them: how many tokens some name ends in, how many keys
these meet, and hashing the text, which is done once a pass.
"""

from __future__ import annotations

import argparse
import random
import statistics
import sys

import torch
from bench_hooked_linear import Clock
from common import DATA, counterfact, finish, target
from torch import nn
from transformers import GPT2Tokenizer

from comeba_ext.data import read_texts
from comeba_ext.layers.hooked_linear import HookedLinear
from comeba_ext.layers.sequence_context import SequenceContext
from comeba_ext.ops.mentions import name_hash, suffix_hashes
from comeba_ext.ops.nearest_hook import ROWS

D_IN, D_OUT, TOKENS, SINGLE = 6400, 1600, 512, 32


def names(count: int) -> list[str]:
    """Subjects of CounterFact, then such as it might have."""
    real = list(dict.fromkeys(r["requested_rewrite"]["subject"] if "requested_rewrite" in r else r["subject"]
                              for part in ("edit", "train") for r in counterfact(part)))  # fmt: skip
    draw, found = random.Random(0), dict.fromkeys(real)
    while len(found) < count:
        first, last = draw.choice(real), draw.choice(real)
        found[f"{first.rpartition(' ')[0] or first} {last.rpartition(' ')[2]}"] = None
    return list(found)[:count]


@torch.no_grad()
def know(layer: HookedLinear, tokens: list[list[list[int]]]) -> None:
    """Let a layer know subjects by these names, each in two forms; keys and edits are random."""
    generator = torch.Generator().manual_seed(0)
    d_in, d_out, count = layer.in_features, layer.out_features, len(tokens)
    rows = min(ROWS, d_in)
    layer.score.set_projection(torch.randn(rows, d_in, generator=generator))
    unit = nn.functional.normalize(torch.randn(2 * count, rows, generator=generator), dim=-1)
    layer.score.append_anchors(unit, torch.full((2 * count,), 0.85), torch.full((2 * count,), 0.4))
    layer.shards.append(torch.randn(2, d_out, generator=generator), torch.randn(2, d_in, generator=generator))
    layer.shards.assign({n: torch.arange(2) for n in range(count)}, count)  # nobody reads them
    called = {name_hash(own): n for n, forms in enumerate(tokens) for own in forms}
    ends = sorted({(name_hash(own[-1:]), n) for n, forms in enumerate(tokens) for own in forms})
    tables = [torch.tensor(part) for table in (sorted(called.items()), ends) for part in zip(*table, strict=True)]
    layer.score.assign(torch.arange(count).repeat_interleave(2), tables)


def layer_of(tokens: list[list[list[int]]]) -> HookedLinear:
    """A layer that knows subjects by these names."""
    layer = HookedLinear(nn.Linear(D_IN, D_OUT), "nearest", 0.4)
    know(layer, tokens)
    layer.context = SequenceContext(nn.Module())
    return layer


def gpt2_tokenizer() -> GPT2Tokenizer:
    return GPT2Tokenizer(str(DATA / "gpt2_bpe" / "vocab.json"), str(DATA / "gpt2_bpe" / "merges.txt"))


def name_forms(tokenizer, count: int) -> list[list[list[int]]]:
    """The token ids of names at the start of a text and within one."""
    return [tokenizer([name, f" {name}"], add_special_tokens=False)["input_ids"] for name in names(count)]


def article_tokens(tokenizer) -> list[int]:
    """Wikipedia, one article after another."""
    articles = list(read_texts(DATA / "text" / "wikipedia_val_500.csv"))[:60]
    return [token for text in articles for token in tokenizer(text, add_special_tokens=False)["input_ids"]]


@torch.no_grad()
def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--quick", action="store_true", help="up to 10,000 subjects, fewer rounds")
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    parser.add_argument("--json", action="store_true")
    parser.add_argument("--plot", help="write a PNG")
    args = parser.parse_args()
    how = {"device": args.device, "dtype": torch.float32 if args.device == "cpu" else torch.bfloat16}
    sizes = (1_000, 10_000) if args.quick else (1_000, 10_000, 100_000)
    tokenizer = gpt2_tokenizer()
    forms = name_forms(tokenizer, max(sizes))
    ids = torch.tensor([article_tokens(tokenizer)[:TOKENS]], device=args.device)
    x = torch.randn(1, TOKENS, D_IN, generator=torch.Generator().manual_seed(1)).to(**how)
    clock, rows, hashes = Clock(args.device), [], suffix_hashes(ids)
    hash_ms = statistics.median(clock({"hash": lambda: suffix_hashes(ids)}, 1.0, 20)["hash"]) * 1e3
    for size in sizes:
        layer = layer_of(forms[:size]).to(**how)
        here, score = layer.context.here, layer.score

        def whole(layer=layer, here=here):
            here.hashes = hashes
            layer(x)

        def single(layer=layer, here=here):
            for n in range(SINGLE):
                here.hashes = hashes[:, n : n + 1]
                layer(x[:, n : n + 1])

        def plain(layer=layer):
            for n in range(SINGLE):
                layer.base_layer(x[:, n : n + 1])

        calls = {"plain": lambda layer=layer: layer.base_layer(x), "layer": whole, "single": single, "plain single": plain}
        taken = clock(calls, 6.0 if args.quick else 30.0, 5)
        ends = hashes[..., 0].contiguous()
        met = torch.searchsorted(score.ends, ends, right=True) - torch.searchsorted(score.ends, ends)
        ratio = lambda a, b: statistics.median(p / q for p, q in zip(taken[a], taken[b], strict=True))  # noqa: B023, E731
        rows.append(
            {
                "device": args.device,
                "subjects": size,
                "looked_up": round((met > 0).float().mean().item(), 4),
                "keys_a_token": round(2 * met.float().mean().item(), 3),
                "layer_ms": round(statistics.median(taken["layer"]) * 1e3, 3),
                "ratio": round(ratio("layer", "plain"), 4),
                "token_ms": round(statistics.median(taken["single"]) / SINGLE * 1e3, 4),
                "token_ratio": round(ratio("single", "plain single"), 4),
                "hash_ms": round(hash_ms, 3),
            }
        )
        print("  ".join(f"{key} {value}" for key, value in rows[-1].items()), file=sys.stderr if args.json else sys.stdout, flush=True)
    if args.plot:
        draw(rows, args.plot)
    limits = {1_000: (1.06, 1.15), 100_000: (1.15, 1.3)}
    targets = [
        target(f"nearest / plain, {row['subjects']:,} subjects, {what}", row[key], limit, row[key] <= limit)
        for row in rows
        for key, what, limit in zip(("ratio", "token_ratio"), ("512 tokens", "one token"), limits.get(row["subjects"], ()), strict=False)
    ]
    finish(rows, targets, args.json)


def draw(rows: list[dict], path: str) -> None:
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    figure, axes = pyplot.subplots(figsize=(5, 3.2), constrained_layout=True)
    for key, label in (("ratio", "512 tokens"), ("token_ratio", "one token")):
        axes.plot([row["subjects"] for row in rows], [row[key] for row in rows], marker="o", label=label)
    axes.axhline(1, color="black", linewidth=0.8)
    axes.set(xscale="log", ylim=(0.9, None), xlabel="edited subjects", ylabel="time / plain linear layer", title=f"{D_IN}→{D_OUT}")
    axes.legend()
    figure.savefig(path, dpi=120)


if __name__ == "__main__":
    main()
