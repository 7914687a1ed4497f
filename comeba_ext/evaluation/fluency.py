"""Fluency: the entropy of the n-grams a model writes (ROME, arXiv 2202.05262, section 3.4; "GE").

A model that an edit has broken repeats itself, and the n-grams of its texts become few.
"""

from __future__ import annotations

import math
import re
from collections import Counter

import torch

from comeba_ext.errors import ComebaError
from comeba_ext.evaluation.metrics import bootstrap_interval
from comeba_ext.evaluation.scoring import greedy, grouped_batches
from comeba_ext.forward.architectures import context_length
from comeba_ext.forward.partial import evaluating
from comeba_ext.layers.prompts import plain_generate, prompt_rewriter
from comeba_ext.text.encoding import input_device, pad, pad_id

WEIGHTS = {2: 2 / 3, 3: 4 / 3}  # of bi- and trigram entropy, before their mean


def ngram_entropy(text: str) -> float:
    """``½ Σ_n w_n · H_n`` in bits: entropy of the text's bi- and trigrams with weights 2/3 and 4/3.

    Words and punctuation marks are the units (ROME's code uses NLTK's tokenizer, which differs in contractions).
    """
    words = re.findall(r"\w+|[^\w\s]", text)
    return sum(weight * _entropy(words, n) for n, weight in WEIGHTS.items()) / len(WEIGHTS)


def fluency(model: torch.nn.Module, tokenizer, prompts: list[str], *, new_tokens: int = 50, max_tokens: int = 4096, seed: int = 0) -> dict:
    """Mean :func:`ngram_entropy` of greedy continuations, the prompt included (ROME samples them, top 5).

    Returns:
        ``fluency`` in bits and ``fluency_interval`` over the prompts.

    Raises:
        ComebaError: there is no prompt, or one leaves no room for the new tokens in the model's context.
    """
    limit = context_length(model)
    rewrite = prompt_rewriter(model) or (lambda prompt: prompt)
    rows = {prompt: tokenizer(rewrite(prompt))["input_ids"] for prompt in prompts}
    if not rows:
        raise ComebaError("no prompt to measure fluency on")
    for prompt, ids in rows.items():
        if limit is not None and len(ids) + new_tokens > limit:
            raise ComebaError(f"prompt {prompt[:40]!r}… and {new_tokens} new tokens exceed the context of {limit}")
    device = input_device(model)
    values: dict[str, float] = {}
    with evaluating(model), torch.no_grad(), greedy(model, pad_id(tokenizer)):
        for batch in grouped_batches(list(rows), max_tokens, size=lambda p: len(rows[p]) + new_tokens):
            ids, mask = pad([rows[p] for p in batch], pad_id(tokenizer), "left", device)
            out = plain_generate(model)(input_ids=ids, attention_mask=mask, max_new_tokens=new_tokens)
            texts = tokenizer.batch_decode(out[:, ids.shape[1] :], skip_special_tokens=True)
            values |= {prompt: ngram_entropy(prompt + text) for prompt, text in zip(batch, texts, strict=True)}
    found = [values[prompt] for prompt in prompts]
    return {"fluency": sum(found) / len(found), "fluency_interval": bootstrap_interval(found, seed)}


def _entropy(words: list[str], n: int) -> float:
    counts = Counter(zip(*(words[i:] for i in range(n))))
    total = sum(counts.values())
    return -sum(c / total * math.log2(c / total) for c in counts.values()) + 0.0 if total else 0.0
