"""How a model is asked whose edits go by the prompt: the text that is asked instead, the edits that it does not ask for, and a ``generate``
that heeds both."""

from __future__ import annotations

import functools
import inspect
import logging
from collections.abc import Callable
from contextlib import ExitStack, contextmanager
from typing import NamedTuple

import torch
from torch import nn
from transformers import GenerationConfig, GenerationMixin

from comeba_ext.errors import ComebaError
from comeba_ext.forward.architectures import context_length
from comeba_ext.layers.attachment import Attachment, Replaced, attachments
from comeba_ext.layers.sequence_context import cache_of
from comeba_ext.text.chat import last_turn
from comeba_ext.text.encoding import pad, pad_id

log = logging.getLogger(__name__)
UNREAD = "what a prompt asks is read by the model: give load_edits the tokenizer (question_floor)"


class Heard(NamedTuple):
    """Of a prompt, as :func:`~comeba_ext.ops.mentions.name_hash`, names whose edits are not what it asks for, and of those whose are."""

    muted: list[int]
    asked: list[int]


class PromptReader(Attachment):
    """Stands beside a model's layers and changes none: reads what the edited model is asked. (A tensor's worth of state must be in buffers,
    so that it is taken over, saved and loaded like any other.)

    Attributes:
        tokenizer: of the model, with which its ``generate`` lets it read; ``None``: not known.
    """

    tokenizer = None

    def heard(self, prompts: list[str]) -> list[Heard]:
        """Of every prompt, whose edits are to be muted, and whose are not though they end alike."""
        return [Heard([], []) for _ in prompts]

    def replaces(self) -> dict[str, type[Replaced]]:
        return {**super().replaces(), "generate": GenerateAsRead}


class PromptRewriter(PromptReader):
    """Says how the edited model is to be asked."""

    def rewrite(self, prompt: str) -> str:
        """The text to ask instead of ``prompt``."""
        raise NotImplementedError

    def weight_change(self):
        raise ComebaError("these edits are put in front of every prompt; nothing of the model is changed that could be exported")


def prompt_readers(model: nn.Module) -> list[PromptReader]:
    """Those that stand in a model, whether they are on or off."""
    return [own for own in attachments(model).values() if isinstance(own, PromptReader)]


def prompt_rewriter(model: nn.Module) -> Callable[[str], str] | None:
    """How prompts for a model are to be rewritten; ``None``, as for most models: not at all."""
    found = [own for own in prompt_readers(model) if isinstance(own, PromptRewriter) and own.mode != "off"]
    if not found:
        return None

    def rewrite(prompt: str) -> str:
        for own in found:
            prompt = own.rewrite(prompt)
        return prompt

    return rewrite


def give_tokenizer(found: dict[str, Attachment], tokenizer) -> None:
    """Let ``generate`` of the model that these are in go by them."""
    for own in found.values():
        if isinstance(own, PromptReader):
            own.tokenizer = tokenizer


def plain_generate(model: nn.Module) -> Callable:
    """``model.generate`` for prompts that are rewritten already; the edited model may stand anywhere inside of what wraps it."""
    contexts = {own.context for own in prompt_readers(model)} - {None}
    if not contexts:
        return model.generate

    def generate(*args, **kwargs):
        try:
            for context in contexts:
                context.here.asked += 1
            return model.generate(*args, **kwargs)
        finally:
            for context in contexts:
                context.here.asked -= 1

    return generate


def _muting(model: nn.Module) -> list[PromptReader]:
    """Those that are on and may mute edits."""
    return [own for own in prompt_readers(model) if own.mode != "off" and type(own).heard is not PromptReader.heard]


