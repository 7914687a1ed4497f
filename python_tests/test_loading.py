"""Models from folders and GGUF files, and one clear error for what is neither."""

import json
import time

import huggingface_hub
import pytest
import torch
from test_cli import run

from comeba_ext import testbed
from comeba_ext.errors import ComebaError
from comeba_ext.loading import load_model

gguf = pytest.importorskip("gguf", reason="the extra gguf is not installed")


@pytest.fixture(scope="module")
def tiny_gguf(tokenizer, tmp_path_factory):
    """A Llama of one block and 16 dimensions as an F16 GGUF file, and its weights by GGUF's names."""
    path = tmp_path_factory.mktemp("gguf") / "tiny.gguf"
    writer = gguf.GGUFWriter(path, "llama")
    writer.add_block_count(1)
    writer.add_context_length(64)
    writer.add_embedding_length(16)
    writer.add_feed_forward_length(32)
    writer.add_head_count(2)
    writer.add_head_count_kv(2)
    writer.add_layer_norm_rms_eps(1e-5)
    writer.add_vocab_size(len(tokenizer))
    state = json.loads(tokenizer.backend_tokenizer.to_str())["model"]
    vocab = sorted(state["vocab"], key=state["vocab"].get)
    writer.add_tokenizer_model("gpt2")
    writer.add_tokenizer_pre("gpt-2")
    writer.add_token_list(vocab)
    writer.add_token_types([3 if token.startswith("<") and len(token) > 3 else 1 for token in vocab])
    writer.add_token_merges([pair if isinstance(pair, str) else " ".join(pair) for pair in state["merges"]])
    writer.add_bos_token_id(1)
    writer.add_eos_token_id(1)
    generator = torch.Generator().manual_seed(0)
    sizes = {
        "token_embd": (len(tokenizer), 16),
        "output": (len(tokenizer), 16),
        "blk.0.attn_q": (16, 16),
        "blk.0.attn_k": (16, 16),
        "blk.0.attn_v": (16, 16),
        "blk.0.attn_output": (16, 16),
        "blk.0.ffn_gate": (32, 16),
        "blk.0.ffn_up": (32, 16),
        "blk.0.ffn_down": (16, 32),
    }
    weights = {name: torch.randn(*size, generator=generator).half() for name, size in sizes.items()}
    for name, tensor in weights.items():
        writer.add_tensor(f"{name}.weight", tensor.numpy())
    for name in ("output_norm", "blk.0.attn_norm", "blk.0.ffn_norm"):
        writer.add_tensor(f"{name}.weight", torch.ones(16).numpy())
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return path, weights


def test_a_gguf_file_is_a_model_like_any_other(tiny_gguf, tokenizer, tmp_path):
    path, weights = tiny_gguf
    model, own = load_model(path)
    assert model.dtype == torch.float32 and not model.training
    for ours, theirs in (("model.embed_tokens", "token_embd"), ("model.layers.0.mlp.down_proj", "blk.0.ffn_down")):
        assert torch.equal(model.get_submodule(ours).weight, weights[theirs].float())
    text = "The capital of Norway is Oslo"
    assert own(text)["input_ids"][-5:] == tokenizer(text)["input_ids"][-5:]
    model.save_pretrained(tmp_path / "folder")  # which Transformers refuses before its marks are taken off
    own.save_pretrained(tmp_path / "folder")
    again, _ = load_model(tmp_path / "folder")
    ids = torch.tensor([own(text)["input_ids"]])
    with torch.no_grad():
        assert torch.equal(again(ids).logits, model(ids).logits)
    assert load_model(path, dtype=torch.bfloat16)[0].dtype == torch.bfloat16


def test_commands_take_a_gguf_file(tiny_gguf):
    result = run("generate", tiny_gguf[0], "The capital of Norway is", "--json")
    assert result.exit_code == 0, result.output
    assert json.loads(result.stdout)["generations"]


EDITS = json.dumps({"format": 1, "files": {}, "model": {"model_type": "llama", "num_blocks": 30}})


@pytest.mark.parametrize(
    "name, content, words",
    [
        ("none.gguf", None, "no such file"),
        ("text.gguf", b"not a model", "not a GGUF file"),
        ("short.gguf", b"GGUF\x03\x00\x00\x00", "cannot load"),
        ("nowhere", None, "cannot load.*no such folder"),
        ("empty", {}, "holds no config.json"),
        ("edits", {"comeba_edits.json": EDITS}, "holds edits of a llama model of 30 blocks; give the base model.*--edits"),
        ("torn", {"comeba_edits.json": "{"}, "holds edits; give the base model.*--edits"),
    ],
)
def test_what_is_no_model(tmp_path, name, content, words):
    if isinstance(content, dict):
        (tmp_path / name).mkdir()
        for file, text in content.items():
            (tmp_path / name / file).write_text(text)
    elif content is not None:
        (tmp_path / name).write_bytes(content)
    with pytest.raises(ComebaError, match=words) as error:
        load_model(tmp_path / name)
    assert name in str(error.value)


@pytest.fixture
def no_network(monkeypatch):
    """A hub's address that nobody answers at."""
    monkeypatch.setattr(huggingface_hub.constants, "ENDPOINT", "http://127.0.0.1:9")
    monkeypatch.setattr(
        huggingface_hub.constants, "HUGGINGFACE_CO_URL_TEMPLATE", "http://127.0.0.1:9/{repo_id}/resolve/{revision}/{filename}"
    )


@pytest.mark.parametrize("name", ["user/no-such-model", "no-such-model"])
def test_a_name_without_a_network_is_asked_for_once(no_network, name):
    start = time.perf_counter()
    with pytest.raises(ComebaError, match=f"cannot load a model from '{name}': there is no such folder.* no way to the hub"):
        load_model(name)
    assert time.perf_counter() - start < 5
    for path in ("./nowhere", "../nowhere", "/nowhere", "a/b/c"):
        with pytest.raises(ComebaError, match="no such folder$"):
            load_model(path)


def test_a_copy_will_do_without_a_network(no_network, monkeypatch, tmp_path):
    home = tmp_path / "models--user--name"
    model, tokenizer = testbed.load()
    for own in (model, tokenizer):
        own.save_pretrained(home / "snapshots" / "abc")
    (home / "refs").mkdir()
    (home / "refs" / "main").write_text("abc")
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_CACHE", str(tmp_path))
    monkeypatch.chdir(tmp_path)
    start = time.perf_counter()
    assert load_model("user/name")[0].config.hidden_size == model.config.hidden_size
    assert time.perf_counter() - start < 10


def test_a_truncated_gguf_file(tiny_gguf, tmp_path):
    whole = tiny_gguf[0].read_bytes()
    (tmp_path / "cut.gguf").write_bytes(whole[: len(whole) // 2])
    with pytest.raises(ComebaError, match=r"cannot load.*cut\.gguf"):
        load_model(tmp_path / "cut.gguf")


def test_the_embedded_model():
    model, tokenizer = load_model("testbed")
    assert model.config.to_dict() == testbed.load()[0].config.to_dict() and tokenizer("Oslo")["input_ids"]
    assert load_model("testbed", torch.bfloat16)[0].dtype == torch.bfloat16
