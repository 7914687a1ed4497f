"""Hooked layers inside models: padding, caches, generation, copies, compilation.

What is in scope is read off the layers' outputs (edited output differs from the base layer's), never asked of the code.
"""

import copy
import io
import math
from contextlib import contextmanager

import pytest
import torch
from transformers import DynamicCache

from comeba_ext.errors import ArchitectureError, ComebaError
from comeba_ext.layers.attachment import attachments, detach, disabled
from comeba_ext.layers.hooked_linear import HookedLinear, install

FAMILIES = {
    "gpt2": ("transformer", "transformer.h.{}.mlp.c_proj"),
    "gptj": ("transformer", "transformer.h.{}.mlp.fc_out"),
    "llama": ("model", "model.layers.{}.mlp.down_proj"),
    "opt": ("model.decoder", "model.decoder.layers.{}.fc2"),
}
LENGTHS = (9, 5, 12)
CLOSE = {"rtol": 1e-5, "atol": 1e-5}  # float64 models; some families compute rotary angles and softmax in float32
each_family = pytest.mark.parametrize("family", FAMILIES)
each_scope = pytest.mark.parametrize("scope", ["zscore", "reference"])


def names_of(family):
    return [FAMILIES[family][1].format(i) for i in range(2)]


def hook(model, family, scope, alpha=None):
    """Two hooked layers with random edits; thresholds at which about every third token is in scope."""
    layers = install(model, names_of(family), FAMILIES[family][0], scope, alpha)
    generator = torch.Generator().manual_seed(3)
    for layer in layers.values():
        layer.delta.copy_(torch.randn(layer.delta.shape, generator=generator) * 0.3)
    if scope == "zscore":
        thresholds = [0.4] * 2 if alpha is None else [alpha] * 2
    else:
        for layer in layers.values():
            layer.mode = "off"
        with record(layers) as seen, torch.no_grad():
            model(sequences()[0][None], use_cache=False)
        scores = [(seen[name][0]["x"] @ layer.delta.T).norm(dim=-1).flatten() ** 2 for name, layer in layers.items()]
        thresholds = [s.quantile(0.6).item() / 7.0 for s in scores]
    for layer, threshold in zip(layers.values(), thresholds, strict=True):
        layer.score.scale.fill_(7.0)
        layer.alpha.fill_(threshold)
        layer.mode = "validated"
    return layers


