"""Methods of others against the rules of their papers, written plainly: each test fails when its rule is changed."""

import copy
import dataclasses
import functools
import json
from pathlib import Path
from types import SimpleNamespace

import pytest
import scipy.linalg
import torch
from test_editor import ids_of, small_model, some_requests
from test_methods import SETTINGS, demonstrations, held, make_method, requests_of  # noqa: F401  (a fixture)

from comeba_ext import Editor, EditRequest, experiments
from comeba_ext.errors import ComebaError, ConfigError
from comeba_ext.forward.architectures import Architecture
from comeba_ext.methods import method_named
from comeba_ext.methods.grace import Codebook
from comeba_ext.methods.melo import WAY, LoraBlocks, Router
from comeba_ext.methods.memoir import MemoirMemory
from comeba_ext.methods.settings import entry
from comeba_ext.methods.side_memory import mean_over_tokens
from comeba_ext.methods.wise import WiseMemory, ties
from comeba_ext.text.prefixes import sample_prefixes


def layer_io(model, tokenizer, text, block=1):
    """Input and output of a block's MLP output projection at every token of a text."""
    seen = []
    handle = model.transformer.h[block].mlp.c_proj.register_forward_hook(lambda m, args, out: seen.append((args[0][0], out[0])))
    with torch.no_grad():
        model(torch.tensor([tokenizer(text)["input_ids"]]))
    handle.remove()
    return seen[0]


def longer(requests):
    """With more tokens to their objects."""
    return [dataclasses.replace(r, target_new=f"{r.target_new}, the capital of Angola", request_id=None) for r in requests]


def nll(model, prompt, whole):
    """Mean over the tokens behind the prompt; the last one is not fed. Both are token ids."""
    log_p = model(torch.tensor([whole[:-1]])).logits[0].log_softmax(-1)
    return -sum(log_p[i - 1, whole[i]] for i in range(len(prompt), len(whole))) / (len(whole) - len(prompt))


def changing(model, block, change):
    """A hook by which a projection's output ``(tokens, d_out)`` becomes ``change(input, output)``, for one text."""
    projection = model.transformer.h[block].mlp.c_proj
    return projection.register_forward_hook(lambda m, args, out: change(args[0][0], out[0])[None])


def adam(value, gradient, memory, rate):
    """A step of Adam (Kingma & Ba, algorithm 1); ``memory`` is changed."""
    memory["t"] = t = memory.get("t", 0) + 1
    memory["m"] = 0.9 * memory.get("m", 0) + 0.1 * gradient
    memory["v"] = 0.999 * memory.get("v", 0) + 0.001 * gradient**2
    return value - rate * (memory["m"] / (1 - 0.9**t)) / ((memory["v"] / (1 - 0.999**t)).sqrt() + 1e-8)


def untrained_model(tiny_model):
    """The model that editors are tested on, in float64, for oracles."""
    return small_model(tiny_model).double().requires_grad_(False)


EXPERIMENTS = sorted((Path(__file__).resolve().parents[1] / "bench" / "experiments").glob("*.yaml"))


@pytest.mark.parametrize("file", EXPERIMENTS, ids=lambda file: file.stem)
def test_experiments_of_bench_can_be_built(tiny_model, file):
    model = small_model(tiny_model)
    for case in experiments.load(file).cases:
        own = {key: value for key, value in case.settings.items() if key != "editor"}  # a folder that training would make
        method_named(case.method).check(dataclasses.replace(case, settings=own).config(model), model, Architecture.of(model))


SEVEN = {"num_hidden_layers": 32, "hidden_size": 4096}
MODELS = {
    "Llama-2-7B": {"model_type": "llama", **SEVEN, "vocab_size": 32000, "max_position_embeddings": 4096},
    "Sheared-LLaMA-2.7B": {"model_type": "llama", **SEVEN, "hidden_size": 2560, "vocab_size": 32000, "max_position_embeddings": 4096},
    "Llama-3-8B": {"model_type": "llama", **SEVEN, "vocab_size": 128256, "max_position_embeddings": 8192},
    "Llama-3.1-8B": {"model_type": "llama", **SEVEN, "vocab_size": 128256, "max_position_embeddings": 131072},
    "Mistral-7B": {"model_type": "mistral", **SEVEN, "vocab_size": 32000, "max_position_embeddings": 32768},
    "GPT-J": {"model_type": "gptj", "num_hidden_layers": 28, "vocab_size": 50400},
    "Qwen2.5-7B": {"model_type": "qwen2", "num_hidden_layers": 28, "hidden_size": 3584, "vocab_size": 152064},
    "Qwen2.5-1.5B": {"model_type": "qwen2", "num_hidden_layers": 28, "hidden_size": 1536, "vocab_size": 151936},
}


@pytest.mark.parametrize(
    "name, sources",
    [
        (
            "WISE",
            ["WISE/llama-7b.yaml;", "same share", "llama3-8b", "llama3.1-8b", "WISE/mistral-7b", "gpt-j-6B", "qwen2.5-7b", "same share"],
        ),
        ("AlphaEdit", [*["as COMEBA-HK"] * 2, "Llama3-8B.json", "llama3.1-8b", "as COMEBA-HK", "gpt-j-6B", "qwen2.5-7b", "as COMEBA-HK"]),
        ("BetaEdit", [*["COMEBA-HK"] * 2, *["Llama3-8B.json"] * 2, "COMEBA-HK", "gpt-j-6B", *["COMEBA-HK"] * 2]),
        ("GRACE", ["llama-7b.yaml", *["same share"] * 4, "gpt-j-6b", "qwen2.5-7b", "same share"]),
        ("MEMOIR", [*["same shares"] * 2, *["Llama-3-8B ("] * 2, "same shares", "GPT-J (", *["same shares"] * 2]),
        ("UltraEdit", [*["same share"] * 2, *["llama-3-instruct"] * 2, "Mistral-7B", "gpt-j.yaml", "qwen2.5-7b", "same share"]),
        ("StableEdit", [*["same share"] * 2, *["Llama-3-8B"] * 2, "Mistral-7B", "GPT-J", "Qwen2.5-7B", "same share"]),
        ("ROME", ["llama-7b", "the middle", "llama3-8b", "llama3-8b", "mistral-7b", "gpt-j-6B", "qwen2.5-7b", "the middle"]),
    ],
)
def test_published_settings_go_to_the_model_they_were_published_for(name, sources):
    for (model, config), words in zip(MODELS.items(), sources, strict=True):
        found = entry(method_named(name), SimpleNamespace(**config))
        assert words in found["source"], model
        assert name not in ("WISE", "MEMOIR") or found["settings"]["prefixes"] == 10


# -- LoRA -----------------------------------------------------------------------------------------------------------


