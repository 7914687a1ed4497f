"""What people do with a model, done with an edited one: its logits stay those of the live edited model, or one error says why not."""

import copy
import dataclasses
import io
import pickle

import pytest
import torch
from test_editor import make_editor, random_values, small_model, some_requests
from test_methods import make_method
from transformers import AutoModelForCausalLM

from comeba_ext import load_edits, set_edits
from comeba_ext.errors import ComebaError
from comeba_ext.layers.attachment import attachments, base_state, disabled

SCORES = ("nearest", "reference", "zscore")
METHODS = ("MEMIT", "GRACE", "WISE", "MELO", "SERAC")
KINDS = (*SCORES, *METHODS, "two sets")
REQUESTS = [dataclasses.replace(request, locality_prompts=(("Peru is", "x"),)) for request in some_requests(4)]
TEXTS = [request.text for request in REQUESTS] + ["The capital of Norway is Oslo and"]
TEXTS += [f"<edited fact> {TEXTS[0]} English\nPrompt: {TEXTS[0]}"]  # what SERAC's counterfactual model answers


@pytest.fixture(scope="module")
def made(tokenizer):
    """Kinds that were made before: the edited model, and the folders of its edits."""
    return {}


@pytest.fixture
def edited(made, tiny_model, tokenizer, tmp_path_factory):
    """Function ``edited(kind)`` that returns a copy of the edited model, and its folders."""

    def make(kind):
        if kind not in made:
            root = tmp_path_factory.mktemp("edits")
            parts = (REQUESTS[:2], REQUESTS[2:]) if kind == "two sets" else (REQUESTS,)
            for n, requests in enumerate(parts):
                plain = small_model(tiny_model, "llama")
                if kind in METHODS:
                    editor = make_method(kind, plain, tokenizer)
                    editor.edit(requests)
                    if kind == "SERAC":  # trained on nothing, its model says nothing new
                        for layer in list(editor.layers.values())[1:]:
                            layer.up.normal_(generator=torch.Generator().manual_seed(0))
                else:
                    editor = make_editor(plain, tokenizer, scope=kind if kind in SCORES else "nearest", alpha_floor=0.1)
                    editor.edit(requests, target_values=random_values(len(requests), seed=n))
                editor.save_pretrained(root / str(n))
            model = editor.model if len(parts) == 1 else _with(small_model(tiny_model, "llama"), root)
            made[kind] = model, sorted(root.iterdir())
        model, folders = made[kind]
        return copy.deepcopy(model), folders

    return make


def _with(model, root):
    for n, name in enumerate(("first", "second")):
        load_edits(model, root / str(n), name=name)
    return set_edits(model, ["first", "second"])


@pytest.fixture
def logits(tokenizer):
    def run(model, **kwargs):
        with torch.no_grad():
            return [model(input_ids=torch.tensor([tokenizer(text)["input_ids"]]), **kwargs).logits for text in TEXTS]

    return run


def assert_equal(found, expected):
    assert all(torch.equal(a, b) for a, b in zip(found, expected, strict=True))


def differ(found, expected):
    return max((a.float() - b.float()).abs().max().item() for a, b in zip(found, expected, strict=True))


@pytest.mark.parametrize("kind", KINDS)
def test_the_edits_show(edited, logits, kind):
    """What the other tests compare with: logits that edits have changed."""
    model, _ = edited(kind)
    live = logits(model)
    with disabled(model):
        assert differ(live, logits(model)) > 0.1


@pytest.mark.parametrize("kind", KINDS)
def test_copies(edited, logits, kind):
    """``copy.deepcopy``, ``pickle`` and ``torch.save``: the same bits, and a life of their own."""
    model, _ = edited(kind)
    live, buffer = logits(model), io.BytesIO()
    torch.save(model, buffer)
    buffer.seek(0)
    for other in (copy.deepcopy(model), pickle.loads(pickle.dumps(model)), torch.load(buffer, weights_only=False)):
        assert_equal(logits(other), live)
        for attachment in attachments(other).values():
            for own in attachment.own_buffers().values():
                own.zero_() if own.is_floating_point() else None
        assert_equal(logits(model), live)