@pytest.mark.parametrize("kind", ["Mistral", "Qwen2"])
@each_scope
@torch.no_grad()
def test_windows_in_a_static_cache(kind, scope, tokenizer):
    """Where every layer has one, the mask that the decoder is handed ends where the window does."""
    import transformers

    shape = {"hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 2, "num_attention_heads": 4, "num_key_value_heads": 2}
    window = {"sliding_window": 8} | ({"use_sliding_window": True, "max_window_layers": 0} if kind == "Qwen2" else {})
    config = getattr(transformers, f"{kind}Config")(vocab_size=len(tokenizer), initializer_range=0.3, **shape, **window)
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        model = getattr(transformers, f"{kind}ForCausalLM")(config).double().eval()
    layers = hook(model, "llama", scope)
    ids = torch.stack([sequences()[0][:6], sequences()[2][:6]])
    mask = torch.ones_like(ids)
    mask[0, :2] = 0
    options = {"attention_mask": mask, "max_new_tokens": 14, "min_new_tokens": 14, "do_sample": False, "pad_token_id": 0}
    dynamic = model.generate(ids, **options)
    assert torch.equal(model.generate(ids, **options, cache_implementation="static"), dynamic)
    for layer in layers.values():
        layer.mode = "off"
    assert not torch.equal(model.generate(ids, **options), dynamic)


def make(tiny_model, family, scope, **config):
    model = tiny_model(family, **config).double()
    return model, hook(model, family, scope)


def sequences(lengths=LENGTHS):
    generator = torch.Generator().manual_seed(1)
    return [torch.randint(2, 300, (n,), generator=generator) for n in lengths]


def padded(ids, side):
    """Batch of sequences with garbage tokens as padding: input_ids, attention_mask, position_ids."""
    width = max(len(i) for i in ids) + 2
    tokens = torch.randint(2, 300, (len(ids), width), generator=torch.Generator().manual_seed(9))
    mask = torch.zeros(len(ids), width, dtype=torch.long)
    for row, sequence in enumerate(ids):
        where = slice(width - len(sequence), width) if side == "left" else slice(0, len(sequence))
        tokens[row, where], mask[row, where] = sequence, 1
    return {"input_ids": tokens, "attention_mask": mask, "position_ids": (mask.cumsum(1) - 1).clamp(min=0)}


@contextmanager
def record(layers):
    """``{layer: [{x, scope, base, output}, one entry a pass]}``, as tokens come (flattened in OPT)."""
    seen, handles = {name: [] for name in layers}, []
    for name, layer in layers.items():

        def on_base(module, args, output, calls=seen[name]):
            calls.append({"x": args[0].detach(), "base": output.detach()})

        def on_layer(module, args, output, calls=seen[name]):
            calls[-1] |= {"output": output.detach(), "scope": (output != calls[-1]["base"]).any(-1)}

        handles += [layer.base_layer.register_forward_hook(on_base), layer.register_forward_hook(on_layer)]
    try:
        yield seen
    finally:
        for handle in handles:
            handle.remove()


@torch.no_grad()
def run(model, layers, **inputs):
    """Logits ``(batch, seq, vocab)`` and scopes ``(layers, batch, seq)`` of one pass."""
    with record(layers) as seen:
        output = model(**inputs)
    shape = output.logits.shape[:2]
    return output.logits, torch.stack([calls[0]["scope"].reshape(shape) for calls in seen.values()])


def alone(model, layers, ids):
    return [run(model, layers, input_ids=sequence[None], use_cache=False) for sequence in ids]


@each_family
@each_scope
@pytest.mark.parametrize("side", ["left", "right"])
def test_padding_and_batch_mates_change_nothing(tiny_model, family, scope, side):
    model, layers = make(tiny_model, family, scope)
    ids = sequences()
    single = alone(model, layers, ids)
    for layer in range(2):
        in_scope = torch.cat([scopes[layer].flatten() for _, scopes in single])
        assert 3 < in_scope.sum() < len(in_scope) - 3
    for order in ((0, 1, 2), (2, 0, 1), (1, 0)):
        batch = padded([ids[i] for i in order], side)
        logits, scopes = run(model, layers, **batch, use_cache=False)
        for row, i in enumerate(order):
            real = batch["attention_mask"][row].bool()
            assert torch.equal(scopes[:, row, real], single[i][1][:, 0])
            torch.testing.assert_close(logits[row, real], single[i][0][0], **CLOSE)


@each_family
@each_scope
def test_a_batch_without_mask(tiny_model, family, scope):
    model, layers = make(tiny_model, family, scope)
    ids = sequences((8, 8, 8))
    single = alone(model, layers, ids)
    for inputs in ({"input_ids": torch.stack(ids)}, {"inputs_embeds": model.get_input_embeddings()(torch.stack(ids))}):
        logits, scopes = run(model, layers, **inputs, use_cache=False)
        for row in range(3):
            assert torch.equal(scopes[:, row], single[row][1][:, 0])
            torch.testing.assert_close(logits[row], single[row][0][0], **CLOSE)


@each_scope
@pytest.mark.parametrize("dtype", [torch.bool, torch.float64])
def test_a_prepared_four_dimensional_mask(tiny_model, scope, dtype):
    model, layers = make(tiny_model, "llama", scope)
    batch = padded(sequences(), "left")
    logits, scopes = run(model, layers, **batch, use_cache=False)
    real = batch["attention_mask"].bool()
    width = real.shape[1]
    prepared = real[:, None, None, :] & torch.ones(width, width, dtype=torch.bool).tril()
    if dtype != torch.bool:
        prepared = torch.zeros(prepared.shape, dtype=dtype).masked_fill(~prepared, torch.finfo(dtype).min)
    again, scopes_again = run(model, layers, **(batch | {"attention_mask": prepared}), use_cache=False)
    assert torch.equal(scopes_again[:, real], scopes[:, real])
    torch.testing.assert_close(again[real], logits[real], **CLOSE)


# ---- caches -----------------------------------------------------------------------------------------------------


def decode(model, layers, batch, prefix, cache, step=1):
    """Prefill ``prefix`` columns, then ``step`` at a time: logits, scopes and the recorded passes."""
    length = batch["input_ids"].shape[1]
    cuts = [0, *range(prefix, length, step), length]
    parts = []
    with record(layers) as seen, torch.no_grad():
        for start, end in zip(cuts, cuts[1:], strict=False):
            output = model(
                input_ids=batch["input_ids"][:, start:end],
                attention_mask=batch["attention_mask"][:, :end],
                position_ids=batch["position_ids"][:, start:end],
                past_key_values=cache,
                use_cache=True,
            )
            cache = output.past_key_values
            parts.append(output.logits)
    rows = len(batch["input_ids"])
    scopes = [torch.cat([call["scope"].reshape(rows, -1) for call in calls], 1) for calls in seen.values()]
    return torch.cat(parts, 1), torch.stack(scopes), seen, cache


@each_family
@pytest.mark.parametrize("step", [1, 3])
def test_reference_decodes_as_one_full_forward(tiny_model, family, step):
    model, layers = make(tiny_model, family, "reference")
    batch = padded(sequences(), "left")
    real = batch["attention_mask"].bool()
    logits, scopes = run(model, layers, **batch, use_cache=False)
    cached, cached_scopes, _, _ = decode(model, layers, batch, 7, DynamicCache(), step)
    for layer in range(2):
        decoded = scopes[layer, :, 7:][real[:, 7:]]
        assert 0 < decoded.sum() < len(decoded)
    assert torch.equal(cached_scopes[:, real], scopes[:, real])
    torch.testing.assert_close(cached[real], logits[real], **CLOSE)


@each_family
@pytest.mark.parametrize("own_cache", [True, False])
def test_zscore_decodes_with_running_statistics(tiny_model, family, own_cache):
    """Prefill is the full forward of the prefix; each later token is scored against all tokens up to itself.

    With ``own_cache`` false the model makes the cache itself, inside its forward pass.
    """
    model, layers = make(tiny_model, family, "zscore")
    batch = padded(sequences(), "left")
    real = batch["attention_mask"].bool()
    prefix = 10  # the shortest sequence has real tokens in it
    logits, scopes, seen, _ = decode(model, layers, batch, prefix, DynamicCache() if own_cache else None)
    first = {name: value[:, :prefix] for name, value in batch.items()}
    prefill_logits, prefill_scopes = run(model, layers, **first, use_cache=False)
    assert torch.equal(scopes[:, :, :prefix][:, real[:, :prefix]], prefill_scopes[:, real[:, :prefix]])
    torch.testing.assert_close(logits[:, :prefix][real[:, :prefix]], prefill_logits[real[:, :prefix]], **CLOSE)

    decided = []
    for index, (name, layer) in enumerate(layers.items()):
        x = torch.cat([call["x"].reshape(len(real), -1, layer.in_features) for call in seen[name]], 1)
        output = torch.cat([call["output"].reshape(len(real), -1, layer.out_features) for call in seen[name]], 1)
        base = torch.cat([call["base"].reshape(len(real), -1, layer.out_features) for call in seen[name]], 1)
        for row in range(len(real)):
            norms = [math.sqrt(sum(float(v) ** 2 for v in layer.delta @ token)) for token in x[row][real[row]]]
            skipped = int((~real[row]).sum())
            for t in range(prefix, real.shape[1]):
                so_far = norms[: t - skipped + 1]
                mean = sum(so_far) / len(so_far)
                std = math.sqrt(sum((n - mean) ** 2 for n in so_far) / (len(so_far) - 1))
                expected = (so_far[-1] - mean) / std >= layer.alpha.item()
                assert scopes[index, row, t].item() == expected
                edit = layer.delta @ x[row, t] if expected else torch.zeros(layer.out_features)
                torch.testing.assert_close(output[row, t], base[row, t] + edit, rtol=1e-9, atol=1e-9)
                decided.append(expected)
    assert 1 < sum(decided) < len(decided) - 1


def test_layers_that_pause_keep_their_statistics(tiny_model):
    model, layers = make(tiny_model, "gpt2", "zscore")
    first, second = layers.values()
    cache = DynamicCache()
    with torch.no_grad():
        model(sequences()[0][None], past_key_values=cache)
        before = dict(cache.comeba_statistics)
        second.mode = "off"
        model(torch.tensor([[5]]), past_key_values=cache)
    assert cache.comeba_statistics[first.name][0, 0] == len(sequences()[0]) + 1
    assert torch.equal(cache.comeba_statistics[second.name], before[second.name])


def test_cache_operations_move_the_statistics(tiny_model):
    model, layers = make(tiny_model, "gpt2", "zscore")
    batch = padded(sequences(), "left")

    def filled():
        cache = DynamicCache()
        with torch.no_grad():
            model(**batch, past_key_values=cache)
        assert set(cache.comeba_statistics) == set(layers)
        return cache, dict(cache.comeba_statistics)

    cache, before = filled()
    assert all(s[:, 0].tolist() == list(LENGTHS) for s in before.values())
    keys = cache.layers[0].keys.clone()
    cache.reorder_cache(torch.tensor([2, 0, 0]))
    assert torch.equal(cache.layers[0].keys, keys[[2, 0, 0]])
    for name, s in before.items():
        assert torch.equal(cache.comeba_statistics[name], s[[2, 0, 0]])

    cache, before = filled()
    cache.batch_repeat_interleave(2)
    assert cache.layers[0].keys.shape[0] == 6
    for name, s in before.items():
        assert torch.equal(cache.comeba_statistics[name], s[[0, 0, 1, 1, 2, 2]])

    cache, before = filled()
    cache.batch_select_indices(torch.tensor([1, 2]))
    assert cache.layers[0].keys.shape[0] == 2
    for name, s in before.items():
        assert torch.equal(cache.comeba_statistics[name], s[[1, 2]])

    for copied in (copy.deepcopy(filled()[0]), _saved_and_loaded(filled()[0])):
        assert isinstance(copied, DynamicCache) and copied.get_seq_length() == batch["input_ids"].shape[1]
        copied.reorder_cache(torch.tensor([1, 0, 2]))
        for name, s in before.items():
            assert torch.equal(copied.comeba_statistics[name], s[[1, 0, 2]])
        assert all(s[:, 0].tolist() == list(LENGTHS) for s in before.values())

    original, before = filled()
    copied = copy.deepcopy(original)
    copied.reset()
    assert not copied.comeba_statistics and set(original.comeba_statistics) == set(layers)
    assert torch.equal(original.layers[0].keys, keys)


def _saved_and_loaded(value):
    file = io.BytesIO()
    torch.save(value, file)
    file.seek(0)
    return torch.load(file, weights_only=False)


@each_family
@each_scope
@pytest.mark.parametrize("beams", [1, 3])
def test_generation_in_a_batch_is_generation_alone(tiny_model, tokenizer, family, scope, beams):
    model, _ = make(tiny_model, family, scope)
    ids = sequences((6, 11, 9))
    options = {"max_new_tokens": 8, "min_new_tokens": 8, "do_sample": False, "num_beams": beams}
    options |= {"pad_token_id": tokenizer.pad_token_id, "eos_token_id": tokenizer.eos_token_id}
    batch = padded(ids, "left")
    together = model.generate(batch["input_ids"], attention_mask=batch["attention_mask"], **options)[:, -8:]
    single = [model.generate(i[None], attention_mask=torch.ones_like(i)[None], **options)[0, -8:] for i in ids]
    assert torch.equal(together, torch.stack(single))
    with disabled(model):
        unedited = model.generate(batch["input_ids"], attention_mask=batch["attention_mask"], **options)[:, -8:]
    assert not torch.equal(together, unedited)


# ---- copies, compilation, installing ----------------------------------------------------------------------------


@pytest.mark.parametrize("how", [copy.deepcopy, _saved_and_loaded])
@each_scope
def test_a_copied_model_is_independent(tiny_model, how, scope):
    model, layers = make(tiny_model, "opt", scope)
    batch = padded(sequences(), "left") | {"use_cache": False}
    logits, scopes = run(model, layers, **batch)
    other = how(model)
    other_layers = attachments(other)
    assert list(other_layers) == list(layers)
    other_logits, other_scopes = run(other, other_layers, **batch)
    assert torch.equal(other_logits, logits) and torch.equal(other_scopes, scopes)

    for layer in other_layers.values():
        layer.delta.mul_(-1)
    assert not torch.equal(run(other, other_layers, **batch)[0], logits)
    assert torch.equal(run(model, layers, **batch)[0], logits)

    detach(other)
    assert not attachments(other)
    again, scopes_again = run(model, layers, **batch)
    assert torch.equal(again, logits) and torch.equal(scopes_again, scopes)
    with disabled(model), torch.no_grad():
        torch.testing.assert_close(other(**batch).logits, model(**batch).logits, rtol=0, atol=0)


@pytest.mark.parametrize("family", ["gpt2", "llama"])
@each_scope
def test_a_hooked_model_compiles_in_one_graph(tiny_model, family, scope):
    model, layers = make(tiny_model, family, scope)
    batch = padded(sequences(), "left") | {"use_cache": False}
    logits, scopes = run(model, layers, **batch)
    assert 0 < scopes.sum() < scopes.numel()
    torch._dynamo.reset()
    compiled = torch.compile(model, fullgraph=True, backend="eager")
    with torch.no_grad():
        torch.testing.assert_close(compiled(**batch).logits, logits, rtol=1e-9, atol=1e-9)
        for layer in layers.values():
            layer.alpha.fill_(-math.inf)
        torch.testing.assert_close(compiled(**batch).logits, model(**batch).logits, rtol=1e-9, atol=1e-9)
    _no_pass_in_progress(layers)


@each_family
def test_disabled_is_the_untouched_model(tiny_model, family):
    untouched = tiny_model(family)
    model = tiny_model(family)
    layers = hook(model, family, "zscore")
    first, second = layers.values()
    first.mode = "temporary"
    batch = padded(sequences(), "left")
    with torch.no_grad():
        expected = untouched(**batch).logits
        edited = model(**batch).logits
        with disabled(model):
            assert torch.equal(model(**batch).logits, expected)
        assert (first.mode, second.mode) == ("temporary", "validated")
        with pytest.raises(KeyError), disabled(model):
            raise KeyError
        assert (first.mode, second.mode) == ("temporary", "validated")
        assert torch.equal(model(**batch).logits, edited) and not torch.equal(edited, expected)


def _listeners(model):
    return [len(m._forward_hooks) + len(m._forward_pre_hooks) for m in model.modules()]


@each_family
def test_install_and_uninstall(tiny_model, family):
    model = tiny_model(family)
    names, decoder = names_of(family), FAMILIES[family][0]
    before, listeners = dict(model.named_modules()), _listeners(model)

    def unchanged():
        now = dict(model.named_modules())
        return list(now) == list(before) and all(now[n] is before[n] for n in now) and _listeners(model) == listeners

    for bad_names, bad_decoder in (([*names, "no.such"], decoder), (names, "no.such"), ([names[0], decoder], decoder)):
        with pytest.raises(ArchitectureError):
            install(model, bad_names, bad_decoder, "zscore", None)
        assert unchanged()

    layers = install(model, names, decoder, "zscore", None)
    assert list(layers) == list(attachments(model)) == names
    for name in names:
        assert isinstance(model.get_submodule(name), HookedLinear) and not layers[name].training
        assert layers[name].base_layer is before[name]
    hooked_listeners = _listeners(model)
    with pytest.raises(ArchitectureError, match="hooked already"):
        install(model, names[1:], decoder, "zscore", None)
    assert attachments(model) == layers and _listeners(model) == hooked_listeners
    detach(model)
    assert unchanged()
    install(model, names, decoder, "reference", None)
    detach(model)
    assert unchanged()


def _no_pass_in_progress(layers):
    for layer in layers.values():
        assert layer.context.here.mask is None and layer.context.here.shape is None
        assert not layer.context.here.statistics and not layer.context.here.updated


def test_an_error_inside_leaves_no_mask_behind(tiny_model):
    model, layers = make(tiny_model, "gpt2", "zscore")
    layer = layers["transformer.h.0.mlp.c_proj"]
    x = torch.randn(1, 6, layer.in_features, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    expected = layer(x)
    batch = padded(sequences(), "left")
    cache = DynamicCache()

    def fail(*args):
        raise RuntimeError("out of memory")

    handle = model.transformer.h[1].mlp.register_forward_pre_hook(fail)
    with pytest.raises(RuntimeError, match="out of memory"):
        model(**batch, past_key_values=cache)
    handle.remove()
    _no_pass_in_progress(layers)
    assert not getattr(cache, "comeba_statistics", None)
    assert torch.equal(layer(x), expected)
    with torch.no_grad():
        model(**batch)
    _no_pass_in_progress(layers)


def test_a_call_without_tokens_gets_the_models_own_error(tiny_model):
    model, layers = make(tiny_model, "llama", "zscore")
    with pytest.raises(ValueError, match="input_ids or inputs_embeds"):
        model()
    _no_pass_in_progress(layers)


def test_zscore_refuses_a_cropped_cache(tiny_model):
    """Its statistics would go on counting the tokens that were taken back; token-local scores have none."""
    for scope in ("zscore", "reference"):
        model, _ = make(tiny_model, "llama", scope)
        cache = DynamicCache()
        with torch.no_grad():
            model(sequences()[0][None], past_key_values=cache)
            if scope == "zscore":
                with pytest.raises(ComebaError, match="'zscore'.*assisted decoding"):
                    cache.crop(3 - len(sequences()[0]))
                assert cache.get_seq_length() == len(sequences()[0])
                continue
            cache.crop(3 - len(sequences()[0]))
            rest = model(sequences()[0][None, 3:], past_key_values=cache).logits
            torch.testing.assert_close(rest, model(sequences()[0][None], use_cache=False).logits[:, 3:], **CLOSE)


@pytest.mark.parametrize("reentrant", [True, False])
def test_zscore_refuses_gradient_checkpointing(tiny_model, reentrant):
    """Recomputed in the backward pass it would see no mask: gradients off, without a word. Token-local scores agree."""
    for scope in ("zscore", "reference"):
        model, _ = make(tiny_model, "llama", scope)
        model.train()
        batch = padded(sequences(), "left") | {"use_cache": False}
        weight = model.get_input_embeddings().weight
        model(**batch).logits.square().mean().backward()
        expected, weight.grad = weight.grad, None
        model.gradient_checkpointing_enable({"use_reentrant": reentrant})
        if reentrant:
            model.enable_input_require_grads()
        loss = model(**batch).logits.square().mean()
        if scope == "zscore":
            with pytest.raises(ComebaError, match="gradient checkpointing"):
                loss.backward()
        else:
            loss.backward()
            torch.testing.assert_close(weight.grad, expected, **CLOSE)
