"""HookedLinear and its op against literal float64 loops over tokens."""

import copy
import io
import math
import pickle

import numpy as np
import pytest
import torch
from torch import nn
from torch.nn import functional as F
from transformers.pytorch_utils import Conv1D

from comeba_ext.errors import ArchitectureError, ComebaError
from comeba_ext.layers.hooked_linear import HookedLinear
from comeba_ext.ops import hooked_linear as ops
from comeba_ext.ops.sketch import sketch_of

D_IN, D_OUT = 6, 5


def loop_zscores(norms: list[float]) -> list[float]:
    """Paper equation 9 for one sequence of real tokens, in Python floats."""
    if len(norms) < 2:
        return [0.0] * len(norms)
    mean = sum(norms) / len(norms)
    std = math.sqrt(sum((n - mean) ** 2 for n in norms) / (len(norms) - 1))
    return [(n - mean) / std for n in norms] if std > 0 else [0.0] * len(norms)


def loop_norm(vector: torch.Tensor) -> float:
    return math.sqrt(sum(float(v) ** 2 for v in vector))


def random(*shape, seed=0, dtype=torch.float64):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64).to(dtype)


COVARIANCE = (lambda a: a @ a.T)(random(D_IN, 3 * D_IN, seed=40))
KEYS = random(4, D_IN, seed=41)


def loop_cosines(tokens: torch.Tensor, keys: torch.Tensor = KEYS) -> list[float]:
    """Every token's largest cosine with a key, in the metric of the inverse of COVARIANCE, in numpy."""
    white = np.linalg.inv(np.linalg.cholesky(COVARIANCE.numpy()))
    found = []
    for token in tokens.double().numpy():
        a, others = white @ token, [white @ key for key in keys.numpy()]
        found.append(float(max(a @ b / np.sqrt((a @ a) * (b @ b)) for b in others)))
    return found


def compare(layer: HookedLinear) -> HookedLinear:
    """With scope "nearest", tell the layer its metric and keys."""
    if layer.scope == "nearest":
        layer.score.fit(COVARIANCE)
        layer.score.set_keys(KEYS)
    return layer


def make_layer(kind="linear", scope="zscore", alpha=0.5, dtype=torch.float64, bias=True, seed=0):
    """A hooked layer with random delta; returns it with its weight as ``(d_out, d_in)``."""
    if kind == "linear":
        base = nn.Linear(D_IN, D_OUT, bias=bias, dtype=dtype)
        base.weight.data.copy_(random(D_OUT, D_IN, seed=seed))
    else:
        base = Conv1D(D_OUT, D_IN).to(dtype)
        base.weight.data.copy_(random(D_IN, D_OUT, seed=seed))
    if base.bias is not None:
        base.bias.data.copy_(random(D_OUT, seed=seed + 1))
    layer = HookedLinear(base, scope, alpha)
    layer.delta.copy_(random(D_OUT, D_IN, seed=seed + 2))
    if scope != "nearest":
        layer.score.scale.fill_(10.0)
    return compare(layer)


def full_weight(layer) -> torch.Tensor:
    weight = layer.base_layer.weight.detach().double()
    return weight.T if isinstance(layer.base_layer, Conv1D) else weight


def loop_forward(layer, x, mask=None):
    """Validated output and scope of ``x`` (batch, seq, d_in), token by token in float64."""
    x = x.double()
    weight, delta = full_weight(layer), layer.delta.double()
    bias = layer.base_layer.bias.detach().double() if layer.base_layer.bias is not None else torch.zeros(D_OUT)
    output = torch.zeros(*x.shape[:2], D_OUT, dtype=torch.float64)
    scope = torch.zeros(x.shape[:2], dtype=torch.bool)
    for b in range(x.shape[0]):
        real = [t for t in range(x.shape[1]) if mask is None or bool(mask[b, t])]
        for t, score in zip(real, _loop_scores(layer, x[b, real]), strict=True):
            scope[b, t] = score >= float(layer.alpha)
        for t in range(x.shape[1]):
            output[b, t] = (weight + delta if scope[b, t] else weight) @ x[b, t] + bias
    return output, scope


# ---- the op -----------------------------------------------------------------------------------------------------


