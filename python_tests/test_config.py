"""EditConfig: files, unknown keys, ranges."""

import json
import math

import pytest
import torch

from comeba_ext.editing.config import EditConfig
from comeba_ext.errors import ConfigError
from comeba_ext.methods import default_config

CHANGED = EditConfig(
    layers=(3, 5),
    lam=7.5,
    scope="reference",
    alpha=math.inf,
    steps=9,
    lr=0.2,
    lr_unit="hidden_rms",
    kl_factor=0.0,
    weight_decay=0.1,
    clamp=2.0,
    early_stop=0.01,
    prefixes=0,
    prefix_length=3,
    seed=4,
    max_tokens=99,
    max_edit_memory=1.5,
    blocks="model.layers",
    projection="mlp.down_proj",
)


@pytest.mark.parametrize("name", ["x.json", "x.yaml", "x.yml"])
@pytest.mark.parametrize("config", [EditConfig(layers=[1, 2]), CHANGED], ids=["defaults", "changed"])
def test_files_round_trip(tmp_path, name, config):
    path = tmp_path / name
    config.save(path)
    assert EditConfig.from_file(path) == config == EditConfig.from_file(str(path))
    assert [p.name for p in tmp_path.iterdir()] == [name]
    assert EditConfig.from_dict(config.to_dict()) == config


def test_json_is_json(tmp_path):
    config = EditConfig(layers=(1,))
    config.save(tmp_path / "x.json")
    assert json.loads((tmp_path / "x.json").read_text())["layers"] == [1]
    assert config.replace(lam=2.0).lam == 2.0 and config.lam is None
    with pytest.raises(ConfigError, match="lam"):
        config.replace(lam=-1.0)


def test_scientific_notation_without_a_dot_is_a_number_in_yaml(tmp_path):
    (tmp_path / "x.yaml").write_text("layers: [1]\nlr: 1e-3\nlam: 2e4\nalpha: .inf\n")
    config = EditConfig.from_file(tmp_path / "x.yaml")
    assert (config.lr, config.lam, config.alpha) == (1e-3, 2e4, math.inf)


@pytest.mark.parametrize("key, nearest", [("laers", "layers"), ("learning_rate", None), ("kl_facter", "kl_factor")])
def test_unknown_keys_are_named_with_the_nearest(tmp_path, key, nearest):
    (tmp_path / "x.json").write_text(json.dumps({"layers": [1], key: 2}))
    with pytest.raises(ConfigError) as error:
        EditConfig.from_file(tmp_path / "x.json")
    assert "x.json" in str(error.value) and repr(key) in str(error.value)
    if nearest:
        assert f"nearest valid: {nearest!r}" in str(error.value)


def test_all_unknown_keys_are_named():
    with pytest.raises(ConfigError, match="'lamb'.*'stps'"):
        EditConfig.from_dict({"layers": [1], "lamb": 1, "stps": 2})
    with pytest.raises(ConfigError, match="unknown key 7"):
        EditConfig.from_dict({"layers": [1], 7: 1})


BAD = [("layers", bad) for bad in ([], (), None, 3, "4", [1.0], [True], [-1], [2, 1], [1, 1], ["1"])]
BAD += [
    (name, bad) for name in ("lam", "lr", "clamp") for bad in (0, -1, math.nan, math.inf, "1", None, True) if (name, bad) != ("lam", None)
]
BAD += [(name, bad) for name in ("kl_factor", "weight_decay", "early_stop") for bad in (-0.1, math.nan, "a", None)]
BAD += [("leverage_ratio", bad) for bad in (0, -1, math.nan, "1", True)] + [
    (name, bad) for name in ("alpha_floor", "unnamed_floor") for bad in (-0.1, 0, None, "a")
]
BAD += [("max_edit_memory", bad) for bad in (0, -1, math.inf, "1", True)]
BAD += [("end_factor", bad) for bad in (-0.1, math.nan, "1", None, True)]
BAD += [("lead_steps", bad) for bad in (-1, 0.5, "3", True)]
BAD += [(name, bad) for name in ("steps", "prefix_length", "max_tokens") for bad in (0, -1, 1.5, "3", True)]
BAD += [(name, None) for name in ("steps", "prefix_length")]
BAD += [(name, bad) for name in ("prefixes", "seed") for bad in (-1, 0.5, "3", None)]
BAD += [(name, bad) for name in ("scope", "optimizer", "lr_unit") for bad in ("other", None, 3, ["adam"], {})]
BAD += [("alpha", bad) for bad in (math.nan, "2.2", True, [1])]
BAD += [(name, bad) for name in ("blocks", "projection") for bad in (3, ["h"])]


