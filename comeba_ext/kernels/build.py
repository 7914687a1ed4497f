"""Sources, flags and compiler calls of the compiled operators: for setup.py, for the compile on first use, for CMake.

Standard library only, torch is looked up where a function needs it: setup.py runs this file before torch or the package
can be imported. ``python comeba_ext/kernels/build.py [sources|flags]`` prints the recipe for CMake.
"""

from __future__ import annotations

import dataclasses
import hashlib
import importlib.util
import json
import os
import platform
import re
import shutil
import subprocess
import sys
import sysconfig
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

MODULE = "_kernels"
USUAL_TOOLKIT = Path("/usr/local/cuda")
OLDEST_ARCH = 80  # compute capability 8.0: bfloat16 tensor cores, asynchronous copies
AHEAD_OF_TIME_ARCHS = "80;90a"  # when nothing is asked for and no GPU need be there; 8.6 and 8.9 run the code for 8.0
STANDARD = "-std=c++17"  # of the kernels; torch's headers say what they need, see torch_standard
HOST_FLAGS = ["-O2", "-fPIC"]
# Without optimisation beyond -O1: the emulated kernels are for testing, and compile in half the time.
EMULATED_FLAGS = ["-O1", "-fPIC", "-DCOMEBA_EMULATE", "-pthread", "-Wno-unknown-pragmas"]
GCC_EMULATED_FLAGS = ["-fno-gnu-unique"]  # two libraries with the same kernel each have their own shared memory
# Strict floating point: no fast math. Scope decisions compare sums that were made in one order.
NVCC_FLAGS = ["-O3", "--expt-relaxed-constexpr", "-Xcompiler=-fPIC", "-lineinfo"]


class BuildFailure(Exception):
    """Why compiled operators cannot be had: a cause, a remedy, and where the compiler's output is."""

    def __init__(self, cause: str, remedy: str, log: Path | None = None):
        super().__init__(cause)
        self.cause, self.remedy, self.log = cause, remedy, log

    def __str__(self) -> str:
        return f"{self.cause}. {self.remedy}." + (f" Compiler output: {self.log}" if self.log else "")


