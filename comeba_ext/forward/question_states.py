"""What a prompt asks, as the unedited model knows it at the prompt's last token.

The key at a subject's last token is the same whatever is asked about the subject. The last token of the question is not: the input of
an MLP nine tenths up the model, less its mean over other questions about the same subject, points one way for the same question in other
words, and elsewhere for others. The mean is of questions of the prompt's own form, since how it ends tells more of a state than what it
asks; and two prompts are compared in two :data:`VIEWS`, the first of which tells openings of statements apart better and the second
questions. How near two of them are is then comparable whatever their forms, but for two questions, from which :data:`SHIFT` is taken
(findings, R11).
"""

from __future__ import annotations

import re
from typing import NamedTuple

import torch
from torch import nn
from torch.nn import functional as F

from comeba_ext.forward.architectures import Architecture, context_length
from comeba_ext.forward.partial import evaluating, inputs_at_ends
from comeba_ext.text.encoding import input_device, pad_id
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
    """

    asked: torch.Tensor
    usual: torch.Tensor
    form: torch.Tensor


def asked_about(decoder: nn.Module, place: str, tokenizer, prompts: list[str], subject: str) -> Asked:
    """Of an edit's prompts, a row each."""
    others = [usual.replace(SLOT, subject) for form in USUAL for usual in form]
    states = question_states(decoder, place, tokenizer, [*(sentence_of(prompt, subject) for prompt in prompts), *others])
    usual, form = states[len(prompts) :].unflatten(0, (len(USUAL), -1)).mean(1), torch.tensor([form_of(prompt) for prompt in prompts])
    return Asked(states[: len(prompts)] - usual[form], usual.expand(len(prompts), *usual.shape), form)


def form_of(prompt: str) -> int:
    """Number of a prompt's form in :data:`USUAL`."""
    return int(prompt.rstrip().endswith("?"))


def nearness(prompt: str, state: torch.Tensor, edits: Asked) -> torch.Tensor:
    """How near what a prompt asks is to what edits' prompts ask, ``(edits,)``: mean over the views of the cosine, less :data:`SHIFT` where
    both are questions.

    Args:
        state: of the prompt, ``(views, d)``.
    """
    form = form_of(prompt)
    near = F.cosine_similarity(state - edits.usual[:, form], edits.asked, dim=-1).mean(-1)
    return near - SHIFT * form * edits.form


def sentence_of(prompt: str, subject: str) -> str:
    """A prompt from the beginning of the sentence in which it names a subject last: what stands before may be about anything."""
    at = prompt.lower().rfind(subject.lower())
    ends = [match.end() for match in re.finditer(r"[.!?]\s+|\n+", prompt[: max(at, 0)])]
    return prompt[ends[-1] :] if ends else prompt
