"""Default settings of a method on a model, from ``defaults/<method>.yaml``.

Each file is a list of entries; the first one whose ``match`` agrees with the model's ``config.json`` counts. An entry
names its ``source`` and its ``settings``; what these leave out is COMEBA-HK's setting on the same model
(:meth:`EditConfig.for_model`). ``layers: middle`` or ``layers: last`` picks one of COMEBA-HK's layers.
"""

from __future__ import annotations

from functools import cache
from pathlib import Path

import yaml
from torch import nn

from comeba_ext.editing.config import EditConfig, changed
from comeba_ext.errors import ConfigError

FOLDER = Path(__file__).parent / "defaults"


def default_config(method, model: nn.Module, **changes) -> EditConfig:
    """Settings of a method for a model; keyword arguments replace single values.

    Args:
        method: a method's class, or its name.

    Raises:
        ConfigError: an unknown method, or a replaced value is out of range or unknown.
    """
    if isinstance(method, str):
        from comeba_ext.methods import get

        method = get(method)
    own = dict(entry(method.method, model.config)["settings"])
    # Where every token meets the edits, no score decides anything, and the covariance has the weight that none takes from it.
    scoreless = method.serving == "temporary"
    scope = "reference" if scoreless else changes.get("scope", own.get("scope"))
    names = {key: changes[key] for key in ("blocks", "projection") if key in changes}
    settings = EditConfig.for_model(model, **({"scope": scope} if scope else {}), **names).to_dict()
    if own.get("layers") in ("middle", "last"):
        layers = settings["layers"]
        own["layers"] = [layers[len(layers) // 2] if own["layers"] == "middle" else layers[-1]]
    own = {**settings, **own}
    if scoreless and {"lam", "leverage_ratio"} & set(changes):  # one takes the place of the other
        own |= {"lam": None, "leverage_ratio": None}
    return method.config_class.from_dict({**own, **changes} if scoreless else changed(own, changes), method.method)


def entry(name: str, config) -> dict:
    """The entry of a method's file that matches a model's configuration; the last one matches every model."""
    for found in _entries(name):
        if all(getattr(config, key, None) == value for key, value in found["match"].items()):
            return found
    raise AssertionError(f"the defaults of {name} have no entry for every model")


@cache
def _entries(name: str) -> list[dict]:
    path = FOLDER / f"{name.lower().replace(' ', '-')}.yaml"
    return yaml.safe_load(path.read_text(encoding="utf-8"))


def only_layer(config: EditConfig, method: str) -> EditConfig:
    """``config``, if it names one layer.

    Raises:
        ConfigError: it names several.
    """
    if len(config.layers) != 1:
        raise ConfigError(f"{method} edits one layer, got layers {list(config.layers)}")
    return config

