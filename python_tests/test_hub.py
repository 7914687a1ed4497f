"""Folders of edits on the hub and their cards; the hub is a folder here, and nothing leaves the machine."""

import copy
import fnmatch
import inspect
import json
import shutil
from pathlib import Path
from types import SimpleNamespace

import huggingface_hub
import pytest
import torch
import yaml
from huggingface_hub import ModelCard
from test_saved_edits import REQUESTS, files, logits, make_editor, small_model, values

from comeba_ext import Editor, EditRequest, active_edits, load_edits, push_to_hub, storage
from comeba_ext.errors import ComebaError, StorageError
from comeba_ext.hub import is_hub_name
from comeba_ext.memory.ledger import Ledger
from comeba_ext.methods import default_config, method_named
from comeba_ext.model_card import MARK, add_scores, card


@pytest.fixture
def editor(tiny_model, tokenizer):
    return make_editor(tiny_model, tokenizer, steps=1)


@pytest.fixture
def hub(monkeypatch, tmp_path):
    """A hub that keeps repositories in a folder, with what was asked of it; keeps the conventions of the real one's methods."""
    root, calls = tmp_path / "hub", []
    root.mkdir()

    class Api:
        def __init__(self, token=None, **_):
            calls.append(("token", token))

        def create_repo(self, repo_id, *, private=None, exist_ok=False):
            calls.append(("create", repo_id, private))
            assert exist_ok
            (root / repo_id).mkdir(parents=True, exist_ok=True)
            return SimpleNamespace(repo_id=repo_id)

        def create_branch(self, repo_id, *, branch, exist_ok):
            calls.append(("branch", branch))

        def upload_folder(self, *, repo_id, folder_path, commit_message, revision, create_pr, allow_patterns, delete_patterns):
            calls.append(("upload", commit_message, revision, create_pr))
            for old in (root / repo_id).iterdir():
                if any(fnmatch.fnmatch(old.name, pattern) for pattern in delete_patterns):
                    old.unlink()
            for file in Path(folder_path).iterdir():
                if file.name in allow_patterns:
                    shutil.copy(file, root / repo_id)
            return SimpleNamespace(
                commit_url=f"https://hub/{repo_id}/commit/1", pr_url=f"https://hub/{repo_id}/pr/1" if create_pr else None
            )

    def snapshot_download(repo_id, *, revision=None, token=None, allow_patterns=None):
        calls.append(("download", repo_id, revision, token))
        if not (root / repo_id).is_dir():
            raise huggingface_hub.errors.LocalEntryNotFoundError("404 Client Error.\nRepository Not Found")
        copied = tmp_path / f"cache-{len(calls)}"
        copied.mkdir()
        for file in (root / repo_id).iterdir():
            if any(fnmatch.fnmatch(file.name, pattern) for pattern in allow_patterns):
                shutil.copy(file, copied)
        return str(copied)

    stands_for = {snapshot_download: huggingface_hub.snapshot_download}
    stands_for |= {getattr(Api, name): getattr(huggingface_hub.HfApi, name) for name in ("create_repo", "create_branch", "upload_folder")}
    for own, real in stands_for.items():  # what is called here can be called there
        assert set(inspect.signature(own).parameters) <= set(inspect.signature(real).parameters)
    monkeypatch.setattr(huggingface_hub, "HfApi", Api)
    monkeypatch.setattr(huggingface_hub, "snapshot_download", snapshot_download)
    return SimpleNamespace(root=root, calls=calls, cache=lambda: sorted(tmp_path.glob("cache-*"))[-1])


def test_there_and_back(editor, hub, tiny_model, tokenizer, tmp_path):
    editor.save_pretrained(tmp_path / "edits")
    (tmp_path / "edits/notes.txt").write_text("mine")
    address = push_to_hub(tmp_path / "edits", "me/facts", private=True, token="t", commit_message="first")
    assert address == "https://hub/me/facts/commit/1"
    assert hub.calls == [("token", "t"), ("create", "me/facts", True), ("upload", "first", None, None)]
    pushed = {file.name for file in (hub.root / "me/facts").iterdir()}
    assert pushed == {file.name for file in files(tmp_path / "edits")} - {"notes.txt"} | {"README.md"}
    live = logits(editor.model, tokenizer)
    loaded = load_edits(small_model(tiny_model), "me/facts", revision="main", token="t")
    assert ("download", "me/facts", "main", "t") in hub.calls
    assert not list(hub.cache().glob("comeba_state-*")) and not list(hub.cache().glob("comeba_log-*"))  # only what is needed
    for found, expected in zip(logits(loaded, tokenizer), live, strict=True):
        torch.testing.assert_close(found, expected, rtol=0, atol=1e-4)
    named = load_edits(small_model(tiny_model), "me/facts", name="facts")
    assert active_edits(named) == ["facts"] and all(map(torch.equal, logits(named, tokenizer), logits(loaded, tokenizer)))
    again = Editor.from_pretrained(small_model(tiny_model), tokenizer, "me/facts")
    assert again.step == 1 and all(map(torch.equal, logits(again.model, tokenizer), live))


