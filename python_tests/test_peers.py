"""Methods of others against the rules of their papers, written plainly: each test fails when its rule is changed."""

import copy
import dataclasses
import functools
import json
import math
from pathlib import Path
from types import SimpleNamespace

import pytest
import scipy.linalg
import torch
from test_editor import ids_of, small_model, some_requests
from test_methods import SETTINGS, demonstrations, held, make_method, requests_of  # noqa: F401  (a fixture)

from comeba_ext import Editor, EditRequest, evaluate, load_edits
from comeba_ext.errors import ComebaError, RequestError, StorageError
from comeba_ext.evaluation import Writing, predict_base
from comeba_ext.forward.architectures import context_length
from comeba_ext.layers.attachment import disabled
from comeba_ext.layers.prompts import prompt_rewriter
from comeba_ext.methods.grace import Codebook
from comeba_ext.methods.melo import WAY, LoraBlocks, Router
from comeba_ext.methods.memoir import MemoirMemory
from comeba_ext.methods.wise import WiseMemory, ties
from comeba_ext.text.questions import Probe, Question
from comeba_ext.text.retrieval import BM25


def layer_io(model, tokenizer, text, block=1):
    """Input and output of a block's MLP output projection at every token of a text."""
    seen = []
    handle = model.transformer.h[block].mlp.c_proj.register_forward_hook(lambda m, args, out: seen.append((args[0][0], out[0])))
    with torch.no_grad():
        model(torch.tensor([tokenizer(text)["input_ids"]]))
    handle.remove()
    return seen[0]


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


@pytest.mark.parametrize("whiten", [False, True])
def test_ultraedit_is_its_equations(tiny_model, tokenizer, whiten):
    """Inputs and gradients normalised over all edits so far, then ridge regression (equations 5 to 8), one text at a time. Whitened, as
    StableEdit's: by the inverse root of the gradients' covariance, once there are more tokens than it needs."""
    model = small_model(tiny_model).double()
    plain = copy.deepcopy(model)
    ridge = 10.0 if whiten else 1.0
    editor = make_method("UltraEdit", model, tokenizer, lr=1e-2, layers=(1, 2), whiten=whiten, ridge=ridge)
    requests = [dataclasses.replace(r, target_new=f"{r.target_new}, the capital of Angola", request_id=None) for r in some_requests(12)]
    seen, whitened = {n: [] for n in (1, 2)}, []
    for batch in (requests[:3], requests[3:]):
        editor.edit(batch)
        own = {n: [] for n in seen}
        for request in batch:
            prompt, whole = (tokenizer(text)["input_ids"] for text in (request.text, f"{request.text} {request.target_new}"))
            caught = {}
            handles = [
                plain.transformer.h[n].mlp.c_proj.register_forward_hook(
                    lambda m, args, out, n=n, caught=caught: caught.__setitem__(n, (args[0], out))
                )
                for n in seen
            ]
            log_p = plain(torch.tensor([whole])).logits[0].log_softmax(-1)
            loss = -sum(log_p[i - 1, whole[i]] for i in range(len(prompt), len(whole))) / (len(whole) - len(prompt))
            for n, gradient in zip(seen, torch.autograd.grad(loss / len(batch), [caught[n][1] for n in seen]), strict=True):
                places = slice(len(prompt) - 1, len(whole) - 1)
                own[n].append(torch.cat([caught[n][0][0, places], gradient[0, places]], 1).detach())
            for handle in handles:
                handle.remove()
        for n in seen:
            rows = torch.cat(own[n])
            seen[n].append(rows)
            everything = torch.cat(seen[n])
            normal = (rows - everything.mean(0)) / (everything.std(0) + torch.finfo(torch.float32).eps)
            h, g = normal[:, :48], normal[:, 48:]
            if whiten and len(everything) > 32 + 1:
                others = (everything - everything.mean(0))[:, 48:]
                inverse = scipy.linalg.pinvh((others.T @ others / (len(others) - 32 - 1)).numpy(), rtol=1e-5)
                g = (rows - everything.mean(0))[:, 48:] @ torch.from_numpy(scipy.linalg.sqrtm(inverse).real)
                whitened.append(n)  # a norm follows the blocks: in the direction of ones there are no gradients
            values = -1e-2 * h.norm(dim=1, keepdim=True) ** 2 * g
            change = torch.linalg.inv(h.T @ h + ridge * torch.eye(48)) @ h.T @ values  # (d_in, d_out), as Conv1D holds it
            with torch.no_grad():
                plain.transformer.h[n].mlp.c_proj.weight += change
    assert whitened == ([1, 2] if whiten else [])  # the second batch alone
    ids = ids_of(model, tokenizer)
    with torch.no_grad():
        assert torch.allclose(model(ids).logits, plain(ids).logits, atol=1e-6)
    assert (model(ids).logits - small_model(tiny_model).double()(ids).logits).abs().max() > 1e-3