def test_edit_norm():
    edit = random(2, 3, D_OUT)
    expected = torch.tensor([[loop_norm(edit[b, t]) for t in range(3)] for b in range(2)], dtype=torch.float64)
    torch.testing.assert_close(ops.edit_norm(edit), expected)
    assert ops.edit_norm(edit.half()).dtype == torch.float32
    assert ops.edit_norm(torch.full((1, 1, 4), 6e4, dtype=torch.float16)).item() == pytest.approx(119_936, rel=1e-3)


@pytest.mark.parametrize("garbage", [0.0, 1e300, math.inf])
def test_zscore_is_the_loop_over_real_tokens(garbage):
    norm = random(3, 7).abs()
    mask = torch.tensor([[0, 0, 1, 1, 1, 1, 1], [1, 1, 1, 1, 0, 0, 0], [1, 0, 1, 1, 0, 1, 1]], dtype=torch.bool)
    score, statistics = ops.zscore(torch.where(mask, norm, garbage), mask)
    for b in range(3):
        norms = norm[b][mask[b]].tolist()
        assert score[b][mask[b]].tolist() == pytest.approx(loop_zscores(norms), abs=1e-12)
        mean = sum(norms) / len(norms)
        expected = [len(norms), mean, sum((n - mean) ** 2 for n in norms)]
        assert statistics[b].tolist() == pytest.approx(expected, abs=1e-12)


def test_zscore_without_mask():
    norm = random(2, 5).abs()
    score, _ = ops.zscore(norm)
    for b in range(2):
        assert score[b].tolist() == pytest.approx(loop_zscores(norm[b].tolist()), abs=1e-12)


@pytest.mark.parametrize("cuts", [(3,), (1, 2, 3, 4, 5, 6), (0, 4)])
def test_merged_statistics_are_those_of_the_concatenation(cuts):
    norm = random(2, 7, seed=5).abs() * 3 + 100
    mask = torch.tensor([[0, 0, 1, 1, 1, 1, 1], [1] * 7], dtype=torch.bool)
    whole_score, whole = ops.zscore(norm, mask)
    statistics = None
    for start, end in zip((0, *cuts), (*cuts, 7), strict=True):
        score, statistics = ops.zscore(norm[:, start:end], mask[:, start:end], statistics)
    torch.testing.assert_close(statistics, whole)
    last = cuts[-1]
    torch.testing.assert_close(score[mask[:, last:]], whole_score[:, last:][mask[:, last:]])


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_zscore_is_zero_where_undefined(dtype):
    one, _ = ops.zscore(torch.tensor([[3.0]], dtype=dtype))
    assert one.tolist() == [[0.0]]
    one_real, _ = ops.zscore(torch.tensor([[9.0, 3.0]], dtype=dtype), torch.tensor([[False, True]]))
    assert one_real[0, 1].item() == 0.0
    nothing_real, statistics = ops.zscore(torch.ones(1, 2, dtype=dtype), torch.zeros(1, 2, dtype=torch.bool))
    assert statistics.tolist() == [[0, 0, 0]] and torch.isfinite(nothing_real).all()
    # Equal norms have no spread, though their rounded mean differs from each of them.
    for value in (0.0, 0.1, 0.3, 7.7, 1e-6):
        for length in (3, 7, 11):
            equal, _ = ops.zscore(torch.full((1, length), value, dtype=dtype))
            assert equal.abs().max().item() == 0.0, (value, length)


def test_zscore_keeps_a_small_real_spread():
    for dtype, step in ((torch.float64, 1e-9), (torch.float32, 1e-4)):
        norms = torch.tensor([[1.0] * 9 + [1.0 + step]], dtype=dtype)
        score, _ = ops.zscore(norms)
        expected = loop_zscores(norms.double()[0].tolist())
        rounding = torch.finfo(dtype).eps / (step / math.sqrt(10))  # of the mean, in units of the spread
        assert score[0].tolist() == pytest.approx(expected, abs=2 * rounding)
        assert 2 * rounding < 0.1


def test_reference_score():
    norm = random(2, 4).abs()
    score = ops.reference_score(norm, torch.tensor(2.5, dtype=torch.float64))
    for b in range(2):
        assert score[b].tolist() == pytest.approx([float(n) ** 2 / 2.5 for n in norm[b]])
    assert ops.reference_score(norm, torch.tensor(0.0)).abs().max() == 0


