"""Edits that are kept apart, subject by subject: the factors' storage, the tokens that get them, and which requests share a shard.

Oracles: loops over tokens with dense matrices in float64, and a fresh editor that was given just what is left.
"""

import copy
import random as python_random

import pytest
import torch
from test_editor import (
    assert_compares_with_the_live_keys,
    assert_least_squares,
    assert_same,
    edits_of,
    ids_of,
    make_editor,
    random_values,
    relative,
    small_model,
    snapshot,
    some_requests,
)
from test_nearest_hook import D_IN, D_OUT, covariance_of, inputs, keep_apart, loop_cosines, make_layer, random
from torch import nn

from comeba_ext import EditRequest
from comeba_ext.editing.subject_shards import Member, SubjectShards
from comeba_ext.errors import RequestError
from comeba_ext.layers.hooked_linear import HookedLinear
from comeba_ext.layers.sequence_context import SequenceContext
from comeba_ext.layers.shards import Shards
from comeba_ext.layers.twin import twin_of
from comeba_ext.memory.key_memory import KeyMemory
from comeba_ext.ops import shard_edits as ops
from comeba_ext.ops.mentions import name_hash, suffix_hashes
from comeba_ext.ops.nearest_hook import SAME

# -- the operator ---------------------------------------------------------------------------------------------------


def by_loops(x, shards, rows, left, right):
    """Token by token, with each shard's matrix."""
    found = []
    for token, shard in zip(x.double(), shards.tolist(), strict=True):
        own = [row for row in rows[shard].tolist() if row >= 0] if shard >= 0 else []
        matrix = sum((torch.outer(left[r].double(), right[r].double()) for r in own), torch.zeros(left.shape[1], right.shape[1]).double())
        found.append(matrix @ token)
    return torch.stack(found) if found else torch.zeros(0, left.shape[1]).double()


@pytest.mark.parametrize("dtype, tolerance", [(torch.float64, 1e-12), (torch.float32, 1e-4), (torch.float16, 0.1), (torch.bfloat16, 0.8)])
@pytest.mark.parametrize("chunk", [1, 60, 1 << 25])
def test_shard_edits(monkeypatch, dtype, tolerance, chunk):
    monkeypatch.setattr(ops, "_CHUNK", chunk)
    x, left, right = (random(*shape, seed=n, dtype=dtype) for n, shape in enumerate([(9, 7), (6, 5), (6, 7)]))
    rows = torch.tensor([[4, -1, -1], [0, 2, 5], [-1, -1, -1], [3, 1, -1]])
    shards = torch.tensor([0, 3, -1, 1, 2, 1, 0, 3, -1])
    found = ops.shard_edits(x, shards, rows, left, right)
    assert found.dtype == dtype and found.shape == (9, 5)
    assert (found.double() - by_loops(x, shards, rows, left, right)).abs().max() < tolerance
    assert not found[[2, 4, 8]].any()
    assert ops.shard_edits(x[:0], shards[:0], rows, left, right).shape == (0, 5)
    assert not ops.shard_edits(x, torch.full((9,), -1), rows, left, right).any()
    assert not ops.shard_edits(x, shards, rows[:0], left, right).any()


def test_shard_edits_gradient():
    x, left, right = (random(*shape, seed=n).requires_grad_() for n, shape in enumerate([(4, 7), (3, 5), (3, 7)]))
    rows, shards = torch.tensor([[0, 2], [1, -1]]), torch.tensor([1, -1, 0, 0])
    assert torch.autograd.gradcheck(lambda *parts: ops.shard_edits(parts[0], shards, rows, *parts[1:]), (x, left, right))


# -- the layer ------------------------------------------------------------------------------------------------------


