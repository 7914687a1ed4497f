"""The operators of the hooked layer against float64 loops over tokens: whatever implementation serves the device.

Run as it is, the plain-torch implementation on the CPU. Under ``COMEBA_EMULATE=1`` (test_emulated_kernels.py) the CUDA
kernels themselves, executed on the host; marked ``cuda``, on a GPU.
"""

import math

import pytest
import torch
from torch.nn import functional as F

from comeba_ext.ops import hooked_linear as ops
from comeba_ext.ops import subject_hook  # noqa: F401  (defines the operator)
from comeba_ext.ops.mentions import name_hash, suffix_hashes
from comeba_ext.ops.nearest_hook import directions
from comeba_ext.ops.sketch import rows_for, sketch_of

DEVICES = ["cpu", pytest.param("cuda", marks=pytest.mark.cuda)]
DTYPES = [torch.float32, torch.float16, torch.bfloat16]
SHAPES = [(1, 1, 8, 5), (1, 5, 16, 1192), (2, 7, 40, 33), (5, 1, 64, 16), (1, 20, 72, 50), (3, 9, 136, 130), (2, 31, 32, 24)]


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
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("of_output", DTYPES)
@pytest.mark.parametrize("d_out", [9, 48])  # one value at a time, and sixteen bytes where both are of one type
def test_an_edit_of_another_dtype(dtype, of_output, d_out, device):
    case = Case((2, 5, 16, d_out), dtype, "reference", device)
    base, edit = F.linear(case.x, case.weight, case.bias).to(of_output), F.linear(case.x, case.delta)
    expected = torch.where(case.scope.to(device)[..., None], base + edit.to(of_output), base)
    output = base.clone()
    torch.ops.comeba.exact_hook_(output, edit, *case.decision)
    assert torch.equal(output, expected)
    rounding = 2 * max(torch.finfo(dtype).eps, torch.finfo(of_output).eps) * expected.float().abs().max().item()
    output = base.clone()
    torch.ops.comeba.add_edits_(output, case.x, case.delta, case.scope.to(device))
    assert torch.allclose(output.float(), expected.float(), rtol=0, atol=rounding)  # the sums' order differs
    output = base.clone()
    torch.ops.comeba.gated_hook_(output, case.x, case.delta, case.delta, *case.decision)
    assert torch.allclose(output.float(), expected.float(), rtol=0, atol=rounding)


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("score", ["zscore", "reference"])
def test_gated_hook_under_autocast(score, device):
    """Inside a float32 model inputs are of half precision, and edits are not."""
    case = Case((2, 7, 40, 33), torch.bfloat16, score, device, sketched=True)
    output = F.linear(case.x, case.weight, case.bias)
    with torch.no_grad(), torch.autocast(device, torch.bfloat16):
        found, after = ops.gated_hook(output, case.x, case.delta.float(), case.sketch.float(), *case.decision)
    case.check(found, after)


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


# -- the edits of what a text names -----------------------------------------------------------------------------------


