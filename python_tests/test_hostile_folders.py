"""Folders of edits that were tampered with, are shared by processes, cannot be written, or belong to other work.

Whatever is wrong: one sentence that says so, the model and the files as they were.
"""

import dataclasses
import json
import math
import os
import subprocess
import sys
import threading

import pytest
import torch
from safetensors.torch import load_file, save_file
from test_cli import output, run
from test_saved_edits import REQUESTS, Editor, make_editor, small_model, values

from comeba_ext import EditConfig, covariance, load_edits, storage, testbed
from comeba_ext.errors import StorageError
from comeba_ext.evaluation.protocols import Protocol, run_protocol
from comeba_ext.layers.attachment import attachments

pytestmark = pytest.mark.usefixtures("one_block")

META = {"comeba_ext": "{}"}


@pytest.fixture(scope="module")
def made(tmp_path_factory):
    """Builds a folder of two edits with a score, once."""
    folders = {}

    def make(tiny_model, tokenizer, scope):
        if scope not in folders:
            folders[scope] = tmp_path_factory.mktemp(scope)
            make_editor(tiny_model, tokenizer, steps=1, scope=scope).save_pretrained(folders[scope])
        return folders[scope]

    return make


def copied(folder, tmp_path):
    other = tmp_path / "copy"
    other.mkdir()
    for path in folder.iterdir():
        (other / path.name).write_bytes(path.read_bytes())
    return other


def tampered(folder, kind, change):
    """Change the tensors of one file in place."""
    path = folder / json.loads((folder / storage.MANIFEST).read_text())["files"][kind]
    tensors = load_file(path)
    change(tensors)
    save_file({name: t.contiguous() for name, t in tensors.items()}, path, metadata=META)


def refused(tiny_model, tokenizer, folder, match="."):
    """Both ways to load refuse the folder and leave the model without hooks."""
    for load in (lambda model: load_edits(model, folder), lambda model: Editor.from_pretrained(model, tokenizer, folder)):
        model = small_model(tiny_model)
        with pytest.raises(StorageError, match=match):
            load(model)
        assert not attachments(model) and "save_pretrained" not in vars(model)


ENDS = {
    "zscore": ("left", "right", "alpha", "reference_scale"),
    "nearest": ("shard_left", "shard_right", "projection", "anchors", "thresholds", "alpha"),
}
CHANGES = {
    "NaN": lambda t: torch.full_like(t, math.nan),
    "int8": lambda t: torch.zeros(t.shape, dtype=torch.int8),
    "another shape": lambda t: torch.zeros(*t.shape, 3, dtype=t.dtype),
    "one row more": lambda t: torch.cat([t, t[:1]]) if t.dim() else t[None],
}


@pytest.mark.parametrize("scope, end", [(scope, end) for scope, ends in ENDS.items() for end in ends])
@pytest.mark.parametrize("how", CHANGES)
def test_tensors_that_are_not_ours(made, tiny_model, tokenizer, tmp_path, scope, end, how):
    folder = copied(made(tiny_model, tokenizer, scope), tmp_path)
    tampered(folder, "adapter", lambda ts: ts.update({name: CHANGES[how](t) for name, t in ts.items() if name.endswith(f".{end}")}))
    refused(tiny_model, tokenizer, folder, match="incomplete or damaged")


def test_infinite_deltas(made, tiny_model, tokenizer, tmp_path):
    folder = copied(made(tiny_model, tokenizer, "zscore"), tmp_path)
    tampered(folder, "state", lambda ts: [t.fill_(math.inf) for name, t in ts.items() if name.endswith(".delta")])
    with pytest.raises(StorageError, match="NaN or infinite"):
        Editor.from_pretrained(small_model(tiny_model), tokenizer, folder)


def test_few_bytes_that_would_become_many(made, tiny_model, tokenizer, tmp_path):
    """Factors whose product has the wrong size are not multiplied: 2 × 60,000 numbers would be 14 GB."""
    folder = copied(made(tiny_model, tokenizer, "zscore"), tmp_path)

    def grow(tensors):
        for name in list(tensors):
            if name.endswith((".left", ".right")):
                tensors[name] = torch.zeros(60_000, 1) if name.endswith(".left") else torch.zeros(1, 60_000)

    tampered(folder, "adapter", grow)
    refused(tiny_model, tokenizer, folder, match="expected")


def manifest_with(folder, **changes):
    path = folder / storage.MANIFEST
    path.write_text(json.dumps({**json.loads(path.read_text()), **changes}))


