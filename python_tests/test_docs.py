"""The README and docs/: every code block is run or checked, figures are in committed results, links lead somewhere.

What a block is, its fence says (``python``, ``sh``, ``json``, ``yaml``, ``toml``, ``text``; none: ``sh``; ``py``: another project's Python,
which is not looked at). Python blocks are run, those of a page one after another, in an empty folder; ``print(x)  # → y`` must print y, and
what a page leaves behind may be checked by a function of its own (``LEFT``). Of shell blocks commands of this package are held against its
own parser. A comment above the fence says otherwise:

    <!-- not run: why -->           Python that is compiled only
    <!-- run -->                    shell whose ``comeba`` commands are run
    <!-- from: examples/x.py -->    Python all of whose lines are in that file, but for those that begin with ...
"""

from __future__ import annotations

import contextlib
import dataclasses
import io
import json
import re
import shlex
from dataclasses import dataclass
from pathlib import Path

import pytest
import yaml
from typer.main import get_command
from typer.testing import CliRunner

import comeba_ext
from comeba_ext import EditConfig, Editor, active_edits, testbed
from comeba_ext.cli import app
from comeba_ext.data import read_requests
from comeba_ext.text.request import EditRequest, as_requests

ROOT = Path(__file__).resolve().parents[1]
PAGES = {path.relative_to(ROOT).as_posix(): path for path in (ROOT / "README.md", *sorted((ROOT / "docs").glob("*.md")))}
RESULTS = ROOT / "bench" / "results" / "experiments"
_OPTIONAL = (ROOT / "pyproject.toml").read_text(encoding="utf-8").split("[project.optional-dependencies]")[1].split("\n\n")[0]
EXTRAS = re.findall(r"^(\w+) = \[", _OPTIONAL, re.M)
METRICS = ("reliability", "generality", "locality")
# Pages whose Python another test runs, with what it needs (a server) and expects.
ELSEWHERE = {"docs/serving.md": "test_server.py"}
MARK = re.compile(r"<!-- (run|not run: .+|from: .+) -->")


@dataclass
class Block:
    line: int  # of its first line, from 1
    language: str
    text: str
    mark: str = ""


def blocks(page: str, *languages: str) -> list[Block]:
    found, fence = [], None
    lines = PAGES[page].read_text(encoding="utf-8").splitlines()
    for number, line in enumerate(lines):
        if not line.lstrip().startswith("```"):
            continue
        if fence is not None:
            found.append(Block(fence + 2, lines[fence].strip("` ").split(" ")[0] or "sh", "\n".join(lines[fence + 1 : number])))
            above = MARK.fullmatch(lines[fence - 1].strip()) if fence else None
            found[-1].mark = above[1] if above else ""
        fence = number if fence is None else None
    assert fence is None, f"{page}: a fence is not closed"
    return [block for block in found if not languages or block.language in languages]


def of(*languages: str):
    return pytest.mark.parametrize("page", [page for page in PAGES if blocks(page, *languages)])


def commands(text: str):
    """The words of every command in a shell block."""
    for line in text.replace("\\\n", " ").splitlines():
        words = shlex.split(line, comments=True)
        while words:
            end = words.index("&&") if "&&" in words else len(words)
            command, words = words[:end], words[end + 1 :]
            command = command[: command.index(">")] if ">" in command else command
            yield [word for n, word in enumerate(command) if not re.fullmatch(r"[A-Z_]+=.*", word) or any(command[:n])]


def own_arguments(words: list[str]) -> list[str] | None:
    """What follows ``comeba``, however it is started; None for other commands."""
    if words and words[0] == "comeba":
        return words[1:]
    return words[words.index("comeba_ext.cli") + 1 :] if "comeba_ext.cli" in words else None