def test_lora_is_pefts(tiny_model, tokenizer):
    """The same adapter made by PEFT from the same start, trained by Adam one text at a time, over two batches."""
    peft = pytest.importorskip("peft")
    parts = ("self_attn.q_proj", "self_attn.v_proj")
    model = small_model(tiny_model, "llama").double()
    plain = copy.deepcopy(model)
    editor = make_method("LoRA", model, tokenizer, layers=(0, 2), parts=parts, rank=3, lora_alpha=6.0, steps=4, lr=0.02, early_stop=0.0)
    for layer in editor.layers.values():
        layer.down, layer.up = layer.down.double(), layer.up.double()  # which model.double() would leave as they are
    config = peft.LoraConfig(r=3, lora_alpha=6, target_modules=r".*layers\.(0|2)\.self_attn\.(q|v)_proj", lora_dropout=0.0)
    wrapped = peft.get_peft_model(plain, config).double().eval()
    theirs = {name: module for name, module in plain.named_modules() if hasattr(module, "lora_A")}
    assert set(theirs) == set(editor.layers) and len(theirs) == 4
    with torch.no_grad():
        for name, module in theirs.items():
            module.lora_A["default"].weight.copy_(editor.layers[name].down)
    requests = [dataclasses.replace(r, target_new=f"{r.target_new}, the capital of Angola", request_id=None) for r in some_requests(5)]
    for batch in (requests[:3], requests[3:]):
        report = editor.edit(batch)
        optimiser = torch.optim.Adam([p for p in wrapped.parameters() if p.requires_grad], lr=0.02)
        for _ in range(4):
            optimiser.zero_grad()
            for request in batch:
                prompt, whole = (tokenizer(text)["input_ids"] for text in (request.text, f"{request.text} {request.target_new}"))
                log_p = wrapped(torch.tensor([whole])).logits[0].log_softmax(-1)
                loss = -sum(log_p[i - 1, whole[i]] for i in range(len(prompt), len(whole))) / (len(whole) - len(prompt))
                (loss / len(batch)).backward()
            optimiser.step()
        for name, module in theirs.items():
            assert torch.allclose(editor.layers[name].down, module.lora_A["default"].weight, atol=1e-6)
            assert torch.allclose(editor.layers[name].up, module.lora_B["default"].weight, atol=1e-6)
        assert report.optimizer_steps == [4] * len(batch)
    ids = ids_of(model, tokenizer)
    assert torch.allclose(model(ids).logits, wrapped(ids).logits, atol=1e-6)
    with editor.disabled(), wrapped.disable_adapter(), torch.no_grad():
        assert torch.equal(model(ids).logits, wrapped(ids).logits)


# -- UltraEdit ------------------------------------------------------------------------------------------------------


def factors(model, tokenizer, requests, blocks):
    """Inputs and gradients ``[h, g]`` of projections at the tokens that give the object, ``(tokens, d_in + d_out)`` each, text by text."""
    found = {n: [] for n in blocks}
    for request in requests:
        prompt, whole = (tokenizer(text)["input_ids"] for text in (request.text, f"{request.text} {request.target_new}"))
        caught = {}
        handles = [
            model.transformer.h[n].mlp.c_proj.register_forward_hook(
                lambda m, args, out, n=n, caught=caught: caught.__setitem__(n, (args[0], out))
            )
            for n in blocks
        ]
        log_p = model(torch.tensor([whole])).logits[0].log_softmax(-1)
        loss = -sum(log_p[i - 1, whole[i]] for i in range(len(prompt), len(whole))) / (len(whole) - len(prompt))
        for n, gradient in zip(blocks, torch.autograd.grad(loss, [caught[n][1] for n in blocks]), strict=True):
            places = slice(len(prompt) - 1, len(whole) - 1)
            found[n].append(torch.cat([caught[n][0][0, places], gradient[0, places]], 1).detach())
        for handle in handles:
            handle.remove()
    return {n: torch.cat(own) for n, own in found.items()}


@pytest.mark.parametrize("name, ridge, warm", [("UltraEdit", 1.0, False), ("StableEdit", 10.0, False), ("StableEdit", 10.0, True)])
def test_ultraedit_is_its_equations(tiny_model, tokenizer, tmp_path, name, ridge, warm):
    """Inputs and gradients normalised over all edits so far, then ridge regression on the inputs as they are (equations 5 to 8), one text
    at a time. StableEdit whitens: by the inverse root of the gradients' covariance, once there are more tokens than it needs; records it
    is warmed up with count as edits do, and are not written."""
    model = small_model(tiny_model).double()
    plain = copy.deepcopy(model)
    requests, blocks, changes = longer(some_requests(18)), (1, 2), {}
    if warm:
        (tmp_path / "warm.json").write_text(json.dumps([request.to_record() for request in requests[12:]]))
        changes = {"warm_up_records": str(tmp_path / "warm.json")}
    editor = make_method(name, model, tokenizer, lr=1e-2, layers=blocks, **changes)
    assert editor.config.ridge == ridge
    reports = []
    start = factors(plain, tokenizer, requests[12:], blocks)
    seen, whitened, fewer = {n: [start[n]] if warm else [] for n in blocks}, [], []
    for batch in (requests[:3], requests[3:12]):
        reports.append(editor.edit(batch))
        for n, rows in factors(plain, tokenizer, batch, blocks).items():
            seen[n].append(rows)
            everything = torch.cat(seen[n])
            normal = (rows - everything.mean(0)) / (everything.std(0) + torch.finfo(torch.float32).eps)
            h, g = normal[:, :48], normal[:, 48:]
            if name == "StableEdit" and len(everything) > 32 + 1:
                others = (everything - everything.mean(0))[:, 48:]
                inverse = scipy.linalg.pinvh((others.T @ others / (len(others) - 32 - 1)).numpy(), rtol=1e-5)
                g = (rows - everything.mean(0))[:, 48:] @ torch.from_numpy(scipy.linalg.sqrtm(inverse).real)
                whitened.append(n)  # a norm follows the blocks: in the direction of ones there are no gradients
            values = -1e-2 * h.norm(dim=1, keepdim=True) ** 2 * g
            raw = rows[:, :48]
            fewer.append(len(raw) <= 48)
            change = torch.linalg.inv(raw.T @ raw + ridge * torch.eye(48)) @ raw.T @ values  # (d_in, d_out), as Conv1D holds it
            with torch.no_grad():
                plain.transformer.h[n].mlp.c_proj.weight += change
        for request, loss in zip(batch, reports[-1].losses, strict=True):  # what is reported is of the edited model
            asked, target = (tokenizer(text)["input_ids"] for text in (request.text, f" {request.target_new}"))
            with torch.no_grad():
                logits = plain(torch.tensor([asked + target])).logits[0, len(asked) - 1 : -1]
            assert loss == pytest.approx(torch.nn.functional.cross_entropy(logits, torch.tensor(target)).item(), rel=1e-3)
    assert fewer == [True, True, False, False]  # tokens than inputs: a smaller system gives the same
    assert whitened == {"UltraEdit": [], "StableEdit": [1, 2, 1, 2] if warm else [1, 2]}[name]
    ids = ids_of(model, tokenizer)
    with torch.no_grad():
        assert torch.allclose(model(ids).logits, plain(ids).logits, atol=1e-6)
    assert (model(ids).logits - small_model(tiny_model).double()(ids).logits).abs().max() > 1e-3


def test_a_warm_up_is_made_once(tiny_model, tokenizer, tmp_path):
    """Before the first edit and no later one, of any step that begins from nothing; then its file is not needed any more."""
    shown = tmp_path / "warm.json"
    shown.write_text(json.dumps([request.to_record() for request in some_requests(6)[4:]]))
    editor = make_method("StableEdit", small_model(tiny_model), tokenizer, lr=1e-2, warm_up_records=str(shown))
    assert editor.method.files(editor.config) == {"warm_up_records": shown}
    first, second = some_requests(2)
    for _ in range(2):
        editor.edit([first])
        once = held(editor)
        tokens = [int(own[0, 0]) for own in editor.method.statistics.values()]
        assert len(set(tokens)) == 1 and tokens[0] > len(tokenizer(f" {first.target_new}")["input_ids"])
        editor.rollback(0)
    shown.rename(tmp_path / "elsewhere.json")
    for needing in (editor.method.ready, lambda: editor.edit([first])):
        with pytest.raises(ConfigError, match="warm_up_records: .*warm.json"):
            needing()
    (tmp_path / "elsewhere.json").rename(shown)
    editor.edit([first])
    assert all(torch.equal(own, once[name]) for name, own in held(editor).items())
    shown.unlink()
    editor.save_pretrained(tmp_path / "edits")
    for own in (editor, Editor.from_pretrained(small_model(tiny_model), tokenizer, tmp_path / "edits")):
        own.method.ready()
        own.edit([second])
        assert all(layer.delta.any() for layer in own.layers.values())