def expected_output(layer, x):
    """Token by token: the nearest anchor by cosine less what it asks beyond α, its shard's matrix or delta, or nothing."""
    known = layer.score.known_keys()
    keys = random(known, layer.in_features, seed=3)
    cosines = loop_cosines(x.double().flatten(0, 1), keys, covariance_of(layer.in_features))
    score = torch.from_numpy(cosines) - (layer.score.thresholds[:known].double() - layer.alpha).clamp(min=0)
    output = layer.base_layer(x).double().flatten(0, 1)
    edits, scope = edits_of(layer).double(), []
    for n, token in enumerate(x.double().flatten(0, 1)):
        best = int(score[n].argmax())
        scope.append(bool(score[n, best] >= layer.alpha))
        if scope[-1]:
            kept = layer.score.shards[best] >= 0
            output[n] += (edits[1 + best] if kept else edits[0]) @ token
    return output.reshape(*x.shape[:-1], -1), torch.tensor(scope).reshape(x.shape[:-1])


@pytest.mark.parametrize("every", [False, True])
@pytest.mark.parametrize("dtype, tolerance", [(torch.float64, 1e-10), (torch.float32, 1e-3)])
@torch.no_grad()
def test_a_token_gets_its_nearest_keys_shard(every, dtype, tolerance):
    layer = make_layer(7, alpha=0.6, dtype=dtype)
    keep_apart(layer, every)
    layer.score.thresholds[2] = 0.97  # so that another one is nearer than it by more than it asks
    x = inputs(layer, batch=3, seq=14, noise=0.5)
    expected, scope = expected_output(layer, x)
    assert 5 < scope.sum() < scope.numel() - 5
    output, base = layer(x), layer.base_layer(x)
    assert ((output - expected).abs() < tolerance).all()
    assert torch.equal(output[~scope], base[~scope])
    layer.mode = "temporary"  # what is kept apart is nobody else's
    assert torch.allclose(layer(x), base + x @ layer.delta.mT)
    layer.mode = "off"
    assert torch.equal(layer(x), base)


@pytest.mark.parametrize("every", [False, True])
def test_gradients_through_shards(every):
    layer = make_layer(7, alpha=0.6)
    keep_apart(layer, every)
    x = inputs(layer, batch=1, seq=10)
    _, scope = expected_output(layer, x)
    x.requires_grad_()
    (gradient,) = torch.autograd.grad(layer(x).sum(), x)
    edits, known = edits_of(layer), layer.score.known_keys()
    near = torch.from_numpy(loop_cosines(x.detach()[0], random(known, D_IN, seed=3), covariance_of(D_IN)))
    for t in range(10):
        best = int(near[t].argmax())
        own = edits[1 + best] if layer.score.shards[best] >= 0 else edits[0]
        torch.testing.assert_close(gradient[0, t], (layer.weight + (own if scope[0, t] else 0)).sum(0))


@pytest.mark.parametrize("backend, grad", [("inductor", False), ("aot_eager", True)])
def test_compiled_sees_new_shards(backend, grad):
    torch._dynamo.reset()
    layer = make_layer(7, alpha=0.6, dtype=torch.float32)
    layer.base_layer.requires_grad_(grad)
    compiled = torch.compile(layer, fullgraph=True, backend=backend)
    x = inputs(layer)
    with torch.set_grad_enabled(grad):
        before = compiled(x)
        for every in (False, True):
            keep_apart(layer, every, seed=20 + every)
            torch.testing.assert_close(compiled(x), layer(x))
            assert not torch.allclose(compiled(x), before)
            before = compiled(x)
        layer.shards.append(torch.ones(200, D_OUT), torch.ones(200, D_IN))  # more room
        layer.shards.assign({0: torch.tensor([100, 7])}, 3)
        torch.testing.assert_close(compiled(x), layer(x))
        assert not torch.allclose(compiled(x), before)


