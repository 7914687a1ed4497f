"""Which tokens of a text the edits are used for: every token's score in every scored layer, beside the threshold."""

from __future__ import annotations

import threading
from contextlib import ExitStack
from dataclasses import dataclass

import torch
from torch import nn

from comeba_ext.errors import ComebaError, RequestError
from comeba_ext.forward.architectures import context_length
from comeba_ext.forward.partial import evaluating
from comeba_ext.layers.attachment import attachments
from comeba_ext.layers.hooked_linear import HookedLinear
from comeba_ext.layers.prompts import as_asked
from comeba_ext.ops.hooked_linear import in_scope
from comeba_ext.text.encoding import encode, input_device


@dataclass(frozen=True)
class LayerScores:
    """What a layer made of the tokens of a pass.

    Attributes:
        scores: ``(batch, seq)`` in float32 or better, −inf at padding.
        in_scope: ``(batch, seq)`` bool, whether the token reaches the threshold and so gets the edited output.
        score: the score's name.
        alpha: the threshold. (Score ``nearest``: what an anchor asks for above it has been taken off the token's score.)
    """

    scores: torch.Tensor
    in_scope: torch.Tensor
    alpha: float
    score: str


@dataclass(frozen=True)
class TextScope:
    """One text: ``tokens`` as they are written, and by layer their :class:`LayerScores` (``(1, seq)``)."""

    tokens: list[str]
    layers: dict[str, LayerScores]


@torch.no_grad()
def token_scores(model: nn.Module, ids: torch.Tensor, mask: torch.Tensor) -> dict[str, LayerScores]:
    """Scores of a batch in every scored layer, in the order of the blocks, as the model is edited now.

    Args:
        ids, mask: ``(batch, seq)`` on the device of the model's input, the mask 0 at padding.

    Raises:
        ComebaError: no layer of the model has a score.
    """
    layers = _scored(model)
    found, real, thread = {}, mask.bool(), threading.get_ident()

    def note(name: str, layer: HookedLinear, x: torch.Tensor) -> None:
        if threading.get_ident() != thread:  # somebody else's pass through the same model
            return
        here = real.to(x.device)
        scores = layer.scores(x, here).masked_fill(~here, -torch.inf)
        found[name] = LayerScores(scores, in_scope(scores, layer.alpha, here, layer.delta.dtype), layer.alpha.item(), layer.scope)

    with evaluating(model), ExitStack() as hooks:
        for name, layer in layers.items():
            handle = layer.register_forward_pre_hook(lambda layer, args, name=name: note(name, layer, args[0]))
            hooks.callback(handle.remove)
        model(input_ids=ids, attention_mask=mask, use_cache=False)
    return found


def text_scope(model: nn.Module, tokenizer, text: str) -> TextScope:
    """Scores of one text's tokens, as ``generate`` answers it: edits that it does not ask for are muted (``question_floor``).

    Raises:
        RequestError: it has no token, or more than the model's context takes.
        ComebaError: no layer of the model has a score, or none is asked; or edits may be muted, and the model was loaded without its
            tokenizer.
    """
    ids = encode(tokenizer, text.rstrip()).ids
    limit = context_length(model)
    if not ids:
        raise RequestError("the text is empty")
    if limit is not None and len(ids) > limit:
        raise RequestError(f"the text has {len(ids)} tokens, the model's context is {limit}")
    if not any(layer.mode == "validated" for layer in _scored(model).values()):
        raise ComebaError("every token gets these edits: no score is asked")
    row = torch.tensor([ids], device=input_device(model))
    with as_asked(model, [ids]):
        layers = token_scores(model, row, torch.ones_like(row))
    return TextScope([_written(tokenizer, token) for token in ids], layers)


def _scored(model: nn.Module) -> dict[str, HookedLinear]:
    layers = {name: own for name, own in attachments(model).items() if isinstance(own, HookedLinear)}
    if not layers:
        raise ComebaError("no layer of this model decides by a score which tokens its edits are used for")
    return layers


def _written(tokenizer, token: int) -> str:
    """A token as it reads; where it is less than a character, by its name in the vocabulary."""
    text = tokenizer.decode([token])
    return text if text and "\ufffd" not in text else tokenizer.convert_ids_to_tokens(token)
