"""Covariance against a literal sum over single texts; interruption, resumption and refusal."""

import itertools
import random
import signal

import pytest
import torch
from transformers import OPTConfig, OPTForCausalLM

from comeba_ext import EditConfig, Editor, covariance
from comeba_ext.covariance import Covariance
from comeba_ext.covariance.corpus import Unfinished, Units
from comeba_ext.errors import CovarianceError, StorageError

WORDS = "the mother tongue of Danielle Darrieux is French capital Norway Oslo Peru Lima Angola located in Africa".split()
SMALL = {"gpt2": {"n_layer": 4, "n_inner": 48}, "gptj": {"n_layer": 4, "n_inner": 48}, "llama": {"num_hidden_layers": 4}}
PROJECTIONS = {
    "gpt2": "transformer.h.{}.mlp.c_proj",
    "gptj": "transformer.h.{}.mlp.fc_out",
    "llama": "model.layers.{}.mlp.down_proj",
    "opt": "model.decoder.layers.{}.fc2",
}
LAYERS = (0, 2)


@pytest.fixture
def small_units(monkeypatch):
    """Units of 64 tokens out of pools of 200, so that tiny corpora have many."""
    monkeypatch.setattr("comeba_ext.covariance.corpus.POOL_TOKENS", 200)
    monkeypatch.setattr("comeba_ext.covariance.corpus.UNIT_TOKENS", 64)


@pytest.fixture
def save_always(monkeypatch):
    """A checkpoint after every unit."""
    real = covariance.collect_covariance
    monkeypatch.setattr("comeba_ext.editor.collect_covariance", lambda *a, **k: real(*a, save_seconds=0, **k))


def corpus(count=40, seed=0):
    draw = random.Random(seed)
    return [" ".join(draw.choices(WORDS, k=draw.randint(1, 12))) for _ in range(count)]


TEXTS = corpus()


def build(tiny_model, tokenizer, family="gpt2", seed=0):
    if family != "opt":
        return tiny_model(family, seed, **SMALL[family]).double()
    config = OPTConfig(
        vocab_size=len(tokenizer),
        hidden_size=32,
        ffn_dim=48,
        num_hidden_layers=4,
        num_attention_heads=4,
        max_position_embeddings=128,
        word_embed_proj_dim=32,
        init_std=0.3,
        pad_token_id=0,
        bos_token_id=1,
        eos_token_id=1,
    )
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        return OPTForCausalLM(config).eval().double()


def make_editor(tiny_model, tokenizer, family="gpt2", seed=0, layers=LAYERS, **changes):
    return Editor(build(tiny_model, tokenizer, family, seed), tokenizer, EditConfig(layers=layers, prefixes=0, **changes))


def literal(tiny_model, tokenizer, family, tokens=None, texts=TEXTS, context=128):
    """``E[k kᵀ]`` over the first ``tokens`` tokens, one text (or piece of it) at a time."""
    model, keys = build(tiny_model, tokenizer, family), {}
    for n in LAYERS:
        name = PROJECTIONS[family].format(n)
        keys[name] = []
        model.get_submodule(name).register_forward_pre_hook(
            lambda m, args, found=keys[name]: found.extend(args[0].reshape(-1, args[0].shape[-1]))
        )
    for text in texts:
        ids = tokenizer(text)["input_ids"]
        for start in range(0, len(ids), context):
            with torch.no_grad():
                model(torch.tensor([ids[start : start + context]]))
    result = {}
    for name, found in keys.items():
        found = found[:tokens]
        result[name] = sum(torch.outer(key, key) for key in found) / len(found)
    return result, len(found)


def assert_close(covariance, expected, tolerance=1e-10):
    for name, matrix in expected.items():
        assert ((covariance[name] - matrix).norm() / matrix.norm()).item() < tolerance


