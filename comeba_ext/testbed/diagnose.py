"""Is the embedded model worth editing? ``python -m comeba_ext.testbed.diagnose [DIR] [--json]``.

Four questions, each with the bound a model must meet to be shipped (``LIMITS``):

* *recall*: does it answer with the true object on the templates a fact was trained on, and on the held-out ones?
* *patching*: does replacing the residual stream after a block, at the subject's last token only, by that of another
  subject make it answer with the other subject's object? (Causal tracing, Meng et al. 2022, arXiv 2202.05262.)
* *keys*: are the MLP keys of one subject alike in two templates, and unlike those of other subjects?
* *single edits*, each rolled back: reliability, generality, locality (only with ``--edits``, it needs the editor).
"""

from __future__ import annotations

import argparse
import json
import random
from pathlib import Path

import torch

from comeba_ext import testbed
from comeba_ext.testbed.templates import ALL

LIMITS = {
    "recall_stated": (">=", 0.99),
    "recall_held_out": (">=", 0.97),
    "patch_last_subject_token": (">=", 0.80),  # at every edited block
    "key_cosine_same_subject": (">=", 0.80),
    "key_cosine_other_subject": ("<=", 0.40),
    "single_edit_reliability": (">=", 0.98),
    "single_edit_generality": (">=", 0.90),
    "single_edit_locality": (">=", 0.99),
}


class Probe:
    """Prompts about facts, run through a model in padded batches."""

    def __init__(self, model, tokenizer, facts: list[dict]):
        self.model, self.tokenizer, self.facts = model.eval(), tokenizer, facts
        self.blocks = model.model.layers

    def prompt(self, fact: dict, template: int) -> tuple[list[int], int]:
        """Token ids of a prompt and the position of the subject's last token."""
        text = ALL[fact["relation"]][template].format(fact["subject"])
        end = text.rindex(fact["subject"]) + len(fact["subject"])
        encoded = self.tokenizer(text, return_offsets_mapping=True)
        last = max(i for i, (a, b) in enumerate(encoded["offset_mapping"]) if a < end and b > a)
        return encoded["input_ids"], last

    def batch(self, rows: list[list[int]]) -> dict[str, torch.Tensor]:
        return dict(self.tokenizer.pad({"input_ids": rows}, padding_side="right", return_tensors="pt"))

    @torch.no_grad()
    def next_tokens(self, rows: list[list[int]]) -> torch.Tensor:
        """Greedy next token of every prompt: ``(len(rows),)``."""
        out = []
        for i in range(0, len(rows), 128):
            inputs = self.batch(rows[i : i + 128])
            logits = self.model(**inputs, use_cache=False).logits
            out.append(logits[torch.arange(len(logits)), inputs["attention_mask"].sum(1) - 1].argmax(-1))
        return torch.cat(out)

    def first_object_token(self, fact: dict) -> int:
        return self.tokenizer(" " + fact["object"])["input_ids"][0]

    def recall(self, facts: list[dict], held_out: bool, rng: random.Random) -> float:
        """Share of facts whose whole object is the greedy continuation (teacher-forced, every token right)."""
        right = 0
        for i in range(0, len(facts), 128):
            rows, spans = [], []
            for fact in facts[i : i + 128]:
                pool = [t for t in range(8) if (t in fact["stated"]) != held_out]
                prompt, _ = self.prompt(fact, rng.choice(pool))
                target = self.tokenizer(" " + fact["object"])["input_ids"]
                rows.append(prompt + target)
                spans.append((len(prompt), target))
            with torch.no_grad():
                guess = self.model(**self.batch(rows), use_cache=False).logits.argmax(-1)
            right += sum(guess[r, s - 1 : s - 1 + len(t)].tolist() == t for r, (s, t) in enumerate(spans))
        return right / len(facts)

    def patching(self, pairs: list[tuple[dict, dict, int]], where: str, blocks: slice = slice(-1)) -> list[torch.Tensor]:
        """Which prompts flip to the donor's object, ``(pairs,)`` bool per patched block; ``where``: last or final token.

        Args:
            pairs: receiver, donor, and the number of the template that both are asked with.
        """
        receivers = [self.prompt(receiver, template) for receiver, _, template in pairs]
        donors = [self.prompt(donor, template) for _, donor, template in pairs]
        place = lambda prompts: torch.tensor([last if where == "last" else len(ids) - 1 for ids, last in prompts])  # noqa: E731
        here, there, rows = place(receivers), place(donors), torch.arange(len(pairs))
        wanted = torch.tensor([self.first_object_token(donor) for _, donor, _ in pairs])
        grabbed, flips = [], []

        def grab(_, __, output):
            grabbed.append(output[rows, there])

        def put(_, __, output):
            output = output.clone()
            output[rows, here] = grabbed[len(flips)]
            return output

        def run(hooked, hook, prompts):
            handles = [block.register_forward_hook(hook) for block in hooked]
            inputs = self.batch([ids for ids, _ in prompts])
            with torch.no_grad():
                found = self.model.model(**inputs, use_cache=False)
            for handle in handles:
                handle.remove()
            return found[0][rows, inputs["attention_mask"].sum(1) - 1]

        run(self.blocks[blocks], grab, donors)
        for block in self.blocks[blocks]:
            answers = self.model.lm_head(run([block], put, receivers)).argmax(-1)
            flips.append(answers == wanted)
        return flips

    def keys(self, prompts: list[tuple[list[int], int]]) -> list[torch.Tensor]:
        """Unit keys per block, ``(len(prompts), d_in)``: MLP output projection's input at the subject's last token."""
        grabbed, handles = {}, []
        for n, block in enumerate(self.blocks):
            handles.append(block.mlp.down_proj.register_forward_pre_hook(lambda _, args, n=n: grabbed.__setitem__(n, args[0])))
        with torch.no_grad():
            self.model(**self.batch([ids for ids, _ in prompts]), use_cache=False)
        for handle in handles:
            handle.remove()
        rows, last = torch.arange(len(prompts)), torch.tensor([p for _, p in prompts])
        return [torch.nn.functional.normalize(grabbed[n][rows, last], dim=-1) for n in range(len(self.blocks))]


