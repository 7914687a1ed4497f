"""EditConfig: every number of the procedure, with published values where there are any."""

from __future__ import annotations

import dataclasses
import difflib
import json
import logging
import math
from dataclasses import dataclass
from pathlib import Path

from comeba_ext.editing.optimisers import OPTIMISERS
from comeba_ext.editing.settings_files import hparams_reader, read_settings
from comeba_ext.errors import ConfigError
from comeba_ext.forward.architectures import Architecture
from comeba_ext.forward.half_compute import fast_product_dtype
from comeba_ext.layers.hooked_linear import GATES
from comeba_ext.scores import NearestScore, score_named, score_names

log = logging.getLogger(__name__)

LR_UNITS = ("absolute", "hidden_rms")


@dataclass(frozen=True)
class EditConfig:
    """Settings of consecutive batch editing.

    Args:
        layers: edited blocks, increasing; the last one is the value layer.
        lam: λ, weight of the covariance against edited keys in ``C = λ·C0 + Σ k kᵀ``; ``None``: from ``leverage_ratio``.
        leverage_ratio: λ without a scale. With its leverage ``ℓ = kᵀ C0⁻¹ k`` one key realises the share ``ℓ/(λ + ℓ)`` of its
            residual, and an average corpus key has ``ℓ = d_in``; so ``λ = d_in / leverage_ratio`` in every layer, and such a
            key realises ``r/(1 + r)``. (Subjects' keys have 1.2 to 2.8 times that leverage.) ``None``: 1; with nearest 4, or 32 for
            a single layer, which has to realise all of it.
        scope: score that decides scope, ``"zscore"``, ``"reference"``, ``"nearest"`` or ``"always"`` (:class:`HookedLinear`); the last is
            what methods without a threshold have.
        gate: what the score is computed from, ``"exact"`` or ``"sketch"`` (:class:`HookedLinear`).
        alpha: threshold before any edit; ``None`` for the score's own start (2.2, infinity, 1).
        alpha_margin: share of the lowest score of a batch's prompts that α is lowered to; below 1 leaves room for other
            wordings, which respond a little less than the prompt that was edited. ``None``: 1 for zscore (the paper),
            0.25 for reference. Of no effect with nearest.
        alpha_floor: with nearest, every anchor's threshold where the text names the edited subject.
        unnamed_floor: with nearest, what no anchor's threshold falls below where it does not (:mod:`comeba_ext.editing.anchors`).
        question_floor: with nearest, and methods whose edits stand in the prompt where it names their subject: an edit is felt only where
            it is asked for, as far as ``generate`` can tell from the prompt. How near that must be to the edited one, from −1 to 1
            (:func:`~comeba_ext.forward.question_states.nearness`: 1 for its own prompt; two questions in other words come to 0.8 at
            most); ``None``: whatever is asked about the subject.
        steps: loss evaluations per target value at most; the optimiser steps between them.
        lr: learning rate for target values.
        lr_unit: ``"absolute"``, or ``"hidden_rms"``: ``lr`` times the root mean square of the request's hidden state.
        kl_factor: weight of KL at the subject's last token of "{subject} is a".
        end_factor: weight of −log of the probability that the new object is over where it ends ("six", not "sixteen";
            :func:`~comeba_ext.text.ends.end_tokens`), which published objectives do not ask for.
        chat: find target values for the prompt (and its wordings) in the model's chat template too, as a user's turn.
        weight_decay: weight of ‖δ‖/‖h‖².
        clamp: bound on ‖δ‖ in units of ‖h‖.
        early_stop: a request whose loss falls below it is done.
        lead_steps: a request is also done so many steps after the new object leads in all its rows, if it still does; ``None``:
            never.
        optimizer: of target values: ``"adam"`` (the paper's) or ``"polyak"`` (steps from the loss alone, ``lr`` unused).
        compute_dtype: ``"bfloat16"`` to optimise target values with matrix products in that precision above the value
            layer, with δ, loss and optimiser in float32, and so what other methods train in ``layers``; ``None`` for the model's own.
            (:meth:`for_model` chooses.)
        prefixes: number of sampled context prefixes (beside the empty one).
        prefix_length: tokens each.
        seed: of the sampled prefixes; the user's random state is never touched.
        max_tokens: padded tokens per forward pass, which bounds memory; ``None``: from the free memory (:mod:`budget`).
        max_edit_memory: with nearest, megabytes (10⁶ bytes) that what is added to the model for its edits may take; a batch that
            would need more is refused before anything is changed. ``None``: no bound. ``comeba doctor MODEL`` says what an edit takes.
        blocks, projection: names for models that cannot be inspected, see ``Architecture.of``.

    Raises:
        ConfigError: a value is out of range or of the wrong type.
    """

    layers: tuple[int, ...]
    lam: float | None = None
    leverage_ratio: float | None = None
    scope: str = "nearest"
    gate: str = "exact"
    alpha: float | None = None
    alpha_margin: float | None = None
    alpha_floor: float = 0.4
    unnamed_floor: float = 0.85
    question_floor: float | None = None
    steps: int = 25
    lr: float = 0.5
    lr_unit: str = "absolute"
    kl_factor: float = 0.0625
    end_factor: float = 0.0
    chat: bool = False
    weight_decay: float = 0.5
    clamp: float = 0.75
    early_stop: float = 0.05
    lead_steps: int | None = None
    optimizer: str = "adam"
    compute_dtype: str | None = None
    prefixes: int = 5
    prefix_length: int = 10
    seed: int = 0
    max_tokens: int | None = None
    max_edit_memory: float | None = None
    blocks: str | None = None
    projection: str | None = None

    def __post_init__(self) -> None:
        layers = self.layers
        if not isinstance(layers, (list, tuple)) or not layers or not all(is_int(x) and x >= 0 for x in layers):
            raise ConfigError(f"layers must be a non-empty list of block numbers, got {layers!r}")
        if list(layers) != sorted(set(layers)):
            raise ConfigError(f"layers must increase, got {list(layers)}")
        object.__setattr__(self, "layers", tuple(layers))
        for name, choices in (("scope", score_names()), ("gate", GATES), ("optimizer", OPTIMISERS), ("lr_unit", LR_UNITS)):
            if not isinstance(getattr(self, name), str) or getattr(self, name) not in choices:
                raise ConfigError(f"{name} must be one of {', '.join(choices)}, got {getattr(self, name)!r}")
        if not isinstance(self.chat, bool):
            raise ConfigError(f"chat must be true or false, got {self.chat!r}")
        if self.compute_dtype not in (None, "bfloat16"):
            raise ConfigError(f"compute_dtype must be bfloat16 or null, got {self.compute_dtype!r}")
        bounds = {
            "lam": 0,
            "leverage_ratio": 0,
            "alpha_floor": 0,
            "unnamed_floor": 0,
            "lr": 0,
            "clamp": 0,
            "steps": 1,
            "kl_factor": 0,
            "end_factor": 0,
            "weight_decay": 0,
            "early_stop": 0,
            "lead_steps": 0,
            "prefixes": 0,
            "prefix_length": 1,
            "max_tokens": 1,
            "max_edit_memory": 0,
            "seed": 0,
        }
        for name, low in bounds.items():
            value = getattr(self, name)
            if name in ("max_tokens", "max_edit_memory", "lead_steps", "lam", "leverage_ratio") and value is None:
                continue
            positive = name in ("lam", "leverage_ratio", "lr", "clamp", "alpha_floor", "unnamed_floor", "max_edit_memory")
            whole = name in ("steps", "lead_steps", "prefixes", "prefix_length", "max_tokens", "seed")
            if not (is_int(value) if whole else is_number(value)) or value < low or (positive and value <= 0):
                kind = "a whole number" if whole else "a finite number"
                raise ConfigError(f"{name} must be {kind} {'>' if positive else '>='} {low}, got {value!r}")
        if self.alpha_margin is not None and not (is_number(self.alpha_margin) and 0 < self.alpha_margin <= 1):
            raise ConfigError(f"alpha_margin must be null or a number > 0 and <= 1, got {self.alpha_margin!r}")
        if self.alpha is not None and not (self.alpha in (math.inf, -math.inf) or is_number(self.alpha)):
            raise ConfigError(f"alpha must be a number or null, got {self.alpha!r}")
        if self.question_floor is not None and not (is_number(self.question_floor) and -1 <= self.question_floor <= 1):
            raise ConfigError(f"question_floor must be null or a number from -1 to 1, got {self.question_floor!r}")
        for name in ("blocks", "projection"):
            if not isinstance(getattr(self, name), (str, type(None))):
                raise ConfigError(f"{name} must be a module's name or null, got {getattr(self, name)!r}")

    @property
    def margin(self) -> float:
        """``alpha_margin``, or the score's own."""
        return score_named(self.scope).margin if self.alpha_margin is None else self.alpha_margin

    @property
    def ratio(self) -> float:
        """``leverage_ratio``, or the score's own."""
        if self.leverage_ratio is not None:
            return self.leverage_ratio
        score = score_named(self.scope)
        return score.ratio_of_one_layer if len(self.layers) == 1 else score.leverage_ratio

    def lam_of(self, d_in: int) -> float:
        """λ of a layer with ``d_in`` inputs."""
        return d_in / self.ratio if self.lam is None else self.lam

    @property
    def value_layer(self) -> int:
        """The block after which target values live: the last edited one."""
        return self.layers[-1]

    @classmethod
    def for_model(cls, model, **changes) -> EditConfig:
        """Settings for a model's architecture; keyword arguments replace single values.

        In order: what the model's own ``config.json`` says under ``"comeba_ext"``; published values where there are some
        for just this model (GPT2-XL and GPT-J: the paper; Llama 2/3, Mistral and Qwen of 7B and more: EasyEdit's for
        MEMIT); elsewhere settings without a scale, which follow from the model's depth, widths and hidden states. A
        published λ is for scores of the response, where any token may meet the edits; with nearest λ follows from
        ``leverage_ratio``, and target values are asked to end (``end_factor``), which no published objective is. Where nothing is
        published, nearest has one layer, and a score of the response, or none, several layers and smaller target values. Target values
        have matrix products in bfloat16 where the device has them (:func:`~comeba_ext.forward.half_compute.fast_product_dtype`).
        ``comeba tune`` finds better ones for one model.

        Raises:
            ArchitectureError: the model's parts cannot be found.
            ConfigError: a replaced value is out of range.
        """
        values = getattr(model.config, "comeba_ext", None)
        if values is None:
            names = {k: changes.get(k) for k in ("blocks", "projection")}
            architecture = Architecture.of(model, **names)
            depth = architecture.num_blocks(model)
            values = _settings(model.config.get_text_config(), depth)
            if architecture.after_norm(model, depth - 1) is not None:
                values |= {"layers": values["layers"][-1:], "anywhere": {}, **AFTER_NORM}
            values["compute_dtype"] = fast_product_dtype(model)
        return cls.from_dict(changed(values, changes))

    @classmethod
    def from_dict(cls, values: dict, where: str = "configuration") -> EditConfig:
        """Raises :class:`ConfigError` naming unknown keys and the nearest valid ones."""
        if not isinstance(values, dict):
            raise ConfigError(f"{where}: expected keys and values, got {type(values).__name__}")
        fields = [f.name for f in dataclasses.fields(cls)]
        unknown = [key for key in values if key not in fields]
        if unknown:
            hints = []
            for key in unknown:
                near = difflib.get_close_matches(str(key), fields, 1, 0.0)
                hints.append(f"{key!r} (nearest valid: {near[0]!r})" if near else repr(key))
            raise ConfigError(f"{where}: unknown key {', '.join(hints)}")
        if "layers" not in values:
            raise ConfigError(f"{where}: 'layers' is missing")
        try:
            return cls(**values)
        except ConfigError as error:
            raise ConfigError(f"{where}: {error}") from None

    @classmethod
    def from_file(cls, path: str | Path, model=None) -> EditConfig:
        """Read JSON or YAML (by the file's ending).

        Args:
            model: what the file leaves out is as in :meth:`for_model`; without one the file must name ``layers``, and all
                else is as in this class.

        Raises:
            ConfigError: the file is missing or malformed, or has unknown keys or values out of range.
        """
        values = read_settings(path)
        if model is None:
            return cls.from_dict(values, str(path))
        try:
            return cls.for_model(model, **values)
        except ConfigError as error:
            raise ConfigError(f"{path}: {error}") from None

    @classmethod
    def from_easyedit(cls, path: str | Path, model=None) -> EditConfig:
        """Settings of an hparams file of EasyEdit, of the method that it names: :func:`comeba_ext.read_easyedit` says which that is, and
        what became of each field.

        Args:
            model: what the file leaves out is the method's default for it; without one, that of the settings' class.

        Raises:
            ConfigError: the file is missing or malformed, asks for what is not done here, or does not fit the model.
        """
        hparams = hparams_reader()(path)
        for name, how in hparams.differs.items():
            log.warning("%s: %s: %s", path, name, how)
        return hparams.config(model)

    def to_dict(self) -> dict:
        return {**dataclasses.asdict(self), "layers": list(self.layers)}

    def save(self, path: str | Path) -> None:
        """Write JSON or YAML (by the file's ending), atomically."""
        from comeba_ext.storage import write_text

        path = Path(path)
        if path.suffix in (".yaml", ".yml"):
            import yaml

            write_text(path, yaml.safe_dump(self.to_dict(), sort_keys=False))
        else:
            write_text(path, json.dumps(self.to_dict(), indent=2) + "\n")

    def replace(self, **changes) -> EditConfig:
        return dataclasses.replace(self, **changes)