def test_a_warm_up_in_parts(tiny_model, tokenizer, tmp_path, monkeypatch):
    """Comes to the same as at once, and takes ``warm_up_count`` records."""
    (tmp_path / "others.json").write_text(json.dumps([request.to_record() for request in some_requests(8)[3:]]))
    found, settings = [], {"lr": 1e-2, "warm_up_records": str(tmp_path / "others.json")}
    for size in (100, 2):
        monkeypatch.setattr("comeba_ext.methods.ultraedit.WARMED", size)
        editor = make_method("StableEdit", small_model(tiny_model).double(), tokenizer, **settings)
        editor.method.warm_up()
        found.append((editor.method.statistics, editor.method.scatters))
    for one, other in zip(*found, strict=True):
        assert all((one[name] - other[name]).norm() < 1e-9 * one[name].norm() for name in one)
    editor = make_method("StableEdit", small_model(tiny_model), tokenizer, warm_up_count=2, **settings)
    editor.method.warm_up()
    tokens = sum(len(tokenizer(f" {request.target_new}")["input_ids"]) for request in some_requests(8)[3:5])
    assert all(own[0, 0] == tokens for own in editor.method.statistics.values())


def test_ultraedit_of_named_modules(tiny_model, tokenizer):
    modules = {"mlp.gate_proj": [0, 1], "mlp.up_proj": [2]}
    editor = make_method("UltraEdit", small_model(tiny_model, "llama"), tokenizer, modules=modules)
    assert sorted(editor.layers) == [f"model.layers.{n}.{name}" for n, name in enumerate(("mlp.gate_proj", "mlp.gate_proj", "mlp.up_proj"))]
    editor.edit(some_requests(3))
    assert all(layer.delta.any() for layer in editor.layers.values())


def test_folders_of_earlier_versions(tiny_model, tokenizer):
    """What WISE noted before it told merges apart, and UltraEdit's setting that is gone."""
    wise = make_method("WISE", small_model(tiny_model), tokenizer, layers=(1,)).method
    for old, merged in (
        ({"shards": [], "unmerged": 0}, 0),
        ({"shards": [500, 20], "unmerged": 520}, 0),
        ({"shards": [1000], "unmerged": 0}, 1),
        ({"shards": [1000, 500, 3], "unmerged": 503}, 1),
    ):
        assert wise.renewed(old) == {"shards": old["shards"], "merged": merged, "opened": len(old["shards"])}
    assert wise.renewed({"shards": [], "merged": 0, "opened": 0}) == wise.blank()
    config = make_method("UltraEdit", small_model(tiny_model), tokenizer, layers=(1,)).config
    assert type(config).from_dict(config.to_dict() | {"warm_up": 0}) == config
    with pytest.raises(ConfigError, match="warm_up"):
        type(config).from_dict(config.to_dict() | {"warm_up": 3})


# -- GRACE ----------------------------------------------------------------------------------------------------------


def test_grace_places_keys_as_algorithm_1(tiny_model, tokenizer):
    """Far: a new ball of the first radius. Near, another object: two balls that halve the distance. Near, the same: one ball that grows."""
    editor = make_method("GRACE", small_model(tiny_model).double(), tokenizer, radius=1e-3, steps=1)
    method, book = editor.method, editor.method.attachment
    start = torch.randn(48)
    direction = torch.nn.functional.normalize(torch.randn(48), dim=0)
    request = lambda name, target: EditRequest("{} is", name, target, request_id=name)  # noqa: E731
    for radius, distance, target, wanted in (
        (1.0, 5.0, "Rome", ([1.0, 1.0], 2)),  # further than 1 + 1
        (1.0, 1.5, "Oslo", ([0.75 - 1e-5, 0.75], 2)),
        (1.0, 1.5, "Rome", ([1.5], 1)),
        (1.0, 0.5, "Rome", ([1.0], 1)),  # inside already
    ):
        method.notes, book.keys, book.values, book.radii = method.blank(), torch.zeros(0, 48), torch.zeros(0, 32), torch.zeros(0)
        object.__setattr__(editor.config, "radius", radius)
        method._place(request("a", "Rome"), start)
        method._place(request("b", target), start + distance * direction)
        assert book.radii.tolist() == pytest.approx(wanted[0], abs=1e-6) and len(book.keys) == len(book.values) == wanted[1]
        assert method.notes["owners"] == ([["a"], ["b"]] if wanted[1] == 2 else [["a", "b"]])


def test_grace_goes_by_the_radius_that_the_ball_has(tiny_model, tokenizer):
    """Near is within the ball's own radius and a new one's; a ball that grew holds what it grew for; objects are compared whole."""
    editor = make_method("GRACE", small_model(tiny_model), tokenizer, radius=1.0, steps=1)
    method, book = editor.method, editor.method.attachment
    start, way = torch.randn(48), torch.nn.functional.normalize(torch.randn(48), dim=0)
    request = lambda name, target: EditRequest("{} is", name, target, request_id=name)  # noqa: E731
    for own, distance, target, radii in (
        (0.3, 1.4, "Rome", [0.3, 1.0]),  # further than 0.3 + 1
        (0.3, 1.2, "Rome", [1.2]),
        (2.5, 3.2, "Rome", [3.2]),
        (0.3, 1.2, "Romania", [0.6 - 1e-5, 0.6]),
    ):
        method.notes, book.keys, book.values, book.radii = method.blank(), torch.zeros(0, 48), torch.zeros(0, 32), torch.zeros(0)
        method._place(request("a", "Rome"), start)
        book.radii[0] = own
        method._place(request("b", target), start + distance * way)
        assert book.radii.tolist() == pytest.approx(radii, abs=1e-5)
        if len(radii) == 1:
            assert torch.equal(book((start + distance * way)[None, None])[0, 0], book.values[0])  # on the edge


def test_grace_a_value_of_two_batches(tiny_model, tokenizer):
    """It goes on from the first's, for the second's loss alone, and stays until both are taken back."""
    editor = make_method("GRACE", small_model(tiny_model), tokenizer, radius=1e3, steps=3, lr=0.3, early_stop=0.0)
    first, second = (dataclasses.replace(request, target_new="Rome") for request in some_requests(2))
    editor.edit([first])
    value, plain, memory = editor.method.attachment.values[0].double(), untrained_model(tiny_model), {}
    editor.edit([second])
    book = editor.method.attachment
    assert len(book.keys) == 1
    prompt, whole = (tokenizer(text)["input_ids"] for text in (second.text, f"{second.text} Rome"))
    start = value
    inside = lambda x: (x.float() - book.keys[0]).norm(dim=1, keepdim=True) <= book.radii[0]  # noqa: E731
    for _ in range(3):
        value.requires_grad_(True)
        handle = changing(plain, 1, lambda x, out, value=value: torch.where(inside(x), value, out))
        (gradient,) = torch.autograd.grad(nll(plain, prompt, whole), value)
        handle.remove()
        value = adam(value.detach(), gradient, memory, 0.3)
    assert (value - start).norm() > 0.1 and torch.allclose(book.values[0].double(), value, atol=1e-3)
    editor.retract("edit-0")
    assert editor.method.notes["owners"] == [["edit-1"]] and len(editor.method.attachment.keys) == 1
    editor.retract("edit-1")
    assert not len(editor.method.attachment.keys)


def test_grace_replaces_the_output_of_tokens_in_a_ball(tiny_model, tokenizer):
    editor = make_method("GRACE", small_model(tiny_model), tokenizer, radius=1e-2, steps=20, lr=0.5)
    requests = some_requests(3)
    report = editor.edit(requests)
    book = editor.method.attachment
    plain = small_model(tiny_model)
    for request in requests:
        x, out = layer_io(plain, tokenizer, request.text)
        _, changed = layer_io(SimpleModel(editor.model), tokenizer, request.text)
        distance = torch.cdist(x, book.keys)
        for token in range(len(x)):
            near = distance[token].argmin()
            wanted = book.values[near] if distance[token, near] <= book.radii[near] else out[token]
            assert torch.allclose(changed[token], wanted, atol=1e-5)
        assert (distance[-1].min() <= 1e-5) and (distance[:-1].min(1).values > 1e-2).all()  # the prompt's last token and no other
    assert report.losses[0] < 5 and max(report.optimizer_steps) == 20


