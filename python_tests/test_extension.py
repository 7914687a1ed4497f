"""The build of the compiled operators: what it depends on, who compiles, and what is said when it cannot be done.

Compilers are small scripts here; the real ones are at work in test_emulated_kernels.py and test_cuda_sources.py.
"""

import dataclasses
import json
import os
import shutil
import signal
import subprocess
import sys
import tarfile
import time
import zipfile
from pathlib import Path

import pytest

from comeba_ext.kernels import build, loader
from comeba_ext.kernels.build import BuildFailure

ROOT = Path(__file__).resolve().parents[1]
FACTS = {"version": "2.13.0", "cuda": "13.0", "hip": None, "folder": "/nowhere/torch", "cxx11_abi": True}
pytestmark = pytest.mark.skipif(sys.platform != "linux", reason="kernels are compiled on Linux only")


@pytest.fixture(autouse=True)
def clean(monkeypatch, tmp_path):
    """Own cache, own state, no settings from outside."""
    for name in loader.VARIABLES:
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setenv("COMEBA_CACHE_DIR", str(tmp_path / "cache"))
    monkeypatch.setattr(loader, "_states", {})
    monkeypatch.setattr(build, "_versions", {})
    monkeypatch.setattr(build, "USUAL_TOOLKIT", tmp_path / "none")


def script(path: Path, body: str) -> str:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text("#!/bin/sh\n" + body)
    path.chmod(0o755)
    return str(path)


def fake_nvcc(folder: Path, release: str, body: str = "exit 0") -> str:
    """A toolkit whose compiler says that it is of ``release``; its folder."""
    version = f'[ "$1" = --version ] && echo "Cuda compilation tools, release {release}, V{release}.1" && exit 0\n'
    script(folder / "bin/nvcc", version + body)
    return str(folder)


def empty_path(monkeypatch, tmp_path, *commands):
    """A search path with nothing but a shell's commands."""
    folder = tmp_path / "path"
    folder.mkdir(exist_ok=True)
    for name in ("sh", "cp", "sleep", "kill", "echo", *commands):
        os.symlink(shutil.which(name), folder / name)
    monkeypatch.setenv("PATH", str(folder))


@pytest.fixture
def cuda_torch(monkeypatch, tmp_path):
    """As if torch were a CUDA build for 13.0 and the toolkit fit; the compiler as given by the test."""
    monkeypatch.setattr(build, "torch_facts", lambda: dict(FACTS))
    monkeypatch.setattr(loader, "_local_archs", lambda: ("90a",))
    monkeypatch.setenv("CUDA_HOME", fake_nvcc(tmp_path / "cuda", "13.0"))
    monkeypatch.setenv("CXX", script(tmp_path / "c++", "exit 0"))


# -- what the library depends on -------------------------------------------------------------------------------------


def test_the_key_changes_with_everything_the_library_depends_on(cuda_torch, monkeypatch, tmp_path):
    sources = tmp_path / "csrc"
    sources.mkdir()
    for name in ("a.cu", "a.cuh", "a.cpp"):
        (sources / name).write_text(name)
    monkeypatch.setattr(build, "csrc", lambda: sources)
    recipe = build.recipe(False, ("90a",))
    keys = [recipe.key(), build.recipe(True).key()]
    keys += [
        dataclasses.replace(recipe, torch=FACTS | {name: other}).key()
        for name, other in (("version", "2.14.0"), ("cuda", "12.8"), ("cxx11_abi", False), ("folder", "/else"))
    ]
    keys.append(build.recipe(False, ("80", "90a")).key())
    (sources / "a.cuh").write_text("changed")
    keys.append(recipe.key())
    monkeypatch.setattr(build, "NVCC_FLAGS", [*build.NVCC_FLAGS, "-g"])
    keys.append(recipe.key())
    monkeypatch.setattr(build, "_versions", {})
    fake_nvcc(tmp_path / "cuda", "13.1")
    keys.append(recipe.key())
    assert len(set(keys)) == len(keys)
    assert recipe.key() == keys[-1]


