"""The compiled operators (``csrc/``): built ahead of time, or compiled on first use and kept in the user's cache.

Nothing is compiled or loaded at import. The first call of :func:`available` for a CUDA tensor loads the library; when
that is impossible, one warning says why and what to do, plain torch takes over, and this process does not try again.
"""

from __future__ import annotations

import contextlib
import dataclasses
import importlib.util
import json
import logging
import os
import shutil
import sys
import tempfile
import threading
import time
from importlib.machinery import ExtensionFileLoader
from pathlib import Path

import torch
from filelock import FileLock, Timeout

from comeba_ext.kernels import build
from comeba_ext.kernels.build import BuildFailure

logger = logging.getLogger(__name__)

EMULATED_DEVICE = "cpu"  # with COMEBA_EMULATE=1, the kernels run on the host for tensors of the CPU
VARIABLES = {
    "COMEBA_DISABLE_EXTENSION": "1: plain torch everywhere, nothing is compiled or loaded",
    "COMEBA_CACHE_DIR": "folder for compiled kernels and the embedded model's covariance, instead of the user's cache folder",
    "COMEBA_CUDA_ARCH": "architectures to compile for, such as 90a or 8.0;9.0a, instead of the GPUs that are here",
    "COMEBA_BUILD": "1 during pip install: compile ahead of time",
    "COMEBA_EMULATE": "1: run the CUDA kernels emulated on the CPU (slow; for testing them without a GPU)",
    "MAX_JOBS": "compilers at once",
    "CUDA_HOME": "the CUDA toolkit to compile with",
    "CXX": "the C++ compiler to compile with",
}


@dataclasses.dataclass
class State:
    """What became of the operators for one kind of device."""

    ready: bool
    origin: str  # "ahead of time", "cached", "compiled now", "disabled", "failed"
    path: Path | None = None
    build: dict | None = None  # the library's own account: torch, CUDA, architectures
    failure: BuildFailure | None = None


_states: dict[str, State] = {}
_guard = threading.Lock()


def available(device_type: str) -> bool:
    """Whether compiled operators serve tensors of this kind of device (``"cuda"``, ``"cpu"``, …).

    The first call may compile, for about a minute; all later ones only look the answer up.
    """
    state = _states.get(device_type)
    if state is None:
        if device_type == "cuda" or (device_type == EMULATED_DEVICE and _set("COMEBA_EMULATE")):
            state = _load_once(device_type)
        else:
            state = _states[device_type] = State(False, "not asked for")  # every hooked layer asks, at every call
    return state.ready


# What torch.compiler.assume_constant_result does, without importing the compiler (1.6 s) for those who never use it.
available._dynamo_marked_constant = True


def load_emulated() -> Path:
    """Build and load the operators that run the kernels on the CPU; raises :class:`BuildFailure` when impossible.

    From then on CPU tensors take this path. It needs a C++ compiler and the CPU build of torch will do.
    """
    state = _load_once(EMULATED_DEVICE)
    if state.failure is not None:
        raise state.failure
    return state.path


def status() -> dict:
    """For ``comeba doctor``: ``{"state", "cause", "remedy", "path"}`` of the CUDA operators; compiles nothing."""
    known = _states.get("cuda")
    if known is not None and known.failure is None:
        return {"state": known.origin, "cause": None, "remedy": None, "path": str(known.path), "build": known.build}
    try:
        if known is not None and known.origin != "disabled":
            raise known.failure
        if _set("COMEBA_DISABLE_EXTENSION"):
            return {"state": "disabled", "cause": "COMEBA_DISABLE_EXTENSION is set", "remedy": "Unset it", "path": ""}
        ahead = _ahead_of_time(False)
        if ahead is not None:
            return {"state": "ahead of time", "cause": None, "remedy": None, "path": str(ahead)}
        archs = build.asked_archs() or _local_archs()
        path = _library(build.recipe(False, archs or ("80",)))
        _require_own(path)
        if path.exists():
            return {"state": "cached", "cause": None, "remedy": None, "path": str(path)}
        if not archs:
            return {"state": "not compiled", "cause": "no GPU is visible", "remedy": "", "path": ""}
        return {"state": "not compiled yet", "cause": None, "remedy": "compiled on first use", "path": str(path)}
    except BuildFailure as failure:
        return {
            "state": "failed" if known else "unavailable",
            "cause": failure.cause,
            "remedy": failure.remedy,
            "path": str(failure.log or ""),
        }


