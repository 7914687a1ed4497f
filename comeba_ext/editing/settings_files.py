"""Files of settings: JSON or YAML, read with care."""

from __future__ import annotations

import json
import re
from collections.abc import Callable
from pathlib import Path
from typing import TypeVar

from comeba_ext.errors import ConfigError


def read_settings(path: str | Path) -> dict:
    """The settings of a JSON or YAML file; which keys there may be is checked where they are used.

    Raises:
        ConfigError: the file is missing or malformed, or another package's.
    """
    values = load_settings(path)
    if "alg_name" in values:
        raise ConfigError(
            f"{path} is an hparams file of EasyEdit (alg_name {values['alg_name']!r}): in Python, EditConfig.from_easyedit({str(path)!r}, "
            "model).save('config.yaml') makes a --config of it, and read_easyedit(…).method names the --method"
        )
    return values


_Reader = TypeVar("_Reader", bound=Callable)
_HPARAMS_READERS: list[Callable] = []  # one at most


def reads_hparams(reader: _Reader) -> _Reader:
    """Decorator of what reads hparams files of EasyEdit for :meth:`EditConfig.from_easyedit`. Which settings there are is known to every
    method itself, so it stands above, where methods are."""
    _HPARAMS_READERS[:] = [reader]
    return reader


def hparams_reader() -> Callable:
    """What was registered by :func:`reads_hparams`: a function of a path, giving something with ``differs`` and ``config(model)``.

    Raises:
        ConfigError: nothing was.
    """
    if not _HPARAMS_READERS:
        raise ConfigError("hparams files of EasyEdit are read by comeba_ext.methods, which nobody imported yet: import it first")
    return _HPARAMS_READERS[0]


def load_settings(path: str | Path) -> dict:
    """The keys and values of a JSON or YAML file.

    Raises:
        ConfigError: the file is missing or malformed.
    """
    path = Path(path)
    try:
        text = path.read_text(encoding="utf-8")
        if len(text) > _LONGEST:
            raise ConfigError(f"{len(text)} characters are more than settings have")
        values = flat_yaml(text) if path.suffix in (".yaml", ".yml") else json.loads(text)
    except OSError as error:
        raise ConfigError(f"{path}: {error.strerror or error}") from None
    except Exception as error:  # a parser's error of either library
        cause = "nested too deeply" if isinstance(error, RecursionError) else error
        raise ConfigError(f"{path}: not valid {path.suffix or 'JSON'}: {cause}") from None
    if not isinstance(values, dict) or not all(isinstance(key, str) for key in values):
        raise ConfigError(f"{path}: expected keys and values")
    return with_numbers(values)


_LONGEST, _DEEPEST = 100_000, 32


def flat_yaml(text: str):
    """YAML without aliases and without depth: settings have no use for either. A few hundred bytes of aliases can stand for
    gigabytes, and the parser takes minutes for thousands of brackets.

    Raises:
        ConfigError: there is an alias, or lists are nested deeply.
        yaml.YAMLError: not YAML.
    """
    import yaml

    depth = 0
    for event in yaml.parse(text, yaml.SafeLoader):
        if isinstance(event, yaml.AliasEvent):
            raise ConfigError(f"line {event.start_mark.line + 1}: an alias (*{event.anchor}); write the value out")
        depth += isinstance(event, yaml.CollectionStartEvent) - isinstance(event, yaml.CollectionEndEvent)
        if depth > _DEEPEST:
            raise ConfigError(f"line {event.start_mark.line + 1}: nested too deeply")
    return yaml.safe_load(text)


def with_numbers(values: dict) -> dict:
    """Values read from YAML 1.1, which takes 1e-3, without a dot, for text."""
    scientific = lambda v: isinstance(v, str) and re.fullmatch(r"[-+]?\d+[eE][-+]?\d+", v) is not None  # noqa: E731
    return {key: float(value) if scientific(value) else value for key, value in values.items()}
