"""Every .cu file compiles with nvcc for the architectures we name, without a warning and without register spills."""

import re
import shutil
import subprocess
from pathlib import Path

import pytest

from comeba_ext.kernels import build

NVCC = build.find_nvcc()
SOURCES = sorted([*build.csrc().glob("*.cu"), *(Path(__file__).parents[1] / "csrc/tests").glob("*.cu")])
pytestmark = pytest.mark.skipif(NVCC is None, reason="no nvcc")


@pytest.mark.parametrize("source", SOURCES, ids=[path.name for path in SOURCES])
def test_nvcc_warns_of_nothing_and_spills_nothing(source, tmp_path):
    archs = [f"-gencode=arch=compute_{arch},code=sm_{arch}" for arch in ("80", "90a")]
    strict = ["-Werror", "all-warnings", "-Xptxas=-v", "-Xcompiler=-Wall"]
    command = [
        NVCC,
        build.STANDARD,
        *build.NVCC_FLAGS,
        *strict,
        *archs,
        "-c",
        str(source),
        "-o",
        str(tmp_path / "x.o"),
    ]
    done = subprocess.run(command, capture_output=True, text=True)
    assert done.returncode == 0, done.stdout + done.stderr
    report = done.stdout + done.stderr
    kernels = re.findall(r"Compiling entry function '(\w+)' for '(\w+)'", report)
    spills = re.findall(r"(\d+) bytes spill stores, (\d+) bytes spill loads", report)
    # A file without kernels has nothing to report; each kernel of the others has a line for either architecture.
    assert len(spills) >= len(kernels) and (kernels or "__global__" not in source.read_text())
    spilling = [(name, arch, spill) for (name, arch), spill in zip(kernels, spills) if spill != ("0", "0")]
    assert not spilling and all(spill == ("0", "0") for spill in spills), spilling


def test_the_architectures_are_those_of_the_build_ahead_of_time():
    assert build.AHEAD_OF_TIME_ARCHS.split(";") == ["80", "90a"]


@pytest.mark.skipif(shutil.which("cmake") is None, reason="no cmake")
def test_cxx_tests_pass_on_the_host(tmp_path):
    root = Path(__file__).parents[1]
    if not (root / "CMakeLists.txt").exists():
        pytest.skip("needs the checkout")
    for command in (
        ["cmake", "-S", str(root), "-B", str(tmp_path)],
        ["cmake", "--build", str(tmp_path), "-j2"],
        ["ctest", "--test-dir", str(tmp_path), "--output-on-failure"],
    ):
        done = subprocess.run(command, capture_output=True, text=True)
        assert done.returncode == 0, done.stdout + done.stderr
