"""What EasyEdit's WISE saved, measured: files as its classes make them, and its rule as a loop over tokens, one prompt at a time.

The stand-ins for EasyEdit's classes are there while a file is written, and gone before it is read.
"""

import copy
import io
import json
import sys
import types
import zipfile
from dataclasses import dataclass, replace

import pytest
import torch
from test_cli import output, run
from torch import nn
from transformers.activations import ACT2FN

from comeba_ext import evaluate, testbed
from comeba_ext.errors import ArchitectureError, ComebaError, StorageError
from comeba_ext.evaluation import predict_base
from comeba_ext.layers.attachment import attachments, detach, disabled
from comeba_ext.methods.easyedit_wise import read_wise, ties_of

LAYER = "model.layers.2.mlp.down_proj"


@dataclass
class WISEHyperParams:
    inner_params: list
    retrieve: bool = True
    act_ratio: float = 0.88
    save_freq: int = 3
    merge_freq: int = 6
    merge_alg: str = "ties"
    densities: float = 0.53
    weights: float = 1.0
    model_name: str = "./hugging_cache/testbed"
    device: int = 0


class EditingMeanAct:
    def __init__(self, min_a=1e9):
        self.avg, self.count, self.sum, self.min_a = 0, 0, 0, min_a


class Adapter(nn.Module):
    """Answers as EasyEdit's layer does, for one sequence: every distance is a sum over tokens, every choice an ``if``."""

    def __init__(self, layer, config, act):
        super().__init__()
        self.layer, self.weight, self.new_weight = layer, layer.weight, copy.deepcopy(layer.weight)
        self.original_layer = copy.deepcopy(layer)
        self.bias = layer.bias if "gpt2" in config.model_name else None
        self.config, self.act, self.went = config, ACT2FN[act], []
        self.memory_weight, self.memory_mean_act = [], []
        self.editing_mean_act, self.editing_total_cnt = EditingMeanAct(), 0

    def far(self, output, plain):
        found = [((self.act(a) - self.act(b)) ** 2).sum().sqrt().item() for a, b in zip(output[0], plain[0], strict=True)]
        return max(found) if len(found) > 100 else sum(found) / len(found)

    def changed(self, x, weight):
        return x @ weight.T if self.bias is None else x @ weight + self.bias

    def forward(self, x):
        outputs = {"base": self.original_layer(x), "side": self.changed(x, self.new_weight)}
        limit = self.editing_mean_act.min_a * self.config.act_ratio
        side = self.far(outputs["side"], outputs["base"])
        if self.config.retrieve:
            way, farthest = ("base" if side < limit else "side"), side
            for n, memory in enumerate(self.memory_weight):
                outputs[n] = x @ memory.T
                distance = self.far(outputs[n], outputs["base"])
                if distance > farthest and distance > self.memory_mean_act[n].min_a * self.config.act_ratio:
                    way, farthest = n, distance
        else:
            outputs["merged"] = self.layer(x)
            merged = self.far(outputs["merged"], outputs["base"])
            way = "base" if merged < limit and side < limit else "merged" if merged > side else "side"
        self.went.append(way)
        return outputs[way]


def adapted(model, **config):
    """A copy of the model with a stand-in for EasyEdit's layer in it."""
    config = WISEHyperParams([LAYER.replace(".2.", "[2].") + ".weight"], **config)
    copied = copy.deepcopy(model).requires_grad_(False)
    adapter = Adapter(copied.get_submodule(LAYER), config, model.config.hidden_act)
    copied.set_submodule(LAYER, adapter)
    return copied, adapter