@pytest.fixture(scope="module", autouse=True)
def one_covariance():
    """Every block that collects the embedded model's covariance collects the same, so that it is done once."""
    collect = Editor.collect_covariance

    def collected(editor, texts, *args, **kwargs):
        if getattr(texts, "gi_code", None) is testbed.texts.__code__ and not args and kwargs.keys() <= {"progress"}:
            return editor.set_covariance(testbed.covariance(editor.model, editor.tokenizer))
        return collect(editor, texts, *args, **kwargs)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(Editor, "collect_covariance", collected)
        yield


def test_fences_say_what_they_hold():
    known = {"python", "py", "sh", "json", "yaml", "toml", "text"}
    for page, path in PAGES.items():
        assert {block.language for block in blocks(page)} <= known, page
        marks = re.findall(r"<!-- (?:run|not run|from)\b.*", path.read_text(encoding="utf-8"))
        assert len(marks) == sum(bool(block.mark) for block in blocks(page)), f"{page}: a mark that is not above a fence"
    assert all(blocks(page, "python") for page in (*LEFT, *ELSEWHERE))


def left_by_edit_sets(names, printed, folder):
    assert printed == "['press', 'legal']\n['press', 'legal']\n" and active_edits(names["model"]) == []
    assert "the three facts themselves" in (folder / "press/README.md").read_text(encoding="utf-8")


def left_by_coming_from_easyedit(names, printed, folder):
    assert "MEMIT 4 300\ncollect_covariance(texts, tokens=…)\n" in printed
    assert names["metrics"].reliability > 0.9 and names["editor"].step == 3
    assert (folder / "config.yaml").exists()


# After a page's Python: its names, all that was printed, the folder that it ran in.
LEFT = {"docs/edit_sets.md": left_by_edit_sets, "docs/coming_from_easyedit.md": left_by_coming_from_easyedit}