class NamedCase:
    """Tokens that name a subject, or only end as one does, at chosen cosines of its key; the outcome by loops over tokens and names.

    Every fourth hundredth of cosine that decides lies 0.05 or more from a threshold: a name counts from 0.5, an end from 0.8.
    Where a first look is taken, the cosine at its directions may be another one, by which an end is out; a name takes no such look.
    """

    KINDS = {  # what ends at a token, and how close its key is: (whole name?, cosine or those at either directions), or nothing
        "named": [(True, 0.6)],
        "ends alike": [(False, 0.6)],
        "ends alike, very near": [(False, 0.9)],
        "nothing": [],
        "named, another nearer": [(True, 0.6), (False, 0.95)],
        "named and far, another near": [(True, 0.3), (False, 0.9)],
        "named and far": [(True, 0.3), (False, 0.7)],
        "two ends": [(False, 0.86), (False, 0.95)],
        "ends alike, near at second look": [(False, (0.57, 1.0))],
        "named, near at second look": [(True, (0.1, 1.0)), (False, 0.9)],
    }

    def __init__(self, shape, dtype, device, masked=True):
        batch, seq, d_in, d_out = shape
        generator = torch.Generator().manual_seed(sum(shape))
        random = lambda *size: torch.randn(*size, generator=generator)  # noqa: E731
        rows = min(256, d_in)
        self.x, self.projection = random(batch, seq, d_in).to(dtype), (random(rows, d_in) / d_in**0.5).to(dtype)
        self.base = random(batch, seq, d_out).to(dtype)
        unit = directions(self.x.double(), self.projection.double())
        looks = [slice(0, 96), slice(96, rows)] if 96 < rows < d_in else [slice(0, rows)]
        names, ends, anchors, owners, self.ids = {}, [], [], [], torch.zeros(batch, seq + 1, dtype=torch.long)
        self.expected_shard = torch.full((batch, seq), -1)
        for n in range(batch * seq):
            b, t = divmod(n, seq)
            last = 100 + 2 * n
            self.ids[b, t + 1] = last
            kind = list(self.KINDS.values())[n % len(self.KINDS)]
            best = (0.0, -1)
            for whole, cosine in kind:
                shard = len(names)
                name = (self.ids[b, t].item(), last) if whole else (7, last)
                names[name_hash(list(name) if whole else [7 + shard, 8, last])] = shard
                ends.append((name_hash([last]), shard))
                if isinstance(cosine, tuple) and len(looks) == 1:
                    cosine = 0.7
                for c in (cosine, 0.1)[: 1 + shard % 2] if shard % 3 else (0.1, cosine):
                    parts = []
                    for look, own in zip(looks, c if isinstance(c, tuple) else (c, c), strict=False):
                        part = unit[b, t, look]
                        other = random(len(part)).double()
                        other -= (other @ part) / (part @ part) * part
                        parts.append(own * part + (1 - own**2) ** 0.5 * other * part.norm() / other.norm())
                    anchors.append(torch.cat(parts))
                    owners.append(shard)
                if isinstance(cosine, tuple):
                    best = (10.0, shard) if whole else best
                elif whole and cosine >= 0.5:
                    best = (10.0, shard)
                elif cosine >= 0.8:
                    best = max(best, (cosine, shard))
            self.expected_shard[b, t] = best[1]
        count = max(1, len(names))
        self.anchors = (torch.stack(anchors) if anchors else torch.zeros(0, rows)).to(dtype)
        owners = torch.tensor(owners, dtype=torch.long)
        width = 3
        sizes = torch.arange(count) % (width + 1)  # some shards have no factor
        self.rows = torch.where(torch.arange(width) < sizes[:, None], torch.arange(count * width).reshape(count, width), -1)
        self.left, self.right = random(count * width, d_out).to(dtype), (random(count * width, d_in) / d_in**0.5).to(dtype)
        tables = [
            torch.tensor(part, dtype=torch.long)
            for table in (sorted(names.items()), sorted(ends))
            for part in (zip(*table) if table else ((), ()))
        ]
        first = torch.tensor([int((owners < n).sum()) for n in range(count)])
        self.subjects = [*tables, first, torch.bincount(owners, minlength=count)]
        self.thresholds, self.named = torch.full((len(owners),), 0.8), torch.full((len(owners),), 0.5)
        self.alpha = torch.tensor(0.5, dtype=torch.float64)
        self.mask = torch.ones(batch, seq, dtype=torch.bool)
        if masked:
            self.mask[:, : seq // 5] = False
            self.expected_shard[~self.mask] = -1
        self.hashes = suffix_hashes(self.ids[:, 1:], self.ids[:, :1])
        most = (2, 2)
        self.arguments = [self.x, self.hashes, self.projection, self.anchors, self.thresholds, self.named, self.mask if masked else None,
                          self.alpha, *self.subjects, *most, self.rows, self.left, self.right]  # fmt: skip
        self.arguments = [a.to(device) if isinstance(a, torch.Tensor) else a for a in self.arguments]
        self.device = device

    def expected(self, dtype):
        output = self.base.to(dtype)
        for b, t in (self.expected_shard >= 0).nonzero().tolist():
            for row in self.rows[self.expected_shard[b, t]].tolist():
                if row >= 0:
                    output[b, t] += self.left[row].to(dtype) * (self.right[row].to(dtype) @ self.x[b, t].to(dtype))
        return output


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("shape", [(1, 1, 64, 5), (2, 17, 130, 33), (3, 20, 64, 16), (1, 40, 300, 140), (5, 1, 280, 24)])
@pytest.mark.parametrize("masked", [False, True])
def test_subject_hook(shape, dtype, device, masked):
    case = NamedCase(shape, dtype, device, masked)
    output = case.base.clone().to(device)
    torch.ops.comeba.subject_hook_(output, *case.arguments)
    changed = torch.tensor([[(case.rows[s] >= 0).any() if s >= 0 else False for s in row] for row in case.expected_shard.tolist()])
    assert torch.equal((output.cpu() != case.base).any(-1), changed.reshape(changed.shape[:2]))  # all else bit for bit
    exact, own = case.expected(torch.float64), case.expected(dtype).double()
    floor = torch.finfo(dtype).eps * exact.abs().max().item()
    assert (output.cpu().double() - exact).abs().max().item() <= max(2 * (own - exact).abs().max().item(), 4 * floor)


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("of_output", DTYPES)
def test_subject_hook_beside_an_output_of_another_dtype(dtype, of_output, device):
    case = NamedCase((2, 17, 130, 33), dtype, device)
    case.base = case.base.to(of_output)
    output = case.base.clone().to(device)
    torch.ops.comeba.subject_hook_(output, *case.arguments)
    exact, rough = case.expected(torch.float64), max(torch.finfo(dtype).eps, torch.finfo(of_output).eps)
    assert not torch.equal(output.cpu(), case.base)
    assert (output.cpu().double() - exact).abs().max().item() <= 4 * rough * exact.abs().max().item()


@pytest.mark.parametrize("device", DEVICES)
def test_subject_hook_with_nobody_to_name(device):
    case = NamedCase((2, 9, 64, 16), torch.float32, device)
    for empty in (8, 10):  # no names; then no ends either
        case.arguments[empty] = case.arguments[empty][:0]
        case.arguments[empty + 1] = case.arguments[empty + 1][:0]
        output = case.base.clone().to(device)
        torch.ops.comeba.subject_hook_(output, *case.arguments)
        near = case.expected_shard.clone()
        kinds = torch.arange(18).reshape(2, 9) % len(case.KINDS)
        changed = (output.cpu() != case.base).any(-1)
        assert not changed[kinds == 0].any() and (empty == 10) == (not changed.any()) and near.max() > 0
