"""What an experiment is: one YAML file.

    title: text over table and plot
    paper: what it reproduces, e.g. "table 2"
    protocol: single_round | consecutive | sequential
    samples: records to edit; testbed_samples: on the embedded model, where a run should take minutes
    batch_size: 10                 # or all: one batch
    orders: 1                      # run every case with its records in so many orders: means, and their spread
    evaluations: 5                 # at so many equal distances (consecutive); the end is always one
    answer_tokens: 32              # let the model write at most so many to every prompt: its written answers; 0: not at all
    chat: false                    # ask for them in the model's chat template
    long: false                    # answers are paragraphs: written on past a sentence, and scored by likeness
    generate: true                 # also measure greedy generation, cut at the answer's length
    methods: [MEMIT, {method: COMEBA-HK, scope: zscore, label: COMEBA-HK (z-score)}]
    settings: [{lam_factor: 0.1}, {batch_size: 100}]        # every method with every setting
    measures: [probabilities, text]                         # see measures.py
    tasks: [hellaswag]             # for the measure abilities: lm-evaluation-harness's, task_folder: DIR of your own,
    task_limit: 200                # at most so many examples of each
    plot: bars | edits | settings | scores
    expected: [{dataset: …, case: …, reliability: …, source: …}]   # published numbers to print beside the measured ones

A method or setting may hold any field of the method's config, and: ``label``; ``batch_size``; ``lam_factor`` (times the
model's own λ); ``last_layers`` (only so many of the model's own layers, counted from the value layer).
"""

from __future__ import annotations

from dataclasses import dataclass, field, fields
from pathlib import Path

import yaml

from comeba_ext.editing.config import EditConfig, is_int
from comeba_ext.editing.settings_files import flat_yaml, with_numbers
from comeba_ext.errors import ConfigError
from comeba_ext.evaluation.protocols import PROTOCOLS
from comeba_ext.evaluation.written import ANSWER_TOKENS, Writing

FOLDER = Path(__file__).parent / "definitions"
ALL = "all"  # as a batch's size: every record in one
PLOTS = ("bars", "edits", "settings", "scores")
MEASURES = ("probabilities", "fluency", "text", "other_facts", "costs", "scores", "conditions", "abilities")


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
        try:
            return self._config(model)
        except ConfigError as error:
            raise ConfigError(f"case {self.label!r}: {error}") from None

    def _config(self, model) -> EditConfig:
        from comeba_ext.methods import default_config

        changes = {k: v for k, v in self.settings.items() if k not in ("batch_size", "lam_factor", "last_layers")}
        own = default_config(self.method, model, **{k: v for k, v in changes.items() if k == "scope"})
        if "lam_factor" in self.settings:
            factor = self.settings["lam_factor"]
            changes |= {"leverage_ratio": own.ratio / factor} if own.lam is None else {"lam": own.lam * factor}
        if "last_layers" in self.settings:
            changes["layers"] = list(own.layers[-self.settings["last_layers"] :])
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
    orders: int = 1
    evaluations: int = 1
    answer_tokens: int = ANSWER_TOKENS
    chat: bool = False
    long: bool = False
    generate: bool = True
    measures: tuple[str, ...] = ()
    tasks: tuple[str, ...] = ()
    task_folder: str | None = None
    task_limit: int | None = None
    plot: str = "bars"
    expected: tuple[dict, ...] = ()
    note: str = ""

    @property
    def writing(self) -> Writing | None:
        """How the models are let write, if at all."""
        return Writing(self.answer_tokens, self.chat, self.long) if self.answer_tokens else None


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
        values = flat_yaml(path.read_text(encoding="utf-8"))
    except OSError as error:
        raise ConfigError(f"{path}: {error.strerror or error}") from None
    except (yaml.YAMLError, UnicodeDecodeError, ConfigError) as error:
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
    for key, value in values.items():
        kind, fits = _KINDS[key]
        if not fits(value):
            raise ConfigError(f"{path}: {key} must be {kind}, got {value!r}")
    if values.get("measures") and values.get("protocol") == "single_round":
        raise ConfigError(f"{path}: measures are taken of a model that keeps its edits; a single_round run has none")
    if values.get("plot") == "scores" and "scores" not in values.get("measures", ()):
        raise ConfigError(f"{path}: the plot 'scores' needs the measure 'scores'")
    if ("abilities" in values.get("measures", ())) != bool(values.get("tasks")):
        raise ConfigError(f"{path}: the measure 'abilities' and 'tasks' need each other")
    for row in values.get("expected", ()):
        for key, value in row.items():
            if key not in _ABOUT_EXPECTED and (isinstance(value, bool) or not isinstance(value, (int, float))):
                raise ConfigError(f"{path}: expected: {key} must be a number, got {value!r}")
    cases = _cases(values.pop("methods"), values.pop("settings", [{}]), path)
    for key in ("measures", "expected", "tasks"):
        values[key] = tuple(values.get(key, ()))
    return Experiment(name=path.stem, cases=cases, **values)