# GPT-J attends, and Llama norms, in float32 whatever the dtype of the model.
@pytest.mark.parametrize("family, tolerance", [("gpt2", 1e-10), ("gptj", 1e-6), ("llama", 1e-6), ("opt", 1e-10)])
@pytest.mark.parametrize("max_tokens", [1, 70, 4096])
def test_equals_the_literal_mean(tiny_model, tokenizer, family, tolerance, max_tokens):
    editor = make_editor(tiny_model, tokenizer, family, max_tokens=max_tokens)
    editor.collect_covariance(TEXTS, tokens=501, progress=False)
    expected, count = literal(tiny_model, tokenizer, family, 501)
    assert count == 501 == editor.covariance.tokens
    assert set(editor.covariance.moments) == set(expected)
    assert_close(editor.covariance, expected, tolerance)


def test_long_texts_are_cut_into_contexts(tiny_model, tokenizer):
    editor = make_editor(tiny_model, tokenizer)
    long = [" ".join(TEXTS)]
    editor.collect_covariance(long, tokens=10**6, progress=False)
    expected, count = literal(tiny_model, tokenizer, "gpt2", None, long)
    assert editor.covariance.tokens == count > 256
    assert_close(editor.covariance, expected)


def test_default_budget_and_lazy_reading(tiny_model, tokenizer):
    editor = make_editor(tiny_model, tokenizer, max_tokens=64)
    taken = []
    editor.collect_covariance((taken.append(t) or t for t in itertools.cycle(TEXTS)), progress=False)
    assert editor.covariance.tokens == 10 * 48
    assert sum(len(tokenizer(t)["input_ids"]) for t in taken) < 480 + 200


def test_later_blocks_never_run(tiny_model, tokenizer):
    editor = make_editor(tiny_model, tokenizer)
    ran = []
    for n, block in enumerate(editor.model.transformer.h):
        block.register_forward_pre_hook(lambda m, args, n=n: ran.append(n))
    editor.model.lm_head.register_forward_pre_hook(lambda m, args: ran.append("head"))
    last = editor.layers[PROJECTIONS["gpt2"].format(2)].base_layer
    last.register_forward_pre_hook(lambda m, args: ran.append("last projection"))
    editor.collect_covariance(TEXTS, tokens=501, progress=False)
    assert set(ran) == {0, 1, 2}


def test_wide_layers_in_blocks(tiny_model, tokenizer, monkeypatch):
    """Widths above, at and between multiples of the block, symmetric to the bit."""
    expected, _ = literal(tiny_model, tokenizer, "gpt2", 501)
    for block in (16, 20, 48):
        monkeypatch.setattr(covariance, "BLOCK", block)
        editor = make_editor(tiny_model, tokenizer)
        editor.collect_covariance(TEXTS, tokens=501, progress=False)
        assert_close(editor.covariance, expected)
        for moment in editor.covariance.moments.values():
            assert torch.equal(moment, moment.mT)


def test_units_hold_every_token_once(tokenizer, small_units):
    """Whatever the pools and units, their rows are the first tokens of the texts, cut into pieces."""
    texts = [*TEXTS, " ".join(TEXTS)]
    for wanted in (1, 199, 501, 10**6):
        units = list(Units(tokenizer, iter(texts), Unfinished(), wanted, 40))
        left, expected = wanted, []
        for text in texts:
            ids = tokenizer(text)["input_ids"][:left]
            left -= len(ids)
            expected += [ids[n : n + 40] for n in range(0, len(ids), 40)]
        assert [number for number, _ in units] == list(range(len(units)))
        assert sorted(row for _, rows in units for row in rows) == sorted(expected)
        assert all(len(rows) * max(map(len, rows)) <= 64 for _, rows in units)


def test_little_padding(tokenizer):
    """What the module says of waste, in kind: rows of any length, hardly any padding."""
    draw = random.Random(3)
    texts = [" ".join(draw.choices(WORDS, k=int(draw.lognormvariate(4, 1.3)) + 1)) for _ in range(900)]
    real = padded = 0
    for _, rows in Units(tokenizer, texts, Unfinished(), 10**6, 128):
        real += sum(map(len, rows))
        padded += len(rows) * max(map(len, rows))
    assert real > 30_000 and padded < 1.03 * real


