"""EasyEdit's hparams files (``hparams/MEMIT/llama-7b.yaml``) as this package's methods and settings.

    hparams = read_easyedit("hparams/MEMIT/llama-7b.yaml")
    editor = Editor(model, tokenizer, hparams.config(model), method=hparams.method)
    hparams.elsewhere, hparams.differs       # what was not taken over, and why

Every field of a file is a setting here, has its place elsewhere (the model's name, a batch's size), says what is done in another way
here, or is refused. What a file leaves out is as EasyEdit's code has it where it is a number of the optimisation, else the method's
default.
"""

from __future__ import annotations

import re
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path

from torch import nn

from comeba_ext.editing.config import EditConfig, is_int, is_number
from comeba_ext.editing.settings_files import load_settings, reads_hparams
from comeba_ext.errors import ConfigError
from comeba_ext.forward.architectures import Architecture
from comeba_ext.methods.names import method_named
from comeba_ext.methods.settings import default_config

# Fields that are not settings of a method here.
ELSEWHERE = {
    "model_name": "the model is handed to Editor, or named to the command",
    "model_class": "the model is handed to Editor",
    "tokenizer_class": "the tokenizer is handed to Editor",
    "tokenizer_name": "the tokenizer is handed to Editor",
    "device": "edits are made where the model is; --device, model.to(…)",
    "model_parallel": "a model over several GPUs is loaded so (device_map='auto', --device auto)",
    "fp16": "the dtype is the model's; --dtype",
    "stats_dir": "a covariance is a file: save_covariance(path), load_covariance(path), 'comeba covariance'",
    "mom2_dataset": "the covariance is of the texts that you give: collect_covariance(texts)",
    "mom2_n_samples": "collect_covariance(texts, tokens=…)",
    "mom2_dtype": "moments are summed in float64 where that is needed",
    "results_dir": "nothing is written unless you name a path",
    "batch_size": "a batch is what is handed to edit(…), or edit_all(…, batch_size=…)",
    "max_length": "a prompt is never cut; one that is too long is an error",
    "layer_module_tmp": "found in the model",
    "mlp_module_tmp": "found in the model",
    "attn_module_tmp": "found in the model",
    "ln_f_module": "found in the model",
    "lm_head_module": "found in the model",
    "use_chat_template": "evaluate(…, writing=Writing(chat=True)), --chat",
    "P_loc": "the projector is made from the covariance, in seconds",
}

_RENAMED = {  # theirs -> ours
    "layers": "layers",
    "clamp_norm_factor": "clamp",
    "v_num_grad_steps": "steps",
    "v_lr": "lr",
    "v_weight_decay": "weight_decay",
    "kl_factor": "kl_factor",
    "mom2_update_weight": "lam",
}
# What EasyEdit's code does and no file says: Adam in the model's own precision until a loss of 0.05, five prefixes of ten tokens.
_TARGETS = {
    "optimizer": "adam",
    "lr_unit": "absolute",
    "early_stop": 0.05,
    "end_factor": 0.0,
    "lead_steps": None,
    "compute_dtype": None,
    "prefixes": 5,
    "prefix_length": 10,
}
_TRAINED = {"lr_unit": "absolute", "early_stop": 0.01}


@dataclass(frozen=True)
class EasyEditHparams:
    """An hparams file that was read.

    Attributes:
        path: of it.
        method: name of the method here.
        settings: of that method, by our names.
        elsewhere: fields that are no settings here, and where their place is.
        differs: fields, or what stands for them, that are handled in another way here, and how: numbers may differ for it.
    """

    path: str
    method: str
    settings: dict
    elsewhere: dict[str, str] = field(default_factory=dict)
    differs: dict[str, str] = field(default_factory=dict)
    loss_layer: int | None = None

    def config(self, model: nn.Module | None = None) -> EditConfig:
        """Settings for a model; without one what the file leaves out is the class's default, and names are not checked.

        Raises:
            ConfigError: the settings do not fit the method or the model, or the file needs one to be understood.
            ArchitectureError: the model has no parts of the names given.
        """
        kind = method_named(self.method)
        try:
            if model is None:
                if "layers" not in self.settings:
                    raise ConfigError("names no layers, which means all: give the model as well")
                return kind.config_class.from_dict({**({} if kind.scored else {"scope": "always"}), **self.settings}, self.path)
            settings = dict(self.settings)
            names = {name: settings.pop(name, None) for name in ("blocks", "projection")}
            found = Architecture.of(model)
            if names["blocks"] is not None:
                named = Architecture.of(model, **names)
                if (named.blocks, named.projection) != (found.blocks, found.projection):
                    settings |= names
            depth = found.num_blocks(model)
            if self.loss_layer not in (None, depth - 1):
                raise ConfigError(f"v_loss_layer {self.loss_layer}: the loss is read behind the last block, which is {depth - 1} here")
            if "parts" in settings:
                settings["parts"] = _parts(settings["parts"], found.block(model, 0))
            return default_config(kind, model, **settings)
        except ConfigError as error:
            raise ConfigError(str(error) if self.path in str(error) else f"{self.path}: {error}") from None


