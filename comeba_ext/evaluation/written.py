"""What a model writes of its own accord, and whether that is the answer.

Scores that feed the target while they measure, or cut the answer at its length, say how a model continues; they do not say
what a user reads (Yang et al., "The Mirage of Model Editing", arXiv 2502.11177). So here the model gets the prompt alone, writes
greedily to a natural end, and what stands there is compared as text:

* *written*: the answer is the target or one of its aliases, or opens with it (word by word);
* *contained*: one of them stands somewhere in the answer, which a wrong answer can do as well ("not Paris but Rome").

Both compare normalised text: lower case, without punctuation, articles (a, an, the) and needless space, as SQuAD's metric does
(Rajpurkar et al. 2016), but punctuation of any script.
"""

from __future__ import annotations

import re
import unicodedata
from collections.abc import Callable, Iterable
from dataclasses import dataclass

import torch
from transformers import StoppingCriteria, StoppingCriteriaList

from comeba_ext.errors import ComebaError
from comeba_ext.evaluation.scoring import Query, greedy, grouped_batches
from comeba_ext.forward.architectures import context_length
from comeba_ext.forward.logits import room_for_logits
from comeba_ext.forward.partial import evaluating
from comeba_ext.layers.prompts import plain_generate
from comeba_ext.text.chat import in_chat
from comeba_ext.text.encoding import input_device, pad, pad_id

ANSWER_TOKENS, LONG_TOKENS = 32, 256  # at most; of paragraphs
_ABBREVIATIONS = frozenset("st mr mrs ms dr prof gen col lt sgt capt rev hon jr sr inc ltd co corp vs etc ca approx dept univ".split())
_END = re.compile(r"([.!?]+)[\"'”’)\]]*(?=\s|$)|[。！？]+[\"'”’」』)\]]*|\n")
_ARTICLE = re.compile(r"\b(a|an|the)\b")


def natural_end(text: str) -> int | None:
    """Where the first sentence or line of an answer ends; ``None`` while it has not.

    A full stop behind an initial or a usual abbreviation ("J. K. Rowling", "St. Louis") ends nothing, nor does one that the text
    stops at: what comes next would tell. An exclamation or question mark does.
    """
    begin = len(text) - len(text.lstrip())
    for found in _END.finditer(text, begin):
        if found[0] == "\n":
            return found.start()
        if found[1] == ".":
            word = re.search(r"[^\W\d_]*$", text[: found.start()])[0]
            initial = len(word) == 1 and word.isupper()
            if initial or word.lower() in _ABBREVIATIONS or found.end() == len(text):
                continue
        return found.end()
    return None


def answer_of(text: str) -> str:
    """What was written, up to its natural end."""
    return text[: natural_end(text)].strip()


def normalised(text: str) -> str:
    """Words in lower case, without punctuation and articles, a space between two."""
    text = "".join(c for c in unicodedata.normalize("NFKC", text).lower() if not unicodedata.category(c).startswith("P"))
    return " ".join(_ARTICLE.sub(" ", text).split())


def is_written(answer: str, targets: Iterable[str]) -> bool:
    """Whether an answer is one of the targets or opens with it."""
    return any(f"{normalised(answer)} ".startswith(f"{own} ") for own in filter(None, map(normalised, targets)))


def is_contained(answer: str, targets: Iterable[str]) -> bool:
    """Whether one of the targets stands in an answer."""
    return any(f" {own} " in f" {normalised(answer)} " for own in filter(None, map(normalised, targets)))


def likeness() -> Callable[[str, str], float]:
    """A function of an answer and a target: F1 of their longest common subsequence of normalised words (ROUGE-L, Lin 2004).

    Raises:
        ComebaError: the package ``rouge_score`` is not installed.
    """
    try:
        from rouge_score.rouge_scorer import RougeScorer
    except ImportError:
        raise ComebaError("the likeness of paragraphs needs rouge-score: pip install 'comeba_ext[rouge]'") from None
    scorer = RougeScorer(["rougeL"], tokenizer=_Words())
    return lambda answer, target: scorer.score(target, answer)["rougeL"].fmeasure


