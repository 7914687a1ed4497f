"""Two real processes started by torchrun against one process, and against literal sums over single texts."""

import contextlib
import json
import os
import random
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import torch
import training_worker
from distributed_worker import LAYERS, TOKENS, build, summed
from filelock import FileLock
from test_editor import small_model
from test_methods import requests_of
from transformers import AutoModelForCausalLM, GPT2Config, GPT2LMHeadModel, LlamaConfig, LlamaForCausalLM

from comeba_ext import distributed, testbed
from comeba_ext.covariance import Covariance
from comeba_ext.methods.trained import FILE
from comeba_ext.storage import LOCK, read_tensors
from comeba_ext.training.trainer import LAST, MEASURED

ROOT = Path(__file__).resolve().parents[1]
WORDS = "the mother tongue of Danielle Darrieux is French capital Norway Oslo Peru Lima Angola located in Africa".split()
REQUESTS = [
    {"prompt": "The mother tongue of {} is", "subject": "Danielle Darrieux", "target_new": "Peru"},
    {"prompt": "The capital of {} is", "subject": "Norway", "target_new": "Lima"},
    {"prompt": "{} is located in", "subject": "Angola", "target_new": "Paris"},
    {"prompt": "The field of {} is", "subject": "Marie Curie", "target_new": "the guitar and the piano"},
    {"prompt": "Where {} stands, is", "subject": "The Eiffel Tower", "target_new": "Warsaw"},
]


def corpus() -> list[str]:
    draw = random.Random(0)
    return [" ".join(draw.choices(WORDS, k=draw.randint(1, 14))) for _ in range(70)]


