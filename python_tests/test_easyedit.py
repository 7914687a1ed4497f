"""EasyEdit's hparams files as methods and settings here; files written from its fields, expectations worked out by hand."""

import json

import pytest
import yaml
from test_cli import run

from comeba_ext import EditConfig, Editor, read_easyedit, testbed
from comeba_ext.errors import ArchitectureError, ConfigError
from comeba_ext.methods.alphaedit import AlphaEditConfig
from comeba_ext.methods.ft import FTConfig
from comeba_ext.methods.grace import GraceConfig
from comeba_ext.methods.lora import LoraConfig
from comeba_ext.methods.wise import WiseConfig

NAMES = """
model_name: "./hugging_cache/llama-2-7b"
stats_dir: "./data/stats"
device: 0
rewrite_module_tmp: "model.layers.{}.mlp.down_proj"
layer_module_tmp: "model.layers.{}"
mlp_module_tmp: "model.layers.{}.mlp"
attn_module_tmp: "model.layers.{}.self_attn"
ln_f_module: "model.norm"
lm_head_module: "lm_head"
mom2_dataset: "wikipedia"
mom2_n_samples: 100000
mom2_dtype: "float32"
model_parallel: false
"""
LOCATED = """
layer_selection: "all"
fact_token: "subject_last"
v_num_grad_steps: 20
v_lr: 5e-1
v_loss_layer: 31
v_weight_decay: 1e-3
kl_factor: 0.0625
clamp_norm_factor: 4
"""
MEMIT = f'alg_name: "MEMIT"\nlayers: [4, 5, 6, 7, 8]\nmom2_adjustment: true\nmom2_update_weight: 15000\n{LOCATED}{NAMES}'
ROME = (
    f'alg_name: "ROME"\nlayers: [5]\nmom2_adjustment: false\ncontext_template_length_params: [[5, 10], [10, 10]]\n'
    f"{LOCATED.replace('clamp_norm_factor: 4', '')}{NAMES}"
)
ALPHA = MEMIT.replace("MEMIT", "AlphaEdit") + 'nullspace_threshold: 2e-2\nL2: 10\nP_loc: "./null_space_project.pt"\n'
PMET = MEMIT.replace("MEMIT", "PMET").replace(
    'rewrite_module_tmp: "model.layers.{}.mlp.down_proj"',
    'rewrite_module_tmps: ["model.layers.{}.self_attn.o_proj", "model.layers.{}.mlp.down_proj"]\nnll_loss_factor: 1.0',
)
FT = """
alg_name: "FT"
model_name: gpt2
device: 0
layers: [21]
num_steps: 25
batch_size: 1
max_length: 40
lr: 5e-4
weight_decay: 0
kl_factor: 0
norm_constraint: false
objective_optimization: "prompt_last"
rewrite_module_tmp: "model.layers.{}.mlp.down_proj.weight"
layer_module_tmp: "model.layers.{}"
model_parallel: false
"""
LORA = """
alg_name: LoRA
model_name: x
device: 0
lora_type: "adalora"
layers: []
num_steps: 70
batch_size: 1
max_length: 30
lr: 5e-3
weight_decay: 0
kl_factor: 0
rank: 8
lora_alpha: 32
lora_dropout: 0.1
norm_constraint: false
target_modules: ["q_proj", "v_proj"]
model_parallel: false
"""
GRACE = """
alg_name: GRACE
model_name: x
device: 0
inner_params:
- model.layers[27].mlp.down_proj.weight
edit_lr: 1.0
n_iter: 50
eps: 1.5
dist_fn: euc
val_init: cold
val_train: sgd
val_reg: None
reg: early_stop
replacement: replace_last
eps_expand: coverage
num_pert: 8
dropout: 0.0
model_parallel: false
"""
WISE = """
alg_name: WISE
model_name: x
device: 0
mask_ratio: 0.2
edit_lr: 0.9
n_iter: 60
norm_constraint: 1.1
act_margin: [5.0, 20.0, 10.0]
act_ratio: 0.88
save_freq: 400
merge_freq: 800
merge_alg: ties
objective_optimization: only_label
inner_params:
- model.layers[27].mlp.down_proj.weight
densities: 0.53
weights: 1.0
model_parallel: false
use_chat_template: false
"""
HERE = {"blocks": "model.layers", "projection": "mlp.down_proj"}
OPTIMISED = {"optimizer": "adam", "lr_unit": "absolute", "early_stop": 0.05, "end_factor": 0.0, "compute_dtype": None}
VALUES = {"steps": 20, "lr": 0.5, "weight_decay": 0.001, "kl_factor": 0.0625, **OPTIMISED, **HERE}
MEMIT_VALUES = {"layers": (4, 5, 6, 7, 8), "lam": 15000, "clamp": 4, "prefixes": 5, "prefix_length": 10, **VALUES}
TRAINED = {"lr_unit": "absolute", "early_stop": 0.01, **HERE}
# file, method, class of the settings, their values, fields that differ
FILES = {
    "MEMIT": (MEMIT, "MEMIT", EditConfig, MEMIT_VALUES, set()),
    "ROME": (
        ROME,
        "ROME",
        EditConfig,
        {"layers": (5,), "lam": None, "prefixes": 20, "prefix_length": 10, **VALUES},
        {"mom2_adjustment", "context_template_length_params"},
    ),
    "R-ROME": (
        ROME.replace('"ROME"', '"R-ROME"').replace(", [10, 10]", ""),
        "R-ROME",
        EditConfig,
        {"prefixes": 10, "prefix_length": 5},
        {"mom2_adjustment"},
    ),
    "AlphaEdit": (ALPHA, "AlphaEdit", AlphaEditConfig, {**MEMIT_VALUES, "null_threshold": 0.02, "null_share": None, "ridge": 10}, set()),
    "PMET": (PMET, "PMET", EditConfig, MEMIT_VALUES, {"rewrite_module_tmps"}),
    "FT": (
        FT,
        "FT",
        FTConfig,
        {"layers": (21,), "steps": 25, "lr": 5e-4, "weight_decay": 0, "norm_constraint": None, "chunk": 1, **TRAINED},
        {"objective_optimization"},
    ),
    "FT-L": (
        FT.replace("norm_constraint: false", "norm_constraint: 5e-4").replace("prompt_last", "target_new"),
        "FT-L",
        FTConfig,
        {"norm_constraint": 5e-4},
        set(),
    ),
    "GRACE": (
        GRACE,
        "GRACE",
        GraceConfig,
        {"layers": (27,), "lr": 1.0, "steps": 50, "radius": 1.5, "warm": False, **TRAINED},
        {"replacement", "num_pert"},
    ),
    "WISE": (
        WISE,
        "WISE",
        WiseConfig,
        {
            **{"layers": (27,), "lr": 0.9, "steps": 60, "mask_ratio": 0.2, "norm_constraint": 1.1, "low": 5.0, "high": 20.0},
            **{
                "margin_loss": 10.0,
                "threshold_share": 0.88,
                "save_every": 400,
                "merge_every": 800,
                "density": 0.53,
                "prefixes": 10,
                **TRAINED,
            },
        },
        set(),
    ),
}