@of("python")
def test_python_blocks(page, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    names, everything = {"__name__": "__main__"}, ""
    for block in blocks(page, "python"):
        code = compile("\n" * (block.line - 1) + block.text, page, "exec")
        if block.mark.startswith("from: "):
            known = {line.partition("  # ")[0].strip() for line in (ROOT / block.mark[6:]).read_text(encoding="utf-8").splitlines()}
            lines = [line.partition("  # ")[0].strip() for line in block.text.splitlines()]
            assert [line for line in lines if line not in known and not line.startswith("...")] == [], page
        elif page in ELSEWHERE:
            assert Path(page).name in (ROOT / "python_tests" / ELSEWHERE[page]).read_text(encoding="utf-8")
        elif not block.mark:
            with contextlib.redirect_stdout(io.StringIO()) as printed:
                exec(code, names)
            wanted = re.findall(r"print\(.*\)  # → (.+)", block.text)
            shown = iter(line.strip() for line in printed.getvalue().splitlines())
            assert [line for line in wanted if line not in shown] == [], f"{page}, line {block.line}: {printed.getvalue()}"
            everything += printed.getvalue()
    if page in LEFT:
        LEFT[page](names, everything, tmp_path)


@of("sh")
def test_shell_blocks(page, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    group = get_command(app)
    for block in blocks(page, "sh"):
        for words in commands(block.text):
            own = own_arguments(words)
            if own:
                assert own[0] in group.commands, f"{page}: {own}"
                if block.mark == "run":
                    result = CliRunner().invoke(app, own)
                    assert result.exit_code == 0, result.output
                elif "--help" not in own:
                    group.commands[own[0]].make_context(own[0], own[1:])  # raises for an option there is not
            elif words[:2] == ["pip", "install"]:
                asked = [extra for word in words for extra in re.findall(r"\[([\w,]+)\]", word)]
                assert {extra for own in asked for extra in own.split(",")} <= set(EXTRAS), f"{page}: {words}"
            elif words[:1] == ["python"] and words[1:] and words[1].startswith(("bench/", "examples/")):
                assert (ROOT / words[1]).is_file(), f"{page}: {words}"


@of("json", "yaml", "toml")
def test_data_blocks(page, tmp_path):
    for block in blocks(page, "json", "yaml"):
        values = json.loads(block.text) if block.language == "json" else yaml.safe_load(block.text)
        if block.language == "json" and '"target_new"' in block.text:  # records
            path = tmp_path / "records.json"
            path.write_text(json.dumps(values if isinstance(values, list) else [values]))
            read = read_requests(path)
            assert read.requests and not read.skipped
        elif "layers" in values:
            EditConfig.from_dict(values)
    for block in blocks(page, "toml"):
        pytest.importorskip("tomllib").loads(block.text)


def test_the_table_of_fields_is_what_is_read(tmp_path):
    rows = re.findall(r"^\| `(\w+)` \| .+ \| `(.+)` \|$", PAGES["docs/own_model.md"].read_text(encoding="utf-8"), re.M)
    fields = {field.name: field for field in dataclasses.fields(EditRequest)}
    assert sorted(name for name, _ in rows) == sorted(fields)
    whole = {name: json.loads(example) for name, example in rows}
    for name in fields:
        own = {"prompt": "{} is", "subject": "Ann", "target_new": "x", name: whole[name]}
        (request,) = as_requests([own])
        assert getattr(request, name) and getattr(request, name) != fields[name].default, name
    as_requests([whole])
    (table,) = [block for block in blocks("docs/own_model.md", "text") if block.text.startswith("prompt,")]
    (tmp_path / "facts.csv").write_text(table.text)
    (request,) = read_requests(tmp_path / "facts.csv").requests
    assert len(request.rephrase_prompts) == 2 and request.target_new == "English"


def test_commands_extras_and_rooms_are_listed():
    assert set(get_command(app).commands) <= first_column("docs/commands.md")
    assert set(EXTRAS) <= first_column("docs/index.md")
    rooms = {f"{path.parent.name}/" for path in Path(comeba_ext.__file__).parent.glob("*/__init__.py")}
    assert rooms <= {name.removeprefix("comeba_ext/") for name in first_column("docs/layout.md")}


def test_links_lead_somewhere():
    for page, path in PAGES.items():
        text = re.sub(r"```.*?```", "", path.read_text(encoding="utf-8"), flags=re.S)
        for link in re.findall(r"\]\(([^)#\s]+)", text):
            assert "://" in link or (path.parent / link).exists(), f"{page}: {link}"


def test_the_readme_is_short_and_its_figures_are_results():
    text = PAGES["README.md"].read_text(encoding="utf-8")
    assert len(text.splitlines()) <= 120
    files = {
        "100 CounterFact": ("smollm2/defaults500", 100),
        "500 CounterFact": ("smollm2/defaults500", 500),
        "100 ZsRE": ("smollm2/defaults100_zsre", 100),
        "200 ZsRE (on an H100)": ("smollm2/written200_zsre", 200),
        "200 QAEdit (on an H100)": ("smollm2/written200_qaedit", 200),
        "Gemma 3 270M, 100 CounterFact": ("gemma3/defaults100", 100),
    }
    table = table_of(text, "| edits | reliability | generality | locality |")
    assert list(table) == list(files)
    for label, cells in table.items():
        row = row_of(*files[label], "COMEBA-HK (nearest)")
        for metric, cell in zip(METRICS, cells, strict=True):
            value, (low, high) = row[f"{metric}_written"], row[f"{metric}_written_interval"]
            assert cell == f"{value:.3f} [{low:.3f}, {high:.3f}]", (label, metric)
        if label.startswith("200 ZsRE"):
            assert f"portability is {row['portability_written']:.3f} after the 200 ZsRE edits" in text
    said = lambda row: " / ".join(f"{row[f'{metric}_written']:.3f}" for metric in METRICS)  # noqa: E731
    for name in ("counterfact", "zsre"):
        assert f"{said(row_of(f'smollm2/named200_{name}', 200, 'SERAC (named, both)'))} after 200" in text
        assert said(row_of(f"smollm2/written200_{name}", 200, "COMEBA-HK (nearest)")) in text
    assert said(row_of("smollm2/named200_zsre", 200, "SERAC (named)")) in text
    asked = row_of("smollm2/named200_counterfact", 200, "COMEBA-HK (nearest, where asked)")["generality_written"]
    always = row_of("smollm2/written200_counterfact", 200, "COMEBA-HK (nearest)")["generality_written"]
    assert f"{asked:.3f} for {always:.3f}" in text
    others = row_of("smollm2/other_relations", 100, "COMEBA-HK (nearest, where asked)")["hallucination"]
    assert f"{others:.0%}".replace("%", " %") in text


def test_what_else_is_asked_is_of_results():
    """R11's table: its rows are the results', in its order of columns."""
    names = {
        "SERAC behind names, trained to tell": "SERAC (named)",
        "SERAC behind names, also trained on ZsRE's records": "SERAC (named, both)",
        "ICE behind names": "ICE (named)",
        "SERAC, as published": "SERAC",
    }
    head = "| | reliability | generality | other questions answered with the new object | first token as before |\n|---"
    text, before = PAGES["docs/findings.md"].read_text(encoding="utf-8").split(head)[1].split("\n\n")[0], ""
    keys = ("reliability_written", "generality_written", "hallucination", "locality")
    rows = [[cell.strip() for cell in row.replace("**", "").strip("|").split("|")] for row in text.splitlines()[1:]]
    assert len(rows) == 10
    for label, *cells in rows:
        case = f"{before[:-1]}, where asked)" if label.startswith("the same, where it is asked") else names.get(label, label)
        row = row_of("smollm2/other_relations", 100, case)
        for cell, key in zip(cells, keys, strict=True):
            low, high = row[f"{key}_interval"]
            assert cell == f"{row[key]:.3f} [{low:.3f}, {high:.3f}]", (label, key)
        before = case


def test_the_table_of_methods_is_of_results():
    datasets = ("counterfact", "zsre", "qaedit")
    table = table_of(PAGES["docs/methods.md"].read_text(encoding="utf-8"), "| | CounterFact | ZsRE | QAEdit |")
    for label, cells in table.items():
        case = re.sub(r", (?![^(]*\)).*", "", label.replace("z-score, the paper's", "z-score"))
        files = ("named200",) if "(named" in case or "where asked" in case else ("written200", "peers_written", "trained200")
        for dataset, cell in zip(datasets, cells, strict=True):
            found = [row for name in files for row in rows_of(f"smollm2/{name}_{dataset}") if (row["case"], row["edits"]) == (case, 200)]
            if cell == "not run":
                assert not found, (label, dataset)
            else:
                assert cell == " / ".join(f"{found[0][f'{metric}_written']:.3f}" for metric in METRICS), (label, dataset)


def first_column(page: str) -> set[str]:
    """What is in code style in the first cells of a page's tables."""
    cells = re.findall(r"^\|([^|]*)\|", PAGES[page].read_text(encoding="utf-8"), re.M)
    return set(re.findall(r"`([\w./]+)`", " ".join(cells)))


def table_of(text: str, head: str) -> dict[str, list[str]]:
    """The rows of a table by their first cell, without what makes them bold."""
    rows = text.split(head + "\n")[1].split("\n\n")[0].replace("**", "").splitlines()[1:]
    cells = [[cell.strip() for cell in row.strip("|").split("|")] for row in rows]
    return {label: values for label, *values in cells}


def rows_of(name: str) -> list[dict]:
    """None where there is no such result."""
    path = RESULTS / f"{name}.json"
    return json.loads(path.read_text(encoding="utf-8"))["rows"] if path.exists() else []


def row_of(name: str, edits: int, case: str) -> dict:
    (row,) = [row for row in rows_of(name) if row["case"] == case and row["edits"] == edits]
    return row