class _Words:
    """Its own would keep Latin letters only."""

    def tokenize(self, text: str) -> list[str]:
        return normalised(text).split()


@dataclass(frozen=True)
class Writing:
    """How a model is let write.

    Args:
        answer_tokens: how many tokens at most.
        chat: put every prompt into the tokenizer's chat template first, as a user's turn.
        long: answers are paragraphs: let it write on past the end of a sentence or line, and score the likeness too
            (:func:`likeness`).
    """

    answer_tokens: int = ANSWER_TOKENS
    chat: bool = False
    long: bool = False

    def ids(self, tokenizer, prompt: str) -> tuple[int, ...]:
        """A prompt's tokens.

        Raises:
            RequestError: it has none, or there is no chat template.
        """
        if self.chat:
            return tuple(tokenizer(in_chat(tokenizer, prompt), add_special_tokens=False)["input_ids"])
        return Query.of(tokenizer, prompt, None).prompt_ids

    def answers(
        self, model: torch.nn.Module, tokenizer, prompts: Iterable[tuple[int, ...]], *, max_tokens: int, bar=None
    ) -> dict[tuple[int, ...], str]:
        """What a model writes behind each prompt, greedily, up to its natural end (:func:`natural_end`; not if ``long``), an end
        token, ``answer_tokens`` tokens, or the end of its context.

        Args:
            prompts: of :meth:`ids`; equal ones are run once.
            max_tokens: padded tokens of a batch, written ones counted.
            bar: progress bar to advance, one step a prompt.
        """
        found: dict[tuple[int, ...], str] = {}
        context, pad_token = context_length(model), pad_id(tokenizer)
        room = lambda ids: self.answer_tokens if context is None else max(1, min(self.answer_tokens, context - len(ids)))  # noqa: E731
        ends = sorted({tokenizer.eos_token_id, *_listed(getattr(model, "generation_config", None))} - {None})
        batches = grouped_batches(
            list(dict.fromkeys(prompts)), room_for_logits(model, max_tokens), size=lambda ids: len(ids) + self.answer_tokens, group=room
        )
        with evaluating(model), torch.no_grad(), greedy(model, pad_token):
            for batch in batches:
                ids, mask = pad([list(own) for own in batch], pad_token, "left", input_device(model))
                output = plain_generate(model)(
                    input_ids=ids,
                    attention_mask=mask,
                    do_sample=False,
                    num_beams=1,
                    max_new_tokens=room(batch[0]),
                    pad_token_id=pad_token,
                    eos_token_id=ends or None,
                    stopping_criteria=None if self.long else StoppingCriteriaList([_AtNaturalEnds(tokenizer, ids.shape[1])]),
                )
                for prompt, own in zip(batch, output[:, ids.shape[1] :].tolist(), strict=True):
                    own = own[: next((n for n, token in enumerate(own) if token in ends), len(own))]
                    text = _decoded(tokenizer, own)
                    found[prompt] = text.strip() if self.long else answer_of(text)
                if bar is not None:
                    bar.update(len(batch))
        return found


class _AtNaturalEnds(StoppingCriteria):
    """Every row is done where its answer is."""

    def __init__(self, tokenizer, start: int):
        self.tokenizer, self.start = tokenizer, start

    def __call__(self, input_ids: torch.Tensor, scores: torch.Tensor, **_) -> torch.Tensor:
        rows = input_ids[:, self.start :].tolist()
        return torch.tensor([natural_end(_decoded(self.tokenizer, row)) is not None for row in rows], device=input_ids.device)


def _decoded(tokenizer, ids: list[int]) -> str:
    return tokenizer.decode(ids, skip_special_tokens=True, clean_up_tokenization_spaces=False)


def _listed(config) -> list:
    """A generation config's end tokens."""
    value = getattr(config, "eos_token_id", None)
    return list(value) if isinstance(value, (list, tuple)) else [value]