@pytest.fixture
def file(tmp_path):
    def write(text, name="hparams.yaml"):
        (tmp_path / name).write_text(text)
        return tmp_path / name

    return write


@pytest.fixture(scope="module")
def base():
    return testbed.load()


@pytest.mark.parametrize("name", FILES)
def test_settings_of_a_file(file, caplog, name):
    text, method, kind, values, differs = FILES[name]
    path = file(text)
    hparams = read_easyedit(path)
    config = EditConfig.from_easyedit(path)
    assert hparams.method == method and type(config) is kind and config == hparams.config()
    assert {name: getattr(config, name) for name in values} == values
    assert set(hparams.differs) == differs == {name for name in differs if f"{name}: " in caplog.text}
    assert {"model_name", "device", "model_parallel"} <= set(hparams.elsewhere)
    assert hparams.loss_layer == (31 if "v_loss_layer" in text else None)


def test_json_and_spellings(file):
    path = file(json.dumps(yaml.safe_load(MEMIT) | {"alg_name": "memit"}), "hparams.json")
    assert read_easyedit(path).method == "MEMIT"
    gpt2 = MEMIT.replace("model.layers.{}.mlp.down_proj", "transformer.h.{}.mlp.c_proj")
    assert EditConfig.from_easyedit(file(gpt2)).blocks == "transformer.h"


