"""Target values by cached pasts against the plain procedure, on a tiny model of every supported family."""

import importlib.util
from pathlib import Path

import pytest
import torch
import transformers

from comeba_ext import EditConfig
from comeba_ext.editing.target_values import optimise_target_values
from comeba_ext.forward.architectures import FAMILIES, Architecture
from comeba_ext.forward.cached_suffix import CachedRows, Suffix
from comeba_ext.text.request import EditRequest
from comeba_ext.text.rows import essence_rows, target_rows

PLAIN = Path(__file__).parents[1] / "bench" / "plain_procedure.py"
GPT = {"n_embd": 32, "n_layer": 4, "n_head": 4, "n_positions": 128}
NEO = {
    "hidden_size": 32,
    "num_layers": 4,
    "num_heads": 4,
    "max_position_embeddings": 128,
    "window_size": 5,
    "attention_types": [[["global", "local"], 2]],
}
LLAMA = {
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": 4,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": 128,
}
HEADS = LLAMA | {"head_dim": 12}
NEOX = {k: v for k, v in LLAMA.items() if k != "num_key_value_heads"}
MIXED = {"layer_types": ["full_attention", "sliding_attention"] * 2, "sliding_window": 6}
OPT = {
    "hidden_size": 32,
    "ffn_dim": 48,
    "num_hidden_layers": 4,
    "num_attention_heads": 4,
    "word_embed_proj_dim": 16,
    "max_position_embeddings": 128,
}
CONFIGS = {
    "gpt2": GPT,
    "gptj": GPT | {"rotary_dim": 4},
    "gpt_neo": NEO,
    "gpt_neox": NEOX,
    "opt": OPT,
    "phi": LLAMA,
    "llama": LLAMA,
    "mistral": HEADS | {"sliding_window": 6},
    "qwen2": LLAMA | MIXED | {"use_sliding_window": True},
    "qwen3": HEADS | MIXED | {"use_sliding_window": True},
    "gemma": HEADS,
    "gemma2": HEADS | MIXED | {"final_logit_softcapping": 2.0, "attn_logit_softcapping": 3.0, "query_pre_attn_scalar": 9},
    "gemma3_text": HEADS | MIXED | {"final_logit_softcapping": 2.0, "query_pre_attn_scalar": 9},
    "phi3": LLAMA | {"sliding_window": 6},
    "olmo2": LLAMA,
    "granite": LLAMA | {"logits_scaling": 2.0},
    "smollm3": LLAMA,
    # no row of the table: found by inspection and by trial
    "stablelm": LLAMA,
    "falcon": {k: v for k, v in NEOX.items() if k not in ("intermediate_size", "max_position_embeddings")},
    "bloom": {"hidden_size": 32, "n_layer": 4, "n_head": 4},
}
REQUESTS = [
    EditRequest("The mother tongue of {} is", "Danielle Darrieux", "English"),
    EditRequest("{} works in the field of", "Marie Curie", "the piano and the guitar"),
    EditRequest("The capital of {}, as everyone knows and says, is", "Peru", "Paris"),
    EditRequest("{} is located in", "A", "Oslo, Norway", wordings=["Who built it? Where is {}, and who", "A"]),
]
PREFIXES = ["", "The city of Paris, and who built it? "]


@pytest.fixture(scope="module")
def plain():
    if not PLAIN.exists():
        pytest.skip("the plain procedure is part of the repository, not of the package")
    spec = importlib.util.spec_from_file_location("plain_procedure", PLAIN)
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def family_model(family, tokenizer, dtype=torch.float64, **changes):
    """Four random blocks, of the kinds the family mixes; weights large enough to tell prompts apart."""
    values = CONFIGS[family] | {"vocab_size": len(tokenizer), "pad_token_id": 0, "bos_token_id": 1, "eos_token_id": 1}
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        config = transformers.AutoConfig.for_model(family, **(values | changes))
        model = transformers.AutoModelForCausalLM.from_config(config).eval()
        for name, p in model.named_parameters():
            if p.dim() > 1:
                torch.nn.init.normal_(p, std=0.25 if "embed" not in name else 0.5)
    return model.to(dtype)


def settings(**changes):
    basic = {
        "layers": (0, 1),
        "steps": 14,
        "lr": 0.1,
        "lr_unit": "hidden_rms",
        "kl_factor": 0.5,
        "weight_decay": 2.0,
        "clamp": 0.9,
        "early_stop": 0.0,
    }
    return EditConfig(**(basic | changes))


def pieces(model, tokenizer):
    suffix = Suffix(model, Architecture.of(model), 1, 0, 4096)
    return suffix, [*target_rows(tokenizer, REQUESTS, PREFIXES), *essence_rows(tokenizer, REQUESTS)]


def relative(found, wanted):
    return ((found - wanted).norm() / wanted.norm()).item()


def test_every_family_is_here():
    assert set(FAMILIES) <= set(CONFIGS)


@pytest.mark.parametrize("attention", ["sdpa", "eager"])
@pytest.mark.parametrize("family", CONFIGS)
def test_cached_past_gives_what_whole_rows_give(family, attention, tokenizer):
    try:  # in float64 the families' own eager masks overflow their float32 softmax
        dtype = torch.float32 if attention == "eager" else torch.float64
        model = family_model(family, tokenizer, dtype, attn_implementation=attention)
    except ValueError:
        pytest.skip(f"{family} has no {attention} attention")
    suffix, rows = pieces(model, tokenizer)
    assert suffix.caches(rows) == (family != "bloom")
    if family == "bloom":
        return
    suffix.whole = True
    whole = CachedRows(suffix, rows)
    suffix.prepare(rows)
    assert suffix.contexts.length > 5
    cached = CachedRows(suffix, rows)
    assert whole.past is None and cached.past.length == max(row.subject_last for row in rows)
    shift = torch.randn(len(rows), 32, dtype=dtype, generator=torch.Generator().manual_seed(0))
    order = {id(row): n for n, row in enumerate(rows)}
    read = {id(row): list(range(row.subject_last, row.end)) for row in rows}
    for only_some in (False, True):  # the last block's MLP runs at all positions, or only where it is read
        read = {row: positions[-1:] if only_some else positions for row, positions in read.items()}
        outputs = []
        for batch in (whole, cached):
            at = [(n, p - start) for n, (row, start) in enumerate(zip(batch.rows, batch.starts.tolist())) for p in read[id(row)]]
            out = batch.run(shift[[order[id(row)] for row in batch.rows]], tuple(torch.tensor(at).T))
            outputs.append(dict(zip((key for row in batch.rows for key in ((id(row), p) for p in read[id(row)])), out)))
        assert outputs[0].keys() == outputs[1].keys()
        for place, wanted in outputs[0].items():
            assert relative(outputs[1][place], wanted) < 1e-5  # many families norm or attend in float32


@pytest.mark.parametrize("family", CONFIGS)
def test_target_values_are_those_of_the_plain_procedure(family, tokenizer, plain):
    single = family == "gemma2"  # has eager attention only, whose masks overflow in float64
    model, config = family_model(family, tokenizer, torch.float32 if single else torch.float64), settings()
    found = optimise_target_values(model, tokenizer, Architecture.of(model), config, REQUESTS, PREFIXES)
    for request, value, loss in zip(REQUESTS, found.values, found.losses, strict=True):
        wanted, wanted_loss, steps = plain.target_value(model, tokenizer, config, request, PREFIXES)
        assert steps == 13
        assert relative(value, wanted) < (1e-3 if single else 1e-6)
        assert loss == pytest.approx(wanted_loss, rel=1e-3 if single else 1e-6, abs=1e-6)