def changed(values: dict, changes: dict) -> dict:
    """Settings with changes; another scope without λ or layers of its own takes what is published for it, or its own."""
    values = dict(values)
    published, anywhere = values.pop("published_lam", None), values.pop("anywhere", {})
    before = values.get("scope", EditConfig.scope)
    scope = changes.get("scope", before)
    if scope != before:
        values.pop("lam", None)
    met_anywhere = scope not in score_names() or not score_named(scope).compares_keys
    if met_anywhere:
        values |= anywhere
    both = {**values, **changes}
    if published is not None and met_anywhere and both.get("lam") is None and both.get("leverage_ratio") is None:
        both["lam"] = published
    if published is not None and not met_anywhere:  # nothing is published for it
        both.setdefault("end_factor", END_FACTOR)
    return both


# model_type -> (blocks, hidden size at least) of the models that EasyEdit ships MEMIT settings for
_EASYEDIT = {"llama": (32, 4096), "mistral": (32, 4096), "qwen2": (28, 3584), "qwen3": (36, 4096)}


def _settings(config, depth: int) -> dict:
    """Published values where there are some, elsewhere scale-free ones; ``published_lam`` for scores of the response.

    GPT2-XL and GPT-J: the paper, section 4.1 and appendix. Others: the MEMIT settings that EasyEdit ships.
    """
    kind = config.model_type
    if kind == "gpt2" and depth == 48:
        return {"layers": (13, 14, 15, 16, 17), "published_lam": 15_000.0}
    if kind == "gptj" and depth == 28:
        return {"layers": tuple(range(3, 9)), "published_lam": 15_000.0}
    known = _EASYEDIT.get(kind)
    if known and depth >= known[0] and config.hidden_size >= known[1]:
        return {"layers": tuple(range(4, 9)), "clamp": 4.0, "weight_decay": 1e-3, "published_lam": 15_000.0}
    layers = _by_depth(depth)
    # Where any token may meet the edits, each layer's share is to be small, and so are values (bench/results/clamp.json). Where the right
    # tokens do, one layer gives what target values were found for: those of several change the hidden states between them, too.
    return {"layers": layers[-1:], "anywhere": {"layers": layers, "clamp": EditConfig.clamp}, **SCALE_FREE}


