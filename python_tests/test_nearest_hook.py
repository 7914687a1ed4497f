"""The nearest score against whitening and cosines by numpy loops, its hook layer, and editing with it."""

import copy
import io
import math
import pickle

import numpy as np
import pytest
import scipy.linalg
import torch
from test_editor import (
    TEXTS,
    assert_compares_with_the_live_keys,
    assert_same,
    ids_of,
    make_editor,
    random_values,
    small_model,
    snapshot,
    some_requests,
)
from test_hooked_linear import captured
from test_methods import LAYERS, NO_SHARES, WITH_VALUES, given, make_method
from test_sketch import scopes
from torch import nn
from torch.nn import functional as F

from comeba_ext import EditConfig, Editor, EditRequest, load_edits
from comeba_ext.covariance.key_sample import KeySample
from comeba_ext.editing.recognition import KeyRecognition
from comeba_ext.errors import ComebaError, CovarianceError, StorageError
from comeba_ext.layers.hooked_linear import HookedLinear
from comeba_ext.methods import ComebaHK
from comeba_ext.ops import nearest_hook as ops

D_IN, D_OUT = 24, 10


def random(*shape, seed=0, dtype=torch.float64):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64).to(dtype)


def covariance_of(width, seed=50, condition=1e3):
    """Positive definite with eigenvalues from 1 to 1/condition in random directions."""
    basis = np.linalg.qr(random(width, width, seed=seed).numpy())[0]
    return torch.from_numpy(basis * np.logspace(0, -math.log10(condition), width) @ basis.T)


def loop_cosines(tokens, keys, covariance) -> np.ndarray:
    """``(tokens, keys)``: cosines in the metric of the covariance's inverse."""
    lower = scipy.linalg.cholesky(covariance.numpy(), lower=True)
    white = lambda vector: scipy.linalg.solve_triangular(lower, vector.double().numpy(), lower=True)  # noqa: E731
    tokens, keys = [white(token) for token in tokens], [white(key) for key in keys]
    return np.array([[a @ b / math.sqrt((a @ a) * (b @ b)) for b in keys] for a in tokens])


def make_layer(keys=5, alpha=0.5, dtype=torch.float64, d_in=D_IN, seed=0, base=None):
    base = nn.Linear(d_in, D_OUT, dtype=dtype) if base is None else base
    base.weight.data.copy_(random(D_OUT, d_in, seed=seed))
    base.bias.data.copy_(random(D_OUT, seed=seed + 1))
    layer = HookedLinear(base, "nearest", alpha)
    layer.delta.copy_(random(D_OUT, d_in, seed=seed + 2))
    layer.score.fit(covariance_of(d_in))
    layer.score.set_keys(random(keys, d_in, seed=seed + 3))
    return layer


def keep_apart(layer, every=False, sizes=(1, 3, 2), seed=20):
    """Put anchors into shards of these sizes, side by side; the first into none, but for ``every``."""
    dtype, known = layer.delta.dtype, layer.score.known_keys()
    places = layer.shards.append(
        random(sum(sizes), D_OUT, seed=seed, dtype=dtype), random(sum(sizes), layer.in_features, seed=seed + 1, dtype=dtype)
    )
    layer.shards.assign(dict(enumerate(places.split(list(sizes)))), len(sizes))
    numbers = torch.arange(known) * len(sizes) // known
    if not every:
        numbers[0] = -1
    layer.score.assign(numbers)


def inputs(layer, batch=2, seq=8, seed=9, noise=0.3):
    """Every other token is one of the layer's keys of :func:`make_layer`, disturbed; the others are unrelated."""
    width, dtype = layer.in_features, layer.delta.dtype
    x = random(batch, seq, width, seed=seed)
    known = random(layer.score.known_keys(), width, seed=3)
    root = torch.linalg.cholesky(covariance_of(width))
    x = x @ root.T  # a disturbance as large in every whitened direction
    for n in range(0, batch * seq, 2):
        key = known[n % len(known)]
        size = torch.linalg.solve(root, key).norm() / math.sqrt(width)
        x[n // seq, n % seq] = key + noise * size * x[n // seq, n % seq]
    return x.to(dtype)


# -- the score ------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("rows", [D_IN, D_IN + 1, 256])
def test_scores_are_whitened_cosines(rows):
    covariance, tokens, keys = covariance_of(D_IN), random(3, 7, D_IN), random(6, D_IN, seed=1)
    projection = ops.projection_of(covariance, rows)
    assert projection.shape == (D_IN, D_IN) and projection.dtype == torch.float64
    scores = ops.nearest_scores(tokens, projection, ops.directions(keys, projection))
    expected = loop_cosines(tokens.flatten(0, 1), keys, covariance).max(1).clip(0).reshape(3, 7)
    np.testing.assert_allclose(scores.numpy(), expected, atol=1e-12)


@pytest.mark.parametrize("rows", [64, 128, 256])
def test_projection_keeps_cosines(rows):
    """Johnson–Lindenstrauss: the error of a cosine c has a standard deviation of about (1 − c²)/√rows."""
    width = 512
    covariance = covariance_of(width)
    root = torch.linalg.cholesky(covariance)
    for cosine in (0.0, 0.5, 0.9):
        a, b = random(2, 400, width, seed=rows)
        b = cosine * F.normalize(a, dim=-1) + math.sqrt(1 - cosine**2) * F.normalize(
            b - (b * a).sum(-1, keepdim=True) / a.square().sum(-1, keepdim=True) * a, dim=-1
        )
        projection = ops.projection_of(covariance, rows)
        found = (ops.directions(a @ root.T, projection) * ops.directions(b @ root.T, projection)).sum(-1)
        assert abs(found.mean().item() - cosine) < 0.02
        assert found.std().item() < 1.15 * (1 - cosine**2) / math.sqrt(rows)


def test_projection_rows_are_orthonormal_in_the_metric_and_always_the_same():
    covariance = covariance_of(40)
    state = torch.get_rng_state()
    projection = ops.projection_of(covariance, 16)
    assert torch.equal(torch.get_rng_state(), state)
    gram = projection @ covariance @ projection.T
    assert torch.allclose(gram / gram[0, 0], torch.eye(16, dtype=torch.float64), atol=1e-10)
    assert torch.equal(projection, ops.projection_of(covariance, 16))
    with pytest.raises(torch.linalg.LinAlgError):
        ops.projection_of(-covariance)


def test_scores_over_more_keys_than_one_chunk(monkeypatch):
    covariance, tokens, keys = covariance_of(D_IN), random(5, D_IN), random(10, D_IN, seed=1)
    projection = ops.projection_of(covariance)
    monkeypatch.setattr(ops, "_CHUNK", 3)
    scores = ops.nearest_scores(tokens, projection, ops.directions(keys, projection))
    np.testing.assert_allclose(scores, loop_cosines(tokens, keys, covariance).max(1).clip(0), atol=1e-12)


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.float16, torch.bfloat16])
def test_zero_is_like_nothing(dtype):
    layer = make_layer(dtype=dtype)
    x = torch.zeros(1, 3, D_IN, dtype=dtype)
    x[0, 1] = random(5, D_IN, seed=3)[0]
    scores = layer.scores(x)
    assert scores[0, [0, 2]].tolist() == [0, 0] and scores[0, 1] > 0.9
    assert torch.equal(layer(x)[0, [0, 2]], layer.base_layer(x)[0, [0, 2]])


