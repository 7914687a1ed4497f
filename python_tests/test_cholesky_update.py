"""The Cholesky update against dense float64 linear algebra of numpy.

Run as it is, the plain-torch implementation; under ``COMEBA_EMULATE=1``, which the last test sets in a process of its own,
the CUDA kernels executed on the host.
"""

import os
import shutil
import subprocess
import sys

import numpy as np
import pytest
import torch

from comeba_ext.ops.cholesky_update import cholesky_update, cholesky_update_, cholesky_update_ref

EMULATED = os.environ.get("COMEBA_EMULATE") == "1"
SHAPES = [(1, 1), (5, 1), (63, 3), (64, 16), (65, 7), (129, 32), (200, 1), (200, 50), (300, 40), (300, 74), (20, 30), (4, 400)]


def problem(d: int, u: int, seed: int = 0, batch: tuple = ()):
    rng = np.random.default_rng(seed)
    a = rng.standard_normal((*batch, d, 2 * d))
    return a @ np.swapaxes(a, -1, -2) / d, rng.standard_normal((*batch, d, u))


def operator(factor, k, sign):
    """The operator itself, which never refactorises."""
    new = factor.clone()
    assert not torch.ops.comeba.cholesky_update_(new, k, sign).any()
    return new


def tensors(c, k, dtype=torch.float64):
    return torch.from_numpy(np.linalg.cholesky(c)).to(dtype), torch.from_numpy(k).to(dtype)


def product(k):
    return k @ np.swapaxes(k, -1, -2)


@pytest.mark.parametrize("update", [cholesky_update, operator, cholesky_update_ref])
@pytest.mark.parametrize(("d", "u"), SHAPES)
def test_update_and_downdate_agree_with_numpy(update, d, u):
    c, k = problem(d, u)
    factor, keys = tensors(c, k)
    before = factor.clone()
    up = update(factor, keys, 1)
    assert torch.equal(factor, before)
    expected = np.linalg.cholesky(c + product(k))
    assert np.abs(up.numpy() - expected).max() <= 1e-12 * np.abs(expected).max() * d
    down = update(up, keys, -1)
    size = np.abs(c + product(k)).max()  # what is taken away again leaves its rounding errors
    assert np.abs((down @ down.mT).numpy() - c).max() <= 1e-13 * size * d
    assert not down.triu(1).any()


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_batch_with_failures(dtype):
    c, k = problem(90, 5, batch=(2, 3))
    factor, keys = tensors(c, k, dtype)
    keys *= 0.01
    keys[0, 1] *= 1e4  # not positive definite
    keys[1, 0, 70, 2] = torch.nan
    keys[1, 1, 3, 4] = torch.inf
    factor[1, 2, 80, 11] = torch.nan
    before = factor.clone()
    info = cholesky_update_(factor, keys, -1)
    assert info.shape == (2, 3) and info.dtype == torch.int32
    assert info[0].tolist()[::2] == [0, 0] and (info[0, 1] > 0) and (info[1] > 0).all()
    assert 1 <= info[0, 1] <= 64 and 65 <= info[1, 0] <= 90 and 1 <= info[1, 1] <= 64 and 65 <= info[1, 2] <= 90
    for n in [(0, 1), (1, 0), (1, 1), (1, 2)]:
        assert torch.equal(factor[n].nan_to_num(nan=7.0), before[n].nan_to_num(nan=7.0))
    for n in (0, 2):
        small = keys[0, n].double().numpy()
        exact = np.linalg.cholesky(c[0, n] - small @ small.T)
        assert np.abs(factor[0, n].double().numpy() - exact).max() <= 100 * torch.finfo(dtype).eps * np.abs(exact).max()


@pytest.mark.parametrize(("d", "u"), [(150, 20), (20, 30)])
def test_what_is_above_the_diagonal_is_neither_read_nor_written(d, u):
    c, k = problem(d, u)
    factor, keys = tensors(c, k)
    upper = torch.full((d, d), torch.nan, dtype=torch.float64).triu(1)
    poisoned = torch.where(upper.isnan(), upper, factor)
    assert not cholesky_update_(poisoned, keys).any()
    assert poisoned.triu(1)[upper.isnan()].isnan().all()
    assert np.abs(poisoned.tril().numpy() - np.linalg.cholesky(c + product(k))).max() <= 1e-11


def test_strides():
    c, k = problem(100, 6, batch=(2,))
    factor, keys = tensors(c, k)
    wide = torch.full((2, 100, 300), torch.nan, dtype=torch.float64)
    wide[..., 1:201:2] = factor
    view, turned = wide[..., 1:201:2], keys.mT.contiguous().mT
    assert not view.is_contiguous() and not turned.is_contiguous()
    assert not cholesky_update_(view, turned).any()
    assert np.abs(view.numpy() - np.linalg.cholesky(c + product(k))).max() <= 1e-11
    assert wide[..., 0::2].isnan().all()


