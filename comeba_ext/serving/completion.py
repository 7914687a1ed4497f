"""What a model writes behind rows of tokens: ``generate``, with the seeds, stops, log probabilities and streams that a server's clients
ask for."""

from __future__ import annotations

import threading
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field

import torch
from torch import nn
from transformers import (
    LogitsProcessor,
    LogitsProcessorList,
    StoppingCriteria,
    StoppingCriteriaList,
    TemperatureLogitsWarper,
    TopKLogitsWarper,
    TopPLogitsWarper,
)

from comeba_ext.errors import RequestError
from comeba_ext.forward.architectures import context_length
from comeba_ext.forward.logits import logits_at
from comeba_ext.layers.prompts import plain_generate
from comeba_ext.text.encoding import input_device, pad, pad_id
from comeba_ext.text.prefixes import Drawn

IMPOSSIBLE = -9999.0  # log probability of what cannot be, as OpenAI writes it: JSON has no infinity
Stream = Callable[[int, str], None]  # row, what is new of its text


@dataclass(frozen=True)
class Sampling:
    """How to continue.

    Args:
        max_new_tokens: at most; 0: only score (``echo``).
        fit: fewer, where the model's context has no room for as many.
        temperature, top_k, top_p: ``None``: as in the model's generation configuration, that is what ``generate`` does. A temperature of 0
            is greedy.
        seed: of the draws: those of ``torch.manual_seed(seed)`` before ``generate(do_sample=True)``; ``None``: others every time.
        stop: texts to end before.
        n: continuations of every prompt.
        logprobs: note the log probability of every token, and of so many that were likeliest in its place.
        echo: note those of the prompt's tokens, too.
    """

    max_new_tokens: int = 16
    temperature: float | None = None
    top_p: float | None = None
    top_k: int | None = None
    seed: int | None = None
    stop: tuple[str, ...] = ()
    n: int = 1
    logprobs: int | None = None
    echo: bool = False
    fit: bool = False


class Cancelled(Exception):
    """Nobody waits for the text any more."""


@dataclass
class Scored:
    """A token with its log probability, ``None`` where nothing is before it, and the likeliest ones of its place, best first."""

    token: int
    logprob: float | None
    top: list[tuple[int, float]] = field(default_factory=list)


@dataclass
class Completion:
    """What was written behind one prompt.

    Attributes:
        prompt: its tokens; tokens: those written, with the one that ended the text.
        text: what they say, up to a stop.
        finish_reason: ``"stop"``, or ``"length"`` where it could have gone on.
        scored: with ``logprobs``: of ``tokens``; behind those of ``prompt`` with ``echo``.
    """

    prompt: list[int]
    tokens: list[int]
    text: str
    finish_reason: str
    scored: list[Scored]


def complete(
    model: nn.Module,
    tokenizer,
    rows: Sequence[list[int]],
    sampling: Sampling,
    stream: Stream | None = None,
    cancel: threading.Event | None = None,
) -> list[Completion]:
    """Continuations of rows of tokens, ``n`` of the first, ``n`` of the second, ….

    Args:
        stream: called from this thread, as soon as there is more text of a row; what it raises ends the generation.
        cancel: once it is set, no further token is written.

    Raises:
        Cancelled: it was set.
        RequestError: a row is empty, has tokens that the model does not know, or leaves no room in its context; or the model wrote NaN.
    """
    for row in rows:
        check_tokens(model, row)
    limit = context_length(model)
    longest, new = max(map(len, rows), default=0), sampling.max_new_tokens
    if limit is not None:
        new = min(new, max(limit - longest, 1)) if sampling.fit else new
        if longest + new > limit:
            raise RequestError(f"the model's context is {limit} tokens; the prompt has {longest}, and {new} are to be written")
    wanted = [row for row in rows for _ in range(sampling.n)]
    device = input_device(model)
    writing = _Writing(model, tokenizer, wanted, sampling, stream, cancel or threading.Event())
    if new:
        ids, mask = pad(wanted, pad_id(tokenizer), "left", device)
        plain_generate(model)(
            input_ids=ids,
            attention_mask=mask,
            logits_processor=LogitsProcessorList([_Noted(writing), *_chosen(model, sampling, device)]),
            stopping_criteria=StoppingCriteriaList([writing]),
            max_new_tokens=new,
            do_sample=False,  # it is Drawn that samples
            num_beams=1,
            temperature=None,
            top_p=None,
            top_k=None,
            pad_token_id=pad_id(tokenizer),
        )
    writing.end()
    if sampling.echo and sampling.logprobs is not None:
        for n, row in enumerate(rows):
            scored = _of_prompt(model, row, sampling.logprobs)
            for own in writing.done[n * sampling.n : (n + 1) * sampling.n]:
                own.scored[:0] = scored
    return writing.done


# What generate samples with where a model's configuration does not say.
_DEFAULTS = {"temperature": 1.0, "top_k": 50, "top_p": 1.0}
_COLD = 1e-5  # below, logits divided by the temperature overflow, and the likeliest token is all there is


def _chosen(model: nn.Module, sampling: Sampling, device) -> list[LogitsProcessor]:
    """What leaves one token of each row to a greedy choice."""
    own = model.generation_config
    preset = {"temperature": 0.0, "top_k": 0, "top_p": 1.0}
    if own.do_sample:
        given = {name: getattr(own, name, None) for name in _DEFAULTS}
        preset = {name: default if given[name] is None else given[name] for name, default in _DEFAULTS.items()}
    temperature, top_k, top_p = (preset[name] if getattr(sampling, name) is None else getattr(sampling, name) for name in _DEFAULTS)
    if temperature < _COLD:
        return []
    found: list[LogitsProcessor] = [TemperatureLogitsWarper(float(temperature))] if temperature != 1 else []
    found += [TopKLogitsWarper(top_k)] if top_k else []
    found += [TopPLogitsWarper(float(top_p))] if top_p < 1 else []
    return [*found, Drawn(sampling.seed, device)]


