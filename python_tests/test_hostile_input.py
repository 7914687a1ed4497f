"""Files and options that nobody would write on purpose: one sentence each, one JSON object under ``--json``, nothing written."""

import json
import os
import shutil
from pathlib import Path

import pytest
import torch
from test_cli import run
from transformers import LlamaConfig, LlamaForCausalLM

from comeba_ext import EditConfig, testbed
from comeba_ext.data import read_requests
from comeba_ext.errors import ComebaError, ConfigError, RequestError, StorageError
from comeba_ext.experiments.definition import load
from comeba_ext.kernels import loader
from comeba_ext.kernels.build import BuildFailure
from comeba_ext.loading import load_model


def failed(*args) -> str:
    """The error of a command that must fail in one JSON object, without a traceback."""
    found = run(*args, "--json")
    assert found.exit_code == 1 and isinstance(found.exception, SystemExit), found.exception
    return json.loads(found.stdout)["error"]


def test_without_json_an_error_is_one_line(tmp_path):
    plain = run("eval", "testbed", tmp_path / "none.json")
    assert plain.exit_code == 1 and plain.stderr.startswith("error: ") and "Traceback" not in plain.output and not plain.stdout


@pytest.fixture
def facts(tmp_path):
    path = tmp_path / "facts.jsonl"
    path.write_text(json.dumps(testbed.facts()[0].to_record()) + "\n")
    return path


DEEP = "[" * 100_000 + "]" * 100_000
LONG = '[{"prompt": "{} is", "subject": "A", "target_new": "x", "request_id": ' + "9" * 5_000 + "}]"


@pytest.mark.parametrize("name", ["a.json", "a.jsonl"])
@pytest.mark.parametrize("text, word", [(DEEP, "deeply"), (LONG, "digits"), (LONG[1:-1], "digits")], ids=["deep", "long", "alone"])
def test_json_that_python_does_not_read(tmp_path, name, text, word):
    (tmp_path / name).write_text(text)
    with pytest.raises(StorageError, match=word):
        read_requests(tmp_path / name)
    assert word in failed("eval", "testbed", tmp_path / name)


def test_half_a_character(tmp_path):
    for field in ("prompt", "subject", "target_new", "rephrase_prompts", "locality_prompts"):
        record = {"prompt": "{} is", "subject": "A", "target_new": "x", "rephrase_prompts": ["A was"], "locality_prompts": [["B is", "y"]]}
        record[field] = (
            "\ud800 {}"
            if field == "prompt"
            else "\ud800"
            if isinstance(record[field], str)
            else [["\ud800", "z"]]
            if field == "locality_prompts"
            else ["\ud800"]
        )
        (tmp_path / "a.json").write_text(json.dumps([record]))
        found = read_requests(tmp_path / "a.json")
        assert not found.requests and "half of a character" in found.skipped[0]["reason"] and field in found.skipped[0]["reason"]
    with pytest.raises(RequestError, match="fact_token"):
        read_requests_of({"prompt": "{} is", "subject": "A", "target_new": "x", "fact_token": "first"})
    with pytest.raises(RequestError, match="ground_truth must be text"):
        read_requests_of({"prompt": "{} is", "subject": "A", "target_new": "x", "ground_truth": True})
    assert read_requests_of({"prompt": "{} is", "subject": "A", "target_new": "x", "ground_truth": 1.5}).ground_truth == "1.5"
    assert read_requests_of({"prompt": "{} is", "subject": "A", "target_new": "x", "ground_truth": [["y", "z"]]}).ground_truth == "y"
    for field in ("rephrase_prompts", "locality_prompts", "wordings"):  # an object's names are no list of texts
        with pytest.raises(RequestError, match=f"{field} must be texts"):
            read_requests_of({"prompt": "{} is", "subject": "A", "target_new": "x", field: {"\ud800": None}})


def read_requests_of(record):
    from comeba_ext import EditRequest

    return EditRequest.from_record(record)


BOMB = "a: &a [x, x, x, x, x, x, x, x, x]\n" + "".join(
    f"{c}: &{c} [{', '.join('*' + p for _ in range(9))}]\n" for p, c in zip("abcdefgh", "bcdefghi", strict=True)
)


@pytest.mark.parametrize("suffix", [".yaml", ".json"])
def test_settings_that_explode(tmp_path, suffix):
    path = tmp_path / f"x{suffix}"
    if suffix == ".yaml":
        path.write_text(BOMB)
        with pytest.raises(ConfigError, match="alias"):
            EditConfig.from_file(path)
        with pytest.raises(ConfigError, match="alias"):
            load(path)
        path.write_text("- " * 50_000)
        with pytest.raises(ConfigError, match="nested too deeply"):
            EditConfig.from_file(path)
    path.write_text(DEEP[:50_000] + DEEP[-50_000:])
    with pytest.raises(ConfigError, match="deeply|not valid"):
        EditConfig.from_file(path)
    path.write_text(" " * 200_000)
    with pytest.raises(ConfigError, match="more than settings have"):
        EditConfig.from_file(path)