def test_on_a_model_it_edits(file, base):
    """What the model has of its own accord needs no name; and the method runs with these settings."""
    text = MEMIT.replace("[4, 5, 6, 7, 8]", "[1, 2]").replace("v_loss_layer: 31", "v_loss_layer: 4").replace("15000", "300")
    hparams = read_easyedit(file(text))
    model = testbed.load()[0]
    config = hparams.config(model)
    assert config == EditConfig.from_easyedit(file(text), model)
    assert (config.blocks, config.projection, config.layers, config.lam, config.clamp) == (None, None, (1, 2), 300, 4)
    assert config.scope == "always"  # as of every method without a threshold
    editor = Editor(model, base[1], config, method=hparams.method)
    editor.collect_covariance(testbed.texts(), tokens=3_000, progress=False)
    report = editor.edit(testbed.facts()[:1])
    assert report.answered == [True] and editor.method.name == "MEMIT"


def test_what_needs_the_model(file, base):
    path = file(LORA)
    with pytest.raises(ConfigError, match="names no layers, which means all: give the model"):
        EditConfig.from_easyedit(path)
    config = EditConfig.from_easyedit(path, base[0])
    assert type(config) is LoraConfig and read_easyedit(path).method == "LoRA"
    assert (config.layers, config.parts) == ((0, 1, 2, 3, 4), ("self_attn.q_proj", "self_attn.v_proj"))
    assert (config.steps, config.lr, config.rank, config.lora_alpha) == (70, 5e-3, 8, 32)
    assert set(read_easyedit(path).differs) == {"lora_type", "lora_dropout"}
    with pytest.raises(ConfigError, match="target_modules: a block has 0 layers named 'query'"):
        EditConfig.from_easyedit(file(LORA.replace("q_proj", "query")), base[0])
    with pytest.raises(ConfigError, match="v_loss_layer 31: the loss is read behind the last block, which is 4"):
        EditConfig.from_easyedit(file(MEMIT), base[0])
    small = MEMIT.replace("v_loss_layer: 31", "")
    with pytest.raises((ConfigError, ArchitectureError), match="mlp.down_proj"):
        EditConfig.from_easyedit(file(small.replace("mlp.down_proj", "self_attn.o_proj")), base[0])
    with pytest.raises(ArchitectureError, match="transformer.h"):
        EditConfig.from_easyedit(file(small.replace("model.layers.{}.mlp.down_proj", "transformer.h.{}.mlp.c_proj")), base[0])


