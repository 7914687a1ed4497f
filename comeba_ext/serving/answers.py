"""What clients of the OpenAI API get back, as JSON can hold it."""

from __future__ import annotations

import math
import time
import uuid
from collections.abc import Callable

from comeba_ext.serving.completion import Completion, Scored, decoded


def problem(message: str, param: str | None = None, code: str | None = None, kind: str = "invalid_request_error") -> dict:
    """OpenAI's error object."""
    return {"error": {"message": message, "type": kind, "param": param, "code": code}}


class Refused(Exception):
    """An answer that is an error of the client's."""

    def __init__(self, status: int, message: str, param: str | None = None, code: str | None = None):
        self.status, self.content = status, problem(message, param, code)


class TextAnswer:
    """Of ``/v1/completions``.

    Args:
        model: the name it was asked under.
        shown: says what stands before the text of every choice (``echo``); called once the prompts are known to be good.
    """

    prefix, whole, part = "cmpl", "text_completion", "text_completion"

    def __init__(self, model: str, tokenizer, shown: Callable[[], list[str]] | None = None):
        self.tokenizer, self.shown = tokenizer, shown
        self.head = {"id": f"{self.prefix}-{uuid.uuid4().hex}", "created": int(time.time()), "model": model}

    def complete(self, found: list[Completion], n: int) -> dict:
        """The answer in one; ``n`` continuations of every prompt."""
        shown = self.shown() if self.shown else [""] * len(found)
        choices = [
            {"index": i, **self._content(before, own), "finish_reason": own.finish_reason}
            for i, (before, own) in enumerate(zip(shown, found))
        ]
        return {**self.head, "object": self.whole, "choices": choices, "usage": usage(found, n)}

    def begun(self, count: int) -> list[dict]:
        """What a stream of so many texts begins with."""
        return [self._chunk(i, {"text": text}, None) for i, text in enumerate(self.shown())] if self.shown else []

    def more(self, index: int, text: str) -> dict:
        return self._chunk(index, {"text": text}, None)

    def ended(self, found: list[Completion]) -> list[dict]:
        return [self._chunk(i, {"text": ""}, own.finish_reason) for i, own in enumerate(found)]

    def counted(self, found: list[Completion], n: int) -> dict:
        """A stream's last chunk, where usage is asked for."""
        return {**self.head, "object": self.part, "choices": [], "usage": usage(found, n)}

    def _chunk(self, index: int, content: dict, reason: str | None) -> dict:
        choice = {"index": index, **content, "logprobs": None, "finish_reason": reason}
        return {**self.head, "object": self.part, "choices": [choice]}

    def _content(self, before: str, own: Completion) -> dict:
        return {"text": before + own.text, "logprobs": self._logprobs(own.scored)}

    def _logprobs(self, scored: list[Scored]) -> dict | None:
        if not scored:
            return None
        texts, offsets, at = [self._word(own.token) for own in scored], [], 0
        for text in texts:
            offsets.append(at)
            at += len(text)
        tops: list[dict | None] = []
        for own, text in zip(scored, texts, strict=True):
            best = {self._word(token): logprob for token, logprob in reversed(own.top)}  # of tokens that read alike, the likeliest
            tops.append(None if own.logprob is None else dict(reversed([*best.items()])) | ({} if text in best else {text: own.logprob}))
        return {"tokens": texts, "token_logprobs": [own.logprob for own in scored], "top_logprobs": tops, "text_offset": offsets}

    def _word(self, token: int) -> str:
        return self.tokenizer.decode([token], clean_up_tokenization_spaces=False)


class ChatAnswer(TextAnswer):
    """Of ``/v1/chat/completions``."""

    prefix, whole, part = "chatcmpl", "chat.completion", "chat.completion.chunk"

    def begun(self, count: int) -> list[dict]:
        return [self._chunk(i, {"delta": {"role": "assistant", "content": ""}}, None) for i in range(count)]

    def more(self, index: int, text: str) -> dict:
        return self._chunk(index, {"delta": {"content": text}}, None)

    def ended(self, found: list[Completion]) -> list[dict]:
        return [self._chunk(i, {"delta": {}}, own.finish_reason) for i, own in enumerate(found)]

    def _content(self, before: str, own: Completion) -> dict:
        return {"message": {"role": "assistant", "content": own.text, "refusal": None}, "logprobs": self._logprobs(own.scored)}

    def _logprobs(self, scored: list[Scored]) -> dict | None:
        if not scored:
            return None
        tops = [[self._one(token, logprob) for token, logprob in own.top] for own in scored]
        return {"content": [{**self._one(own.token, own.logprob), "top_logprobs": top} for own, top in zip(scored, tops)], "refusal": None}

    def _one(self, token: int, logprob: float | None) -> dict:
        text = self._word(token)
        return {"token": text, "logprob": logprob, "bytes": None if "�" in text else list(text.encode())}


def usage(found: list[Completion], n: int) -> dict:
    prompt, written = sum(len(own.prompt) for own in found[::n]), sum(len(own.tokens) for own in found)
    return {"prompt_tokens": prompt, "completion_tokens": written, "total_tokens": prompt + written}


def shown_prompts(tokenizer, prompts: list, n: int) -> list[str]:
    """Prompts as texts, one a choice."""
    return [prompt if isinstance(prompt, str) else decoded(tokenizer, prompt) for prompt in prompts for _ in range(n)]


def finite(value):
    """With ``None`` for numbers that JSON cannot hold, such as the infinite threshold of a layer where nothing is in scope."""
    if isinstance(value, dict):
        return {key: finite(own) for key, own in value.items()}
    if isinstance(value, list):
        return [finite(own) for own in value]
    return None if isinstance(value, float) and not math.isfinite(value) else value
