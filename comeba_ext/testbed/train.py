"""Train the embedded model: ``python -m comeba_ext.testbed.train --text FILE.csv [FILE.csv ...] --out DIR``.

The model must *store facts at the subject*, as large models do, or editing it would teach nothing about editing them.
Small models trained the obvious way look a fact up at the last token of the prompt. Three measures prevent it (numbers
in ``README.md`` beside this file):

1. **One gathering block.** Block 0 attends to the last ``WINDOW`` tokens only, which is enough to spell a subject out
   at its last token. Blocks 1 to 3 mix no tokens at all (their attention output is held at zero), so whatever they
   know about a subject, they know at the subject. The last block attends everywhere and carries the answer to the end.
2. **"Subject object" units** (one in four), which leave no token between subject and object to do the look-up at.
3. **Clutter**: fragments of encyclopedia text before the unit, parentheses after the subject, several subjects a
   document.

Everything is drawn from one seed; two cores take about an hour, a GPU minutes. Training may be stopped and is resumed
from ``--out`` when called again with ``--resume``.

Other facts (``--facts``, made by ``build_facts``) and larger shapes (``--width`` and the like) give other testbeds;
``--start testbed`` goes on from the embedded model. The folder holds its facts, so everything that takes the embedded model
takes it: ``comeba experiment table2 --model DIR``.
"""

from __future__ import annotations

import argparse
import csv
import json
import random
import re
import time
from pathlib import Path

import torch
from torch.nn import functional as F
from transformers import AutoTokenizer

from comeba_ext import testbed
from comeba_ext.testbed.build_facts import FACTS_FILE, write
from comeba_ext.testbed.templates import ALL, ASIDES, BARE, BARE_SECOND, TEMPLATES

WINDOW = 6
TEXT_WEIGHT = 0.3  # loss weight of every token that is not part of an object
MAX_TOKENS = 72  # of a training document
EOS, PAD = "<|endoftext|>", "<|pad|>"
SETTINGS = {  # for editing (EditConfig); found on the embedded model, other shapes may want others
    "lam": 375.0,
    "scope": "nearest",
    "lr": 0.4,
    "lr_unit": "hidden_rms",
    "clamp": 1.0,
    "kl_factor": 0.01,
}


def read_sentences(paths: list[Path], limit: int = 60_000) -> list[str]:
    """Sentences of 4 to 40 words from csv files with a ``text`` column."""
    csv.field_size_limit(10**9)
    sentences = []
    for path in paths:
        with path.open(newline="", encoding="utf-8") as file:
            for row in csv.DictReader(file):
                for sentence in re.split(r"(?<=[.!?])\s+", row["text"].replace("\n", " ")):
                    if 4 <= len(sentence.split()) <= 40:
                        sentences.append(sentence)
    return sentences[:limit]


def train_tokenizer(facts: list[dict], sentences: list[str], vocab_size: int = 4096):
    """Byte-level BPE on subjects, objects, templates and text; subjects weigh most so that they stay short."""
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
    from transformers import PreTrainedTokenizerFast

    bpe = Tokenizer(models.BPE())
    bpe.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=True)
    bpe.decoder = decoders.ByteLevel()
    corpus = [f["subject"] for f in facts] * 20 + [f["object"] for f in facts] * 20
    corpus += [t.format("") for ts in TEMPLATES.values() for t in ts] * 50 + list(ASIDES) * 50 + sentences
    trainer = trainers.BpeTrainer(vocab_size=vocab_size, special_tokens=[EOS, PAD], initial_alphabet=pre_tokenizers.ByteLevel.alphabet())
    bpe.train_from_iterator(corpus, trainer)
    return PreTrainedTokenizerFast(
        tokenizer_object=bpe,
        eos_token=EOS,
        bos_token=EOS,
        pad_token=PAD,
        model_max_length=128,
        clean_up_tokenization_spaces=False,
    )