def cache_folder() -> Path:
    """``COMEBA_CACHE_DIR``, else ``comeba_ext`` in the user's cache folder."""
    if os.environ.get("COMEBA_CACHE_DIR"):
        return Path(os.environ["COMEBA_CACHE_DIR"]).expanduser()
    base = os.environ.get("XDG_CACHE_HOME") or os.environ.get("LOCALAPPDATA") or Path.home() / ".cache"
    return Path(base) / "comeba_ext"


# -- parts ----------------------------------------------------------------------------------------------------------


def _load_once(device_type: str) -> State:
    with _guard:
        if device_type not in _states or _states[device_type].origin == "not asked for":
            if _set("COMEBA_DISABLE_EXTENSION"):
                off = BuildFailure("COMEBA_DISABLE_EXTENSION is set", "Unset it to use compiled kernels")
                _states[device_type] = State(False, "disabled", failure=off)
                return _states[device_type]
            try:
                _states[device_type] = _load(emulated=device_type != "cuda")
            except BuildFailure as failure:
                _states[device_type] = State(False, "failed", failure=failure)
                logger.warning("comeba: no compiled kernels, plain torch takes over: %s", failure)
        return _states[device_type]


def _load(emulated: bool) -> State:
    ahead = _ahead_of_time(emulated)
    if ahead is not None:
        try:
            return _import(ahead, "ahead of time")
        except ImportError as error:
            logger.warning("comeba: the kernels built ahead of time do not load (%s); compiling anew", error)
    recipe = build.recipe(emulated, () if emulated else build.asked_archs() or _local_archs())
    if not emulated and not recipe.archs:
        raise BuildFailure("no GPU is visible to torch", "Check the driver, or set COMEBA_CUDA_ARCH to compile all the same")
    path = _library(recipe)
    try:
        _require_own(path)
        with contextlib.suppress(ImportError):  # damaged: compiled again below
            if path.exists():  # whole, since it is put in place in one step; needs no lock and no writable folder
                return _import(path, "cached")
        path.parent.parent.mkdir(mode=0o755, parents=True, exist_ok=True)  # for other users to read, where it is everybody's
        with _lock(path):
            _require_own(path)
            if path.exists():
                with contextlib.suppress(ImportError):  # by the process that we waited for
                    return _import(path, "cached")
            _compile(recipe, path)
    except OSError as error:
        raise BuildFailure(f"the cache folder {cache_folder()} cannot be used ({error})", "Set COMEBA_CACHE_DIR to another one") from error
    try:
        return _import(path, "compiled now")
    except ImportError as error:
        raise BuildFailure(f"the compiled kernels do not load ({error})", "Please report this", path.parent / "log.txt") from error


def _require_own(path: Path) -> None:
    """Refuse a library that somebody else could have put there: loading it runs its code.

    Raises:
        BuildFailure: it, or a folder of the cache above it, belongs to another user than this one or root, or others may write.
    """
    if os.name != "posix":
        return
    for place in (cache_folder(), path.parent, path):
        try:
            facts = place.stat()
        except FileNotFoundError:
            continue
        except OSError as error:
            raise BuildFailure(
                f"the cache folder {place} cannot be used ({error.strerror})", "Set COMEBA_CACHE_DIR to another one"
            ) from None
        else:
            if facts.st_uid not in (os.getuid(), 0) or facts.st_mode & 0o022:
                raise BuildFailure(
                    f"others may write to {place}, so what lies there is not loaded",
                    f"Remove it, or make it yours alone (chmod go-w {place})",
                )


