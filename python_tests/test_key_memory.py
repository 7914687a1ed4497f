"""KeyMemory against dense float64 algebra."""

import copy

import pytest
import torch

from comeba_ext.errors import CovarianceError
from comeba_ext.memory import inverse_form
from comeba_ext.memory.key_memory import KeyMemory


def random(*shape, seed=0):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def positive(d=24, seed=0):
    a = random(d, 3 * d, seed=seed)
    return a @ a.T / d


def close(found, expected):
    return ((found - expected).norm() / expected.norm()).item() < 1e-12


def same(found, expected):
    """Bit for bit."""
    assert type(found) is type(expected)
    assert all(torch.equal(a, b) for a, b in zip(found, expected, strict=True))


@pytest.fixture(params=["inverse", "factor"])
def make(request):
    def memory(matrix, dtype=torch.float64):
        made = KeyMemory(matrix, dtype, request.param)
        assert made.form == request.param
        return made

    return memory


def test_matrix_and_solve(make):
    C, K = positive(), random(24, 5, seed=1)
    memory = make(C)
    assert close(memory.matrix(), C)
    assert close(memory.solve(K), torch.linalg.inv(C) @ K)
    assert memory.solve(K.float()).dtype == torch.float64


@pytest.mark.parametrize("most_pending", [1, 5, 10**6])
def test_many_updates_and_downdates(make, monkeypatch, most_pending):
    monkeypatch.setattr(inverse_form, "_most_pending", lambda d: most_pending)
    C = positive()
    memory, dense, keys = make(C), C.clone(), []
    for n in range(40):
        K = random(24, 1 + n % 4, seed=n)
        solved = memory.update(K)
        dense = dense + K @ K.T
        assert close(solved, torch.linalg.solve(dense, K))
        keys.append(K)
        if n % 3 == 2:
            gone = keys.pop(0)
            solved = memory.downdate(gone)
            dense = dense - gone @ gone.T
            assert close(solved, torch.linalg.solve(dense, gone))
    probe = random(24, 3, seed=99)
    assert close(memory.matrix(), dense)
    assert close(memory.solve(probe), torch.linalg.solve(dense, probe))
    for K in keys:
        memory.downdate(K)
    assert ((memory.matrix() - C).norm() / C.norm()).item() < 1e-11


@pytest.mark.parametrize("u", [23, 60, 2500])
def test_more_keys_than_fit_at_once(make, u, monkeypatch):
    monkeypatch.setattr(inverse_form, "CHUNK", 32)
    C, K = positive(), random(24, u, seed=1)
    memory = make(C)
    solved = memory.update(K)
    assert close(memory.matrix(), C + K @ K.T)
    assert close(solved, torch.linalg.solve(C + K @ K.T, K))


def test_no_keys(make):
    memory, K = make(positive()), random(24, 2, seed=1)
    before = copy.deepcopy(memory.state)
    for change in (memory.solve, memory.update, memory.downdate):
        assert change(K[:, :0]).shape == (24, 0)
    same(memory.state, before)


def test_failed_downdate_changes_nothing(make):
    memory = make(positive())
    memory.update(random(24, 3))
    before = copy.deepcopy(memory.state)
    with pytest.raises(CovarianceError, match="positive definite"):
        memory.downdate(100 * random(24, 2, seed=1))
    same(memory.state, before)


def test_failure_in_a_later_chunk_changes_nothing(monkeypatch):
    monkeypatch.setattr(inverse_form, "CHUNK", 4)
    memory = KeyMemory(positive())
    before = copy.deepcopy(memory.state)
    keys = 0.01 * random(24, 12, seed=1)
    keys[:, 9] *= 1e5
    with pytest.raises(CovarianceError, match="positive definite"):
        memory.downdate(keys)
    same(memory.state, before)


