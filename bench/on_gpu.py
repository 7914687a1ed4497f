"""Everything that wants an NVIDIA GPU, in one go: build, tests, compute-sanitizer, all benchmarks.

    python bench/on_gpu.py                     from the checkout, with a CUDA build of torch and nvcc
    python bench/on_gpu.py --quick --only tests bench_hooked_linear

Results of the benchmarks land in bench/results/<machine>-<name>.json and .png, the log of every part in --logs. A part that fails
does not keep the others from running; parts that passed at this commit are not run again (``--redo`` runs them).
"""

from __future__ import annotations

import argparse
import importlib.util
import json
import os
import re
import shutil
import subprocess
import sys
import tempfile
import time
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(ROOT))

from comeba_ext.kernels import build  # noqa: E402

RESULTS = ROOT / "bench" / "results"
BUILD = "from comeba_ext.kernels import loader as e; ok = e.available('cuda'); print(e.status()); raise SystemExit(not ok)"
# Small shapes: under the sanitizer a kernel is a hundred times slower.
SANITIZED_TESTS = ["python_tests/test_hook_operators.py", "python_tests/test_cholesky_update.py"]


def main() -> int:
    arguments = parse()
    name = machine()
    log_folder = arguments.logs or Path(tempfile.mkdtemp(prefix="comeba_on_gpu_"))
    log_folder.mkdir(parents=True, exist_ok=True)
    memory = RESULTS / f"{name}-on_gpu.json"
    known = json.loads(memory.read_text()) if memory.exists() else {}
    known = known if known.get("commit") == commit() and not arguments.redo else {"commit": commit(), "parts": {}}
    print(f"{name}, commit {known['commit']}, logs in {log_folder}", flush=True)
    todo = parts(arguments.quick, name)
    wanted = [part for part in todo if not arguments.only or part in arguments.only]
    for part in wanted:
        if known["parts"].get(part, {}).get("outcome") == "passed":
            print(f"{part:40} passed before", flush=True)
            continue
        start = time.monotonic()
        outcome, detail = run(part, todo[part], name, log_folder / f"{part}.log", arguments.timeout)
        known["parts"][part] = {"outcome": outcome, "detail": detail, "seconds": round(time.monotonic() - start, 1)}
        write(memory, json.dumps(known, indent=1) + "\n")
        print(f"{part:40} {outcome} ({known['parts'][part]['seconds']} s) {detail}", flush=True)
    print("\nsummary")
    for part, entry in known["parts"].items():
        print(f"  {part:40} {entry['outcome']:8} {entry['detail']}")
    return int(any(entry["outcome"] == "failed" for entry in known["parts"].values()))


def parse() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--quick", action="store_true", help="pass --quick to the benchmarks")
    parser.add_argument("--only", nargs="+", metavar="PART", choices=list(parts()), help="some parts: %(choices)s")
    parser.add_argument("--redo", action="store_true", help="run parts that passed at this commit again")
    parser.add_argument("--timeout", type=float, default=3600, help="seconds for one part")
    parser.add_argument("--logs", type=Path, help="folder for the parts' output; default: a temporary one")
    return parser.parse_args()


