"""``model.save_pretrained`` of an edited model writes the base model as it came; state dicts round-trip with the edits."""

import copy
import pickle

import pytest
import torch
from test_editor import ids_of, make_editor, random_values, small_model, some_requests
from transformers import AutoModelForCausalLM

from comeba_ext import load_edits
from comeba_ext.layers.attachment import disabled


@pytest.fixture(params=["gpt2", "llama"])
def edited(request, tiny_model, tokenizer):
    untouched = small_model(tiny_model, request.param)
    editor = make_editor(copy.deepcopy(untouched), tokenizer, scope="nearest", alpha_floor=0.1)
    editor.edit(some_requests(3), target_values=random_values(3))
    return untouched, editor


def assert_equal_states(a, b):
    assert a.keys() == b.keys()
    assert all(torch.equal(a[name], b[name]) for name in a)


def test_the_base_model_is_written(edited, tmp_path, caplog, tokenizer):
    untouched, editor = edited
    before = editor.model(ids_of(editor.model, tokenizer)).logits
    editor.model.save_pretrained(tmp_path / "base")
    assert "Editor.save_pretrained saves the edits" in caplog.text
    again, info = AutoModelForCausalLM.from_pretrained(tmp_path / "base", output_loading_info=True)
    assert not info["missing_keys"] and not info["unexpected_keys"] and not info["mismatched_keys"]
    assert_equal_states(again.state_dict(), untouched.state_dict())
    assert torch.equal(editor.model(ids_of(editor.model, tokenizer)).logits, before)  # still edited
    editor.save_pretrained(tmp_path / "edits")
    load_edits(again, tmp_path / "edits")
    torch.testing.assert_close(again(ids_of(again, tokenizer)).logits, before)


def test_copies_save_themselves(edited, tmp_path):
    untouched, editor = edited
    for n, other in enumerate((copy.deepcopy(editor.model), pickle.loads(pickle.dumps(editor.model)))):
        with torch.no_grad():
            next(iter(other.parameters())).fill_(0.25)
        other.save_pretrained(tmp_path / str(n))
        found = AutoModelForCausalLM.from_pretrained(tmp_path / str(n))
        assert (next(iter(found.parameters())) == 0.25).all()
        assert found.state_dict().keys() == untouched.state_dict().keys()
    editor.model.save_pretrained(tmp_path / "own")
    assert_equal_states(AutoModelForCausalLM.from_pretrained(tmp_path / "own").state_dict(), untouched.state_dict())


def test_unhooked_models_save_as_ever(edited, tmp_path, caplog):
    untouched, editor = edited
    editor.close()
    assert "save_pretrained" not in vars(editor.model)
    editor.model.save_pretrained(tmp_path)
    assert not caplog.text
    assert_equal_states(AutoModelForCausalLM.from_pretrained(tmp_path).state_dict(), untouched.state_dict())


def test_state_dicts_carry_the_edits(edited, tokenizer, tiny_model):
    """``state_dict`` and ``load_state_dict`` are for a model with the same hooks, as ever."""
    untouched, editor = edited
    family = "gpt2" if untouched.config.model_type == "gpt2" else "llama"
    other = make_editor(small_model(tiny_model, family, seed=1), tokenizer, scope="nearest", alpha_floor=0.1)
    other.model.load_state_dict(editor.model.state_dict())
    for a, b in zip(other.layers.values(), editor.layers.values(), strict=True):
        assert torch.equal(a.delta, b.delta) and torch.equal(a.score.thresholds, b.score.thresholds)
    ids = ids_of(editor.model, tokenizer)
    assert torch.equal(other.model(ids).logits, editor.model(ids).logits)


def test_adapters_are_saved_under_their_own_names(tokenizer, tiny_model, tmp_path):
    peft = pytest.importorskip("peft")
    config = peft.LoraConfig(target_modules=["down_proj"], r=2, init_lora_weights=False)
    wrapped = peft.get_peft_model(small_model(tiny_model, "llama"), config)
    expected = {name: value.clone() for name, value in peft.get_peft_model_state_dict(wrapped).items()}
    editor = make_editor(wrapped, tokenizer)
    editor.edit(some_requests(2), target_values=random_values(2))
    wrapped.save_pretrained(tmp_path)
    from safetensors.torch import load_file

    assert_equal_states(load_file(tmp_path / "adapter_model.safetensors"), expected)


def adapted(model, tokenizer):
    """A LoRA-wrapped model with edits on top of its adapters."""
    peft = pytest.importorskip("peft")
    config = peft.LoraConfig(target_modules=["down_proj"], r=2, init_lora_weights=False)
    wrapped = peft.get_peft_model(model, config)
    editor = make_editor(wrapped, tokenizer)
    editor.edit(some_requests(2), target_values=random_values(2))
    return wrapped, editor


def test_merging_adapters_leaves_the_edits(tiny_model, tokenizer):
    wrapped, editor = adapted(small_model(tiny_model, "llama"), tokenizer)
    ids = torch.tensor([tokenizer(some_requests(1)[0].text)["input_ids"]])
    with torch.no_grad():
        edited = wrapped(ids).logits
        with editor.disabled():
            plain = wrapped(ids).logits
        merged = wrapped.merge_and_unload()
        assert not any("lora" in name for name, _ in merged.named_modules())
        torch.testing.assert_close(merged(ids).logits, edited, rtol=0, atol=1e-4)
        with disabled(merged):
            torch.testing.assert_close(merged(ids).logits, plain, rtol=0, atol=1e-4)
    assert (edited - plain).abs().max() > 1e-2


def test_edits_of_a_model_go_onto_it_in_its_wrapper(tiny_model, tokenizer, tmp_path):
    peft = pytest.importorskip("peft")
    editor = make_editor(small_model(tiny_model, "llama"), tokenizer)
    editor.edit(some_requests(2), target_values=random_values(2))
    editor.save_pretrained(tmp_path)
    ids = torch.tensor([tokenizer(some_requests(1)[0].text)["input_ids"]])
    wrapped = peft.get_peft_model(small_model(tiny_model, "llama"), peft.LoraConfig(target_modules=["q_proj"], r=2))  # changes nothing yet
    with torch.no_grad():
        expected = editor.model(ids).logits
        assert load_edits(wrapped, tmp_path) is wrapped
        torch.testing.assert_close(wrapped(ids).logits, expected, rtol=0, atol=1e-4)