class SimpleModel:
    """A hooked GPT-2 as :func:`layer_io` wants one: its projection is the attachment around it."""

    def __init__(self, model):
        self.transformer = model.transformer
        self.model = model

    def __call__(self, *args):
        return self.model(*args)


def test_grace_values_are_adam_on_the_request_alone(tiny_model, tokenizer):
    """A batch's values are the same as each alone, for requests whose keys are far apart."""
    requests = some_requests(3)
    together = make_method("GRACE", small_model(tiny_model).double(), tokenizer, radius=1e-6, steps=7, lr=0.3)
    found = together.edit(requests)
    for n, request in enumerate(requests):
        alone = make_method(
            "GRACE", small_model(tiny_model).double(), tokenizer, radius=1e-6, steps=7, lr=0.3, seed=n
        )  # as its place in the batch
        report = alone.edit([request])
        assert report.losses[0] == pytest.approx(found.losses[n], rel=1e-4)
        assert torch.allclose(alone.method.attachment.values[0], together.method.attachment.values[n], atol=1e-4)


@pytest.mark.parametrize("warm", [False, True])
def test_grace_values_are_a_literal_adam(tiny_model, tokenizer, warm):
    """From a random start, or the layer's own output, until the loss is low: each value at its prompt's last token."""
    requests = longer(some_requests(3))
    settings = {"radius": 1e-6, "steps": 15, "lr": 0.3, "early_stop": 6.2, "warm": warm, "seed": 5}
    editor = make_method("GRACE", small_model(tiny_model).double(), tokenizer, **settings)
    report, plain, done = editor.edit(requests), untrained_model(tiny_model), []
    for number, request in enumerate(requests):
        prompt, whole = (tokenizer(text)["input_ids"] for text in (request.text, f"{request.text} {request.target_new}"))
        value = torch.rand(32, generator=torch.Generator().manual_seed(5 + number)).double()
        if warm:
            value = layer_io(plain, tokenizer, request.text)[1][-1]
        memory, last = {}, len(prompt) - 1
        for step in range(16):
            value = value.requires_grad_(True)
            handle = changing(plain, 1, lambda x, out, value=value, last=last: torch.cat([out[:last], value[None], out[last + 1 :]]))
            loss = nll(plain, prompt, whole)
            handle.remove()
            if step == 15 or loss < 6.2:
                break
            (gradient,) = torch.autograd.grad(loss, value)
            value = adam(value.detach(), gradient, memory, 0.3)
        done.append(step)
        assert report.losses[number] == pytest.approx(loss.item(), rel=1e-4)
        assert torch.allclose(editor.method.attachment.values[number].double(), value.detach(), atol=1e-4)
    assert report.optimizer_steps == done and len(set(done)) > 1


# -- WISE -----------------------------------------------------------------------------------------------------------


