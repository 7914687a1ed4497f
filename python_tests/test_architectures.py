"""Finding a model's parts, on tiny random models of every listed family and some unlisted ones."""

import copy

import pytest
import torch
import transformers
from torch import nn
from transformers.pytorch_utils import Conv1D

from comeba_ext.editing.config import EditConfig
from comeba_ext.errors import ArchitectureError, ConfigError
from comeba_ext.forward.architectures import FAMILIES, Architecture
from comeba_ext.forward.partial import inputs_at_ends
from comeba_ext.methods import default_config

WIDTH, BLOCKS = 16, 3
GPT = {"n_embd": WIDTH, "n_layer": BLOCKS, "n_head": 2, "n_positions": 32}
LLAMA = {"hidden_size": WIDTH, "intermediate_size": 40, "num_hidden_layers": BLOCKS, "num_attention_heads": 2}
LLAMA |= {"num_key_value_heads": 1, "max_position_embeddings": 32}
HEADS = LLAMA | {"head_dim": 12}  # attention wider than the model: its output projection is a decoy
NEOX = {k: v for k, v in LLAMA.items() if k != "num_key_value_heads"}
OPT = {"hidden_size": WIDTH, "ffn_dim": 40, "num_hidden_layers": BLOCKS, "num_attention_heads": 2}
OPT |= {"max_position_embeddings": 32, "word_embed_proj_dim": 8}  # narrower embeddings: the decoder projects back
NEO = {"hidden_size": WIDTH, "num_layers": BLOCKS, "num_heads": 2, "max_position_embeddings": 32}
NEO |= {"attention_types": [[["global"], BLOCKS]], "intermediate_size": 40}
# class stem -> (model_type, config, decoder, blocks, projection)
LISTED = {
    "GPT2": ("gpt2", GPT, "transformer", "transformer.h", "mlp.c_proj"),
    "GPTJ": ("gptj", GPT | {"rotary_dim": 4}, "transformer", "transformer.h", "mlp.fc_out"),
    "GPTNeo": ("gpt_neo", NEO, "transformer", "transformer.h", "mlp.c_proj"),
    "GPTNeoX": ("gpt_neox", NEOX, "gpt_neox", "gpt_neox.layers", "mlp.dense_4h_to_h"),
    "OPT": ("opt", OPT, "model.decoder", "model.decoder.layers", "fc2"),
    "Phi": ("phi", LLAMA, "model", "model.layers", "mlp.fc2"),
    "Llama": ("llama", LLAMA, "model", "model.layers", "mlp.down_proj"),
    "Mistral": ("mistral", HEADS, "model", "model.layers", "mlp.down_proj"),
    "Qwen2": ("qwen2", LLAMA, "model", "model.layers", "mlp.down_proj"),
    "Qwen3": ("qwen3", HEADS, "model", "model.layers", "mlp.down_proj"),
    "Gemma": ("gemma", HEADS, "model", "model.layers", "mlp.down_proj"),
    "Gemma2": ("gemma2", HEADS | {"final_logit_softcapping": 0.05}, "model", "model.layers", "mlp.down_proj"),
    "Gemma3": ("gemma3_text", HEADS | {"final_logit_softcapping": 0.05}, "model", "model.layers", "mlp.down_proj"),
    "Phi3": ("phi3", LLAMA | {"pad_token_id": 0}, "model", "model.layers", "mlp.down_proj"),
    "Olmo2": ("olmo2", LLAMA, "model", "model.layers", "mlp.down_proj"),
    "Granite": ("granite", LLAMA | {"logits_scaling": 7.0}, "model", "model.layers", "mlp.down_proj"),
    "SmolLM3": ("smollm3", LLAMA | {"pad_token_id": 0}, "model", "model.layers", "mlp.down_proj"),
}
FALCON = {k: v for k, v in NEOX.items() if k not in ("intermediate_size", "max_position_embeddings")}
UNLISTED = {
    "StableLm": (LLAMA, "model", "model.layers", "mlp.down_proj", "model.norm"),
    "Falcon": (FALCON, "transformer", "transformer.h", "mlp.dense_4h_to_h", "transformer.ln_f"),
    "Bloom": (
        {"hidden_size": WIDTH, "n_layer": BLOCKS, "n_head": 2},
        "transformer",
        "transformer.h",
        "mlp.dense_4h_to_h",
        "transformer.ln_f",
    ),
    "Mpt": (
        {"d_model": WIDTH, "n_layers": BLOCKS, "n_heads": 2, "max_seq_len": 32},
        "transformer",
        "transformer.blocks",
        "ffn.down_proj",
        "transformer.norm_f",
    ),
}


def build(stem, config, device="cpu"):
    config_class = getattr(transformers, {"Gemma3": "Gemma3TextConfig"}.get(stem, f"{stem}Config"))
    suffix = "LMHeadModel" if stem == "GPT2" else "ForCausalLM"
    with torch.random.fork_rng(devices=[]), torch.device(device):
        torch.manual_seed(0)
        ids = {"pad_token_id": None, "bos_token_id": None, "eos_token_id": None}
        model = getattr(transformers, stem + suffix)(config_class(**({"vocab_size": 50} | ids | config)))
    return model.eval()