def test_a_second_push_takes_the_place_of_the_first(editor, hub, tmp_path):
    editor.save_pretrained(tmp_path / "edits")
    push_to_hub(tmp_path / "edits", "me/facts")
    (hub.root / "me/facts/other.txt").write_text("somebody's")
    editor.edit(REQUESTS[2:4], target_values=values(2, 1))
    editor.save_pretrained(tmp_path / "edits", inference_only=True)
    assert push_to_hub(tmp_path / "edits", "me/facts", branch="b", create_pr=True).endswith("/pr/1")
    assert ("branch", "b") in hub.calls and ("upload", "Push edits using comeba_ext.", "b", True) in hub.calls
    pushed = {file.name for file in (hub.root / "me/facts").iterdir()}
    assert pushed == {file.name for file in files(tmp_path / "edits")} | {"README.md", "other.txt"}


def test_what_cannot_be_had_or_pushed(editor, hub, tiny_model, tokenizer, tmp_path, monkeypatch):
    model = small_model(tiny_model)
    with pytest.raises(StorageError, match=r"no folder me/nothing, and no edits .* 404 Client Error\.$"):
        load_edits(model, "me/nothing")
    (hub.root / "me/other").mkdir(parents=True)
    with pytest.raises(StorageError, match="holds no edits"):
        load_edits(model, "me/other")
    for folder in (tmp_path / "nowhere", tmp_path):
        with pytest.raises(StorageError, match="holds no edits"):
            push_to_hub(folder, "me/facts")
    editor.save_pretrained(tmp_path / "edits")
    with storage.alone(tmp_path / "edits"):  # the same process may
        push_to_hub(tmp_path / "edits", "me/facts")
    next((tmp_path / "edits").glob("comeba_adapter-*")).unlink()
    with pytest.raises(StorageError, match="comeba_adapter-.* is missing; nothing was pushed"):
        push_to_hub(tmp_path / "edits", "me/incomplete")
    assert not (hub.root / "me/incomplete").exists()
    editor.save_pretrained(tmp_path / "edits")

    def refuse(self, *args, **kwargs):
        raise huggingface_hub.errors.HFValidationError("Repo id must be in the form\nmore")

    monkeypatch.setattr(huggingface_hub.HfApi, "create_repo", refuse)
    with pytest.raises(StorageError, match=r"did not take .* as me//facts: Repo id must be in the form$"):
        push_to_hub(tmp_path / "edits", "me//facts")