def test_the_flags_name_the_architectures_and_stay_strict(cuda_torch):
    recipe = build.recipe(False, ("80", "90a"))
    command = recipe.command(Path("x.cu"), Path("x.o"))
    assert {"-gencode=arch=compute_80,code=sm_80", "-gencode=arch=compute_90a,code=sm_90a"} <= set(command)
    portable = dataclasses.replace(recipe, portable=True).command(Path("x.cu"), Path("x.o"))
    assert set(portable) - set(command) == {"-gencode=arch=compute_80,code=compute_80"}  # PTX for devices to come
    assert not any("fast" in part for part in command)
    assert "-DCOMEBA_EMULATE" not in command and "-DCOMEBA_EMULATE" in build.recipe(True).command(Path("x.cpp"), Path())


def test_the_standard_is_what_torchs_headers_ask_for(tmp_path):
    header = tmp_path / "include/ATen/ATen.h"
    header.parent.mkdir(parents=True)
    header.write_text("#error C++20 or later compatible compiler is required to use ATen.")
    assert build.torch_standard(tmp_path) == "-std=c++20"
    assert build.torch_standard(tmp_path / "none") == "-std=c++17"


def test_architectures_asked_for(monkeypatch):
    for text, archs in (("8.0;9.0a", ("80", "90a")), ("80 90a 80", ("80", "90a")), ("", ()), ("120", ("120",))):
        monkeypatch.setenv("COMEBA_CUDA_ARCH", text)
        assert build.asked_archs() == archs
    monkeypatch.setenv("COMEBA_CUDA_ARCH", "hopper")
    with pytest.raises(BuildFailure, match="hopper"):
        build.asked_archs()


# -- who compiles ------------------------------------------------------------------------------------------------------

PROGRAM = """
import sys
from comeba_ext.kernels import loader
from comeba_ext.kernels.build import BuildFailure
try:
    loader.load_emulated()
except BuildFailure as failure:
    print(failure)
"""


def start(tmp_path, delay: float, **environment) -> subprocess.Popen:
    """A process that wants the operators, with a compiler that notes its calls and takes its time."""
    body = f'[ "$1" = --version ] && echo fake && exit 0\necho "$@" >> {tmp_path}/calls\nsleep {delay}\n'
    body += 'for last; do :; done\necho not a library > "$last"\n'
    compiler = script(tmp_path / "slow", body)
    environment = {**os.environ, "CXX": compiler, "MAX_JOBS": "8"} | environment
    return subprocess.Popen(
        [sys.executable, "-c", PROGRAM],
        env=environment,
        text=True,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        start_new_session=True,
        umask=0o002,  # a usual one: what is made is not for the group to write all the same
    )


def calls(tmp_path) -> list[str]:
    return (tmp_path / "calls").read_text().splitlines() if (tmp_path / "calls").exists() else []


def test_a_killed_compile_leaves_no_lock_behind(tmp_path):
    first = start(tmp_path, 600)
    while not calls(tmp_path):
        assert first.poll() is None
        time.sleep(0.05)
    left = list((tmp_path / "cache").glob("*.part-*"))
    os.killpg(first.pid, signal.SIGKILL)
    first.wait()
    assert len(left) == 1 and left[0].exists() and list((tmp_path / "cache").glob("*.lock"))
    second = start(tmp_path, 0)
    out, err = second.communicate(timeout=120)
    assert "do not load" in out and "waiting" not in err  # compiled at once; the fake library is not one
    assert not left[0].exists()


def test_two_processes_compile_once(tmp_path):
    library = extension_of_nothing(tmp_path)
    body = f'[ "$1" = --version ] && echo fake && exit 0\necho "$@" >> {tmp_path}/calls\nsleep 2\n'
    compiler = script(tmp_path / "copy", body + f'for last; do :; done\ncp {library} "$last"\n')
    both = [start(tmp_path, 0, CXX=compiler) for _ in range(2)]
    ends = [process.communicate(timeout=120) for process in both]
    assert [process.returncode for process in both] == [0, 0] and not any(out for out, _ in ends)
    assert sum("-shared" in call for call in calls(tmp_path)) == 1
    progress = [err for _, err in ends if "compiling kernels" in err]
    assert len(progress) == 1 and progress[0].count("\n") == 2  # one line before, one after
    built = list((tmp_path / "cache").glob("emulated-*/*"))
    assert sorted(path.name for path in built) == ["_kernels.so", "build.json", "log.txt"]
    later = start(tmp_path, 0, CXX=compiler)
    out, err = later.communicate(timeout=120)
    assert not out and "compiling" not in err and sum("-shared" in call for call in calls(tmp_path)) == 1