def off(weight, seed, scale=1.0):
    """Another weight: some directions of the input are changed, so that prompts differ in how far they are."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        left, right = torch.randn(weight.shape[0], 3), torch.randn(3, weight.shape[1])
    return nn.Parameter(weight.detach() + scale * weight.norm() * left @ right / left.norm() / right.norm(), requires_grad=False)


def contents(adapter):
    names = ("memory_weight", "memory_mean_act", "editing_mean_act", "editing_total_cnt")
    info = {name: getattr(adapter, name) for name in names}
    info |= {"merge_cnt": 0, "weight_mask": torch.ones(adapter.new_weight.numel(), dtype=torch.long)}
    tokens = {"input_ids": torch.tensor([[1, 2]]), "labels": torch.tensor([[-100, 2]])}
    return {
        "adapter_state_dict": adapter.state_dict(),
        "config": adapter.config,
        "additional_info": info,
        "edit_history": [[tokens, False]],
        "merge_group_edit_history": [],
    }


def save(found, path, *others):
    """torch.save with our stand-ins under EasyEdit's names."""
    homes = {WISEHyperParams: "wise.wise_hparams", EditingMeanAct: "wise.utils", **dict(others)}
    with pytest.MonkeyPatch.context() as patch:
        for kind, home in homes.items():
            name = f"easyeditor.models.{home}"
            for end in range(1, name.count(".") + 2):
                part = ".".join(name.split(".")[:end])
                patch.setitem(sys.modules, part, sys.modules.get(part) or types.ModuleType(part))
            setattr(sys.modules[name], kind.__name__, kind)
            patch.setattr(kind, "__module__", name)
        torch.save(found, path)
    assert not any(name.startswith("easyeditor") for name in sys.modules)
    return path


@pytest.fixture(scope="module")
def base():
    return testbed.load()


def prompts():
    facts = testbed.facts()[:60:3]
    return [fact.text for fact in facts] + [p for fact in facts[:6] for p, _ in fact.locality_prompts[:1]]


def logits_of(model, tokenizer, texts):
    with torch.no_grad():
        return [model(torch.tensor([tokenizer(text)["input_ids"]])).logits[0] for text in texts]


def measured(adapter, model, tokenizer, weight, texts):
    """How far a weight's outputs are from the layer's own on every prompt."""
    found, far = [], adapter.far
    kept = adapter.new_weight, adapter.config.retrieve
    adapter.new_weight, adapter.config.retrieve = weight, True
    adapter.far = lambda *outputs: found.append(far(*outputs)) or found[-1]
    logits_of(model, tokenizer, texts)
    del adapter.far
    adapter.new_weight, adapter.config.retrieve = kept
    adapter.went.clear()
    return found


def between(values, share):
    """A number that so many of the values are below, far from all of them."""
    ordered = sorted(values)
    return (ordered[int(share * len(ordered)) - 1] + ordered[int(share * len(ordered))]) / 2


def retrieving(model, tokenizer, memories, texts, scale=0.5):
    """Side weight and memories, with limits such that prompts go every way."""
    loop, adapter = adapted(model)
    adapter.new_weight = off(adapter.weight, 0, scale)
    distances = measured(adapter, loop, tokenizer, adapter.new_weight, texts)
    adapter.editing_mean_act = EditingMeanAct(between(distances, 0.5) / adapter.config.act_ratio)
    for n in range(memories):
        adapter.memory_weight.append(off(adapter.weight, n + 1, scale))
        distances = measured(adapter, loop, tokenizer, adapter.memory_weight[-1], texts)
        adapter.memory_mean_act.append(EditingMeanAct(between(distances, 0.6) / adapter.config.act_ratio))
    return loop, adapter


def merging(model, tokenizer, texts):
    loop, adapter = adapted(model, retrieve=False)
    adapter.layer.weight = off(adapter.weight, 0, 0.5)
    adapter.new_weight = off(adapter.weight, 1, 0.5)
    apart = zip(*(measured(adapter, loop, tokenizer, w, texts) for w in (adapter.layer.weight, adapter.new_weight)), strict=True)
    adapter.editing_mean_act = EditingMeanAct(between([max(pair) for pair in apart], 0.4) / adapter.config.act_ratio)
    adapter.editing_total_cnt = 2  # fewer than save_freq: nothing is merged
    return loop, adapter


def check_equal(model, tokenizer, loop, adapter, texts):
    """Logits are those of the loop, prompt by prompt, padded on either side, and decoding behind a cache."""
    wanted = logits_of(loop, tokenizer, texts)
    went = list(adapter.went)
    for found, own in zip(logits_of(model, tokenizer, texts), wanted, strict=True):
        torch.testing.assert_close(found, own, rtol=1e-4, atol=1e-4)
    side = tokenizer.padding_side
    for tokenizer.padding_side in ("left", "right"):
        batch = tokenizer(texts, return_tensors="pt", padding=True)
        with torch.no_grad():
            logits = model(**batch).logits
        for found, mask, own in zip(logits, batch["attention_mask"], wanted, strict=True):
            torch.testing.assert_close(found[mask.bool()], own, rtol=1e-3, atol=1e-3)
    tokenizer.padding_side = side
    ids = torch.tensor([tokenizer(texts[-1])["input_ids"]])
    written = [m.generate(ids, attention_mask=torch.ones_like(ids), max_new_tokens=6, do_sample=False) for m in (loop, model)]
    assert torch.equal(*written)
    return went