def test_in_scope_is_at_least_alpha_up_to_rounding():
    alpha = torch.tensor(2.2, dtype=torch.float64)
    score = torch.tensor([[2.2, 2.2 - 1e-6, 2.19, 2.3]])
    assert ops.in_scope(score, alpha, None, torch.float32).tolist() == [[True, True, False, True]]
    mask = torch.tensor([[1, 1, 1, 0]])
    assert ops.in_scope(score, alpha, mask, torch.float32).tolist() == [[True, True, False, False]]
    for value in (-0.5, 0.0, 0.5):  # a score of exactly α counts on either side of zero
        exact = torch.tensor([[value]])
        assert ops.in_scope(exact, torch.tensor(value, dtype=torch.float64), None, torch.float32).item()
    assert not ops.in_scope(score, torch.tensor(math.inf), None, torch.float32).any()
    assert ops.in_scope(score, torch.tensor(-math.inf), None, torch.float32).all()


def test_swap_keeps_out_of_scope_tokens_bit_for_bit():
    output, edit = random(1, 3, 4, dtype=torch.float32), random(1, 3, 4, seed=1, dtype=torch.float32)
    output[0, 0, 0] = -0.0
    swapped = ops.swap(output, edit, torch.tensor([[False, True, False]]))
    assert swapped[0, [0, 2]].numpy().tobytes() == output[0, [0, 2]].numpy().tobytes()
    assert torch.equal(swapped[0, 1], output[0, 1] + edit[0, 1])


# ---- the module -------------------------------------------------------------------------------------------------

KINDS = [("linear", True), ("linear", False), ("conv1d", True)]


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.float16, torch.bfloat16])
@pytest.mark.parametrize("kind, bias", KINDS)
def test_off_is_bit_identical(kind, bias, dtype):
    layer = make_layer(kind, bias=bias, dtype=dtype)
    layer.mode = "off"
    x = random(2, 4, D_IN, dtype=dtype)
    assert torch.equal(layer(x), layer.base_layer(x))


@pytest.mark.parametrize("kind, bias", KINDS)
@pytest.mark.parametrize("shape", [(2, 4, D_IN), (7, D_IN), (D_IN,)])
def test_temporary_is_the_edited_layer(kind, bias, shape):
    layer = make_layer(kind, bias=bias)
    layer.mode = "temporary"
    x = random(*shape)
    expected = x @ (full_weight(layer) + layer.delta).T
    if bias:
        expected = expected + layer.base_layer.bias
    torch.testing.assert_close(layer(x), expected, rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize("scope, alpha", [("zscore", 0.5), ("reference", 2.0), ("nearest", 0.6)])
@pytest.mark.parametrize("kind, bias", KINDS)
def test_validated_is_the_loop(kind, bias, scope, alpha):
    layer = make_layer(kind, scope, alpha, bias=bias)
    x = random(3, 8, D_IN, seed=7)
    mask = torch.ones(3, 8, dtype=torch.bool)
    mask[0, :3] = False
    mask[1, 5:] = False
    x[~mask] *= 1e6
    expected, in_scope = loop_forward(layer, x, mask)
    assert 3 < in_scope.sum() < mask.sum() - 3
    for given in (mask, mask.long()):
        y = layer(x, mask=given)
        torch.testing.assert_close(y, expected, rtol=1e-12, atol=1e-12)
        assert torch.equal((y != layer.base_layer(x)).any(-1), in_scope)


@pytest.mark.parametrize("scope, alpha", [("zscore", 0.5), ("reference", 2.0), ("nearest", 0.6)])
def test_flat_tokens_are_one_sequence(scope, alpha):
    layer = make_layer(scope=scope, alpha=alpha)
    x = random(9, D_IN, seed=8)
    expected, in_scope = loop_forward(layer, x[None])
    assert 0 < in_scope.sum() < 9
    assert layer(x).shape == (9, D_OUT)
    torch.testing.assert_close(layer(x), expected[0], rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16])
