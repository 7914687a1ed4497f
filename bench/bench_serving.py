"""Requests a second over loopback: a model with edits, without them by name, and served plain, by as many clients at once.

    python bench/bench_serving.py --edits 200 --clients 1 4 16 --json

Two servers (``comeba serve``) run beside each other with the same settings and are asked in turn, a few seconds at a time; a row's numbers
are medians over the rounds. Every answer is compared with what ``generate`` writes for its prompt alone. Clients share the machine with
the servers.
"""

from __future__ import annotations

import argparse
import http.client
import json
import os
import signal
import statistics
import subprocess
import sys
import tempfile
import threading
import time
from contextlib import contextmanager
from pathlib import Path
from urllib.parse import urlsplit

import torch
from common import finish, target

from comeba_ext import Editor, load_edits, testbed

NEW = 16  # tokens
KINDS = ("plain", "edited", "edited, asked unedited")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--edits", type=int, default=200)
    parser.add_argument("--clients", type=int, nargs="+", default=[1, 4, 16])
    parser.add_argument("--threads", type=int, nargs="+", default=[1, 2])
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--seconds", type=float, default=4)
    parser.add_argument("--quick", action="store_true", help="50 edits, one round of two seconds")
    parser.add_argument("--json", action="store_true")
    args = parser.parse_args()
    if args.quick:
        args.edits, args.clients, args.threads, args.rounds, args.seconds = 50, [1, 4], [1], 1, 2
    rows: list[dict] = []
    with tempfile.TemporaryDirectory() as home:
        facts = testbed.facts()[: args.edits]
        edited(facts, Path(home))
        expected = {kind: texts(facts, Path(home), kind) for kind in KINDS}
        for threads in args.threads:
            with served(threads) as plain, served(threads, "--edits", home) as own:
                where = {KINDS[0]: (plain, "testbed"), KINDS[1]: (own, "testbed"), KINDS[2]: (own, "testbed-unedited")}
                for clients in args.clients:
                    rounds = [
                        {kind: load(*where[kind], clients, args.seconds, expected[kind]) for kind in KINDS} for _ in range(args.rounds)
                    ]
                    for kind in KINDS:
                        found = [own[kind] for own in rounds]
                        ratio = statistics.median(own[kind]["per_second"] / own[KINDS[0]]["per_second"] for own in rounds)
                        rows.append(
                            {
                                "server": kind,
                                "threads": threads,
                                "clients": clients,
                                "requests_per_second": round(statistics.median(one["per_second"] for one in found), 2),
                                "of_plain": round(ratio, 3),
                                "median_ms": round(1e3 * statistics.median(one["median"] for one in found), 1),
                                "p95_ms": round(1e3 * statistics.median(one["p95"] for one in found), 1),
                                "requests": sum(one["requests"] for one in found),
                                "wrong": sum(one["wrong"] for one in found),
                                "load": round(os.getloadavg()[0], 1),  # of the machine, in the last minute
                            }
                        )
                        if not args.json:
                            print(", ".join(f"{key} {value}" for key, value in rows[-1].items()), flush=True)
    ratio = statistics.median(row["of_plain"] for row in rows if row["server"] == "edited")
    wrong = sum(row["wrong"] for row in rows)
    finish(
        rows,
        [
            target("requests a second, edited to plain", ratio, 0.8, ratio >= 0.8),
            target("answers that are not generate's", wrong, 0, not wrong),
        ],
        args.json,
    )


def edited(facts: list, home: Path) -> None:
    editor = Editor(*testbed.load())
    editor.collect_covariance(testbed.texts(), progress=False)
    for _ in editor.edit_all(facts, 10, progress=False):
        pass
    editor.save_pretrained(home, inference_only=True)


def texts(facts: list, home: Path, kind: str) -> dict[str, str]:
    """What ``generate`` writes behind the facts' prompts, each alone."""
    model, tokenizer = testbed.load()
    if kind == "edited":
        load_edits(model, home)
    found = {}
    for fact in facts[:: max(1, len(facts) // 25)]:
        ids = tokenizer(fact.text, return_tensors="pt")["input_ids"]
        with torch.no_grad():
            out = model.generate(input_ids=ids, attention_mask=torch.ones_like(ids), max_new_tokens=NEW, do_sample=False)
        found[fact.text] = tokenizer.decode(out[0, ids.shape[1] :], skip_special_tokens=True)
    return found


@contextmanager
def served(threads: int, *options: str):
    """Base address of a server in a process of its own."""
    command = [sys.executable, "-m", "comeba_ext.cli", "serve", "testbed", "--port", "0", "--json", "--threads", str(threads), *options]
    process = subprocess.Popen(command, stdout=subprocess.PIPE, text=True, env=os.environ)
    try:
        yield json.loads(process.stdout.readline())["url"]
    finally:
        process.send_signal(signal.SIGTERM)
        process.wait()


def load(url: str, model: str, clients: int, seconds: float, expected: dict[str, str]) -> dict:
    """So many clients, each asking as soon as it was answered."""
    place, prompts = urlsplit(url), list(expected)
    times, wrong, errors, end = [], [], [], time.perf_counter() + seconds

    def ask(first: int) -> None:
        connection = http.client.HTTPConnection(place.hostname, place.port, timeout=120)
        n = first
        while time.perf_counter() < end:
            prompt = prompts[n % len(prompts)]
            body = json.dumps({"model": model, "prompt": prompt, "max_tokens": NEW, "temperature": 0})
            start = time.perf_counter()
            connection.request("POST", "/v1/completions", body, {"Content-Type": "application/json"})
            answer = json.loads(connection.getresponse().read())
            times.append(time.perf_counter() - start)
            if "error" in answer:
                errors.append(answer["error"]["message"])
                return
            if answer["choices"][0]["text"] != expected[prompt]:
                wrong.append(prompt)
            n += clients

    started = time.perf_counter()
    asking = [threading.Thread(target=ask, args=(n,)) for n in range(clients)]
    for thread in asking:
        thread.start()
    for thread in asking:
        thread.join()
    if errors:
        raise SystemExit(f"the server refused: {errors[0]}")
    took = time.perf_counter() - started
    times.sort()
    return {
        "per_second": len(times) / took,
        "median": statistics.median(times),
        "p95": times[int(0.95 * (len(times) - 1))],
        "requests": len(times),
        "wrong": len(wrong),
    }


if __name__ == "__main__":
    main()