@reads_hparams
def read_easyedit(path: str | Path) -> EasyEditHparams:
    """Read an hparams file of EasyEdit (YAML or JSON).

    Understood are MEMIT, PMET, EMMET, ROME, R-ROME, AlphaEdit, FT, LoRA, GRACE and WISE.

    Raises:
        ConfigError: it is missing, malformed or of another method; or a field is unknown, or asks for what is not done here.
    """
    values = load_settings(path)
    name = values.pop("alg_name", None)
    if name is None:
        raise ConfigError(f"{path}: no hparams of EasyEdit: alg_name is missing")
    reader = _READERS.get("".join(c for c in str(name).lower() if c.isalnum()))
    if reader is None:
        known = "MEMIT, PMET, EMMET, ROME, R-ROME, AlphaEdit, FT, LoRA, GRACE, WISE"
        raise ConfigError(
            f"{path}: alg_name {name!r}: only hparams of {known} are read; 'comeba experiment' and docs/methods.md list what else there is"
        )
    fields = _Fields(values)
    try:
        method = reader(fields)
        fields.finish(method)
    except ConfigError as error:
        raise ConfigError(f"{path}: {error}") from None
    return EasyEditHparams(str(path), method, fields.settings, fields.elsewhere, fields.differs, fields.loss_layer)


class _Fields:
    """A file's fields, taken one by one; and what became of them."""

    def __init__(self, values: dict):
        self.values = values
        self.settings: dict = {}
        self.elsewhere: dict[str, str] = {}
        self.differs: dict[str, str] = {}
        self.loss_layer: int | None = None

    def take(self, theirs: str, ours: str | None = None) -> object:
        """A field's value, or ``None``; kept as the setting ``ours``."""
        value = self.values.pop(theirs, None)
        if ours is not None and value is not None:
            self.settings[ours] = value
        return value

    def only(self, theirs: str, *accepted: object, why: str) -> None:
        """Raises :class:`ConfigError` for another value than these."""
        if theirs in self.values and (value := self.values.pop(theirs)) not in accepted:
            raise ConfigError(f"{theirs} {value!r}: {why}")

    def differ(self, theirs: str, how: str, *same: object) -> None:
        """A field that is handled in another way here, unless it has one of the values ``same``."""
        if theirs in self.values and self.values.pop(theirs) not in same:
            self.differs[theirs] = how

    def where(self, theirs: str) -> None:
        """The layers' names: ``model.layers.{}.mlp.down_proj`` gives blocks and projection."""
        value = self.values.pop(theirs, None)
        if value is None:
            return
        parts = str(value).removesuffix(".weight").split(".{}.")
        if len(parts) != 2 or not all(parts):
            raise ConfigError(f"{theirs} {value!r}: expected a name with one '{{}}' for the block, such as model.layers.{{}}.mlp.down_proj")
        self.settings |= dict(zip(("blocks", "projection"), parts))

    def one_layer(self, theirs: str) -> None:
        """``["model.layers[27].mlp.down_proj.weight"]`` gives block, blocks and projection."""
        value = self.values.pop(theirs, None)
        names = [value] if isinstance(value, str) else value
        if not isinstance(names, list) or len(names) != 1:
            raise ConfigError(f"{theirs} {value!r}: expected the name of one weight, such as model.layers[27].mlp.down_proj.weight")
        found = re.fullmatch(r"([\w.]+)[.\[](\d+)\]?\.([\w.]+?)(\.weight)?", str(names[0]))
        if found is None:
            raise ConfigError(f"{theirs} {names[0]!r}: expected a name such as model.layers[27].mlp.down_proj.weight")
        self.settings |= {"layers": [int(found[2])], "blocks": found[1], "projection": found[3]}

    def finish(self, method: str) -> None:
        """What every file may hold, and nothing else."""
        for theirs in [theirs for theirs in self.values if theirs in ELSEWHERE]:
            if not (theirs == "fp16" and self.values[theirs] is False):
                self.elsewhere[theirs] = ELSEWHERE[theirs]
            del self.values[theirs]
        if self.values:
            name, value = next(iter(self.values.items()))
            raise ConfigError(f"{name} {value!r} is not known of {method}; take the line out if it does not matter")


