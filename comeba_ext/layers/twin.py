"""A second set of a model's modules around the same weights.

What editing does to a model while it works (hooks that record, forwards that are skipped, other modes, half-precision
products, unfinished deltas) must not be seen by whoever generates from it meanwhile. So it is done to a twin.
"""

from __future__ import annotations

import copy

from torch import nn

from comeba_ext.layers.attachment import attachments
from comeba_ext.layers.prompts import prompt_readers


def twin_of(model: nn.Module) -> nn.Module:
    """A copy of the model with its own modules and hooks, and the attachments' buffers; weights and configuration are
    shared."""
    own = {
        id(buffer)
        for attachment in attachments(model).values()
        for name, buffer in attachment.own_buffers().items()
        if name not in attachment.appended
    }
    memo = {id(buffer): buffer for buffer in model.buffers() if id(buffer) not in own}
    for parameter in model.parameters():
        # Its own parameter, where that is plain, so that freezing the twin does not freeze the model.
        plain = type(parameter) is nn.Parameter and not vars(parameter)
        memo[id(parameter)] = nn.Parameter(parameter.data, requires_grad=False) if plain else parameter
    for module in model.modules():
        for name in ("config", "generation_config"):
            if hasattr(module, name):
                memo[id(getattr(module, name))] = getattr(module, name)
        weights = getattr(getattr(module, "_hf_hook", None), "weights_map", None)  # accelerate's, of offloaded layers
        if weights is not None:
            memo[id(weights)] = weights
    memo |= {id(own.tokenizer): own.tokenizer for own in prompt_readers(model)}
    return copy.deepcopy(model, memo)