@dataclasses.dataclass(frozen=True)
class Recipe:
    """Everything that determines the compiled library."""

    emulated: bool
    archs: tuple[str, ...]  # "80", "90a", …; empty when emulated
    compiler: str
    nvcc: str | None
    torch: dict  # see torch_facts
    sources: tuple[Path, ...]
    portable: bool = False  # with PTX too, which devices newer than archs compile for themselves

    def key(self) -> str:
        """Changes with the sources, the flags, torch, CUDA, the architectures, the compiler and Python's ABI."""
        digest = hashlib.sha256()
        for path in sorted([*csrc().glob("*.*"), *csrc().glob("emulation/*.h")]):
            digest.update(path.name.encode() + b"\0" + path.read_bytes() + b"\0")
        tools = [_version(self.compiler), _version(self.nvcc) if self.nvcc else ""]
        facts = [self.torch, tools, sysconfig.get_config_var("EXT_SUFFIX"), platform.machine()]
        facts += [[str(step) for step in self.command(source, Path("x.o"))] for source in self.sources]
        digest.update(json.dumps([*facts, self.link([], Path("x.so"))], sort_keys=True).encode())
        return digest.hexdigest()[:20]

    def command(self, source: Path, to: Path) -> list[str]:
        """The compiler call for one source."""
        if source.suffix == ".cu" and not self.emulated:
            archs = [f"-gencode=arch=compute_{arch},code=sm_{arch}" for arch in self.archs]
            if self.portable:
                oldest = min(map(number, self.archs))
                archs.append(f"-gencode=arch=compute_{oldest},code=compute_{oldest}")
            return [self.nvcc, STANDARD, *NVCC_FLAGS, *archs, "-ccbin", self.compiler, "-c", str(source), "-o", str(to)]
        root = Path(self.torch["folder"])
        include = [root / "include", root / "include/torch/csrc/api/include", Path(sysconfig.get_path("include"))]
        if not self.emulated:
            include += [folder for folder in _headers(_cuda_root(self.nvcc)) if folder != Path("/usr/include")]  # searched anyway, later
        flags = EMULATED_FLAGS if self.emulated else HOST_FLAGS
        if self.emulated and "clang" not in _version(self.compiler):
            flags = [*flags, *GCC_EMULATED_FLAGS]
        names = [f"-DCOMEBA_MODULE={MODULE}", f'-DCOMEBA_ARCH="{" ".join(self.archs)}"']
        names.append(f"-D_GLIBCXX_USE_CXX11_ABI={int(self.torch['cxx11_abi'])}")
        folders = [part for folder in include for part in ("-isystem", str(folder))]
        language = ["-x", "c++"] if source.suffix == ".cu" else []
        if language:  # kernels need neither torch nor Python
            folders = []
        standard = STANDARD if language else torch_standard(root)
        return [self.compiler, standard, *flags, *names, *folders, *language, "-c", str(source), "-o", str(to)]

    def link(self, objects: list[Path], to: Path) -> list[str]:
        """The linker call; torch's own libraries are found in the process that imports torch first."""
        libraries = ["-lc10", "-ltorch_cpu", "-ltorch", "-ltorch_python", "-ldl"]
        folders = [Path(self.torch["folder"]) / "lib"]
        if not self.emulated:
            libraries += ["-lc10_cuda", "-ltorch_cuda", "-lcudart"]
            root = _cuda_root(self.nvcc)
            folders += [folder for folder in (root / "lib64", root / "lib", *root.glob("targets/*/lib")) if folder.is_dir()]
        search = [f"-L{folder}" for folder in folders] + [f"-Wl,-rpath,{folder}" for folder in folders[:1]]
        return [self.compiler, "-shared", *map(str, objects), *search, *libraries, "-pthread", "-o", str(to)]


def recipe(emulated: bool, archs: tuple[str, ...] = (), portable: bool = False) -> Recipe:
    """What to compile for this machine, or :class:`BuildFailure` with the reason why it cannot be."""
    if sys.platform != "linux":
        raise BuildFailure(f"kernels are compiled on Linux only, this is {sys.platform}", "Plain torch does the same work")
    sources = tuple(sorted([*csrc().glob("*.cpp"), *csrc().glob("*.cu")]))
    if not sources:
        raise BuildFailure(f"the kernels' sources are missing at {csrc()}", "Reinstall comeba_ext")
    torch = torch_facts()
    if torch is None:
        raise BuildFailure("torch is not installed here", "Install it first, and build with --no-build-isolation")
    nvcc = None if emulated else _checked_nvcc(torch, archs)
    compiler = find_compiler()
    if compiler is None:
        raise BuildFailure("no C++ compiler was found", "Install g++ (apt install g++), or set CXX to one")
    if not (Path(sysconfig.get_path("include")) / "Python.h").exists():
        raise BuildFailure("Python's headers (Python.h) are missing", "Install them (apt install python3-dev)")
    return Recipe(emulated, () if emulated else archs, compiler, nvcc, torch, sources, portable)


def compile_library(recipe: Recipe, folder: Path, to: Path, log: Path) -> None:
    """Compile and link into ``to``, with the objects in ``folder`` and everything the compilers say in ``log``."""
    objects = [folder / f"{source.name}.o" for source in recipe.sources]
    commands = [recipe.command(source, out) for source, out in zip(recipe.sources, objects)]
    log.parent.mkdir(parents=True, exist_ok=True)
    with open(log, "w") as out, ThreadPoolExecutor(jobs()) as pool:
        # The log may be read while this goes on: one call's output at a time, in order.
        for done in [*pool.map(_run, commands)]:
            _record(done, out, recipe, log)
        _record(_run(recipe.link(objects, to)), out, recipe, log)