@pytest.mark.parametrize("case", ["side", "memories", "merged"])
def test_logits_are_those_of_easyedits_rule(base, tmp_path, case):
    model, tokenizer = copy.deepcopy(base[0]), base[1]
    texts = prompts()
    ways = {"side": {"base", "side"}, "memories": {"base", "side", 0, 1}, "merged": {"base", "side", "merged"}}[case]
    loop, adapter = merging(model, tokenizer, texts) if case == "merged" else retrieving(model, tokenizer, 2 * (case == "memories"), texts)
    saved = read_wise(save(contents(adapter), tmp_path / "wise.pt"))
    plain = logits_of(model, tokenizer, texts)
    assert saved.onto(model) is model
    assert set(check_equal(model, tokenizer, loop, adapter, texts)) == ways
    with disabled(model):
        assert all(torch.equal(a, b) for a, b in zip(logits_of(model, tokenizer, texts), plain, strict=True))
    with pytest.raises(ArchitectureError, match="edited already"):
        saved.onto(model)
    detach(model)
    assert not attachments(model)


def test_of_long_sequences_the_farthest_token_counts(base, tmp_path):
    model, tokenizer = copy.deepcopy(base[0]), base[1]
    texts = [" ".join(prompts())]
    texts = [tokenizer.decode(tokenizer(texts[0])["input_ids"][:n]) for n in (90, 110)]
    loop, adapter = adapted(model)
    adapter.new_weight = off(adapter.weight, 0, 0.5)
    mean, top = measured(adapter, loop, tokenizer, adapter.new_weight, texts)
    assert top > 1.5 * mean
    adapter.editing_mean_act = EditingMeanAct((mean + top) / 2 / adapter.config.act_ratio)
    read_wise(save(contents(adapter), tmp_path / "wise.pt")).onto(model)
    for found, own in zip(logits_of(model, tokenizer, texts), logits_of(loop, tokenizer, texts), strict=True):
        torch.testing.assert_close(found, own, rtol=1e-4, atol=1e-4)
    assert adapter.went == ["base", "side"]


@pytest.mark.parametrize(
    "family, layer, name",
    [("gpt2", "transformer.h.1.mlp.c_fc", "openai-community/gpt2-xl"), ("gptj", "transformer.h.1.mlp.fc_out", "gpt-j")],
)
def test_biases_are_where_easyedit_has_them(tiny_model, tokenizer, tmp_path, family, layer, name):
    """GPT-2's are added to the edited output, those of other layers are not."""
    model = tiny_model(family).requires_grad_(False)
    bias = model.get_submodule(layer).bias
    bias.copy_(torch.linspace(-2, 2, len(bias)))
    loop, act = copy.deepcopy(model), model.config.activation_function
    adapter = Adapter(loop.get_submodule(layer), WISEHyperParams([f"{layer}.weight"], model_name=name), act)
    loop.set_submodule(layer, adapter)
    adapter.new_weight, adapter.editing_mean_act = off(adapter.weight, 0), EditingMeanAct(0.0)
    read_wise(save(contents(adapter), tmp_path / "wise.pt")).onto(model)
    (found,), (wanted,) = (logits_of(m, tokenizer, ["The capital of Norway is"]) for m in (model, loop))
    torch.testing.assert_close(found, wanted, rtol=1e-4, atol=1e-4)
    assert adapter.went == ["side"]


def ties_by_hand(original, weights, shares, density):
    changes = [(weight - original).tolist() for weight in weights]
    for change in changes:
        entries = sorted((abs(value) for row in change for value in row), reverse=True)
        least = entries[int(density * len(entries)) - 1]
        for row in change:
            row[:] = [value if abs(value) >= least else 0.0 for value in row]
    merged = original.clone()
    for i in range(original.shape[0]):
        for j in range(original.shape[1]):
            own = [(share, change[i][j]) for share, change in zip(shares, changes, strict=True)]
            up = sum(share * value for share, value in own) >= 0
            agree = [(share, value) for share, value in own if value and (value > 0) == up]
            if agree:
                merged[i, j] += sum(share * value for share, value in agree) / sum(share for share, _ in agree)
    return merged