class _Noted(LogitsProcessor):
    """Shows the logits of every step, before anything is drawn of them, to who writes down what was."""

    def __init__(self, writing: _Writing):
        self.writing = writing

    def __call__(self, input_ids: torch.Tensor, scores: torch.Tensor) -> torch.Tensor:
        if scores.isnan().any():
            raise RequestError("the model's logits are not numbers (NaN): its weights or edits are damaged, or overflow in this dtype")
        if self.writing.sampling.logprobs is not None:
            self.writing.logprobs = scores.float().log_softmax(-1)
        return scores


class _Writing(StoppingCriteria):
    """Follows ``generate`` token by token: reads what was written, says where a row has come to an end, and passes on its text.

    Attributes:
        done: of every row, complete after :meth:`end`.
        logprobs: of this step, ``(rows, vocabulary)``, where they are asked for.
    """

    def __init__(
        self,
        model: nn.Module,
        tokenizer,
        prompts: list[list[int]],
        sampling: Sampling,
        stream: Stream | None,
        cancel: threading.Event,
    ):
        ends = model.generation_config.eos_token_id
        self.ends = set(ends) if isinstance(ends, (list, tuple)) else {ends}
        self.tokenizer, self.sampling, self.stream, self.cancel = tokenizer, sampling, stream, cancel
        self.done = [Completion(prompt, [], "", "length", []) for prompt in prompts]
        # Behind the prompt's last token: some tokenizers decode the space before a word only where a word is before it.
        self.before = [decoded(tokenizer, prompt[-1:]) for prompt in prompts]
        self.sent = [0] * len(prompts)
        self.logprobs: torch.Tensor | None = None

    def __call__(self, input_ids: torch.Tensor, scores, **kwargs) -> torch.Tensor:
        if self.cancel.is_set():
            raise Cancelled
        for n, (own, token) in enumerate(zip(self.done, input_ids[:, -1].tolist(), strict=True)):
            if own.finish_reason == "stop":
                continue
            own.tokens.append(token)
            if self.logprobs is not None:
                own.scored.append(_scored(token, self.logprobs[n], self.sampling.logprobs))
            if token in self.ends:
                own.finish_reason = "stop"
            if self.sampling.stop or self.stream is not None:
                self._read(n, own.finish_reason == "stop")
        return torch.tensor([own.finish_reason == "stop" for own in self.done], device=input_ids.device)

    def end(self) -> None:
        """No more comes."""
        for n in range(len(self.done)):
            self._read(n, True)

    def _read(self, n: int, last: bool) -> None:
        """The text so far, cut at a stop, and to the stream what can no longer change."""
        own = self.done[n]
        if self.sent[n] < 0:
            return
        text, whole = self._text(n), last
        found = min((at for at in map(text.find, self.sampling.stop) if at >= 0), default=-1)
        if found >= 0:
            text, own.finish_reason, whole = text[:found], "stop", True
        own.text = text
        ready = len(text) if whole else _settled(text, self.sampling.stop)
        if self.stream is not None and ready > self.sent[n]:
            self.stream(n, text[self.sent[n] : ready])
        self.sent[n] = -1 if whole else max(ready, self.sent[n])

    def _text(self, n: int) -> str:
        own, before = self.done[n], self.before[n]
        text = decoded(self.tokenizer, own.prompt[-1:] + own.tokens)
        return text[len(before) :] if text.startswith(before) else decoded(self.tokenizer, own.tokens)


def _settled(text: str, stops: tuple[str, ...]) -> int:
    """How much of a text can no longer be changed by what follows: not a character of which some bytes are missing, nor what may be the
    beginning of a stop."""
    text = text.rstrip("�")
    end = len(text)
    for stop in stops:
        for size in range(min(len(stop) - 1, len(text)), 0, -1):
            if text.endswith(stop[:size]):
                end = min(end, len(text) - size)
                break
    return end


def check_tokens(model: nn.Module, row: list[int]) -> None:
    """
    Raises:
        RequestError: a prompt is empty, or has tokens that the model does not know.
    """
    if not row:
        raise RequestError("a prompt is empty: it has no token")
    known = model.get_input_embeddings().num_embeddings
    if not 0 <= min(row) <= max(row) < known:
        raise RequestError(f"a prompt has token {max(row) if min(row) >= 0 else min(row)}; the model knows 0 to {known - 1}")


def decoded(tokenizer, tokens: list[int]) -> str:
    """What tokens say, without special ones, and as they say it."""
    return tokenizer.decode(tokens, skip_special_tokens=True, clean_up_tokenization_spaces=False)


def _scored(token: int, logprobs: torch.Tensor, top: int) -> Scored:
    """``logprobs``: ``(vocabulary,)``."""
    logprobs = logprobs.clamp(min=IMPOSSIBLE)
    best = logprobs.topk(top) if top else None
    likeliest = list(zip(best.indices.tolist(), best.values.tolist(), strict=True)) if best is not None else []
    return Scored(token, logprobs[token].item(), likeliest)


@torch.no_grad()
def _of_prompt(model: nn.Module, row: list[int], top: int) -> list[Scored]:
    """Every token of a prompt, scored behind those before it."""
    inputs, _ = pad([row], 0, device=input_device(model))
    logits = logits_at(model, {"input_ids": inputs}, [range(len(row) - 1)])[0] if len(row) > 1 else []
    return [Scored(row[0], None), *(_scored(token, own.float().log_softmax(-1), top) for token, own in zip(row[1:], logits, strict=True))]
