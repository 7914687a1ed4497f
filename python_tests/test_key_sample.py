"""The sample of corpus keys against single runs of the texts, however the corpus is cut, interrupted or shared."""

import pytest
import torch
from test_covariance import LAYERS, PROJECTIONS, TEXTS, build, make_editor, save_always, small_units  # noqa: F401

from comeba_ext.covariance import Covariance, key_sample
from comeba_ext.covariance.key_sample import FIRST, TOKENS, KeySample
from comeba_ext.errors import StorageError


def collected(tiny_model, tokenizer, family="gpt2", path=None, texts=TEXTS, **changes):
    editor = make_editor(tiny_model, tokenizer, family, **changes)
    editor.collect_covariance(texts, tokens=10**4, path=path, progress=False)
    return editor.covariance


def literal(tiny_model, tokenizer, family):
    """Every corpus token with those before it: its keys in every layer."""
    model, found, seen = build(tiny_model, tokenizer, family), {}, {}
    for n in LAYERS:
        name = PROJECTIONS[family].format(n)
        model.get_submodule(name).register_forward_pre_hook(lambda m, args, name=name: seen.__setitem__(name, args[0]))
    for text in TEXTS:
        ids = tokenizer(text)["input_ids"]
        with torch.no_grad():
            model(torch.tensor([ids]))
        for p in range(len(ids)):
            context = tuple(([-1] * TOKENS + ids[: p + 1])[-TOKENS:])
            keys = {name: x.reshape(len(ids), -1)[p] for name, x in seen.items()}
            found.setdefault(context, []).append((p, keys))
    return found


@pytest.mark.parametrize("family", ["gpt2", "llama", "opt"])
def test_keys_are_those_of_their_tokens(tiny_model, tokenizer, family, small_units, monkeypatch):  # noqa: F811
    monkeypatch.setattr(key_sample, "SIZE", 3000)  # every fourth token
    sample, expected = collected(tiny_model, tokenizer, family).sample, literal(tiny_model, tokenizer, family)
    firsts = sum(min(FIRST, len(tokenizer(text)["input_ids"])) for text in TEXTS)
    total = sum(len(tokenizer(text)["input_ids"]) for text in TEXTS)
    assert firsts + 0.15 * (total - firsts) < len(sample) < firsts + 0.35 * (total - firsts)
    for n, context in enumerate(map(tuple, sample.tokens.tolist())):
        # Long contexts are cut, so texts may share one.
        assert any(
            all(torch.allclose(sample.keys[name][n].double(), key, rtol=2**-7, atol=1e-6) for name, key in keys.items())
            for _, keys in expected[context]
        )
    begun = [context for context, places in expected.items() for p, _ in places if p < FIRST]
    drawn = [context for context in map(tuple, sample.tokens.tolist())]
    assert sorted(begun) == sorted(context for context in drawn if any(p < FIRST for p, _ in expected[context]))


def test_however_the_corpus_is_run(tiny_model, tokenizer, tmp_path, small_units, save_always, monkeypatch):  # noqa: F811
    monkeypatch.setattr(key_sample, "SIZE", 3000)
    whole = collected(tiny_model, tokenizer).sample
    small = collected(tiny_model, tokenizer, max_tokens=16).sample
    path = tmp_path / "x.safetensors"
    taken, real = iter(range(5)), __import__("comeba_ext.covariance", fromlist=["run_until"]).run_until

    def failing(*args, **kwargs):
        if next(taken, None) is None:
            raise KeyboardInterrupt
        return real(*args, **kwargs)

    monkeypatch.setattr("comeba_ext.covariance.run_until", failing)
    with pytest.raises(KeyboardInterrupt):
        collected(tiny_model, tokenizer, path=path)
    monkeypatch.setattr("comeba_ext.covariance.run_until", real)
    assert 0 < len(Covariance.load(path).sample) < len(whole)
    resumed = collected(tiny_model, tokenizer, path=path).sample
    for other in (small, resumed, Covariance.load(path).sample):
        assert torch.equal(other.tokens, whole.tokens) and torch.equal(other.unit, whole.unit)
        for name, keys in whole.keys.items():
            assert torch.allclose(other.keys[name].float(), keys.float(), rtol=2**-7, atol=1e-6)


def test_mentions_end_with_the_subject():
    tokens = torch.full((4, TOKENS), -1, dtype=torch.int32)
    tokens[0, -3:] = torch.tensor([5, 6, 7])
    tokens[1, -3:] = torch.tensor([6, 7, 8])
    tokens[2, -2:] = torch.tensor([6, 7])
    tokens[3] = torch.arange(TOKENS)
    sample = KeySample({"x": torch.zeros(4, 2)}, tokens, torch.arange(4))
    assert sample.mentions([[6, 7]]).tolist() == [True, False, True, False]
    assert sample.mentions([[5, 6, 7]]).tolist() == [True, False, False, False]
    assert sample.mentions([[7, 8], [5, 6, 7]]).tolist() == [True, True, False, False]
    assert sample.mentions([[99, *range(TOKENS)]]).tolist() == [False] * 3 + [True]  # only the last are kept


def test_a_file_without_a_sample_is_refused(tiny_model, tokenizer, tmp_path):
    found = collected(tiny_model, tokenizer)
    found.sample = KeySample()
    found.save(tmp_path / "old.cov")
    with pytest.raises(StorageError, match="earlier version.*collect it again"):
        Covariance.load(tmp_path / "old.cov")