def _located(method: str) -> Callable[[_Fields], str]:
    """Methods that find target values and write them into MLP projections."""

    def read(fields: _Fields) -> str:
        fields.settings |= _TARGETS
        for theirs, ours in _RENAMED.items():
            fields.take(theirs, ours)
        fields.only("layer_selection", "all", why="only 'all' is done")
        fields.only("fact_token", "subject_last", why="edits are made at the subject's last token; EditRequest(fact_token='last') asks for "
                                                      "the prompt's")  # fmt: skip
        fields.where("rewrite_module_tmp")
        layer = fields.take("v_loss_layer")
        if layer is not None and not is_int(layer):
            raise ConfigError(f"v_loss_layer must be a block's number, got {layer!r}")
        fields.loss_layer = layer
        fields.differ("mom2_adjustment", "the covariance of your texts always counts (collect_covariance)", True)
        lengths = fields.take("context_template_length_params")
        if lengths is not None:
            good = isinstance(lengths, list) and all(isinstance(p, list) and len(p) == 2 and all(map(is_int, p)) for p in lengths)
            if not good or not lengths:
                raise ConfigError(f"context_template_length_params must be pairs of a length and a number of prefixes, got {lengths!r}")
            fields.settings |= {"prefixes": sum(count for _, count in lengths), "prefix_length": max(length for length, _ in lengths)}
            if len({length for length, _ in lengths}) > 1:
                fields.differs["context_template_length_params"] = "all prefixes have the greatest length"
        return method

    return read


def _alphaedit(fields: _Fields) -> str:
    if fields.take("nullspace_threshold", "null_threshold") is not None:
        fields.settings["null_share"] = None
    fields.take("L2", "ridge")
    return _located("AlphaEdit")(fields)


def _emmet(fields: _Fields) -> str:
    fields.take("emmet_lambda", "ridge")
    fields.only("update_norm_lambda", 0, 0.0, why="the update's norm has no weight of its own")
    layers = fields.values.get("layers")
    if isinstance(layers, list) and len(layers) > 1:
        raise ConfigError(f"layers {layers}: EMMET writes one layer, as its authors' settings do; name one")
    return _located("EMMET")(fields)


def _pmet(fields: _Fields) -> str:
    names = fields.take("rewrite_module_tmps")
    if names is not None:
        mlp = [name for name in names if "attn" not in str(name)] if isinstance(names, list) else []
        if len(mlp) != 1:
            raise ConfigError(f"rewrite_module_tmps {names!r}: expected the MLP's projection, and the attention's beside it")
        fields.values["rewrite_module_tmp"] = mlp[0]
        if len(names) > 1:
            fields.differs["rewrite_module_tmps"] = "the attention's own target values are not found; only the MLP's projection is written"
    if fields.take("nll_loss_factor") not in (None, 1, 1.0):
        raise ConfigError("nll_loss_factor: the weight of the new object's loss is 1 here; scale kl_factor instead")
    return _located("PMET")(fields)


def _ft(fields: _Fields) -> str:
    fields.settings |= _TRAINED
    for theirs, ours in {"layers": "layers", "num_steps": "steps", "lr": "lr", "weight_decay": "weight_decay"}.items():
        fields.take(theirs, ours)
    bound = fields.take("norm_constraint")
    if bound not in (None, False):
        fields.settings["norm_constraint"] = bound
    fields.take("batch_size", "chunk")
    fields.where("rewrite_module_tmp")
    fields.only("kl_factor", 0, 0.0, why="fine-tuning has no KL term")
    fields.differ("objective_optimization", "the new object is asked for teacher-forced, token by token", "target_new")
    if fields.settings.get("weight_decay"):
        fields.differs["weight_decay"] = "it pulls towards the model's own weight, not towards zero"
    return "FT-L" if "norm_constraint" in fields.settings else "FT"