def test_layers_that_the_settings_do_not_name(made, tiny_model, tokenizer, tmp_path):
    folder = copied(made(tiny_model, tokenizer, "nearest"), tmp_path)
    manifest = json.loads((folder / storage.MANIFEST).read_text())
    manifest_with(folder, config={**manifest["config"], "layers": [0, 2]})
    refused(tiny_model, tokenizer, folder, match="settings name")
    manifest_with(folder, config=manifest["config"], method="COMEBA-KH")
    refused(tiny_model, tokenizer, folder, match="not here: unknown method 'COMEBA-KH' .nearest: 'COMEBA-HK'")


@pytest.mark.parametrize(
    "name", ["/etc/passwd", "../adapter.safetensors", "/dev/zero", "pipe", "x\0y", "comeba_adapter-01234567.safetensors/.."]
)
def test_names_that_lead_elsewhere(made, tiny_model, tokenizer, tmp_path, name):
    folder = copied(made(tiny_model, tokenizer, "zscore"), tmp_path)
    os.mkfifo(folder / "pipe")
    files = json.loads((folder / storage.MANIFEST).read_text())["files"]
    manifest_with(folder, files={**files, "adapter": name})
    refused(tiny_model, tokenizer, folder, match="no file of ours")


def test_a_pipe_in_a_files_place(made, tiny_model, tokenizer, tmp_path):
    folder = copied(made(tiny_model, tokenizer, "zscore"), tmp_path)
    adapter = folder / json.loads((folder / storage.MANIFEST).read_text())["files"]["adapter"]
    adapter.unlink()
    os.mkfifo(adapter)
    refused(tiny_model, tokenizer, folder, match="regular file")
    (folder / storage.MANIFEST).unlink()
    os.mkfifo(folder / storage.MANIFEST)
    refused(tiny_model, tokenizer, folder, match="regular file")


def test_a_manifest_nested_without_end(made, tiny_model, tokenizer, tmp_path):
    folder = copied(made(tiny_model, tokenizer, "zscore"), tmp_path)
    (folder / storage.MANIFEST).write_text('{"format": ' + "[" * 100_000 + "]" * 100_000 + "}")
    refused(tiny_model, tokenizer, folder)


# -- several processes and threads ----------------------------------------------------------------------------------

HOLDER = "import sys, time; from comeba_ext.storage import alone\nwith alone(sys.argv[1]):\n    print('in', flush=True); time.sleep(60)"


def test_one_writer_a_folder(tiny_model, tokenizer, tmp_path):
    folder, facts = tmp_path / "o", tmp_path / "facts.jsonl"
    facts.write_text(json.dumps(testbed.facts()[0].to_record()) + "\n")
    holder = subprocess.Popen([sys.executable, "-c", HOLDER, str(folder)], stdout=subprocess.PIPE, text=True)
    try:
        assert holder.stdout.readline() == "in\n"
        second = run("edit", "testbed", facts, "--out", folder, "--json")
        assert second.exit_code == 1 and "another process is writing" in json.loads(second.stdout)["error"]
        with pytest.raises(StorageError, match="another process"):
            make_editor(tiny_model, tokenizer).save_pretrained(folder)
        with pytest.raises(StorageError, match="another process"):
            run_protocol(
                small_model(tiny_model), tokenizer, REQUESTS[:1], Protocol("consecutive", 1), folder, config=EditConfig(layers=(1, 2))
            )
        tuned = run("tune", "testbed", "--out", folder, "--json")
        assert tuned.exit_code == 1 and "another process is writing" in json.loads(tuned.stdout)["error"]
    finally:
        holder.kill()
        holder.wait()
    assert output("edit", "testbed", facts, "--out", folder)["edits"] == 1  # a lock ends with its process


def test_a_reader_during_saves_sees_one_complete_save(tiny_model, tokenizer, tmp_path):
    editor = make_editor(tiny_model, tokenizer, steps=1)
    editor.save_pretrained(tmp_path)
    stop, saves = threading.Event(), []

    def save():
        while not stop.is_set():
            editor.save_pretrained(tmp_path)
            saves.append(1)

    writer = threading.Thread(target=save)
    writer.start()
    try:
        expected = next(iter(editor.layers.values())).delta
        for _ in range(60):
            found = next(iter(attachments(load_edits(small_model(tiny_model), tmp_path)).values())).delta
            assert torch.allclose(found, expected, rtol=0, atol=1e-5)
    finally:
        stop.set()
        writer.join()
    assert len(saves) > 5