@pytest.mark.parametrize("scope", ["zscore", "reference", "nearest"])
def test_validated_in_low_precision(scope, dtype):
    layer = make_layer(scope=scope, alpha=0.0, dtype=dtype)
    x = random(2, 8, D_IN, seed=9, dtype=dtype)
    # Half way between two scores, so that rounding cannot change the decision.
    scores = sorted(s for b in range(2) for s in _loop_scores(layer, x[b]))
    gap, low = max((b - a, a) for a, b in zip(scores[4:-4], scores[5:-3], strict=True))
    layer.alpha.fill_(low + gap / 2)
    expected, in_scope = loop_forward(layer, x)
    assert 0 < in_scope.sum() < 16
    y = layer(x)
    assert y.dtype == dtype
    assert torch.equal((y != layer.base_layer(x)).any(-1), in_scope)
    eps = torch.finfo(dtype).eps
    torch.testing.assert_close(y.double(), expected, rtol=2 * eps, atol=8 * eps)


def _loop_scores(layer, x):
    if layer.scope == "nearest":
        return loop_cosines(x)
    norms = [loop_norm(layer.delta.double() @ token) for token in x.double()]
    return loop_zscores(norms) if layer.scope == "zscore" else [n * n / float(layer.score.scale) for n in norms]


@pytest.mark.parametrize("mode", ["off", "temporary", "validated"])
def test_autocast(mode):
    layer = make_layer(dtype=torch.float32, alpha=1.0)
    layer.mode = mode
    x = random(2, 8, D_IN, dtype=torch.float32)
    with torch.autocast("cpu", torch.bfloat16):
        y, base = layer(x), layer.base_layer(x)
    assert y.dtype == base.dtype == torch.bfloat16
    if mode == "off":
        assert torch.equal(y, base)
    elif mode == "temporary":
        expected = x.double() @ (full_weight(layer) + layer.delta.double()).T + layer.base_layer.bias.double()
        torch.testing.assert_close(y.double(), expected, rtol=1e-2, atol=6e-2)
    else:
        expected, in_scope = loop_forward(layer, x)
        assert 0 < in_scope.sum() < 16
        assert torch.equal((y != base).any(-1), in_scope)
        torch.testing.assert_close(y.double(), expected, rtol=1e-2, atol=6e-2)


def test_an_edit_of_another_dtype_keeps_the_output_dtype():
    layer = HookedLinear(nn.Linear(D_IN, D_OUT).half(), alpha=0.5, dtype=torch.float32)
    layer.delta.copy_(random(D_OUT, D_IN))
    assert layer.delta.dtype == torch.float32
    for mode in ("off", "temporary", "validated"):
        layer.mode = mode
        assert layer(random(2, 5, D_IN, dtype=torch.float16)).dtype == torch.float16


@pytest.mark.parametrize("scope, alpha", [("zscore", 0.5), ("reference", 2.0), ("nearest", 0.6)])
@pytest.mark.parametrize("mode", ["off", "temporary", "validated"])
def test_compiled(mode, scope, alpha):
    torch._dynamo.reset()  # the code compiled for other tests counts towards its limit
    layer = make_layer(scope=scope, alpha=alpha, dtype=torch.float32)
    layer.mode = mode
    compiled = torch.compile(layer, fullgraph=True, backend="aot_eager")
    mask = torch.tensor([[0, 1, 1, 1, 1], [1, 1, 1, 1, 1]], dtype=torch.bool)
    x = random(2, 5, D_IN, dtype=torch.float32)
    torch.testing.assert_close(compiled(x, mask=mask), layer(x, mask=mask))
    torch.testing.assert_close(compiled(x[0]), layer(x[0]))
    layer.alpha.fill_(-10.0)  # an edit changes buffers in place: the compiled code must see it
    torch.testing.assert_close(compiled(x, mask=mask), layer(x, mask=mask))


def test_gradients_reach_the_input():
    layer = make_layer()
    x = random(1, 6, D_IN).requires_grad_()
    _, in_scope = loop_forward(layer, x.detach())
    assert 0 < in_scope.sum() < 6
    (gradient,) = torch.autograd.grad(layer(x).sum(), x)
    for t in range(6):
        weight = full_weight(layer) + (layer.delta if in_scope[0, t] else 0)
        torch.testing.assert_close(gradient[0, t], weight.sum(0))
    assert not layer.delta.requires_grad


def _same(a, b):
    x = random(2, 6, D_IN, dtype=a.delta.dtype)
    for mode in ("off", "temporary", "validated"):
        a.mode = b.mode = mode
        assert torch.equal(a(x), b(x))