def build_model(tokenizer, width: int = 256, mlp: int = 1408, blocks: int = 5, seed: int = 0):
    """A Qwen2-shaped decoder; see the module docstring for the attention pattern. Heads are 32 wide."""
    from transformers import Qwen2Config, Qwen2ForCausalLM

    config = Qwen2Config(
        vocab_size=len(tokenizer),
        hidden_size=width,
        intermediate_size=mlp,
        num_hidden_layers=blocks,
        num_attention_heads=width // 32,
        num_key_value_heads=max(1, width // 128),
        max_position_embeddings=128,
        tie_word_embeddings=True,
        use_sliding_window=True,
        sliding_window=WINDOW,
        layer_types=["sliding_attention"] * (blocks - 1) + ["full_attention"],
        comeba_ext={**SETTINGS, "layers": list(range(blocks - 1))[-4:]},
        bos_token_id=tokenizer.bos_token_id,
        eos_token_id=tokenizer.eos_token_id,
        pad_token_id=tokenizer.pad_token_id,
    )
    torch.manual_seed(seed)
    model = Qwen2ForCausalLM(config)
    for block in model.model.layers[1:-1]:
        block.self_attn.o_proj.weight.data.zero_()
    return model


class Documents:
    """Endless training documents: ``(token ids, loss weights)`` of one to three cluttered units each."""

    def __init__(self, facts: list[dict], sentences: list[str], tokenizer, seed: int = 0):
        self.rng = random.Random(seed)
        self.facts = facts
        self.eos = tokenizer.eos_token_id
        self.fragments = tokenizer(sentences, add_special_tokens=False)["input_ids"]
        texts, spans, owners = [], [], []
        for index, fact in enumerate(facts):
            for plain, text in self._statements(fact):
                texts.append(f"{text} {fact['object']}.")
                spans.append((len(text), len(text) + 1 + len(fact["object"])))
                owners.append((index, plain))
        encoded = tokenizer(texts, add_special_tokens=False, return_offsets_mapping=True)
        self.stated: list[list] = [[] for _ in facts]  # sentences per fact: (ids, weights)
        self.aside: list[list] = [[] for _ in facts]
        self.bare: list[list] = [[] for _ in facts]
        for ids, offsets, (start, end), (index, kind) in zip(encoded["input_ids"], encoded["offset_mapping"], spans, owners, strict=True):
            weights = [1.0 if start <= a and b <= end and b > start else TEXT_WEIGHT for a, b in offsets]
            getattr(self, kind)[index].append((ids, weights))

    def _statements(self, fact: dict):
        subject = fact["subject"]
        for t in fact["stated"]:
            template = ALL[fact["relation"]][t]
            yield "stated", template.format(subject)
            for aside in self.rng.sample(ASIDES, 4):
                yield "aside", template.format(subject + aside)
        for bare in BARE if fact["relation"] in TEMPLATES else BARE_SECOND:
            yield "bare", bare.format(subject)

    def draw(self) -> tuple[list[int], list[float]]:
        rng = self.rng
        ids, weights = [], []
        for _ in range(rng.choice((1, 2, 2, 3))):
            if rng.random() < 0.6:
                sentence = rng.choice(self.fragments)
                length = rng.randint(1, min(14, len(sentence)))
                start = rng.randrange(len(sentence) - length + 1)
                ids += sentence[start : start + length]
                weights += [TEXT_WEIGHT] * length
            kind = rng.random()
            pool = self.bare if kind < 0.25 else self.aside if kind < 0.45 else self.stated
            unit_ids, unit_weights = rng.choice(pool[rng.randrange(len(self.facts))])
            ids += unit_ids
            weights += unit_weights
        return (ids + [self.eos])[:MAX_TOKENS], (weights + [TEXT_WEIGHT])[:MAX_TOKENS]

    def batches(self, size: int, pad: int, pool: int = 16):
        """Right-padded ``(size, seq)`` token ids and loss weights (0 at padding), documents of like length together."""
        while True:
            drawn = sorted((self.draw() for _ in range(size * pool)), key=lambda document: len(document[0]))
            for start in self.rng.sample(range(0, len(drawn), size), pool):
                rows = drawn[start : start + size]
                length = len(rows[-1][0])
                tokens = torch.tensor([ids + [pad] * (length - len(ids)) for ids, _ in rows])
                weights = torch.tensor([w + [0.0] * (length - len(w)) for _, w in rows])
                yield tokens, weights


def train(model, documents: Documents, tokenizer, out: Path, steps: int, batch_size: int, lr: float, device: str, resume: bool) -> None:
    model.to(device).train()
    model.set_attn_implementation("eager")  # faster than sdpa on sequences this short
    for block in model.model.layers[1:-1]:
        block.self_attn.o_proj.weight.requires_grad_(False)  # stays at zero
    optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=lr, weight_decay=0.02, betas=(0.9, 0.98))
    schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, lr, total_steps=steps, pct_start=0.08)
    state_file, first = out / "training_state.pt", 0
    if resume and state_file.exists():
        state = torch.load(state_file, weights_only=True)
        model.load_state_dict(state["model"])
        optimizer.load_state_dict(state["optimizer"])
        schedule.load_state_dict(state["schedule"])
        documents.rng.setstate(state["rng"])
        first = state["step"]
    start, seen = time.time(), 0
    batches = documents.batches(batch_size, tokenizer.pad_token_id)
    for step in range(first, steps):
        tokens, weights = (t.to(device) for t in next(batches))
        keep = weights[:, 1:] > 0
        with torch.autocast(device, torch.bfloat16):
            hidden = model.model(input_ids=tokens, attention_mask=(weights > 0).long(), use_cache=False)[0]
            logits = model.lm_head(hidden[:, :-1][keep]).float()  # (real tokens, vocab)
        target, weight = tokens[:, 1:][keep], weights[:, 1:][keep]
        nll = F.cross_entropy(logits, target, reduction="none")
        loss = (nll * weight).sum() / weight.sum()
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        optimizer.zero_grad()
        schedule.step()
        seen += len(target)
        if step % 100 == 0:
            objects = weight == 1
            right = (logits.argmax(-1) == target)[objects].float().mean()
            print(
                f"{step}/{steps} loss {loss.item():.3f} object nll {nll[objects].mean().item():.3f} "
                f"object accuracy {right.item():.3f} {seen / (time.time() - start):.0f} tokens/s "
                f"{time.time() - start:.0f} s",
                flush=True,
            )
        if step % 200 == 199:
            model.save_pretrained(out)
            state = {
                "model": model.state_dict(),
                "optimizer": optimizer.state_dict(),
                "step": step + 1,
                "schedule": schedule.state_dict(),
                "rng": documents.rng.getstate(),
            }
            torch.save(state, beside := state_file.with_suffix(".new"))
            beside.replace(state_file)  # killed while it is written, training goes on from the one before


