"""Kill edit, covariance, experiment and save at random moments until each has finished; every result must equal, bit for bit, the
one that nobody disturbed.

    python bench/kill_harness.py --kills 300          # on demand: a kill takes five to fifteen seconds

A run is killed (SIGKILL) after a random part of the time it takes undisturbed, started again with the same command, and so on
until it has been killed often enough in a row; the last start is left alone. Prints, and writes to ``results/kills.json``.
"""

from __future__ import annotations

import argparse
import hashlib
import json
import random
import shutil
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import torch
from safetensors import safe_open

sys.path.insert(0, str(Path(__file__).parent))
import common

from comeba_ext import testbed
from comeba_ext.storage import MANIFEST

IN_A_ROW = 3  # kills before a run is left to finish
EXPERIMENT = """title: kills
protocol: consecutive
samples: 12
batch_size: 3
evaluations: 2
methods: [COMEBA-HK, FT-L]
"""
SAVER = """
import sys, torch
from comeba_ext.storage import read_folder, write_folder
folder = sys.argv[1]
try:
    n = read_folder(folder)[0]["number"]
except ValueError:
    n = 0
while n < 400:
    n += 1
    tensors = {"a": torch.full((200, 200), float(n))}
    write_folder(folder, {"format": 1, "number": n}, {"adapter": tensors, "state": tensors}, {"log": f"{n}"})
"""


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--kills", type=int, default=60)
    parser.add_argument("--seed", type=int, default=0)
    args = parser.parse_args()
    draw, counts = random.Random(args.seed), {}
    with tempfile.TemporaryDirectory() as home:
        home = Path(home)
        jobs = prepared(home)
        expected, seconds = {}, {}
        for name, (command, result) in jobs.items():
            start = time.monotonic()
            subprocess.run(command(home / f"{name}-whole"), check=True, capture_output=True)
            seconds[name], expected[name] = time.monotonic() - start, result(home / f"{name}-whole")
            counts[name] = {"kills": 0, "runs": 0, "equal": 0}
        while sum(own["kills"] for own in counts.values()) < args.kills:
            name = min(counts, key=lambda job: counts[job]["kills"])
            command, result = jobs[name]
            out, own = home / f"{name}-{counts[name]['runs']}", counts[name]
            for _ in range(IN_A_ROW):
                own["kills"] += killed(command(out), draw.uniform(0.1, 0.95) * seconds[name])
            subprocess.run(command(out), check=True, capture_output=True)
            own["runs"] += 1
            own["equal"] += result(out) == expected[name]
            shutil.rmtree(out) if out.is_dir() else out.unlink()
            print(f"{sum(own['kills'] for own in counts.values())} kills: {counts}", flush=True)
    rows = [{"what": name, **own} for name, own in counts.items()]
    runs, equal = (sum(row[key] for row in rows) for key in ("runs", "equal"))
    print(f"{sum(row['kills'] for row in rows)} kills; {equal} of {runs} runs ended with equal bits")
    path = Path(__file__).parent / "results" / "kills.json"
    path.write_text(json.dumps({"machine": common.machine(), "rows": rows}, indent=1) + "\n")
    raise SystemExit(equal < runs)


def prepared(home: Path) -> dict:
    """Name to the command for an output path, and what is compared of it."""
    (home / "facts.jsonl").write_text("".join(json.dumps(r.to_record()) + "\n" for r in testbed.facts()[:24]))
    stream = testbed.texts()
    (home / "texts.txt").write_text("\n\n".join(next(stream) for _ in range(4000)))
    (home / "kills.yaml").write_text(EXPERIMENT)
    comeba, cov = [sys.executable, "-m", "comeba_ext.cli"], str(home / "c.safetensors")
    subprocess.run([*comeba, "covariance", "testbed", home / "texts.txt", "--out", cov], check=True, capture_output=True)
    return {
        "edit": (lambda out: [*comeba, "edit", "testbed", home / "facts.jsonl", "--covariance", cov, "--out", out, "--resume",
                              "--save-every", "1", "--batch-size", "3"], saved),
        "covariance": (lambda out: [*comeba, "covariance", "testbed", home / "texts.txt", "--tokens", "40000", "--out", out], tensors),
        "experiment": (lambda out: [*comeba, "experiment", home / "kills.yaml", "--covariance", cov, "--out", out], measured),
        "save": (lambda out: [sys.executable, "-c", SAVER, out], saved),
    }  # fmt: skip


def killed(command: list, after: float) -> bool:
    """Whether it was still running so many seconds after its start, when it was killed."""
    process = subprocess.Popen(command, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
    try:
        process.wait(after)
        return False
    except subprocess.TimeoutExpired:
        process.kill()
        process.wait()
        return True


def tensors(path: Path) -> str:
    """Digest of a file's tensors."""
    found = hashlib.sha256()
    with safe_open(path, framework="pt") as file:
        for name in sorted(file.keys()):
            found.update(name.encode() + file.get_tensor(name).contiguous().view(-1).view(dtype=torch.uint8).numpy().tobytes())
    return found.hexdigest()


def saved(folder: Path) -> list:
    """What a folder of edits holds, names of files left out; and that nothing else of ours lies there."""
    manifest = json.loads((folder / MANIFEST).read_text())
    files = manifest.pop("files")
    assert {path.name for path in folder.iterdir()} <= {*files.values(), MANIFEST, ".comeba.lock"}, sorted(folder.iterdir())
    return [manifest, *(tensors(folder / name) for name in files.values() if name.endswith(".safetensors"))]


def measured(folder: Path) -> list:
    """Rows without what depends on the clock."""
    rows = json.loads((folder / "kills.json").read_text())["rows"]
    return [{key: value for key, value in row.items() if key not in ("seconds_per_edit", "peak_memory")} for row in rows]


if __name__ == "__main__":
    main()
