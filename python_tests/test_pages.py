"""The blocks of the pages on sets of edits and on EasyEdit run, one after another, in an empty folder (```` ```py ```` is others' code)."""

import contextlib
import io
import re
from pathlib import Path

from comeba_ext import active_edits

DOCS = Path(__file__).resolve().parents[1] / "docs"


def run(page, folder, monkeypatch):
    """Names after the blocks, and what was printed."""
    monkeypatch.chdir(folder)
    names, printed = {"__name__": page}, io.StringIO()
    blocks = re.findall(r"^```python\n(.*?)^```", (DOCS / page).read_text(encoding="utf-8"), re.M | re.S)
    assert blocks
    with contextlib.redirect_stdout(printed):
        for block in blocks:
            exec(compile(block, page, "exec"), names)
    return names, printed.getvalue()


def test_edit_sets(tmp_path, monkeypatch):
    names, printed = run("edit_sets.md", tmp_path, monkeypatch)
    assert printed == "['press', 'legal']\n['press', 'legal']\n" and active_edits(names["model"]) == []
    assert "the three facts themselves" in (tmp_path / "press/README.md").read_text()


def test_coming_from_easyedit(tmp_path, monkeypatch):
    names, printed = run("coming_from_easyedit.md", tmp_path, monkeypatch)
    assert "MEMIT 4 300\ncollect_covariance(texts, tokens=…)\n" in printed
    assert names["metrics"].reliability > 0.9 and names["editor"].step == 3
    assert (tmp_path / "config.yaml").exists()