@pytest.mark.parametrize("shape", [((5, 5), (5, 0)), ((0, 0), (0, 3)), ((0, 5, 5), (0, 5, 2)), ((2, 5, 5), (2, 5, 0))])
def test_nothing_to_do(shape):
    factor = torch.eye(shape[0][-1], dtype=torch.float64).expand(shape[0]).clone()
    k = torch.ones(shape[1], dtype=torch.float64)
    before = factor.clone()
    info = cholesky_update_(factor, k)
    assert info.shape == shape[0][:-2] and not info.any() and torch.equal(factor, before)


def test_float32_is_as_good_as_refactorising():
    c, k = problem(256, 8)
    exact = np.linalg.cholesky(c + product(k))
    factor, keys = tensors(c, k, torch.float32)
    errors = [np.abs(f(factor, keys).numpy() - exact).max() for f in (cholesky_update, cholesky_update_ref)]
    assert errors[0] <= 2 * errors[1]


@pytest.mark.parametrize("count", [300 if EMULATED else 3000])
def test_error_stays_small_over_thousands_of_updates_and_downdates(count):
    c, _ = problem(80, 1)
    rng = np.random.default_rng(1)
    factor, live = torch.from_numpy(np.linalg.cholesky(c)), []
    for n in range(count):
        live.append(rng.standard_normal((80, 4)))
        assert not cholesky_update_(factor, torch.from_numpy(live[-1])).any()
        if n % 3:
            assert not cholesky_update_(factor, torch.from_numpy(live.pop(n % len(live))), -1).any()
    probe = rng.standard_normal((80, 3))
    expected = np.linalg.solve(c + sum(product(k) for k in live), probe)
    found = torch.cholesky_solve(torch.from_numpy(probe), factor).numpy()
    assert np.abs(found - expected).max() <= 1e-11 * np.abs(expected).max()


def test_losing_positive_definiteness_is_an_error():
    c, k = problem(100, 2)
    factor, keys = tensors(c, k)
    before = factor.clone()
    with pytest.raises(torch.linalg.LinAlgError):
        cholesky_update(factor, 100 * keys, -1)
    assert torch.equal(factor, before)


@pytest.mark.parametrize(
    "factor, k, sign",
    [
        (torch.eye(4), torch.ones(4, 1), 0),
        (torch.eye(4), torch.ones(3, 1), 1),
        (torch.ones(4, 3), torch.ones(4, 1), 1),
        (torch.eye(4), torch.ones(4), 1),
        (torch.eye(4), torch.ones(2, 4, 1), 1),
        (torch.eye(4), torch.ones(4, 1, dtype=torch.float64), 1),
        (torch.eye(4).half(), torch.ones(4, 1).half(), 1),
    ],
)
def test_unfit_arguments(factor, k, sign):
    with pytest.raises(ValueError):
        cholesky_update_(factor, k, sign)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("batch", [(), (2,)])
def test_operator_is_registered_correctly(dtype, batch):
    for u in (3, 0):
        factor, keys = tensors(*problem(70, u, batch=batch), dtype)
        torch.library.opcheck(torch.ops.comeba.cholesky_update_.default, (factor, keys, 1))


def test_compiles_without_graph_breaks():
    factor, keys = tensors(*problem(70, 3))
    expected = cholesky_update_ref(factor, keys)

    def step(factor, keys):
        info = cholesky_update_(factor, keys)
        return factor @ factor.mT, info

    try:
        found, info = torch.compile(step, fullgraph=True, backend="aot_eager")(factor, keys)
    finally:
        torch.compiler.reset()
    assert not info.any()
    assert torch.allclose(factor, expected, rtol=1e-10, atol=1e-12)
    assert torch.allclose(found, expected @ expected.mT, rtol=1e-10, atol=1e-12)


@pytest.mark.skipif(EMULATED or not shutil.which(os.environ.get("CXX", "g++")), reason="needs a C++ compiler")
@pytest.mark.skipif(sys.platform != "linux", reason="the emulation runs on Linux")
def test_kernels_on_the_host():
    """The tests above, through the CUDA kernels."""
    environment = {**os.environ, "COMEBA_EMULATE": "1"}
    environment.pop("COMEBA_DISABLE_EXTENSION", None)
    # Once more on a smaller GPU, whose blocks have no room for float64's 32 keys at once.
    code = (
        "import os, sys, pytest, comeba_ext.kernels.loader as loader; loader.load_emulated();"
        "tests = lambda *which: pytest.main([*which, '-q', '-p', 'no:cacheprovider']);"
        "failed = tests(sys.argv[1]); os.environ['COMEBA_EMULATION_SHARED'] = '99';"
        "sys.exit(failed or tests(sys.argv[1] + '::test_update_and_downdate_agree_with_numpy'))"
    )
    done = subprocess.run([sys.executable, "-c", code, __file__], env=environment, capture_output=True, text=True, timeout=900)
    assert done.returncode == 0, done.stdout[-5000:] + done.stderr[-2000:]