@contextmanager
def as_asked(model: nn.Module, prompts: list[list[int]], begun: bool = False):
    """Inside, in this thread, a pass over one text behind each of these prompts mutes the edits that its prompt does not ask for, as
    :class:`GenerateAsRead` does; what was muted around it is not.

    Args:
        begun: the beginnings of the prompts were run before.

    Raises:
        ComebaError: there are such edits, and the tokenizer is not known; or one is to be muted in a text that has begun.
    """
    muting = _muting(model)
    tokenizer = next((own.tokenizer for own in muting if own.tokenizer is not None), None)
    if muting and tokenizer is None:
        raise ComebaError(UNREAD)
    texts = [_Prompt(tokenizer, list(own)).asked for own in prompts] if muting else []
    muted: list[list[int]] = [[] for _ in prompts]
    asked: list[list[int]] = [[] for _ in prompts]
    for reader in muting:
        for n, own in enumerate(reader.heard(texts)):
            muted[n], asked[n] = muted[n] + own.muted, asked[n] + own.asked
    if begun and any(muted):
        raise ComebaError(
            "the prompt names an edited subject and does not ask for its edit (question_floor), which may be in the cache of its beginning "
            "already: generate needs it whole, without a cache"
        )
    with ExitStack() as stack:
        for context in {own.context for own in muting} - {None}:
            stack.enter_context(context.muting(muted, asked))
        yield


