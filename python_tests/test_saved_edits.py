"""Saving, loading and going on; kills at every moment of a save; everything that must be refused."""

import copy
import json
import os
import random
import shutil
import signal
import subprocess
import sys
import time
import warnings
from pathlib import Path

import pytest
import torch
from filelock import FileLock
from safetensors.torch import save_file

from comeba_ext import EditConfig, Editor, load_edits, storage
from comeba_ext.errors import ArchitectureError, StorageError
from comeba_ext.text.request import EditRequest

LAYERS = (1, 2)
SUBJECTS = ["Danielle Darrieux", "Marie Curie", "Norway", "John Lennon", "Toko Yasuda", "Angola", "Peru", "Lima", "Oslo"]
REQUESTS = [
    EditRequest("The mother tongue of {} is", s, "English", rephrase_prompts=("{} speaks",), locality_prompts=(("Peru", "x"),))
    for s in SUBJECTS
]


def corpus():
    words = "the mother tongue of Danielle Darrieux is French capital Norway Oslo Peru Lima Angola located in Africa".split()
    draw = random.Random(0)
    return [" ".join(draw.choices(words, k=10)) for _ in range(60)]


def small_model(tiny_model, seed=0):
    return tiny_model("gpt2", seed, n_layer=4, n_inner=48)


def values(count, seed=0):
    return torch.randn(count, 32, generator=torch.Generator().manual_seed(seed)) * 4


def make_editor(tiny_model, tokenizer, steps=2, scope="zscore", dtype=torch.float32):
    config = EditConfig(layers=LAYERS, lam=20.0, prefixes=2, prefix_length=4, steps=3, scope=scope)
    editor = Editor(small_model(tiny_model).to(dtype), tokenizer, config)
    editor.collect_covariance(corpus(), tokens=10**6, progress=False)
    for n in range(steps):
        editor.edit(REQUESTS[2 * n : 2 * n + 2], target_values=values(2, n))
    return editor


def files(folder):
    return [path for path in folder.iterdir() if path.name not in (storage.LOCK, storage.CARD)]