def jobs() -> int:
    """Compilers at once: ``MAX_JOBS``, else as many as there are cores and 2 GB of free memory for."""
    asked = os.environ.get("MAX_JOBS", "")
    if asked.isdigit() and int(asked) > 0:
        return int(asked)
    try:
        free = os.sysconf("SC_AVPHYS_PAGES") * os.sysconf("SC_PAGE_SIZE")
    except (ValueError, OSError):
        free = 8 << 30
    return max(1, min(os.cpu_count() or 1, free // (2 << 30)))


def csrc() -> Path:
    """The sources: inside the installed package, or beside the package in a checkout."""
    package = Path(__file__).resolve().parents[1]
    return package / "csrc" if (package / "csrc").is_dir() else package.parent / "csrc"


def asked_archs() -> tuple[str, ...]:
    """``COMEBA_CUDA_ARCH`` as architectures (``"8.0;9.0a"`` or ``"80 90a"``); empty when unset."""
    words = re.split(r"[;,\s]+", os.environ.get("COMEBA_CUDA_ARCH", "").strip())
    archs = tuple(dict.fromkeys(word.replace(".", "") for word in words if word))
    for arch in archs:
        if not re.fullmatch(r"\d{2,3}[af]?", arch):
            raise BuildFailure(f"COMEBA_CUDA_ARCH names {arch!r}", "Write architectures like 80, 8.0 or 90a")
    return archs


def number(arch: str) -> int:
    """``"90a"`` is 90."""
    return int(re.match(r"\d+", arch).group())


def torch_facts() -> dict | None:
    """What the library must fit: torch's version, its CUDA version, its folder; None when there is no torch."""
    spec = importlib.util.find_spec("torch")
    if spec is None or spec.origin is None:
        return None
    import torch

    return {
        "version": torch.__version__,
        "cuda": torch.version.cuda,
        "hip": torch.version.hip,
        "folder": str(Path(spec.origin).parent),
        "cxx11_abi": torch.compiled_with_cxx11_abi(),
    }


def torch_standard(folder: Path) -> str:
    """The C++ standard that torch's headers ask for: 17 up to 2.13, later 20."""
    try:
        asked = re.search(r"#error C\+\+(\d+)", (folder / "include/ATen/ATen.h").read_text())
    except OSError:
        asked = None
    return f"-std=c++{asked.group(1)}" if asked else STANDARD


def find_compiler() -> str | None:
    """The host's C++ compiler: ``CXX``, else g++, else clang++."""
    names = [os.environ["CXX"]] if os.environ.get("CXX") else ["g++", "c++", "clang++"]
    return next((found for name in names if (found := shutil.which(name))), None)


def find_nvcc() -> str | None:
    """``CUDA_HOME`` or ``CUDA_PATH``, the search path, /usr/local/cuda, then NVIDIA's Python packages."""
    for home in (os.environ.get("CUDA_HOME"), os.environ.get("CUDA_PATH")):
        if home and (Path(home) / "bin/nvcc").exists():
            return str(Path(home) / "bin/nvcc")
    found = shutil.which("nvcc")
    if found:
        return found
    usual = [USUAL_TOOLKIT / "bin/nvcc"]
    site = Path(sysconfig.get_path("purelib")) / "nvidia"
    usual += [*sorted(site.glob("cu*/bin/nvcc"), reverse=True), site / "cuda_nvcc/bin/nvcc"]
    return next((str(path) for path in usual if path.exists()), None)


def nvcc_release(nvcc: str) -> str | None:
    """``"13.0"``, or None when it does not run."""
    found = re.search(r"release (\d+\.\d+)", _version(nvcc))
    return found.group(1) if found else None


# -- parts ----------------------------------------------------------------------------------------------------------


def _checked_nvcc(torch: dict, archs: tuple[str, ...]) -> str:
    if torch["hip"]:
        raise BuildFailure("torch is built for ROCm, the kernels are CUDA's", "Plain torch does the same work")
    if not torch["cuda"]:
        raise BuildFailure("torch is a CPU build", "Install a CUDA build of torch to use a GPU")
    nvcc = find_nvcc()
    major = torch["cuda"].split(".")[0]
    if nvcc is None:
        raise BuildFailure("no nvcc was found", f"Install the CUDA {major} toolkit, or set CUDA_HOME to it")
    release = nvcc_release(nvcc)
    if release is None:
        raise BuildFailure(f"{nvcc} does not run", f"Install the CUDA {major} toolkit, or set CUDA_HOME to it")
    if release.split(".")[0] != major:
        raise BuildFailure(
            f"nvcc is CUDA {release} ({nvcc}) but torch is built for CUDA {torch['cuda']}",
            f"Install the CUDA {major} toolkit and set CUDA_HOME to it, or a torch built for CUDA {release.split('.')[0]}",
        )
    too_old = [arch for arch in archs if number(arch) < OLDEST_ARCH]
    if too_old:
        raise BuildFailure(f"the kernels need compute capability 8.0, this is {too_old[0]}", "Plain torch does the same work")
    return nvcc


def _headers(root: Path) -> list[Path]:
    """Where a toolkit has them: in ``include``, and conda-forge's in a folder a platform."""
    return [folder for folder in (root / "include", *root.glob("targets/*/include")) if folder.is_dir()] or [root / "include"]


def _cuda_root(nvcc: str) -> Path:
    """The toolkit's folder, also where nvcc on the search path is a link into it or a script that calls it."""
    root = Path(nvcc).resolve().parent.parent
    home = next((Path(v) for v in (os.environ.get("CUDA_HOME"), USUAL_TOOLKIT) if v and Path(v).is_dir()), root)
    return root if (root / "include/cuda_runtime.h").exists() else home


_versions: dict[str, str] = {}


def _version(program: str) -> str:
    if program not in _versions:
        try:
            done = subprocess.run([program, "--version"], capture_output=True, text=True, timeout=60)
            _versions[program] = done.stdout if done.returncode == 0 else ""
        except (OSError, subprocess.SubprocessError):
            _versions[program] = ""
    return _versions[program]


def _run(command: list[str]) -> subprocess.CompletedProcess:
    return subprocess.run(command, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True, errors="replace")


def _record(done: subprocess.CompletedProcess, out, recipe: Recipe, log: Path) -> None:
    out.write(" ".join(done.args) + f"\n{done.stdout}[exit code {done.returncode}]\n")
    out.flush()
    if done.returncode == 0:
        return
    said = done.stdout
    # A compiler that the kernel killed says so; a driver that was killed itself says nothing.
    if done.returncode in (-9, 137) or re.search(r"Killed|out of memory|memory exhausted|bad_alloc", said):
        raise BuildFailure("compiling ran out of memory", "Set MAX_JOBS=1 and try again", log)
    unsupported = re.search(r"Unsupported gpu architecture '(\w+)'", said)
    if unsupported:
        raise BuildFailure(
            f"nvcc {nvcc_release(recipe.nvcc)} does not know this GPU's architecture ({unsupported.group(1)})",
            "Install a newer CUDA toolkit",
            log,
        )
    lines = [line.strip() for line in said.splitlines() if line.strip()]
    first = next((line for line in lines if re.search(r"\b(error|fatal)\b|undefined reference|cannot find", line)), None)
    first = first or (lines[-1] if lines else f"{done.args[0]} ended with code {done.returncode}")
    raise BuildFailure(f"compiling failed: {first}", "Please report this with the compiler output", log)


if __name__ == "__main__":
    what = sys.argv[1] if len(sys.argv) > 1 else "sources"
    answers = {
        # The kernels without torch: what C++ tests link against.
        "sources": lambda: [str(path) for path in sorted(csrc().glob("*.cu"))],
        "emulated": lambda: [STANDARD, *EMULATED_FLAGS],
        "cuda": lambda: [STANDARD, *NVCC_FLAGS],
    }
    print(";".join(answers[what]()))