@pytest.mark.parametrize("kind", KINDS)
def test_state_dict(edited, logits, tiny_model, tokenizer, kind):
    """Into a model with the same attachments, whether it has other edits or none yet."""
    model, _ = edited(kind)
    live, state = logits(model), model.state_dict()
    other, _ = edited(kind)
    for name, own in other.state_dict().items():
        own.zero_() if own.is_floating_point() and "alpha" not in name else None
    assert differ(logits(other), live) > 0.1
    other.load_state_dict(state)
    assert_equal(logits(other), live)
    if kind not in (*SCORES, "two sets"):
        unedited = make_method(kind, small_model(tiny_model, "llama", seed=1), tokenizer).model
        unedited.load_state_dict(state)
        assert_equal(logits(unedited), live)
    plain = small_model(tiny_model, "llama", seed=1)
    with pytest.raises(RuntimeError, match="base_layer|comeba_facts"):  # torch's own error: there is no place for the edits
        plain.load_state_dict(state)
    plain.load_state_dict(base_state(model, state))
    with disabled(model):
        assert_equal(logits(plain), logits(model))


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float64])
@pytest.mark.parametrize("kind", KINDS)
def test_other_dtypes(edited, logits, tiny_model, kind, dtype):
    """The model as its edits make it of the base model in that dtype."""
    model, folders = edited(kind)
    live = logits(model)
    model.to(dtype)
    fresh = small_model(tiny_model, "llama").to(dtype)
    fresh = _with(fresh, folders[0].parent) if kind == "two sets" else load_edits(fresh, folders[0])
    found = logits(model)
    assert found[0].dtype == dtype
    # A delta that is saved as factors is multiplied out in the new precision: less apart than this precision is from the old one.
    factored = kind in ("reference", "zscore", "MEMIT") or dtype == torch.float64
    assert differ(found, logits(fresh)) <= (differ(logits(fresh), live) if factored else 0)
    if dtype == torch.float64 and kind != "zscore":  # whose threshold is a prompt's own score: rounded otherwise it may be missed
        assert differ(found, live) < 1e-3


@torch.no_grad()
def test_compiled(edited, tokenizer):
    """Hooks that wrap each other, in one graph. (One, with a cache, and with new edits: test_mentions.py, test_shards.py.)"""
    model, _ = edited("two sets")
    ids = torch.tensor([tokenizer(TEXTS[0])["input_ids"]])
    live = model(ids, use_cache=False).logits
    torch.compiler.reset()
    compiled = torch.compile(model, backend="eager", fullgraph=True)
    assert differ([compiled(ids, use_cache=False).logits], [live]) < 1e-4
    torch.compiler.reset()


def gradients(model, tokenizer, checkpointing):
    model.train()
    if checkpointing:
        model.gradient_checkpointing_enable(gradient_checkpointing_kwargs={"use_reentrant": False})
    batch = tokenizer(TEXTS[:3], return_tensors="pt", padding=True)
    batch = {name: batch[name] for name in ("input_ids", "attention_mask")}
    model(**batch, labels=batch["input_ids"], use_cache=False).loss.backward()
    return [parameter.grad for parameter in model.parameters()]


@pytest.mark.parametrize("kind", KINDS)
def test_gradient_checkpointing(edited, tokenizer, kind):
    """Where a token alone decides, the same gradients; else one error: what a pass is about is not known when blocks run again."""
    expected = gradients(edited(kind)[0], tokenizer, False)
    assert all(grad is not None and torch.isfinite(grad).all() for grad in expected)
    if kind in ("reference", "MEMIT", "GRACE"):
        assert_equal(gradients(edited(kind)[0], tokenizer, True), expected)
    else:
        with pytest.raises(ComebaError, match="cannot be computed again in gradient checkpointing; switch that off"):
            gradients(edited(kind)[0], tokenizer, True)


