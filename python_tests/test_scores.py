"""Scores by name: those there are, and one of a user's own through everything that edits, saves and loads."""

import math
import runpy
from pathlib import Path

import pytest
import torch
from test_editor import make_editor, random_values, small_model, some_requests
from torch import nn
from torch.nn import functional as F

from comeba_ext import EditConfig, Editor, HookedLinear, Score, load_edits, register_score, testbed
from comeba_ext.errors import ComebaError, ConfigError
from comeba_ext.methods import default_config
from comeba_ext.scores import score_named, score_names

EXAMPLE = Path(__file__).resolve().parents[1] / "examples" / "own_score.py"


@pytest.fixture(scope="module")
def example():
    return runpy.run_path(str(EXAMPLE))


def test_names():
    assert score_names()[:4] == ("zscore", "reference", "nearest", "always")
    with pytest.raises(ComebaError, match="unknown scope 'nearst' .nearest: 'nearest'."):
        score_named("nearst")
    with pytest.raises(ComebaError, match="unknown scope"):
        HookedLinear(nn.Linear(2, 2), "another")
    with pytest.raises(ConfigError, match="scope must be one of zscore, reference, nearest"):
        EditConfig(layers=(0,), scope="another")
    with pytest.raises(ComebaError, match="there is a score 'nearest' already"):
        register_score(type("Mine", (Score,), {"name": "nearest"}))
    with pytest.raises(ComebaError, match="has no name"):
        register_score(type("Mine", (Score,), {}))
    assert register_score(score_named("zscore")) is score_named("zscore")  # imported twice


def test_what_follows_from_a_score():
    """DESIGN §3 and the paper's section 4.1."""
    starts = {name: HookedLinear(nn.Linear(2, 2), name).alpha.item() for name in ("zscore", "reference", "nearest", "always")}
    assert starts == {"zscore": 2.2, "reference": math.inf, "nearest": 1.0, "always": 1.0}
    margins = {name: EditConfig(layers=(0,), scope=name).margin for name in starts}
    assert margins == {"zscore": 1.0, "reference": 0.25, "nearest": 1.0, "always": 1.0}
    lams = {(name, n): EditConfig(layers=tuple(range(n)), scope=name).lam_of(64) for name in starts for n in (1, 2)}
    nearest = {("nearest", 1): 2, ("nearest", 2): 16}
    assert lams == {(name, n): 64 for name in ("zscore", "reference", "always") for n in (1, 2)} | nearest


def test_always_is_the_edit_everywhere():
    """Of settings too: methods without a threshold say so, and have the λ that they had."""
    torch.manual_seed(0)
    layer = HookedLinear(nn.Linear(12, 8), "always")
    layer.delta.normal_()
    x = torch.randn(3, 7, 12)
    with torch.no_grad():
        for own in (x, x[:1, :1]):  # one token, too
            assert torch.equal(layer(own), layer.base_layer(own) + F.linear(own, layer.delta))
        mask = torch.rand(3, 7) > 0.5
        assert torch.equal(layer(x, mask=mask)[~mask], layer.base_layer(x)[~mask])
    model = testbed.load()[0]
    for name in ("MEMIT-seq", "GRACE", "UltraEdit", "ICE"):
        assert default_config(name, model).scope == "always"
    before = EditConfig.for_model(model, scope="reference")
    own = default_config("MEMIT-seq", model)
    assert (own.lam, own.ratio, own.layers) == (before.lam, before.ratio, before.layers)


def test_the_default_hook_is_the_rule_itself(example):
    """Output by hand: base, and the edit where ‖delta·x‖ / ‖W·x + b‖ reaches α."""
    torch.manual_seed(0)
    layer = HookedLinear(nn.Linear(12, 8), "share", 6.0)
    layer.delta.normal_()
    x = torch.randn(3, 7, 12)
    mask = torch.rand(3, 7) > 0.2
    with torch.no_grad():
        base, edit = layer.base_layer(x), F.linear(x, layer.delta)
        share = edit.norm(dim=-1) / base.norm(dim=-1)
        assert 3 < int((share >= 6).sum()) < 18
        assert torch.equal(layer(x), torch.where((share >= 6)[..., None], base + edit, base))
        assert torch.equal(layer(x, mask=mask), torch.where(((share >= 6) & mask)[..., None], base + edit, base))
        assert torch.allclose(layer.peak_scores(x, mask), share.masked_fill(~mask, -torch.inf).amax(-1))


def test_a_score_of_ones_own_edits_saves_and_goes_on(example, tiny_model, tokenizer, tmp_path):
    editor = make_editor(small_model(tiny_model), tokenizer, scope="share")
    requests = some_requests(6)
    editor.edit(requests[:3], target_values=random_values(3))
    alpha = [layer.alpha.item() for layer in editor.layers.values()]
    assert all(math.isfinite(a) for a in alpha) and editor.config.margin == 0.5
    editor.save_pretrained(tmp_path / "edits")
    ids = torch.tensor([tokenizer(request.text)["input_ids"][:4] for request in requests[:3]])
    with torch.no_grad():
        edited = editor.model(ids).logits
        loaded = load_edits(small_model(tiny_model), tmp_path / "edits")
        assert torch.allclose(loaded(ids).logits, edited, atol=1e-4)
        assert not torch.allclose(small_model(tiny_model)(ids).logits, edited, atol=1e-2)
    again = Editor.from_pretrained(small_model(tiny_model), tokenizer, tmp_path / "edits")
    for each in (editor, again):
        each.edit(requests[3:], target_values=random_values(3, seed=1))
    assert all(torch.allclose(a.delta, b.delta, atol=1e-5) for a, b in zip(editor.layers.values(), again.layers.values(), strict=True))
    editor.rollback(0)
    assert not any(layer.delta.any() for layer in editor.layers.values())


def test_the_example_runs(example):
    found = example["main"](edits=10)
    assert found["reliability"] > 0.8 and found["generality"] > 0.8