def _lora(fields: _Fields) -> str:
    fields.settings |= _TRAINED
    for theirs, ours in {"num_steps": "steps", "lr": "lr", "rank": "rank", "lora_alpha": "lora_alpha", "target_modules": "parts"}.items():
        fields.take(theirs, ours)
    layers = fields.take("layers")
    if layers:
        fields.settings["layers"] = layers
    for theirs in ("norm_constraint", "weight_decay", "kl_factor"):
        fields.only(theirs, 0, 0.0, False, None, why="there is none in LoRA here")
    fields.differ("lora_type", "the rank is fixed", "lora")
    fields.differ("lora_dropout", "there is none", 0, 0.0)
    return "LoRA"


def _grace(fields: _Fields) -> str:
    fields.settings |= _TRAINED
    for theirs, ours in {"edit_lr": "lr", "n_iter": "steps", "eps": "radius"}.items():
        fields.take(theirs, ours)
    fields.one_layer("inner_params")
    fields.only("dist_fn", "euc", why="distances are Euclidean")
    fields.only("eps_expand", "coverage", why="only 'coverage' is done")
    start = fields.take("val_init")
    if start not in (None, "cold", "warm"):
        raise ConfigError(f"val_init {start!r}: expected cold or warm")
    if start is not None:
        fields.settings["warm"] = start == "warm"
    fields.only("val_train", "sgd", why="values are trained as they are, without adversaries")
    fields.only("val_reg", None, "None", why="values have no regulariser")
    fields.only("reg", "early_stop", why="a value is done when its loss is low (early_stop)")
    fields.differ("replacement", "every token is looked at on its own, not the prompt's last one alone")
    for theirs in ("num_pert", "dropout"):
        fields.differ(theirs, "nothing is drawn at random for a value", 0, 0.0)
    return "GRACE"


def _wise(fields: _Fields) -> str:
    fields.settings |= _TRAINED
    renamed = {"edit_lr": "lr", "n_iter": "steps", "mask_ratio": "mask_ratio", "norm_constraint": "norm_constraint"}
    renamed |= {"act_ratio": "threshold_share", "save_freq": "save_every", "merge_freq": "merge_every", "densities": "density"}
    for theirs, ours in renamed.items():
        fields.take(theirs, ours)
    fields.one_layer("inner_params")
    margins = fields.take("act_margin")
    if margins is not None:
        if not isinstance(margins, list) or len(margins) != 3 or not all(map(is_number, margins)):
            raise ConfigError(f"act_margin must be three numbers, got {margins!r}")
        fields.settings |= dict(zip(("low", "high", "margin_loss"), margins))
    fields.settings["prefixes"] = 10  # five of five tokens and five of ten, which no file names
    fields.only("merge_alg", "ties", why="shards are merged by TIES")
    fields.only("weights", 1, 1.0, why="shards count alike in a merge")
    fields.only("replay", False, None, why="earlier edits are not replayed")
    fields.differ("retrieve", "a sequence goes to the shard that fits it best, as with retrieve: true", True)
    fields.differ("objective_optimization", "only the new object's tokens are asked for", "only_label")
    return "WISE"


def _parts(names: object, block: nn.Module) -> list[str]:
    """``["q_proj"]`` as names inside a block."""
    found = []
    for name in names if isinstance(names, list) else [names]:
        inside = [own for own, _ in block.named_modules() if own == name or own.endswith(f".{name}")]
        if len(inside) != 1:
            raise ConfigError(f"target_modules: a block has {len(inside)} layers named {name!r}")
        found += inside
    return found


_READERS = {
    "memit": _located("MEMIT"),
    "rome": _located("ROME"),
    "rrome": _located("R-ROME"),
    "emmet": _emmet,
    "pmet": _pmet,
    "alphaedit": _alphaedit,
    "ft": _ft,
    "lora": _lora,
    "grace": _grace,
    "wise": _wise,
}