def test_no_keys_and_no_covariance():
    layer = HookedLinear(nn.Linear(D_IN, D_OUT), "nearest")
    layer.delta.fill_(1.0)
    x = random(2, 3, D_IN, dtype=torch.float32)
    for _ in range(2):
        assert torch.equal(layer(x), layer.base_layer(x)) and not layer.scores(x).any() and layer.score.known_keys() == 0
        layer.score.fit(covariance_of(D_IN))
    bare = HookedLinear(nn.Linear(D_IN, D_OUT), "nearest")
    bare.score.set_keys(torch.zeros(0, D_IN))
    with pytest.raises(ComebaError, match="call fit"):
        bare.score.add_keys(random(1, D_IN))
    layer.score.set_keys(random(3, D_IN))
    layer.score.fit(covariance_of(D_IN, seed=51))
    assert layer.score.known_keys() == 0 and not layer.score.anchors.any()


WIDE = 300  # wider than a projection has rows: the first of them give a bound


def loop_scores(tokens, keys, projection) -> np.ndarray:
    """``(tokens,)``: means of two cosines, weighted by rows, at most ``ABOVE`` the largest first one; at least 0."""
    first, rest = projection[: ops.COARSE].numpy(), projection[ops.COARSE :].numpy()
    cosine = lambda part, a, b: (part @ a) @ (part @ b) / np.linalg.norm(part @ a) / np.linalg.norm(part @ b)  # noqa: E731
    found = []
    for token in tokens.double().numpy():
        pairs = [(cosine(first, token, key), cosine(rest, token, key)) for key in keys.double().numpy()]
        whole = max((len(first) * a + len(rest) * b) / len(projection) for a, b in pairs)
        found.append(max(min(whole, max(a for a, _ in pairs) + ops.ABOVE), 0))
    return np.array(found)


@pytest.mark.parametrize("noise", [0.3, 1.0])
def test_scores_are_bounded_by_the_coarse_ones(noise):
    layer = make_layer(keys=20, d_in=WIDE)
    x, keys = inputs(layer, seq=30, noise=noise), random(20, WIDE, seed=3)
    scores, expected = layer.scores(x).flatten(), loop_scores(x.flatten(0, 1), keys, layer.score.projection)
    np.testing.assert_allclose(scores, expected, atol=1e-12)
    cosines = loop_cosines(x.flatten(0, 1), keys, covariance_of(WIDE)).max(1)
    deviation = 2 * (1 - cosines**2) / math.sqrt(256)  # of the largest of twenty
    assert (np.abs(expected - cosines) < 3 * deviation + 0.02).all()