def _is_count(value) -> bool:
    return is_int(value) and value > 0


def _is_list(value, *kinds) -> bool:
    return isinstance(value, list) and all(isinstance(item, kinds) for item in value)


def _is_text(value) -> bool:
    return isinstance(value, str)


_COUNT = ("a whole number of 1 or more", _is_count)
_SIZE = ("a whole number of 1 or more, or 'all'", lambda value: _is_count(value) or value == ALL)
_TEXT = ("text", _is_text)
_SWITCH = ("true or false", lambda value: isinstance(value, bool))
_KINDS = {  # key -> what its value must be, in words and as a check
    "title": _TEXT,
    "paper": _TEXT,
    "note": _TEXT,
    "samples": _COUNT,
    "testbed_samples": _COUNT,
    "batch_size": _SIZE,
    "orders": _COUNT,
    "evaluations": _COUNT,
    "answer_tokens": ("a whole number of 0 or more", lambda value: is_int(value) and value >= 0),
    "chat": _SWITCH,
    "long": _SWITCH,
    "generate": _SWITCH,
    "protocol": (f"one of {', '.join(PROTOCOLS)}", lambda value: value in PROTOCOLS),
    "plot": (f"one of {', '.join(PLOTS)}", lambda value: value in PLOTS),
    "measures": (f"a list of {', '.join(MEASURES)}", lambda value: _is_list(value, str) and set(value) <= set(MEASURES)),
    "tasks": ("a list of names", lambda value: _is_list(value, str)),
    "task_folder": _TEXT,
    "task_limit": _COUNT,
    "expected": ("a list of rows", lambda value: _is_list(value, dict)),
    "methods": ("a list of names, or of a method with settings", lambda value: _is_list(value, str, dict)),
    "settings": ("a list of one or more groups of settings", lambda value: bool(value) and _is_list(value, dict)),
}
_ABOUT_EXPECTED = ("dataset", "case", "source")  # of a published row, what is no number
_CASE_KINDS = {  # what a case's settings hold beside the method's config
    "batch_size": _SIZE,
    "last_layers": _COUNT,
    "lam_factor": ("a number > 0", lambda value: isinstance(value, (int, float)) and not isinstance(value, bool) and value > 0),
}


def _cases(methods: list, settings: list, path: Path) -> tuple[Case, ...]:
    from comeba_ext.methods import method_named

    cases = []
    for method in methods:
        own = {"method": method} if isinstance(method, str) else dict(method)
        for setting in settings:
            both = with_numbers({**own, **setting})
            for key, (kind, fits) in _CASE_KINDS.items():
                if key in both and not fits(both[key]):
                    raise ConfigError(f"{path}: {key} must be {kind}, got {both[key]!r}")
            if both.get("alpha") == "inf":  # YAML's own is .inf
                both["alpha"] = float("inf")
            name = method_named(both.pop("method", None)).name
            labels = [str(part["label"]) for part in (own, setting) if part.get("label")]
            if not own.get("label"):
                labels = [name, *labels] if len(methods) > 1 or not labels else labels
            both.pop("label", None)
            cases.append(Case(name, ", ".join(labels), both))
    if len({case.label for case in cases}) < len(cases):
        raise ConfigError(f"{path}: two cases have the same label; give each a label of its own")
    return tuple(cases)
