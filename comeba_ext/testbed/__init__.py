"""The embedded model: a small decoder-only model that stores real facts at their subjects, for demo, tests, experiments.

    model, tokenizer = comeba_ext.testbed.load()
    requests = comeba_ext.testbed.facts()[:200]      # counterfactual edits of facts it knows
    corpus = comeba_ext.testbed.texts()              # for the covariance,
    comeba_ext.testbed.covariance(model, tokenizer)  # or the covariance itself, kept in the user's cache

How it was made and what it measures: ``README.md`` beside this file.
"""

from __future__ import annotations

import hashlib
import json
import random
from collections.abc import Iterator
from contextlib import nullcontext, suppress
from pathlib import Path

from comeba_ext.errors import ComebaError, CovarianceError, StorageError
from comeba_ext.testbed.templates import ALL, ASIDES, SECOND, TEMPLATES

FOLDER = Path(__file__).parent / "model"
FACTS = "facts.json"  # beside a model; by it the folder is known as a testbed
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


def folder_of(name: str) -> Path | None:
    """Where the model is: ``"testbed"``, or a folder that ``train.py`` made, with its facts; ``None`` for any other model."""
    if name == "testbed":
        return FOLDER
    return Path(name) if all((Path(name) / file).is_file() for file in (FACTS, "config.json")) else None


def datasets(folder: str | Path = FOLDER) -> dict[str, list]:
    """What to edit in experiments, by name: the facts that no locality prompt speaks of.

    ``testbed``: locality is asked of other subjects. ``same subject`` (models with second facts only): of the edited
    subjects' other fact.
    """
    found = {"testbed": facts(folder)}
    if second_facts(folder):
        found["same subject"] = facts(folder, same_subject=True)
    return {name: requests[: int(len(requests) * (1 - RESERVED))] for name, requests in found.items()}


def raw_facts(folder: str | Path = FOLDER) -> list[dict]:
    """``subject``, ``relation``, ``object`` and the numbers of the templates it was trained on, in a fixed order."""
    facts = [fact for fact in all_facts(folder) if fact["relation"] not in SECOND]
    random.Random(0).shuffle(facts)
    return facts


def second_facts(folder: str | Path = FOLDER) -> dict[str, dict]:
    """The second facts by subject; the embedded model knows none."""
    return {fact["subject"]: fact for fact in all_facts(folder) if fact["relation"] in SECOND}


def all_facts(folder: str | Path = FOLDER) -> list[dict]:
    """What the folder says the model was taught."""
    return json.loads((Path(folder) / FACTS).read_text(encoding="utf-8"))


def facts(folder: str | Path = FOLDER, *, same_subject: bool = False) -> list:
    """Every fact as an :class:`EditRequest` that changes it to another object of its relation.

    ``ground_truth`` is the true object; ``rephrase_prompts`` are a template the fact was trained on and one it was not;
    ``locality_prompts`` speak of two facts among the last fifth of the list, so that editing earlier ones never
    touches them; with ``same_subject`` of the edited subject's own second fact, in two wordings.

    Raises:
        ComebaError: ``same_subject``, and the model knows one fact a subject (as the embedded model does).
    """
    from comeba_ext.text.request import EditRequest

    rng, apart = random.Random(1), random.Random(2)  # the edits are the same either way
    known, more = raw_facts(folder), second_facts(folder)
    if same_subject and not more:
        raise ComebaError(f"{folder}: the model was taught one fact a subject; see testbed/README.md for one with two")
    reserved = known[int(len(known) * (1 - RESERVED)) :]
    objects = {r: sorted({f["object"] for f in known if f["relation"] == r}) for r in TEMPLATES}
    of = {r: [f for f in reserved if f["relation"] == r] for r in TEMPLATES}
    others = {r: [f for f in reserved if f["relation"] != r] for r in TEMPLATES}
    requests = []
    for n, fact in enumerate(known):
        templates = TEMPLATES[fact["relation"]]
        first, second = rng.sample(fact["stated"], 2)
        unseen = rng.choice([t for t in range(len(templates)) if t not in fact["stated"]])
        near = rng.choice([f for f in of[fact["relation"]] if f is not fact])
        far = rng.choice(others[fact["relation"]])
        target = rng.choice([o for o in objects[fact["relation"]] if o != fact["object"]])
        local = [(_state(f, rng), f["object"]) for f in (near, far)]
        if same_subject:
            other = more[fact["subject"]]
            wordings = apart.sample(SECOND[other["relation"]], 2)
            local = [(wording.format(other["subject"]), other["object"]) for wording in wordings]
        requests.append(
            EditRequest(
                prompt=templates[first],
                subject=fact["subject"],
                target_new=target,
                ground_truth=fact["object"],
                rephrase_prompts=tuple(templates[t].format(fact["subject"]) for t in (second, unseen)),
                locality_prompts=tuple(local),
                request_id=f"fact-{n}",
            )
        )
    return requests


def texts(seed: int = 2, folder: str | Path = FOLDER) -> Iterator[str]:
    """Endless small documents in the manner of the training text, for the covariance."""
    rng = random.Random(seed)
    known = raw_facts(folder) + list(second_facts(folder).values())
    while True:
        sentences = []
        for _ in range(rng.choice((1, 2, 2, 3))):
            fact = rng.choice(known)
            aside = rng.choice(ASIDES) if rng.random() < 0.3 else ""
            sentences.append(f"{_state(fact, rng, aside)} {fact['object']}.")
        yield " ".join(sentences)


def covariance(model, tokenizer, folder: str | Path = FOLDER, *, progress: bool = False):
    """The :class:`Covariance` of every block in as many tokens of :func:`texts` as is usual; kept in the user's cache.

    It is collected once a model and read from then on, which is what makes a second ``comeba demo`` begin at once. Where the
    cache cannot be written it is collected every time.
    """
    from filelock import FileLock

    from comeba_ext import distributed
    from comeba_ext.covariance import covariance_of_blocks
    from comeba_ext.forward.architectures import Architecture
    from comeba_ext.kernels.loader import cache_folder
    from comeba_ext.storage import identity

    architecture = Architecture.of(model)
    blocks = range(architecture.num_blocks(model))
    about = json.dumps(identity(model, [architecture.projection_name(block) for block in blocks]), sort_keys=True)
    path = cache_folder() / f"covariance-{hashlib.sha256(about.encode()).hexdigest()[:16]}.safetensors"

    def collected(path: Path | None):
        return covariance_of_blocks(model, tokenizer, texts(folder=folder), blocks, architecture, path=path, progress=progress)

    try:
        path.parent.mkdir(mode=0o755, parents=True, exist_ok=True)  # not for others to write: compiled kernels lie there, too
        # One of several commands collects, the others find it; the processes of one collect together.
        with FileLock(path.with_suffix(".lock")) if distributed.rank() == 0 else nullcontext():
            try:
                return collected(path)
            except (CovarianceError, StorageError):  # damaged, or of another version's texts
                found = collected(None)
                with suppress(StorageError):
                    found.save(path)
                return found
    except OSError:
        return collected(None)


def _state(fact: dict, rng: random.Random, aside: str = "") -> str:
    return ALL[fact["relation"]][rng.choice(fact["stated"])].format(fact["subject"] + aside)
