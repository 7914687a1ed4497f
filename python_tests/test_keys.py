"""Reading keys layer by layer against one unpadded run a text, and how often each block runs for it."""

import dataclasses

import pytest
import torch
from test_editor import edits_of, make_editor
from transformers import Gemma2Config, Gemma2ForCausalLM

from comeba_ext import EditConfig
from comeba_ext.editing.keys import KeyReader
from comeba_ext.editing.target_values import optimise_target_values
from comeba_ext.forward.activation_recorder import ActivationRecorder
from comeba_ext.forward.architectures import Architecture
from comeba_ext.forward.partial import watched
from comeba_ext.layers import hooked_linear
from comeba_ext.text.request import EditRequest
from comeba_ext.text.rows import prompt_rows

REQUESTS = [
    EditRequest("The mother tongue of {} is", "Danielle Darrieux", "English"),
    EditRequest("{} works in the field of", "Marie Curie", "piano"),
    EditRequest("The capital of {}, as everyone knows, is", "Peru", "Paris"),
]
PREFIXES = ["", "The city of Paris. ", "Who built it? "]
LAYERS = (1, 2, 4)
SIZES = {"gpt2": {"n_layer": 6}, "llama": {"num_hidden_layers": 6}, "opt": {"num_hidden_layers": 6}, "gemma2": {}}


def gemma2():
    """A norm follows the MLP's output."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        return Gemma2ForCausalLM(
            Gemma2Config(
                vocab_size=2000,
                hidden_size=32,
                intermediate_size=64,
                num_hidden_layers=6,
                num_attention_heads=4,
                head_dim=8,
                num_key_value_heads=2,
                max_position_embeddings=128,
                initializer_range=0.3,
            )
        ).eval()


def hooked(tiny_model, family, scope):
    model = (gemma2() if family == "gemma2" else tiny_model(family, **SIZES[family])).double()
    architecture = Architecture.of(model)
    names = [architecture.projection_name(n) for n in LAYERS]
    layers = list(hooked_linear.install(model, names, architecture.decoder, scope, 1.0).values())
    for layer in layers:
        layer.mode = "temporary"
        for scale in layer.score.buffers():
            scale.fill_(1.0)
        torch.nn.init.normal_(layer.delta, std=0.2, generator=torch.Generator().manual_seed(0))
    return model, architecture, layers


def recorded(model, tokenizer, architecture, layers, max_tokens, limit=10_000):
    """A trace of the target values' run, which meets validated hooks."""
    trace = ActivationRecorder(architecture.block(model, LAYERS[0]), layers[0], limit)
    config = EditConfig(layers=LAYERS, steps=1, max_tokens=max_tokens, scope=layers[0].scope)
    for layer in layers:
        layer.mode = "validated"
    optimise_target_values(model, tokenizer, architecture, config, REQUESTS, PREFIXES, trace=trace)
    for layer in layers:
        layer.mode = "temporary"
    return trace


@pytest.mark.parametrize("traced", [False, True])
@pytest.mark.parametrize("scope", ["zscore", "reference"])
@pytest.mark.parametrize("family", SIZES)
@pytest.mark.parametrize("max_tokens", [1, 60, 4096])
def test_agrees_with_one_run_a_text(tiny_model, tokenizer, family, scope, max_tokens, traced):
    model, architecture, layers = hooked(tiny_model, family, scope)
    rows = prompt_rows(tokenizer, REQUESTS, PREFIXES)
    trace = recorded(model, tokenizer, architecture, layers, max_tokens) if traced else None
    blocks, decoder = list(model.get_submodule(architecture.blocks)), model.get_submodule(architecture.decoder)
    reader = KeyReader(
        decoder,
        blocks,
        LAYERS,
        layers,
        rows,
        whole=scope == "zscore",
        pad_token=0,
        max_tokens=max_tokens,
        device=torch.device("cpu"),
        trace=trace,
    )
    assert all((batch.seen == 0) == traced for batch in reader.batches)
    seen = {}
    for n, layer in enumerate(layers):
        layer.register_forward_pre_hook(lambda m, args, n=n: seen.__setitem__(n, args[0]))
    blocks[LAYERS[-1]].register_forward_hook(lambda m, args, out: seen.__setitem__("h", out[0] if isinstance(out, tuple) else out))
    for number, layer in enumerate(layers):
        reading = reader.read(number)
        prompts = {r: (x, m) for requests, xs, masks in reading.prompts for r, x, m in zip(requests, xs, masks)}
        for n in range(len(REQUESTS)):
            keys = []
            for row in [row for row in rows if row.request == n]:
                with torch.no_grad():
                    model(torch.tensor([row.ids]))
                x = seen[number].reshape(len(row.ids), -1)
                keys.append(x[row.subject_last])
                if row.plain:
                    assert torch.allclose(reading.hidden[n], seen["h"].reshape(len(row.ids), -1)[row.subject_last], atol=1e-5)
                    assert torch.allclose(prompts[n][0][prompts[n][1]], x, atol=1e-5)
            assert torch.allclose(reading.keys[n], sum(keys) / len(keys), atol=1e-5)
        assert reader.adds is (family != "gemma2")
        layer.delta.mul_(-0.5)  # the edit of this layer, which later layers must see
        layer.mode = "validated"


TRACED = [[0, 0 + 1, 3, 3, 3, 0], [0, 0, 9, 3, 3, 0], [0, 0, 0, 9, 9, 0]]  # one row on trial
UNTRACED = [[9, 9 + 1, 3, 3, 3, 0], *TRACED[1:]]