@pytest.mark.parametrize("width", [D_IN, WIDE])
@pytest.mark.parametrize("keys", [0, 20])
@torch.no_grad()
def test_peaks_are_the_rows_highest_scores(width, keys):
    layer = make_layer(keys=keys, d_in=width)
    for n, noise in enumerate((0.1, 1.0, 2.0, 4.0)):
        x = inputs(layer, batch=6, seq=20, seed=n, noise=noise) if keys else random(6, 20, width)
        x[0, 1::2] = x[0, 0]  # ties
        mask = torch.ones(6, 20, dtype=torch.bool)
        mask[1, :12], mask[2, 1:], x[1, :12] = False, False, math.nan
        expected = [layer.scores(x[b : b + 1])[0][mask[b]].max().item() for b in range(6)]
        assert layer.peak_scores(x, mask).tolist() == pytest.approx(expected, abs=1e-12)


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16])
@pytest.mark.parametrize("alpha", [-1.0, 0.0, 0.15, 0.25, 0.5, 0.7, 0.99])
@torch.no_grad()
def test_two_looks_decide_as_the_scores_do(alpha, dtype, monkeypatch):
    """Tokens from unlike to like a key; the second look is for few of them."""
    layer = make_layer(keys=20, alpha=alpha, d_in=WIDE, dtype=dtype)
    x = torch.cat([inputs(layer, seq=20, seed=n, noise=noise) for n, noise in enumerate((0.1, 0.5, 1.0, 2.0))], 1)
    mask = torch.ones(x.shape[:2], dtype=torch.bool)
    mask[0, :5], mask[1, -5:], x[0, :5] = False, False, math.nan
    scores = layer.scores(x)
    sure = (scores - alpha).abs() > (0.05 if dtype == torch.bfloat16 else 1e-4)  # rounding aside
    looked = []
    real = ops._second_look
    monkeypatch.setattr(ops, "_second_look", lambda *args: looked.append(len(args[-1][0])) or real(*args))
    changed = (layer(x, mask=mask) != layer.base_layer(x)).any(-1) & mask
    expected = (scores >= alpha) & mask
    assert torch.equal(changed[sure], expected[sure]) and sure.float().mean() > 0.6
    assert expected.sum() > 0
    assert sum(looked) == 150 if alpha <= 0 else expected.sum() <= sum(looked) <= (150 if alpha < 0.5 else 120)


# -- keys -----------------------------------------------------------------------------------------------------------


def test_one_key_stands_for_all_that_are_near():
    """Greedily in the order given, against a loop; in parts, the same."""
    subjects = random(30, D_IN, seed=6)
    angle = random(30, 8, D_IN, seed=7) * torch.logspace(-3, 0, 8, dtype=torch.float64)[:, None]
    keys = (subjects[:, None] + 0.3 * angle).flatten(0, 1)[torch.from_numpy(np.random.default_rng(0).permutation(240))]
    cosines, kept = loop_cosines(keys, keys, covariance_of(D_IN)), []
    for n in range(len(keys)):
        if not kept or cosines[n, kept].max() <= ops.SAME:
            kept.append(n)
    assert 30 < len(kept) < 200
    layer, whole = make_layer(0), make_layer(0)
    for part in keys.split(7):
        layer.score.add_keys(part)
    whole.score.set_keys(keys)
    assert layer.score.known_keys() == whole.score.known_keys() == len(kept)
    expected = ops.directions(keys[kept], layer.score.projection)
    for found in (layer, whole):
        assert torch.allclose(found.score.anchors[: len(kept)], expected, atol=1e-12)
    x = random(1, 9, D_IN, seed=8)
    np.testing.assert_allclose(layer.scores(x)[0], np.maximum(loop_cosines(x[0], keys[kept], covariance_of(D_IN)).max(1), 0), atol=1e-12)


def test_keys_accumulate_over_every_capacity():
    layer, keys = make_layer(0), random(700, D_IN, seed=4) @ torch.linalg.cholesky(covariance_of(D_IN)).T
    sizes, count = set(), 0
    for size in (1, 62, 1, 1, 100, 0, 400, 135):
        layer.score.add_keys(keys[count : count + size])
        count += size
        assert layer.score.known_keys() == count and len(layer.score.anchors) < 1.3 * count + 64
        sizes.add(len(layer.score.anchors))
        whole = make_layer(0)
        whole.score.set_keys(keys[:count])
        assert torch.allclose(layer.score.anchors[:count], whole.score.anchors[:count], atol=1e-12)
        assert not layer.score.anchors[count:].any()
    assert count == 700 and len(sizes) < 6
    x = random(1, 9, D_IN, seed=5)
    np.testing.assert_allclose(layer.scores(x)[0], loop_cosines(x[0], keys, covariance_of(D_IN)).max(1), atol=1e-12)
    layer.score.set_keys(keys[:2])
    np.testing.assert_allclose(layer.scores(x)[0], loop_cosines(x[0], keys[:2], covariance_of(D_IN)).max(1).clip(0), atol=1e-12)


@pytest.mark.parametrize("width", [D_IN, WIDE])
@torch.no_grad()
def test_every_anchor_has_its_own_threshold(width):
    """In scope where any key is as close as it asks for, and never where a key is not as close as α."""
    layer = make_layer(0, alpha=0.3, d_in=width)
    keys, own = random(6, width, seed=3), torch.tensor([0.9, 0.1, 0.5, 0.35, 0.99, 0.3])
    layer.score.add_anchors(layer.score.directions(keys), own)
    x = torch.cat([random(1, 40, width, seed=1), keys[None].repeat(1, 5, 1) + 0.6 * random(1, 30, width, seed=2)], 1)
    cosines = (layer.score.directions(x) @ layer.score.directions(keys).T)[0]
    needed = own.clamp(min=0.3)
    expected = (cosines >= needed).any(-1)
    sure = ((cosines - needed).abs() > 1e-6).all(-1)
    changed = (layer(x) != layer.base_layer(x)).any(-1)[0]
    if width == D_IN:  # all rows are looked at once: no bound from the first of them
        assert torch.equal(changed[sure], expected[sure])
    assert not (changed & ~expected & sure).any() and 5 < changed.sum() < 60
    assert torch.equal(changed, (layer.scores(x)[0] >= layer.alpha))
    scores = (cosines - (own - 0.3).clamp(min=0)).amax(-1).clamp(min=0)
    if width == D_IN:
        torch.testing.assert_close(layer.scores(x)[0], scores)
    mask = torch.ones(1, 70, dtype=torch.bool)
    assert layer.peak_scores(x, mask).item() == pytest.approx(layer.scores(x).max().item())


