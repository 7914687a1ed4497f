"""The shipped embedded model is worth editing: recall, causal patching, key geometry and single edits, on its weights."""

import itertools

import pytest
import torch
from small_testbed import SMALL_SHAPE, two_steps
from test_cli import output

from comeba_ext import EditConfig, covariance, testbed
from comeba_ext.errors import ComebaError
from comeba_ext.testbed import build_facts, train
from comeba_ext.testbed.diagnose import LIMITS, diagnose, single_edits


@pytest.fixture(scope="module")
def loaded():
    return testbed.load()


@pytest.fixture(scope="module")
def diagnosis(loaded):
    return diagnose(*loaded)


@pytest.mark.parametrize("name", [n for n in LIMITS if not n.startswith("single_edit")])
def test_diagnosis_meets_its_limit(diagnosis, loaded, name):
    sign, limit = LIMITS[name]
    values = diagnosis[name]
    if isinstance(values, list):  # one a block; the edited ones count
        values = [values[block] for block in loaded[0].config.comeba_ext["layers"]]
        assert len(values) >= 3
    else:
        values = [values]
    for value in values:
        assert value >= limit if sign == ">=" else value <= limit


def test_facts_are_not_looked_up_at_the_end_of_the_prompt(diagnosis):
    assert max(diagnosis["patch_final_token"]) <= 0.05


def test_single_edits_rolled_back(loaded):
    # The full hundred: python -m comeba_ext.testbed.diagnose --edits 100.
    result = single_edits(*loaded, count=10, first=300)
    for name, value in result.items():
        # Ten facts of two prompts each: the limit is checked up to one wrong prompt, which is 1/20.
        assert value >= LIMITS[name][1] - 1 / 20


def test_it_is_small_and_complete():
    files = list(testbed.FOLDER.iterdir())
    assert {"model.safetensors", "tokenizer.json", "config.json"} <= {f.name for f in files}
    assert sum(f.stat().st_size for f in files) <= 16e6


def test_facts_are_consistent():
    facts = testbed.facts()
    known = {(f["subject"], f["object"]) for f in testbed.raw_facts()}
    assert len(facts) == len({r.subject for r in facts}) > 1500
    reserved = {r.subject for r in facts[int(len(facts) * 0.8) :]}
    for request in facts:
        assert (request.subject, request.ground_truth) in known
        assert request.target_new != request.ground_truth
        assert all(request.subject in p for p in request.rephrase_prompts)
        assert len(request.rephrase_prompts) == 2 and len(request.locality_prompts) == 2
    for request in facts[: int(len(facts) * 0.8)]:
        for prompt, _ in request.locality_prompts:
            assert any(subject in prompt for subject in reserved)


def test_facts_and_texts_are_deterministic():
    assert testbed.facts() == testbed.facts()
    first, again = (list(itertools.islice(testbed.texts(), 20)) for _ in range(2))
    assert first == again and len(set(first)) == 20


def test_other_facts_and_shapes_make_other_testbeds(tmp_path):
    """Two steps of training: the folder is known by its facts, and everything that takes the embedded model takes it."""
    out, arguments = tmp_path / "small", two_steps(tmp_path, build_facts.with_second(testbed.all_facts()[::10]))
    train.main([*arguments, "--out", str(out), *SMALL_SHAPE, "--blocks", "4"])
    assert testbed.folder_of(str(out)) == out and testbed.folder_of(str(tmp_path)) is None
    model, _ = testbed.load(testbed.folder_of(str(out)))
    assert model.config.hidden_size == 64 and EditConfig.for_model(model).layers == (0, 1, 2)
    other, same = testbed.datasets(out).values()
    assert len(other) == len(same) == 124
    months = {fact["subject"]: fact["object"] for fact in testbed.second_facts(out).values()}
    for request, plain in zip(same, other, strict=True):
        assert (request.text, request.target_new) == (plain.text, plain.target_new)
        first, again = request.locality_prompts
        assert first != again and all(request.subject in prompt for prompt, _ in (first, again))
        assert first[1] == again[1] == months[request.subject]
        assert not any(request.subject in prompt for prompt, _ in plain.locality_prompts)
    weights = [p.clone() for p in model.parameters()]
    train.main([*arguments, "--start", str(out), "--out", str(tmp_path / "further")])
    further, _ = testbed.load(tmp_path / "further")
    assert any(not torch.equal(a, b) for a, b in zip(weights, further.parameters(), strict=True))
    experiment = tmp_path / "e.yaml"
    experiment.write_text("title: t\nmethods: [FT]\nbatch_size: 2\ngenerate: false\ntestbed_samples: 2\n")
    rows = output("experiment", experiment, "--model", out, "--out", tmp_path / "results")["rows"]
    assert [row["dataset"] for row in rows] == ["testbed", "same subject"]


def test_one_fact_a_subject(loaded):
    with pytest.raises(ComebaError, match="one fact a subject"):
        testbed.facts(same_subject=True)
    assert list(testbed.datasets()) == ["testbed"] and loaded[0].config.comeba_ext.items() >= train.SETTINGS.items()


@pytest.fixture
def few_tokens(monkeypatch, tmp_path):
    """A cache of its own, and as many tokens as a key has entries; counts the passes through the model."""
    passes, add = [], covariance._add
    monkeypatch.setenv("COMEBA_CACHE_DIR", str(tmp_path / "cache"))
    monkeypatch.setattr(covariance, "TOKENS_PER_DIMENSION", 1)
    monkeypatch.setattr(covariance, "_add", lambda *args: passes.append(0) or add(*args))
    return passes


def test_the_covariance_is_collected_once(loaded, few_tokens, tmp_path):
    model, tokenizer = loaded
    found = testbed.covariance(model, tokenizer)
    assert few_tokens and found.tokens == 1408
    layers = {name: module for name, module in model.named_modules() if name.endswith("down_proj")}
    plain = covariance.collect_covariance(model, tokenizer, testbed.texts(), layers, model.model, progress=False)
    (kept,), count = (tmp_path / "cache").glob("*.safetensors"), len(few_tokens)
    assert found.moments.keys() == layers.keys()
    for again in (testbed.covariance(model, tokenizer), plain):
        assert all(torch.equal(moment, again.moments[name]) for name, moment in found.moments.items())
    assert len(few_tokens) == count
    for what in (b"damaged", None):
        if what:
            kept.write_bytes(what)
        else:  # of another version's texts
            plain.corpus = covariance.corpus_digest(["others"] * plain.texts, plain.texts)
            plain.save(kept)
        again = testbed.covariance(model, tokenizer)
        assert len(few_tokens) > count and all(torch.equal(moment, again.moments[name]) for name, moment in found.moments.items())
        count = len(few_tokens)
        testbed.covariance(model, tokenizer)
        assert len(few_tokens) == count


def test_another_model_and_a_cache_that_cannot_be_written(loaded, few_tokens, monkeypatch, tmp_path):
    model, tokenizer = testbed.load()
    found = testbed.covariance(*loaded)
    count = len(few_tokens)
    with torch.no_grad():
        for weight in model.parameters():
            weight.mul_(1.5)
    other = testbed.covariance(model, tokenizer)
    assert len(few_tokens) == 2 * count and len(list((tmp_path / "cache").glob("*.safetensors"))) == 2
    assert not any(torch.equal(moment, other.moments[name]) for name, moment in found.moments.items())
    (tmp_path / "file").write_text("")
    monkeypatch.setenv("COMEBA_CACHE_DIR", str(tmp_path / "file"))
    for times in (3, 4):
        assert testbed.covariance(*loaded).tokens == 1408 and len(few_tokens) == times * count