class GenerateAsRead(Replaced):
    """``model.generate`` of a model whose edits go by the prompt: it asks what :func:`prompt_rewriter` says, with those edits muted that
    a :class:`PromptReader` says are not asked for, and returns the tokens that it was given with those behind that the model wrote. In a
    chat, what the user said last is read.

    Raises:
        ComebaError: the prompt is to be rewritten and not given as token ids alone, or it is then longer than the model's context; or
            its beginning is in a cache, and it is to be rewritten or edits are to be muted.
    """

    warned = False

    def __call__(self, *args, **kwargs):
        plain = functools.partial(type(self.model).generate, self.model)
        readers = [own for own in prompt_readers(self.model) if own.mode != "off"]
        contexts = {own.context for own in readers} - {None}
        rewrite = None if any(context.here.asked for context in contexts) else prompt_rewriter(self.model)
        if rewrite is None and not _muting(self.model):
            return plain(*args, **kwargs)
        tokenizer = next((own.tokenizer for own in readers if own.tokenizer is not None), None)
        if tokenizer is None:
            if not self.warned:
                log.warning("these edits go by what the prompt says, and generate cannot read it: give load_edits the tokenizer")
                self.warned = True
            return plain(*args, **kwargs)
        kwargs = _by_name(self.model, args, kwargs)
        ids = kwargs.get("inputs")
        ids = kwargs.get("input_ids") if ids is None else ids
        begun = bool(getattr(cache_of(kwargs), "get_seq_length", int)())
        if rewrite is not None and (ids is None or kwargs.get("inputs_embeds") is not None or begun):
            raise ComebaError(
                "these edits stand in the prompt: generate needs it whole, as token ids without embeddings beside them and "
                "without a cache of its beginning"
            )
        if ids is None:
            with as_asked(self.model, []):
                return plain(**kwargs)
        mask = kwargs.get("attention_mask")
        mask = _real(ids, getattr(tokenizer, "pad_token_id", None), tokenizer.eos_token_id) if mask is None else mask
        mask = mask.to(ids.device).bool()
        mask = mask[:, -ids.shape[1] :] if begun else mask  # only what is new may be given
        if mask.shape != ids.shape:  # its own error says it better
            return plain(**kwargs)
        rows = [own[real].tolist() for own, real in zip(ids, mask, strict=True)]
        with as_asked(self.model, rows, begun):
            return plain(**kwargs) if rewrite is None else self._rewritten(plain, rewrite, tokenizer, rows, ids, kwargs)

    def _rewritten(self, plain: Callable, rewrite: Callable[[str], str], tokenizer, rows: list[list[int]], given, kwargs: dict):
        asked = [asked_tokens(tokenizer, row, rewrite) for row in rows]
        if asked == rows:
            return plain(**kwargs)
        limit, longest = context_length(self.model), max(map(len, asked))
        if limit is not None and longest > limit >= max(map(len, rows)):  # of one that was too long, the model's own error says it better
            raise ComebaError(f"with the edits in front of it the prompt has {longest} tokens, the model's context is {limit}")
        ids, mask = pad(asked, pad_id(tokenizer), "left", given.device)
        for name in ("inputs", "input_ids", "attention_mask", "token_type_ids", "position_ids"):  # of the prompt as it was given
            kwargs.pop(name, None)
        configs = [own for own in (kwargs.get("generation_config"), self.model.generation_config) if own is not None]
        kwargs |= _lengths(kwargs, configs, given.shape[1])
        if kwargs.get("streamer") is not None:
            kwargs["streamer"] = _Streamer(kwargs["streamer"], given)
        out = plain(ids, attention_mask=mask, **kwargs)
        written = out if isinstance(out, torch.Tensor) else out.sequences
        first = given.repeat_interleave(len(written) // len(given), 0)
        together = torch.cat((first, written[:, ids.shape[1] :]), 1)
        if isinstance(out, torch.Tensor):
            return together
        out.sequences = together
        return out


class _Prompt:
    """A prompt's tokens as a text.

    Attributes:
        ids: as they are; first: how many of them every text begins with.
        before, asked, behind: the text; in a chat what the user said last is ``asked``.
    """

    def __init__(self, tokenizer, ids: list[int]):
        begins = tokenizer("")["input_ids"]
        self.tokenizer, self.ids = tokenizer, ids
        self.first = len(begins) if ids[: len(begins)] == begins else 0
        text = tokenizer.decode(ids[self.first :], skip_special_tokens=False, clean_up_tokenization_spaces=False)
        start, end = last_turn(tokenizer, text)
        self.before, self.asked, self.behind = text[:start], text[start:end], text[end:]

    def instead(self, rewrite: Callable[[str], str]) -> list[int]:
        """The tokens to ask; the same, where its text is not rewritten."""
        if (instead := rewrite(self.asked)) == self.asked:
            return self.ids
        text = self.before + instead + self.behind
        return self.ids[: self.first] + self.tokenizer(text, add_special_tokens=False)["input_ids"]


def asked_tokens(tokenizer, ids: list[int], rewrite: Callable[[str], str]) -> list[int]:
    """What is asked instead of a prompt's tokens."""
    return _Prompt(tokenizer, ids).instead(rewrite)


def _by_name(model: nn.Module, args: tuple, kwargs: dict) -> dict:
    """What ``generate`` is given, by the names of its parameters."""
    found = inspect.signature(GenerationMixin.generate).bind(model, *args, **kwargs).arguments
    return {name: value for name, value in {**found, **found.get("kwargs", {})}.items() if name not in ("self", "kwargs")}


class _Streamer:
    """A streamer that hears of the prompt as it was given."""

    def __init__(self, streamer, given: torch.Tensor):
        self.streamer, self.given = streamer, given

    def put(self, value: torch.Tensor) -> None:
        value, self.given = (value, None) if self.given is None else (self.given.cpu(), None)
        self.streamer.put(value)

    def end(self) -> None:
        self.streamer.end()


def _real(ids: torch.Tensor, pad_token: int | None, end: int | None) -> torch.Tensor:
    """Which tokens are no padding, as Transformers finds it where it is not told."""
    return torch.ones_like(ids) if pad_token is None or pad_token == end else (ids != pad_token).long()


def _lengths(kwargs: dict, configs: list[GenerationConfig], width: int) -> dict:
    """Bounds on what is written, instead of those on it and the prompt of ``width`` tokens together, which are taken out of ``kwargs``.

    Args:
        configs: where a bound is looked for, one after the other, that is not in ``kwargs``: what the first leaves open the next one says.
    """
    usual = GenerationConfig()

    def bound(name: str) -> int | None:
        if kwargs.get(name) is not None:
            return kwargs[name]
        return next((own for config in configs if (own := getattr(config, name)) not in (None, getattr(usual, name))), None)

    found = {}
    for whole, new in (("max_length", "max_new_tokens"), ("min_length", "min_new_tokens")):
        together = bound(whole)
        if together is not None and bound(new) is None:
            found[new] = max(together - width, new == "max_new_tokens")
        kwargs.pop(whole, None)
    return found