@pytest.mark.parametrize("name, value", BAD)
def test_values_out_of_range(name, value):
    with pytest.raises(ConfigError, match=name):
        EditConfig(**({"layers": (1,)} | {name: value}))


@pytest.mark.parametrize("alpha", [None, 0, 2.2, -1.0, math.inf, -math.inf])
def test_any_number_is_a_threshold(alpha):
    assert EditConfig(layers=(1,), alpha=alpha).alpha == alpha


@pytest.mark.parametrize("scope, ratio", [("zscore", 1.0), ("reference", 1.0), ("nearest", 4.0)])
def test_lambda_follows_from_the_ratio(scope, ratio):
    assert EditConfig(layers=(1, 2), scope=scope).lam_of(1536) == 1536 / ratio
    assert EditConfig(layers=(1,), scope=scope).lam_of(1536) == 1536 / (32 if scope == "nearest" else ratio)
    assert EditConfig(layers=(1,), scope=scope, leverage_ratio=8.0).lam_of(1536) == 192
    assert EditConfig(layers=(1,), scope=scope, leverage_ratio=8.0, lam=7.0).lam_of(1536) == 7


@pytest.mark.parametrize("scope, layers", [(None, [8]), ("nearest", [8]), ("zscore", [4, 5, 6, 7, 8]), ("reference", [4, 5, 6, 7, 8])])
def test_one_layer_where_keys_are_compared(scope, layers):
    """Of a model without published settings; scores of the response spread an edit."""
    from transformers import AutoModelForCausalLM, LlamaConfig

    with torch.device("meta"):
        model = AutoModelForCausalLM.from_config(
            LlamaConfig(hidden_size=8, intermediate_size=8, num_hidden_layers=30, num_attention_heads=1)
        )
    found = EditConfig.for_model(model, **({"scope": scope} if scope else {}))
    assert list(found.layers) == layers and found.lam is None
    assert list(EditConfig.for_model(model, scope=scope or "nearest", layers=[2, 3]).layers) == [2, 3]
    assert list(default_config("MEMIT", model).layers) == [4, 5, 6, 7, 8]
    assert list(default_config("ROME", model).layers) == [6]


@pytest.mark.parametrize("scope", ["nearest", "zscore"])
def test_a_ratio_takes_the_place_of_a_published_lambda(scope):
    from transformers import AutoModelForCausalLM, GPT2Config

    with torch.device("meta"):
        xl = AutoModelForCausalLM.from_config(GPT2Config(n_embd=8, n_head=1, n_layer=48))
    for made in (
        EditConfig.for_model(xl, scope=scope, leverage_ratio=4.0),
        default_config("COMEBA-HK", xl, scope=scope, leverage_ratio=4.0),
    ):
        assert made.lam is None and made.lam_of(6400) == 1600
    assert default_config("COMEBA-HK", xl, scope=scope, lam=7.0).lam_of(6400) == 7
    assert default_config("COMEBA-HK", xl, scope="zscore").lam_of(6400) == default_config("MEMIT-seq", xl).lam_of(6400) == 15_000


@pytest.mark.parametrize("kind, depth, width", [("LlamaConfig", 32, 4096), ("MistralConfig", 32, 4096), ("Qwen2Config", 28, 3584)])
def test_large_models_have_easyedits_settings_as_one(kind, depth, width):
    """hparams/MEMIT/llama-7b, mistral-7b and qwen2.5-7b.yaml: with a norm of 4 goes a small penalty of it."""
    import transformers

    config = getattr(transformers, kind)(
        num_hidden_layers=depth, hidden_size=width, intermediate_size=8, num_attention_heads=8, vocab_size=32
    )
    with torch.device("meta"):
        model = transformers.AutoModelForCausalLM.from_config(config)
    found = default_config("MEMIT", model)
    assert (list(found.layers), found.clamp, found.weight_decay, found.lam) == ([4, 5, 6, 7, 8], 4, 1e-3, 15_000)


