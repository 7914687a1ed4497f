"""The whole way on a GPU, against the same on the CPU: editing by every method, saving, evaluation, the covariance.

``COMEBA_TEST_DEVICE=cpu`` runs these tests without a GPU, as a check of themselves.
"""

import copy
import os

import pytest
import torch
from test_editor import TEXTS, make_editor, random_values, relative, small_model
from test_methods import NAMES, demonstrations, given, held, make_method, requests_of  # noqa: F401  (a fixture)

from comeba_ext import EditConfig, Editor, evaluate, load_edits, testbed
from comeba_ext.evaluation import Protocol, Writing, predict_base, run_protocol
from comeba_ext.experiments import measures
from comeba_ext.layers.prompts import prompt_rewriter

DEVICE = os.environ.get("COMEBA_TEST_DEVICE", "cuda")
pytestmark = [] if DEVICE == "cpu" else pytest.mark.cuda


def logits(editor, requests):
    """Behind every prompt, on the CPU; of in-context methods, behind what is asked instead."""
    rewrite = prompt_rewriter(editor.model)
    texts = [request.text if rewrite is None else rewrite(request.text) for request in requests]
    rows = [torch.tensor([editor.tokenizer(text)["input_ids"]], device=editor.model.device) for text in texts]
    with torch.no_grad():
        return torch.cat([editor.model(row).logits[:, -1].double().cpu() for row in rows])


@pytest.mark.parametrize("scope", ["zscore", "reference", "nearest"])
@pytest.mark.parametrize("family", ["gpt2", "llama"])
def test_a_batch_changes_a_model_as_on_the_cpu(tiny_model, tokenizer, family, scope):
    requests, found = requests_of(9), {}
    for device in ("cpu", DEVICE):
        editor = make_editor(small_model(tiny_model, family).to(device), tokenizer, scope=scope)
        editor.edit(requests[:5], target_values=random_values(5))
        editor.edit(requests[5:], target_values=random_values(4, seed=1))
        found[device] = held(editor), logits(editor, requests)
    for name, own in found["cpu"][0].items():
        if own.is_floating_point() and own.numel():
            other = found[DEVICE][0][name].cpu()
            known = own.isfinite()
            assert torch.equal(known, other.isfinite()), name
            gap = (other[known].double() - own[known].double()).norm()
            assert gap <= 2e-3 * own[known].double().norm(), name
    assert relative(found[DEVICE][1], found["cpu"][1]) < 5e-3


@pytest.mark.parametrize("name", NAMES)
def test_a_method_edits_takes_back_and_saves(tiny_model, tokenizer, name, tmp_path):
    model = small_model(tiny_model).to(DEVICE)
    editor, requests = make_method(name, model, tokenizer), requests_of(6)
    plain = logits(editor, requests)
    values = given(editor, 3)
    editor.edit(requests[:3], **values)
    first = logits(editor, requests)
    assert first.isfinite().all() and not torch.equal(first, plain)
    editor.edit(requests[3:], **given(editor, 3, seed=1))
    second = logits(editor, requests)
    editor.save_pretrained(tmp_path / "edits")
    with editor.disabled():
        rewritten = prompt_rewriter(model) is not None
        assert rewritten or torch.equal(logits(editor, requests), plain)
    editor.rollback(1)
    assert torch.allclose(logits(editor, requests), first, atol=1e-3)
    editor.close()
    assert torch.equal(logits(editor, requests), plain)
    for device in ("cpu", DEVICE):
        other = small_model(tiny_model).to(device)
        again = Editor.from_pretrained(other, tokenizer, tmp_path / "edits")
        assert torch.allclose(logits(again, requests), second, atol=5e-3), device
        again.close()


def test_a_covariance_is_the_cpus(tiny_model, tokenizer, tmp_path):
    found = {}
    for device in ("cpu", DEVICE):
        editor = Editor(small_model(tiny_model).to(device), tokenizer, EditConfig(layers=(1, 2), lam=20.0))
        editor.collect_covariance(TEXTS, tokens=10**6, progress=False)
        editor.save_covariance(tmp_path / f"{device}.safetensors")
        found[device] = editor.covariance
    for name, moments in found["cpu"].moments.items():
        assert relative(found[DEVICE].moments[name].cpu(), moments.cpu()) < 1e-5
    other = Editor(small_model(tiny_model).to(DEVICE), tokenizer, EditConfig(layers=(1, 2), lam=20.0))
    other.load_covariance(tmp_path / "cpu.safetensors")


@pytest.fixture(scope="module")
def embedded():
    model, tokenizer = testbed.load()
    return model.to(DEVICE), tokenizer


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_the_embedded_model_learns_facts(embedded, dtype, tmp_path):
    """With the defaults: what it writes is right in every dtype, kept under rollback, saved and loaded on the CPU."""
    model, tokenizer = copy.deepcopy(embedded[0]).to(dtype), embedded[1]
    facts = testbed.facts()[:20]
    base = predict_base(model, tokenizer, facts, writing=Writing(8))
    editor = Editor(model, tokenizer)
    editor.collect_covariance(testbed.texts(), progress=False)
    for report in editor.edit_all(facts, progress=False):
        assert report.peak_memory > 0 and all(seconds >= 0 for seconds in report.seconds.values())
    found = evaluate(model, tokenizer, facts, base, writing=Writing(8))
    assert found.reliability >= 0.95 and found["reliability_written"] >= 0.9 and found.locality >= 0.95
    assert found.generality >= 0.8
    editor.save_pretrained(tmp_path / "edits")
    editor.close()
    other, _ = testbed.load()
    load_edits(other.to(torch.float32), tmp_path / "edits")
    again = evaluate(other, tokenizer, facts, predict_base(other, tokenizer, facts, generate=False), generate=False)
    assert again.reliability >= 0.95


def test_a_run_measures_what_it_does_on_the_cpu(embedded, tmp_path):
    """Consecutive batches with every measure that a table has; the same run on the CPU leads to the same scores."""
    facts, texts, found = testbed.facts()[:20], [text for _, text in zip(range(60), testbed.texts(9))], {}
    for device in ("cpu", DEVICE):
        model, tokenizer = embedded[0].to(device), embedded[1]
        editor = Editor(model, tokenizer)
        editor.collect_covariance(testbed.texts(), progress=False)
        covariance = editor.covariance
        editor.close()
        measure = measures.make(("text", "probabilities", "fluency", "scores"), texts)
        protocol = Protocol(batch_size=10, writing=Writing(8))
        result = run_protocol(model, tokenizer, facts, protocol, tmp_path / device, covariance=covariance, measure=measure)
        assert not [name for name in result.extra[20] if name.endswith("_error")]
        found[device] = result
    ours, theirs = found[DEVICE].final, found["cpu"].final
    for name in ("reliability", "generality", "locality", "reliability_written", "generality_written"):
        assert abs(ours[name] - theirs[name]) <= 0.1, name
    own, other = (found[device].extra[20]["perplexity"] for device in (DEVICE, "cpu"))
    assert abs(own - other) < 0.02 * other
    assert found[DEVICE].efficiency()["peak_memory"] > 0