def extension_of_nothing(tmp_path) -> Path:
    """A loadable module ``_kernels`` that registers nothing: a second's work for a real compiler."""
    source, library = tmp_path / "nothing.cpp", tmp_path / "nothing.so"
    source.write_text(
        '#include <Python.h>\nstatic PyModuleDef module{PyModuleDef_HEAD_INIT, "_kernels", "", -1};\n'
        "static PyObject* build(PyObject*, PyObject*) { return PyDict_New(); }\n"
        'static PyMethodDef methods[]{{"build", build, METH_NOARGS, ""}, {}};\n'
        "PyMODINIT_FUNC PyInit__kernels() { module.m_methods = methods; return PyModule_Create(&module); }\n"
    )
    compiler = build.find_compiler()
    if compiler is None:
        pytest.skip("needs a C++ compiler")
    include = build.sysconfig.get_path("include")
    subprocess.run([compiler, "-shared", "-fPIC", "-w", f"-I{include}", str(source), "-o", str(library)], check=True)
    return library


def test_a_damaged_library_is_compiled_again(tmp_path):
    library = extension_of_nothing(tmp_path)
    compiler = script(tmp_path / "copy", f'echo "$@" >> {tmp_path}/calls\nfor last; do :; done\ncp {library} "$last"\n')
    assert start(tmp_path, 0, CXX=compiler).communicate(timeout=120)[0] == ""
    (built,) = (tmp_path / "cache").glob("emulated-*/_kernels.so")
    built.write_text("half a library")
    (tmp_path / "calls").unlink()
    assert start(tmp_path, 0, CXX=compiler).communicate(timeout=120)[0] == ""
    assert sum("-shared" in call for call in calls(tmp_path)) == 1


def test_nothing_is_compiled_at_import_nor_for_the_cpu(tmp_path):
    compiler = script(tmp_path / "never", f"echo called >> {tmp_path}/calls")
    program = "import torch, comeba_ext; layer = comeba_ext.HookedLinear(torch.nn.Linear(4, 4)); layer(torch.ones(2, 4))"
    environment = {**os.environ, "CXX": compiler, "CUDA_HOME": str(tmp_path)}
    subprocess.run([sys.executable, "-c", program], env=environment, check=True)
    assert not calls(tmp_path) and not (tmp_path / "cache").exists()


def test_a_failure_is_told_once_and_remembered(cuda_torch, monkeypatch, caplog):
    tried = []

    def recipe(*_):
        tried.append(1)
        raise BuildFailure("no luck", "Try elsewhere")

    monkeypatch.setattr(build, "recipe", recipe)
    assert [loader.available("cuda") for _ in range(3)] == [False] * 3
    assert len(tried) == 1
    assert [r.message for r in caplog.records] == ["comeba: no compiled kernels, plain torch takes over: no luck. Try elsewhere."]
    assert loader.status() == {"state": "failed", "cause": "no luck", "remedy": "Try elsewhere", "path": ""}
    assert not loader.available("cpu") and not loader.available("mps")


def test_disabled_means_plain_torch_without_a_word(cuda_torch, monkeypatch, caplog):
    monkeypatch.setenv("COMEBA_DISABLE_EXTENSION", "1")
    assert not loader.available("cuda")
    assert not caplog.records and loader.status()["state"] == "disabled"


# -- what is said when it cannot be done -------------------------------------------------------------------------------


def failure_of(emulated=False) -> BuildFailure:
    with pytest.raises(BuildFailure) as caught:
        loader._load(emulated)
    return caught.value


def test_no_nvcc(cuda_torch, monkeypatch, tmp_path):
    monkeypatch.delenv("CUDA_HOME")
    empty_path(monkeypatch, tmp_path)
    failure = failure_of()
    assert failure.cause == "no nvcc was found" and "CUDA 13 toolkit" in failure.remedy


def test_nvcc_of_another_major_version(cuda_torch, monkeypatch, tmp_path):
    monkeypatch.setenv("CUDA_HOME", fake_nvcc(tmp_path / "old", "12.4"))
    failure = failure_of()
    assert "nvcc is CUDA 12.4" in failure.cause and "torch is built for CUDA 13.0" in failure.cause
    assert "CUDA 13 toolkit" in failure.remedy


def test_nvcc_that_does_not_run(cuda_torch, tmp_path):
    script(tmp_path / "cuda/bin/nvcc", "exit 127")
    assert "does not run" in failure_of().cause


