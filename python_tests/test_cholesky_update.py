"""The blocked Cholesky update against dense float64 linear algebra of numpy."""

import numpy as np
import pytest
import torch

from comeba_ext.ops.cholesky_update import cholesky_update, cholesky_update_ref


def problem(d: int, u: int, seed: int = 0):
    rng = np.random.default_rng(seed)
    a = rng.standard_normal((d, 2 * d))
    return a @ a.T / d, rng.standard_normal((d, u))


@pytest.mark.parametrize("update", [cholesky_update, cholesky_update_ref])
@pytest.mark.parametrize(("d", "u"), [(1, 1), (5, 1), (63, 3), (64, 16), (65, 7), (200, 1), (200, 50), (300, 40), (20, 30)])
def test_update_and_downdate_agree_with_numpy(update, d, u):
    c, k = problem(d, u)
    factor = torch.from_numpy(np.linalg.cholesky(c))
    keys = torch.from_numpy(k)
    before = factor.clone()
    up = update(factor, keys, 1)
    assert torch.equal(factor, before)
    expected = np.linalg.cholesky(c + k @ k.T)
    assert np.abs(up.numpy() - expected).max() <= 1e-12 * np.abs(expected).max() * d
    down = update(up, keys, -1)
    assert np.abs((down @ down.mT).numpy() - c).max() <= 1e-12 * np.abs(c).max() * d
    assert not down.triu(1).any()


def test_float32_is_as_good_as_refactorising():
    c, k = problem(256, 8)
    exact = np.linalg.cholesky(c + k @ k.T)
    factor, keys = torch.from_numpy(np.linalg.cholesky(c)).float(), torch.from_numpy(k).float()
    errors = [np.abs(f(factor, keys).numpy() - exact).max() for f in (cholesky_update, cholesky_update_ref)]
    assert errors[0] <= 2 * errors[1]


def test_error_stays_small_over_a_thousand_updates():
    c, _ = problem(80, 1)
    rng = np.random.default_rng(1)
    factor, total = torch.from_numpy(np.linalg.cholesky(c)), c.copy()
    for _ in range(1000):
        k = rng.standard_normal((80, 4))
        factor = cholesky_update(factor, torch.from_numpy(k))
        total += k @ k.T
    probe = rng.standard_normal((80, 3))
    expected = np.linalg.solve(total, probe)
    found = torch.cholesky_solve(torch.from_numpy(probe), factor).numpy()
    assert np.abs(found - expected).max() <= 1e-9 * np.abs(expected).max()


def test_losing_positive_definiteness_is_an_error():
    c, k = problem(100, 2)
    factor = torch.from_numpy(np.linalg.cholesky(c))
    before = factor.clone()
    with pytest.raises(torch.linalg.LinAlgError):
        cholesky_update(factor, 100 * torch.from_numpy(k), -1)
    assert torch.equal(factor, before)
