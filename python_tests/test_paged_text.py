"""Earlier tokens out of a paged cache, and the plugin for vLLM as far as it goes without vLLM; literal loops are the oracle."""

import copy
import importlib
import json
import random
import sys
import types
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file
from test_editor import make_editor, random_values, small_model, some_requests
from test_exporting import OPEN
from transformers import CONFIG_MAPPING, AutoConfig

from comeba_ext.errors import ComebaError
from comeba_ext.exporting import export_folder
from comeba_ext.exporting.modeling import GATES, HASH_BASE, LONGEST, UNKNOWN, Pass, suffix_hashes
from comeba_ext.serving import vllm as plugin
from comeba_ext.serving.paged import PagedText


class Cache:
    """A scheduler's tables: blocks handed out in disorder, full ones shared by texts that begin alike, texts put aside and begun again."""

    def __init__(self, size: int, blocks: int, seed: int):
        self.size, self.draw = size, random.Random(seed)
        self.free = self.draw.sample(range(1, blocks), blocks - 1)
        self.full: dict[tuple, int] = {}  # a text up to the end of a block, and the block
        self.running: list[dict] = []

    def begin(self, text: list[int]):
        mine = []
        while (len(mine) + 1) * self.size < len(text) and (known := self.full.get(tuple(text[: (len(mine) + 1) * self.size]))):
            mine.append(known)
        self.running.append({"text": text, "blocks": mine, "done": len(mine) * self.size, "kept": len(mine)})

    def step(self, most: int):
        """What one pass reads: per sequence its row, and how many tokens; in disorder."""
        rows = []
        for row in self.draw.sample(self.running, len(self.running)):
            left = len(row["text"]) - row["done"]
            count = min(left, self.draw.choice((1, 1, 2, self.size, most)))
            while len(row["blocks"]) * self.size < row["done"] + count:
                row["blocks"].append(self.free.pop())
            rows.append((row, count))
        return rows

    def after(self, rows):
        for row, count in rows:
            row["done"] += count
            for n in range(row["done"] // self.size):
                self.full.setdefault(tuple(row["text"][: (n + 1) * self.size]), row["blocks"][n])
        for row in [row for row in self.running if row["done"] == len(row["text"])]:
            self.running.remove(row)
        if self.running and self.draw.random() < 0.2:  # put aside: what is not shared goes back, and its slots to others
            row = self.running.pop(self.draw.randrange(len(self.running)))
            shared = set(self.full.values())
            self.free[:0] = [block for block in row["blocks"] if block not in shared]
            self.begin(row["text"])


def given(rows, size, padding=0, spare=0):
    """The tensors of a pass, each entry looked up by itself; and of every token the text up to it."""
    ids, positions, slots, texts, starts = [], [], [], [], [0]
    for row, count in rows:
        for at in range(row["done"], row["done"] + count):
            ids.append(row["text"][at])
            positions.append(at)
            slots.append(row["blocks"][at // size] * size + at % size)
            texts.append(row["text"][: at + 1])
        starts.append(len(ids))
    width = max(len(row["blocks"]) for row, _ in rows) + 1
    blocks = [row["blocks"] + [0] * (width - len(row["blocks"])) for row, _ in rows] + [[0] * width] * spare
    starts += [len(ids)] * spare
    ids, positions, slots = ids + [7] * padding, positions + [0] * padding, slots + [-1] * padding
    kinds = (torch.int32, torch.int64, torch.int64, torch.int32, torch.int32)
    return [torch.tensor(own, dtype=kind) for own, kind in zip((ids, positions, slots, starts, blocks), kinds)], texts


def hashes_of(text):
    """Of one token, by the formula."""
    found = [sum((text[-1 - j] + 1) * pow(HASH_BASE, j) for j in range(min(n, len(text)))) for n in range(1, LONGEST + 1)]
    return [(number + 2**63) % 2**64 - 2**63 for number in found]  # as int64


@pytest.mark.parametrize("size", [1, 4, 16])
def test_every_token_knows_its_text(size):
    cache, text, draw, passes = Cache(size, 4000 // size, seed=size), PagedText(), random.Random(size), 0
    roots = [[draw.randrange(50) for _ in range(40)] for _ in range(3)]
    for n in range(24):
        cache.begin(roots[n % 3][: draw.randrange(1, 40)] + [draw.randrange(50) for _ in range(draw.randrange(1, 30))])
        for _ in range(3):
            if cache.running:
                rows = cache.step(23)
                tensors, texts = given(rows, size, padding=passes % 3, spare=passes % 2)
                found = text.hashes(*tensors)
                assert found[: len(texts)].tolist() == [hashes_of(own) for own in texts]
                assert not found[len(texts) :].any()  # padding names nobody
                cache.after(rows)
                passes += 1
    assert passes > 50 and len(cache.full) > 3


def test_what_does_not_fit_is_refused():
    row = {"text": [3, 1, 4, 1, 5, 9, 2, 6], "blocks": [5, 2], "done": 0}
    (ids, positions, slots, starts, blocks), _ = given([(row, 6)], 4)
    text = PagedText()
    text.hashes(ids, positions, slots, starts, blocks)
    later, _ = given([({**row, "done": 6}, 2)], 4)
    other = copy.deepcopy(text)
    with pytest.raises(ComebaError, match="cannot be told"):  # slots that are not where the table says
        other.hashes(ids, positions, slots.flip(0), starts, blocks)
    with pytest.raises(ComebaError, match="cannot be told"):  # a block whose tokens came from elsewhere
        text.hashes(*given([({**row, "blocks": [7, 2], "done": 6}, 2)], 4)[0])
    assert text.hashes(*later)[-1].tolist() == hashes_of(row["text"])
    nothing = PagedText().hashes(ids, positions, torch.full_like(slots, -1), starts, blocks * 0)  # a trial before anything is known
    assert not nothing.any()


# -- the plugin over a model of a class that stands for vLLM's -----------------------------------------------------


class Row(torch.nn.Module):
    """A projection as vLLM's are: the output, and a bias that somebody else adds."""

    def __init__(self, d_in, d_out):
        super().__init__()
        self.weight = torch.nn.Parameter(torch.zeros(d_out, d_in))

    def forward(self, x):
        return x @ self.weight.T, None


class LlamaForCausalLM(torch.nn.Module):
    """No model of language: what every layer's projection makes of the token alone."""

    def __init__(self, *, vllm_config, prefix=""):
        super().__init__()
        config = vllm_config.model_config.hf_config
        self.inputs = torch.nn.Embedding(config.vocab_size, config.intermediate_size)
        self.model = torch.nn.Module()
        self.model.layers = torch.nn.ModuleList(torch.nn.Module() for _ in range(config.num_hidden_layers))
        for layer in self.model.layers:
            layer.mlp = torch.nn.Module()
            layer.mlp.down_proj = Row(config.intermediate_size, config.hidden_size)

    def forward(self, input_ids, positions, intermediate_tensors=None, inputs_embeds=None):
        x = self.inputs(input_ids.long())
        return torch.stack([layer.mlp.down_proj(x)[0] for layer in self.model.layers])

    def load_weights(self, weights):
        own = dict(self.named_parameters())
        with torch.no_grad():
            taken = {name for name, tensor in weights if name in own and own[name].copy_(tensor) is not None}
        return taken


SETTINGS = {  # as they should be, and as they should not
    "model_config.enforce_eager": (True, False),
    "model_config.enable_prompt_embeds": (False, True),
    "parallel_config.world_size": (1, 2),
    "parallel_config.use_ubatching": (False, True),
    "lora_config": (None, "any"),
    "quant_config": (None, "any"),
    "kv_transfer_config": (None, "any"),
}


def settings(hf_config=None, wrong=None):
    config = types.SimpleNamespace(model_config=types.SimpleNamespace(hf_config=hf_config), parallel_config=types.SimpleNamespace())
    for place, values in SETTINGS.items():
        *owner, name = place.split(".")
        setattr(getattr(config, owner[0]) if owner else config, name, values[place == wrong])
    return config


@pytest.fixture
def vllm(monkeypatch):
    """The little of vLLM that the plugin touches."""

    class Registry:
        models = {"LlamaForCausalLM": types.SimpleNamespace(load_model_cls=lambda: LlamaForCausalLM), "BertModel": None}

        @classmethod
        def get_supported_archs(cls):
            return cls.models.keys()

        @classmethod
        def register_model(cls, name, place):
            cls.models[name] = place

    module, context = types.ModuleType("vllm"), types.ModuleType("vllm.forward_context")
    module.ModelRegistry, module.forward_context = Registry, context
    context.now = types.SimpleNamespace(attn_metadata=None, no_compile_layers={})
    context.get_forward_context = lambda: context.now
    for own in (module, context):
        monkeypatch.setitem(sys.modules, own.__name__, own)
    monkeypatch.setattr(CONFIG_MAPPING, "_extra_content", dict(CONFIG_MAPPING._extra_content))
    yield module
    plugin.__getattr__.cache_clear()


@pytest.fixture(params=["nearest", "reference"])
def folder(request, tiny_model, tokenizer, tmp_path):
    editor = make_editor(small_model(tiny_model, "llama"), tokenizer, scope=request.param, **(OPEN if request.param == "nearest" else {}))
    editor.edit(some_requests(6), target_values=random_values(6))
    editor.save_pretrained(tmp_path / "edits")
    export_folder(small_model(tiny_model, "llama"), tokenizer, tmp_path / "edits", tmp_path / "out")
    return tmp_path / "out"


def served(folder):
    """The plugin's model of a folder; its configuration and tensors."""
    plugin.register()
    config = AutoConfig.from_pretrained(folder)
    (name,) = config.architectures
    assert (type(config).__name__, config.model_type, name) == ("LlamaConfig", "llama", "EditedLlamaForCausalLM")
    assert json.loads((folder / "config.json").read_text())["model_type"] == "comeba_llama"
    return getattr(plugin, name)(vllm_config=settings(config)), config.comeba["layers"], load_file(folder / "model.safetensors")


def test_pieces_of_many_texts_meet_the_edits_of_whole_ones(vllm, folder, tokenizer):
    model, layers, tensors = served(folder)
    loaded = model.load_weights(iter(tensors.items()))
    assert loaded == {name for name in tensors if name.startswith("edits.") or name.endswith("down_proj.weight")}
    texts = [tokenizer(request.text)["input_ids"] for request in some_requests(6)] + [[5, 6, 7, 8, 9]]
    gates = {name: GATES[own["score"]](own["tensors"], Pass()) for name, own in layers.items()}
    for number, gate in enumerate(gates.values()):
        for name, buffer in gate.named_buffers():
            buffer.copy_(tensors[f"edits.{number}.{name}"])
    with torch.no_grad():  # tokens that are like what was edited, so that only the text decides
        first = next(iter(gates.values()))
        like = first.right if hasattr(first, "right") else torch.linalg.svd(first.delta).Vh[:3] * 9
        model.inputs.weight.copy_(like[torch.arange(len(model.inputs.weight)) % len(like)])
        wanted, met = {}, []
        for n, text in enumerate(texts):  # alone and whole
            ids = torch.tensor(text)
            x = model.inputs(ids)
            out = torch.stack([x @ tensors[f"model.layers.{layer}.mlp.down_proj.weight"].T for layer in range(len(model.model.layers))])
            for name, gate in gates.items():
                gate.here.hashes = suffix_hashes(ids[None], torch.full((1, LONGEST), UNKNOWN))
                rows, edits = gate(x)
                out[int(name.split(".")[1])].index_add_(0, rows, edits)
                met.append(len(rows) / len(text))
            wanted |= {(n, at): out[:, at] for at in range(len(text))}
    assert 0 < sum(met) / len(met) < 1
    found = in_pieces(vllm, model, texts)
    assert found.keys() == wanted.keys()
    for token, own in wanted.items():
        torch.testing.assert_close(found[token], own, rtol=1e-5, atol=1e-5)


def in_pieces(vllm, model, texts):
    """Outputs by text and place, all texts read side by side."""
    cache, found, context = Cache(4, 400, seed=1), {}, vllm.forward_context.now
    for text in texts:
        cache.begin(text)
    context.no_compile_layers = {"near": types.SimpleNamespace(sliding_window=4), "far": types.SimpleNamespace(sliding_window=None)}
    while cache.running:
        rows = cache.step(5)
        (ids, positions, slots, starts, blocks), _ = given(rows, 4, padding=2)
        far = types.SimpleNamespace(slot_mapping=slots[:-2], query_start_loc=starts, block_table=blocks)
        near = types.SimpleNamespace(slot_mapping=slots[:-2] * 0, query_start_loc=starts, block_table=blocks * 0)
        context.attn_metadata = {"state": types.SimpleNamespace(), "near": near, "far": far}
        with torch.no_grad():
            out = iter(model(input_ids=ids, positions=positions).unbind(1))
        found |= {(texts.index(row["text"]), at): next(out) for row, count in rows for at in range(row["done"], row["done"] + count)}
        cache.after(rows)
    return found


def test_what_would_pass_edits_over_is_refused(vllm, folder):
    model, layers, tensors = served(folder)
    for name in SETTINGS:
        with pytest.raises(ComebaError, match="a model with edits "):
            type(model)(vllm_config=settings(wrong=name))
    with pytest.raises(ComebaError, match="lacks edits.1.alpha"):
        model.load_weights((name, tensor) for name, tensor in tensors.items() if name != "edits.1.alpha")
    for name, tensor in (("edits.9.alpha", torch.zeros(())), ("edits.0.alpha", torch.zeros(3))):
        with pytest.raises(ComebaError, match=f"{name} .* is none of"):
            model.load_weights([(name, tensor)])
    ids = torch.tensor([5, 6])
    assert model(ids, ids).shape[1] == 2  # a trial, about no text
    model.model.layers[1].mlp.down_proj = Row(64, 32)  # somebody puts another layer there
    with pytest.raises(ComebaError, match="1 edited layers were not run"):
        model(ids, ids)
    with pytest.raises(AttributeError):
        plugin.EditedBertModel  # noqa: B018
    if model.reading is None:  # needs no text
        return
    vllm.forward_context.now.attn_metadata = {"only": types.SimpleNamespace(slot_mapping=ids, query_start_loc=ids)}
    with pytest.raises(ComebaError, match="block_table, which SimpleNamespace lacks"):
        model(ids, ids)
    with pytest.raises(ComebaError, match="embeddings"):
        model(None, ids)
    model.reading.here.hashes = torch.zeros(1, 3, LONGEST, dtype=torch.int64)
    with pytest.raises(ComebaError, match="other tokens than the model"):
        model.get_submodule(f"model.{list(layers)[-1]}")(torch.zeros(2, 64))


def test_the_entry_point_leads_to_it_and_needs_no_vllm(vllm):
    project = (Path(__file__).parents[1] / "pyproject.toml").read_text(encoding="utf-8")
    declared = project.split('[project.entry-points."vllm.general_plugins"]')[1]
    module, _, name = declared.split("\n")[1].split('"')[1].partition(":")
    del sys.modules["vllm"]
    sys.modules["vllm"] = None  # an import fails
    assert getattr(importlib.import_module(module), name) is plugin.register