@pytest.mark.parametrize("limit, expected", [(0, UNTRACED), (20, UNTRACED), (10_000, TRACED)])
def test_how_often_blocks_run(tiny_model, tokenizer, limit, expected):
    """Blocks up to the layer edited last: never again; above a layer that is being read: only behind the empty prefix."""
    model, architecture, layers = hooked(tiny_model, "gpt2", "zscore")
    rows = prompt_rows(tokenizer, REQUESTS, PREFIXES)
    blocks, decoder = list(model.get_submodule(architecture.blocks)), model.get_submodule(architecture.decoder)
    tokens = dict.fromkeys(range(6), 0)
    for n, block in enumerate(blocks):
        block.attn.register_forward_hook(lambda m, args, out, n=n: tokens.__setitem__(n, tokens[n] + len(out[0])))
    trace = recorded(model, tokenizer, architecture, layers, 4096, limit)
    reader = KeyReader(
        decoder, blocks, LAYERS, layers, rows, whole=True, pad_token=0, max_tokens=4096, device=torch.device("cpu"), trace=trace
    )
    counts = []
    for number in range(3):
        tokens = dict.fromkeys(tokens, 0)
        reader.read(number)
        counts.append([tokens[n] for n in range(6)])
    assert counts == expected


@pytest.mark.parametrize("scope", ["zscore", "nearest"])
def test_a_step_with_a_trace_is_the_step_without(tiny_model, tokenizer, scope, monkeypatch):
    """Also where rows share contexts with other requests than in the values' run, or only some rows were recorded."""
    found = []
    real = ActivationRecorder.padded
    for known in (lambda rows: False, lambda rows: True, lambda rows: rows[0].plain, lambda rows: not rows[0].plain):
        monkeypatch.setattr(
            ActivationRecorder, "padded", lambda self, rows, *rest, known=known: real(self, rows, *rest) if known(rows) else None
        )
        model = tiny_model("llama", num_hidden_layers=6).double()
        editor = make_editor(model, tokenizer, layers=LAYERS, steps=3, prefixes=2, scope=scope)
        for batch in (REQUESTS[:2], REQUESTS[2:], [dataclasses.replace(r, target_new="Rome") for r in REQUESTS]):
            editor.edit(batch)
        found.append([edits_of(layer) for layer in editor.layers.values()])
    for other in found[1:]:
        for delta, expected in zip(other, found[0], strict=True):
            assert delta.any() and torch.allclose(delta, expected, rtol=1e-8, atol=1e-10)


def test_a_trace_holds_what_was_run_and_nothing_else(tiny_model, tokenizer):
    model, architecture, layers = hooked(tiny_model, "opt", "reference")
    trace = recorded(model, tokenizer, architecture, layers, 4096)
    rows = prompt_rows(tokenizer, REQUESTS, PREFIXES)
    lengths = [len(row.ids) for row in rows]
    found = trace.padded(rows, [0] * len(rows), lengths)
    for layer in layers:
        layer.mode = "validated"
    for n, row in enumerate(rows):
        with torch.no_grad(), watched(architecture.block(model, LAYERS[0]), layers[0]) as seen:
            model(torch.tensor([row.ids]))
        for name, value in seen.hidden().items():
            assert torch.allclose(found[name][n, : len(row.ids)], value.reshape(len(row.ids), -1), atol=1e-10)
            assert not found[name][n, len(row.ids) :].any()
    middle = trace.padded(rows, [n - 2 for n in lengths], lengths)
    for n, length in enumerate(lengths):
        assert torch.equal(middle["x"][n], found["x"][n, length - 2 : length])
    other = [dataclasses.replace(row, ids=[row.ids[0] + 1, *row.ids[1:]]) for row in rows]
    longer = [dataclasses.replace(row, ids=row.ids + [7] * 9) for row in rows]
    unknown = [dataclasses.replace(row, request=5) for row in rows]
    for wrong in (other, longer, unknown):
        assert trace.padded(rows[:-1] + wrong[-1:], [0] * len(rows), [len(r.ids) for r in rows[:-1] + wrong[-1:]]) is None


def test_a_token_that_goes_on_behind_the_subject_is_not_its_own(tokenizer):
    """Where a tokenizer merges a subject's bracket with the question mark, the key is read one token earlier: ")?" ends any
    question."""
    from tokenizers import Tokenizer, models, pre_tokenizers
    from transformers import PreTrainedTokenizerFast

    from comeba_ext.text.encoding import encode

    words = {word: n for n, word in enumerate(["[UNK]", "Who", "made", "Leeds", "(", "6", ")?", ")", "?", "Boat"])}
    split = Tokenizer(models.WordLevel(words, unk_token="[UNK]"))
    split.pre_tokenizer = pre_tokenizers.Sequence(
        [pre_tokenizers.WhitespaceSplit(), pre_tokenizers.Split("(", "isolated"), pre_tokenizers.Split(")?", "isolated")]
    )
    merged = PreTrainedTokenizerFast(tokenizer_object=split)
    text = "Who made Leeds (6)?"
    found = encode(merged, text, None, len("Who made Leeds (6)"))
    assert merged.convert_ids_to_tokens(found.ids)[found.subject_last] == "6"
    plain = encode(merged, "Who made Boat", None, len("Who made Boat"))
    assert plain.subject_last == 2
    assert encode(merged, "Who made Leeds (6", None, len("Who made Leeds (6")).subject_last == 4
