"""The house: which room may use which, and how large a file may be."""

import ast
import subprocess
import sys
from pathlib import Path

import pytest

import comeba_ext
from comeba_ext.kernels.build import csrc
from comeba_ext.methods import METHODS

ROOT = Path(comeba_ext.__file__).parent
# From the ground up; a room may use those in the rows before its own.
FLOORS = [
    {"errors", "interrupts", "row_blocks", "machine", "strict_json"},
    {"storage", "kernels", "distributed", "text", "registry"},
    {"forward", "ops", "data", "hub"},
    {"scores"},
    {"layers"},
    {"covariance", "memory"},
    {"editing"},
    {"methods"},
    {"named_edits", "model_card"},
    {"saved_edits"},
    {"editor"},
    {"evaluation"},
    {"testbed", "tuning", "training", "exporting"},
    {"loading", "experiments", "serving"},
    {"doctor", "report", "ui"},
    {"cli"},
]
FLOOR = {room: number for number, rooms in enumerate(FLOORS) for room in rooms}


def imports(tree: ast.AST) -> set[str]:
    """Names of this package's modules that a file imports when it runs; those for type checkers alone left out. A name of the package
    itself, such as Editor, stands for the module that it comes from."""
    checked = {
        id(node)
        for branch in ast.walk(tree)
        if isinstance(branch, ast.If) and "TYPE_CHECKING" in ast.dump(branch.test)
        for node in ast.walk(branch)
    }
    found = set()
    for node in ast.walk(tree):
        if id(node) in checked:
            continue
        if isinstance(node, ast.ImportFrom) and (node.module or "").partition(".")[0] == "comeba_ext":
            inner = node.module.partition(".")[2]
            found |= {inner} if inner else {home_of(alias.name) for alias in node.names}
        elif isinstance(node, ast.Import):
            found |= {alias.name.partition(".")[2] for alias in node.names if alias.name.startswith("comeba_ext.")}
        elif isinstance(node, ast.Attribute) and isinstance(node.value, ast.Name) and node.value.id == "comeba_ext":
            found.add(home_of(node.attr))
    return found - {"__version__"}  # which lies under everything


def home_of(name: str) -> str:
    """What ``from comeba_ext import name`` loads."""
    return comeba_ext._HOME.get(name, f"comeba_ext.{name}").partition(".")[2]


def upward(name: str, used: set[str]) -> list[tuple[str, str]]:
    """The imports of a module that its floor does not allow."""
    room = name.partition(".")[0]
    others = {other: other.partition(".")[0] for other in used}
    assert set(others.values()) <= set(FLOOR), (name, others)
    return [(name, other) for other, its in others.items() if room != its and FLOOR[its] >= FLOOR[room]]


def modules():
    for path in sorted(ROOT.rglob("*.py")):
        name = path.relative_to(ROOT).with_suffix("").as_posix().replace("/", ".").removesuffix(".__init__")
        if name != "__init__" and "csrc" not in path.parts:
            yield name, path


def test_no_room_uses_one_above_it():
    found = [arrow for name, path in modules() for arrow in upward(name, imports(ast.parse(path.read_text(encoding="utf-8"))))]
    assert not found


@pytest.mark.parametrize(
    "line",
    [
        "from comeba_ext import read_easyedit",
        "from comeba_ext import __version__, methods",
        "from comeba_ext.methods.easyedit import read_easyedit as read",
        "import comeba_ext.methods.easyedit",
        "import comeba_ext\ncomeba_ext.read_easyedit('x.yaml')",
    ],
)
def test_an_arrow_is_found_however_it_is_written(line):
    inside = "def late():\n    " + line.replace("\n", "\n    ")
    for program in (line, inside):
        used = imports(ast.parse(program))
        assert upward("editing.config", used) and not upward("tuning.search", used)
    assert not imports(ast.parse("from comeba_ext import __version__"))


def test_what_is_registered_from_above_comes_with_the_public_name(tmp_path):
    """EditConfig knows no methods; whoever has it from the package, and nothing else, can read their files all the same."""
    (tmp_path / "ft.yaml").write_text("alg_name: FT\nlayers: [3]\nnum_steps: 7\n")
    program = "from comeba_ext import EditConfig; print(EditConfig.from_easyedit('ft.yaml').steps)"
    done = subprocess.run([sys.executable, "-c", program], cwd=tmp_path, capture_output=True, text=True)
    assert done.stdout == "7\n", done.stderr


def test_every_room_has_a_floor():
    assert {name.partition(".")[0] for name, _ in modules()} == set(FLOOR)


def test_no_file_is_long():
    kernels = [path for path in csrc().rglob("*") if path.is_file()]
    assert kernels
    long = {path.as_posix(): len(path.read_text(encoding="utf-8").splitlines()) for path in (*(path for _, path in modules()), *kernels)}
    assert {name: count for name, count in long.items() if count > 400} == {}


def test_no_score_is_told_by_its_name():
    """What depends on a score is the score's own (comeba_ext/scores)."""
    names, found = {"zscore", "reference", "nearest"}, []
    for name, path in modules():
        if name.partition(".")[0] in ("scores", "ops"):
            continue
        for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
            if isinstance(node, ast.Compare):
                texts = {part.value for part in ast.walk(node) if isinstance(part, ast.Constant) and isinstance(part.value, str)}
                found += [(name, node.lineno)] if texts & names else []
    assert not found


def test_no_method_is_told_by_its_name():
    """What depends on a method is the method's own (comeba_ext/methods)."""
    names = {name for method in METHODS.all().values() for name in (method.name, *method.aliases)}
    found = []
    for name, path in modules():
        for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
            if isinstance(node, ast.Compare):
                texts = {part.value for part in ast.walk(node) if isinstance(part, ast.Constant) and isinstance(part.value, str)}
                found += [(name, node.lineno)] if texts & names else []
    assert not found
