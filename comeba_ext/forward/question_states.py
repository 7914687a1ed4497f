"""What a prompt asks, as the unedited model knows it at the prompt's last token.

The key at a subject's last token is the same whatever is asked about the subject. The last token of the question is not: the input of
an MLP nine tenths up the model, less its mean over other questions about the same subject, points one way for the same question in other
words, and elsewhere for others. The mean is of questions of the prompt's own form, since how it ends tells more of a state than what it
asks; and two prompts are compared in two :data:`VIEWS`, the first of which tells openings of statements apart better and the second
questions. How near two of them are is then comparable whatever their forms, but for two questions, from which :data:`SHIFT` is taken
(findings, R11).
"""

from __future__ import annotations

import hashlib
import re
from typing import NamedTuple

import torch
from torch import nn
from torch.nn import functional as F

from comeba_ext.forward.architectures import Architecture, context_length
from comeba_ext.forward.partial import evaluating, inputs_at_ends
from comeba_ext.text.encoding import input_device, pad_id
from comeba_ext.text.names import forms_of, places_of
from comeba_ext.text.request import SLOT

DEPTH = 0.9  # of the model's blocks
VIEWS = ("{}", "Question: {}\nThis question is about the")
USUAL = (  # what may be asked about anything, whose mean is taken off: openings of statements, and questions
    ("{} was born in", "{} works as a", "{} is located in", "The language of {} is", "The owner of {} is"),
    ("Where was {} born?", "What does {} work as?", "Where is {} located?", "What is the language of {}?", "Who is the owner of {}?"),
)
SHIFT = 0.2  # two questions are nearer to each other than two openings, or an opening and a question, whatever they ask
MAX_TOKENS = 4096  # of a pass


def place_of(model: nn.Module, architecture: Architecture) -> tuple[str, int]:
    """Name, inside the decoder, of the MLP whose input is looked at, and how wide that is."""
    name, width = architecture.mlp(model, int(DEPTH * architecture.num_blocks(model)))
    return name.removeprefix(f"{architecture.decoder}."), width


def question_states(decoder: nn.Module, place: str, tokenizer, prompts: list[str]) -> torch.Tensor:
    """Inputs of a module at the last tokens of prompts, in every view.

    Args:
        decoder: of a model whose edits are off in this thread.
        place: name of the module inside of it (:func:`place_of`).

    Returns:
        ``(prompts, views, d)``, float32, on the host.
    """
    limit = context_length(decoder) or 0
    rows = tokenizer([view.replace(SLOT, prompt.rstrip()) for prompt in prompts for view in VIEWS])["input_ids"]
    rows = [row[-limit:] for row in rows]  # what a question ends with tells it; 0: all of it
    with evaluating(decoder):
        found = inputs_at_ends(decoder, {place: decoder.get_submodule(place)}, rows, pad_id(tokenizer), MAX_TOKENS, input_device(decoder))
    return found[place].float().cpu().reshape(len(prompts), len(VIEWS), -1)


class Asked(NamedTuple):
    """What prompts ask, and what is to be taken off of whatever is compared with it.

    Attributes:
        asked: ``(edits, views, d)``.
        usual: ``(edits, forms, views, d)``, means over what else may be asked about the subject.
        form: ``(edits,)`` int64, of the prompts (:func:`form_of`).
        said: ``(edits,)`` int64, :func:`hash_of` their sentences; ``None`` or 0: not known.
    """

    asked: torch.Tensor
    usual: torch.Tensor
    form: torch.Tensor
    said: torch.Tensor | None = None


def asked_about(decoder: nn.Module, place: str, tokenizer, prompts: list[str], subject: str) -> Asked:
    """Of an edit's prompts, a row each."""
    return asked_of_all(decoder, place, tokenizer, [(prompts, subject)])


def asked_of_all(decoder: nn.Module, place: str, tokenizer, edits: list[tuple[list[str], str]]) -> Asked:
    """Of several edits' prompts, a row each, in order. They are read together, and what is usual about a subject once.

    Args:
        edits: the prompts of each, and its subject.
    """
    pairs = [(sentence_of(prompt, subject), subject) for prompts, subject in edits for prompt in prompts]
    others = {subject: [usual.replace(SLOT, subject) for form in USUAL for usual in form] for _, subject in pairs}
    texts = list(dict.fromkeys([*(sentence for sentence, _ in pairs), *(other for own in others.values() for other in own)]))
    states = dict(zip(texts, question_states(decoder, place, tokenizer, texts), strict=True))
    each = {subject: torch.stack([states[other] for other in own]) for subject, own in others.items()}
    usual = torch.stack([each[subject].unflatten(0, (len(USUAL), -1)).mean(1) for _, subject in pairs])
    form = torch.tensor([form_of(sentence) for sentence, _ in pairs])
    asked = torch.stack([states[sentence] for sentence, _ in pairs]) - usual[torch.arange(len(pairs)), form]
    return Asked(asked, usual, form, torch.tensor([hash_of(sentence) for sentence, _ in pairs]))


def form_of(prompt: str) -> int:
    """Number of a prompt's form in :data:`USUAL`."""
    return int(prompt.rstrip().endswith("?"))


def hash_of(sentence: str) -> int:
    """By which an edit's own prompt is known again, as int64: in half precision, states of one text in two batches can be 0.12 apart."""
    return int.from_bytes(hashlib.blake2b(sentence.rstrip().encode(), digest_size=8).digest(), "big", signed=True)


def nearness(prompt: str, state: torch.Tensor, edits: Asked) -> torch.Tensor:
    """How near what a prompt asks is to what edits' prompts ask, ``(edits,)``: mean over the views of the cosine, less :data:`SHIFT` where
    both are questions; 1 where it is an edit's own prompt, which any floor lets through.

    Args:
        state: of the prompt, ``(views, d)``.
    """
    form = form_of(prompt)
    near = F.cosine_similarity(state - edits.usual[:, form], edits.asked, dim=-1).mean(-1)
    near = near - SHIFT * form * edits.form
    return near if edits.said is None else torch.where(edits.said == hash_of(prompt), 1.0, near)


def sentence_of(prompt: str, subject: str) -> str:
    """A prompt from the beginning of the sentence in which it names a subject last: what stands before may be about anything."""
    at = max((place.start() for form in forms_of(subject) for place in places_of(form, prompt)), default=prompt.rfind(subject))
    ends = [match.end() for match in re.finditer(r"[.!?]\s+|\n+", prompt[: max(at, 0)])]
    return prompt[ends[-1] :] if ends else prompt
