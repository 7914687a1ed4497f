"""The operators of the hooked layer against float64 loops over tokens: whatever implementation serves the device.

Run as it is, the plain-torch implementation on the CPU. Under ``COMEBA_EMULATE=1`` (test_emulated_kernels.py) the CUDA
kernels themselves, executed on the host; marked ``cuda``, on a GPU.
"""

import math

import pytest
import torch
from torch.nn import functional as F

from comeba_ext.ops import hooked_linear as ops
from comeba_ext.ops.sketch import rows_for, sketch_of

DEVICES = ["cpu", pytest.param("cuda", marks=pytest.mark.cuda)]
DTYPES = [torch.float32, torch.float16, torch.bfloat16]
SHAPES = [(1, 1, 8, 5), (2, 7, 40, 33), (5, 1, 64, 16), (1, 20, 72, 50), (3, 9, 136, 130), (2, 31, 32, 24)]


@pytest.fixture(autouse=True)
def poisoned():
    """Uninitialised memory is NaN, so that an element nobody wrote shows."""
    torch.use_deterministic_algorithms(True)
    yield
    torch.use_deterministic_algorithms(False)


class Case:
    """Inputs of one layer, and the outcome of literal loops over its tokens in float64."""

    def __init__(self, shape, dtype, score, device, masked=True, history=True, sketched=False):
        batch, seq, d_in, d_out = shape
        generator = torch.Generator().manual_seed(sum(shape))
        random = lambda *size: torch.randn(*size, generator=generator).to(dtype)  # noqa: E731
        self.x, self.weight = random(batch, seq, d_in), random(d_out, d_in) / d_in**0.5
        self.x = self.x * torch.linspace(0.2, 2.0, batch * seq).view(batch, seq, 1).to(dtype)  # spread the norms
        self.delta, self.bias = random(d_out, d_in) / d_in**0.5, random(d_out)
        self.sketch = sketch_of(self.delta, rows_for(d_out)) if sketched else None
        self.mask = torch.ones(batch, seq, dtype=torch.bool)
        if masked:
            for b in range(batch):
                self.mask[b, : b % seq if seq else 0] = False
        self.statistics = torch.tensor([[3.0 + b, 2.0, 1.5] for b in range(batch)]).view(batch, 3) if history else None
        self.score, self.scale = score, torch.tensor(float(d_out), dtype=torch.float64)
        self.scores, self.after = self._scores()
        # Half of the tokens in scope, with the threshold as far from any score as it can be.
        ordered = sorted(s for s in self.scores.flatten().tolist() if not math.isnan(s))
        middle = ordered[len(ordered) // 4 :] or ordered
        gap, upper = max(((b - a, b) for a, b in zip(middle, middle[1:])), default=(2.0, ordered[0] if ordered else 0.0))
        self.alpha = torch.tensor(upper - gap / 2, dtype=torch.float64)
        self.scope = self.scores >= float(self.alpha)  # NaN is out of scope
        for name in ("x", "weight", "delta", "bias", "sketch", "mask", "statistics", "alpha", "scale"):
            value = getattr(self, name)
            setattr(self, name, None if value is None else value.to(device))
        self.mask = self.mask if masked else None

    def _scores(self):
        response = (self.sketch if self.sketch is not None else self.delta).double()
        scores = torch.full(self.x.shape[:2], float("nan"), dtype=torch.float64)
        after = []
        for b in range(self.x.shape[0]):
            real = [t for t in range(self.x.shape[1]) if self.mask[b, t]]
            norms = [float((response @ self.x[b, t].double()).norm()) for t in real]
            if self.score == "reference":
                for t, norm in zip(real, norms):
                    scores[b, t] = norm**2 / float(self.scale)
                continue
            sample = list(norms)
            if self.statistics is not None:  # a sample with that count, mean and sum of squared deviations
                count, mean, deviation = (float(v) for v in self.statistics[b])
                half = math.sqrt(deviation / 2)
                sample += [mean + half, mean - half] + [mean] * round(count - 2)
            mean = sum(sample) / max(1, len(sample))
            squares = sum((n - mean) ** 2 for n in sample)
            std = math.sqrt(squares / (len(sample) - 1)) if len(sample) > 1 else 0.0
            for t, norm in zip(real, norms):
                scores[b, t] = (norm - mean) / std if std > 0 else 0.0
            after.append([len(sample), mean, squares])
        return scores, torch.tensor(after, dtype=torch.float64)

    @property
    def decision(self):
        return self.mask, self.statistics, self.alpha, self.scale, self.score

    def expected(self, product):
        """``product(x, weight) + bias``, plus ``product(x, delta)`` in scope."""
        base, edit = product(self.x, self.weight) + self.bias.to(product(self.x, self.weight)), product(self.x, self.delta)
        return torch.where(self.scope[..., None].to(base.device), base + edit, base)

    def check(self, output, after):
        """At most twice torch's own error in the same dtype, and the right statistics."""
        exact = self.expected(lambda x, matrix: x.double() @ matrix.double().mT)
        own = self.expected(lambda x, matrix: F.linear(x, matrix))
        error = lambda value: (value.double() - exact).abs().max().item() if exact.numel() else 0.0  # noqa: E731
        floor = torch.finfo(output.dtype).eps * exact.abs().max().item() if exact.numel() else 0.0
        assert error(output) <= max(2 * error(own), floor)
        if self.score == "zscore":
            tolerance = {torch.float32: 1e-5, torch.float16: 2e-3, torch.bfloat16: 1e-2}[output.dtype]
            assert torch.allclose(after.double().cpu(), self.after, rtol=tolerance, atol=tolerance)


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("score", ["zscore", "reference"])
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize("sketched", [False, True])
def test_decode_hook(shape, dtype, score, device, sketched):
    case = Case(shape, dtype, score, device, sketched=sketched)
    output, after = torch.ops.comeba.decode_hook(case.x, case.weight, case.bias, case.delta, case.sketch, *case.decision)
    case.check(output, after)


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("score", ["zscore", "reference"])
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("shape", SHAPES)
def test_exact_hook(shape, dtype, score, device):
    case = Case(shape, dtype, score, device)
    output = F.linear(case.x, case.weight, case.bias)
    base, edit = output.clone(), F.linear(case.x, case.delta)
    after = torch.ops.comeba.exact_hook_(output, edit, *case.decision)
    scope = case.scope.to(device)[..., None]
    assert torch.equal(output, torch.where(scope, base + edit, base))  # bit for bit, in scope and out of it
    case.check(output, after)


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("score", ["zscore", "reference"])
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("shape", SHAPES)
def test_gated_hook(shape, dtype, score, device):
    case = Case(shape, dtype, score, device, sketched=True)
    output = F.linear(case.x, case.weight, case.bias)
    base = output.clone()
    after = torch.ops.comeba.gated_hook_(output, case.x, case.delta, case.sketch, *case.decision)
    case.check(output, after)
    outside = ~case.scope.to(device)
    assert torch.equal(output[outside], base[outside])


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("shape", [*SHAPES, (1, 150, 24, 40), (0, 4, 8, 6), (2, 0, 8, 6)])
def test_add_edits(shape, dtype, device):
    case = Case(shape, dtype, "reference", device)
    output = F.linear(case.x, case.weight, case.bias)
    base, scope = output.clone(), case.scope.to(device)
    torch.ops.comeba.add_edits_(output, case.x, case.delta, scope)
    case.check(output, None)
    assert torch.equal(output[~scope], base[~scope])
    for all_in in (False, True):
        case.scope = torch.full_like(case.scope, all_in)
        output = base.clone()
        torch.ops.comeba.add_edits_(output, case.x, case.delta, torch.full_like(scope, all_in))
        case.check(output, None)


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("score", ["zscore", "reference"])
@pytest.mark.parametrize("masked, history", [(False, False), (True, False), (False, True)])
def test_without_mask_or_history(score, device, masked, history):
    for sketched in (False, True):
        case = Case((2, 6, 16, 20), torch.float32, score, device, masked, history, sketched)
        output, after = torch.ops.comeba.decode_hook(case.x, case.weight, case.bias, case.delta, case.sketch, *case.decision)
        case.check(output, after)
        output = F.linear(case.x, case.weight, case.bias)
        if sketched:
            after = torch.ops.comeba.gated_hook_(output, case.x, case.delta, case.sketch, *case.decision)
        else:
            after = torch.ops.comeba.exact_hook_(output, F.linear(case.x, case.delta), *case.decision)
        case.check(output, after)


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("alpha, all_in", [(math.inf, False), (-math.inf, True)])
def test_nothing_or_everything_in_scope(alpha, all_in, device):
    case = Case((2, 40, 24, 70), torch.float32, "reference", device, masked=False, sketched=True)
    case.alpha = torch.tensor(alpha, dtype=torch.float64, device=device)
    case.scope = torch.full_like(case.scope, all_in)
    for output, after in (
        torch.ops.comeba.decode_hook(case.x[:1], case.weight, case.bias, case.delta, case.sketch, *case.decision),
        torch.ops.comeba.decode_hook(case.x[:1], case.weight, case.bias, case.delta, None, *case.decision),
    ):
        assert after.numel() == 0
        expected = F.linear(case.x[:1], case.weight + all_in * case.delta, case.bias)
        assert torch.allclose(output, expected, rtol=1e-5, atol=1e-5)
    output = F.linear(case.x, case.weight, case.bias)
    base = output.clone()
    after = torch.ops.comeba.gated_hook_(output, case.x, case.delta, case.sketch, *case.decision)
    case.check(output, after)
    assert all_in or torch.equal(output, base)


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("score", ["zscore", "reference"])
@pytest.mark.parametrize("shape", [(0, 4, 8, 6), (2, 0, 8, 6)])
def test_no_tokens(shape, score, device):
    case = Case(shape, torch.float32, score, device, masked=False)
    batch, seq, _, d_out = shape
    output, after = torch.ops.comeba.decode_hook(case.x, case.weight, case.bias, case.delta, None, *case.decision)
    assert output.shape == (batch, seq, d_out)
    output = torch.ops.comeba.exact_hook_(output, output.clone(), *case.decision)
    expected = (batch, 3) if score == "zscore" else (0,)
    assert after.shape == output.shape == expected
    assert score == "reference" or torch.equal(after, case.statistics)


@pytest.mark.parametrize("device", DEVICES)
def test_strides(device):
    """Outputs, inputs and matrices that are views with odd strides and offsets."""
    case = Case((2, 7, 40, 33), torch.float32, "zscore", device, sketched=True)
    skewed = lambda t: torch.stack((t, t), -1)[..., 1]  # noqa: E731
    offset = lambda t: torch.cat((t.new_zeros(1), t.flatten()))[1:].view(t.shape)  # noqa: E731
    for view in (skewed, offset):
        matrices = [view(m) for m in (case.weight, case.bias, case.delta, case.sketch)]
        output, after = torch.ops.comeba.decode_hook(view(case.x), *matrices, *case.decision)
        case.check(output, after)
        output = skewed(F.linear(case.x, case.weight, case.bias))
        after = torch.ops.comeba.gated_hook_(output, view(case.x), matrices[2], matrices[3], *case.decision)
        case.check(output, after)
        output = skewed(F.linear(case.x, case.weight, case.bias))
        torch.ops.comeba.add_edits_(output, view(case.x), matrices[2], skewed(case.scope.to(device)))
        case.check(output, after)
        output = skewed(F.linear(case.x, case.weight, case.bias))
        case.sketch, kept = None, case.sketch
        exact = Case((2, 7, 40, 33), torch.float32, "zscore", device)
        after = torch.ops.comeba.exact_hook_(output, view(F.linear(case.x, case.delta)), *exact.decision)
        exact.check(output, after)
        case.sketch = kept


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("d_in", [1, 3, 13, 36])
def test_odd_widths(d_in, device):
    case = Case((2, 5, d_in, 9), torch.float32, "reference", device, sketched=True)
    output, after = torch.ops.comeba.decode_hook(case.x, case.weight, case.bias, case.delta, case.sketch, *case.decision)
    case.check(output, after)


@pytest.mark.parametrize("device", DEVICES)
def test_an_edit_of_another_dtype(device):
    case = Case((2, 5, 16, 9), torch.float32, "reference", device)
    output = F.linear(case.x, case.weight, case.bias).bfloat16()
    base, edit = output.clone(), F.linear(case.x, case.delta)
    torch.ops.comeba.exact_hook_(output, edit, *case.decision)
    expected = torch.where(case.scope.to(device)[..., None], base + edit.bfloat16(), base)
    assert torch.equal(output, expected)
    torch.ops.comeba.add_edits_(base, case.x, case.delta, case.scope.to(device))
    assert torch.allclose(base, expected, rtol=2**-7)  # the sums' order differs


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("score", ["zscore", "reference"])
def test_opcheck(score, device):
    case = Case((2, 5, 16, 9), torch.float32, score, device, sketched=True)
    output = F.linear(case.x, case.weight, case.bias)
    torch.library.opcheck(torch.ops.comeba.exact_hook_, (output, F.linear(case.x, case.delta), *case.decision))
    torch.library.opcheck(torch.ops.comeba.gated_hook_, (output, case.x, case.delta, case.sketch, *case.decision))
    torch.library.opcheck(torch.ops.comeba.add_edits_, (output, case.x, case.delta, case.scope.to(device)))
    for sketch in (None, case.sketch):
        arguments = (case.x, case.weight, case.bias, case.delta, sketch, *case.decision)
        torch.library.opcheck(torch.ops.comeba.decode_hook, arguments)


@pytest.mark.parametrize("inplace", [False, True])
def test_public_functions_agree_with_their_references(inplace):
    case = Case((2, 7, 40, 33), torch.float32, "zscore", "cpu", sketched=True)
    output, edit = F.linear(case.x, case.weight, case.bias), F.linear(case.x, case.delta)
    for found, expected in (
        (
            ops.gated_hook(output.clone(), case.x, case.delta, case.sketch, *case.decision, inplace=inplace),
            ops.gated_hook_ref(output, case.x, case.delta, case.sketch, *case.decision),
        ),
        (ops.exact_hook(output.clone(), edit, *case.decision, inplace=inplace), ops.exact_hook_ref(output, edit, *case.decision)),
    ):
        assert torch.allclose(found[0], expected[0], atol=1e-5) and torch.allclose(found[1], expected[1], atol=1e-5)
    kept = output.clone()
    ops.exact_hook(output, edit, *case.decision)
    assert torch.equal(output, kept)  # not in place unless asked
