"""Default settings of a method on a model, from ``defaults/<method>.yaml`` beside its file.

Each file is a list of entries; the first one whose ``match`` agrees with the model's ``config.json`` counts (a list names several values
that do). An entry names its ``source`` and its ``settings``; what these leave out is COMEBA-HK's setting on the same model
(:meth:`EditConfig.for_model`). ``layers: middle`` or ``layers: last`` picks one of COMEBA-HK's layers, ``layers: last 3``
the model's last three blocks, ``layers: all`` all, ``layers: 0.84`` the block at that share of the model's depth,
``layers: [0.64, 0.93]`` those from one share to another.
"""

from __future__ import annotations

import sys
from functools import cache
from pathlib import Path

import yaml
from torch import nn

from comeba_ext.editing.config import EditConfig, changed
from comeba_ext.forward.architectures import Architecture
from comeba_ext.methods.base import Method
from comeba_ext.methods.names import method_named


def default_config(method: str | type[Method], model: nn.Module, **changes) -> EditConfig:
    """Settings of a method for a model; keyword arguments replace single values.

    Args:
        method: a method's class, or its name.

    Raises:
        ConfigError: an unknown method, or a replaced value is out of range or unknown.
    """
    method = method_named(method)
    changes = {**method.implied(changes), **changes}
    own = dict(entry(method, model.config)["settings"])
    # Where no score decides anything, the covariance has the weight that none takes from it.
    scoreless = not method.scored
    scope = "always" if scoreless else changes.get("scope", own.get("scope"))
    names = {key: changes[key] for key in ("blocks", "projection") if key in changes}
    settings = EditConfig.for_model(model, **({"scope": scope} if scope else {}), **names).to_dict()
    layers = own.get("layers")
    if layers in ("middle", "last"):
        own["layers"] = [settings["layers"][len(settings["layers"]) // 2 if layers == "middle" else -1]]
    elif isinstance(layers, str):  # "all", or "last 3"
        depth = Architecture.of(model, **names).num_blocks(model)
        own["layers"] = list(range(depth))[-int(layers.removeprefix("last ")) if layers.startswith("last ") else 0 :]
    elif isinstance(layers, float) or (isinstance(layers, list) and isinstance(layers[0], float)):
        depth = Architecture.of(model, **names).num_blocks(model)
        ends = [max(0, min(round(share * depth), depth - 2)) for share in (layers if isinstance(layers, list) else [layers])]
        first = ends[0] if isinstance(layers, float) else max(0, min(ends[0], ends[-1] - 1))  # two shares: two blocks at least
        own["layers"] = list(range(first, ends[-1] + 1))  # never the last block, after which nothing reads the edit
    own = {**settings, **own}
    if {"lam", "leverage_ratio"} & set(changes):  # one takes the place of the other
        own |= {"lam": None, "leverage_ratio": None}
    return method.config_class.from_dict({**own, **changes} if scoreless else changed(own, changes), method.name)


def entry(method: type[Method], config) -> dict:
    """The entry of a method's file that matches a model's configuration; the last one matches every model. A method without a file
    has COMEBA-HK's settings."""
    for found in _entries(method):
        if all(getattr(config, key, None) in (value if isinstance(value, list) else [value]) for key, value in found["match"].items()):
            return found
    return {"source": "those of COMEBA-HK (EditConfig.for_model)", "settings": {}}


@cache
def _entries(method: type[Method]) -> list[dict]:
    file = getattr(sys.modules.get(method.__module__), "__file__", None)  # none where it was typed in
    path = Path(file or ".").parent / "defaults" / f"{method.name.lower().replace(' ', '-')}.yaml"
    return yaml.safe_load(path.read_text(encoding="utf-8")) if file and path.exists() else []