def test_ultraedit_warm_up(tiny_model, tokenizer):
    editor = make_method("UltraEdit", small_model(tiny_model), tokenizer, lr=1e-2, warm_up=2)
    requests = some_requests(4)
    editor.edit(requests[:2])
    assert all(not layer.delta.any() for layer in editor.layers.values())  # statistics only
    editor.edit(requests[2:])
    assert all(layer.delta.any() for layer in editor.layers.values())


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


# -- WISE -----------------------------------------------------------------------------------------------------------


def test_wise_routes_by_activation(tiny_model, tokenizer):
    """A sequence takes the shard whose change of the output, mean over tokens, is the highest above its threshold."""
    editor = make_method("WISE", small_model(tiny_model), tokenizer, save_every=2, merge_every=100)
    requests = requests_of(4)
    editor.edit(requests[:2])
    editor.edit(requests[2:])
    side = editor.method.attachment
    assert len(side.delta) == 2 and editor.method.notes == {"shards": [2, 2], "unmerged": 4}
    plain = small_model(tiny_model)
    x = [layer_io(plain, tokenizer, request.text)[0] for request in requests]
    for n, rows in enumerate(x):
        share = [(rows @ d.T).norm(dim=-1).mean() / t for d, t in zip(side.delta, side.thresholds, strict=True)]
        wanted = int(torch.stack(share).argmax()) if max(share) > 1 else -1
        assert side.route(rows[None], None).tolist() == [wanted]
        padded = torch.cat([rows, torch.full((3, rows.shape[1]), 100.0)])  # padding counts for nothing
        assert side.route(padded[None], torch.arange(len(padded))[None] < len(rows)).tolist() == [wanted]
        assert side.route(0 * rows[None], None).tolist() == [-1], n
    for shard, own in ((0, requests[:2]), (1, requests[2:])):  # threshold: share of the lowest activation of an edit
        rows = [layer_io(plain, tokenizer, f"{r.text} {r.target_new}")[0] for r in own]
        ends = [len(tokenizer(f"{r.text} {r.target_new}")["input_ids"]) - 1 for r in own]  # the object's last token is not fed
        low = min((row[:end] @ side.delta[shard].T).norm(dim=-1).mean() for row, end in zip(rows, ends, strict=True))
        assert side.thresholds[shard] == pytest.approx(0.88 * low.item(), rel=1e-4)


def test_wise_shards_have_their_own_entries_and_stay_near_the_weight(tiny_model, tokenizer):
    editor = make_method("WISE", small_model(tiny_model), tokenizer, save_every=2, norm_constraint=0.01, mask_ratio=0.2, lr=5.0)
    requests = requests_of(4)
    editor.edit(requests[:2])
    editor.edit(requests[2:])
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
    rows = [type("Row", (), {"request": n})() for n in (0, 0, 1)]
    inputs, others = [torch.randn(4, 48) * s for s in (0.1, 1.0, 3.0)], [torch.randn(3, 48) * s for s in (0.5, 2.0)]
    d = [float((x @ side.delta[0].T).norm(dim=1).mean()) for x in inputs]
    e = [float((others[n] @ side.delta[0].T).norm(dim=1).mean()) for n in (0, 0, 1)]
    mean = lambda values: sum(v for v in values if v > 0) / max(1, sum(v > 0 for v in values))  # noqa: E731
    wanted = mean([b - a + 1.0 for a, b in zip(d, e)]) + mean([b - 0.5 for b in e]) + mean([2.0 - a for a in d])
    assert method._routing_loss(rows, inputs, others).item() == pytest.approx(wanted, rel=1e-4)


