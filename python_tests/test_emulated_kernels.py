"""The host's emulation of CUDA: kernels of one feature each (csrc/tests/emulation.cu) against torch."""

import ctypes
import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import torch

COMPILER = shutil.which(os.environ.get("CXX", "g++"))
SOURCE = Path(__file__).resolve().parents[1] / "csrc" / "tests" / "emulation.cu"
pytestmark = pytest.mark.skipif(
    COMPILER is None or not SOURCE.exists() or sys.platform != "linux",
    reason="needs a C++ compiler, the sources and Linux",
)


@pytest.fixture(scope="module")
def library_path(tmp_path_factory) -> str:
    out = tmp_path_factory.mktemp("emulation") / "emulation.so"
    flags = "-x c++ -std=c++17 -O1 -g1 -Wall -Wextra -Wno-unknown-pragmas -Werror -fPIC -shared -fno-gnu-unique -DCOMEBA_EMULATE -pthread"
    subprocess.run([COMPILER, *flags.split(), str(SOURCE), "-o", str(out), "-ldl"], check=True)
    return str(out)


@pytest.fixture(scope="module", params=["ascending", "reversed"])
def kernels(library_path, request):
    """The compiled kernels; the threads of a block run in either order."""
    os.environ["COMEBA_EMULATION_ORDER"] = request.param
    yield ctypes.CDLL(library_path)
    del os.environ["COMEBA_EMULATION_ORDER"]


def pointer(tensor: torch.Tensor) -> ctypes.c_void_p:
    assert tensor.is_contiguous()
    return ctypes.c_void_p(tensor.data_ptr())


def nan(*shape) -> torch.Tensor:
    return torch.full(shape, float("nan"))


def test_shuffles_follow_the_ptx_definition(kernels):
    x, out = torch.randn(32), nan(5, 32)
    assert kernels.shuffles(pointer(x), pointer(out)) == 0
    lane = torch.arange(32)
    assert torch.equal(out[0], x[7].expand(32))
    assert torch.equal(out[1], x[lane ^ 5])
    assert torch.equal(out[2], x[torch.where(lane % 16 + 3 < 16, lane + 3, lane)])
    assert torch.equal(out[3], x[torch.where(lane >= 2, lane - 2, lane)])
    assert torch.equal(out[4], x[lane ^ torch.where(lane < 16, 1, 8)])


def test_votes(kernels):
    x, out = torch.randn(32), torch.zeros(2, 32, dtype=torch.int32)
    assert kernels.votes(pointer(x), pointer(out)) == 0
    expected = sum(1 << n for n in range(32) if x[n] > 0)
    assert [v & 0xFFFFFFFF for v in out[0].tolist()] == [expected] * 32
    assert out[1].tolist() == [0] * 32


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16])
def test_barriers_and_shared_memory(kernels, dtype):
    for rows, columns in [(1, 1), (3, 129), (5, 1000), (2, 20000)]:  # the last needs more than 48 KiB
        x, out = torch.randn(rows, columns).to(dtype), nan(rows)
        code = [torch.float32, torch.float16, torch.bfloat16].index(dtype)
        assert kernels.row_sums(pointer(x), pointer(out), rows, columns, code) == 0
        torch.testing.assert_close(out, x.double().sum(1).float(), rtol=1e-5, atol=1e-3)


def test_an_empty_grid_is_no_error_and_too_much_shared_memory_is_one(kernels):
    x = torch.zeros(4)
    assert kernels.row_sums(pointer(x), pointer(x), 0, 4, 0) == 0
    assert kernels.row_sums(pointer(x), pointer(x), 1, 100000, 0) != 0


def test_shared_memory_starts_as_nan_in_every_block(kernels):
    out = torch.zeros(4, 64)
    assert kernels.uninitialised(pointer(out), 4) == 0
    assert out.isnan().all()


def test_atomics(kernels):
    x = torch.randint(0, 17, (1000,), dtype=torch.int32)
    counts, total, largest = torch.zeros(17, dtype=torch.int32), torch.zeros(1), torch.zeros(1, dtype=torch.int32)
    assert kernels.counts(pointer(x), 1000, pointer(counts), pointer(total), pointer(largest)) == 0
    assert counts.tolist() == torch.bincount(x, minlength=17).tolist()
    assert (total.item(), largest.item()) == (x.sum().item(), x.max().item())