def test_ties_entry_by_entry():
    torch.manual_seed(0)
    original, *weights = torch.randn(4, 7, 5)
    for shares in ([1 / 3] * 3, [0.2, 0.2, 0.6]):
        torch.testing.assert_close(ties_of(original, weights, shares, 0.53), ties_by_hand(original, weights, shares, 0.53))
    torch.testing.assert_close(ties_of(original, weights[:1], [1.0], 1.0), weights[0])


@pytest.mark.parametrize("before", [False, True])
def test_what_is_not_merged_yet_is_merged_as_at_the_first_call(base, tmp_path, before):
    model, tokenizer = copy.deepcopy(base[0]), base[1]
    texts = prompts()[:4]
    loop, adapter = merging(model, tokenizer, texts)
    shards, original = [off(adapter.weight, 2), off(adapter.weight, 3)], adapter.original_layer.weight.detach()
    adapter.layer.weight = adapter.layer.weight if before else nn.Parameter(original.clone(), requires_grad=False)
    adapter.memory_weight, adapter.new_weight, adapter.editing_total_cnt = shards[:1], shards[1], 4
    saved = read_wise(save(contents(adapter), tmp_path / "wise.pt"))
    merged = [*shards, adapter.layer.weight] if before else shards
    merged = ties_of(original, [w.detach() for w in merged], [0.2, 0.2, 0.6] if before else [0.5, 0.5], 0.53)
    saved.onto(model)
    adapter.memory_weight, adapter.new_weight = [], nn.Parameter(original.clone(), requires_grad=False)
    adapter.layer.weight = nn.Parameter(merged, requires_grad=False)
    check_equal(model, tokenizer, loop, adapter, texts)
    detach(model)
    with pytest.raises(StorageError, match="only 'ties' is done here"):
        replace(saved, settings=saved.settings | {"merge_alg": "dare_ties"}).onto(model)
    assert not attachments(model)


def test_comeba_eval_measures_it_against_its_base(base, tmp_path):
    model, tokenizer = base
    facts = testbed.facts()[:6]
    texts = [fact.text for fact in facts] + [p for fact in facts for p, _ in fact.locality_prompts]
    loop, adapter = retrieving(model, tokenizer, 1, texts, scale=20)
    path = save(contents(adapter), tmp_path / "wise.pt")
    records = tmp_path / "records.json"
    records.write_text(json.dumps([{k: v for k, v in fact.to_record().items() if k != "request_id"} for fact in facts]))
    found = output("eval", path, records, "--base", "testbed", "--answer-tokens", 0)
    # max_tokens=1: one prompt at a time, as the loop takes them.
    wanted = evaluate(loop, tokenizer, facts, predict_base(model, tokenizer, facts, max_tokens=1), max_tokens=1)
    for name in ("reliability", "generality", "locality", "reliability_generation", "locality_generation"):
        assert found[name] == pytest.approx(wanted[name]), name
    assert 0 < found["locality"] < 1 and {"base"} < set(adapter.went) and found["base"] == "testbed"
    for options, words in (((), "with --base"), (("--base", "testbed", "--edits", tmp_path), "leave one of them out")):
        failed = run("eval", path, records, *options, "--json")
        assert failed.exit_code == 1 and words in json.loads(failed.stdout)["error"]


class Malicious:
    def __init__(self, path):
        self.path = path

    def __reduce__(self):
        import os

        return os.mkdir, (str(self.path),)


class GRACEAdapter(nn.Module):
    pass


@pytest.fixture(scope="module")
def good(base):
    _, adapter = retrieving(base[0], base[1], 1, prompts()[:8])
    return contents(adapter)


def changed(found, *path, to=None, drop=False):
    found = {key: dict(value) if isinstance(value, dict) else copy.copy(value) for key, value in found.items()}
    inner = found
    for key in path[:-1]:
        inner = inner[key] if isinstance(inner, dict) else vars(inner)
    inner = inner if isinstance(inner, dict) else vars(inner)
    if drop:
        del inner[path[-1]]
    else:
        inner[path[-1]] = to
    return found