def test_state_dict_round_trip():
    layer, other = make_layer(alpha=0.7), make_layer(alpha=2.2, seed=30)
    state = layer.state_dict()
    assert set(state) == {"delta", "alpha", "score.scale", "base_layer.weight", "base_layer.bias"}
    other.load_state_dict(state)
    assert other.alpha.item() == 0.7
    _same(layer, other)


@pytest.mark.parametrize("how", [copy.deepcopy, lambda x: pickle.loads(pickle.dumps(x))])
def test_copies_are_equal_and_independent(how):
    layer = make_layer()
    other = how(layer)
    _same(layer, other)
    layer.delta.zero_()
    assert other.delta.abs().sum() > 0


def test_torch_save_round_trip():
    layer, file = make_layer(), io.BytesIO()
    torch.save(layer, file)
    file.seek(0)
    _same(layer, torch.load(file, weights_only=False))


def test_casting_keeps_threshold_and_scale_exact():
    layer = make_layer(alpha=2.2, dtype=torch.float32)
    layer.score.scale.fill_(1e7)  # infinite in float16
    layer.half()
    assert layer.delta.dtype == layer.base_layer.weight.dtype == torch.float16
    assert (layer.alpha.item(), layer.score.scale.item()) == (2.2, 1e7)
    assert layer.to("meta").alpha.is_meta


def test_defaults_and_attributes():
    base = nn.Linear(D_IN, D_OUT).bfloat16()
    layer = HookedLinear(base)
    assert (layer.scope, layer.mode, layer.alpha.item()) == ("zscore", "validated", 2.2)
    assert HookedLinear(nn.Linear(2, 3), scope="reference").alpha.item() == math.inf
    assert HookedLinear(nn.Linear(2, 3), scope="nearest").alpha.item() == 1.0
    assert layer.delta.shape == (D_OUT, D_IN) and layer.delta.dtype == torch.bfloat16 and not layer.delta.any()
    assert layer.weight is base.weight and layer.bias is base.bias and layer.base_layer is base
    assert "base_layer" in repr(layer) and "Linear(in_features=6, out_features=5" in repr(layer)
    x = random(2, 5, D_IN, dtype=torch.bfloat16)
    assert torch.equal(layer(x), base(x))


def test_errors():
    layer = make_layer()
    with pytest.raises(ComebaError, match=r"'on'.*off, temporary, validated"):
        layer.mode = "on"
    assert layer.mode == "validated"
    with pytest.raises(ComebaError, match=r"'cosine'.*zscore, reference"):
        HookedLinear(nn.Linear(2, 2), scope="cosine")
    with pytest.raises(ArchitectureError, match="hooked already"):
        HookedLinear(layer)
    for module in (nn.LayerNorm(4), nn.Embedding(3, 4), nn.Sequential(nn.Linear(2, 2)), nn.Conv1d(2, 3, 1)):
        with pytest.raises(ArchitectureError, match=f"{type(module).__name__} is not a linear layer"):
            HookedLinear(module)


# ---- kinds of base layer ----------------------------------------------------------------------------------------


def _check_around(base, reference_weight, tolerance=1e-5):
    """Hook ``base``; temporary and validated outputs are its own output plus the loop's edits."""
    _check_around_by("nearest", base, reference_weight, tolerance)
    return _check_around_by("zscore", base, reference_weight, tolerance)


def _check_around_by(scope, base, reference_weight, tolerance):
    layer = compare(HookedLinear(base, scope, alpha=0.5))
    assert layer.delta.device.type == "cpu" and layer.delta.is_floating_point()
    layer.delta.copy_(random(D_OUT, D_IN))
    x = random(2, 7, D_IN, dtype=torch.float32)
    own = x.double() @ reference_weight.double().T
    edits = torch.stack([torch.stack([layer.delta.double() @ t for t in sequence.double()]) for sequence in x])
    scores = torch.tensor([_loop_scores(layer, sequence) for sequence in x])
    in_scope = scores >= 0.5
    assert 0 < in_scope.sum() < 14
    for mode, used in (
        ("off", torch.zeros_like(in_scope)),
        ("temporary", torch.ones_like(in_scope)),
        ("validated", in_scope),
    ):
        layer.mode = mode
        expected = own + edits * used[..., None]
        torch.testing.assert_close(layer(x).detach().double(), expected, rtol=tolerance, atol=tolerance)
    return layer