def interrupt(monkeypatch, at: int, error) -> list[int]:
    """Let the ``at``-th forward pass fail; returns the count of passes so far."""
    real_run, runs = covariance.run_until, [0]

    def failing(*args, **kwargs):
        runs[0] += 1
        if runs[0] == at:
            raise error
        return real_run(*args, **kwargs)

    monkeypatch.setattr(covariance, "run_until", failing)
    return runs


@pytest.mark.parametrize("error", [KeyboardInterrupt, RuntimeError])
def test_resumed_equals_uninterrupted(tiny_model, tokenizer, tmp_path, monkeypatch, small_units, save_always, error):
    path = tmp_path / "covariance.safetensors"
    whole = make_editor(tiny_model, tokenizer)
    whole.collect_covariance(TEXTS, tokens=501, progress=False)
    editor = make_editor(tiny_model, tokenizer)
    runs = interrupt(monkeypatch, 8, error)
    with pytest.raises(error):
        editor.collect_covariance(TEXTS, tokens=501, path=path, progress=False)
    assert not editor.key_memory
    assert all(layer.mode == "validated" for layer in editor.layers.values())
    half = Covariance.load(path)
    assert 0 < half.tokens < 501 and half.unfinished.units == set(range(7))
    with pytest.raises(CovarianceError, match="unfinished"):
        editor.load_covariance(path)
    # Another size of batches is none of the checkpoint's business.
    editor = make_editor(tiny_model, tokenizer, max_tokens=40)
    editor.collect_covariance(TEXTS, tokens=501, path=path, progress=False)
    assert editor.covariance.tokens == 501
    for name in whole.covariance.moments:
        assert_close(editor.covariance, {name: whole.covariance[name]}, 1e-12)
    before = runs[0]
    make_editor(tiny_model, tokenizer).collect_covariance(TEXTS, tokens=501, path=path, progress=False)
    assert runs[0] == before  # complete: nothing to run


def test_a_checkpoint_meets_other_texts_or_wishes(tiny_model, tokenizer, tmp_path, monkeypatch, small_units, save_always):
    path = tmp_path / "covariance.safetensors"
    with monkeypatch.context() as patch, pytest.raises(KeyboardInterrupt):
        interrupt(patch, 5, KeyboardInterrupt)
        make_editor(tiny_model, tokenizer).collect_covariance(TEXTS, tokens=501, path=path, progress=False)
    content = path.read_bytes()
    for texts in (TEXTS[::-1], TEXTS[:3], []):
        with pytest.raises(CovarianceError, match="texts are not those"):
            make_editor(tiny_model, tokenizer).collect_covariance(texts, tokens=501, path=path, progress=False)
    with pytest.raises(CovarianceError, match="unfinished covariance of 501 tokens"):
        make_editor(tiny_model, tokenizer).collect_covariance(TEXTS, tokens=502, path=path, progress=False)
    assert path.read_bytes() == content


def test_a_finished_one_is_extended(tiny_model, tokenizer, tmp_path, monkeypatch, small_units, save_always):
    """More tokens wanted: collection goes on with the texts after those consumed, over an interruption too."""
    path = tmp_path / "covariance.safetensors"
    sizes = [len(tokenizer(text)["input_ids"]) for text in TEXTS]
    first, more = sum(sizes[:15]), sum(sizes[:35])
    make_editor(tiny_model, tokenizer).collect_covariance(TEXTS, tokens=first, path=path, progress=False)
    with monkeypatch.context() as patch, pytest.raises(KeyboardInterrupt):
        interrupt(patch, 3, KeyboardInterrupt)
        make_editor(tiny_model, tokenizer).collect_covariance(TEXTS, tokens=more, path=path, progress=False)
    assert first < Covariance.load(path).tokens < more
    editor = make_editor(tiny_model, tokenizer)
    editor.collect_covariance(TEXTS, tokens=more, path=path, progress=False)
    assert (editor.covariance.tokens, editor.covariance.texts) == (more, 35)
    assert_close(editor.covariance, literal(tiny_model, tokenizer, "gpt2", more)[0])