def test_layer_round_trips():
    layer = make_layer(7, alpha=0.6)
    keep_apart(layer)
    layer.shards.append(torch.ones(2, D_OUT), torch.ones(2, D_IN))  # of no shard any more
    x = inputs(layer)
    expected = layer(x)
    saved = {name: tensor.clone() for name, tensor in layer.tensors().items()}
    assert saved["shard_left"].shape == (6, D_OUT) and saved["shard_sizes"].tolist() == [1, 3, 2]
    restored, loaded = make_layer(1), make_layer(1)
    restored.base_layer, loaded.base_layer = layer.base_layer, copy.deepcopy(layer.base_layer)
    restored.restore(saved)
    loaded.load_state_dict(layer.state_dict())
    for other in (restored, loaded, copy.deepcopy(layer)):
        assert torch.equal(other(x), expected)
        other.shards.append(torch.ones(1, D_OUT), torch.ones(1, D_IN))  # behind what is there
        assert torch.equal(other(x), expected)
    half = copy.deepcopy(layer).half()
    assert half.shards.left.dtype == torch.float16 and half.shards.rows.dtype == torch.int64
    assert half.score.shards.tolist() == layer.score.shards.tolist()
    torch.testing.assert_close(half(x.half()).double(), expected, rtol=0.1, atol=0.5)


@pytest.mark.parametrize(
    "wrong",
    [
        {"shard_sizes": torch.tensor([1, 3, 1])},
        {"shard_sizes": torch.tensor([7, -1])},
        {"shard_sizes": torch.tensor([1.0, 3.0, 2.0])},
        {"shard_left": torch.zeros(6, D_OUT + 1)},
        {"shard_right": torch.zeros(5, D_IN)},
        {"anchor_shards": torch.tensor([0, 1, 2, 3, 0, 0, 0])},
        {"anchor_shards": torch.tensor([0, 1])},
        {"anchor_shards": torch.zeros(7)},
        {"anchor_shards": torch.tensor([0, 0, 1, 1, 2, 2, 0])},
        {"of_name": torch.tensor([3]), "names": torch.tensor([1])},
        {"of_end": torch.tensor([-1]), "ends": torch.tensor([1])},
        {"of_end": torch.tensor([0, 1]), "ends": torch.tensor([1])},
        {"of_name": torch.tensor([0, 1]), "names": torch.tensor([2, 1])},
    ],
    ids=lambda wrong: f"{next(iter(wrong))}-{next(iter(wrong.values())).tolist()}"[:40],
)
def test_malformed_shards(wrong):
    layer = make_layer(7)
    keep_apart(layer, every=True)
    saved = {name: tensor.clone() for name, tensor in layer.tensors().items()}
    with pytest.raises(ValueError, match="shard|of_|in order"):
        make_layer(1).restore({**saved, **wrong})


# -- storage --------------------------------------------------------------------------------------------------------


def test_what_is_written_stays():
    """Two holders of one storage: what one adds, the other does not see."""
    shards = Shards(3, 2)
    shards.assign({0: shards.append(torch.ones(2, 2), torch.ones(2, 3))}, 1)
    other = copy.deepcopy(shards)
    other.take_over(shards)
    assert other.left is shards.left
    other.assign({0: other.append(torch.full((1, 2), 5.0), torch.ones(1, 3))}, 1)
    assert other.left is shards.left and shards.used == 2 and other.used == 3  # there was room
    assert shards.edits(torch.ones(1, 3), torch.tensor([0])).tolist() == [[6.0, 6.0]]
    assert other.edits(torch.ones(1, 3), torch.tensor([0])).tolist() == [[15.0, 15.0]]
    other.append(torch.zeros(500, 2), torch.zeros(500, 3))
    assert other.left is not shards.left and len(other.left) < 1.3 * 503 + 64
    other.clear()
    assert len(other) == 0 and not other and len(shards) == 1
    assert shards.edits(torch.ones(1, 3), torch.tensor([0])).tolist() == [[6.0, 6.0]]


def test_compacting_keeps_every_shard():
    shards, expected = Shards(3, 2), {}
    for n in range(400):
        number, count = n % 7, 1 + n % 3
        left, right = random(count, 2, seed=n, dtype=torch.float32), random(count, 3, seed=1000 + n, dtype=torch.float32)
        shards.assign({number: shards.append(left, right)}, min(n + 1, 7))
        expected[number] = left.mT @ right
        shards.compact()
        assert shards.used <= 2 * 21 + 256 + 3
    for number, matrix in expected.items():
        found = shards.edits(torch.eye(3), torch.full((3,), number)).mT
        torch.testing.assert_close(found, matrix)


