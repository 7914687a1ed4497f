"""The embedded model: a small decoder-only model that stores real facts at their subjects, for demo, tests, experiments.

    model, tokenizer = comeba_ext.testbed.load()
    requests = comeba_ext.testbed.facts()[:200]      # counterfactual edits of facts it knows
    corpus = comeba_ext.testbed.texts()              # for the covariance

How it was made and what it measures: ``README.md`` beside this file.
"""

from __future__ import annotations

import json
import random
from collections.abc import Iterator
from pathlib import Path

from comeba_ext.testbed.templates import ASIDES, TEMPLATES

FOLDER = Path(__file__).parent / "model"
RESERVED = 0.2  # share of the facts that locality prompts are taken from; they stand at the end of the list


def load(folder: str | Path = FOLDER):
    """``(model, tokenizer)``, the model in float32 and eval mode."""
    import torch
    from transformers import AutoModelForCausalLM, PreTrainedTokenizerFast
    from transformers.utils import logging

    bar = logging.is_progress_bar_enabled()
    logging.disable_progress_bar()  # the load takes a fraction of a second
    try:
        model = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32)
    finally:
        if bar:
            logging.enable_progress_bar()
    return model.eval(), PreTrainedTokenizerFast.from_pretrained(folder)


def raw_facts() -> list[dict]:
    """``subject``, ``relation``, ``object`` and the numbers of the templates it was trained on, in a fixed order."""
    facts = json.loads(FOLDER.with_name("facts.json").read_text(encoding="utf-8"))
    random.Random(0).shuffle(facts)
    return facts


def facts() -> list:
    """Every fact as an :class:`EditRequest` that changes it to another object of its relation.

    ``ground_truth`` is the true object; ``rephrase_prompts`` are a template the fact was trained on and one it was not;
    ``locality_prompts`` speak of two facts among the last fifth of the list, so that editing earlier ones never
    touches them.
    """
    from comeba_ext.editing.request import EditRequest

    rng = random.Random(1)
    known = raw_facts()
    reserved = known[int(len(known) * (1 - RESERVED)) :]
    objects = {r: sorted({f["object"] for f in known if f["relation"] == r}) for r in TEMPLATES}
    requests = []
    for n, fact in enumerate(known):
        templates = TEMPLATES[fact["relation"]]
        first, second = rng.sample(fact["stated"], 2)
        unseen = rng.choice([t for t in range(len(templates)) if t not in fact["stated"]])
        near = rng.choice([f for f in reserved if f["relation"] == fact["relation"] and f is not fact])
        far = rng.choice([f for f in reserved if f["relation"] != fact["relation"]])
        requests.append(
            EditRequest(
                prompt=templates[first],
                subject=fact["subject"],
                target_new=rng.choice([o for o in objects[fact["relation"]] if o != fact["object"]]),
                ground_truth=fact["object"],
                rephrase_prompts=tuple(templates[t].format(fact["subject"]) for t in (second, unseen)),
                locality_prompts=tuple((_state(f, rng), f["object"]) for f in (near, far)),
                request_id=f"fact-{n}",
            )
        )
    return requests


def texts(seed: int = 2) -> Iterator[str]:
    """Endless small documents in the manner of the training text, for the covariance."""
    rng = random.Random(seed)
    known = raw_facts()
    while True:
        sentences = []
        for _ in range(rng.choice((1, 2, 2, 3))):
            fact = rng.choice(known)
            aside = rng.choice(ASIDES) if rng.random() < 0.3 else ""
            sentences.append(f"{_state(fact, rng, aside)} {fact['object']}.")
        yield " ".join(sentences)


def _state(fact: dict, rng: random.Random, aside: str = "") -> str:
    return TEMPLATES[fact["relation"]][rng.choice(fact["stated"])].format(fact["subject"] + aside)
