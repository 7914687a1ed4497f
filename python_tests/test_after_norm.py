"""Families with a norm behind the MLP: what is written is what the norm is given (float64 oracles on tiny models)."""

import pytest
import torch
from test_continuation import family_model

from comeba_ext import EditConfig, Editor, EditRequest
from comeba_ext.errors import ConfigError
from comeba_ext.forward.architectures import Architecture

FAMILIES = ("gemma3_text", "olmo2")  # Gemma 2's eager attention overflows in float64; its values are tested in float32
REQUESTS = [
    EditRequest("The mother tongue of {} is", "Danielle Darrieux", "English"),
    EditRequest("The capital of {}, as everyone knows, is", "Peru", "Paris"),
    EditRequest("People say that {} plays the", "Toko Yasuda", "Lima"),
]
WORDS = "The mother tongue of Danielle Darrieux is French capital Norway Oslo Peru Lima piano guitar people say plays".split()


def make_editor(family, tokenizer, **changes):
    model = family_model(family, tokenizer)
    settings = {"layers": [1], "lam": 1e-9, "prefixes": 0, "scope": "reference", "steps": 12, "lr": 0.3, "lr_unit": "hidden_rms"}
    editor = Editor(model, tokenizer, EditConfig(**(settings | changes)))
    generator = torch.Generator().manual_seed(0)
    texts = [" ".join(WORDS[i] for i in torch.randint(len(WORDS), (9,), generator=generator)) for _ in range(60)]
    editor.collect_covariance(texts, tokens=10**5, progress=False)
    return model, editor


def at_subject(model, editor, tokenizer, request):
    """The projection's output and the block's, at the subject's last token, by hooks in one pass."""
    seen = {}
    layer, block = next(iter(editor.layers.values())), model.model.layers[1]
    handles = [
        layer.register_forward_hook(lambda m, args, out: seen.__setitem__("y", out)),
        block.register_forward_hook(lambda m, args, out: seen.__setitem__("h", out[0] if isinstance(out, tuple) else out)),
    ]
    encoded = tokenizer(request.text, return_offsets_mapping=True)
    last = max(i for i, (a, _) in enumerate(encoded["offset_mapping"]) if a < request.place)
    with torch.no_grad():
        logits = model(torch.tensor([encoded["input_ids"]])).logits[0, -1]
    for handle in handles:
        handle.remove()
    return seen["y"].reshape(-1, 32)[last], seen["h"].reshape(-1, 32)[last], logits


@pytest.mark.parametrize("family", FAMILIES)
def test_the_projection_gives_the_target_value(family, tokenizer):
    model, editor = make_editor(family, tokenizer)
    norm = Architecture.of(model).after_norm(model, 1)
    before = [at_subject(model, editor, tokenizer, request) for request in REQUESTS]
    values = torch.randn(3, 32, generator=torch.Generator().manual_seed(1), dtype=torch.float64)
    editor.edit(REQUESTS, target_values=values)
    for layer in editor.layers.values():
        layer.mode = "temporary"
    for request, value, (y, h, _) in zip(REQUESTS, values, before, strict=True):
        found, hidden, _ = at_subject(model, editor, tokenizer, request)
        torch.testing.assert_close(found, value, rtol=1e-4, atol=1e-5)
        # Both families' norms compute in float32.
        torch.testing.assert_close(hidden, h + norm(value) - norm(y), rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("family", FAMILIES)
def test_a_found_value_does_what_was_found(family, tokenizer):
    """The loss falls, and the edited model's logits are those that the optimisation saw: a projection that gives v*."""
    model, editor = make_editor(family, tokenizer, kl_factor=0.0, weight_decay=0.0, early_stop=0.0)
    report_losses = []
    values = editor.target_values(REQUESTS)
    for request, value in zip(REQUESTS, values, strict=True):
        y, _, logits = at_subject(model, editor, tokenizer, request)
        encoded = tokenizer(request.text, return_offsets_mapping=True)
        last = max(i for i, (a, _) in enumerate(encoded["offset_mapping"]) if a < request.place)

        def put(module, args, out, last=last, value=value):
            out = out.clone()
            out.reshape(-1, 32)[last] = value
            return out

        target = tokenizer(f"{request.text} {request.target_new}")["input_ids"][len(encoded["input_ids"])]
        handle = next(iter(editor.layers.values())).register_forward_hook(put)
        with torch.no_grad():
            changed = model(torch.tensor([encoded["input_ids"]])).logits[0, -1]
        handle.remove()
        report_losses.append((logits.log_softmax(-1)[target].item(), changed.log_softmax(-1)[target].item(), value, changed))
        assert (value - y).norm() <= editor.config.clamp * y.norm() * (1 + 1e-6)
    assert all(after > before for before, after, *_ in report_losses)
    editor.edit(REQUESTS, target_values=values)
    for layer in editor.layers.values():
        layer.mode = "temporary"
    for request, (_, _, value, _) in zip(REQUESTS, report_losses, strict=True):
        y, _, _ = at_subject(model, editor, tokenizer, request)
        torch.testing.assert_close(y, value, rtol=1e-4, atol=1e-4)


def test_several_blocks_are_refused(tokenizer):
    model = family_model("gemma3_text", tokenizer)
    with pytest.raises(ConfigError, match=r"norm follows every MLP.*give one block"):
        Editor(model, tokenizer, EditConfig(layers=[0, 1]))
    assert not any(type(module).__name__ == "HookedLinear" for module in model.modules())
    assert len(EditConfig.for_model(model).layers) == 1
    for scope in ("zscore", "nearest"):
        assert EditConfig.for_model(model, scope=scope).lam_of(64) == 2.0