def _compile(recipe: build.Recipe, path: Path) -> None:
    """Compile into a folder of its own, then put that folder in place in one step. The caller holds the lock."""
    final = path.parent
    for stale in final.parent.glob(f"{final.name}.part-*"):  # left by a compile that was killed
        shutil.rmtree(stale, ignore_errors=True)
    work = Path(tempfile.mkdtemp(prefix=f"{final.name}.part-", dir=final.parent))
    target = "the CPU (emulated)" if recipe.emulated else ", ".join(f"sm_{arch}" for arch in recipe.archs)
    start = time.perf_counter()
    _progress(f"comeba: compiling {'' if recipe.emulated else 'CUDA '}kernels for {target}, once, about a minute …")
    log = final.parent / f"{final.name}.log"
    try:
        build.compile_library(recipe, work, work / path.name, log)
        for made in work.glob("*.o"):
            made.unlink()
        for made in (work, *work.glob(path.name)):  # whatever the user's mask lets the linker do: what others may write is not loaded
            made.chmod(0o755)
        (work / "build.json").write_text(json.dumps({"torch": recipe.torch, "archs": recipe.archs}))
        if final.exists():
            shutil.rmtree(final)
        os.replace(work, final)
    finally:
        shutil.rmtree(work, ignore_errors=True)
    log.replace(final / "log.txt")
    _progress(f"comeba: compiled in {time.perf_counter() - start:.0f} s")


def _lock(path: Path) -> FileLock:
    """The operating system's lock: gone with the process that held it, however that ended."""
    lock = FileLock(path.parent.with_suffix(".lock"))
    try:
        lock.acquire(timeout=0.2)
        lock.release()
    except Timeout:
        _progress("comeba: another process compiles the kernels, waiting for it …")
    return lock


def _library(recipe: build.Recipe) -> Path:
    return cache_folder() / f"{'emulated-' if recipe.emulated else ''}{recipe.key()}" / f"{build.MODULE}.so"


def _local_archs() -> tuple[str, ...]:
    """Of the GPUs that are here: ``("90a",)``. From 9.0 on, with the features of that architecture alone."""
    if not torch.cuda.is_available():
        return ()
    found = {torch.cuda.get_device_capability(n) for n in range(torch.cuda.device_count())}
    return tuple(f"{major}{minor}{'a' if major >= 9 else ''}" for major, minor in sorted(found))


def _ahead_of_time(emulated: bool) -> Path | None:
    """The library that setup.py built into the package, if it was built for the torch and the GPUs that are here."""
    described = Path(__file__).parents[1] / f"{build.MODULE}.json"
    if not described.exists():
        return None
    made = json.loads(described.read_text())
    now = build.torch_facts()
    if made["emulated"] != emulated or any(made["torch"][name] != now[name] for name in ("version", "cuda")):
        return None
    oldest = min(map(build.number, made["archs"]), default=0)
    if not emulated and any(build.number(arch) < oldest for arch in _local_archs()):
        return None
    return described.with_suffix(".so")


def _import(path: Path, origin: str) -> State:
    """Load the library, which registers the operators."""
    name = build.MODULE
    spec = importlib.util.spec_from_file_location(name, path, loader=ExtensionFileLoader(name, str(path)))
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return State(True, origin, path, module.build())


def _set(variable: str) -> bool:
    return os.environ.get(variable, "0").lower() not in ("", "0", "false", "no")


def _progress(line: str) -> None:
    """A minute of silence looks like a hang: to the user's logging if it listens, else to stderr."""
    if logger.isEnabledFor(logging.INFO):
        logger.info(line)
    elif logger.level == logging.NOTSET and logging.getLogger("comeba_ext").level == logging.NOTSET:
        sys.stderr.write(line + "\n")