END_FACTOR = 0.25
# One layer whatever the score; what is added before a norm is small.
AFTER_NORM = {"leverage_ratio": NearestScore.ratio_of_one_layer, "weight_decay": 0.05}
# Hidden norms of models differ a hundredfold; Polyak's steps need no rate (the one here is Adam's, for who prefers it).
SCALE_FREE = {"optimizer": "polyak", "lr": 0.4, "lr_unit": "hidden_rms", "clamp": 4.0, "end_factor": END_FACTOR}


def _by_depth(depth: int) -> tuple[int, ...]:
    """Blocks 4–8 of 32, in proportion, and never the last block, after which nothing could read the edit."""
    first, last = round(depth / 8), max(round(depth / 4), round(depth / 8))
    last = max(0, min(last, depth - 2))
    return tuple(range(min(first, last), last + 1))


def is_int(value) -> bool:
    return isinstance(value, int) and not isinstance(value, bool)


def is_number(value) -> bool:
    return isinstance(value, (int, float)) and not isinstance(value, bool) and math.isfinite(value)


def check_fields(config: EditConfig, **kinds: tuple[str, ...]) -> None:
    """Check fields of a method's own settings.

    Args:
        kinds: names of fields by what their values must be, a key of ``KINDS``; with ``_or_none``, ``None`` will do as well.

    Raises:
        ConfigError: the first that is something else.
    """
    for kind, names in kinds.items():
        words, fits = KINDS[kind.removesuffix("_or_none")]
        for name in names:
            value, optional = getattr(config, name), kind.endswith("_or_none")
            if not (fits(value) or (optional and value is None)):
                raise ConfigError(f"{name} must be {'null or ' if optional else ''}{words}, got {value!r}")


KINDS = {
    "positive": ("a finite number > 0", lambda value: is_number(value) and value > 0),
    "not_negative": ("a finite number >= 0", lambda value: is_number(value) and value >= 0),
    "shares": ("a number > 0 and <= 1", lambda value: is_number(value) and 0 < value <= 1),
    "counts": ("a whole number > 0", lambda value: is_int(value) and value > 0),
    "flags": ("true or false", lambda value: isinstance(value, bool)),
    "texts": ("text", lambda value: isinstance(value, str)),
    "parts": (
        "a list of names of layers inside a block",
        lambda value: isinstance(value, (list, tuple)) and all(isinstance(part, str) for part in value),
    ),
}