EMMET = MEMIT.replace('"MEMIT"', "EMMET") + "update_norm_lambda: 0\nemmet_lambda: 0.2\n"
REFUSED = [
    (EMMET, r"layers \[4, 5, 6, 7, 8\]: EMMET writes one layer"),
    (EMMET.replace("[4, 5, 6, 7, 8]", "[5]").replace("lambda: 0\n", "lambda: 1\n"), "update_norm_lambda 1"),
    (MEMIT.replace("subject_last", "subject_first"), "fact_token 'subject_first': .*subject's last token"),
    (MEMIT.replace('"all"', '"random"'), "layer_selection 'random': only 'all'"),
    (MEMIT.replace("kl_factor: 0.0625", "kl_factor: much"), "kl_factor must be a finite number"),
    (MEMIT.replace("[4, 5, 6, 7, 8]", "[8, 4]"), "layers must increase"),
    (MEMIT.replace("v_loss_layer: 31", "v_loss_layer: last"), "v_loss_layer must be a block's number"),
    (MEMIT.replace("model.layers.{}.mlp.down_proj", "model.layers.mlp"), "rewrite_module_tmp 'model.layers.mlp': expected a name with one"),
    (MEMIT + "v_momentum: 0.9\n", "v_momentum 0.9 is not known of MEMIT; take the line out"),
    (MEMIT + "norm_constraint: 1\n", "norm_constraint 1 is not known of MEMIT"),
    (ROME.replace("[[5, 10], [10, 10]]", "[5, 10]"), "context_template_length_params must be pairs"),
    (PMET.replace('"model.layers.{}.mlp.down_proj"]', "]"), "rewrite_module_tmps .*expected the MLP's projection"),
    (PMET.replace("nll_loss_factor: 1.0", "nll_loss_factor: 2"), "nll_loss_factor"),
    (FT.replace("kl_factor: 0", "kl_factor: 1"), "kl_factor 1: fine-tuning has no KL term"),
    (FT.replace("num_steps: 25", "num_steps: 0"), "steps must be a whole number"),
    (GRACE.replace("euc", "cos"), "dist_fn 'cos': distances are Euclidean"),
    (GRACE.replace("- model.layers[27].mlp.down_proj.weight", "- a\n- b"), "inner_params .*expected the name of one weight"),
    (GRACE.replace("- model.layers[27].mlp.down_proj.weight", "- lm_head.weight"), "inner_params 'lm_head.weight'"),
    (GRACE.replace("val_train: sgd", "val_train: adv"), "val_train 'adv'"),
    (WISE.replace("merge_alg: ties", "merge_alg: slerp"), "merge_alg 'slerp': shards are merged by TIES"),
    (WISE.replace("[5.0, 20.0, 10.0]", "[5.0]"), "act_margin must be three numbers"),
    ("alg_name: MEND\n", "alg_name 'MEND': only hparams of MEMIT, PMET"),
    ("layers: [1]\n", "alg_name is missing"),
    ("alg_name: [\n", "not valid .yaml"),
    ("- 1\n", "expected keys and values"),
]


def test_emmets_ridge(file):
    config = EditConfig.from_easyedit(file(EMMET.replace("[4, 5, 6, 7, 8]", "[5]")))
    assert (list(config.layers), config.ridge, config.clamp) == ([5], 0.2, EditConfig.from_easyedit(file(MEMIT)).clamp)


@pytest.mark.parametrize("text, message", REFUSED)
def test_refused(file, text, message):
    path = file(text)
    with pytest.raises(ConfigError, match=message) as error:
        EditConfig.from_easyedit(path)
    assert str(path) in str(error.value) and "\n" not in str(error.value).split("not valid")[0]


def test_no_file(tmp_path):
    with pytest.raises(ConfigError, match="No such file"):
        read_easyedit(tmp_path / "none.yaml")


def test_as_a_config_file(file, base, tmp_path):
    """``--config`` and ``from_file`` say how it is read; what is saved then is a ``--config``."""
    path = file(MEMIT)
    with pytest.raises(ConfigError, match="hparams file of EasyEdit.*EditConfig.from_easyedit"):
        EditConfig.from_file(path, base[0])
    given = ("--prompt", "{} is", "--subject", "Peru", "--target", "x", "--out", tmp_path / "out")
    result = run("edit", "testbed", *given, "--config", path)
    assert result.exit_code == 1 and "EditConfig.from_easyedit" in result.stderr and "--method" in result.stderr
    assert not (tmp_path / "out").exists()
    EditConfig.from_easyedit(path).save(tmp_path / "config.yaml")
    assert EditConfig.from_file(tmp_path / "config.yaml") == EditConfig.from_easyedit(path)