@pytest.mark.parametrize(
    "path, how, words",
    [
        (("config",), {"drop": True}, "config is missing"),
        (("config",), {"to": {"inner_params": [LAYER]}}, "config is malformed"),
        (("config", "inner_params"), {"to": []}, "inner_params is malformed"),
        (("config", "retrieve"), {"to": "yes"}, "retrieve is malformed"),
        (("config", "act_ratio"), {"to": float("nan")}, "act_ratio is malformed"),
        (("adapter_state_dict", "new_weight"), {"drop": True}, "new_weight is missing"),
        (("adapter_state_dict", "new_weight"), {"to": torch.zeros(3)}, "new_weight is malformed"),
        (("additional_info", "memory_mean_act"), {"to": []}, "memory_mean_act is malformed"),
        (("additional_info", "editing_mean_act"), {"to": 3.0}, "editing_mean_act is malformed"),
        (("additional_info", "editing_total_cnt"), {"to": None}, "editing_total_cnt is malformed"),
        (("adapter_state_dict",), {"to": [1]}, "adapter_state_dict is malformed"),
    ],
)
def test_a_file_with_other_contents_is_one_clear_error(good, tmp_path, path, how, words):
    with pytest.raises(StorageError, match=words):
        read_wise(save(changed(good, *path, **how), tmp_path / "wise.pt"))


@pytest.mark.parametrize(
    "path, to, words",
    [
        (("config", "inner_params"), ["model.layers[9].mlp.down_proj.weight"], r"no linear layer 'model.layers.9.mlp.down_proj'"),
        (("config", "inner_params"), ["lm_head.weight"], "no linear layer 'lm_head' in its blocks"),
        (("config", "inner_params"), ["model.norm.weight"], "no linear layer"),
        (("config", "inner_params"), ["model.layers[2].mlp.up_proj.weight"], r"up_proj is \(1408, 256\), in the file \[\(256, 1408\)\]"),
        (("config", "inner_params"), ["model.layers[1].mlp.down_proj.weight"], "was another one before"),
        (("adapter_state_dict", "new_weight"), torch.full((256, 1408), torch.nan), "NaN"),
        (("adapter_state_dict", "new_weight"), torch.zeros(1, 1).expand(2**20, 2**30), r"in the file \[\(256, 1408\), \(1048576"),
        (("adapter_state_dict", "bias"), torch.zeros(256), "fails on such weights beside a Linear"),
    ],
)
def test_a_file_of_another_model_is_one_clear_error(base, good, tmp_path, path, to, words):
    saved = read_wise(save(changed(good, *path, to=to), tmp_path / "wise.pt"))
    with pytest.raises(StorageError, match=words):
        saved.onto(base[0])
    assert not attachments(base[0])


def test_nothing_in_a_file_is_run(good, tmp_path):
    made = tmp_path / "made"
    with pytest.raises(StorageError, match=r"asks for (posix|nt)\.mkdir, and nothing was run"):
        read_wise(save(changed(good, "edit_history", to=[Malicious(made)]), tmp_path / "a.pt"))
    assert not made.exists()
    torch.save([Malicious(made)], tmp_path / "bare.pt")
    torch.load(tmp_path / "bare.pt", weights_only=False)
    assert made.exists()  # it would have been
    with pytest.raises(StorageError, match=r"asks for easyeditor\.models\.grace\.GRACE\.GRACEAdapter"):
        read_wise(save(GRACEAdapter(), tmp_path / "b.pt", (GRACEAdapter, "grace.GRACE")))


def test_what_is_no_such_file_is_one_clear_error(base, good, tmp_path):
    whole = save(good, tmp_path / "wise.pt").read_bytes()
    torch.save(base[0].get_submodule(LAYER).state_dict(), tmp_path / "weights.pt")
    torch.save([1], tmp_path / "list.pt")
    (tmp_path / "cut.pt").write_bytes(whole[: len(whole) // 2])
    (tmp_path / "empty.pt").write_bytes(b"")
    (tmp_path / "text.pt").write_text("adapter_state_dict")
    (tmp_path / "records.json").write_text('[{"prompt": "a"}]')
    packed = io.BytesIO()
    with zipfile.ZipFile(packed, "w") as archive:
        archive.writestr("a.txt", "b")
    (tmp_path / "zip.pt").write_bytes(packed.getvalue())
    for name, words in {
        "weights.pt": "adapter_state_dict is missing",
        "list.pt": "it holds a list",
        "none.pt": "no such file",
        "records.json": "it is no such pickle",
        **dict.fromkeys(("cut.pt", "empty.pt", "text.pt", "zip.pt"), "is truncated, or not"),
    }.items():
        with pytest.raises(StorageError, match=words) as failed:
            read_wise(tmp_path / name)
        assert "\n" not in str(failed.value) and "weights_only" not in str(failed.value) and isinstance(failed.value, ComebaError)
