"""KeyMemory against dense float64 algebra."""

import pytest
import torch

from comeba_ext.editing.key_memory import KeyMemory
from comeba_ext.errors import CovarianceError


def random(*shape, seed=0):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def positive(d=24, seed=0):
    a = random(d, 3 * d, seed=seed)
    return a @ a.T / d


def close(found, expected):
    return ((found - expected).norm() / expected.norm()).item() < 1e-12


def test_matrix_and_solve():
    C, K = positive(), random(24, 5, seed=1)
    memory = KeyMemory(C)
    assert close(memory.matrix(), C)
    assert close(memory.solve(K), torch.linalg.inv(C) @ K)
    assert memory.solve(K.float()).dtype == torch.float64


def test_many_updates_and_downdates():
    C = positive()
    memory, dense, keys = KeyMemory(C), C.clone(), []
    for n in range(40):
        K = random(24, 1 + n % 4, seed=n)
        memory.update(K)
        dense = dense + K @ K.T
        keys.append(K)
        if n % 3 == 2:
            gone = keys.pop(0)
            memory.downdate(gone)
            dense = dense - gone @ gone.T
    probe = random(24, 3, seed=99)
    assert close(memory.matrix(), dense)
    assert close(memory.solve(probe), torch.linalg.solve(dense, probe))
    for K in keys:
        memory.downdate(K)
    assert ((memory.matrix() - C).norm() / C.norm()).item() < 1e-11


def test_more_keys_than_dimensions_and_none():
    C, K = positive(), random(24, 60, seed=1)
    memory = KeyMemory(C)
    memory.update(K)
    assert close(memory.matrix(), C + K @ K.T)
    before = memory.factor
    memory.update(K[:, :0])
    memory.downdate(K[:, :0])
    assert torch.equal(memory.factor, before)


def test_failed_downdate_leaves_the_factor():
    memory = KeyMemory(positive())
    before = memory.factor.clone()
    with pytest.raises(CovarianceError, match="positive definite"):
        memory.downdate(100 * random(24, 2, seed=1))
    assert torch.equal(memory.factor, before)


@pytest.mark.parametrize("bad", [torch.nan, torch.inf])
def test_not_finite(bad):
    memory = KeyMemory(positive())
    before = memory.factor.clone()
    keys = random(24, 2, seed=1)
    keys[3, 1] = bad
    for change in (memory.update, memory.downdate):
        with pytest.raises(CovarianceError, match="NaN"):
            change(keys)
        assert torch.equal(memory.factor, before)
    C = positive()
    C[2, 1] = C[1, 2] = bad
    with pytest.raises(CovarianceError, match="NaN"):
        KeyMemory(C)


def test_not_positive_definite():
    a = random(24, 10)  # ten tokens in 24 dimensions
    with pytest.raises(CovarianceError, match="positive definite.*10 x 24"):
        KeyMemory(a @ a.T)
    with pytest.raises(CovarianceError, match="positive definite"):
        KeyMemory(-positive())


def test_snapshot_and_factor_round_trip():
    memory, K = KeyMemory(positive()), random(24, 4, seed=1)
    snapshot = memory.factor
    values = snapshot.clone()
    memory.update(K)
    assert torch.equal(snapshot, values)  # an update never writes into the factor it replaces
    again = KeyMemory.from_factor(memory.factor)
    assert torch.equal(again.matrix(), memory.matrix())
    memory.factor = snapshot
    assert torch.equal(memory.matrix(), KeyMemory(positive()).matrix())


def test_single_precision_input_accumulates_in_double():
    C = positive().float()
    memory = KeyMemory(C)
    dense = C.double()
    for n in range(200):
        K = random(24, 1, seed=n).float()
        memory.update(K)
        dense = dense + K.double() @ K.double().T
    assert close(memory.matrix(), dense)
