"""The sketch of delta, and editing with the gate that it makes."""

import math

import pytest
import torch
from test_editor import ids_of, make_editor, small_model, some_requests

from comeba_ext import Editor, load_edits
from comeba_ext.ops.sketch import rows_for, sketch_of


def test_sketch_keeps_norms():
    """Unbiased in the square, with the relative deviation of a Johnson-Lindenstrauss map, over random directions."""
    d_out, rows = 512, rows_for(512)
    vectors = torch.randn(d_out, 4000, generator=torch.Generator().manual_seed(3), dtype=torch.float64)
    ratio = sketch_of(vectors, rows).square().sum(0) / vectors.square().sum(0)
    assert abs(ratio.mean() - 1) < 0.02
    assert ratio.std() < 1.1 * math.sqrt(2 / rows)


def test_sketch_is_the_same_everywhere():
    """α is set from its scores and saved: the signs may never change between versions or machines."""
    signs = sketch_of(torch.eye(6, dtype=torch.float64), 2)
    assert signs.tolist() == SIGNS
    assert torch.equal(signs.abs().sum(0), torch.ones(6, dtype=torch.float64))


SIGNS = [[0.0, 0.0, 1.0, 1.0, 0.0, 1.0], [-1.0, -1.0, 0.0, 0.0, -1.0, 0.0]]


def scopes(editor, tokenizer, prompts):
    """Whether each prompt has a token in scope, for every hooked layer."""
    found = []
    handles = [
        layer.register_forward_hook(lambda layer, inputs, output: found.append(bool((output != layer.base_layer(inputs[0])).any())))
        for layer in editor.layers.values()
    ]
    with torch.no_grad():
        for prompt in prompts:
            editor.model(ids_of(editor.model, tokenizer, prompt))
    for handle in handles:
        handle.remove()
    return found


@pytest.mark.parametrize("scope", ["zscore", "reference", "nearest"])
def test_edited_prompts_are_in_scope_by_construction(tiny_model, tokenizer, tmp_path, scope):
    editor = make_editor(small_model(tiny_model), tokenizer, gate="sketch", scope=scope)
    requests = some_requests(12)
    for _ in editor.edit_all(requests, 4, progress=False):
        pass
    last = [request.text for request in requests[-4:]]  # earlier ones see changed lower layers
    assert all(scopes(editor, tokenizer, last))
    editor.save_pretrained(tmp_path / "edits")
    expected = [editor.model(ids_of(editor.model, tokenizer, prompt)).logits for prompt in last]
    used = load_edits(small_model(tiny_model), tmp_path / "edits")
    again = Editor.from_pretrained(small_model(tiny_model), tokenizer, tmp_path / "edits")
    for prompt, logits in zip(last, expected):
        for model in (used, again.model):
            assert torch.allclose(model(ids_of(model, tokenizer, prompt)).logits, logits, atol=1e-3)
    editor.rollback(0)
    assert not any(scopes(editor, tokenizer, last))


def test_reference_scale_belongs_to_the_sketch(tiny_model, tokenizer):
    editor = make_editor(small_model(tiny_model), tokenizer, gate="sketch", scope="reference")
    editor.edit(some_requests(4))
    for name, layer in editor.layers.items():
        sketch = sketch_of(layer.delta, rows_for(layer.out_features)).double()
        expected = torch.trace(sketch @ editor.covariance[name].double() @ sketch.T)
        assert torch.allclose(layer.score.scale, expected, rtol=1e-5)
