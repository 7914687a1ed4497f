"""A type checker sees the public names as they are: the package brings its types (py.typed)."""

import os
import subprocess
import sys
from pathlib import Path

import pytest

import comeba_ext

pytest.importorskip("mypy", reason="mypy is not installed")
USAGE = Path(__file__).parent / "typed_usage.py"
REVEALED = {
    "report.answered": "list[bool]",
    "step.losses": "list[float]",
    "editor.target_values": "Tensor",
    "editor.method": "comeba_ext.methods.base.Method",
    "editor.key_memory": "dict[str, comeba_ext.memory.key_memory.KeyMemory]",
    "Editor.from_pretrained": "comeba_ext.editor.Editor",
    'load_edits(model, "folder")': "torch.nn.modules.module.Module",
    'load_edits(model, "user/name"': "torch.nn.modules.module.Module",
    "set_edits": "torch.nn.modules.module.Module",
    "active_edits": "list[str]",
    "edit_sets": "dict[str, comeba_ext.named_edits.EditSet]",
    "push_to_hub": "str",
    "EditConfig.from_easyedit": "comeba_ext.editing.config.EditConfig",
    "read_easyedit": "str",
    "evaluate(": "comeba_ext.evaluation.metrics.Metrics",
    "layer.scores": "Tensor",
}


def test_types_of_the_public_names(tmp_path):
    command = [sys.executable, "-m", "mypy", "--config-file", str(USAGE.with_suffix(".ini")), "--no-error-summary"]
    home = Path(comeba_ext.__file__).resolve().parents[1]
    environment = os.environ if home.name == "site-packages" else {**os.environ, "MYPYPATH": str(home)}  # an editable install
    command += ["--cache-dir", os.devnull, str(USAGE)]  # writing one takes a quarter of the time
    done = subprocess.run(command, capture_output=True, text=True, cwd=tmp_path, env=environment)
    lines = USAGE.read_text(encoding="utf-8").splitlines()
    notes, errors = {}, set()
    for found in done.stdout.splitlines():
        _, _, rest = found.partition("typed_usage.py:")
        number, _, message = rest.partition(": ")
        if message.startswith("note: Revealed type is"):
            notes[lines[int(number) - 1].strip()] = message
        elif message.startswith("error"):
            errors.add(lines[int(number) - 1].strip())
    for what, kind in REVEALED.items():
        (note,) = [note for line, note in notes.items() if line.startswith(f"reveal_type({what}")]
        assert kind in note, note
    begin = lines.index("def wrong(model: nn.Module, tokenizer) -> None:")
    assert errors == {line.strip() for line in lines[begin + 1 :]}, done.stdout  # nothing but what is wrong
