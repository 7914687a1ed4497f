"""What clients of the OpenAI API send, checked: every parameter is one that is honoured here, or refused."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Annotated, Literal

from pydantic import BaseModel, ConfigDict, Field

from comeba_ext.errors import RequestError
from comeba_ext.serving.completion import Sampling

# Of no effect on the answer.
_IGNORED = {"user", "metadata", "store", "service_tier", "safety_identifier", "prompt_cache_key"}
# Not to be had here; these values, which some clients always send, ask for nothing.
_NEUTRAL: dict[str, tuple] = {
    "frequency_penalty": (0,),
    "presence_penalty": (0,),
    "logit_bias": ({},),
    "suffix": ("",),
    "best_of": (1,),
    "tools": ([],),
    "functions": ([],),
    "tool_choice": ("none", "auto"),
    "parallel_tool_calls": (True, False),
    "response_format": ({"type": "text"},),
    "modalities": (["text"],),
    "min_p": (0,),
    "repetition_penalty": (1,),
}
# What a parameter may look like, where that is more than one thing.
FORMS = {
    "prompt": "should be a text, a list of texts, the token ids of one, or a list of those",
    "stop": "should be a text that is not empty, or a list of such",
    "messages": 'should be a list of one or more {"role": …, "content": …}, each content a text, or a list of parts of type text',
}
Tokens = list[Annotated[int, Field(ge=0)]]
Count = Annotated[int, Field(ge=1)]


@dataclass(frozen=True)
class Limits:
    """Of one request.

    Args:
        body: bytes of what is sent.
        new_tokens: to be written behind every prompt.
        texts: prompts, times ``n``.
        logprobs: likeliest tokens of a place.
        edits: of one batch.
    """

    body: int = 4 * 2**20
    new_tokens: int = 1024
    texts: int = 64
    logprobs: int = 20
    edits: int = 1000


class _Asked(BaseModel):
    """What both kinds of request have in common."""

    model_config = ConfigDict(strict=True, extra="allow")

    model: str
    n: Count | None = None
    temperature: Annotated[float, Field(ge=0, le=100, allow_inf_nan=False)] | None = None
    top_p: Annotated[float, Field(gt=0, le=1)] | None = None
    top_k: Annotated[int, Field(ge=0)] | None = None
    seed: Annotated[int, Field(ge=-(2**63), lt=2**63)] | None = None
    stop: Annotated[str, Field(min_length=1)] | list[Annotated[str, Field(min_length=1)]] | None = None
    stream: bool | None = None
    stream_options: dict | None = None

    def check(self, limits: Limits, texts: int) -> None:
        """Raises :class:`RequestError` for what is too much, or is not done here."""
        for name, value in (self.model_extra or {}).items():
            if name in _IGNORED or value is None or any(value == own for own in _NEUTRAL.get(name, ())):
                continue
            known = f"{name} is not supported here" if name in _NEUTRAL else f"unknown parameter {name}"
            raise RequestError(f"{known}; leave it out")
        if texts > limits.texts:
            raise RequestError(f"{texts} texts are asked for (prompts times n); at most {limits.texts} a request")
        if isinstance(self.stop, list) and len(self.stop) > 16:
            raise RequestError(f"{len(self.stop)} stops; at most 16")
        if self.stream and getattr(self, "logprobs", None) not in (None, False):
            raise RequestError("logprobs are not streamed; leave out one of logprobs and stream")

    def sampling(self, limits: Limits, wanted: int | None, default: int, logprobs: int | None, **more) -> Sampling:
        if wanted is not None and wanted > limits.new_tokens:
            raise RequestError(f"max_tokens is {wanted}; at most {limits.new_tokens} here")
        if logprobs is not None and not 0 <= logprobs <= limits.logprobs:
            raise RequestError(f"log probabilities of {logprobs} tokens a place are asked for; 0 to {limits.logprobs}")
        return Sampling(
            default if wanted is None else wanted,
            temperature=self.temperature,
            top_p=self.top_p,
            top_k=self.top_k,
            seed=self.seed,
            stop=(self.stop,) if isinstance(self.stop, str) else tuple(self.stop or ()),
            n=self.n or 1,
            logprobs=logprobs,
            fit=wanted is None,
            **more,
        )


class CompletionRequest(_Asked):
    """``POST /v1/completions``."""

    prompt: str | list[str] | Tokens | list[Tokens]
    max_tokens: Annotated[int, Field(ge=0)] | None = None
    logprobs: int | None = None
    echo: bool | None = None

    def prompts(self) -> list[str] | list[list[int]]:
        several = isinstance(self.prompt, list) and not (self.prompt and isinstance(self.prompt[0], int))
        return self.prompt if several else [self.prompt]

    def checked(self, limits: Limits) -> Sampling:
        if not self.prompts():
            raise RequestError("there is no prompt")
        self.check(limits, len(self.prompts()) * (self.n or 1))
        if self.max_tokens == 0 and not self.echo:
            raise RequestError("max_tokens of 0 asks for nothing without echo")
        return self.sampling(limits, self.max_tokens, min(16, limits.new_tokens), self.logprobs, echo=bool(self.echo))


class _Part(BaseModel):
    model_config = ConfigDict(strict=True)
    type: Literal["text"]
    text: str


class Message(BaseModel):
    """Of a chat; other fields than these, which clients send along, are not of a text."""

    model_config = ConfigDict(strict=True)
    role: str
    content: str | list[_Part]

    def plain(self) -> dict[str, str]:
        content = self.content if isinstance(self.content, str) else "".join(part.text for part in self.content)
        return {"role": self.role, "content": content}


class ChatRequest(_Asked):
    """``POST /v1/chat/completions``."""

    messages: Annotated[list[Message], Field(min_length=1)]
    max_tokens: Count | None = None
    max_completion_tokens: Count | None = None
    logprobs: bool | None = None
    top_logprobs: int | None = None

    def prompts(self) -> list[list[dict]]:
        return [[message.plain() for message in self.messages]]

    def checked(self, limits: Limits) -> Sampling:
        self.check(limits, self.n or 1)
        if self.top_logprobs is not None and not self.logprobs:
            raise RequestError("top_logprobs is of no effect without logprobs")
        wanted = self.max_tokens if self.max_completion_tokens is None else self.max_completion_tokens
        return self.sampling(limits, wanted, limits.new_tokens, (self.top_logprobs or 0) if self.logprobs else None)