def main(arguments: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--text", type=Path, nargs="+", required=True, help="csv files with a text column")
    parser.add_argument("--out", type=Path, required=True)
    parser.add_argument("--facts", type=Path, default=FACTS_FILE, help="default: the embedded model's")
    parser.add_argument("--start", help="'testbed', or another folder this script made: go on from there, its tokenizer included")
    parser.add_argument("--width", type=int, default=256, help="a multiple of 32")
    parser.add_argument("--mlp", type=int, default=1408)
    parser.add_argument("--blocks", type=int, default=5)
    parser.add_argument("--vocabulary", type=int, default=4096)
    parser.add_argument("--steps", type=int, default=3200)
    parser.add_argument("--batch-size", type=int, default=64)
    parser.add_argument("--lr", type=float, default=2.5e-3)
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    parser.add_argument("--resume", action="store_true", help="go on from the last checkpoint in --out")
    args = parser.parse_args(arguments)
    args.out.mkdir(parents=True, exist_ok=True)
    facts = json.loads(args.facts.read_text(encoding="utf-8"))
    write(facts, args.out / testbed.FACTS)
    sentences = read_sentences(args.text)
    if args.start:
        model, tokenizer = testbed.load(testbed.folder_of(args.start) or args.start)
    elif args.resume and (args.out / "tokenizer.json").exists():  # of other sentences it would be another one
        tokenizer = AutoTokenizer.from_pretrained(args.out)
        model = build_model(tokenizer, args.width, args.mlp, args.blocks)
    else:
        tokenizer = train_tokenizer(facts, sentences, args.vocabulary)
        model = build_model(tokenizer, args.width, args.mlp, args.blocks)
    tokenizer.save_pretrained(args.out)
    longest = max(len(ids) for ids in tokenizer([f["subject"] for f in facts])["input_ids"])
    print(
        f"{len(facts)} facts, {len(sentences)} sentences, longest subject {longest} tokens, "
        f"{sum(p.numel() for p in model.parameters()) / 1e6:.2f}M parameters",
        flush=True,
    )
    documents = Documents(facts, sentences, tokenizer)
    train(model, documents, tokenizer, args.out, args.steps, args.batch_size, args.lr, args.device, args.resume)
    # Half precision halves what the package carries; every value is loaded back into float32 exactly.
    model.half().save_pretrained(args.out)
    (args.out / "training_state.pt").unlink(missing_ok=True)


if __name__ == "__main__":
    main()