def saved(folder: Path) -> Path:
    """A small Llama with the embedded model's tokenizer."""
    config = LlamaConfig(hidden_size=16, intermediate_size=32, num_hidden_layers=2, num_attention_heads=2, vocab_size=8192)
    LlamaForCausalLM(config).save_pretrained(folder)
    testbed.load()[1].save_pretrained(folder)
    return folder


def test_models_that_cannot_be_loaded(tmp_path, facts):
    whole = saved(tmp_path / "whole")
    assert load_model(whole)[0].config.hidden_size == 16
    bad = {name: Path(shutil.copytree(whole, tmp_path / name)) for name in ("cut", "no_tokenizer", "no_config", "other_tokenizer", "code")}
    weights = bad["cut"] / "model.safetensors"
    weights.write_bytes(weights.read_bytes()[:1000])
    for path in bad["no_tokenizer"].glob("tokenizer*"):
        path.unlink()
    (bad["no_config"] / "config.json").write_text("{")
    config = json.loads((bad["code"] / "config.json").read_text())
    (bad["code"] / "config.json").write_text(
        json.dumps({**config, "model_type": "mine", "auto_map": {"AutoConfig": "mine.C", "AutoModelForCausalLM": "mine.M"}})
    )
    (bad["code"] / "mine.py").write_text(f"import pathlib; pathlib.Path({str(tmp_path / 'ran')!r}).touch()\n")
    small = LlamaConfig(hidden_size=16, intermediate_size=32, num_hidden_layers=2, num_attention_heads=2, vocab_size=100)
    LlamaForCausalLM(small).save_pretrained(bad["other_tokenizer"])
    words = {"other_tokenizer": "not of one model", "code": "--trust-remote-code"}
    for name, folder in bad.items():
        with pytest.raises(ComebaError, match=words.get(name, "cannot load")):
            load_model(folder)
    for name, word in (
        (facts, "it is a file"),
        ("x" * 300, "too long"),
        ("a\0b", "cannot load"),
        (tmp_path / "nowhere" / "model", "cannot load"),
    ):
        with pytest.raises(ComebaError, match=word):
            load_model(name)
    assert "cannot load" in failed("eval", bad["cut"], facts) and "it is a file" in failed("generate", facts, "A")
    assert not (tmp_path / "ran").exists()


@pytest.mark.parametrize("device", ["meta", "xpu", "mps", "hpu", "cuda:99", "nonsense"])
def test_devices_that_are_not_there(facts, device):
    if device == "mps" and torch.backends.mps.is_available():
        pytest.skip("it is there")
    assert "--device" in failed("eval", "testbed", facts, "--device", device)


def test_names_longer_than_files_may_have(facts, tmp_path):
    name = tmp_path / ("x" * 300)
    for args in (
        ("eval", "testbed", name),
        ("edit", "testbed", facts, "--out", name),
        ("edit", "testbed", facts, "--out", tmp_path / "o", "--config", name),
        ("covariance", "testbed", name, "--out", tmp_path / "c"),
        ("experiment", "table1", "--out", name),
    ):
        assert "x" * 50 in failed(*args)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["facts.jsonl"]


def test_what_nobody_thought_of_is_a_sentence_and_a_log(facts, monkeypatch):
    def broken(*args):
        raise ZeroDivisionError("something odd\nand more")

    monkeypatch.setattr(testbed, "load", broken)
    said = failed("eval", "testbed", facts)
    assert said.startswith("unexpected ZeroDivisionError: something odd (please report")
    log = Path(said.partition("with ")[2].rstrip(")"))
    assert "Traceback" in log.read_text() and "in broken" in log.read_text()
    log.unlink()


@pytest.mark.skipif(os.name != "posix", reason="modes are posix's")
@pytest.mark.parametrize("where", ["cache", "folder", "library"])
def test_a_library_that_others_could_have_planted_is_not_loaded(tmp_path, monkeypatch, where):
    cache = tmp_path / "cache"
    monkeypatch.setenv("COMEBA_CACHE_DIR", str(cache))
    path = cache / "key" / "comeba_kernels.so"
    path.parent.mkdir(parents=True)
    path.write_bytes(b"")
    for place in (cache, path.parent):
        place.chmod(0o700)
    loader._require_own(path)
    monkeypatch.setattr(Path, "stat", lambda self: (_ for _ in ()).throw(PermissionError(13, "Permission denied")))
    with pytest.raises(BuildFailure, match="cannot be used"):  # another user's, where one may not even look
        loader._require_own(path)
    monkeypatch.undo()
    monkeypatch.setenv("COMEBA_CACHE_DIR", str(cache))
    {"cache": cache, "folder": path.parent, "library": path}[where].chmod(0o777)
    with pytest.raises(BuildFailure, match="others may write"):
        loader._require_own(path)