def assert_parts(model, found):
    """The projection writes d_model from another width, the norm is d_model wide, and head∘decoder is the model."""
    assert found.num_blocks(model) == BLOCKS
    tokens = torch.randint(2, 50, (2, 6), generator=torch.Generator().manual_seed(0))
    for index in range(BLOCKS):
        assert found.block(model, index) is model.get_submodule(found.blocks)[index]
        layer = model.get_submodule(found.projection_name(index))
        assert isinstance(layer, (nn.Linear, Conv1D))
        shape = layer.weight.shape if isinstance(layer, nn.Linear) else layer.weight.T.shape
        assert shape[0] == WIDTH and shape[1] in (40, 4 * WIDTH)
    assert model.get_submodule(found.final_norm).weight.shape == (WIDTH,)
    with torch.no_grad():
        logits = model(tokens).logits
        hidden = model.get_submodule(found.decoder)(tokens)[0]
        torch.testing.assert_close(found.head(model)(hidden), logits, rtol=1e-5, atol=1e-6)
        name, width = found.mlp(model, 1)
        assert found.projection_name(1).startswith(name)
        read = inputs_at_ends(model.get_submodule(found.decoder), {name: model.get_submodule(name)}, tokens.tolist(), 0, 100, "cpu")
        assert read[name].shape == (len(tokens), width) and read[name].abs().sum() > 0


@pytest.mark.parametrize("stem", LISTED)
def test_listed_families(stem):
    model_type, config, decoder, blocks, projection = LISTED[stem]
    model = build(stem, config)
    assert model.config.model_type == model_type
    found = Architecture.of(model)
    assert (found.decoder, found.blocks, found.projection) == (decoder, blocks, projection)
    assert found.projection_name(1) == f"{blocks}.1.{projection}"
    assert_parts(model, found)
    layers = EditConfig.for_model(model).layers
    assert layers and all(0 <= layer < BLOCKS - 1 for layer in layers)


def test_every_listed_family_is_tested():
    assert {row[0] for row in LISTED.values()} == set(FAMILIES)


@pytest.mark.parametrize("stem", LISTED)
def test_inspection_finds_the_listed_families_too(stem):
    _, config, decoder, blocks, projection = LISTED[stem]
    model = build(stem, config)
    model.config.model_type = "unlisted"
    found = Architecture.of(model)
    assert (found.decoder, found.blocks, found.projection) == (decoder, blocks, projection)
    assert_parts(model, found)


@pytest.mark.parametrize("stem", UNLISTED)
def test_unlisted_families_are_found_by_inspection(stem):
    config, decoder, blocks, projection, norm = UNLISTED[stem]
    model = build(stem, config)
    assert model.config.model_type not in FAMILIES
    found = Architecture.of(model)
    assert found == Architecture(decoder, blocks, projection, norm)
    assert_parts(model, found)
    named = Architecture.of(model, blocks=blocks, projection=projection)
    assert named == found


def test_an_unfindable_projection_gives_one_clear_error():
    small = LLAMA | {"num_local_experts": 2, "num_experts_per_tok": 1}
    with pytest.raises(ArchitectureError, match=r"MixtralForCausalLM.*EditConfig\(projection="):
        Architecture.of(build("Mixtral", small))


def test_narrow_embeddings_do_not_mislead_inspection():
    model = build("OPT", OPT)
    model.config.model_type = "unlisted"
    found = Architecture.of(model)
    assert (found.blocks, found.projection) == ("model.decoder.layers", "fc2")
    assert_parts(model, found)


def test_encoders_are_refused():
    tiny = {"vocab_size": 50, "hidden_size": 16, "num_hidden_layers": 2, "num_attention_heads": 2}
    bert = transformers.BertConfig(**tiny, intermediate_size=40)
    distilbert = transformers.DistilBertConfig(vocab_size=50, dim=16, n_layers=2, n_heads=2, hidden_dim=40)
    t5 = transformers.T5Config(vocab_size=50, d_model=16, d_kv=8, d_ff=40, num_layers=2, num_heads=2)
    for model, reason in (
        (transformers.BertForMaskedLM(bert), "encoder-only"),
        (transformers.BertForPreTraining(bert), "encoder-only"),
        (transformers.BertModel(bert), "no language-model head"),
        (transformers.DistilBertForMaskedLM(distilbert), "encoder-only"),
        (transformers.T5ForConditionalGeneration(t5), "encoder-decoder"),
        (transformers.T5EncoderModel(copy.deepcopy(t5)), "encoder|no language-model head"),
        (build("GPT2", GPT).transformer, "no language-model head"),
        (nn.Linear(2, 2), "no language-model head"),
    ):
        with pytest.raises(ArchitectureError, match=reason):
            Architecture.of(model)
        with pytest.raises(ArchitectureError, match=reason):
            Architecture.of(model, blocks="transformer.h", projection="mlp.c_proj")