def int8(model):
    """Its linear layers in dynamic int8: packed weights, no gradients."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        return torch.ao.quantization.quantize_dynamic(model, {torch.nn.Linear}, dtype=torch.qint8)


def logits(model, tokenizer, texts=("The mother tongue of Danielle Darrieux is", "Marie Curie was born in Paris")):
    with torch.no_grad():
        return [model(torch.tensor([tokenizer(text)["input_ids"]])).logits for text in texts]


def assert_close(found, expected, tolerance):
    for a, b in zip(found, expected, strict=True):
        assert (a - b).abs().max().item() <= tolerance * b.abs().max().item()


def state(editor):
    return {
        "numbers": [
            t.clone()
            for name, layer in editor.layers.items()
            for t in (
                layer.delta,
                editor.method.masters[name],
                layer.alpha,
                *layer.score.tensors().values(),
                editor.covariance[name],
                *editor.key_memory[name].state,
            )
        ],
        "ledger": [(e.request, e.step, e.removed) for e in editor.ledger.entries],
        "live": [e.request.request_id for e in editor.ledger.live()],
        "vectors": [t for e in editor.ledger.entries for table in (e.keys, e.responses) for t in table.values()],
        "rest": [editor.step, editor.log, editor.method.alphas, editor.prefixes, editor.config],
    }


def assert_same(found, expected):
    for key in ("numbers", "vectors"):
        assert len(found[key]) == len(expected[key])
        assert all(a.dtype == b.dtype and torch.equal(a, b) for a, b in zip(found[key], expected[key], strict=True))
    for key in ("ledger", "live", "rest"):
        assert found[key] == expected[key]


CASES = [
    ("zscore", torch.float32),
    ("reference", torch.float32),
    ("zscore", torch.bfloat16),
    ("nearest", torch.float32),
    ("nearest", torch.bfloat16),
]


@pytest.mark.parametrize("scope, dtype", CASES)
def test_continuing_equals_never_having_stopped(tiny_model, tokenizer, tmp_path, scope, dtype):
    editor = make_editor(tiny_model, tokenizer, scope=scope, dtype=dtype)
    editor.edit([EditRequest(REQUESTS[0].prompt, REQUESTS[0].subject, "Polish")], target_values=values(1, 7))
    editor.retract("edit-2")
    editor.save_pretrained(tmp_path / "edits")
    again = Editor.from_pretrained(small_model(tiny_model).to(dtype), tokenizer, tmp_path / "edits")
    assert_same(state(again), state(editor))
    for each in (editor, again):
        each.edit(REQUESTS[4:6])  # target values optimised too
        each.rollback(3)
        each.edit([*REQUESTS[6:8]], target_values=values(2, 8))
    a, b = state(again), state(editor)
    for side in (a, b):  # measured times differ
        for record in side["rest"][1]:
            record.pop("seconds", None), record.pop("peak_memory", None)
    assert_same(a, b)
    assert_close(logits(again.model, tokenizer), logits(editor.model, tokenizer), 0)


@pytest.mark.parametrize("scope", ["zscore", "nearest"])
def test_before_any_edit_and_before_any_covariance(tiny_model, tokenizer, tmp_path, scope):
    original = logits(small_model(tiny_model), tokenizer)
    fresh = Editor(small_model(tiny_model), tokenizer, EditConfig(layers=LAYERS, prefixes=0, scope=scope))
    for name, editor in (("bare", fresh), ("none", make_editor(tiny_model, tokenizer, steps=0, scope=scope))):
        editor.save_pretrained(tmp_path / name)
        assert_close(logits(load_edits(small_model(tiny_model), tmp_path / name), tokenizer), original, 0)
        again = Editor.from_pretrained(small_model(tiny_model), tokenizer, tmp_path / name)
        assert again.step == 0 and bool(again.key_memory) == (name == "none")


@pytest.mark.parametrize("scope", ["zscore", "reference", "nearest"])
@pytest.mark.parametrize("inference_only", [False, True])
def test_load_edits_gives_the_live_logits(tiny_model, tokenizer, tmp_path, inference_only, scope):
    editor = make_editor(tiny_model, tokenizer, scope=scope)
    original = logits(small_model(tiny_model), tokenizer)
    for form in ("left", "delta"):
        if form == "delta":  # 32 x 48 numbers are fewer than 40 factors of 32 + 48
            many = [EditRequest(f"Number {n} of {{}} is", s, "x") for n in range(4) for s in SUBJECTS]
            editor.edit(many, target_values=values(len(many), 9))
            assert len(editor.ledger) == 40
        editor.save_pretrained(tmp_path / form, inference_only=inference_only)
        manifest = json.loads((tmp_path / form / storage.MANIFEST).read_text())
        saved = storage.read_file(tmp_path / form, manifest, "adapter")
        assert manifest["format"] == (2 if scope == "nearest" else 1)  # what versions before would read with edits left out is not theirs
        for name in editor.layers:
            if scope == "nearest":  # every subject's factors, whatever their number
                assert f"{name}.left" not in saved and f"{name}.delta" not in saved and len(saved[f"{name}.shard_left"])
                continue
            assert f"{name}.{form}" in saved
            assert (f"{name}.left" in saved) != (f"{name}.delta" in saved)
        loaded = logits(load_edits(small_model(tiny_model), tmp_path / form), tokenizer)
        assert_close(loaded, logits(editor.model, tokenizer), 1e-4)
        assert any((a - b).abs().max() > 0.01 for a, b in zip(loaded, original, strict=True))


def test_inference_only_folder(tiny_model, tokenizer, tmp_path):
    editor = make_editor(tiny_model, tokenizer)
    editor.save_pretrained(tmp_path)  # in full first: what only editing needs goes away
    assert len(files(tmp_path)) == 4
    editor.save_pretrained(tmp_path, inference_only=True)
    names = sorted(path.suffix for path in files(tmp_path))
    assert names == [".json", ".safetensors"] and (tmp_path / storage.MANIFEST).exists()
    with pytest.raises(StorageError, match="inference only"):
        Editor.from_pretrained(small_model(tiny_model), tokenizer, tmp_path)


def test_other_files_in_the_folder_are_left_alone(tiny_model, tokenizer, tmp_path):
    mine = ["notes.txt", "my_comeba_notes-1.txt", "comeba_plan-b.md", "config.json"]
    for name in mine:
        (tmp_path / name).write_text("mine")
    stale = [".comeba_edits.json.0a1b2c3d.tmp", ".comeba_state-00000000.safetensors.0a1b2c3d.tmp", "comeba_state-0a1b2c3d.safetensors"]
    for name in stale:  # what a killed save leaves
        (tmp_path / name).write_text("stale")
    make_editor(tiny_model, tokenizer, steps=1).save_pretrained(tmp_path)
    left = {path.name for path in tmp_path.iterdir()}
    assert set(mine) <= left and not set(stale) & left


def test_float32_edits_on_the_bfloat16_model(tiny_model, tokenizer, tmp_path):
    editor = make_editor(tiny_model, tokenizer)
    editor.save_pretrained(tmp_path)
    model = load_edits(small_model(tiny_model).to(torch.bfloat16), tmp_path)
    for name, layer in editor.layers.items():
        loaded = model.get_submodule(name)
        assert loaded.delta.dtype == torch.bfloat16
        assert torch.allclose(loaded.delta.float(), layer.delta, rtol=2**-7, atol=1e-6)
        assert loaded.alpha.item() == layer.alpha.item()
    again = Editor.from_pretrained(small_model(tiny_model).to(torch.bfloat16), tokenizer, tmp_path)
    for name, layer in editor.layers.items():
        assert torch.equal(again.method.masters[name], layer.delta)
    again.edit(REQUESTS[4:5])
    assert all(torch.isfinite(x).all() for x in logits(again.model, tokenizer))


# -- refusals -------------------------------------------------------------------------------------------------------


def refused(tiny_model, tokenizer, folder, match, inference=True, seed=0):
    """Refused by both readers, and the model is as it was."""
    for read in ([lambda m: load_edits(m, folder)] if inference else []) + [lambda m: Editor.from_pretrained(m, tokenizer, folder)]:
        model = small_model(tiny_model, seed)
        before = logits(model, tokenizer)
        with pytest.raises(StorageError, match=match):
            read(model)
        assert all("HookedLinear" not in type(m).__name__ for m in model.modules())
        assert_close(logits(model, tokenizer), before, 0)


def refused_by_load(tiny_model, tokenizer, folder, match, inference=True):
    model = small_model(tiny_model)
    with pytest.raises(StorageError, match=match):
        load_edits(model, folder)
    assert all("HookedLinear" not in type(m).__name__ for m in model.modules())


def test_another_base_model(tiny_model, tokenizer, tmp_path):
    make_editor(tiny_model, tokenizer, steps=1).save_pretrained(tmp_path)
    refused(tiny_model, tokenizer, tmp_path, "another model", seed=1)
    for model in (tiny_model("gpt2"), tiny_model("llama"), tiny_model("gpt2", n_layer=4)):
        with pytest.raises(StorageError, match="another model"):
            load_edits(model, tmp_path)


def test_int8_layers_take_edits_but_find_no_values(tiny_model, tokenizer, tmp_path):
    config = EditConfig(layers=LAYERS, lam=20.0, prefixes=2, prefix_length=4, steps=3)
    make = lambda: tiny_model("llama", num_hidden_layers=4)  # noqa: E731
    editor = Editor(make(), tokenizer, config)
    editor.collect_covariance(corpus(), tokens=10**6, progress=False)
    editor.edit(REQUESTS[:2], target_values=values(2))
    editor.save_pretrained(tmp_path / "edits")
    model = int8(make())
    unedited = logits(model, tokenizer)
    load_edits(model, tmp_path / "edits")
    moved = [float((a - b).norm()) for a, b in zip(logits(model, tokenizer), unedited, strict=True)]
    wanted = [float((a - b).norm()) for a, b in zip(logits(editor.model, tokenizer), logits(make(), tokenizer), strict=True)]
    assert moved == pytest.approx(wanted, rel=0.2, abs=1e-3) and max(wanted) > 1
    other = Editor(int8(make()), tokenizer, config)
    other.set_covariance(editor.covariance)
    with pytest.raises(ArchitectureError, match="before it is quantised"):
        other.edit(REQUESTS[:2])
    assert other.step == 0


def test_a_sibling_whose_edited_layers_are_the_same(tiny_model, tokenizer, tmp_path):
    """Every matrix counts, not only those of edited layers; in half precision it is still the same model."""
    editor = make_editor(tiny_model, tokenizer, steps=1)
    editor.save_pretrained(tmp_path)
    named = set(editor.layers)
    for name, _ in small_model(tiny_model).named_modules():
        model = small_model(tiny_model)
        module = model.get_submodule(name)
        if name in named or not isinstance(getattr(module, "weight", None), torch.Tensor) or module.weight.dim() < 2:
            continue
        with torch.no_grad():
            module.weight.mul_(1.05)
        with pytest.raises(StorageError, match=f"another model: the weights of ({name}|transformer.wte|lm_head)"):
            load_edits(model, tmp_path)
    load_edits(small_model(tiny_model).to(torch.bfloat16), tmp_path)


def test_the_next_writer_clears_up_before_it_writes(tmp_path):
    """A run that finds nothing left to do saves nothing, and leaves no parts of the save that was killed either."""
    storage.write_folder(tmp_path, {"format": 1}, {"adapter": {"a": torch.zeros(3)}}, {"log": ""})
    whole = {path.name for path in tmp_path.iterdir()}
    (tmp_path / "comeba_state-12345678.safetensors").write_bytes(b"half")
    (tmp_path / ".comeba_log-12345678.jsonl.12345678.tmp").mkdir()
    (tmp_path / "comeba_notes.txt").touch()  # somebody else's
    with storage.alone(tmp_path):
        assert {path.name for path in tmp_path.iterdir()} == {*whole, "comeba_notes.txt"}
    (tmp_path / "comeba_state-12345678.safetensors").write_bytes(b"half")
    (tmp_path / storage.MANIFEST).write_text("{")  # nobody knows what is named: nothing is touched
    with storage.alone(tmp_path):
        assert (tmp_path / "comeba_state-12345678.safetensors").exists() and whole < {path.name for path in tmp_path.iterdir()}


@pytest.mark.parametrize("share", [0.0, 0.3, 0.95])
@pytest.mark.parametrize("kind", ["adapter", "state", "log", "manifest"])
def test_truncated_files(tiny_model, tokenizer, tmp_path, kind, share):
    make_editor(tiny_model, tokenizer, steps=1).save_pretrained(tmp_path)
    path = tmp_path / storage.MANIFEST if kind == "manifest" else next(tmp_path.glob(f"comeba_{kind}-*"))
    if kind == "log" and share == 0.0:
        path.unlink()
    else:
        data = path.read_bytes()
        path.write_bytes(data[: int(len(data) * share)])
    name = path.name.split("-")[0]
    refused(tiny_model, tokenizer, tmp_path, name, inference=kind in ("adapter", "manifest"))
    if kind in ("state", "log"):
        load_edits(small_model(tiny_model), tmp_path)  # which does not need them


FOREIGN = [
    "{}",
    "[]",
    "5",
    "null",
    '"text"',
    '{"format": 1}',
    '{"format": 1, "files": {}}',
    '{"format": 1, "files": []}',
    '{"format": 1, "files": {"adapter": 5}, "model": {}}',
    '{"format": 99, "files": {}}',
    '{"format": 1, "files": {}, "model": {"layers": {}}, "layers": [], "config": {}}',
]


@pytest.mark.parametrize("text", FOREIGN)
def test_foreign_manifest(tiny_model, tokenizer, tmp_path, text):
    (tmp_path / storage.MANIFEST).write_text(text)
    refused(tiny_model, tokenizer, tmp_path, str(tmp_path))


@pytest.mark.parametrize("key", ["model", "config", "layers", "ledger", "step", "alphas", "next_id", "prefixes"])
def test_manifest_without_a_key(tiny_model, tokenizer, tmp_path, key):
    make_editor(tiny_model, tokenizer, steps=1).save_pretrained(tmp_path)
    path = tmp_path / storage.MANIFEST
    manifest = json.loads(path.read_text())
    del manifest[key]
    path.write_text(json.dumps(manifest))
    refused(tiny_model, tokenizer, tmp_path, str(tmp_path), inference=key in ("model", "config", "layers"))


@pytest.mark.parametrize("kind", ["adapter", "state"])
def test_foreign_tensors(tiny_model, tokenizer, tmp_path, kind):
    editor = make_editor(tiny_model, tokenizer, steps=1)
    editor.save_pretrained(tmp_path)
    path = next(tmp_path.glob(f"comeba_{kind}-*"))
    save_file({"weight": torch.zeros(3)}, path)
    refused(tiny_model, tokenizer, tmp_path, path.name, inference=kind == "adapter")
    check = refused_by_load if kind == "adapter" else refused  # only load_edits uses the adapter's contents
    storage.write_tensors(path, {"weight": torch.zeros(3)})
    check(tiny_model, tokenizer, tmp_path, str(tmp_path), inference=kind == "adapter")
    tensors = {
        f"{name}.{what}": torch.zeros(3)
        for name in editor.layers
        for what in ("delta", "left", "right", "alpha", "reference_scale", "memory.lower", "moment", "keys", "responses")
    }
    storage.write_tensors(path, tensors)
    check(tiny_model, tokenizer, tmp_path, str(tmp_path), inference=kind == "adapter")


def test_no_folder(tiny_model, tokenizer, tmp_path):
    refused(tiny_model, tokenizer, tmp_path / "nowhere", "nowhere")


# -- kills ----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("function", ["replace", "save_file", "fsync", "unlink"])
def test_error_at_every_moment_of_a_save(tiny_model, tokenizer, tmp_path, monkeypatch, function):
    """The folder then holds the old state or the new one; which, is decided by the manifest's replacement."""
    editor = make_editor(tiny_model, tokenizer, steps=1)
    old = copy.deepcopy(state(editor))
    editor.save_pretrained(tmp_path / "old")
    editor.edit(REQUESTS[2:4], target_values=values(2, 1))
    new = state(editor)
    where, name = {"replace": (os, "replace"), "save_file": (storage, "save_file"), "fsync": (os, "fsync"), "unlink": (Path, "unlink")}[
        function
    ]
    real, outcomes = getattr(where, name), []
    for moment in range(1, 100):
        folder = tmp_path / f"{moment}"
        shutil.copytree(tmp_path / "old", folder)
        calls = [0]

        def failing(*args, calls=calls, moment=moment, **kwargs):
            calls[0] += 1
            if calls[0] == moment:
                raise KeyboardInterrupt
            return real(*args, **kwargs)

        with monkeypatch.context() as patch:
            patch.setattr(where, name, failing)
            try:
                editor.save_pretrained(folder)
                finished = True
            except KeyboardInterrupt:
                finished = False
        found = state(Editor.from_pretrained(small_model(tiny_model), tokenizer, folder))
        assert found["rest"][0] in (1, 2)
        assert_same(found, old if found["rest"][0] == 1 else new)
        load_edits(small_model(tiny_model), folder)
        outcomes.append(found["rest"][0])
        if finished:
            break
        editor.save_pretrained(folder)  # and the folder can be written again
        assert len(files(folder)) == 4
    assert finished and outcomes[-1] == 2 and outcomes == sorted(outcomes)
    assert len(outcomes) > 1 and (outcomes[0] == 1 or function == "unlink")