def test_wise_merges_its_shards(tiny_model, tokenizer):
    editor = make_method("WISE", small_model(tiny_model), tokenizer, save_every=2, merge_every=4)
    requests = requests_of(5)
    for n in (0, 2):
        editor.edit(requests[n : n + 2])
    side = editor.method.attachment
    assert len(side.delta) == 1
    editor.edit(requests[4:])
    assert len(side.delta) == 2  # the merged one is full
    # TIES by hand: the two largest of each, the sign with more weight, the mean of those that agree
    merged = ties(torch.tensor([[4.0, -3.0, 1.0, 0.5], [-2.0, -5.0, 0.1, 0.0]]), 0.5)
    assert merged.tolist() == [4.0, -4.0, 0.0, 0.0]


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


def test_memoir_touches_its_own_columns(tiny_model, tokenizer):
    editor = make_method("MEMOIR", small_model(tiny_model), tokenizer, active=0.25, weight_decay=0.0)
    editor.edit(some_requests(1))
    side = editor.method.attachment
    assert side.delta[0][:, side.masks[0]].any() and not side.delta[0][:, ~side.masks[0]].any()


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


# -- in context -----------------------------------------------------------------------------------------------------


def test_bm25_is_its_formula():
    texts = ["the cat sat on the mat", "a dog sat", "the dog and the cat and the dog"]
    index = BM25(texts)
    words = [text.split() for text in texts]
    mean = sum(map(len, words)) / 3

    def score(query, own):
        total = 0.0
        for word in set(query.split()):
            n = sum(word in other for other in words)
            count = own.count(word)
            total += math.log(1 + (3 - n + 0.5) / (n + 0.5)) * count * 2.5 / (count + 1.5 * (0.25 + 0.75 * len(own) / mean))
        return total

    for query in ("dog", "cat sat", "mat", "the", "nothing"):
        wanted = sorted(range(3), key=lambda n: -score(query, words[n]))
        assert index.nearest(query, 3) == wanted
        assert index.nearest(query, 2, [0, 2]) == [n for n in wanted if n != 1]
        assert index.nearest(query, 2, []) == []
    assert BM25([]).nearest("x", 2) == []


def test_ice_and_ike_ask_as_the_paper_does(tiny_model, tokenizer):
    first, second = (EditRequest("{} lives in", name, target) for name, target in (("Ann", "Rome"), ("Bob", "Oslo")))
    editor = make_method("ICE", small_model(tiny_model), tokenizer)
    assert prompt_rewriter(editor.model)("Bob lives in") == "Bob lives in"  # nothing edited yet
    editor.edit([first, second])
    rewrite = prompt_rewriter(editor.model)
    assert rewrite("Bob lives in") == "New Fact: Bob lives in Oslo\nPrompt: Bob lives in"
    assert rewrite("Where is Ann?") == "New Fact: Ann lives in Rome\nPrompt: Where is Ann?"
    with editor.disabled():
        assert prompt_rewriter(editor.model) is None
    editor.close()
    assert prompt_rewriter(editor.model) is None and not hasattr(editor.model, "comeba_facts")
    shown = json.loads(Path(SETTINGS["IKE"]["demonstrations"]).read_text())
    fact = lambda n: f"The capital of {shown[n]['subject']} is Rome"  # noqa: E731
    copied = f"New Fact: {fact(0)}\nPrompt: {fact(0)}\n\n"
    updated = [f"New Fact: {fact(n)}\nPrompt: {shown[n]['subject']}'s capital is Rome\n\n" for n in (1, 2)]
    editor = make_method("IKE", small_model(tiny_model), tokenizer, shown=3)
    assert editor.method.shown(first) == [updated[1], updated[0], copied]
    with pytest.raises(RequestError, match="exceed the model's context"):
        editor.edit([first])
    editor.close()
    editor = make_method("IKE", small_model(tiny_model), tokenizer, shown=1)
    editor.edit([first])
    assert prompt_rewriter(editor.model)("Ann lives in") == f"{copied}New Fact: Ann lives in Rome\nPrompt: Ann lives in"