def diagnose(model, tokenizer, folder: str | Path = testbed.FOLDER, seed: int = 0, sample: int = 400) -> dict:
    """All diagnostics that need no editor; blocks are indexed from 0, the last (global) block is left out."""
    facts = testbed.all_facts(folder)
    rng = random.Random(seed)
    probe = Probe(model, tokenizer, facts)
    chosen = rng.sample(facts, min(sample, len(facts)))
    pairs = []
    while len(pairs) < 200:
        a, b = rng.sample(facts, 2)
        if a["relation"] == b["relation"] and probe.first_object_token(a) != probe.first_object_token(b):
            pairs.append((a, b, rng.choice(a["stated"])))
    same, other = [], []
    for relation in sorted({f["relation"] for f in facts}):
        group = [f for f in facts if f["relation"] == relation][:60]
        first = probe.keys([probe.prompt(f, f["stated"][0]) for f in group])
        second = probe.keys([probe.prompt(f, f["stated"][1]) for f in group])
        same.append([(a * b).sum(-1).mean().item() for a, b in zip(first, second)])
        n = len(group)
        other.append([((a @ a.T).sum().item() - n) / (n * (n - 1)) for a in first])
    blocks = range(len(probe.blocks) - 1)
    share = lambda flips: [own.float().mean().item() for own in flips]  # noqa: E731
    return {
        "recall_stated": probe.recall(chosen, False, rng),
        "recall_held_out": probe.recall(chosen, True, rng),
        "patch_last_subject_token": share(probe.patching(pairs, "last")),
        "patch_final_token": share(probe.patching(pairs, "final")),
        "key_cosine_same_subject": [sum(r[b] for r in same) / len(same) for b in blocks],
        "key_cosine_other_subject": [sum(r[b] for r in other) / len(other) for b in blocks],
    }


def single_edits(model, tokenizer, count: int = 100, first: int = 0, config=None, folder=testbed.FOLDER) -> dict:
    """Each fact edited alone and rolled back: mean reliability, generality and locality over ``count`` facts."""
    from tqdm.auto import tqdm

    from comeba_ext import Editor, evaluate
    from comeba_ext.evaluation import predict_base

    requests = testbed.facts(folder)[first : first + count]
    editor = Editor(model, tokenizer, config)
    editor.set_covariance(testbed.covariance(model, tokenizer, folder))
    base = predict_base(model, tokenizer, requests, generate=False)
    sums = dict.fromkeys(("reliability", "generality", "locality"), 0.0)
    for request in tqdm(requests, desc="single edits", unit="edit"):
        editor.edit([request])
        scores = evaluate(model, tokenizer, [request], base, generate=False)
        editor.rollback(0)
        for name in sums:
            sums[name] += scores[name]
    editor.close()
    return {f"single_edit_{name}": total / len(requests) for name, total in sums.items()}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("model", nargs="?", type=Path, default=testbed.FOLDER)
    parser.add_argument("--edits", type=int, default=0, help="also edit that many facts, one at a time")
    parser.add_argument("--json", action="store_true")
    args = parser.parse_args()
    model, tokenizer = testbed.load(args.model)
    result = diagnose(model, tokenizer, args.model)
    if args.edits:
        result |= single_edits(model, tokenizer, args.edits, folder=args.model)
    if args.json:
        print(json.dumps(result))
        return
    for name, value in result.items():
        row = "  ".join(f"{v:.3f}" for v in value) if isinstance(value, list) else f"{value:.4f}"
        sign, limit = LIMITS.get(name, ("", ""))
        print(f"{name:28s} {row}   {sign} {limit}")


if __name__ == "__main__":
    main()