@torch.no_grad()
def test_who_stands_for_another_asks_for_as_little():
    layer = make_layer(0)
    unit = layer.score.directions(random(3, D_IN, seed=3))
    layer.score.add_anchors(unit, torch.tensor([0.8, 0.7, 0.6]))
    layer.score.add_anchors(unit[[1, 0, 1]], torch.tensor([0.65, 0.9, 0.5]))
    assert layer.score.known_keys() == 3 and layer.score.thresholds[:3].tolist() == pytest.approx([0.8, 0.5, 0.6])
    fresh = make_layer(0)
    fresh.score.add_anchors(unit[[0, 1, 2, 1, 0, 1]], torch.tensor([0.8, 0.7, 0.6, 0.65, 0.9, 0.5]))
    assert torch.equal(fresh.score.thresholds, layer.score.thresholds) and torch.allclose(fresh.score.anchors, layer.score.anchors)
    fresh.half()
    assert fresh.score.thresholds.dtype == torch.float32 and torch.equal(fresh.score.thresholds, layer.score.thresholds)


def test_a_zero_key_takes_no_other_keys_place():
    layer, keys = make_layer(0), random(4, D_IN, seed=4)
    layer.score.add_keys(torch.stack((keys[0], torch.zeros(D_IN, dtype=torch.float64), keys[1])))
    layer.score.add_keys(keys[2:])
    assert layer.score.known_keys() == 4
    assert torch.allclose(layer.scores(keys[None]), torch.ones(1, 4, dtype=torch.float64))


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32])
def test_a_key_whose_norm_overflows_half_precision(dtype):
    layer = make_layer(0, dtype=dtype)
    key = F.normalize(random(1, D_IN, seed=4), dim=-1) * 1e6
    layer.score.add_keys(key)
    assert torch.isfinite(layer.score.anchors).all() and layer.score.known_keys() == 1
    x = (key / 1e4).to(dtype)[None]
    assert layer.scores(x).item() == pytest.approx(1, abs=0.02)


@pytest.mark.parametrize("size", [1e-4, 1.0, 1e4])
@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_half_precision_over_orders_of_magnitude(dtype, size):
    """Whatever the covariance's unit, the projection and what comes out of it stay in range."""
    covariance = covariance_of(D_IN, condition=1e4) * size**2
    root = torch.linalg.cholesky(covariance)
    keys, tokens = random(5, D_IN, seed=1) @ root.T, random(20, D_IN, seed=2) @ root.T
    layer = HookedLinear(nn.Linear(D_IN, D_OUT, dtype=dtype), "nearest")
    layer.score.fit(covariance)
    layer.score.set_keys(keys)
    assert layer.score.projection.dtype == layer.score.anchors.dtype == dtype
    assert torch.isfinite(layer.score.projection).all() and layer.score.projection.abs().amax(1).min() > torch.finfo(dtype).smallest_normal
    scores = layer.scores(tokens.to(dtype)[None])[0]
    expected = loop_cosines(tokens, keys, covariance).max(1).clip(0)
    # 100, the root of the condition, is what whitening multiplies the rounding of an input by
    np.testing.assert_allclose(scores, expected, atol=100 * torch.finfo(dtype).eps)


def test_keys_come_without_a_graph_and_out_of_inference_mode():
    layer = make_layer(0)
    layer.score.add_keys(random(1, D_IN).requires_grad_())
    assert not layer.score.anchors.requires_grad
    with torch.inference_mode():
        layer.score.set_keys(random(2, D_IN, seed=1))
    layer.score.add_keys(random(2, D_IN, seed=2))
    assert layer.score.known_keys() == 4 and not layer.score.anchors.is_inference()


# -- the layer ------------------------------------------------------------------------------------------------------


def expected_output(layer, x):
    """Output and scope by the loop, for the keys of :func:`make_layer`."""
    width, keys = layer.in_features, random(layer.score.known_keys(), layer.in_features, seed=3)
    scores = loop_cosines(x.reshape(-1, width), keys, covariance_of(width)).max(1).reshape(x.shape[:-1])
    scope = torch.from_numpy(scores) >= float(layer.alpha)
    base = x.double() @ layer.weight.double().T + layer.bias.double()
    return torch.where(scope[..., None], base + x.double() @ layer.delta.double().T, base), scope


@torch.no_grad()
def test_out_of_scope_is_the_base_bit_for_bit():
    layer = make_layer(dtype=torch.float32)
    x = inputs(layer)
    base, (expected, scope) = layer.base_layer(x), expected_output(layer, x)
    assert 3 < scope.sum() < 13
    y = layer(x)
    assert torch.equal(y[~scope], base[~scope]) and torch.allclose(y.double(), expected, atol=1e-5)
    assert ((y != base).any(-1) == scope).all()
    edited = base + F.linear(x, layer.delta)
    assert torch.allclose(y[scope], edited[scope], rtol=1e-6, atol=1e-6)


@pytest.mark.parametrize("garbage", [0.0, 1e30, math.inf, math.nan])
@torch.no_grad()
def test_masks(garbage):
    layer = make_layer()
    x = inputs(layer)
    _, scope = expected_output(layer, x)
    mask = torch.ones(2, 8, dtype=torch.bool)
    mask[0, :3], mask[1, 6:] = False, False
    alone = layer(x)
    x[~mask] = garbage
    for given_mask in (mask, mask.long()):
        y = layer(x, mask=given_mask)
        assert torch.allclose(y[mask], alone[mask], rtol=1e-12, atol=1e-12)
        base = layer.base_layer(x)
        assert y[~mask].numpy().tobytes() == base[~mask].numpy().tobytes()
        assert ((y != base).any(-1)[mask] == scope[mask]).all()
    flat = layer(x.flatten(0, 1), mask=mask)
    assert flat.shape == (16, D_OUT) and torch.equal(flat.reshape(2, 8, -1)[mask], y[mask])


