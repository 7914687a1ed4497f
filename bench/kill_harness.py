"""Kill edit, covariance, experiment and save at random moments until each has finished; every result must equal, bit for bit, the
one that nobody disturbed.

    python bench/kill_harness.py --kills 300          # on demand
    python bench/kill_harness.py --edits 10000        # one long run of CounterFact records, killed four to five times on its way

A run is killed (SIGKILL) after a random part of the time it takes undisturbed, started again with the same command, and so on
until it has been killed often enough in a row; the last start is left alone.
Runs are forked from a process that has loaded the libraries, so that the moments are moments of work and not of imports.
"""

from __future__ import annotations

import os

os.environ["OMP_NUM_THREADS"] = "1"  # a forked process has no thread pool to share

import argparse
import contextlib
import hashlib
import json
import multiprocessing
import random
import shutil
import sys
import tempfile
import time
from pathlib import Path

import torch
from safetensors import safe_open

sys.path.insert(0, str(Path(__file__).parent))
import common

import comeba_ext.editor
import comeba_ext.evaluation.protocols
import comeba_ext.experiments.runner
import comeba_ext.methods
from comeba_ext import cli, testbed
from comeba_ext.storage import CARD, MANIFEST, files_of, read_folder, write_folder

IN_A_ROW = 8  # kills before a run is left to finish
EXPERIMENT = """title: kills
protocol: consecutive
samples: 6
batch_size: 3
evaluations: 2
methods: [COMEBA-HK, FT-L]
"""
FORK = multiprocessing.get_context("fork")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--kills", type=int, default=60)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--edits", type=int, help="instead: edit so many records in one run, in batches of 50")
    parser.add_argument("--quick", action="store_true", help="eight kills")
    parser.add_argument("--json", action="store_true")
    args = parser.parse_args()
    args.kills = 1 if args.edits else 8 if args.quick else args.kills
    least, most = (0.1, 0.3) if args.edits else (0.05, 0.8)
    draw, counts = random.Random(args.seed), {}
    with tempfile.TemporaryDirectory() as home:
        home = Path(home)
        jobs = long_run(home, args.edits) if args.edits else prepared(home)
        expected, seconds = {}, {}
        for name, (command, result) in jobs.items():
            start = time.monotonic()
            finished(command(home / f"{name}-whole"))
            seconds[name], expected[name] = time.monotonic() - start, result(home / f"{name}-whole")
            counts[name] = {"kills": 0, "runs": 0, "equal": 0}
        while sum(own["kills"] for own in counts.values()) < args.kills:
            name = min(counts, key=lambda job: counts[job]["kills"])
            command, result = jobs[name]
            out, own = home / f"{name}-{counts[name]['runs']}", counts[name]
            for _ in range(IN_A_ROW):
                own["kills"] += killed(command(out), draw.uniform(least, most) * seconds[name])
            finished(command(out))
            own["runs"] += 1
            own["equal"] += result(out) == expected[name]
            shutil.rmtree(out) if out.is_dir() else out.unlink()
            print(f"{sum(own['kills'] for own in counts.values())} kills: {counts}", file=sys.stderr, flush=True)
    rows = [{"what": name, **own} for name, own in counts.items()]
    runs, equal, kills = (sum(row[key] for row in rows) for key in ("runs", "equal", "kills"))
    if not args.json:
        print(f"{kills} kills; {equal} of {runs} runs ended with equal bits")
    common.finish(rows, [common.target("runs with other bits", runs - equal, 0, equal == runs)], args.json)


def prepared(home: Path) -> dict:
    """Name to the command for an output path, and what is compared of it."""
    (home / "facts.jsonl").write_text("".join(json.dumps(r.to_record()) + "\n" for r in testbed.facts()[:12]))
    stream = testbed.texts()
    (home / "texts.txt").write_text("\n\n".join(next(stream) for _ in range(2000)))
    (home / "kills.yaml").write_text(EXPERIMENT)
    cov = str(home / "c.safetensors")
    finished(lambda: comeba("covariance", "testbed", home / "texts.txt", "--out", cov))
    return {
        "edit": (edits_of(home / "facts.jsonl", cov, 1, 3), saved),
        "covariance": (lambda out: lambda: comeba("covariance", "testbed", home / "texts.txt", "--tokens", "15000", "--out", out), tensors),
        "experiment": (lambda out: lambda: comeba("experiment", home / "kills.yaml", "--covariance", cov, "--out", out), measured),
        "save": (lambda out: lambda: save_often(out), saved),
    }