def test_wise_is_its_training_loop(tiny_model, tokenizer):
    """One request after another: NLL under every prefix and the margin loss (equation 6), a masked gradient, decay, and the norm's bound,
    in float64; then the threshold, from the mean over prefixes."""
    bounds = {"low": 0.1, "high": 0.6, "margin_loss": 0.02, "threshold_share": 0.88}
    sgd = {"lr": 0.2, "weight_decay": 0.1, "norm_constraint": 0.02, "mask_ratio": 0.3, "steps": 7}
    editor = make_method("WISE", small_model(tiny_model), tokenizer, save_every=2, **bounds, **sgd)
    requests = [dataclasses.replace(r, locality_prompts=(("Water is", "wet and cold"),)) for r in longer(some_requests(3))]
    report = editor.edit(requests)
    side, plain = editor.method.attachment, untrained_model(tiny_model)
    shards, limits, losses, active, clamped = [], [], [], [set(), set(), set()], 0
    for number, request in enumerate(requests):
        if number % 2 == 0:
            delta, limit = torch.zeros(32, 48).double(), float("inf")
            mask = torch.rand(32, 48, generator=torch.Generator().manual_seed(number // 2)) < 0.3
        delta = delta.requires_grad_(True)
        texts = [(prefix + request.text, f"{prefix}{request.text} {request.target_new}") for prefix in editor.prefixes]
        pairs = [[tokenizer(text)["input_ids"] for text in pair] for pair in texts]
        inputs = [layer_io(plain, tokenizer, whole)[0][:-1] for _, whole in texts]  # the object's last token is not fed
        other = layer_io(plain, tokenizer, "Water is wet and cold")[0][:-1]
        activation = lambda x, delta: sum((delta @ token).norm() for token in x) / len(x)  # noqa: E731
        for step in range(8):
            handle = changing(plain, 1, lambda x, out, delta=delta: out + x @ delta.T)
            found = [nll(plain, *pair) for pair in pairs]
            handle.remove()
            if step == 7:
                break
            inside, outside = [activation(x, delta) for x in inputs], activation(other, delta)
            terms = ([outside - d + 0.02 for d in inside], [outside - 0.1], [0.6 - d for d in inside])
            total = sum(found) / len(found)
            for term, when in zip(terms, active, strict=True):
                positive = [t for t in term if t > 0]
                when.add(len(positive) / len(term))
                total = total + (sum(positive) / len(positive) if positive else 0)
            (gradient,) = torch.autograd.grad(total, delta)
            with torch.no_grad():
                delta = delta - 0.2 * (gradient.nan_to_num() * mask + 0.1 * delta)  # at zero a norm has no gradient
                clamped += int((delta.abs() > 0.02).sum())
                delta = delta.clamp(-0.02, 0.02).requires_grad_(True)
        delta = delta.detach()
        limit = min(limit, 0.88 * sum(activation(x, delta) for x in inputs).item() / len(inputs))
        losses.append(sum(found).item() / len(found))
        shards[number // 2 :], limits[number // 2 :] = [delta], [limit]
    assert clamped and all(len(when) > 1 for when in active)  # every term, and the bound, are met and are not
    assert report.losses == pytest.approx(losses, rel=1e-4) and report.optimizer_steps == [7] * 3
    for found, wanted in zip(side.delta, shards, strict=True):
        assert (found - wanted).abs().max() < 1e-3 * wanted.abs().max()
    assert side.thresholds.tolist() == pytest.approx(limits, rel=1e-4)


def test_wise_routes_by_activation(tiny_model, tokenizer):
    """A sequence takes the shard whose change of the output, mean over tokens, is the highest of those above their own threshold."""
    editor = make_method("WISE", small_model(tiny_model), tokenizer, save_every=2, merge_every=100)
    requests = requests_of(4)
    editor.edit(requests)
    side = editor.method.attachment
    assert len(side.delta) == 2 and editor.method.notes == {"shards": [2, 2], "merged": 0, "opened": 2}
    plain = small_model(tiny_model)
    x = [layer_io(plain, tokenizer, request.text)[0] for request in requests]
    ways = set()
    for low in (1.0, 1000.0):  # of the first shard's threshold
        side.thresholds = side.thresholds * torch.tensor([low, 1.0])
        for n, rows in enumerate(x):
            far = [(rows @ d.T).norm(dim=-1).mean() for d in side.delta]
            above = [i for i in range(2) if far[i] > side.thresholds[i]]
            wanted = max(above, key=lambda i: far[i]) if above else -1
            ways.add(wanted)
            assert side.route(rows[None], None).tolist() == [wanted]
            padded = torch.cat([rows, torch.full((3, rows.shape[1]), 100.0)])  # padding counts for nothing
            assert side.route(padded[None], torch.arange(len(padded))[None] < len(rows)).tolist() == [wanted]
            assert side.route(0 * rows[None], None).tolist() == [-1], n
    assert ways >= {0, 1}


def test_wise_batches_of_one_shard(tiny_model, tokenizer):
    """They share its mask, and its threshold is the lowest of all, the first's here; of the locality prompts the first is trained on."""
    requests = requests_of(3)[::-1]
    editor = make_method("WISE", small_model(tiny_model), tokenizer, save_every=10, mask_ratio=0.2, weight_decay=0.0)
    mask = torch.rand(32, 48, generator=torch.Generator().manual_seed(0)) < 0.2
    plain, limits = small_model(tiny_model), []
    for request in requests:
        editor.edit([request])
        side = editor.method.attachment
        texts = [f"{prefix}{request.text} {request.target_new}" for prefix in editor.prefixes]
        far = [(layer_io(plain, tokenizer, text)[0][:-1] @ side.delta[0].T).norm(dim=1).mean().item() for text in texts]
        limits.append(0.5 * sum(far) / len(far))
        assert side.thresholds.tolist() == pytest.approx([min(limits)], rel=1e-4)
        assert not side.delta[0][~mask].any()
    assert min(limits) == limits[0] < 0.95 * limits[-1]
    more = dataclasses.replace(requests[0], locality_prompts=(*requests[0].locality_prompts, ("The sea is", "blue")))
    found = []
    for request in (requests[0], more):
        editor = make_method("WISE", small_model(tiny_model), tokenizer)
        editor.edit([request])
        found.append(editor.method.attachment.delta)
    assert torch.equal(*found)


@pytest.mark.parametrize("stop, steps", [(100.0, 5), (1e4, 0)])
def test_wise_stops_by_both_losses(tiny_model, tokenizer, stop, steps):
    editor = make_method("WISE", small_model(tiny_model), tokenizer, high=1000.0, early_stop=stop)
    assert editor.edit(requests_of(1)).optimizer_steps == [steps]


def test_wise_merges_before_a_shard_is_full(tiny_model, tokenizer):
    editor = make_method("WISE", small_model(tiny_model), tokenizer, save_every=4, merge_every=2)
    requests = requests_of(3)
    editor.edit(requests[:2])
    before = editor.method.attachment.delta.clone()
    editor.edit(requests[2:])
    assert editor.method.notes == {"shards": [2, 1], "merged": 1, "opened": 2}
    assert torch.equal(editor.method.attachment.delta[0], before[0])  # what is merged takes no more


def test_padding_decides_no_way():
    values, mask = torch.tensor([[1.0, 3.0, 100.0], [2.0, 100.0, 100.0]]), torch.tensor([[1, 1, 0], [1, 0, 0]]).bool()
    assert mean_over_tokens(values, mask).tolist() == [2.0, 2.0]
    assert mean_over_tokens(values[..., None], mask).tolist() == [[2.0], [2.0]]
    wise, padded = WiseMemory(torch.nn.Linear(4, 3)), torch.tensor([[True, True, False]])
    wise.delta, wise.thresholds = torch.eye(3, 4)[None], torch.tensor([2.5])
    x = torch.tensor([[[2.0, 0, 0, 0], [0, 2.0, 0, 0], [9.0, 0, 0, 0]]])
    assert wise.route(x, padded).tolist() == [-1] and wise.route(x, None).tolist() == [0]
    memoir, x = MemoirMemory(torch.nn.Linear(8, 3), 0.25, 0.6, 0), torch.zeros(1, 3, 8)
    x[0, :2, :2], x[0, 2, 5:7] = 1, 50
    memoir.masks = memoir.mask_of(x[:, :2].mean(1))
    assert memoir.route(x, padded).tolist() == [0] and memoir.route(x, None).tolist() == [-1]


def test_wise_takes_the_highest_activation_not_the_highest_share():
    """Of those that exceed their own threshold the largest, though another exceeds its own by more; one below it does not count."""
    side = WiseMemory(torch.nn.Linear(4, 3))
    side.delta = torch.eye(3, 4)[None] * torch.tensor([1.0, 2.0, 3.0])[:, None, None]
    x = torch.tensor([[[1.0, 0.0, 0.0, 9.0]]])  # activations 1, 2 and 3
    for thresholds, wanted in (([0.1, 1.9, 3.5], 1), ([0.1, 1.9, 2.9], 2), ([0.1, 2.1, 3.5], 0), ([1.1, 2.1, 3.5], -1)):
        side.thresholds = torch.tensor(thresholds)
        assert side.route(x, None).tolist() == [wanted]


def test_wise_shards_have_their_own_entries_and_stay_near_the_weight(tiny_model, tokenizer):
    editor = make_method("WISE", small_model(tiny_model), tokenizer, save_every=2, norm_constraint=0.01, mask_ratio=0.2, lr=5.0)
    editor.edit(requests_of(4))
    side = editor.method.attachment
    changed = side.delta != 0
    assert 0.1 < changed[0].float().mean() <= 0.25 and 0.1 < changed[1].float().mean() <= 0.25
    assert (changed[0] & changed[1]).float().mean() < 0.08  # 0.2², were they independent
    assert side.delta.abs().max() == pytest.approx(0.01)


def test_wise_loss_is_equation_6(tiny_model, tokenizer):
    editor = make_method("WISE", small_model(tiny_model), tokenizer, low=0.5, high=2.0, margin_loss=1.0)
    method = editor.method
    method._open()
    side = method.attachment
    side.delta = torch.randn_like(side.delta) * 0.1
    inputs, other = [torch.randn(4, 48) * s for s in (0.1, 1.0, 3.0)], torch.randn(3, 48)
    d = [float((x @ side.delta[0].T).norm(dim=1).mean()) for x in inputs]
    e = float((other @ side.delta[0].T).norm(dim=1).mean())
    mean = lambda values: sum(v for v in values if v > 0) / max(1, sum(v > 0 for v in values))  # noqa: E731
    wanted = mean([e - a + 1.0 for a in d]) + mean([e - 0.5]) + mean([2.0 - a for a in d])
    assert method._routing_loss(inputs, other).item() == pytest.approx(wanted, rel=1e-4)


def test_wise_merges_its_shards(tiny_model, tokenizer):
    """Those since the last merge, which stays as it is; TIES by a literal loop, which is not their mean."""
    editor = make_method("WISE", small_model(tiny_model), tokenizer, save_every=2, merge_every=4, density=0.4)
    method, side, requests = editor.method, editor.method.attachment, requests_of(9)
    editor.edit(requests[:4])
    assert len(side.delta) == 1 and method.notes == {"shards": [4], "merged": 1, "opened": 2}
    earlier, limit = side.delta[0].clone(), side.thresholds[0].item()
    editor.edit(requests[4:7])
    before, limits = side.delta.clone(), side.thresholds.tolist()
    assert len(before) == 3 and method.notes == {"shards": [4, 2, 1], "merged": 1, "opened": 4}
    masks = [own != 0 for own in before]
    assert not torch.equal(masks[1], masks[0]) and not torch.equal(masks[1], masks[2])  # entries of their own after a merge, too
    method._merge()
    shards = before[1:].double().flatten(1).tolist()
    count, wanted = round(0.4 * len(shards[0])), []
    largest = [set(sorted(range(len(own)), key=lambda i, own=own: -abs(own[i]))[:count]) for own in shards]
    for i in range(len(shards[0])):
        own = [shard[i] for shard, kept in zip(shards, largest, strict=True) if i in kept]
        agree = [value for value in own if value * sum(own) > 0]
        wanted.append(sum(agree) / len(agree) if agree else 0.0)
    wanted = torch.tensor(wanted).reshape(before[0].shape)
    assert torch.equal(side.delta[0], earlier) and torch.allclose(side.delta[1], wanted, atol=1e-7)
    assert (before[1:].mean(0) - wanted).norm() > 0.1 * wanted.norm()
    assert side.thresholds.tolist() == [limit, min(limits[1:])] and method.notes == {"shards": [4, 3], "merged": 2, "opened": 4}
    editor.edit(requests[7:])
    assert len(side.delta) == 3 and torch.equal(side.delta[0], earlier)  # a merged one takes no more edits
    merged = ties(torch.tensor([[4.0, -3.0, 1.0, 0.5], [-2.0, -5.0, 0.1, 0.0]]), 0.5)
    assert merged.tolist() == [4.0, -4.0, 0.0, 0.0]  # by hand: the two largest of each, the sign with more weight, the mean of those


# -- MEMOIR ---------------------------------------------------------------------------------------------------------


def test_memoir_masks_and_overlap(tiny_model, tokenizer):
    editor = make_method("MEMOIR", small_model(tiny_model), tokenizer, active=0.25, overlap=0.6)
    requests = some_requests(3)
    editor.edit(requests)
    side, plain = editor.method.attachment, small_model(tiny_model)
    masks = []
    for request in requests:
        x = layer_io(plain, tokenizer, request.text)[0]
        size = (x.mean(0) - side.centre).abs()
        largest = sorted(range(48), key=lambda n: -size[n].item())[:12]
        masks.append({int(side.order[n]) for n in largest})  # through a fixed random order
    for mask, stored in zip(masks, side.masks, strict=True):
        assert mask == set(stored.nonzero()[:, 0].tolist())
    for text in [r.text for r in requests] + ["Water is a thing that", "Perhaps " + requests[0].text]:
        x = layer_io(plain, tokenizer, text)[0]
        own = {int(side.order[n]) for n in sorted(range(48), key=lambda n: -(x.mean(0) - side.centre).abs()[n].item())[:12]}
        shares = [len(own & mask) / 12 for mask in masks]
        wanted = max(range(3), key=lambda n: shares[n]) if max(shares) >= 0.6 else -1
        assert side.route(x[None], None).tolist() == [wanted]
        if wanted >= 0:  # the memory sees the inputs through the stored mask
            seen = torch.zeros(48)
            seen[list(masks[wanted])] = 1
            _, base = layer_io(plain, tokenizer, text)
            _, out = layer_io(SimpleModel(editor.model), tokenizer, text)
            assert torch.allclose(out, base + (x * seen) @ side.delta[0].T, atol=1e-5)


def test_memoirs_order_is_random_and_a_share_is_enough():
    one, again, other = (MemoirMemory(torch.nn.Linear(64, 3), 0.5, 0.5, seed) for seed in (0, 0, 1))
    assert sorted(one.order.tolist()) == list(range(64)) != one.order.tolist()
    assert torch.equal(one.order, again.order) and not torch.equal(one.order, other.order)
    side = MemoirMemory(torch.nn.Linear(8, 3), 0.5, 0.5, 0)
    side.masks = side.mask_of(torch.tensor([[9.0, 9, 9, 9, 0, 0, 0, 0]]))
    for features, way in (([9.0, 9, 0, 0, 9, 9, 0, 0], 0), ([9.0, 0, 0, 0, 9, 9, 9, 0], -1)):  # two and one of four
        assert side.route(torch.tensor([[features]]), None).tolist() == [way]


def test_memoirs_centre_is_the_mean_of_irrelevant_texts(tiny_model, tokenizer):
    editor = make_method("MEMOIR", small_model(tiny_model), tokenizer, irrelevant=4, seed=3)
    editor.edit(some_requests(1))
    plain = small_model(tiny_model)
    texts = sample_prefixes(plain, tokenizer, 4, editor.config.prefix_length, 4)[1:]
    assert len(set(texts)) == 4
    wanted = sum(layer_io(plain, tokenizer, text)[0].mean(0) for text in texts) / 4
    assert wanted.norm() > 0.1 and torch.allclose(editor.method.attachment.centre, wanted, atol=1e-5)


def test_memoir_touches_its_own_columns(tiny_model, tokenizer):
    editor = make_method("MEMOIR", small_model(tiny_model), tokenizer, active=0.25, weight_decay=0.0)
    editor.edit(some_requests(1))
    side = editor.method.attachment
    assert side.delta[0][:, side.masks[0]].any() and not side.delta[0][:, ~side.masks[0]].any()


def test_memoir_is_its_training_loop(tiny_model, tokenizer):
    """One request after another on one memory, each through its own mask: NLL under every prefix, the gradient's norm bounded, decay."""
    sgd = {"lr": 0.5, "weight_decay": 0.1, "clip": 1.6, "steps": 7, "early_stop": 5.0}
    editor = make_method("MEMOIR", small_model(tiny_model), tokenizer, active=0.5, **sgd)
    requests = longer(some_requests(4))
    report, side, plain = editor.edit(requests), editor.method.attachment, untrained_model(tiny_model)
    memory, losses, steps, norms = torch.zeros(32, 48).double(), [], [], []
    for request in requests:
        size = (layer_io(plain, tokenizer, request.text)[0].mean(0) - side.centre.double()).abs().tolist()
        mask = torch.zeros(48).double()
        mask[[int(side.order[n]) for n in sorted(range(48), key=lambda n, size=size: -size[n])[:24]]] = 1
        texts = [(prefix + request.text, f"{prefix}{request.text} {request.target_new}") for prefix in editor.prefixes]
        for step in range(8):
            memory = memory.detach().requires_grad_(True)
            handle = changing(plain, 1, lambda x, out, memory=memory, mask=mask: out + (x * mask) @ memory.T)
            loss = sum(nll(plain, *(tokenizer(text)["input_ids"] for text in pair)) for pair in texts) / len(texts)
            handle.remove()
            if step == 7 or loss < 5.0:
                break
            (gradient,) = torch.autograd.grad(loss, memory)
            norms.append(gradient.norm().item())
            memory = memory - 0.5 * (gradient * min(1.0, 1.6 / norms[-1]) + 0.1 * memory)
        losses.append(loss.item())
        steps.append(step)
    assert min(norms) < 1.6 < max(norms) and len(set(steps)) > 1
    assert report.losses == pytest.approx(losses, rel=1e-4) and report.optimizer_steps == steps
    assert (side.delta[0] - memory).abs().max() < 1e-3 * memory.abs().max()


def test_memoir_forgets_the_way_of_a_retracted_edit(tiny_model, tokenizer):
    editor = make_method("MEMOIR", small_model(tiny_model), tokenizer, overlap=1.0)
    first, second = some_requests(2)
    editor.edit([first, second])
    editor.retract("edit-0")
    ids = ids_of(editor.model, tokenizer, first.text)
    with torch.no_grad():
        assert torch.equal(editor.model(ids).logits, small_model(tiny_model)(ids).logits)


@pytest.mark.parametrize("name", ["WISE", "MEMOIR", "GRACE"])
def test_a_cached_generation_goes_the_way_of_its_prompt(tiny_model, tokenizer, name):
    editor = make_method(name, small_model(tiny_model), tokenizer)
    requests = requests_of(3)
    editor.edit(requests)
    model = editor.model
    ids = ids_of(model, tokenizer, requests[0].text)
    out = model.generate(ids, max_new_tokens=4, do_sample=False, pad_token_id=0, eos_token_id=None)
    with torch.no_grad():
        cached = model(ids, use_cache=True)
        step = model(out[:, ids.shape[1] : ids.shape[1] + 1], past_key_values=cached.past_key_values, use_cache=True)
    side = next(iter(editor.layers.values()))
    if name == "GRACE":
        assert torch.equal(out[0, ids.shape[1] + 1], step.logits[0, -1].argmax())
    else:
        way = side.route(layer_io(small_model(tiny_model), tokenizer, requests[0].text)[0][None], None)
        assert way.tolist() != [-1] and cached.past_key_values.comeba_statistics[side.name].tolist() == way.tolist()


def test_autocast_does_not_change_the_way():
    """Under autocast products are of half precision, in which neighbours are the same; where a token or a sequence goes is decided
    without, as a double loop decides it."""
    torch.manual_seed(0)
    autocast = torch.autocast("cpu", torch.bfloat16)
    book = Codebook(torch.nn.Linear(256, 8))
    book.keys = 2 * torch.randn(256) + 0.15 * torch.randn(20, 256)
    book.values, book.radii = torch.arange(20.0)[:, None].expand(20, 8), torch.full((20,), 0.1)
    with autocast:
        assert torch.equal(book(book.keys)[:, 0].float(), torch.arange(20.0))

    wise = WiseMemory(torch.nn.Linear(64, 8))
    wise.delta = torch.randn(1, 8, 64)
    for x in torch.randn(20, 5, 64):
        activation = sum((wise.delta[0].double() @ token).norm() for token in x.double()) / 5
        for share, taken in ((0.9999, True), (1.0001, False)):
            wise.thresholds = (share * activation).float()[None]
            with autocast:
                change = wise(x[None]) - wise.base_layer(x[None])
            assert torch.allclose(change[0].float(), taken * (x @ wise.delta[0].mT), atol=0.3)

    side = MemoirMemory(torch.nn.Linear(1024, 8), 0.5, 400.5 / 512, 0)
    x = torch.randn(1, 3, 1024)
    (own,) = side.mask_of(x.mean(1))
    inside, outside = own.nonzero()[:, 0], (~own).nonzero()[:, 0]
    side.masks = own[None].repeat(2, 1)
    for mask, gone in zip(side.masks, (112, 111), strict=True):  # 400 and 401 of 512 in common
        mask[inside[:gone]], mask[outside[:gone]] = False, True
    side.delta = torch.randn(1, 8, 1024) / 32
    with autocast:
        change = side(x) - side.base_layer(x)
    assert torch.allclose(change.float(), (x * side.masks[1]) @ side.delta[0].mT, atol=0.1)


@pytest.mark.parametrize("name", ["WISE", "MEMOIR", "GRACE", "MELO", "SERAC", "ICE"])
def test_assisted_decoding(tiny_model, tokenizer, name):
    """The same answer; refused where a draft may have had a part in what cannot be taken back."""
    editor = make_method(name, small_model(tiny_model), tokenizer)
    requests = requests_of(2)
    editor.edit(requests)
    ids = ids_of(editor.model, tokenizer, f"{requests[0].text} French. {requests[0].text}")
    generate = functools.partial(editor.model.generate, ids, max_new_tokens=6, do_sample=False, pad_token_id=0, eos_token_id=None)
    if name in ("WISE", "MEMOIR"):
        with pytest.raises(ComebaError, match="where a side memory .* sends a sequence.*assisted decoding"):
            generate(prompt_lookup_num_tokens=3)
    else:
        assert torch.equal(generate(prompt_lookup_num_tokens=3), generate())


# -- MELO and KN ------------------------------------------------------------------------------------------------------


def test_melo_clusters(tiny_model, tokenizer):
    """Far: a cluster of its own. The same object: it joins, the centre is the mean. Another: the distance is halved, and what is
    outside then is forgotten."""
    editor = make_method("MELO", small_model(tiny_model), tokenizer, radius=1.0)
    method, router = editor.method, next(iter(editor.layers.values()))
    request = lambda name, target: EditRequest("{} is", name, target, request_id=name)  # noqa: E731
    start, way = torch.zeros(32), torch.nn.functional.normalize(torch.randn(32), dim=0)
    method._place(router, start, request("a", "Rome"), 0)
    method._place(router, start + 5 * way, request("b", "Rome"), 1)  # further than 1 + 1
    assert router.radii.tolist() == [1.0, 1.0] and router.cluster.tolist() == [0, 1]
    method._place(router, start + 1.6 * way, request("c", "Rome"), 2)
    assert router.cluster.tolist() == [0, 1, 0] and torch.allclose(router.centres[0], 0.8 * way, atol=1e-6)
    assert router.radii.tolist() == pytest.approx([1.0, 1.0])  # 0.8 is less than the first radius
    method._place(router, start + 1.8 * way, request("d", "Oslo"), 3)  # 1 from the centre: half of it for either
    # a and c lie 0.8 from their centre, outside of that: forgotten, and their cluster with them
    assert router.radii.tolist() == pytest.approx([1.0, 0.5 + 1e-5]) and router.cluster.tolist() == [0, 1]
    assert method.notes == {"labels": ["Rome", "Oslo"], "owners": ["b", "d"]} and router.block.tolist() == [1, 3]
    method._place(router, start + 2.9 * way, request("e", "Rome"), 4)  # 1.1 from d, which keeps its point
    assert router.radii.tolist() == pytest.approx([1.0, 0.55 - 1e-5, 0.55 + 1e-5]) and method.notes["owners"] == ["b", "d", "e"]
    # A token goes to the block of the nearest point of the cluster it lies in.
    tokens = torch.stack([start + 1.7 * way, start + 4.5 * way, start + 0.8 * way, start - 9 * way])
    assert router.way(tokens[None]).tolist() == [[3, 1, -1, -1]]


def test_melos_radius_grows(tiny_model, tokenizer):
    """To its furthest point; a new point is near within that and the first radius."""
    editor = make_method("MELO", small_model(tiny_model), tokenizer, radius=1.0)
    method, router = editor.method, next(iter(editor.layers.values()))
    way = torch.nn.functional.normalize(torch.randn(32), dim=0)
    place = lambda at, target, n: method._place(router, at * way, EditRequest("{} is", str(n), target), n)  # noqa: E731
    for n, at in enumerate((0.0, 1.9, 2.85)):
        place(at, "Rome", n)
    centre = (1.9 + 2.85) / 3
    assert len(router.radii) == 1 and router.radii.item() == pytest.approx(centre, rel=1e-5)
    place(centre + 2.4, "Rome", 3)  # within 1 + 1.58, beyond 2
    assert len(router.radii) == 1
    place(-1.0, "Romania", 4)
    assert len(router.radii) == 2


def test_melos_point_is_of_the_cluster():
    router = Router(torch.nn.Linear(1, 1))
    router.centres, router.radii = torch.tensor([[0.0], [1.0]]), torch.tensor([1.0, 1.0])
    router.points, router.cluster, router.block = torch.tensor([[-0.9], [0.9], [0.5], [1.5]]), torch.tensor([0, 0, 1, 1]), torch.arange(4)
    assert router.way(torch.tensor([[0.45], [0.55]])).tolist() == [1, 2]  # of the nearer centre, though a point of the other is nearer


def test_melo_stops(tiny_model, tokenizer):
    editor = make_method("MELO", small_model(tiny_model), tokenizer, early_stop=1e3)
    assert editor.edit(some_requests(3)).optimizer_steps == [0] * 3


def test_melo_adds_its_block_to_the_tokens_it_is_for(tiny_model, tokenizer):
    editor = make_method("MELO", small_model(tiny_model), tokenizer, radius=1e-3, edits_per_block=1, lr=0.05, steps=10)
    requests = some_requests(2)
    report = editor.edit(requests)
    router, lora = editor.layers.values()
    assert lora.down.shape == (2, 2, 48) and lora.up.shape == (2, 32, 2) and min(report.optimizer_steps) > 0
    plain = small_model(tiny_model)
    for n, request in enumerate(requests):
        x, out = layer_io(plain, tokenizer, request.text, 2)
        _, changed = layer_io(SimpleModel(editor.model), tokenizer, request.text, 2)
        assert torch.allclose(changed[:-1], out[:-1], atol=1e-5)  # no key but the last token's
        assert torch.allclose(changed[-1], out[-1] + 2.0 * lora.up[n] @ (lora.down[n] @ x[-1]), atol=1e-4)  # scale √4
        assert (changed[-1] - out[-1]).abs().max() > 1e-2
    assert router.way(layer_io(plain, tokenizer, requests[1].text, 1)[1])[-1] == 1


def test_melos_blocks_are_a_literal_adam(tiny_model, tokenizer):
    """A block's requests together, its rate halved every 20 steps, from a random A and a zero B; the next block from its own start."""
    editor = make_method("MELO", small_model(tiny_model), tokenizer, radius=1e-3, lr=0.02, steps=25, early_stop=0.0, seed=5)
    requests = longer(some_requests(3))
    report, (_, lora), plain = editor.edit(requests), editor.layers.values(), untrained_model(tiny_model)
    for number, part in enumerate((requests[:2], requests[2:])):
        pairs = [[tokenizer(text)["input_ids"] for text in (r.text, f"{r.text} {r.target_new}")] for r in part]
        down = torch.randn(2, 48, generator=torch.Generator().manual_seed(5 + number)).double() / 48**0.5
        up, memories = torch.zeros(32, 2).double(), ({}, {})
        for step in range(26):
            factors = [own.detach().requires_grad_(True) for own in (down, up)]
            losses = []
            for prompt, whole in pairs:

                def added(x, out, prompt=prompt, factors=factors):
                    change, last = torch.zeros_like(out), len(prompt) - 1
                    change[last] = 2.0 * factors[1] @ (factors[0] @ x[last])  # scale √4; no token but the prompt's last one
                    return out + change

                handle = changing(plain, 2, added)
                losses.append(nll(plain, prompt, whole))
                handle.remove()
            if step == 25:
                break
            gradients, rate = torch.autograd.grad(sum(losses) / len(losses), factors), 0.02 if step < 20 else 0.01
            down, up = (adam(own.detach(), g, m, rate) for own, g, m in zip(factors, gradients, memories, strict=True))
        places = slice(2 * number, 2 * number + len(part))
        assert report.losses[places] == pytest.approx([loss.item() for loss in losses], rel=1e-3)
        for found, wanted in ((lora.down[number], down), (lora.up[number], up)):
            assert (found - wanted).abs().max() < 2e-3 * wanted.abs().max()


def test_melos_way_is_a_tokens_own():
    """The same beside any number of tokens, points and clusters, where a radius is smaller than a product's rounding; as a double loop."""
    torch.manual_seed(0)
    router = Router(torch.nn.Linear(64, 64))
    start = torch.nn.functional.normalize(torch.randn(64), dim=0) * 300
    router.centres = start + torch.nn.functional.normalize(torch.randn(40, 64), dim=1) * 0.05
    router.points = torch.cat([router.centres, router.centres + 0.01 * torch.randn(40, 64)])
    router.radii, router.cluster, router.block = torch.full((40,), 0.02), torch.arange(40).repeat(2), torch.arange(80)
    tokens = torch.cat([router.points, torch.randn(20, 64)])
    wanted = []
    for token in tokens.double():
        near = (router.centres.double() - token).norm(dim=1).argmin()
        points = (router.points.double() - token).norm(dim=1).masked_fill(router.cluster != near, torch.inf)
        wanted.append(points.argmin().item() if (router.centres[near].double() - token).norm() <= router.radii[near] else -1)
    assert wanted[:40] == list(range(40)) and wanted[80:] == [-1] * 20
    assert router.way(tokens).tolist() == wanted
    assert [router.way(token[None]).item() for token in tokens] == wanted


def test_melos_layers_may_be_on_another_device_than_its_router():
    class Elsewhere:  # all that can be done with it is to bring it here
        def reshape(self, *shape):
            return self

        def to(self, device):
            return torch.tensor([-1, 0])

    layer = LoraBlocks(torch.nn.Linear(4, 3), 2, 1.0)
    layer.down, layer.up = torch.randn(1, 2, 4), torch.randn(1, 3, 2)
    layer.context = SimpleNamespace(here=SimpleNamespace(told={WAY: Elsewhere()}, shape=(1, 2), off=0))
    x = torch.randn(1, 2, 4)
    change = layer(x) - layer.base_layer(x)
    assert not change[0, 0].any() and torch.allclose(change[0, 1], layer.up[0] @ layer.down[0] @ x[0, 1], atol=1e-5)


def test_kn_attributions_add_up(tiny_model, tokenizer):
    """Integrated gradients are complete: over a layer they sum to what its activations change in the probability."""
    model = small_model(tiny_model).double()
    editor = make_method("KN", model, tokenizer, steps=400)
    request, plain = some_requests(1)[0], small_model(tiny_model).double()
    token = tokenizer(" " + request.target_new)["input_ids"][0]
    ids = torch.tensor([tokenizer(request.text)["input_ids"]])
    for block, name in zip((1, 2), editor.layers, strict=True):
        found = editor.method.attributions(request.text, token)[name]
        chances = []
        for share in (1.0, 0.0):

            def scale(module, args, share=share):
                x = args[0].clone()
                x[:, -1] *= share
                return (x,)

            handle = plain.transformer.h[block].mlp.c_proj.register_forward_pre_hook(scale)
            with torch.no_grad():
                chances.append(plain(ids).logits[0, -1].softmax(-1)[token].item())
            handle.remove()
        assert abs(chances[0] - chances[1]) > 1e-6
        assert found.sum().item() == pytest.approx(chances[0] - chances[1], rel=0.05, abs=1e-7)
    # Of both layers in one pass, as of each in its own.
    apart = make_method("KN", small_model(tiny_model).double(), tokenizer, steps=400, max_tokens=1)
    both, each = (own.method.attributions(request.text, token) for own in (editor, apart))
    assert all(torch.allclose(both[name], each[name], rtol=1e-10, atol=1e-14) for name in both)


def test_kn_attributions_are_the_papers_sum(tiny_model, tokenizer):
    """Equation 2 with its right ends: ``w/m · Σ ∂P(k/m · w)/∂w`` over k = 1 … m."""
    editor = make_method("KN", small_model(tiny_model).double(), tokenizer, steps=2)
    request, plain = some_requests(1)[0], untrained_model(tiny_model)
    token = tokenizer(" " + request.target_new)["input_ids"][0]
    ids = torch.tensor([tokenizer(request.text)["input_ids"]])
    for block, name in zip((1, 2), editor.layers, strict=True):
        own, total = layer_io(plain, tokenizer, request.text, block)[0][-1], 0
        for share in (0.5, 1.0):
            put = (share * own).requires_grad_(True)
            last = lambda m, args, put=put: (torch.cat([args[0][:, :-1], put[None, None]], 1),)  # noqa: E731
            handle = plain.transformer.h[block].mlp.c_proj.register_forward_pre_hook(last)
            total = total + torch.autograd.grad(plain(ids).logits[0, -1].softmax(-1)[token], put)[0]
            handle.remove()
        assert torch.allclose(editor.method.attributions(request.text, token)[name], own * total / 2, rtol=1e-4, atol=1e-10)


def test_kn_keeps_what_enough_of_the_prompts_agree_on(tiny_model, tokenizer, monkeypatch):
    editor = make_method("KN", small_model(tiny_model), tokenizer, prefixes=1, agreement=0.5, adaptive_threshold=0.3)
    first, second = editor.layers
    given = iter([torch.eye(48)[0], -1 - torch.eye(48)[1]])  # of the second prompt nothing speaks for the object

    def attributions(*_):
        own = next(given)
        return {first: own, second: own - 1}

    monkeypatch.setattr(editor.method, "attributions", attributions)
    assert len(editor.prefixes) == 2 and editor.method._find(some_requests(1)[0])[0] == [(first, 0)]


def test_kn_writes_into_the_columns_of_the_neurons_it_keeps(tiny_model, tokenizer):
    editor = make_method("KN", small_model(tiny_model), tokenizer, adaptive_threshold=0.3, agreement=0.6, strength=2.0)
    request = dataclasses.replace(some_requests(1)[0], ground_truth="Oslo")
    place = len(tokenizer(request.text)["input_ids"])
    old, new = (tokenizer(f"{request.text} {word}")["input_ids"][place] for word in ("Oslo", request.target_new))
    wanted = {}
    prompts = [prefix + request.text for prefix in editor.prefixes]
    for prompt in prompts:
        scores = editor.method.attributions(prompt, old)
        largest = max(own.max() for own in scores.values())
        for name, own in scores.items():
            for n in range(len(own)):
                if own[n] > 0.3 * largest:
                    wanted[name, n] = wanted.get((name, n), 0) + 1
    kept = {key for key, count in wanted.items() if count >= 0.6 * len(prompts)}
    assert kept
    editor.edit([request])
    words = editor.model.get_input_embeddings().weight
    for name, layer in editor.layers.items():
        for n in range(48):
            change = 2.0 * (words[new] - words[old]) if (name, n) in kept else torch.zeros(32)
            assert torch.allclose(layer.delta[:, n], change, atol=1e-6)
    editor.retract("edit-0")
    assert all(layer.delta.abs().max() < 1e-6 for layer in editor.layers.values())