def test_a_named_fact_stands_before_what_names_its_subject(tiny_model, tokenizer, tmp_path):
    editor = make_method("ICE", small_model(tiny_model), tokenizer, named=True)
    for subject, text, target in (("Ann", "lives in", "Rome"), ("Ann", "plays the", "lute"), ("Bob", "lives in", "Oslo")):
        editor.edit([EditRequest(f"{{}} {text}", subject, target)])
    editor.edit([EditRequest("{} is in", "New York", "Peru")])
    asked = {
        "Bob lives in": "New Fact: Bob lives in Oslo\nPrompt: Bob lives in",
        "What does Ann play, the": "New Fact: Ann plays the lute\nPrompt: What does Ann play, the",
        "in new york, who": "New Fact: New York is in Peru\nPrompt: in new york, who",
        "Annette lives in": "Annette lives in",  # in its letters only
        "Eve lives in": "Eve lives in",
    }
    editor.save_pretrained(tmp_path)
    loaded = load_edits(small_model(tiny_model), tmp_path)
    for rewrite in (prompt_rewriter(editor.model), prompt_rewriter(loaded)):
        assert {prompt: rewrite(prompt) for prompt in asked} == asked
    requests = requests_of(2)
    editor.rollback(0)
    editor.edit(requests)
    found = evaluate(editor.model, tokenizer, requests)
    apart = [n for n, r in enumerate(requests) if not any(o.subject in p for o in requests for p, _ in r.locality_prompts)]
    assert apart and all(found.per_record[n]["locality"] == 1 for n in apart)
    editor.retract([entry.request.request_id for entry in editor.ledger.live()])
    assert prompt_rewriter(editor.model)(requests[0].text) == requests[0].text


@pytest.mark.parametrize(
    "packed", ['[{"id": "a"}]', "[3]", '[{"id": "a", "fact": 3, "shown": []}]', '[{"id": "a", "fact": "b", "shown": "c"}]', "no"]
)
def test_facts_that_are_not_ours(tiny_model, tokenizer, tmp_path, packed):
    editor = make_method("ICE", small_model(tiny_model), tokenizer)
    editor.edit(some_requests(1))
    editor.method.attachments["comeba_facts"].packed = torch.tensor(list(packed.encode()), dtype=torch.uint8)
    editor.save_pretrained(tmp_path)
    model = small_model(tiny_model)
    for load in (lambda: load_edits(model, tmp_path), lambda: Editor.from_pretrained(model, tokenizer, tmp_path)):
        with pytest.raises(StorageError, match="incomplete or damaged"):
            load()
        assert prompt_rewriter(model) is None


def test_a_question_meets_the_facts_that_there_are(tiny_model, tokenizer):
    """Whoever has asked before an edit, a retraction or a rollback is answered with what is there after it."""
    editor = make_method("ICE", small_model(tiny_model), tokenizer)
    asked = lambda: prompt_rewriter(editor.model)("Ann lives in")  # noqa: E731
    one, other = (EditRequest("{} lives in", "Ann", target) for target in ("Rome", "Oslo"))
    assert asked() == "Ann lives in"
    editor.edit([one])
    assert asked() == "New Fact: Ann lives in Rome\nPrompt: Ann lives in"
    editor.edit([other])  # of the same length, so that the buffer's shape stays
    assert asked() == "New Fact: Ann lives in Oslo\nPrompt: Ann lives in"
    editor.rollback(1)
    assert asked() == "New Fact: Ann lives in Rome\nPrompt: Ann lives in"
    editor.retract("edit-0")
    assert asked() == "Ann lives in"