def parts(quick: bool = False, name: str = "") -> dict[str, list[list[str]]]:
    """Name to the commands of a part."""
    python = sys.executable
    made = Path(tempfile.gettempdir()) / f"comeba_cmake_{os.getuid()}"
    tests = [python, "-m", "pytest", "-q", "-p", "no:cacheprovider", "-m", "cuda"]
    at_once = ["-n", str(min(8, os.cpu_count() or 1))] if importlib.util.find_spec("xdist") else []
    todo = {
        "doctor": [[python, "-m", "comeba_ext.cli", "doctor"]],
        "build": [[python, "-c", BUILD]],
        "cxx_tests": [
            ["cmake", "-S", str(ROOT), "-B", str(made), "-DCOMEBA_EMULATE=OFF"],
            ["cmake", "--build", str(made), "-j"],
            [str(made / "test_kernels")],
        ],
        "tests": [[*tests, *at_once, "python_tests"]],
    }
    for tool in ("memcheck", "racecheck"):
        sanitizer = ["compute-sanitizer", "--tool", tool, "--error-exitcode", "9"]
        todo[f"{tool}_cxx"] = [[*sanitizer, str(made / "test_kernels")]]
        todo[f"{tool}_operators"] = [[*sanitizer, "--target-processes", "all", *tests, *SANITIZED_TESTS]]
    for path in sorted((ROOT / "bench").glob("bench_*.py")):
        todo[path.stem] = [[python, str(path), "--json", *(["--quick"] if quick else [])]]
        if '"--plot"' in path.read_text():
            todo[path.stem][0] += ["--plot", str(RESULTS / f"{name}-{path.stem.removeprefix('bench_')}.png")]
    return todo


def run(part: str, commands: list[list[str]], name: str, log: Path, timeout: float) -> tuple[str, str]:
    """``("passed" | "missed" | "skipped" | "failed", why)``; a benchmark is ``missed`` when one of its targets is."""
    environment = {
        **os.environ,
        "PYTHONPATH": os.pathsep.join([str(ROOT), os.environ.get("PYTHONPATH", "")]).rstrip(":"),
        "PYTHONUNBUFFERED": "1",
    }
    environment.setdefault("CUDACXX", build.find_nvcc() or "nvcc")
    # Allocations of torch's cache would hide what is read out of bounds.
    if part.endswith("_operators"):
        environment["PYTORCH_NO_CUDA_MEMORY_CACHING"] = "1"
    with open(log, "w") as out:
        for command in commands:
            if shutil.which(command[0]) is None:
                return "skipped", f"no {Path(command[0]).name} here"
            to = subprocess.PIPE if part.startswith("bench_") else out  # what was said until a timeout is in the log
            try:
                done = subprocess.run(
                    command, cwd=ROOT, env=environment, timeout=timeout, text=True, errors="replace", stdout=to, stderr=out
                )
            except subprocess.TimeoutExpired:
                return "failed", f"not done after {timeout:g} s"
            if part.startswith("bench_"):
                out.write(done.stdout)
                return keep(part, done, name)
            if done.returncode != 0:
                last = [line for line in log.read_text().splitlines() if line.strip()][-1:]
                return "failed", f"exit code {done.returncode}: {''.join(last)[:150]} ({log})"
    return "passed", ""


def keep(part: str, done: subprocess.CompletedProcess, name: str) -> tuple[str, str]:
    """Put a benchmark's object among the results; its exit code 1 alone means that a target was missed."""
    try:
        result = json.loads(done.stdout.strip().splitlines()[-1])
        missed = [entry["name"] for entry in result["targets"] if not entry["holds"]]
    except (IndexError, ValueError, KeyError, TypeError):
        return "failed", f"exit code {done.returncode}, no result"
    write(RESULTS / f"{name}-{part.removeprefix('bench_')}.json", json.dumps(result, indent=1) + "\n")
    return ("missed", "; ".join(missed)) if missed else ("passed", f"{len(result['targets'])} targets hold")


def machine() -> str:
    """The GPU's name as a file name: ``nvidia-h200``."""
    import torch

    if not torch.cuda.is_available():
        raise SystemExit("No GPU is visible to torch here; `comeba doctor` tells more.")
    return re.sub(r"[^a-z0-9]+", "-", torch.cuda.get_device_name().lower()).strip("-")


def commit() -> str:
    done = subprocess.run(["git", "-C", str(ROOT), "rev-parse", "--short", "HEAD"], capture_output=True, text=True)
    return done.stdout.strip() or "unknown"


def write(path: Path, text: str) -> None:
    """In one step: an interrupted run leaves the old file."""
    path.parent.mkdir(parents=True, exist_ok=True)
    part = path.with_suffix(".part")
    part.write_text(text)
    os.replace(part, path)


if __name__ == "__main__":
    sys.exit(main())