# -- what is in the way ---------------------------------------------------------------------------------------------


def test_a_full_disk_leaves_the_last_save_and_nothing_else(tiny_model, tokenizer, tmp_path, monkeypatch):
    editor = make_editor(tiny_model, tokenizer, steps=1)
    editor.save_pretrained(tmp_path)
    before = {path.name: path.read_bytes() for path in tmp_path.iterdir()}
    editor.edit(REQUESTS[2:4], target_values=values(2, 1))
    real, calls = storage.save_file, []

    def full(tensors, path, **kwargs):
        calls.append(path)
        real(tensors, path, **kwargs)
        if len(calls) % 2 == 0:
            raise OSError(28, "No space left on device")

    monkeypatch.setattr(storage, "save_file", full)
    for _ in range(3):
        with pytest.raises(StorageError, match="No space left.*as it was"):
            editor.save_pretrained(tmp_path)
    assert {path.name: path.read_bytes() for path in tmp_path.iterdir()} == before


def test_saved_files_are_readable_as_their_folder_is(tiny_model, tokenizer, tmp_path):
    before = os.umask(0o022)
    try:
        make_editor(tiny_model, tokenizer, steps=1).save_pretrained(tmp_path)
    finally:
        os.umask(before)
    assert {path.stat().st_mode & 0o777 for path in tmp_path.iterdir() if path.name != storage.LOCK} == {0o644}


@pytest.mark.parametrize("command", ["edit", "demo", "covariance"])
def test_an_output_that_cannot_be_is_found_out_before_work(tmp_path, command, monkeypatch):
    facts, text, taken = tmp_path / "facts.jsonl", tmp_path / "t.txt", tmp_path / "taken"
    facts.write_text(json.dumps(testbed.facts()[0].to_record()) + "\n")
    text.write_text("Some text.")
    monkeypatch.setattr(testbed, "load", lambda *a: pytest.fail("work began"))
    if command == "covariance":
        taken.mkdir()
        args = ("covariance", "testbed", text, "--out", taken)
    else:
        taken.write_text("a file")
        args = ("edit", "testbed", facts, "--out", taken) if command == "edit" else ("demo", "--out", taken)
    found = run(*args, "--json")
    assert found.exit_code == 1 and str(taken) in json.loads(found.stdout)["error"]
    assert sorted(path.name for path in tmp_path.iterdir()) == ["facts.jsonl", "t.txt", "taken"]


def test_demo_does_not_replace_edits(tmp_path):
    facts = tmp_path / "facts.jsonl"
    facts.write_text(json.dumps(testbed.facts()[0].to_record()) + "\n")
    output("edit", "testbed", facts, "--out", tmp_path / "o")
    before = {path.name: path.read_bytes() for path in (tmp_path / "o").iterdir()}
    again = run("demo", "--edits", 1, "--out", tmp_path / "o", "--json")
    assert again.exit_code == 1 and "holds edits already" in json.loads(again.stdout)["error"]
    assert {path.name: path.read_bytes() for path in (tmp_path / "o").iterdir()} == before


# -- resuming -------------------------------------------------------------------------------------------------------


def written(path, requests):
    path.write_text("".join(json.dumps({k: v for k, v in r.to_record().items() if k != "request_id"}) + "\n" for r in requests))
    return path


def test_resuming_goes_by_what_was_edited(tmp_path):
    facts, out = testbed.facts(), tmp_path / "o"
    mine, theirs = written(tmp_path / "a.jsonl", facts[:4]), written(tmp_path / "b.jsonl", [*facts[6:8], *facts[:2]])
    assert output("edit", "testbed", mine, "--out", out)["edits"] == 4
    more = output("edit", "testbed", theirs, "--out", out, "--resume")
    assert (more["edits"], more["earlier_edits"]) == (2, 2)
    assert [name for step in more["steps"] for name in step["request_ids"]] == ["edit-4", "edit-5"]
    assert output("edit", "testbed", theirs, "--out", out, "--resume")["edits"] == 0

    model, tokenizer = testbed.load()
    editor = Editor.from_pretrained(model, tokenizer, out)
    editor.rollback(1)
    editor.save_pretrained(out)
    assert output("edit", "testbed", theirs, "--out", out, "--resume")["edits"] == 2  # what was taken back is edited again