def test_ctrl_c_keeps_every_unit(tiny_model, tokenizer, tmp_path, monkeypatch, small_units):
    """Long before the first checkpoint is due; the signal comes in the middle of a unit, which is finished first."""
    path, real, calls = tmp_path / "covariance.safetensors", covariance.run_until, []

    def signalled(*args, **kwargs):
        real(*args, **kwargs)
        calls.append(1)
        if len(calls) == 4:
            signal.raise_signal(signal.SIGINT)

    with monkeypatch.context() as patch, pytest.raises(KeyboardInterrupt):
        patch.setattr(covariance, "run_until", signalled)
        make_editor(tiny_model, tokenizer).collect_covariance(TEXTS, tokens=501, path=path, progress=False)
    kept = Covariance.load(path)
    assert kept.unfinished and 0 < kept.tokens < 501 and len(kept.unfinished.units) >= 1
    editor = make_editor(tiny_model, tokenizer)
    editor.collect_covariance(TEXTS, tokens=501, path=path, progress=False)
    assert_close(editor.covariance, literal(tiny_model, tokenizer, "gpt2", 501)[0])


def test_other_texts_are_refused_whatever_is_left_to_do(tiny_model, tokenizer, tmp_path):
    """A finished file answers for its texts only: neither handed out for others nor extended with them."""
    path = tmp_path / "covariance.safetensors"
    make_editor(tiny_model, tokenizer).collect_covariance(TEXTS, tokens=200, path=path, progress=False)
    content = path.read_bytes()
    same = make_editor(tiny_model, tokenizer)
    same.collect_covariance(iter(TEXTS), tokens=200, path=path, progress=False)
    assert path.read_bytes() == content and same.covariance.tokens == 200
    for tokens in (200, 100, 400):
        for others in (TEXTS[1:], [TEXTS[0] + "?", *TEXTS[1:]], TEXTS[:1]):
            with pytest.raises(CovarianceError, match="choose another file"):
                make_editor(tiny_model, tokenizer).collect_covariance(others, tokens=tokens, path=path, progress=False)
    assert path.read_bytes() == content


def test_a_model_over_several_devices(tiny_model, tokenizer, tmp_path):
    """Placed by accelerate, blocks on the CPU and on disk, which stands for a device that is not the first's."""
    accelerate = pytest.importorskip("accelerate")
    model = build(tiny_model, tokenizer)
    places = {
        "transformer.wte": "cpu",
        "transformer.wpe": "cpu",
        "transformer.h.0": "cpu",
        "transformer.h.1": "disk",
        "transformer.h.2": "disk",
        "transformer.h.3": "cpu",
        "transformer.ln_f": "cpu",
        "lm_head": "cpu",
    }
    accelerate.dispatch_model(model, places, main_device="cpu", offload_dir=str(tmp_path), force_hooks=True)
    assert model.transformer.h[2].mlp.c_proj.weight.is_meta
    editor = Editor(model, tokenizer, EditConfig(layers=LAYERS, prefixes=0))
    editor.collect_covariance(TEXTS, tokens=501, progress=False)
    assert_close(editor.covariance, literal(tiny_model, tokenizer, "gpt2", 501)[0])
    assert model.transformer.h[2].mlp.c_proj.base_layer.weight.is_meta


def test_checkpoint_of_another_model_or_layers(tiny_model, tokenizer, tmp_path):
    path = tmp_path / "covariance.safetensors"
    make_editor(tiny_model, tokenizer).collect_covariance(TEXTS, tokens=501, path=path, progress=False)
    content = path.read_bytes()
    for other in (make_editor(tiny_model, tokenizer, seed=1), make_editor(tiny_model, tokenizer, "llama")):
        with pytest.raises(CovarianceError, match="another model"):
            other.collect_covariance(TEXTS, tokens=501, path=path, progress=False)
        with pytest.raises(CovarianceError, match="another model"):
            other.load_covariance(path)
    for layers in ((0, 1), (0,)):
        with pytest.raises(CovarianceError, match="layers"):
            make_editor(tiny_model, tokenizer, layers=layers).collect_covariance(TEXTS, path=path, progress=False)
    assert path.read_bytes() == content