def test_no_compiler(cuda_torch, monkeypatch, tmp_path):
    monkeypatch.delenv("CXX")
    empty_path(monkeypatch, tmp_path)
    assert failure_of().cause == "no C++ compiler was found"


def test_no_ninja_is_needed(cuda_torch, monkeypatch, tmp_path):
    empty_path(monkeypatch, tmp_path)
    assert "do not load" in failure_of().cause  # everything was called; the fake compilers made no library


@pytest.mark.parametrize(
    ("body", "cause", "remedy"),
    [
        (
            "echo 'g++: fatal error: Killed signal terminated program cc1plus'; exit 1",
            "ran out of memory",
            "MAX_JOBS=1",
        ),
        ("kill -9 $$", "ran out of memory", "MAX_JOBS=1"),
        (
            "echo 'x.cu(3): error: identifier \"y\" is undefined'; exit 2",
            'x.cu(3): error: identifier "y" is undefined',
            "report",
        ),
        ("echo \"nvcc fatal   : Unsupported gpu architecture 'compute_120'\"; exit 1", "(compute_120)", "newer CUDA"),
        ("exit 3", "ended with code 3", "report"),
    ],
)
def test_what_the_compiler_says_is_told_in_one_line(cuda_torch, tmp_path, body, cause, remedy):
    fake_nvcc(tmp_path / "cuda", "13.0", body)
    failure = failure_of()
    assert cause in failure.cause and remedy in failure.remedy and "\n" not in str(failure)
    assert failure.log.exists() and str(failure.log) in str(failure)
    assert not list((tmp_path / "cache").glob("*.part-*"))


@pytest.mark.parametrize(
    ("facts", "cause"),
    [({"cuda": None}, "CPU build"), ({"hip": "6.2", "cuda": None}, "ROCm"), (None, "torch is not installed")],
)
def test_torch_that_cannot_use_the_kernels(cuda_torch, monkeypatch, facts, cause):
    monkeypatch.setattr(build, "torch_facts", lambda: facts if facts is None else FACTS | facts)
    assert cause in failure_of().cause


def test_an_old_gpu_and_no_gpu(cuda_torch, monkeypatch):
    monkeypatch.setattr(loader, "_local_archs", lambda: ("75",))
    assert "compute capability 8.0" in failure_of().cause
    monkeypatch.setattr(loader, "_local_archs", lambda: ())
    assert "no GPU is visible" in failure_of().cause


def test_missing_sources_and_headers(cuda_torch, monkeypatch, tmp_path):
    monkeypatch.setattr(build.sysconfig, "get_path", lambda name: str(tmp_path))
    assert "Python.h" in failure_of().cause
    monkeypatch.setattr(build, "csrc", lambda: tmp_path)
    assert "sources are missing" in failure_of().cause


def test_a_cache_folder_that_cannot_be_written(cuda_torch, monkeypatch, tmp_path):
    (tmp_path / "file").write_text("in the way")
    monkeypatch.setenv("COMEBA_CACHE_DIR", str(tmp_path / "file"))
    failure = failure_of()
    assert "cannot be used" in failure.cause and "COMEBA_CACHE_DIR" in failure.remedy


# -- packages ----------------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def checkout(tmp_path_factory) -> Path:
    """A copy of the checkout, without the embedded model's weights, to build packages from."""
    if not (ROOT / "setup.py").exists() or shutil.which("pip", path=str(Path(sys.executable).parent)) is None:
        pytest.skip("needs the checkout and pip")
    copy = tmp_path_factory.mktemp("checkout")
    for name in ("setup.py", "pyproject.toml", "MANIFEST.in", "CMakeLists.txt", "README.md", "LICENSE"):
        shutil.copy(ROOT / name, copy)
    for name in ("comeba_ext", "csrc"):
        shutil.copytree(ROOT / name, copy / name, ignore=shutil.ignore_patterns("*.safetensors", "__pycache__", "*.so"))
    return copy


def wheel(checkout: Path, out: Path, **environment) -> zipfile.ZipFile:
    command = [
        sys.executable,
        "-m",
        "pip",
        "wheel",
        "-q",
        "--no-deps",
        "--no-build-isolation",
        "-w",
        str(out),
        str(checkout),
    ]
    done = subprocess.run(command, env={**os.environ} | environment, capture_output=True, text=True)
    assert done.returncode == 0, done.stdout + done.stderr
    (path,) = out.glob("*.whl")
    return zipfile.ZipFile(path)