def test_around_lora():
    peft = pytest.importorskip("peft")
    model = nn.Sequential(nn.Linear(D_IN, D_OUT, bias=False))
    model = peft.get_peft_model(model, peft.LoraConfig(r=2, lora_alpha=6, target_modules=["0"]))
    lora = model.base_model.model[0]
    lora.lora_B["default"].weight.data.normal_()
    weight = lora.base_layer.weight + 3 * lora.lora_B["default"].weight @ lora.lora_A["default"].weight
    _check_around(lora, weight.detach())


def test_around_an_offloaded_layer():
    accelerate = pytest.importorskip("accelerate")
    base = nn.Linear(D_IN, D_OUT, bias=False)
    weight = base.weight.detach().clone()
    accelerate.cpu_offload(base, execution_device=torch.device("cpu"))
    assert base.weight.is_meta
    _check_around(base, weight)


class Int8Linear(nn.Module):
    def __init__(self, weight):
        super().__init__()
        self.out_features, self.in_features = weight.shape
        self.scale = weight.abs().max() / 127
        self.weight = nn.Parameter((weight / self.scale).round().to(torch.int8), requires_grad=False)

    def forward(self, x):
        return x @ (self.weight.to(x.dtype) * self.scale).T


def test_around_a_quantised_layer():
    base = Int8Linear(random(D_OUT, D_IN, seed=3, dtype=torch.float32))
    stored = base.weight.clone()
    layer = _check_around(base, base.weight.float() * base.scale)
    assert layer.delta.dtype == torch.float32
    assert torch.equal(base.weight, stored)


def test_around_torch_dynamic_quantisation():
    quantised = pytest.importorskip("torch.ao.nn.quantized.dynamic")
    base = quantised.Linear(D_IN, D_OUT)
    assert callable(base.weight)
    layer = HookedLinear(base, alpha=0.5)
    assert layer.delta.dtype == torch.float32


def test_a_non_contiguous_output_is_accepted():
    class Transposing(nn.Linear):
        def forward(self, x):
            return super().forward(x).transpose(0, 1).contiguous().transpose(0, 1)

    base = Transposing(D_IN, D_OUT, bias=False)
    assert not base(torch.zeros(2, 3, D_IN)).is_contiguous()
    _check_around(base, base.weight.detach())


# ---- the gate ---------------------------------------------------------------------------------------------------


def gated_pair(scope="reference", d_out=64, d_in=24, dtype=torch.float64):
    base = nn.Linear(d_in, d_out, dtype=dtype)
    base.weight.data.copy_(random(d_out, d_in))
    layers = []
    for gate in ("exact", "sketch"):
        layer = HookedLinear(base, scope, gate=gate)
        layer.delta.copy_(random(d_out, d_in, seed=2))
        layer.score.scale.fill_(float(d_out))
        layers.append(layer)
    return layers


@pytest.mark.parametrize("scope", ["zscore", "reference"])
@torch.no_grad()
def test_gate_decides_by_its_own_scores_and_adds_the_exact_edit(scope):
    exact, gated = gated_pair(scope)
    x = random(2, 9, 24, seed=5)
    scores = gated.scores(x)
    gated.alpha.copy_(scores.flatten().sort().values[-4:-2].mean())
    inside = scores >= gated.alpha
    base, edit = gated.base_layer(x), F.linear(x, gated.delta)
    assert inside.sum() == 3
    assert torch.allclose(gated(x), torch.where(inside[..., None], base + edit, base), rtol=1e-12)
    assert torch.equal(gated(x)[~inside], base[~inside])
    norms = F.linear(x, gated.score.sketch(gated.delta)).norm(dim=-1)
    oracle = norms**2 / 64 if scope == "reference" else torch.tensor([loop_zscores(row.tolist()) for row in norms], dtype=torch.float64)
    assert torch.allclose(scores, oracle, rtol=1e-10)
    assert not torch.allclose(scores, exact.scores(x))