def test_empty_corpus_and_not_a_number(tiny_model, tokenizer):
    for texts in ([], ["", ""], iter(())):
        with pytest.raises(CovarianceError, match="no text"):
            make_editor(tiny_model, tokenizer).collect_covariance(texts, progress=False)
    for tokens in (0, -1):
        with pytest.raises(CovarianceError, match="at least 1"):
            make_editor(tiny_model, tokenizer).collect_covariance(TEXTS, tokens=tokens, progress=False)
    with pytest.raises(CovarianceError, match="folder .* does not exist"):
        make_editor(tiny_model, tokenizer).collect_covariance(TEXTS, path="nowhere/c.safetensors", progress=False)
    with pytest.raises(CovarianceError, match="list"):
        make_editor(tiny_model, tokenizer).collect_covariance("one text", progress=False)
    editor = make_editor(tiny_model, tokenizer)
    with torch.no_grad():
        editor.model.transformer.h[1].mlp.c_fc.weight[0, 0] = torch.nan
    with pytest.raises(CovarianceError, match="NaN"):
        editor.collect_covariance(TEXTS, tokens=501, progress=False)
    assert not editor.key_memory and editor.covariance is None


def test_save_and_load(tiny_model, tokenizer, tmp_path):
    path = tmp_path / "covariance.safetensors"
    editor = make_editor(tiny_model, tokenizer)
    editor.collect_covariance(TEXTS, tokens=501, progress=False)
    editor.save_covariance(path)
    again = make_editor(tiny_model, tokenizer)
    again.load_covariance(path)
    for name in editor.layers:
        assert torch.equal(again.covariance[name], editor.covariance[name])
        expected = again.config.lam_of(editor.layers[name].in_features) * editor.covariance[name]
        assert torch.allclose(again.key_memory[name].matrix(), expected, rtol=1e-10, atol=1e-6)
    assert [p.name for p in tmp_path.iterdir()] == [path.name]
    path.write_bytes(path.read_bytes()[:1000])
    with pytest.raises(StorageError, match="truncated"):
        again.load_covariance(path)
    with pytest.raises(StorageError, match="does not exist"):
        again.load_covariance(tmp_path / "nowhere")


def test_edits_keep_what_their_layers_need(tiny_model, tokenizer, tmp_path):
    """Of the covariance of more layers than are edited; the edits are those with a covariance of just these."""
    whole = make_editor(tiny_model, tokenizer)
    whole.collect_covariance(TEXTS, tokens=501, progress=False)
    collected = whole.covariance
    request = {"prompt": "The capital of {} is", "subject": "Norway", "target_new": "Lima"}
    tables = {}
    for name, given in (("whole", collected), ("own", collected.of([PROJECTIONS["gpt2"].format(2)]))):
        config = EditConfig(layers=(2,), lam=20.0, prefixes=0, steps=3, scope="nearest")
        editor = Editor(build(tiny_model, tokenizer), tokenizer, config)
        editor.set_covariance(given)
        assert list(editor.covariance.moments) == list(editor.covariance.sample.keys) == [PROJECTIONS["gpt2"].format(2)]
        editor.edit([request])
        editor.save_pretrained(tmp_path / name)
        tables[name] = editor.layers[PROJECTIONS["gpt2"].format(2)].score.anchors
        again = Editor.from_pretrained(build(tiny_model, tokenizer), tokenizer, tmp_path / name)
        assert torch.equal(again.covariance.sample.tokens, collected.sample.tokens) and len(again.covariance.moments) == 1
    assert torch.equal(tables["whole"], tables["own"])
    sizes = {name: sum(path.stat().st_size for path in (tmp_path / name).glob("*.safetensors")) for name in tables}
    assert sizes["whole"] == sizes["own"]
    assert collected.of(collected.moments) is collected and collected.of(reversed(list(collected.moments))) is collected