@pytest.mark.parametrize(
    "names, reason",
    [
        ({"blocks": "transformer.layers"}, "transformer.layers"),
        ({"blocks": "transformer"}, "transformer"),
        ({"blocks": "transformer.wte"}, "transformer.wte"),
        ({"blocks": "transformer.h", "projection": "mlp.down_proj"}, "transformer.h.0.mlp.down_proj"),
        ({"projection": "mlp.down_proj"}, "transformer.h.0.mlp.down_proj"),
        ({"projection": "ln_1"}, "ln_1 is a LayerNorm"),
        ({"projection": "mlp"}, "mlp is a GPT2MLP"),
        ({"projection": "mlp.c_fc"}, "mlp.c_fc"),
        ({"blocks": ""}, "blocks"),
    ],
)
def test_wrong_names_are_refused(names, reason):
    with pytest.raises(ArchitectureError, match=reason):
        Architecture.of(build("GPT2", GPT), **names)


def test_peft_is_looked_through():
    peft = pytest.importorskip("peft")
    plain = build("GPT2", GPT)
    lora = peft.LoraConfig(r=2, target_modules=["c_proj"], fan_in_fan_out=True, task_type="CAUSAL_LM")
    model = peft.get_peft_model(plain, lora)
    found = Architecture.of(model)
    assert found.decoder == "base_model.model.transformer" and found.projection == "mlp.c_proj"
    assert model.get_submodule(found.decoder) is plain.transformer
    assert model.get_submodule(found.projection_name(2)) is plain.transformer.h[2].mlp.c_proj
    assert model.get_submodule(found.final_norm) is plain.transformer.ln_f
    tokens = torch.arange(2, 8)[None]
    with torch.no_grad():
        hidden = model.get_submodule(found.decoder)(tokens)[0]
        torch.testing.assert_close(found.head(model)(hidden), model(input_ids=tokens).logits)
    model.config.model_type = "unlisted"
    assert Architecture.of(model) == found
    assert EditConfig.for_model(model).layers[-1] < BLOCKS - 1


# ---- settings by family and depth -------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "stem, config, layers, clamp",
    [
        ("GPT2", GPT | {"n_layer": 48}, (13, 14, 15, 16, 17), 0.75),
        ("GPTJ", GPT | {"n_layer": 28, "rotary_dim": 4}, (3, 4, 5, 6, 7, 8), 0.75),
        ("Llama", LLAMA | {"num_hidden_layers": 32, "hidden_size": 4096}, (4, 5, 6, 7, 8), 4.0),
        ("Mistral", LLAMA | {"num_hidden_layers": 32, "hidden_size": 4096}, (4, 5, 6, 7, 8), 4.0),
    ],
)
@pytest.mark.parametrize("scope", ["zscore", "reference", "nearest"])
def test_published_settings(stem, config, layers, clamp, scope):
    """A published λ is for scores of the response; with nearest it follows from the ratio."""
    found = EditConfig.for_model(build(stem, config, device="meta"), scope=scope)
    assert (found.layers, found.clamp, found.lam) == (layers, clamp, None if scope == "nearest" else 15_000.0)
    assert (found.lr, found.lr_unit, found.steps) == (0.5, "absolute", 25)
    assert EditConfig.for_model(build(stem, config, device="meta"), scope=scope, leverage_ratio=2.0).lam is None


@pytest.mark.parametrize("depth, layers", [(30, (4, 5, 6, 7, 8)), (18, (2, 3, 4)), (12, (2, 3))])
def test_other_models_get_settings_without_a_scale(depth, layers):
    """``nearest`` edits the last of the blocks that the scores of the response, and methods without one, edit together and by less."""
    model = build("Llama", LLAMA | {"num_hidden_layers": depth}, device="meta")
    found = EditConfig.for_model(model)
    assert (found.layers, found.clamp, found.lam, found.lr_unit, found.scope) == (layers[-1:], 4.0, None, "hidden_rms", "nearest")
    for other in (EditConfig.for_model(model, scope="zscore"), default_config("AlphaEdit", model)):
        assert (other.layers, other.clamp, other.lam) == (layers, 0.75, None)
    assert EditConfig.for_model(model, scope="zscore", clamp=2.0).clamp == 2.0


@pytest.mark.parametrize("stem, key", [("GPT2", "n_layer"), ("GPTJ", "n_layer"), ("Llama", "num_hidden_layers")])
@pytest.mark.parametrize("depth", [2, 3, 4, 6, 11, 12, 16, 23, 24, 36, 80])
def test_the_last_block_is_never_edited(stem, key, depth):
    config = LISTED[stem][1] | {key: depth}
    layers = EditConfig.for_model(build(stem, config, device="meta")).layers
    assert layers == tuple(range(layers[0], layers[-1] + 1)) and layers[-1] < depth - 1


def test_changes_and_the_models_own_settings():
    model = build("GPT2", GPT)
    assert EditConfig.for_model(model, layers=[0], lam=3.0).lam == 3.0
    with pytest.raises(ConfigError, match="'lamb'.*'lam'"):
        EditConfig.for_model(model, lamb=3.0)
    model.config.comeba_ext = {"layers": [1], "lam": 7.0}
    own = EditConfig.for_model(model, steps=4)
    assert (own.layers, own.lam, own.steps) == ((1,), 7.0, 4)
