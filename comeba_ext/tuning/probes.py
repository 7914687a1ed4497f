"""Facts to try settings on, and what a model says to them.

``facts.json`` holds relations with several wordings and their subjects and objects, from the data set of Hernandez et al.
(arXiv 2308.09124, MIT), without any subject that CounterFact, ZsRE or QAEdit edit, so that what is tuned here can be
measured there.
"""

from __future__ import annotations

import json
import random
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import nn
from tqdm.auto import tqdm

from comeba_ext.editing.answers import answered
from comeba_ext.forward.architectures import Architecture
from comeba_ext.forward.logits import logits_at
from comeba_ext.forward.partial import evaluating, hidden_of, with_hidden
from comeba_ext.text.encoding import encode_all, input_device, pad, pad_id
from comeba_ext.text.request import EditRequest
from comeba_ext.text.rows import target_rows

FACTS = Path(__file__).parent / "facts.json"


@dataclass(frozen=True)
class Fact:
    """A fact in one wording; ``group``: what it may be compared with."""

    prompt: str
    subject: str
    answer: str
    group: str
    others: tuple[str, ...] = ()  # other wordings

    @property
    def text(self) -> str:
        return self.prompt.replace("{}", self.subject, 1)


def shipped(seed: int = 0) -> list[Fact]:
    """The shipped facts in random order, each in its relation's first wording."""
    facts = []
    for relation in json.loads(FACTS.read_text(encoding="utf-8")):
        first, *others = relation["prompts"]
        facts += [Fact(first, subject, answer, relation["relation"], tuple(others)) for subject, answer in relation["facts"]]
    random.Random(seed).shuffle(facts)
    return facts


def of_records(records: list[EditRequest]) -> list[Fact]:
    """Facts of edit records that name their true answer."""
    return [Fact(r.prompt, r.subject, r.ground_truth, r.prompt) for r in records if r.ground_truth][:MOST]


MOST = 2000  # records that are looked at: some hundred known facts are plenty
AT_ONCE = 200


def known(model: nn.Module, tokenizer, facts: list[Fact], max_tokens: int = 4096, progress: bool = False) -> list[Fact]:
    """The facts that the model answers, every token of the answer its first choice."""
    rows = target_rows(tokenizer, [EditRequest(fact.prompt, fact.subject, fact.answer) for fact in facts], [""])
    found = []
    with evaluating(model), tqdm(total=len(facts), unit="fact", desc="known facts", disable=not progress) as bar:
        for start in range(0, len(facts), AT_ONCE):
            right = answered(model, rows[start : start + AT_ONCE], pad_id(tokenizer), max_tokens)
            found += [fact for fact, own in zip(facts[start : start + AT_ONCE], right, strict=True) if own]
            bar.update(len(right))
    return found


def trial_edits(facts: list[Fact], keep: list[Fact], count: int, seed: int = 0) -> list[EditRequest]:
    """Edits of facts to another object of their relation, with other wordings, and known facts that must stay.

    Args:
        facts: to edit, in order; those without another object in their group are passed over.
        keep: facts the model knows; of each edit's locality prompts one is of its relation and one is not, where there are.
    """
    rng = random.Random(seed)
    objects: dict[str, set[str]] = {}
    for fact in facts:
        objects.setdefault(fact.group, set()).add(fact.answer)
    edits = []
    for fact in facts:
        choices = sorted(objects[fact.group] - {fact.answer})
        if not choices or len(edits) == count:
            continue
        near = [other for other in keep if other.group == fact.group]
        far = [other for other in keep if other.group != fact.group]
        local = [rng.choice(own) for own in (near, far) if own]
        edits.append(
            EditRequest(
                fact.prompt,
                fact.subject,
                rng.choice(choices),
                ground_truth=fact.answer,
                rephrase_prompts=tuple(wording.replace("{}", fact.subject, 1) for wording in fact.others),
                locality_prompts=tuple((other.text, other.answer) for other in local),
                request_id=f"trial-{len(edits)}",
            )
        )
    return edits


@torch.no_grad()
def patching(model: nn.Module, tokenizer, architecture: Architecture, facts: list[Fact], pairs: int = 40, seed: int = 0) -> list[float]:
    """Share of prompts that answer with another subject's object once the residual stream after a block, at the subject's
    last token only, is that subject's: one number a block.

    Args:
        facts: known ones; pairs are of one wording and begin their answers differently.
    """
    rng = random.Random(seed)
    first = {fact: _first_token(tokenizer, fact) for fact in facts}
    groups: dict[tuple, list[Fact]] = {}
    for fact in facts:
        groups.setdefault((fact.group, fact.prompt), []).append(fact)
    choices = [(a, b) for own in groups.values() for a in own for b in own if first[a] != first[b]]
    rng.shuffle(choices)
    found = choices[:pairs]
    if not found:
        return []
    blocks = list(model.get_submodule(architecture.blocks))
    device = input_device(model)
    sides = [[pair[side] for pair in found] for side in (0, 1)]  # receivers, donors
    encoded = [encode_all(tokenizer, [(f.text, None, f.prompt.index("{}") + len(f.subject)) for f in own]) for own in sides]
    inputs = [pad([e.ids for e in own], pad_id(tokenizer), device=device) for own in encoded]
    places = [torch.tensor([e.subject_last for e in own], device=device) for own in encoded]
    ends = [mask.sum(1) - 1 for _, mask in inputs]
    rows = torch.arange(len(found), device=device)
    wanted = torch.tensor([first[donor] for _, donor in found], device=device)
    taken: dict[int, torch.Tensor] = {}

    def take(n):
        def hook(module, args, output):
            hidden = hidden_of(output)
            taken[n] = hidden[at(1, hidden)].clone()

        return hook

    def at(side: int, hidden: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        return rows.to(hidden.device), places[side].to(hidden.device)  # blocks may be on several GPUs

    def put(n):
        def hook(module, args, output):
            hidden = hidden_of(output).clone()
            hidden[at(0, hidden)] = taken[n].to(hidden)
            return with_hidden(output, hidden)

        return hook

    def run(side: int) -> torch.Tensor:
        ids, mask = inputs[side]
        logits = logits_at(model, {"input_ids": ids, "attention_mask": mask}, [[end] for end in ends[side].tolist()])
        return torch.cat(logits).argmax(-1)

    with evaluating(model):
        handles = [block.register_forward_hook(take(n)) for n, block in enumerate(blocks)]
        try:
            run(1)
        finally:
            for handle in handles:
                handle.remove()
        flips = []
        for n, block in enumerate(blocks):
            handle = block.register_forward_hook(put(n))
            try:
                flips.append((run(0) == wanted).double().mean().item())
            finally:
                handle.remove()
    return flips


def _first_token(tokenizer, fact: Fact) -> int:
    (encoded,) = encode_all(tokenizer, [(fact.text, fact.answer, None)])
    return encoded.target_ids[0]