def test_blocks_that_wait_for_each_other_are_resident_together(kernels):
    blocks = kernels.resident_blocks()
    arrived, out = torch.zeros(1, dtype=torch.int32), nan(blocks, 64)
    assert kernels.grid_barrier(pointer(arrived), pointer(out), blocks) == 0
    assert torch.equal(out, torch.arange(blocks).float()[:, None].expand(blocks, 64))


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_matrix_multiply_of_halves(kernels, dtype):
    a, b, c = torch.randn(16, 16).to(dtype), torch.randn(16, 8).to(dtype), torch.randn(16, 8)
    out = c.clone()
    assert kernels.mma(pointer(a), pointer(b.T.contiguous()), pointer(out), int(dtype == torch.bfloat16)) == 0
    torch.testing.assert_close(out, (a.double() @ b.double() + c.double()).float(), rtol=1e-6, atol=1e-6)


def test_matrix_multiply_of_tf32(kernels):
    a, b, out = torch.randn(16, 8), torch.randn(8, 8), nan(16, 8)
    assert kernels.mma_tf32(pointer(a), pointer(b.T.contiguous()), pointer(out)) == 0

    def tf32(x):  # ten bits after the leading one, ties away from zero
        return (x.contiguous().view(torch.int32) + 0x1000 & ~0x1FFF).view(torch.float32).double()

    torch.testing.assert_close(out, (tf32(a) @ tf32(b)).float(), rtol=1e-6, atol=1e-6)
    assert not torch.allclose(out, a @ b, rtol=1e-6, atol=1e-6)


def test_transposed_matrix_load(kernels):
    x, out = torch.randn(4, 8, 8).half(), torch.zeros(4, 32, dtype=torch.int32)
    assert kernels.transpose(pointer(x), pointer(out)) == 0
    # Lane i holds elements (row, column) = (2(i%4), i/4) and the one below it: row i/4 of the transposed matrix.
    assert torch.equal(out.view(torch.float16).view(4, 8, 8), x.transpose(1, 2))


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_conversions_agree_with_torch(kernels, dtype):
    every = torch.arange(-32768, 32768, dtype=torch.int32).to(torch.int16).view(dtype).float()
    exponents = torch.randint(-40, 40, (100000,)).float()
    # Ties between neighbours are rare among random numbers: put some there.
    finite = every[every.isfinite()].sort().values
    ties = (finite[:-1] + finite[1:]) / 2
    x = torch.cat([every, torch.randn(100000) * exponents.exp2(), ties, torch.tensor([3.4e38, -3.4e38, 1e-45, 65519.99])])
    out, back = torch.zeros(x.numel(), dtype=dtype), nan(x.numel())
    assert kernels.convert(pointer(x), pointer(out), pointer(back), x.numel(), int(dtype == torch.bfloat16)) == 0
    expected = x.to(dtype)
    same = (out.view(torch.int16) == expected.view(torch.int16)) | (out.isnan() & expected.isnan())
    assert same.all(), (x[~same][:5], out[~same][:5], expected[~same][:5])
    torch.testing.assert_close(back, expected.float(), rtol=0, atol=0, equal_nan=True)


@pytest.mark.parametrize(
    ("call", "message"),
    [
        ("missed_barrier(1)", "threads 0 to 0: has left the kernel\n  threads 1 to 63: waits at __syncthreads"),
        ("missed_shuffle(out)", "threads 0 to 2: waits in __shfl_xor_sync"),
        ("two_barriers()", "two barriers"),
        ("endless_spin(out)", "never comes"),
        ("shared_overrun()", "beyond the block's dynamic shared memory"),
    ],
)
def test_mistakes_end_the_process_with_a_message(library_path, call, message):
    program = f"import ctypes; out = (ctypes.c_uint * 64)(); ctypes.CDLL({library_path!r}).{call}"
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, timeout=120)
    assert done.returncode == -6
    assert message in done.stderr
    if "beyond" not in message:
        assert "emulation.cu:" in done.stderr


def test_the_operators_on_emulated_kernels():
    """All of test_hook_operators.py again in a process whose CPU tensors take the CUDA path, and nothing skipped to torch."""
    environment = {**os.environ, "COMEBA_EMULATE": "1"}
    environment.pop("COMEBA_DISABLE_EXTENSION", None)
    program = "import sys, pytest, comeba_ext.kernels.loader as e; e.load_emulated(); sys.exit(pytest.main(sys.argv[1:]))"
    tests = Path(__file__).with_name("test_hook_operators.py")
    command = [sys.executable, "-c", program, "-q", "-p", "no:cacheprovider", "-m", "not cuda", str(tests)]
    done = subprocess.run(command, env=environment, capture_output=True, text=True, cwd=tests.parent)
    assert done.returncode == 0, done.stdout[-5000:] + done.stderr[-5000:]