@contextlib.contextmanager
def small_units():
    """The units of the worker."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("comeba_ext.covariance.corpus.POOL_TOKENS", 200)
        patch.setattr("comeba_ext.covariance.corpus.UNIT_TOKENS", 64)
        yield


def launch(launcher: list[str], *args) -> subprocess.CompletedProcess:
    """Two processes on the CPU, on any free port."""
    environment = os.environ | {"OMP_NUM_THREADS": "1", "PYTHONPATH": str(ROOT), "CUDA_VISIBLE_DEVICES": ""}
    command = [sys.executable, "-m", *launcher, *map(str, args)]
    return subprocess.run(command, capture_output=True, text=True, timeout=300, env=environment)


TORCHRUN = ["torch.distributed.run", "--standalone", "--nproc-per-node=2"]
ACCELERATE = ["accelerate.commands.launch", "--multi_gpu", "--num_processes=2", "--main_process_port=0"]


@pytest.fixture(scope="module")
def folder(tokenizer, tmp_path_factory):
    """Saved models, texts and requests, and the results of two processes."""
    folder = tmp_path_factory.mktemp("distributed")
    common = {
        "vocab_size": len(tokenizer),
        "initializer_range": 0.3,
        "tie_word_embeddings": False,
        "pad_token_id": 0,
        "eos_token_id": 1,
        "bos_token_id": None,
    }
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        gpt2 = GPT2Config(n_embd=32, n_layer=3, n_head=4, n_positions=128, n_inner=48, **common)
        llama = LlamaConfig(
            hidden_size=32,
            intermediate_size=48,
            num_hidden_layers=3,
            num_attention_heads=4,
            num_key_value_heads=2,
            max_position_embeddings=128,
            **common,
        )
        models = {"gpt2": GPT2LMHeadModel(gpt2), "llama": LlamaForCausalLM(llama)}
    for family, model in models.items():
        model.save_pretrained(folder / family)
        tokenizer.save_pretrained(folder / family)
    torch.save({"texts": corpus(), "requests": REQUESTS}, folder / "given.pt")
    done = launch(TORCHRUN, ROOT / "python_tests" / "distributed_worker.py", folder)
    assert done.returncode == 0, done.stderr[-4000:]
    return folder


@pytest.fixture(scope="module")
def found(folder):
    return [torch.load(folder / f"rank{rank}.pt", weights_only=False) for rank in (0, 1)]


def relative(a: torch.Tensor, b: torch.Tensor) -> float:
    return ((a.double() - b.double()).norm() / b.double().norm()).item()


def literal(folder: Path, tokens: int) -> dict[str, torch.Tensor]:
    """``E[k kᵀ]`` over the first ``tokens`` tokens in float64, one text at a time."""
    editor = build(folder)
    tokenizer = editor.tokenizer
    editor.close()
    model = AutoModelForCausalLM.from_pretrained(folder / "gpt2", dtype=torch.float64).eval()
    keys = {f"transformer.h.{n}.mlp.c_proj": [] for n in LAYERS}
    for name, rows in keys.items():
        model.get_submodule(name).register_forward_pre_hook(lambda m, args, rows=rows: rows.extend(args[0][0]))
    for text in corpus():
        with torch.no_grad():
            model(torch.tensor([tokenizer(text)["input_ids"]]))
    return {name: sum(torch.outer(key, key) for key in rows[:tokens]) / tokens for name, rows in keys.items()}


@pytest.fixture
def one_thread():
    """As in the processes: how many threads share a float32 product decides how it is rounded."""
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


def test_covariance_of_two_processes(folder, found, one_thread):
    for dtype in ("torch.float64", "torch.float32"):
        alone = build(folder, dtype=getattr(torch, dtype.removeprefix("torch.")))
        with small_units():
            alone.collect_covariance(corpus(), tokens=TOKENS, progress=False)
        for result in (rank["covariances"] for rank in found):
            assert result[f"{dtype} counts"] == (TOKENS, alone.covariance.texts)
            assert result[f"{dtype} files"] == [f"{dtype}.cov"]
            for name in alone.layers:
                assert relative(result[dtype][name], alone.covariance[name]) < 1e-10
                assert torch.equal(result[dtype][name], found[0]["covariances"][dtype][name])
        saved = Covariance.load(folder / f"{dtype}.cov")
        assert saved.tokens == saved.tokens_wanted == TOKENS and saved.unfinished is None
    for name, expected in literal(folder, TOKENS).items():
        assert relative(found[0]["covariances"]["torch.float64"][name], expected) < 1e-10
    for name, expected in literal(folder, 5).items():
        assert relative(found[1]["covariances"]["fewer units than processes"][name], expected) < 1e-10


def test_a_stopped_collection_is_resumed_by_as_many_processes(folder, found):
    errors = [rank["interruptions"]["stopped"] for rank in found]
    assert errors[1] == "RuntimeError: out of memory"
    assert errors[0] == "ComebaError: process 1 of 2 failed: RuntimeError: out of memory"
    left = found[0]["interruptions"]["left"]
    assert set(left) == {"stopped.cov", "stopped.cov.rank1-of-2"} and left["stopped.cov.rank1-of-2"] == 3
    again = sum(rank["interruptions"]["runs"] for rank in found)
    assert again > 0 and again + sum(left.values()) == number_of_units(folder)
    assert all(rank["interruptions"]["after"] == ["stopped.cov"] for rank in found)
    for name, expected in literal(folder, TOKENS).items():
        assert relative(found[0]["interruptions"]["resumed"][name], expected) < 1e-10


@pytest.mark.parametrize("which", ["both", "first", "second", "killed while merging"])
def test_a_stopped_collection_is_resumed_by_one_process(folder, found, tmp_path, which):
    for file in (folder / "for one process").iterdir():
        shutil.copy(file, tmp_path)
    path, part = tmp_path / "stopped.cov", tmp_path / "stopped.cov.rank1-of-2"
    if which == "killed while merging":
        content = part.read_bytes()
        with small_units(), pytest.raises(KeyboardInterrupt):
            build(folder).collect_covariance(interrupted_texts(), tokens=TOKENS, path=path, progress=False)
        assert not part.exists()
        part.write_bytes(content)  # merged, but not yet deleted
    elif which != "both":
        (part if which == "first" else path).unlink()
    editor = build(folder)
    with small_units():
        editor.collect_covariance(corpus(), tokens=TOKENS, path=path, progress=False)
    for name, expected in literal(folder, TOKENS).items():
        assert relative(editor.covariance[name], expected) < 1e-10
    assert [p.name for p in tmp_path.iterdir()] == ["stopped.cov"]


def interrupted_texts():
    raise KeyboardInterrupt
    yield


def number_of_units(folder: Path) -> int:
    from comeba_ext.covariance.corpus import Unfinished, Units

    with small_units():
        return len(list(Units(build(folder).tokenizer, corpus(), Unfinished(), TOKENS, 128)))


def test_target_values_and_edits_of_two_processes(folder, found):
    for family in ("gpt2", "llama"):
        alone = build(folder, family)
        with small_units():
            alone.collect_covariance(corpus(), tokens=TOKENS, progress=False)
        values, one = alone.target_values(REQUESTS), alone.target_values(REQUESTS[:1])
        reports = [alone.edit(REQUESTS[:3]), alone.edit(REQUESTS[3:])]
        for result in (rank["values"] for rank in found):
            assert relative(result[family], values) < 1e-6
            assert relative(result[f"{family} one"], one) < 1e-6
            assert result[f"{family} losses"] == pytest.approx([x for r in reports for x in r.losses], rel=1e-6)
            assert result[f"{family} steps"] == [x for r in reports for x in r.optimizer_steps]
            assert result[f"{family} alpha"] == pytest.approx(reports[-1].alpha, rel=1e-5)
            for name, layer in alone.layers.items():
                assert summed(layer).norm() > 0
                assert relative(result[f"{family} delta"][name], summed(layer)) < 1e-5
        for name in alone.layers:  # and both models are one
            assert torch.equal(*(rank["values"][f"{family} delta"][name] for rank in found))


def test_all_processes_raise_together(found):
    first, second = (rank["refusals"] for rank in found)
    assert first["texts"] == second["texts"] and "different texts" in first["texts"]
    assert "another model" in first["model"] and "process 0 of 2 failed" in second["model"]
    assert first["empty"] == second["empty"] and "no text" in first["empty"]
    assert second["RequestError"] == "RequestError: not finite"
    assert first["RequestError"] == "RequestError: process 1 of 2 failed: not finite"
    assert first["RuntimeError"] == "ComebaError: process 1 of 2 failed: RuntimeError: broken"
    assert first["requests"] == second["requests"] and "process 1 differ" in first["requests"]
    assert first["sharded"] == second["sharded"] and "device_map" in first["sharded"]
    assert first["unchanged"] and second["unchanged"]


def test_command_line_in_two_processes(tmp_path):
    stream = testbed.texts()
    (tmp_path / "texts.txt").write_text("\n\n".join(next(stream) for _ in range(400)))
    records = [request.to_record() for request in testbed.facts()[:3]]
    (tmp_path / "records.json").write_text(json.dumps(records))
    done = launch(
        TORCHRUN,
        "-m",
        "comeba_ext.cli",
        "edit",
        "testbed",
        tmp_path / "records.json",
        "--texts",
        tmp_path / "texts.txt",
        "--out",
        tmp_path / "edits",
        "--json",
    )
    assert done.returncode == 0, done.stderr[-4000:]
    result = json.loads(done.stdout)  # of one process only
    assert result["edits"] == 3 and len(result["steps"][0]["losses"]) == 3
    assert sorted(p.name for p in tmp_path.iterdir()) == ["edits", "records.json", "texts.txt"]


def test_training_in_two_processes(tiny_model, tokenizer, tmp_path, one_thread):
    """Against one process that takes what each of them took one after the other; and what cannot be shared, all refuse."""
    model = small_model(tiny_model)
    for saved in (model, tokenizer):
        saved.save_pretrained(tmp_path / "model")
    (tmp_path / "records.json").write_text(json.dumps([request.to_record() for request in requests_of(8)]))
    (tmp_path / "held").mkdir()
    with FileLock(tmp_path / "held" / LOCK):
        done = launch(TORCHRUN, ROOT / "python_tests" / "training_worker.py", tmp_path)
    assert done.returncode == 0, done.stderr[-4000:]
    first, second = (json.loads((tmp_path / f"rank{rank}.json").read_text()) for rank in (0, 1))
    for method in training_worker.SETTINGS:
        assert first[method]["steps"] == 4 and second[method] == {}
    one, both = training_worker.made(tmp_path, "one", edits=1, accumulate=4), training_worker.made(tmp_path, "both")
    one._episodes = lambda step, number: both._episodes(step, number // 2)[number % 2 :: 2]
    result = one.run(progress=False)
    for validation, wanted in zip(first["KE"]["validations"], result["validations"], strict=True):
        assert [validation[name] for name in MEASURED] == pytest.approx([wanted[name] for name in MEASURED], rel=1e-4)
    tensors, wanted = (read_tensors(tmp_path / own / LAST)[0] for own in ("KE", "one"))
    start = training_worker.made(tmp_path, "start").learner.state_dict()
    for name, own in start.items():
        moved = wanted[f"learner.{name}"] - own
        assert (tensors[f"learner.{name}"] - own - moved).norm() <= 0.01 * moved.norm(), name
    assert first["too many"] == second["too many"] and "ConfigError: 2 processes share the edits" in first["too many"]
    assert first["other settings"] == second["other settings"] and "records or settings of process 1 differ" in first["other settings"]
    assert not (tmp_path / "many").exists() and not (tmp_path / "settings").exists()
    assert second["stopped"].startswith("ComebaError: the loss became nan at step 4")
    assert first["stopped"] == "ComebaError: process 1 of 2 failed: " + second["stopped"].removeprefix("ComebaError: ")
    for name in (FILE, LAST):
        resumed, whole = (read_tensors(tmp_path / own / name)[0] for own in ("stopped", "KE"))
        assert all(torch.equal(resumed[key], own) for key, own in whole.items())
    assert first["held"].startswith("StorageError") and "another process is writing there" in first["held"]
    assert second["held"].startswith("StorageError: process 0 of 2 failed") and "another process is writing there" in second["held"]


def test_training_on_the_command_line_in_two_processes(tmp_path):
    given = ("--steps", 1, "--accumulate", 1, "--limit", 20, "--out", tmp_path / "mend", "--json")
    done = launch(TORCHRUN, "-m", "comeba_ext.cli", "train", "MEND", "testbed", "--edits", 2, *given)
    assert done.returncode == 0, done.stderr[-4000:]
    result = json.loads(done.stdout)
    assert result["steps"] == 1 and result["records"]["used"] == 20 and (tmp_path / "mend" / FILE).exists()


def test_command_line_under_accelerate(tmp_path):
    pytest.importorskip("accelerate")
    (tmp_path / "texts.txt").write_text("One text.")
    refused = launch(
        ACCELERATE,
        "-m",
        "comeba_ext.cli",
        "covariance",
        "testbed",
        tmp_path / "texts.txt",
        "--out",
        tmp_path / "no folder" / "c.cov",
        "--json",
    )
    assert refused.returncode == 1
    assert "does not exist" in json.loads(refused.stdout)["error"]
    assert "error (process 1 of 2): process 0 of 2 failed: cannot write" in refused.stderr


def test_alone_nothing_is_shared():
    assert (distributed.rank(), distributed.world_size(), distributed.local_rank()) == (0, 1, 0)
    marker = object()
    assert distributed.together(lambda: marker) == [marker]
    with pytest.raises(ZeroDivisionError):
        distributed.together(lambda: 1 // 0)
    tensor = torch.ones(3)
    assert distributed.sum_over_processes(tensor) is tensor
    with distributed.process_group():
        assert not distributed.initialised()
