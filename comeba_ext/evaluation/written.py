"""What a model writes of its own accord, and whether that is the answer.

Scores that feed the target while they measure, or cut the answer at its length, say how a model continues; they do not say
what a user reads (Yang et al., "The Mirage of Model Editing", arXiv 2502.11177). So here the model gets the prompt alone, writes
greedily to a natural end, and what stands there is compared as text:

* *written*: the answer is the target or one of its aliases, or opens with it (word by word);
* *contained*: one of them stands somewhere in the answer, which a wrong answer can do as well ("not Paris but Rome").

Both compare normalised text (:func:`normalised`): as SQuAD's metric (Rajpurkar et al. 2016) without case, punctuation, articles and
needless space, but for any script, and without its mistakes: numbers keep their sign and point, "Hepatitis A" its letter, and words that a
dash or a slash joins stay two.
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
_ABBREVIATIONS = frozenset(
    "st mr mrs ms dr prof gen col lt sgt capt rev hon jr sr inc ltd co corp bros vs etc ca approx dept univ mt ft gov sen rep ave".split()
)
_BEFORE_NUMBERS = frozenset("no nos vol op pp p c jan feb mar apr jun jul aug sep sept oct nov dec".split())
_END = re.compile(r"([.!?]+)[\"'”’)\]]*(?=\s|$)|[。！？]+[\"'”’」』)\]]*|\n")
_WORD = re.compile(r"\w")
_ARTICLES = ("a", "an", "the")
_APOSTROPHES = dict.fromkeys(map(ord, "'’‘ʼ´`′"))  # deleted; the first change of form would make others of some
_INITIALS = re.compile(r"(?<=[^\W\d_])\.+")  # "U.S.A." is one word
_THOUSANDS = re.compile(r"(?<=\d),(?=\d{3}(?!\d))")
_OF_NUMBERS = re.compile(r"(?<=\d)\.(?=\d)|(?<![\w)])[-−](?=\d)")  # a decimal point, a sign
_WRITTEN_TOGETHER = re.compile("[\u3005-\u3007\u3040-\u30ff\u3400-\u4dbf\u4e00-\u9fff\uf900-\ufaff\U00020000-\U0003ffff]")
SHORT = 3  # letters of an alias that must be written in its own case: "it" is no Italian, nor "no" Norwegian


def natural_end(text: str) -> int | None:
    """Where the first sentence or line of an answer ends; ``None`` while it has not.

    Nothing ends before a first word: behind "who wrote it" a model may set the question mark first. A full stop behind an initial or a
    usual abbreviation ("J. K. Rowling", "St. Louis", "No. 5") or a list's number ends nothing, nor does one that the text stops at: what
    comes next would tell. An exclamation or question mark does.
    """
    if (first := _WORD.search(text)) is None:
        return None
    begin = first.start()
    for found in _END.finditer(text, begin):
        if found[0] == "\n":
            return found.start()
        if found[1] == ".":
            head, tail = text[begin : found.start()], text[found.end() :].lstrip()
            word = re.search(r"[^\W\d_]*$", head)[0]
            initial = len(word) == 1 and word.isupper()
            numbered = word.lower() in _BEFORE_NUMBERS and (not tail or tail[0].isdigit())
            listed = len(head) <= 2 and head.isdigit()
            if initial or numbered or listed or word.lower() in _ABBREVIATIONS or found.end() == len(text):
                continue
        return found.end()
    return None


def answer_of(text: str) -> str:
    """What was written, up to its natural end."""
    return text[: natural_end(text)].strip()


def normalised(text: str) -> str:
    """Words in lower case, a space between two, without punctuation, accents of Latin letters, and articles, which stay where they are the
    last word ("Serie A"). Characters of scripts without spaces are words of their own."""
    return _without_articles(_words(text))


def _words(text: str, cased: bool = False) -> list[str]:
    text = unicodedata.normalize("NFKC", text.translate(_APOSTROPHES))
    if not cased:
        text = unicodedata.normalize("NFKC", text.casefold())
    text = "".join(c for c in _unaccented(text) if unicodedata.category(c) not in ("Cf", "Sk")).translate(_APOSTROPHES)
    text = _THOUSANDS.sub("", _INITIALS.sub("", text))
    kept = {found.start() for found in _OF_NUMBERS.finditer(text)}
    dash = lambda c: c == "−" or unicodedata.category(c).startswith("P")  # noqa: E731
    text = "".join((c if c == "." else "-") if n in kept else " " if dash(c) else c for n, c in enumerate(text))
    return _WRITTEN_TOGETHER.sub(r" \g<0> ", text).split()


def _unaccented(text: str) -> str:
    """Latin letters without their accents; other scripts' marks are letters of theirs."""
    found: list[str] = []
    for c in unicodedata.normalize("NFD", text):
        if not (unicodedata.combining(c) and found and unicodedata.name(found[-1], "").startswith("LATIN")):
            found.append(c)
    return unicodedata.normalize("NFC", "".join(found))


def _without_articles(words: list[str]) -> str:
    return " ".join(word for n, word in enumerate(words) if word.lower() not in _ARTICLES or n == len(words) - 1)


def _agree(answer: str, names: Iterable[str], rule: Callable[[str, str], bool]) -> bool:
    """Whether a rule holds for an answer and one of the names, both with a space at the end, with articles or without."""
    for n, name in enumerate(names):
        letters = name.strip().replace(".", "")  # "U.S." is read as "US"
        cased = n > 0 and len(letters) <= SHORT and letters.isalpha()
        own, whole = _words(name, cased), _words(answer, cased)
        if not own:  # signs only, which are compared as they are
            own, whole = name.split(), answer.split()
        if own and any(rule(f"{way(whole)} ", f"{way(own)} ") for way in (" ".join, _without_articles)):
            return True
    return False


def is_written(answer: str, names: Iterable[str]) -> bool:
    """Whether an answer is one of the names or opens with it.

    Args:
        names: the target, and then its aliases; one of up to ``SHORT`` letters must be written in its case.
    """
    return _agree(answer, names, str.startswith)


def is_contained(answer: str, names: Iterable[str]) -> bool:
    """Whether one of the names (of :func:`is_written`) stands in an answer."""
    return _agree(answer, names, lambda whole, own: f" {own}" in f" {whole}")


def is_same(answer: str, before: str) -> bool:
    """Whether two answers are equal as normalised; without a word in them, as they are: ",,," is no "."."""
    own = normalised(answer)
    return own == normalised(before) and bool(own or answer.split() == before.split())


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

    def fits(self, tokenizer, names: Iterable[str]) -> bool:
        """Whether one of a prompt's right answers can be written so at all: none can that is longer than what may be written, or that
        has a sentence's end in the middle ("Yahoo! Inc.")."""
        ends = lambda name: not self.long and (natural_end(name) or len(name)) < len(name.rstrip())  # noqa: E731
        size = lambda name: len(tokenizer(f" {name}", add_special_tokens=False)["input_ids"])  # noqa: E731
        return any(not ends(name) and size(name) <= self.answer_tokens for name in map(str.strip, names))

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