@pytest.mark.parametrize("shape", [(7, D_IN), (D_IN,), (1, 1, D_IN), (0, 3, D_IN), (2, 0, D_IN)])
@torch.no_grad()
def test_any_number_of_tokens(shape):
    layer, x = make_layer(alpha=-1.0), random(*shape)
    assert torch.allclose(layer(x), F.linear(x, layer.weight + layer.delta, layer.bias), rtol=1e-12, atol=1e-12)
    layer.alpha.fill_(2.0)
    assert torch.equal(layer(x), layer.base_layer(x))


@torch.no_grad()
def test_scope_does_not_depend_on_other_tokens():
    layer = make_layer(alpha=0.5, dtype=torch.float32)
    x = inputs(layer)
    whole = (layer(x) != layer.base_layer(x)).any(-1)
    for b in range(2):
        for t in range(8):
            token = x[b : b + 1, t : t + 1]
            assert bool((layer(token) != layer.base_layer(token)).any()) == bool(whole[b, t])


def test_gradients():
    layer = make_layer()
    x = inputs(layer, batch=1, seq=6)
    expected, scope = expected_output(layer, x)
    assert 0 < scope.sum() < 6
    x.requires_grad_()
    (gradient,) = torch.autograd.grad(layer(x).sum(), x)
    for t in range(6):
        weight = layer.weight + (layer.delta if scope[0, t] else 0)
        torch.testing.assert_close(gradient[0, t], weight.sum(0))
    assert torch.allclose(layer(x), expected, atol=1e-12)
    weight = layer.weight.grad
    layer(x.detach()).sum().backward()  # the base weight wants a gradient, as in training
    assert weight is None and layer.weight.grad is not None


@pytest.mark.parametrize("inplace", [False, True])
@pytest.mark.parametrize("apart", ["none", "some", "all"])
@torch.no_grad()
def test_operator_agrees_with_its_reference(inplace, apart):
    layer = make_layer()
    if apart != "none":
        keep_apart(layer, every=apart == "all")
    x = inputs(layer)
    mask = torch.ones(2, 8, dtype=torch.bool)
    mask[0, :2] = False
    layer.score.thresholds[1:3] = torch.tensor([0.95, 0.2])  # one above α, one below it
    arguments = (x, layer.delta, layer.score.projection, layer.score.anchors, layer.score.excess(layer.alpha), mask, layer.alpha)
    shards = (layer.score.shards, layer.shards.rows, layer.shards.left, layer.shards.right) if layer.shards else None
    arguments = (x, layer.delta if layer.score.needs_delta else None, *arguments[2:])
    assert layer.score.needs_delta == (apart != "all")
    output = layer.base_layer(x)
    kept, expected = output.clone(), ops.nearest_hook_ref(output, *arguments, shards)
    by_operator = output.clone()
    parts = shards or (None,) * 4
    torch.ops.comeba.nearest_hook_(by_operator, *arguments, *parts)
    found = ops.nearest_hook(output, *arguments, shards, inplace=inplace)
    assert torch.allclose(found, expected, rtol=1e-12) and torch.equal(by_operator, found)
    assert inplace == (found is output) and (inplace or torch.equal(output, kept))
    torch.library.opcheck(torch.ops.comeba.nearest_hook_, (kept, *arguments, *parts))


@pytest.mark.parametrize("backend, grad", [("inductor", False), ("aot_eager", False), ("aot_eager", True)])
def test_compiled_sees_new_keys(backend, grad):
    torch._dynamo.reset()
    layer = make_layer(dtype=torch.float32)
    layer.base_layer.requires_grad_(grad)
    compiled = torch.compile(layer, fullgraph=True, backend=backend)
    x = inputs(layer)
    with torch.set_grad_enabled(grad):
        torch.testing.assert_close(compiled(x), layer(x))
        outside = x[(layer.scores(x) < 0.4)]
        for count in (1, 2, 70, 200, 500):  # within the room there is, and beyond it, several times
            before = compiled(x)
            layer.score.add_keys(torch.cat((outside[:1] if count > 1 else outside[1:2], random(count - 1, D_IN, seed=count).float())))
            torch.testing.assert_close(compiled(x), layer(x))
            assert count > 2 or not torch.equal(compiled(x), before)
        layer.score.set_keys(torch.zeros(0, D_IN))
        torch.testing.assert_close(compiled(x), layer.base_layer(x))
        layer.alpha.fill_(-1.0)
        torch.testing.assert_close(compiled(x), layer(x))


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
@torch.no_grad()
def test_autocast(dtype):
    """Scores have the precision of the products there; a score of exactly α still counts."""
    layer = make_layer(dtype=torch.float32)
    x = inputs(layer)
    _, scope = expected_output(layer, x)
    with torch.autocast("cpu", dtype):
        y, base = layer(x), layer.base_layer(x)
        assert y.dtype == base.dtype == dtype
        assert torch.equal((y != base).any(-1), scope)
        layer.alpha.fill_(layer.scores(x)[0, 0].item() * (1 + torch.finfo(dtype).eps / 2))
        assert (layer(x)[0, 0] != base[0, 0]).any()