@pytest.mark.parametrize("bad", [torch.nan, torch.inf])
@pytest.mark.parametrize("u", [1, 2, 30])
def test_not_finite(make, bad, u):
    memory = make(positive())
    before = copy.deepcopy(memory.state)
    keys = random(24, u, seed=1)
    keys[3, u // 2] = bad
    for change in (memory.update, memory.downdate):
        with pytest.raises(CovarianceError, match="NaN"):
            change(keys)
        same(memory.state, before)
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


def test_snapshot_and_round_trip(make):
    memory, K = make(positive()), random(24, 4, seed=1)
    memory.update(random(24, 3, seed=2))
    snapshot = memory.state
    values = copy.deepcopy(snapshot)
    for n in range(40):  # folded in between
        memory.update(random(24, 4, seed=n))
    same(snapshot, values)  # an update never writes into the state it replaces
    again = KeyMemory.from_tensors(memory.tensors())
    same(again.state, memory.state)
    again.update(K), memory.update(K)
    same(again.state, memory.state)
    memory.state = snapshot
    memory.update(K)
    assert close(memory.matrix(), positive() + random(24, 3, seed=2) @ random(24, 3, seed=2).T + K @ K.T)


def test_from_tensors_refuses_what_is_incomplete():
    tensors = KeyMemory(positive()).tensors()
    with pytest.raises(TypeError):
        KeyMemory.from_tensors({name: t for name, t in tensors.items() if name != "probe"})


def test_single_precision_input_accumulates_in_double(make):
    C = positive().float()
    memory = make(C)
    dense = C.double()
    for n in range(200):
        K = random(24, 1, seed=n).float()
        memory.update(K)
        dense = dense + K.double() @ K.double().T
    assert close(memory.matrix(), dense)


def test_single_precision_memory(make):
    C = positive()
    memory = make(C, torch.float32)
    dense = C.clone()
    for n in range(50):
        memory.update(random(24, 2, seed=n))
        dense = dense + random(24, 2, seed=n) @ random(24, 2, seed=n).T
    assert memory.solve(C).dtype == torch.float32
    assert ((memory.solve(C) - torch.linalg.solve(dense, C)).norm() / torch.linalg.solve(dense, C).norm()).item() < 1e-4


def spectrum(condition, d=96):
    """A covariance of that condition number, and its root."""
    q = torch.linalg.qr(random(d, d))[0]
    root = q * torch.logspace(0, -torch.tensor(condition).log10().item() / 2, d, dtype=torch.float64)
    C = root @ root.T
    return (C + C.T) / 2, root


def worst(found, expected):
    return ((found - expected).norm(dim=0) / expected.norm(dim=0)).max().item()


@pytest.mark.parametrize("condition", [1e2, 1e4, 1e6])
def test_a_thousand_batches_with_supersedes_stay_accurate_in_the_inverse(condition):
    C, root = spectrum(condition)
    memory, live = KeyMemory(1000 * C), []
    for n in range(1000):
        K = root @ random(96, 3, seed=n)
        if n % 3 == 2:
            memory.downdate(live.pop(n % len(live)))
        memory.update(K)
        live.append(K)
    assert memory.form == "inverse"
    dense = 1000 * C + sum(K @ K.T for K in live)
    probe = root @ random(96, 8, seed=5000)
    expected = torch.linalg.solve(dense, probe)
    assert worst(memory.solve(probe), expected) <= max(1e-12, 10 * condition * 2.2e-16)
    assert worst(memory.solve(live[-1]), torch.linalg.solve(dense, live[-1])) <= 1e-9


@pytest.mark.parametrize("scale", [1e2, 1e3])
def test_keys_that_would_ruin_the_inverse_turn_it_into_a_factor(scale):
    """Large keys in one direction: what is left of C⁻¹ there is smaller than the rounding errors of its entries."""
    C, _ = spectrum(1e4)
    memory, dense = KeyMemory(C), C.clone()
    direction = random(96, 1)
    for n in range(50):
        K = scale * (direction + 1e-3 * random(96, 2, seed=n))
        solved = memory.update(K)
        dense = dense + K @ K.T
    assert memory.form == "factor"
    assert ((memory.matrix() - dense).norm() / dense.norm()).item() < 1e-9
    factor = torch.linalg.cholesky(dense)
    expected = torch.cholesky_solve(K, factor)
    # The fresh factorisation's own error is its condition number times the rounding unit.
    assert worst(solved, expected) <= 1e-9 + 10 * torch.linalg.cond(dense).item() * 2.2e-16


@pytest.mark.parametrize("condition", [1e9, 1e12])
def test_an_ill_conditioned_covariance_is_served_as_well_as_by_factorising(condition):
    C, root = spectrum(condition)
    memory, live = KeyMemory(C), []
    for n in range(100):
        live.append(root @ random(96, 3, seed=n))
        memory.update(live[-1])
        if n % 2:
            memory.downdate(live.pop(0))
    dense = C + sum(K @ K.T for K in live)
    assert ((memory.matrix() - dense).norm() / dense.norm()).item() < 10 * condition * 2.2e-16
    exact = torch.cholesky_solve(live[-1], torch.linalg.cholesky(dense))
    assert worst(memory.solve(live[-1]), exact) <= 10 * condition * 2.2e-16