def test_blocks_that_are_named_take_the_place_of_published_modules():
    import transformers

    config = transformers.LlamaConfig(num_hidden_layers=32, hidden_size=4096, intermediate_size=8, num_attention_heads=8, vocab_size=128256)
    with torch.device("meta"):
        model = transformers.AutoModelForCausalLM.from_config(config)
    assert set(default_config("UltraEdit", model).modules) == {"mlp.gate_proj", "mlp.up_proj"}
    found = default_config("UltraEdit", model, layers=[5, 6])
    assert list(found.layers) == [5, 6] and not found.modules
    assert default_config("UltraEdit", model, layers=[5], modules={"mlp.up_proj": [5]}).modules == {"mlp.up_proj": [5]}


def test_published_objectives_do_not_ask_for_an_end():
    from transformers import AutoModelForCausalLM, GPT2Config, LlamaConfig

    from comeba_ext import testbed

    with torch.device("meta"):
        xl = AutoModelForCausalLM.from_config(GPT2Config(n_embd=8, n_head=1, n_layer=48))
        other = AutoModelForCausalLM.from_config(
            LlamaConfig(hidden_size=8, intermediate_size=8, num_hidden_layers=30, num_attention_heads=1)
        )
    ends = lambda model, **changes: EditConfig.for_model(model, **changes).end_factor  # noqa: E731
    assert ends(xl) == ends(other) == ends(other, scope="zscore") == 0.25  # nearest is not the paper's
    assert ends(xl, scope="zscore") == default_config("MEMIT", xl).end_factor == 0
    assert ends(xl, end_factor=1.0) == 1.0 and ends(other, end_factor=0) == 0
    assert default_config("MEMIT", other).end_factor == 0.25  # methods that look for target values share them
    assert ends(testbed.load()[0]) == 0  # its settings are its own


def test_a_file_may_hold_just_what_differs(tmp_path):
    from comeba_ext import testbed

    model = testbed.load()[0]
    (tmp_path / "x.yaml").write_text("scope: zscore\nsteps: 9\n")
    found = EditConfig.from_file(tmp_path / "x.yaml", model)
    assert found == EditConfig.for_model(model, scope="zscore", steps=9)
    assert found.layers == EditConfig.for_model(model).layers and found.lam is None  # the model's own is for its own score
    with pytest.raises(ConfigError, match="layers"):
        EditConfig.from_file(tmp_path / "x.yaml")
    (tmp_path / "x.yaml").write_text("stps: 9\n")
    with pytest.raises(ConfigError, match=r"x\.yaml.*'stps'.*'steps'"):
        EditConfig.from_file(tmp_path / "x.yaml", model)


def test_value_layer_is_the_last():
    assert EditConfig(layers=[3, 4, 7]).value_layer == 7


@pytest.mark.parametrize("suffix", ["json", "yaml"])
def test_missing_file(tmp_path, suffix):
    with pytest.raises(ConfigError, match=f"none.{suffix}"):
        EditConfig.from_file(tmp_path / f"none.{suffix}")
    (tmp_path / f"folder.{suffix}").mkdir()
    with pytest.raises(ConfigError, match=f"folder.{suffix}"):
        EditConfig.from_file(tmp_path / f"folder.{suffix}")


@pytest.mark.parametrize(
    "name, content",
    [
        ("x.json", b'{"layers": [1'),
        ("x.json", b""),
        ("x.json", b"[1, 2]"),
        ("x.json", b"\xff\xfe"),
        ("x.json", b"{}"),
        ("x.yaml", b"layers: [1"),
        ("x.yaml", b"layers: 1: 2"),
        ("x.yaml", b""),
        ("x.yaml", b"just text"),
        ("x.yaml", b"lam: 3"),
        ("x.yaml", b"layers: !!python/object/apply:os.getcwd []"),
    ],
)
def test_malformed_files(tmp_path, name, content):
    (tmp_path / name).write_bytes(content)
    with pytest.raises(ConfigError, match=name):
        EditConfig.from_file(tmp_path / name)


def test_an_out_of_range_value_in_a_file_names_the_file(tmp_path):
    (tmp_path / "x.json").write_text('{"layers": [1], "steps": 0}')
    with pytest.raises(ConfigError, match=r"x\.json.*steps"):
        EditConfig.from_file(tmp_path / "x.json")