@torch.no_grad()
def test_an_edit_of_another_dtype_keeps_the_output_dtype():
    layer = HookedLinear(nn.Linear(D_IN, D_OUT).half(), "nearest", 0.5, dtype=torch.float32)
    layer.score.fit(covariance_of(D_IN))
    layer.score.set_keys(random(5, D_IN, seed=3))
    layer.delta.fill_(1.0)
    x = random(1, 3, D_IN, dtype=torch.float16)
    x[0, 1] = random(5, D_IN, seed=3)[2]
    y, base = layer(x), layer.base_layer(x)
    assert y.dtype == torch.float16 and (y != base).any(-1).tolist() == [[False, True, False]]


def same(a, b):
    x = inputs(a)
    for mode in ("off", "temporary", "validated"):
        a.mode = b.mode = mode
        assert torch.equal(a(x), b(x))
    assert a.score.known_keys() == b.score.known_keys()


@torch.no_grad()
def test_state_dict_into_a_fresh_layer():
    layer = make_layer(70, alpha=0.6)
    state = layer.state_dict()
    own = {"delta", "alpha", "score.projection", "score.anchors", "score.thresholds", "score.shards"}
    own |= {
        "score.named_thresholds",
        "score.names",
        "score.of_name",
        "score.ends",
        "score.of_end",
        "shards.left",
        "shards.right",
        "shards.rows",
    }
    assert set(state) == own | {"base_layer.weight", "base_layer.bias"}
    for other in (HookedLinear(nn.Linear(D_IN, D_OUT).double(), "nearest"), make_layer(3), make_layer(300)):
        model, container = nn.Sequential(layer), nn.Sequential(other)
        container.load_state_dict(model.state_dict())
        same(layer, other)
        other.score.add_keys(random(200, D_IN, seed=8) @ torch.linalg.cholesky(covariance_of(D_IN)).T)
        assert layer.score.known_keys() == 70 and other.score.known_keys() == 270
    bare = HookedLinear(nn.Linear(D_IN, D_OUT).double(), "nearest")
    make_layer().load_state_dict(bare.state_dict())
    before = other.state_dict()
    for wrong in ({"score.projection": state["score.projection"][:, 1:]}, {"score.anchors": state["score.anchors"][:, 1:]}):
        with pytest.raises(RuntimeError, match="size mismatch"):
            other.load_state_dict({**state, **wrong})
        assert all(other.state_dict()[name].shape == before[name].shape for name in ("score.projection", "score.anchors"))
    with pytest.raises(RuntimeError, match="anchors"):
        other.load_state_dict({name: t for name, t in state.items() if name != "score.anchors"})


@pytest.mark.parametrize("how", [copy.deepcopy, lambda x: pickle.loads(pickle.dumps(x)), "file"])
@torch.no_grad()
def test_copies_are_equal_and_independent(how):
    layer, file = make_layer(), io.BytesIO()
    if how == "file":
        torch.save(layer, file)
        file.seek(0)
        other = torch.load(file, weights_only=False)
    else:
        other = how(layer)
    same(layer, other)
    other.score.add_keys(random(1, D_IN, seed=8))
    assert (layer.score.known_keys(), other.score.known_keys()) == (5, 6)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float64])
@torch.no_grad()
def test_casting(dtype):
    layer = make_layer(dtype=torch.float32)
    _, scope = expected_output(layer, inputs(layer))
    x = inputs(layer).to(dtype)
    layer = nn.Sequential(layer).to(dtype)[0]
    assert layer.score.projection.dtype == layer.score.anchors.dtype == layer.delta.dtype == dtype and layer.alpha.dtype == torch.float64
    assert torch.equal((layer(x) != layer.base_layer(x)).any(-1), scope)
    layer.score.add_keys(random(100, D_IN, seed=8))
    assert layer.score.known_keys() == 105 and layer.score.anchors.dtype == dtype
    assert layer.to("meta").score.anchors.is_meta


@torch.no_grad()
def test_what_the_base_layer_handed_out_is_not_changed():
    layer, seen = make_layer(alpha=-1.0), []
    layer.base_layer.register_forward_hook(lambda module, args, output: seen.append(output))
    x = inputs(layer)
    output = layer(x)
    assert torch.equal(seen[0], F.linear(x, layer.weight, layer.bias)) and not torch.equal(seen[0], output)


@pytest.mark.cuda
@torch.no_grad()
def test_a_gpu_decides_like_a_cpu():
    layer = make_layer(keys=20, d_in=WIDE, dtype=torch.float32)
    x = torch.cat([inputs(layer, seq=20, seed=n, noise=noise) for n, noise in enumerate((0.1, 0.5, 1.0, 2.0))], 1)
    expected, score = layer(x), layer.scores(x)
    sure = (score - 0.5).abs() > 1e-3
    found = layer.cuda()(x.cuda()).cpu()
    assert torch.allclose(found[sure], expected[sure], rtol=1e-3, atol=1e-3)
    assert torch.allclose(layer.scores(x.cuda()).cpu(), score, atol=1e-4)