CHILD = """
import sys, time, torch
from comeba_ext import storage
folder = sys.argv[1]
n = 0
while True:
    n += 1
    tensors = {"a": torch.full((300, 300), float(n))}
    storage.write_folder(folder, {"format": 1, "number": n}, {"adapter": tensors, "state": tensors}, {"log": f"{n}"})
    print(n, flush=True)
"""


def test_sigkill_during_saves(tmp_path):
    """A child that saves without pause is killed at random moments."""
    root = Path(__file__).resolve().parents[1]
    environment = os.environ | {"PYTHONPATH": str(root), "OMP_NUM_THREADS": "1"}
    draw = random.Random(0)
    for _ in range(3):
        child = subprocess.Popen([sys.executable, "-c", CHILD, str(tmp_path)], stdout=subprocess.PIPE, env=environment)
        try:
            assert child.stdout.readline()  # the first save is complete
            time.sleep(draw.uniform(0.02, 0.1))
        finally:
            child.send_signal(signal.SIGKILL)
            child.wait()
            reported = child.stdout.read().split()
            child.stdout.close()
        manifest = storage.read_manifest(tmp_path)
        n = manifest["number"]
        assert n >= int(reported[-1] if reported else 1)
        for kind in ("adapter", "state"):
            assert (storage.read_file(tmp_path, manifest, kind)["a"] == n).all()
        assert storage.read_file(tmp_path, manifest, "log") == f"{n}"
    storage.write_folder(tmp_path, {"format": 1, "number": 0}, {"adapter": {}}, {})
    manifest = storage.read_manifest(tmp_path)
    assert {path.name for path in tmp_path.iterdir()} == {*manifest["files"].values(), storage.MANIFEST, storage.LOCK}


@pytest.mark.parametrize("name", ["a.safetensors", storage.MANIFEST])
def test_what_killed_writers_left_is_removed(tmp_path, name):
    """The libraries' own temporary files, too; what another process is still writing stays."""
    path = tmp_path / name
    dead, live = (tmp_path / f".{name}.{n}1234567.tmp" for n in "ab")
    for staging in (dead, live):
        staging.mkdir()
        (staging / ".tmpXY12ab").write_bytes(b"half")
        (staging / storage.LOCK).touch()
    with FileLock(live / storage.LOCK):
        storage.write_text(path, "{}")
        assert not dead.exists() and live.exists() and path.read_text() == "{}"
    storage.write_text(path, "[]")
    assert list(tmp_path.iterdir()) == [path]