def long_run(home: Path, edits: int) -> dict:
    """The same for one job, real records."""
    (home / "records.json").write_text(json.dumps(common.counterfact("edit", edits)))
    editor = comeba_ext.editor.Editor(*testbed.load())
    editor.collect_covariance(testbed.texts(), progress=False)
    editor.save_covariance(home / "c.safetensors")
    return {f"{edits} edits": (edits_of(home / "records.json", home / "c.safetensors", 4, 50), saved)}


def edits_of(records: Path, covariance, save_every: int, batch_size: int):
    """For an output path, the command that edits the embedded model."""
    how = ("--covariance", covariance, "--resume", "--save-every", save_every, "--batch-size", batch_size)
    return lambda out: lambda: comeba("edit", "testbed", records, "--out", out, *how)


def comeba(*arguments) -> None:
    """The command line; ends the process with its exit code."""
    sys.argv = ["comeba", *map(str, arguments), "--json"]
    cli.main()


def save_often(folder: Path) -> None:
    """Saves number after number, from the last one that was saved on."""
    try:
        n = read_folder(folder)[0]["number"]
    except ValueError:
        n = 0
    while n < 400:
        n += 1
        tensors = {"a": torch.full((200, 200), float(n))}
        write_folder(folder, {"format": 1, "number": n}, {"adapter": tensors, "state": tensors}, {"log": f"{n}"})


def started(work) -> multiprocessing.Process:
    def quiet() -> None:
        with open(os.devnull, "w") as nowhere, contextlib.redirect_stdout(nowhere):
            os.dup2(nowhere.fileno(), 2)
            work()

    process = FORK.Process(target=quiet)
    process.start()
    return process


def finished(work) -> None:
    process = started(work)
    process.join()
    if process.exitcode:
        raise SystemExit(f"a run that nobody killed ended with exit code {process.exitcode}")


def killed(work, after: float) -> bool:
    """Whether it was still running so many seconds after its start, when it was killed."""
    process = started(work)
    process.join(after)
    if process.exitcode is not None:
        if process.exitcode:
            raise SystemExit(f"a run that was to go on ended with exit code {process.exitcode}")
        return False
    process.kill()
    process.join()
    return True


def tensors(path: Path) -> str:
    """Digest of a file's tensors; and that nothing of killed writers lies beside it."""
    left = list(path.parent.glob(f".{path.name}.*"))
    assert not left, left
    found = hashlib.sha256()
    with safe_open(path, framework="pt") as file:
        for name in sorted(file.keys()):
            found.update(name.encode() + file.get_tensor(name).contiguous().view(-1).view(dtype=torch.uint8).numpy().tobytes())
    return found.hexdigest()


def saved(folder: Path) -> list:
    """What a folder of edits holds, names of files left out; and that nothing else of ours lies there."""
    manifest = json.loads((folder / MANIFEST).read_text())
    blocks = files_of({**manifest, "files": {}})
    files = [*manifest.pop("files").values(), *sorted(blocks)]
    assert {path.name for path in folder.iterdir()} <= {*files, MANIFEST, CARD, ".comeba.lock"}, sorted(folder.iterdir())
    return [manifest, *(tensors(folder / name) for name in files if name.endswith(".safetensors"))]


def measured(folder: Path) -> list:
    """Rows without what depends on the clock."""
    rows = json.loads((folder / "kills.json").read_text())["rows"]
    return [{key: value for key, value in row.items() if key not in ("seconds_per_edit", "peak_memory")} for row in rows]


if __name__ == "__main__":
    main()
