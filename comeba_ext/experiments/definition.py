"""What an experiment is: one YAML file.

    title: text over table and plot
    paper: what it reproduces, e.g. "table 2"
    protocol: single_round | consecutive | sequential
    samples: records to edit; testbed_samples: on the embedded model, where a run should take minutes
    batch_size: 10
    evaluations: 5                 # at so many equal distances (consecutive); the end is always one
    generate: true                 # also measure greedy generation
    methods: [MEMIT, {method: COMEBA-HK, scope: zscore, label: COMEBA-HK (z-score)}]
    settings: [{lam_factor: 0.1}, {batch_size: 100}]        # every method with every setting
    measures: [probabilities, text]                         # see measures.py
    plot: bars | edits | settings | scores
    expected: [{dataset: …, case: …, reliability: …, source: …}]   # published numbers to print beside the measured ones

A method or setting may hold any field of the method's config, and: ``label``; ``batch_size``; ``lam_factor`` (times the
model's own λ); ``last_layers`` (only so many of the model's own layers, counted from the value layer).
"""

from __future__ import annotations

from dataclasses import dataclass, field, fields
from pathlib import Path

import yaml

from comeba_ext.editing.config import EditConfig
from comeba_ext.errors import ConfigError
from comeba_ext.evaluation.protocols import PROTOCOLS

FOLDER = Path(__file__).parent / "definitions"
PLOTS = ("bars", "edits", "settings", "scores")
MEASURES = ("probabilities", "fluency", "text", "scores", "conditions")


@dataclass(frozen=True)
class Case:
    """One line of the table: a method with its settings."""

    method: str
    label: str
    settings: dict = field(default_factory=dict)

    def config(self, model) -> EditConfig:
        """The case's settings for a model.

        Raises:
            ConfigError: an unknown setting or a value out of range.
        """
        from comeba_ext.methods import default_config

        changes = {k: v for k, v in self.settings.items() if k not in ("batch_size", "lam_factor", "last_layers")}
        own = default_config(self.method, model, **{k: v for k, v in changes.items() if k == "scope"})
        if "lam_factor" in self.settings:
            changes["lam"] = own.lam * self.settings["lam_factor"]
        if "last_layers" in self.settings:
            changes["layers"] = list(own.layers[-self.settings["last_layers"] :])
        if isinstance(changes.get("alpha"), str):  # YAML's .inf is a number, but "inf" is likely meant as one too
            changes["alpha"] = float(changes["alpha"])
        return default_config(self.method, model, **changes)


@dataclass(frozen=True)
class Experiment:
    """See the module docstring for the fields."""

    name: str
    title: str
    cases: tuple[Case, ...]
    protocol: str = "consecutive"
    paper: str = ""
    samples: int = 1000
    testbed_samples: int | None = None
    batch_size: int = 10
    evaluations: int = 1
    generate: bool = True
    measures: tuple[str, ...] = ()
    plot: str = "bars"
    expected: tuple[dict, ...] = ()
    note: str = ""


def names() -> list[str]:
    """The shipped experiments."""
    return sorted(path.stem for path in FOLDER.glob("*.yaml"))


def load(name_or_file: str | Path) -> Experiment:
    """A shipped experiment by name, or one from a YAML file.

    Raises:
        ConfigError: neither exists, or the file is malformed; the message says where.
    """
    path = Path(name_or_file)
    if str(name_or_file) in names():
        path = FOLDER / f"{name_or_file}.yaml"
    elif path.suffix not in (".yaml", ".yml"):
        raise ConfigError(f"unknown experiment {str(name_or_file)!r}; choose one of {', '.join(names())}, or give a .yaml file")
    try:
        values = yaml.safe_load(path.read_text(encoding="utf-8"))
    except OSError as error:
        raise ConfigError(f"{path}: {error.strerror or error}") from None
    except yaml.YAMLError as error:
        raise ConfigError(f"{path}: not valid YAML: {error}") from None
    if not isinstance(values, dict):
        raise ConfigError(f"{path}: expected keys and values")
    known = {f.name for f in fields(Experiment)} - {"name", "cases"} | {"methods", "settings"}
    unknown = sorted(set(values) - known)
    if unknown:
        raise ConfigError(f"{path}: unknown key {', '.join(unknown)}; there are {', '.join(sorted(known))}")
    for key in ("title", "methods"):
        if not values.get(key):
            raise ConfigError(f"{path}: {key!r} is missing")
    for key, choices in (("protocol", PROTOCOLS), ("plot", PLOTS)):
        if values.get(key, choices[0]) not in choices:
            raise ConfigError(f"{path}: {key} must be one of {', '.join(choices)}, got {values[key]!r}")
    for measure in values.get("measures", ()):
        if measure not in MEASURES:
            raise ConfigError(f"{path}: measures must be of {', '.join(MEASURES)}, got {measure!r}")
    cases = _cases(values.pop("methods"), values.pop("settings", [{}]), path)
    for key in ("measures", "expected"):
        values[key] = tuple(values.get(key, ()))
    return Experiment(name=path.stem, cases=cases, **values)


def _cases(methods: list, settings: list, path: Path) -> tuple[Case, ...]:
    from comeba_ext.methods import get

    cases = []
    for method in methods:
        own = {"method": method} if isinstance(method, str) else dict(method)
        for setting in settings:
            both = {**own, **setting}
            name = get(both.pop("method", None)).method
            labels = [str(part["label"]) for part in (own, setting) if part.get("label")]
            if not own.get("label"):
                labels = [name, *labels] if len(methods) > 1 or not labels else labels
            both.pop("label", None)
            cases.append(Case(name, ", ".join(labels), both))
    if len({case.label for case in cases}) < len(cases):
        raise ConfigError(f"{path}: two cases have the same label; give each a label of its own")
    return tuple(cases)
