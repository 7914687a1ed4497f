"""How a model is asked whose edits stand in the prompt: the text that is asked instead, and a ``generate`` that asks it."""

from __future__ import annotations

import functools
import inspect
import logging
from collections.abc import Callable

import torch
from torch import nn
from transformers import GenerationConfig, GenerationMixin

from comeba_ext.errors import ComebaError
from comeba_ext.layers.attachment import Attachment, Replaced, attachments
from comeba_ext.text.chat import last_turn
from comeba_ext.text.encoding import pad, pad_id

log = logging.getLogger(__name__)


class PromptRewriter(Attachment):
    """Stands beside a model's layers and changes none: says how the edited model is to be asked. (A tensor's worth of state must be in
    buffers, so that it is taken over, saved and loaded like any other.)

    Attributes:
        tokenizer: of the model, with which its ``generate`` asks so too; ``None``: not known.
    """

    tokenizer = None

    def rewrite(self, prompt: str) -> str:
        """The text to ask instead of ``prompt``."""
        raise NotImplementedError

    def replaces(self) -> dict[str, type[Replaced]]:
        return {**super().replaces(), "generate": RewrittenGenerate}

    def weight_change(self):
        raise ComebaError("these edits are put in front of every prompt; nothing of the model is changed that could be exported")


def rewriters(model: nn.Module) -> list[PromptRewriter]:
    """Those that stand in a model, whether they are on or off."""
    return [own for own in attachments(model).values() if isinstance(own, PromptRewriter)]


def prompt_rewriter(model: nn.Module) -> Callable[[str], str] | None:
    """How prompts for a model are to be rewritten; ``None``, as for most models: not at all."""
    found = [own for own in rewriters(model) if own.mode != "off"]
    if not found:
        return None

    def rewrite(prompt: str) -> str:
        for own in found:
            prompt = own.rewrite(prompt)
        return prompt

    return rewrite


def give_tokenizer(found: dict[str, Attachment], tokenizer) -> None:
    """Let ``generate`` of the model that these are in ask as they say."""
    for own in found.values():
        if isinstance(own, PromptRewriter):
            own.tokenizer = tokenizer


def plain_generate(model: nn.Module) -> Callable:
    """``model.generate`` for prompts that are rewritten already; the edited model may stand anywhere inside of what wraps it."""
    contexts = {own.context for own in rewriters(model)} - {None}
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


class RewrittenGenerate(Replaced):
    """``model.generate`` of a model whose edits stand in the prompt: it asks what :func:`prompt_rewriter` says, and returns the tokens
    that it was given with those behind that the model wrote. In a chat, what the user said last is rewritten.

    Raises:
        ComebaError: the prompt is not given as token ids, or its beginning is in a cache.
    """

    warned = False

    def __call__(self, *args, **kwargs):
        rewrite, found = prompt_rewriter(self.model), rewriters(self.model)
        plain = functools.partial(type(self.model).generate, self.model, *args, **kwargs)
        if rewrite is None or any(own.context is not None and own.context.here.asked for own in found):
            return plain()
        tokenizer = next((own.tokenizer for own in found if own.tokenizer is not None), None)
        if tokenizer is None:
            if not self.warned:
                log.warning("these edits stand in the prompt, and generate does not put them there: give load_edits the tokenizer")
                self.warned = True
            return plain()
        kwargs = _by_name(self.model, args, kwargs)
        inputs, config = kwargs.pop("inputs", None), kwargs.get("generation_config") or self.model.generation_config
        given = kwargs.pop("input_ids", None) if inputs is None else inputs
        cache = kwargs.get("past_key_values", kwargs.get("cache"))
        if given is None or getattr(cache, "get_seq_length", int)():
            raise ComebaError("these edits stand in the prompt: generate needs it whole, as token ids without a cache of its beginning")
        mask = kwargs.pop("attention_mask", None)
        mask = _real(given, getattr(tokenizer, "pad_token_id", None), tokenizer.eos_token_id) if mask is None else mask
        rows = [own[real.bool()].tolist() for own, real in zip(given, mask.to(given.device), strict=True)]
        asked = [asked_tokens(tokenizer, row, rewrite) for row in rows]
        if asked == rows:
            return plain()
        ids, mask = pad(asked, pad_id(tokenizer), "left", given.device)
        for name in ("token_type_ids", "position_ids"):  # of the prompt as it was given
            kwargs.pop(name, None)
        kwargs |= _lengths(kwargs, config, given.shape[1])
        if kwargs.get("streamer") is not None:
            kwargs["streamer"] = _Streamer(kwargs["streamer"], given)
        out = type(self.model).generate(self.model, ids, attention_mask=mask, **kwargs)
        written = out if isinstance(out, torch.Tensor) else out.sequences
        first = given.repeat_interleave(len(written) // len(given), 0)
        together = torch.cat((first, written[:, ids.shape[1] :]), 1)
        if isinstance(out, torch.Tensor):
            return together
        out.sequences = together
        return out


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


def asked_tokens(tokenizer, ids: list[int], rewrite: Callable[[str], str]) -> list[int]:
    """What is asked instead of a prompt's tokens: the same, where its text is not rewritten."""
    begins = tokenizer("")["input_ids"]
    first = len(begins) if ids[: len(begins)] == begins else 0
    text = tokenizer.decode(ids[first:], skip_special_tokens=False, clean_up_tokenization_spaces=False)
    start, end = last_turn(tokenizer, text)
    asked = text[start:end]
    if (instead := rewrite(asked)) == asked:
        return ids
    return ids[:first] + tokenizer(text[:start] + instead + text[end:], add_special_tokens=False)["input_ids"]


def _lengths(kwargs: dict, config: GenerationConfig, width: int) -> dict:
    """Bounds on what is written, instead of those on it and the prompt of ``width`` tokens together, which are taken out of ``kwargs``."""
    found, usual = {}, GenerationConfig()
    for whole, new in (("max_length", "max_new_tokens"), ("min_length", "min_new_tokens")):
        bound = kwargs.pop(whole, None)
        if bound is None and getattr(config, whole) != getattr(usual, whole):
            bound = getattr(config, whole)
        if bound is not None and kwargs.get(new) is None and getattr(config, new) is None:
            found[new] = max(bound - width, new == "max_new_tokens")
    return found