def test_the_wheel_carries_the_sources_and_finds_them(checkout, tmp_path):
    built = wheel(checkout, tmp_path / "wheel")
    sources = [*(ROOT / "csrc").iterdir(), *(ROOT / "csrc/emulation").iterdir()]
    expected = {path.relative_to(ROOT).as_posix() for path in sources if path.suffix in (".cu", ".cuh", ".h", ".cpp")}
    assert expected == {name.removeprefix("comeba_ext/") for name in built.namelist() if name.startswith("comeba_ext/csrc/")}
    assert "none-any" in built.filename
    built.extractall(tmp_path / "site")
    done = subprocess.run([sys.executable, str(tmp_path / "site/comeba_ext/kernels/build.py")], capture_output=True, text=True, check=True)
    assert f"{tmp_path}/site/comeba_ext/csrc/hooked_linear.cu" in done.stdout


def test_the_source_distribution_carries_the_sources(checkout, tmp_path):
    program = f"from setuptools.build_meta import build_sdist; build_sdist({str(tmp_path)!r})"
    subprocess.run([sys.executable, "-c", program], cwd=checkout, check=True, capture_output=True)
    (path,) = tmp_path.glob("*.tar.gz")
    with tarfile.open(path) as archive:
        names = {name.split("/", 1)[1] for name in archive.getnames() if "/" in name}
    assert {
        "setup.py",
        "CMakeLists.txt",
        "csrc/device.cuh",
        "csrc/hooked_linear.cu",
        "csrc/tests/emulation.cu",
    } <= names


def test_ahead_of_time(checkout, tmp_path):
    library = extension_of_nothing(tmp_path)
    compiler = script(tmp_path / "copy", f'for last; do :; done\ncp {library} "$last"\n')
    built = wheel(checkout, tmp_path / "wheel", COMEBA_BUILD="1", COMEBA_EMULATE="1", CXX=compiler)
    assert "none-any" not in built.filename
    facts = json.loads(built.read("comeba_ext/_kernels.json"))
    assert facts["emulated"] and facts["torch"]["version"] == build.torch_facts()["version"]
    built.extractall(tmp_path / "site")
    program = "from comeba_ext.kernels import loader as e; e.load_emulated(); print(e._states['cpu'].origin, e._states['cpu'].path)"
    environment = {**os.environ, "PYTHONPATH": str(tmp_path / "site"), "CXX": "/nowhere"}
    done = subprocess.run([sys.executable, "-c", program], env=environment, cwd=tmp_path, capture_output=True, text=True)
    assert done.stdout.split(" ", 3)[:3] == ["ahead", "of", "time"] and str(tmp_path / "site") in done.stdout, done.stderr
    # Built for another torch, it is left alone.
    facts["torch"]["version"] = "1.0"
    (tmp_path / "site/comeba_ext/_kernels.json").write_text(json.dumps(facts))
    done = subprocess.run([sys.executable, "-c", program], env=environment, cwd=tmp_path, capture_output=True, text=True)
    assert "no C++ compiler was found" in done.stderr


def test_a_library_built_for_newer_gpus_only_is_left_alone(cuda_torch, monkeypatch, tmp_path):
    described = tmp_path / "package" / "_kernels.json"
    described.parent.mkdir()
    described.write_text(json.dumps({"torch": FACTS, "archs": ["90a"], "emulated": False}))
    monkeypatch.setattr(loader, "__file__", str(described.parent / "kernels" / "loader.py"))
    assert loader._ahead_of_time(False) == described.with_suffix(".so")
    assert loader.status()["state"] == "ahead of time"
    monkeypatch.setattr(loader, "_local_archs", lambda: ("80",))
    assert loader._ahead_of_time(False) is None


def test_ahead_of_time_that_cannot_be_done_says_why(checkout, tmp_path):
    command = [sys.executable, "setup.py", "build_ext"]
    environment = {**os.environ, "COMEBA_BUILD": "1", "COMEBA_EMULATE": "1", "CXX": "/nowhere"}
    done = subprocess.run(command, cwd=checkout, env=environment, capture_output=True, text=True)
    assert done.returncode != 0 and "cannot compile ahead of time: no C++ compiler was found" in done.stderr
    assert "Traceback" not in done.stderr