def test_folders_come_before_names(editor, hub, tiny_model, tokenizer, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    editor.save_pretrained("me/edits")
    load_edits(small_model(tiny_model), Path("me/edits"))
    assert not hub.calls
    assert is_hub_name("me/other") and is_hub_name(Path("m-e/o.t_h"))
    for name in (
        "edits",
        "/me/edits",
        "./edits",
        "../edits",
        "a/b/c",
        "me/",
        "me/o ther",
        "",
        "me/edits",
        "./me/other",
        "me/other/",
        "~/me",
    ):
        assert not is_hub_name(name)


# -- the card -------------------------------------------------------------------------------------------------------


def test_the_card_says_what_was_edited(editor, tmp_path):
    base = tmp_path / "base"
    base.mkdir()
    (base / "README.md").write_text("---\nlicense: other\nlicense_name: mine\nlanguage: en\n---\n# Base\n")
    editor.model.config._name_or_path = str(base)
    bad = 'A | `b`\n<script> "of" {} is'
    editor.edit([EditRequest(bad, "Peru", "x](y)"), *REQUESTS[2:9]], target_values=values(8, 1))
    editor.edit([EditRequest(f"Number {n} of {{}} is", "Lima", "x") for n in range(14)], target_values=values(14, 2))
    editor.retract("edit-1")
    editor.save_pretrained(tmp_path / "edits")
    text = (tmp_path / "edits/README.md").read_text()
    card = ModelCard.load(tmp_path / "edits/README.md")
    assert card.data.to_dict() == {
        "library_name": "comeba_ext",
        "license": "other",
        "license_name": "mine",
        "tags": ["knowledge-editing", "model-editing", "comeba-hk"],
    }
    assert "# 23 edited facts" in text and "COMEBA-HK" in text and "`base` (gpt2, 4 blocks of width 32)" in text and "(other)" in text
    assert str(tmp_path) not in text  # nobody's folders
    rows = [line for line in text[text.index("## Edits") : text.index("## Scores")].splitlines() if line.startswith("| ")]
    assert len(rows) == 1 + 20 and "and 3 more." in text
    assert '| A \\| \\`b\\` &lt;script&gt; "of" Peru is | x\\]\\(y\\) |' in rows
    answered = sum(sum(record["answered"]) for record in editor.log if record["event"] == "edit") - editor.log[0]["answered"][0]
    assert f"{answered} of 23 were answered behind their own prompts" in text
    settings = yaml.safe_load(text.split("```yaml\n")[1].split("```")[0])
    assert settings == json.loads((tmp_path / "edits" / storage.MANIFEST).read_text())["config"]
    editor.save_pretrained(tmp_path / "same")
    assert (tmp_path / "same/README.md").read_text() == text


def test_the_card_shows_what_loading_takes(tiny_model, tokenizer, tmp_path):
    for method, needed in (("ICE", True), ("COMEBA-HK", False)):
        config = default_config(method, model := tiny_model("gpt2"))
        text = card(model, method_named(method), config, Ledger(), [])
        code = text.split("```python\n")[1].split("```")[0]
        compile(code, "card", "exec")
        assert ('load_edits(model, "path/to/this/folder", tokenizer=tokenizer)' in code) is needed
        assert ('tokenizer = AutoTokenizer.from_pretrained("path/to/the/base/model")' in code) is needed


def test_a_base_from_the_hub(editor, tmp_path, monkeypatch):
    editor.model.config._name_or_path = str(tmp_path / "models--org--some-model/snapshots/0a1b")
    cached = tmp_path / "card.md"
    cached.write_text("---\nlicense: apache-2.0\n---\n")
    monkeypatch.setattr(huggingface_hub, "try_to_load_from_cache", lambda repo, file: str(cached) if repo == "org/some-model" else None)
    editor.save_pretrained(tmp_path / "edits")
    data = ModelCard.load(tmp_path / "edits/README.md").data
    assert (data.base_model, data.license) == ("org/some-model", "apache-2.0")
    assert 'from_pretrained("org/some-model")' in (tmp_path / "edits/README.md").read_text()
    cached.write_text("---\n: [\n---\n")  # no card at all
    editor.save_pretrained(tmp_path / "edits")
    assert ModelCard.load(tmp_path / "edits/README.md").data.license is None


def test_a_card_of_ones_own_is_kept(editor, tmp_path, caplog):
    editor.save_pretrained(tmp_path)
    path = tmp_path / "README.md"
    editor.edit(REQUESTS[2:4], target_values=values(2, 1))
    editor.save_pretrained(tmp_path)
    assert "# 4 edited facts" in path.read_text()
    own = path.read_text().replace(MARK, "") + "More of it."
    path.write_text(own)
    editor.save_pretrained(tmp_path)
    assert path.read_text() == own
    with pytest.raises(StorageError, match="somebody's own"):
        add_scores(tmp_path, {"reliability": 1.0}, "x")
    path.unlink()
    path.mkdir()  # cannot be written: the edits are saved all the same
    editor.edit(REQUESTS[4:6], target_values=values(2, 2))
    editor.save_pretrained(tmp_path)
    assert storage.read_manifest(tmp_path)["edits"] == 6 and "could not be written" in caplog.text
    with pytest.raises(ComebaError, match="save the edits first"):
        add_scores(tmp_path, {"reliability": 1.0}, "x")


def test_scores_in_the_card(editor, tmp_path):
    editor.save_pretrained(tmp_path)
    path = tmp_path / "README.md"
    before = path.read_text()
    scores = {
        "reliability": 0.98765,
        "reliability_interval": [0.9, 1.0],
        "locality": 1.0,
        "records": 4,
        "portability": None,
        "per_record": [],
    }
    add_scores(tmp_path, copy.deepcopy(scores) | {"locality": 0.5}, "other facts")
    add_scores(tmp_path, scores, "four facts")
    text = path.read_text()
    assert "| reliability | 0.988 \\[0.900, 1.000\\] |\n| locality | 1.000 |\n" in text and "other facts" not in text
    start, end = text.index("Measured on four facts"), text.index("## Settings")
    assert text[:start] + text[end:] == before
    editor.edit(REQUESTS[2:4], target_values=values(2, 1))
    editor.save_pretrained(tmp_path)
    assert "Measured" not in path.read_text()
