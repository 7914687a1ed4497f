"""Cases of an experiment in processes of their own: this command again, once a case."""

from __future__ import annotations

import os
import re
import subprocess
import sys
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor, as_completed
from pathlib import Path

import torch
from tqdm.auto import tqdm

from comeba_ext.experiments.runner import slug
from comeba_ext.storage import make_folder


def in_processes(cases: list[str], jobs: int, out: Path, name: str, progress: bool = True) -> Iterator[str]:
    """Run ``comeba experiment`` as it was called, with ``--case``, for each case; ``jobs`` at once.

    What a process says is in ``out/<name>/<case>.txt``. Without ``OMP_NUM_THREADS`` the processes share the cores; several GPUs are
    taken in turn (``CUDA_VISIBLE_DEVICES``).

    Yields:
        a sentence for every case that failed; its log is where it stopped, and the same command goes on there.
    """
    folder = make_folder(out / name)
    pool, running = ThreadPoolExecutor(jobs), []
    bar = tqdm(total=len(cases), disable=not progress, unit="case", desc=f"{jobs} processes")
    try:
        left = {pool.submit(_run, number, case, jobs, folder / f"{slug(case)}.txt", running): case for number, case in enumerate(cases)}
        for done in as_completed(left):
            bar.update()
            if (why := done.result()) is not None:
                yield f"{left[done]}: {why}"
    finally:  # interrupted, or nobody listens any more
        pool.shutdown(wait=False, cancel_futures=True)
        for process in running:
            process.terminate()
        bar.close()


def _run(number: int, case: str, jobs: int, log: Path, running: list[subprocess.Popen]) -> str | None:
    """Why it failed, if it did."""
    environment = {"OMP_NUM_THREADS": str(max(1, (os.cpu_count() or 1) // jobs)), **os.environ}
    named = any(re.fullmatch(r"(--device=)?cuda:\d+", argument) for argument in sys.argv)  # that one is for all
    if not named and "CUDA_VISIBLE_DEVICES" not in os.environ and (count := torch.cuda.device_count()) > 1:
        environment["CUDA_VISIBLE_DEVICES"] = str(number % count)
    command = [sys.executable, "-m", "comeba_ext.cli", *_without(sys.argv[1:], "--jobs", "--case"), "--case", case]
    with log.open("w") as text:
        process = subprocess.Popen(command, stdout=text, stderr=subprocess.STDOUT, env=environment)
        running.append(process)
        code = process.wait()
        running.remove(process)
    last = [line for line in log.read_text(errors="replace").splitlines() if line.strip()][-1:]
    return None if code == 0 else f"ended with {code}: {''.join(last)[-300:]} (all of it: {log})"


def _without(arguments: list[str], *options: str) -> list[str]:
    """Command-line arguments without these options and their values."""
    kept, skip = [], False
    for argument in arguments:
        if skip:
            skip = False
        elif argument in options:
            skip = True
        elif argument.partition("=")[0] not in options:
            kept.append(argument)
    return kept