def test_resuming_makes_what_is_not_live(tmp_path):
    """With a method that needs no covariance; which edits are made is the same with all."""
    fact, out = testbed.facts()[0], tmp_path / "o"
    other = dataclasses.replace(fact, target_new=fact.ground_truth)
    forth, back, both = (
        written(tmp_path / name, own) for name, own in (("a.jsonl", [fact]), ("b.jsonl", [other]), ("c.jsonl", [fact, other, other]))
    )
    edit = lambda path: output("edit", "testbed", path, "--out", out, "--method", "GRACE", "--resume")  # noqa: E731
    assert [edit(path)["edits"] for path in (forth, back, forth, forth, back)] == [1, 1, 1, 0, 1]
    assert (edit(both)["edits"], edit(both)["earlier_edits"]) == (0, 3)
    said = run("edit", "testbed", both, "--out", out, "--method", "GRACE", "--resume").stdout.replace("\n", " ")
    assert "Records 1, 2 and 3 contradict each other" in said and "Records 2 and 3 say the same" in said and "live there already" in said
    assert output("edits", "retract", "testbed", out, fact.subject)["live"] == 0
    again = edit(both)
    assert (again["edits"], again["repeated"], again["records"]["repeated"]) == (2, 1, 1)
    one = ("--prompt", fact.prompt, "--subject", fact.subject, "--target")
    for target, edits in ((other.target_new, 0), (fact.target_new, 1)):
        assert output("edit", "testbed", "--out", out, "--resume", *one, target)["edits"] == edits


def test_resuming_refuses_other_settings(tmp_path, monkeypatch):
    monkeypatch.setattr(covariance, "TOKENS_PER_DIMENSION", 2)  # how much there is of it is of no matter here
    facts, out, text = written(tmp_path / "a.jsonl", testbed.facts()[:2]), tmp_path / "o", tmp_path / "t.txt"
    stream = testbed.texts()
    text.write_text("\n\n".join(next(stream) for _ in range(2500)))
    (tmp_path / "same.yaml").write_text("steps: 9\n")
    (tmp_path / "other.yaml").write_text("steps: 8\n")
    made = ("--config", tmp_path / "same.yaml", "--texts", text)
    output("edit", "testbed", facts, "--out", out, *made)
    before = {path.name: path.read_bytes() for path in out.iterdir()}
    other = tmp_path / "u.txt"
    other.write_text("Another text.\n\n" + text.read_text())
    output("covariance", "testbed", other, "--out", tmp_path / "c.safetensors", "--tokens", 3000)
    for options, word in (
        (("--config", tmp_path / "other.yaml"), "steps"),
        (("--config", tmp_path / "none.yaml"), "No such file"),
        (("--scope", "zscore"), "scope"),
        (("--chat",), "made with chat False, not True"),
        (("--method", "MEMIT"), "MEMIT"),
        (("--covariance", tmp_path / "c.safetensors"), "another covariance"),
        (("--covariance", tmp_path / "none.safetensors"), "does not exist"),
        (("--texts", other), "other texts"),
        (("--texts", tmp_path / "none.txt"), "no such file"),
    ):
        found = run("edit", "testbed", facts, "--out", out, "--resume", *options, "--json")
        assert found.exit_code == 1 and word in json.loads(found.stdout)["error"], options
    assert {path.name: path.read_bytes() for path in out.iterdir()} == before
    assert output("edit", "testbed", facts, "--out", out, "--resume", *made, "--method", "COMEBA-HK")["edits"] == 0


def test_records_that_cannot_be_used_are_counted(tmp_path):
    facts, path = testbed.facts()[:3], tmp_path / "a.jsonl"
    rows = [facts[0].to_record(), {**facts[1].to_record(), "request_id": facts[0].to_record()["request_id"] or "0"}, facts[2].to_record()]
    rows[0]["request_id"] = rows[1]["request_id"]
    path.write_text("".join(json.dumps(row) + "\n" for row in rows) + '{"prompt": "\\ud800 {} is", "subject": "A", "target_new": "x"}\n')
    found = output("edit", "testbed", path, "--out", tmp_path / "o")
    assert found["records"]["used"] == 2 and {skip["index"] for skip in found["records"]["skipped"]} == {1, 3}
    path.write_text(json.dumps({"prompt": "no subject", "subject": "Nobody", "target_new": "x"}) + "\n")
    none = run("edit", "testbed", path, "--out", tmp_path / "none", "--json")
    assert none.exit_code == 1 and "none of 1 record can be used" in json.loads(none.stdout)["error"]
    assert not (tmp_path / "none").exists()