@pytest.mark.cuda
@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16])
@torch.no_grad()
def test_cuda_graph_replays_without_synchronising(dtype):
    layer = HookedLinear(nn.Linear(512, 320, dtype=dtype, device="cuda"), "nearest", 0.5)
    layer.delta.copy_(random(320, 512, seed=2) / 16)
    layer.score.fit(covariance_of(512).cuda())
    keys = random(100, 512, seed=3)
    layer.score.set_keys(keys.cuda())
    x = torch.cat((keys[:4], random(4, 512, seed=4))).to("cuda", dtype)[None]
    expected = layer(x)
    assert (expected != layer.base_layer(x)).any(-1).tolist() == [[True] * 4 + [False] * 4]
    graph, replayed = captured(layer, x)
    x.copy_(x.flip(1))
    graph.replay()
    assert torch.allclose(replayed, layer(x), rtol=1e-2, atol=1e-2) and not torch.allclose(replayed, expected)


# -- editing --------------------------------------------------------------------------------------------------------


def edited(tiny_model, tokenizer, family="gpt2", batches=3, background=True, **changes):
    editor = make_editor(small_model(tiny_model, family), tokenizer, scope="nearest", **changes)
    if not background:  # in 48 dimensions any text comes close
        editor.covariance.sample = KeySample()
        editor.set_covariance(editor.covariance)
    requests = some_requests(4 * batches)
    for n in range(batches):
        editor.edit(requests[4 * n : 4 * n + 4], target_values=random_values(4, seed=n))
    return editor, requests


def test_every_batch_is_in_scope_once_edited(tiny_model, tokenizer):
    editor = make_editor(small_model(tiny_model), tokenizer, scope="nearest")
    requests = some_requests(12)
    for n in range(3):
        batch = requests[4 * n : 4 * n + 4]
        editor.edit(batch, target_values=random_values(4, seed=n))
        assert all(scopes(editor, tokenizer, [request.text for request in batch]))
        assert_compares_with_the_live_keys(editor)


def test_before_a_covariance(tiny_model, tokenizer):
    editor = Editor(small_model(tiny_model), tokenizer, EditConfig(layers=(1, 2), prefixes=0, lam=20.0, scope="nearest"))
    with pytest.raises(CovarianceError, match="collect_covariance"):
        editor.edit(some_requests(1), target_values=random_values(1))
    editor.rollback(0)
    with torch.no_grad():
        expected = small_model(tiny_model)(ids_of(editor.model, tokenizer)).logits
        assert torch.equal(editor.model(ids_of(editor.model, tokenizer)).logits, expected)


def test_a_bad_covariance_changes_nothing(tiny_model, tokenizer, monkeypatch):
    good = make_editor(small_model(tiny_model), tokenizer, scope="nearest")
    editor = Editor(small_model(tiny_model), tokenizer, good.config)
    last = list(editor.layers)[-1]
    broken = copy.deepcopy(good.covariance)
    broken.moments[last] = -broken.moments[last]
    with pytest.raises(CovarianceError, match=f"{last}.*not positive definite"):
        editor.set_covariance(broken)
    real = ops.projection_of

    def failing(covariance):  # the memory takes it, the projection does not: a matter of rounding
        if torch.equal(covariance, good.covariance[last]):
            raise torch.linalg.LinAlgError("not positive definite")
        return real(covariance)

    monkeypatch.setattr(ops, "projection_of", failing)
    with pytest.raises(CovarianceError, match=f"{last}.*not positive definite"):
        editor.set_covariance(good.covariance)
    assert not editor.key_memory and editor.covariance is None
    assert not any(len(layer.score.projection) for layer in editor.layers.values())
    monkeypatch.undo()
    editor.set_covariance(good.covariance)
    editor.edit(some_requests(2), target_values=random_values(2))
    assert_compares_with_the_live_keys(editor)


@pytest.mark.parametrize("where", [((ComebaHK, "_exchange"),), ((KeyRecognition, "compare_with"), (KeyRecognition, "forget"))])
@pytest.mark.parametrize("error", [RuntimeError, KeyboardInterrupt])
def test_error_after_the_keys_were_taken_out(tiny_model, tokenizer, monkeypatch, where, error):
    """A request that supersedes takes its old key out first; an error then, or behind it, puts it back."""
    editor, requests = edited(tiny_model, tokenizer)
    before = snapshot(editor)

    def then_failing(real):
        def failing(*args, **kwargs):
            real(*args, **kwargs)
            raise error("in the middle")

        return failing

    for place in where:
        monkeypatch.setattr(*place, then_failing(getattr(*place)))
    again = EditRequest(requests[0].prompt, requests[0].subject, "Warsaw")
    for step in (
        lambda: editor.edit([again], target_values=random_values(1)),
        lambda: editor.retract("edit-3"),
        lambda: editor.rollback(1),
    ):
        with pytest.raises(error, match="in the middle"):
            step()
        assert_same(before, snapshot(editor))
        assert_compares_with_the_live_keys(editor)
    monkeypatch.undo()
    editor.edit([again], target_values=random_values(1))
    assert_compares_with_the_live_keys(editor)


def in_scope(editor, tokenizer, **run):
    """Scope of every token at every hooked layer, ``(layers, batch, seq)``, of one forward pass, and its result."""
    found = []

    def note(layer, args, output):
        found.append((output != layer.base_layer(args[0])).any(-1))

    handles = [layer.register_forward_hook(note) for layer in editor.layers.values()]
    with torch.no_grad():
        result = editor.model(**run)
    for handle in handles:
        handle.remove()
    return torch.stack([scope.reshape(run["input_ids"].shape) for scope in found]), result