@pytest.mark.parametrize("kind", ["nearest", "zscore", "GRACE", "two sets"])
@pytest.mark.parametrize("targets", ["q_proj", "base_layer"])
def test_lora_on_top(edited, logits, tokenizer, tmp_path, kind, targets):
    """A LoRA beside the edits, or inside the edited layers: trained a step, taken off, saved, merged."""
    peft = pytest.importorskip("peft")
    model, _ = edited(kind)
    targets = "base_layer.base_layer" if (kind, targets) == ("two sets", "base_layer") else targets  # the hooks wrap one another
    live, before = logits(model), {name: own.clone() for name, own in model.named_buffers()}
    weights = {name: own.clone() for name, own in model.named_parameters()}
    wrapped = peft.get_peft_model(model, peft.LoraConfig(target_modules=[targets], r=2))
    assert_equal(logits(wrapped), live)
    trained = [parameter for parameter in wrapped.parameters() if parameter.requires_grad]
    optimiser = torch.optim.SGD(trained, lr=0.1)
    ids = torch.tensor([tokenizer(TEXTS[0])["input_ids"]])
    losses = []
    for _ in range(3):
        loss = wrapped(input_ids=ids, labels=ids).loss
        losses.append(loss.item())
        optimiser.zero_grad()
        loss.backward()
        optimiser.step()
    assert losses[-1] < losses[0]
    with wrapped.disable_adapter():
        assert_equal(logits(wrapped), live)
    tuned = logits(wrapped)
    wrapped.save_pretrained(tmp_path)
    again = peft.PeftModel.from_pretrained(edited(kind)[0], tmp_path)
    assert_equal(logits(again), tuned)
    merged = wrapped.merge_and_unload()
    assert not any("lora" in name for name, _ in merged.named_modules())
    assert differ(logits(merged), tuned) < 1e-3
    assert all(torch.equal(own, before[name]) for name, own in merged.named_buffers())
    changed = {name for name, own in merged.named_parameters() if not torch.equal(own, weights[name])}
    assert changed and all(targets in name for name in changed)


def test_lora_refuses_the_hook_itself(edited):
    """PEFT's own error says which module it cannot wrap; the layer inside it has a name, too."""
    peft = pytest.importorskip("peft")
    with pytest.raises(ValueError, match=r"Target module HookedLinear[\s\S]* is not supported"):
        peft.get_peft_model(edited("nearest")[0], peft.LoraConfig(target_modules=["down_proj"], r=2))


def _dispatched(model, folder, **options):
    accelerate = pytest.importorskip("accelerate")
    places = {name: "cpu" for name, _ in model.named_children()}  # an attachment beside the layers is one of them
    del places["model"]
    places |= {f"model.{name}": "cpu" for name, _ in model.model.named_children() if name != "layers"}
    places |= {f"model.layers.{n}": "disk" if n in (1, 2) else "cpu" for n in range(len(model.model.layers))}
    return accelerate.dispatch_model(model, places, main_device="cpu", offload_dir=str(folder), force_hooks=True, **options)


@pytest.mark.parametrize("kind", KINDS)
def test_dispatched_over_devices(edited, logits, tmp_path, kind):
    """Edited blocks on disk, which stands for a device that is not the first's."""
    model, _ = edited(kind)
    live = logits(model)
    _dispatched(model, tmp_path)
    assert all(parameter.is_meta for parameter in model.model.layers[1].parameters())
    assert_equal(logits(model), live)


def test_edits_offloaded_with_the_weights(edited, logits, tmp_path):
    model, _ = edited("nearest")
    with pytest.raises(ComebaError, match="dispatch the model without offload_buffers"):
        logits(_dispatched(model, tmp_path, offload_buffers=True))


@pytest.mark.parametrize("kind", ["nearest", "MELO", "SERAC", "two sets"])
def test_save_pretrained_is_the_base(edited, logits, tmp_path, caplog, kind):
    """The edits go with :meth:`Editor.save_pretrained`; a log line says so."""
    model, folders = edited(kind)
    live = logits(model)
    model.save_pretrained(tmp_path)
    assert "Editor.save_pretrained saves the edits" in caplog.text
    again, info = AutoModelForCausalLM.from_pretrained(tmp_path, output_loading_info=True)
    assert not any(info[name] for name in ("missing_keys", "unexpected_keys", "mismatched_keys"))
    with disabled(model):
        assert_equal(logits(again), logits(model))
    again = _with(again, folders[0].parent) if kind == "two sets" else load_edits(again, folders[0])
    if kind != "SERAC":  # whose layers were written by hand after the edits were saved
        assert_equal(logits(again), live)
