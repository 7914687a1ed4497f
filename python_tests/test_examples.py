"""The examples run, and show what they are for."""

import itertools
import runpy
from importlib.metadata import EntryPoint
from pathlib import Path

import pytest
import torch

from comeba_ext import EditConfig, Editor, Method, evaluate, load_edits, register_method, testbed
from comeba_ext.errors import ComebaError, ConfigError, StorageError
from comeba_ext.methods import METHODS, method_named, method_names
from comeba_ext.registry import Registry
from comeba_ext.text.request import EditRequest

EXAMPLES = Path(__file__).resolve().parents[1] / "examples"


@pytest.fixture(scope="module")
def own_method():
    yield runpy.run_path(str(EXAMPLES / "own_method.py"))
    METHODS._known.pop("one gradient step", None)


def test_quickstart():
    found = runpy.run_path(str(EXAMPLES / "quickstart.py"))["main"]()
    assert found["after"] == found["loaded"] == "English."
    assert found["before"] == found["disabled"] == found["retracted"] == found["rolled back"] != "English."
    assert found["reliability"] >= 0.5 and found["locality"] == 1.0


def test_a_method_of_a_users_own(own_method, tmp_path):
    """One file: it edits, is evaluated, switched off, rolled back, saved and loaded."""
    model, tokenizer = testbed.load()
    facts = testbed.facts()[:6]
    prompt = torch.tensor([tokenizer(facts[0].text)["input_ids"]])
    with torch.no_grad():
        plain = model(prompt).logits
    editor = Editor(model, tokenizer, method="one gradient step")
    for _ in editor.edit_all(facts, batch_size=3, progress=False):
        pass
    with torch.no_grad():
        edited = model(prompt).logits
        target = tokenizer(" " + facts[0].target_new)["input_ids"][0]
        assert edited[0, -1].log_softmax(-1)[target] > plain[0, -1].log_softmax(-1)[target] + 0.1
        with editor.disabled():
            assert torch.equal(model(prompt).logits, plain)
    assert evaluate(model, tokenizer, facts, generate=False).locality is not None
    editor.save_pretrained(tmp_path)
    with torch.no_grad():
        assert torch.equal(load_edits(testbed.load()[0], tmp_path)(prompt).logits, edited)
        again = Editor.from_pretrained(testbed.load()[0], tokenizer, tmp_path)
        assert torch.equal(again.model(prompt).logits, edited)
        editor.rollback(0)
        assert torch.equal(model(prompt).logits, plain)
    METHODS._known.pop("one gradient step")
    for load in (lambda net: load_edits(net, tmp_path), lambda net: Editor.from_pretrained(net, tokenizer, tmp_path)):
        net = testbed.load()[0]
        with pytest.raises(StorageError, match="a method that is not here: unknown method 'one gradient step'"):
            load(net)
        with torch.no_grad():
            assert torch.equal(net(prompt).logits, plain)


def test_names_of_methods():
    with pytest.raises(ConfigError, match="unknown method 'Grays' .nearest: 'GRACE'."):
        method_named("Grays")
    with pytest.raises(ComebaError, match="there is a method 'grace' already"):
        register_method(type("Mine", (Method,), {"name": "grace"}))
    with pytest.raises(ComebaError, match="there is a method 'COMEBA without hooks' already"):
        register_method(type("Mine", (Method,), {"name": "COMEBA without hooks"}))
    with pytest.raises(ComebaError, match="has no name"):
        register_method(type("Mine", (Method,), {}))
    assert "Mine" not in method_names()


def test_methods_of_installed_packages(monkeypatch):
    """Found by entry points; what cannot be loaded, or has another's name, is one sentence that names it."""
    points = []
    monkeypatch.setattr("comeba_ext.registry.entry_points", lambda group: [p for p in points if p.group == group])
    registry = Registry("method", "method", "some.group", ConfigError)
    points.append(EntryPoint("x", "comeba_ext.methods.grace:GRACE", "some.group"))
    assert list(registry.all()) == ["GRACE"] and registry.named("grace") is method_named("GRACE")
    for value, words in (
        ("comeba_ext.methods.grace:Absent", "cannot be loaded: AttributeError"),
        ("no_such_package:X", "cannot be loaded: ModuleNotFound"),
        (f"{__name__}:Second", "there is a method 'G.R.A.C.E.' already"),
    ):
        other = Registry("method", "method", "some.group", ConfigError)
        points[1:] = [EntryPoint("y", value, "some.group")]
        with pytest.raises(ComebaError, match=words):
            other.all()


class Second(Method):
    name = "G.R.A.C.E."


def test_the_plain_procedure_edits_as_the_package_does():
    """One batch of given values: the same deltas, and thresholds that had to be lowered, up to what float32 sums round."""
    plain = runpy.run_path(str(EXAMPLES / "plain_comeba.py"))["PlainComeba"]
    texts = list(itertools.islice(testbed.texts(), 100))
    requests = [EditRequest.from_record(record) for record in testbed.facts()[:3]]
    model, tokenizer = testbed.load()
    editor = Editor(model, tokenizer, EditConfig.for_model(model, scope="zscore", layers=(0, 1), lam=1500.0, prefixes=2, alpha=4.0))
    editor.collect_covariance(texts, tokens=10**9, progress=False)
    other, _ = testbed.load()
    own = plain(other, tokenizer, (0, 1), 1500.0, alpha=4.0, prefixes=editor.prefixes)
    own.collect(texts)
    for name, memory in zip(editor.layers, own.memory, strict=True):
        assert torch.allclose(editor.key_memory[name].matrix(), memory, rtol=1e-4, atol=1e-4 * memory.abs().max())
    values = editor.target_values(requests)
    editor.edit(requests, target_values=values)
    own.edit(requests, list(values))
    for layer, hook in zip(editor.layers.values(), own.hooks, strict=True):
        assert (layer.delta - hook.delta).norm() < 1e-3 * hook.delta.norm()
        assert layer.alpha.item() == pytest.approx(hook.alpha, rel=1e-3)
        assert hook.alpha < 3.9  # prompts of 13 tokens reach (n − 1)/√n = 3.33 at most


def test_the_plain_procedure_from_end_to_end():
    found = runpy.run_path(str(EXAMPLES / "plain_comeba.py"))["main"](edits=2, texts=100)
    assert all(said and wanted.startswith(said) for _, wanted, said in found)
