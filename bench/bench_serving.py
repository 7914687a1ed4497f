"""Requests a second over loopback: a model with edits, without them by name, and served plain, by as many clients at once.

    python bench/bench_serving.py --edits 200 --clients 1 4 16 --json
    python bench/bench_serving.py --model FOLDER --saved EDITS --json      # the embedded model, then one with edits of its own

Two servers (``comeba serve``) run beside each other with the same settings and are asked in turn, a few seconds at a time; a row's numbers
are medians over the rounds. Half of the prompts are edited ones, half name no edited subject. Every answer is compared with what
``generate`` writes for its prompt alone. Clients share the machine with the servers.
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

from comeba_ext import Editor, EditRequest, load_edits, testbed
from comeba_ext.loading import load_model
from comeba_ext.storage import read_manifest

NEW = 16  # tokens
KINDS = ("plain", "edited", "edited, asked unedited")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--edits", type=int, default=200, help="of the embedded model")
    parser.add_argument("--model", help="another model's folder, with")
    parser.add_argument("--saved", type=Path, help="edits of it")
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
        cases = [("testbed", Path(home), edited(testbed.facts()[: args.edits], Path(home)))]
        if args.model:
            ledger = read_manifest(args.saved)["ledger"]
            requests = [EditRequest.from_record(own["request"]) for own in ledger if own["removed"] is None]
            cases.append((args.model, args.saved, [request.text for request in requests]))
        for model, folder, prompts in cases:
            prompts = prompts[:: max(1, len(prompts) // 12)]
            prompts += [fact.text for fact in testbed.facts()[-len(prompts) :]]
            expected = {kind: texts(model, prompts, folder if kind == "edited" else None) for kind in KINDS}
            for threads in args.threads:
                rows += measured(model, folder, threads, expected, args)
    wrong = sum(row["wrong"] for row in rows)
    finish(rows, [target("answers that are not generate's", wrong, 0, not wrong)], args.json)


def measured(model: str, folder: Path, threads: int, expected: dict[str, dict[str, str]], args) -> list[dict]:
    """A row for every kind and number of clients."""
    rows, name = [], Path(model).name
    with served(model, threads) as plain, served(model, threads, "--edits", str(folder)) as own:
        where = {KINDS[0]: (plain, name), KINDS[1]: (own, name), KINDS[2]: (own, f"{name}-unedited")}
        for clients in args.clients:
            busy, rounds = os.getloadavg()[0], []
            for _ in range(args.rounds):
                rounds.append({kind: load(*where[kind], clients, args.seconds, expected[kind]) for kind in KINDS})
            for kind in KINDS:
                found = [own[kind] for own in rounds]
                middle = lambda what, found=found: statistics.median(one[what] for one in found)  # noqa: E731
                rows.append(
                    {
                        "model": name,
                        "server": kind,
                        "threads": threads,
                        "clients": clients,
                        "requests_per_second": round(middle("requests_per_second"), 2),
                        "tokens_per_second": round(middle("tokens_per_second"), 1),
                        "of_plain": round(
                            statistics.median(one[kind]["tokens_per_second"] / one[KINDS[0]]["tokens_per_second"] for one in rounds), 3
                        ),
                        "median_ms": round(1e3 * middle("median"), 1),
                        "p95_ms": round(1e3 * middle("p95"), 1),
                        "requests": sum(one["requests"] for one in found),
                        "wrong": sum(one["wrong"] for one in found),
                        "load_before": round(busy, 1),
                    }
                )
                if not args.json:
                    print(", ".join(f"{key} {value}" for key, value in rows[-1].items()), flush=True)
    return rows


def edited(facts: list, home: Path) -> list[str]:
    """Edits the embedded model into a folder; the edited prompts."""
    editor = Editor(*testbed.load())
    editor.collect_covariance(testbed.texts(), progress=False)
    for _ in editor.edit_all(facts, 10, progress=False):
        pass
    editor.save_pretrained(home, inference_only=True)
    return [fact.text for fact in facts]


def texts(name: str, prompts: list[str], folder: Path | None) -> dict[str, str]:
    """What ``generate`` writes behind every prompt alone."""
    model, tokenizer = load_model(name)
    if folder is not None:
        load_edits(model, folder)
    found = {}
    for prompt in prompts:
        ids = tokenizer(prompt, return_tensors="pt")["input_ids"]
        with torch.no_grad():
            out = model.generate(input_ids=ids, attention_mask=torch.ones_like(ids), max_new_tokens=NEW, do_sample=False)
        found[prompt] = tokenizer.decode(out[0, ids.shape[1] :], skip_special_tokens=True)
    return found


@contextmanager
def served(model: str, threads: int, *options: str):
    """Base address of a server in a process of its own."""
    command = [sys.executable, "-m", "comeba_ext.cli", "serve", model, "--port", "0", "--json", "--threads", str(threads), *options]
    process = subprocess.Popen(command, stdout=subprocess.PIPE, text=True, env=os.environ)
    try:
        yield json.loads(process.stdout.readline())["url"]
    finally:
        process.send_signal(signal.SIGTERM)
        process.wait()


def load(url: str, model: str, clients: int, seconds: float, expected: dict[str, str]) -> dict:
    """So many clients, each asking as soon as it was answered."""
    place, prompts = urlsplit(url), list(expected)
    times, tokens, wrong, errors, end = [], [], [], [], time.perf_counter() + seconds

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
            tokens.append(answer["usage"]["completion_tokens"])
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
        "requests_per_second": len(times) / took,
        "tokens_per_second": sum(tokens) / took,
        "median": statistics.median(times),
        "p95": times[int(0.95 * (len(times) - 1))],
        "requests": len(times),
        "wrong": len(wrong),
    }


if __name__ == "__main__":
    main()