def test_a_twin_shares_the_factors(tiny_model, tokenizer):
    editor = make_editor(small_model(tiny_model), tokenizer)
    editor.edit(some_requests(3), random_values(3))
    twin = twin_of(editor.model)
    for name, layer in editor.layers.items():
        other = twin.get_submodule(name).shards
        assert other.left.data_ptr() == layer.shards.left.data_ptr() and other.rows.data_ptr() != layer.shards.rows.data_ptr()
    before = [layer.shards.left for layer in editor.layers.values()]
    editor.edit(some_requests(4)[3:], random_values(1))
    assert all(layer.shards.left is own for layer, own in zip(editor.layers.values(), before, strict=True))  # nothing was copied


def held(layer):
    """Bytes of all that grows with the edits, but names and where they are."""
    score = layer.score
    own = (layer.shards.left, layer.shards.right, score.anchors, score.thresholds, score.named_thresholds, score.shards)
    return sum(part.nbytes for part in own)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_bytes_are_known_before_they_are_taken(dtype):
    layer = HookedLinear(nn.Linear(D_IN, D_OUT, dtype=dtype), "nearest", 0.5)
    layer.score.set_projection(random(16, D_IN).to(dtype))
    for count in (0, 1, 63, 2, 500, 1, 3000):
        expected = layer.shards.nbytes_with(count) + layer.score.nbytes_with(count)
        layer.shards.append(torch.zeros(count, D_OUT), torch.zeros(count, D_IN))
        layer.score.append_anchors(torch.ones(count, 16), *(torch.zeros(count) for _ in range(2)))
        assert held(layer) == expected


def test_a_bound_on_what_edits_take(tiny_model, tokenizer):
    limit = 0.15  # MB
    editor = make_editor(small_model(tiny_model), tokenizer, max_edit_memory=limit, steps=1)
    requests = some_requests(60)
    with pytest.raises(RequestError, match=r"with \d+ more edits .* max_edit_memory is 0.15"):
        editor.edit(requests)
    for start in range(0, len(requests), 4):
        before = snapshot(editor)
        try:
            editor.edit(requests[start : start + 4])
        except RequestError as error:
            assert "max_edit_memory" in str(error)
            assert_same(before, snapshot(editor))
            break
        assert sum(map(held, editor.layers.values())) <= limit * 1e6
    assert 4 <= start < 56
    editor.retract([entry.request.request_id for entry in editor.ledger.live()])
    report = editor.edit(requests[start : start + 4])
    assert len(report.request_ids) + len(report.declined) == 4


# -- requests -------------------------------------------------------------------------------------------------------


def test_facts_of_one_subject_share_a_shard(tiny_model, tokenizer):
    editor = make_editor(small_model(tiny_model), tokenizer)
    editor.edit([EditRequest("The mother tongue of {} is", name, "Oslo") for name in ("Danielle Darrieux", "Angola")], random_values(2))
    editor.edit([EditRequest("The mother tongue of {} was", "Danielle Darrieux", "Lima")], random_values(1, seed=1))
    name = next(iter(editor.layers))  # further up, keys are read behind what was written here
    assert sorted(len(own) for own in editor.method.recognition.shards[name].members.values()) == [1, 2]
    assert_least_squares(editor)