def test_all_the_facts_before_a_question_must_fit_the_context(tiny_model, tokenizer):
    """Each fits alone; what was checked before others came is looked at again when it is edited."""
    editor = make_method("ICE", small_model(tiny_model), tokenizer, facts=3)
    requests = [EditRequest("The capital of {} is", s, " ".join(["Angola"] * 6)) for s in ("Norway", "Peru", "Angola")]
    editor.check(requests)
    for n in range(2):
        editor.edit(requests[n : n + 1])
    before = [prompt_rewriter(editor.model)(r.text) for r in requests]
    limit = context_length(editor.model)
    with pytest.raises(RequestError, match=f"exceed the model's context of {limit}"):
        editor.edit(requests[2:])
    assert [prompt_rewriter(editor.model)(r.text) for r in requests] == before and len(editor.ledger) == editor.step == 2


def test_questions_are_checked_as_they_are_asked(tiny_model, tokenizer):
    """Behind the facts; those to the unedited model as they are."""
    limit = context_length(small_model(tiny_model))
    words = limit - len(tokenizer("The capital of Norway is")["input_ids"]) - 4
    long = "The capital of Norway is" + " a" * (words // 2)
    asked = Question("x", (Probe(long, ("a",)),))
    unedited = Question("x", (Probe("The", ("a",)),), conditions=(Probe(long, ("a",)),))
    assert limit - 8 < len(tokenizer(long)["input_ids"]) <= limit
    editor = make_method("ICE", small_model(tiny_model), tokenizer)
    request = EditRequest("The capital of {} is", "Norway", "Angola", questions=(unedited,))
    editor.edit([request])
    writing = Writing(answer_tokens=1)
    assert evaluate(editor.model, tokenizer, [request], writing=writing)["questions"]["x"]["questions"] == 1
    with pytest.raises(RequestError, match="record 0.*the model's context"):
        evaluate(editor.model, tokenizer, [dataclasses.replace(request, questions=(asked,))], writing=writing)
    with disabled(editor.model):
        evaluate(editor.model, tokenizer, [dataclasses.replace(request, questions=(asked,))], writing=writing)


def test_evaluation_asks_what_an_in_context_method_says(tiny_model, tokenizer):
    """Scores are those of the rewritten prompts; locality is against the plain prompts of the unedited model."""
    model = small_model(tiny_model)
    requests = requests_of(2)
    base = predict_base(model, tokenizer, requests)
    editor = make_method("ICE", model, tokenizer)
    editor.edit(requests)
    rewrite = prompt_rewriter(model)
    found = evaluate(model, tokenizer, requests, base)
    for request, row in zip(requests, found.per_record, strict=True):
        with torch.no_grad():
            ids = tokenizer(f"{rewrite(request.text)} {request.target_new}")["input_ids"]
            asked = len(tokenizer(rewrite(request.text))["input_ids"])
            said = model(torch.tensor([ids])).logits[0].argmax(-1)[asked - 1 : -1].tolist()
            share = sum(a == b for a, b in zip(said, ids[asked:], strict=True)) / len(said)
            assert row["reliability"] == share and row["predicted"] == tokenizer.decode(said).strip()
            local, answer = request.locality_prompts[0]
            both = []
            for text in (local, rewrite(local)):
                ids = tokenizer(f"{text} {answer}")["input_ids"]
                both.append(model(torch.tensor([ids])).logits[0].argmax(-1)[len(tokenizer(text)["input_ids"]) - 1 : -1].tolist())
            assert row["locality"] == sum(a == b for a, b in zip(*both, strict=True)) / len(both[0])