@torch.no_grad()
def test_sketch_follows_delta():
    _, layer = gated_pair()
    first = layer.score.sketch(layer.delta)
    assert first.shape == (16, 24) and layer.score.sketch(layer.delta) is first
    layer.delta.mul_(2)
    assert torch.allclose(layer.score.sketch(layer.delta), 2 * first, rtol=1e-12)
    layer.load_state_dict({**layer.state_dict(), "delta": random(64, 24, seed=9)})
    assert torch.allclose(layer.score.sketch(layer.delta), sketch_of(random(64, 24, seed=9), 16), rtol=1e-12)
    for other in (copy.deepcopy(layer), pickle.loads(pickle.dumps(layer))):
        other.delta.neg_()
        assert torch.allclose(other.score.sketch(other.delta), -layer.score.sketch(layer.delta), rtol=1e-12)
    assert layer.float().score.sketch(layer.delta).dtype == torch.float32
    with torch.inference_mode():
        made = HookedLinear(nn.Linear(24, 64), gate="sketch")
        made.delta.fill_(1.0)
        assert made.score.sketch(made.delta).abs().sum() > 0


@torch.no_grad()
def test_gate_compiles_without_a_graph_break():
    torch._dynamo.reset()  # the code compiled for other tests counts towards its limit
    _, layer = gated_pair(dtype=torch.float32)
    x = random(2, 9, 24, seed=5, dtype=torch.float32)
    layer.alpha.copy_(layer.scores(x).median())
    assert torch.allclose(torch.compile(layer, fullgraph=True)(x), layer(x), atol=1e-5)


def test_gate_is_differentiable():
    _, layer = gated_pair()
    x = random(1, 5, 24, seed=5)
    layer.alpha.copy_(layer.scores(x).flatten().sort().values[2:4].mean())  # not at a token's own score
    assert torch.autograd.gradcheck(lambda x: layer(x), (x.requires_grad_(),))


@pytest.mark.parametrize("gate", ["exact", "sketch"])
@torch.no_grad()
def test_what_the_base_layer_handed_out_is_not_changed(gate):
    layer = gated_pair()[gate == "sketch"]
    layer.alpha.fill_(0.0)
    seen = []
    layer.base_layer.register_forward_hook(lambda module, args, output: seen.append(output))
    x = random(1, 5, 24, seed=5)
    output = layer(x)
    assert torch.equal(seen[0], F.linear(x, layer.weight, layer.bias)) and not torch.equal(seen[0], output)


# ---- on a GPU ---------------------------------------------------------------------------------------------------


def captured(layer, x):
    """A CUDA graph of ``layer(x)`` and its output, after a call in which any synchronisation is an error."""
    torch.cuda.synchronize()
    before = torch.cuda.get_sync_debug_mode()
    torch.cuda.set_sync_debug_mode("error")
    try:
        layer(x)
    finally:
        torch.cuda.set_sync_debug_mode(before)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        replayed = layer(x)
    return graph, replayed


@pytest.mark.cuda
@pytest.mark.parametrize("tokens", [1, 8, 64, 300])
@pytest.mark.parametrize("gate", ["exact", "sketch"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16])
@torch.no_grad()
def test_cuda_graph_replays_without_synchronising(gate, dtype, tokens):
    base = nn.Linear(256, 320, dtype=dtype, device="cuda")
    layer = HookedLinear(base, "reference", gate=gate)
    layer.delta.copy_(random(320, 256, seed=2) / 16)
    layer.score.scale.fill_(320.0)
    x = random(1, tokens, 256, seed=3).to("cuda", dtype)
    layer.alpha.copy_(layer.scores(x).median() * 0.999)
    expected = layer(x)  # compiles, warms up
    graph, replayed = captured(layer, x)
    x.copy_(x.flip(1) * 0.9)
    graph.replay()
    assert not torch.equal(replayed, expected)
    assert torch.allclose(replayed, layer(x), rtol=1e-2, atol=1e-2)


@pytest.mark.cuda
@pytest.mark.parametrize("gate", ["exact", "sketch"])
@torch.no_grad()
def test_compiled_with_reduced_overhead(gate):
    torch._dynamo.reset()
    layer = HookedLinear(nn.Linear(256, 320, device="cuda", dtype=torch.bfloat16), "reference", gate=gate)
    layer.delta.copy_(random(320, 256, seed=2) / 16)
    layer.score.scale.fill_(320.0)
    x = random(2, 20, 256, seed=3).to("cuda", torch.bfloat16)
    layer.alpha.copy_(layer.scores(x).median() * 0.999)
    compiled = torch.compile(layer, fullgraph=True, mode="reduce-overhead")
    for _ in range(3):
        found = compiled(x).clone()
    assert torch.allclose(found, layer(x), rtol=2e-2, atol=2e-2)