def test_a_request_that_joins_two_shards_makes_them_one(tiny_model, tokenizer):
    """It goes by the names of both."""
    editor = make_editor(small_model(tiny_model).double(), tokenizer)
    editor.edit([EditRequest("The home of {} is", name, "Oslo") for name in ("Peru", "Angola", "Norway")], random_values(3))
    (name, layer), *_ = editor.layers.items()
    shards = editor.method.recognition.shards[name].copy()
    of_request = shards.of_requests()
    one, other = sorted((of_request["edit-0"], of_request["edit-1"]))
    both = tuple(own.members[n][0].names[0] for own, n in ((shards, one), (shards, other)))
    member = shards.members[one][0]._replace(name=("between", 2), unit=layer.score.directions(random(2, 48)), names=both)
    member = member._replace(thresholds=torch.tensor([0.7, 0.7]), named=torch.tensor([0.4, 0.4]))
    shards.add(layer, editor.key_memory[name], [member])
    assert [m.name[0] for m in shards.members[one]] == ["edit-0", "edit-1", "between"]
    assert len(shards.members) == 2 and set(shards.of_anchor.tolist()) == set(shards.members) == {0, 1}
    assert all(set(table.shards.tolist()) == {0, 1} for table in (shards.names, shards.ends))
    keys, answers = (torch.cat([getattr(m, part) for m in shards.members[one]]).mT for part in ("keys", "responses"))
    moment = 20.0 * editor.covariance[name]
    expected = answers @ keys.mT @ torch.linalg.inv(moment + keys @ keys.mT)
    assert relative(edits_of(layer)[1 + shards.of_anchor.tolist().index(one)], expected) < 1e-9
    assert len(layer.shards) == shards.count == 2 and not shards.free  # a number that was free is given to the last
    shards.remove(layer, editor.key_memory[name], {("between", 2)})  # what it joined comes apart again
    assert sorted(len(own) for own in shards.members.values()) == [1, 1, 1] and not shards.free
    assert set(shards.of_anchor.tolist()) == set(shards.members)
    assert all(set(table.shards.tolist()) == {0, 1, 2} for table in (shards.names, shards.ends))


def test_near_keys_of_two_subjects_stay_apart():
    """Each gets its own where it is named; where neither is, the nearer one's."""
    layer, shards = make_layer(0), SubjectShards()
    layer.alpha.fill_(0.3)
    memory, root = KeyMemory(1e-3 * covariance_of(D_IN)), torch.linalg.cholesky(covariance_of(D_IN))
    keys = (random(1, D_IN, seed=1) + 0.1 * random(2, D_IN, seed=2)) @ root.mT
    answers, unit = random(2, D_OUT, seed=3), layer.score.directions(keys)
    assert unit[0] @ unit[1] > SAME
    half = torch.tensor([0.3]), torch.tensor([0.3])
    for n in range(2):
        member = Member(
            (str(n), 1), keys[n : n + 1], answers[n : n + 1], unit[n : n + 1], *half, (name_hash([5 + n, 9]),), (name_hash([9]),)
        )
        shards.add(layer, memory, [member])
    assert len(shards.members) == layer.score.known_keys() == 2
    x = keys[[0, 0, 0]][None]
    layer.context = SequenceContext(nn.Module())
    layer.context.here.hashes = suffix_hashes(torch.tensor([[9, 9, 9]]))
    near = (layer(x) - layer.base_layer(x))[0]
    assert (near - answers[0]).norm() < 0.02 * near.norm()
    layer.context.here.hashes = suffix_hashes(torch.tensor([[9, 9, 1]]), torch.tensor([[5]]))
    named = (layer(x) - layer.base_layer(x))[0]
    assert torch.equal(named[:2], near[:2]) and not named[2].any()  # nobody's name ends there
    layer.context.here.hashes = suffix_hashes(torch.tensor([[9, 9, 9]]), torch.tensor([[6]]))
    named = (layer(x) - layer.base_layer(x))[0]
    expected = answers[1] * (keys[0] @ torch.linalg.solve(1e-3 * covariance_of(D_IN) + keys[1:].mT @ keys[1:], keys[1]))
    torch.testing.assert_close(named[0], expected)
    assert torch.equal(named[1:], near[1:]) and not torch.allclose(named[0], near[0], rtol=0.1)