@pytest.mark.parametrize("family", ["gpt2", "gptj", "llama"])
def test_padding_mates_and_cached_decoding(tiny_model, tokenizer, family):
    """Every way to run a text takes the same decisions for its tokens as running it alone in one pass. (Padding is nobody's.)"""
    editor, requests = edited(tiny_model, tokenizer, family, background=False, alpha_floor=0.1, unnamed_floor=0.4)
    texts = [requests[0].text + " Paris and Lima", "People say that " + requests[5].text, requests[9].text, TEXTS[0]]
    rows = [tokenizer(text)["input_ids"] for text in texts]
    alone = [in_scope(editor, tokenizer, input_ids=torch.tensor([row]))[0][:, 0] for row in rows]
    assert all(0 < scope.sum() < scope.numel() for scope in alone[:3])
    length = max(map(len, rows))
    for side in ("left", "right"):
        pads = [[tokenizer.pad_token_id] * (length - len(row)) for row in rows]
        ids = torch.tensor([pad + row if side == "left" else row + pad for row, pad in zip(rows, pads)])
        ones = [([0] * len(pad), [1] * len(row)) for row, pad in zip(rows, pads)]
        mask = torch.tensor([pad + row if side == "left" else row + pad for pad, row in ones])
        position = (mask.cumsum(-1) - 1).clamp(min=0)
        together, _ = in_scope(editor, tokenizer, input_ids=ids, attention_mask=mask, position_ids=position)
        for n, scope in enumerate(alone):
            assert torch.equal(together[:, n][:, mask[n].bool()], scope)
    for row, scope in zip(rows, alone):
        parts, cache = [], None
        for start, end in [(0, 4), *((n, n + 1) for n in range(4, len(row)))]:
            part, result = in_scope(editor, tokenizer, input_ids=torch.tensor([row[start:end]]), past_key_values=cache, use_cache=True)
            cache = result.past_key_values
            parts.append(part[:, 0])
        assert torch.equal(torch.cat(parts, 1), scope)


def test_half_precision_model(tiny_model, tokenizer):
    editor = make_editor(small_model(tiny_model).bfloat16(), tokenizer, scope="nearest")
    requests = some_requests(4)
    editor.edit(requests, target_values=random_values(4))
    assert {layer.score.anchors.dtype for layer in editor.layers.values()} == {torch.bfloat16}
    assert all(scopes(editor, tokenizer, [request.text for request in requests]))


def test_what_a_folder_for_inference_holds(tiny_model, tokenizer, tmp_path):
    """256 values an edit and the projection: next to nothing beside the rest, but there."""
    from comeba_ext import storage

    editor, _ = edited(tiny_model, tokenizer, batches=2)
    editor.save_pretrained(tmp_path, inference_only=True)
    saved = storage.read_file(tmp_path, storage.read_manifest(tmp_path), "adapter")
    for name, layer in editor.layers.items():
        assert len(layer.score.anchors) == 64 and saved[f"{name}.anchors"].shape == (layer.score.known_keys(), 48)
        assert 4 < layer.score.known_keys() <= 16  # two a request
        assert saved[f"{name}.projection"].shape == (48, 48)
        assert saved[f"{name}.thresholds"].shape == (layer.score.known_keys(),)
    for part, change in (
        ("anchors", lambda t: t[:, 1:]),
        ("projection", lambda t: t[:, 1:]),
        ("anchors", None),
        ("thresholds", lambda t: t[1:]),
        ("thresholds", None),
    ):
        damaged = {name: t.clone() for name, t in saved.items()}
        for name in editor.layers:
            if change is None:
                del damaged[f"{name}.{part}"]
            else:
                damaged[f"{name}.{part}"] = change(damaged[f"{name}.{part}"])
        storage.write_folder(tmp_path / "damaged", storage.read_manifest(tmp_path), {"adapter": damaged}, {})
        model = small_model(tiny_model)
        with pytest.raises(StorageError, match=part):
            load_edits(model, tmp_path / "damaged")
        assert not any(isinstance(module, HookedLinear) for module in model.modules())


# -- other methods --------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", [*WITH_VALUES, "FT", "FT-L"])
def test_every_method_edits_saves_and_loads(tiny_model, tokenizer, tmp_path, name):
    changes = {"alpha": 0.4} if name == "COMEBA-HK fixed threshold" else {}
    editor = make_method(name, small_model(tiny_model), tokenizer, scope="nearest", **changes)
    requests = some_requests(4)
    editor.edit(requests[:2], **given(editor, 2))
    editor.edit([requests[2], EditRequest(requests[0].prompt, requests[0].subject, "Warsaw")], **given(editor, 2, seed=1))
    if name not in NO_SHARES:
        editor.retract("edit-1")
    editor.save_pretrained(tmp_path)
    assert len(editor.layers) == len(LAYERS.get(name, (1, 2)))
    used = load_edits(small_model(tiny_model), tmp_path)
    again = Editor.from_pretrained(small_model(tiny_model), tokenizer, tmp_path)
    with torch.no_grad():
        for request in requests:
            ids = ids_of(editor.model, tokenizer, request.text)
            expected = editor.model(ids).logits
            assert torch.allclose(used(ids).logits, expected, atol=1e-3)
            assert torch.equal(again.model(ids).logits, expected)
    for each in (editor, again):
        each.edit(requests[3:], **given(each, 1, seed=2))
    for layer, other in zip(editor.layers.values(), again.layers.values()):
        assert torch.equal(layer.delta, other.delta)
    if editor.method.scored:
        assert_compares_with_the_live_keys(editor)
        if "fixed" in name:
            assert {layer.alpha.item() for layer in editor.layers.values()} == {0.4}
            assert all(scopes(editor, tokenizer, [requests[3].text]))
    else:
        assert not any(layer.score.known_keys() for layer in editor.layers.values())