def test_a_shard_takes_no_more_room_than_its_matrix():
    """More facts about one subject than the layer has outputs."""
    layer, shards, count = make_layer(0), SubjectShards(), D_OUT + 5
    memory = KeyMemory(20.0 * covariance_of(D_IN))
    keys, answers = random(1, D_IN, seed=1) + 0.01 * random(count, D_IN, seed=2), random(count, D_OUT, seed=3)
    for n in range(count):
        unit = layer.score.directions(keys[n : n + 1])
        half = torch.tensor([0.6]), torch.tensor([0.6])
        shards.add(
            layer, memory, [Member((str(n), 1), keys[n : n + 1], answers[n : n + 1], unit, *half, (name_hash([7]),), (name_hash([7]),))]
        )
    assert len(shards.members) == 1 and layer.score.known_keys() == 1
    assert layer.shards.rows.shape == (1, D_OUT) and len(layer.tensors()["shard_left"]) == D_OUT
    expected = answers.mT @ keys @ torch.linalg.inv(20.0 * covariance_of(D_IN) + keys.mT @ keys)
    assert relative(edits_of(layer)[1], expected) < 1e-9


@pytest.mark.parametrize("seed", [0, 1, 3, 5, 6, 7])
def test_any_history_equals_a_fresh_editor_with_what_remains(tiny_model, tokenizer, seed):
    draw = python_random.Random(seed)
    editor = make_editor(small_model(tiny_model), tokenizer)
    names = ["Norway", "Angola", "Peru", "Marie Curie", "John Lennon", "Toko Yasuda"]
    value_of, counts = {}, {"edit": 0, "retract": 0, "rollback": 0, "superseded": 0}
    for step in range(14):
        live = [entry.request.request_id for entry in editor.ledger.live()]
        what = draw.choice(["edit", "edit", "edit", "retract", "rollback"]) if len(live) > 3 else "edit"
        counts[what] += 1
        if what == "edit":
            batch = [
                EditRequest(f"{{}} was seen {draw.choice(['in', 'near', 'far from'])}", name, "Oslo", request_id=f"{step}-{n}")
                for n, name in enumerate(draw.sample(names, draw.randint(1, 3)))
            ]
            values = random_values(len(batch), seed=100 * seed + step).float()
            value_of |= dict(zip([request.request_id for request in batch], values, strict=True))
            counts["superseded"] += len(editor.edit(batch, values).superseded)
        elif what == "retract":
            editor.retract(draw.sample(live, draw.randint(1, 2)))
        else:
            editor.rollback(draw.randint(max(0, editor.step - 3), editor.step))
        assert_least_squares(editor)
        assert_compares_with_the_live_keys(editor)
    assert min(counts.values()) > 0
    # The same least squares, told at once: keys, answers and directions are those of the ledger.
    for name, layer in editor.layers.items():
        fresh = copy.deepcopy(layer)
        own = type(editor.method.recognition.shards[name])()
        own.rebuild(fresh, editor.key_memory[name], editor.method.recognition.members(name, editor.ledger.live()))
        grouped = [{tuple(m.name for m in ms) for ms in side.members.values()} for side in (editor.method.recognition.shards[name], own)]
        assert grouped[0] == grouped[1] and len(layer.shards) == len(grouped[0]) and layer.score.known_keys() == fresh.score.known_keys()
        live = editor.ledger.live()
        tokens = torch.cat([entry.keys[name] for entry in live])  # and what is half-way between two
        tokens = torch.cat([tokens, (tokens + tokens.roll(1, 0)) / 2, tokens.flip(-1)])[None]
        torch.testing.assert_close(fresh.scores(tokens), layer.scores(tokens), rtol=0, atol=1e-5)
        torch.testing.assert_close(fresh(tokens), layer(tokens), rtol=0, atol=1e-5 * layer(tokens).abs().max().item())
        assert not torch.equal(layer(tokens), layer.base_layer(tokens))
    with torch.no_grad():
        assert torch.isfinite(editor.model(ids_of(editor.model, tokenizer)).logits).all()
