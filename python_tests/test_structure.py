"""The house: which room may use which, and how large a file may be."""

import ast
from pathlib import Path

import comeba_ext
from comeba_ext.methods import METHODS

ROOT = Path(comeba_ext.__file__).parent
# From the ground up; a room may use those in the rows before its own.
FLOORS = [
    {"errors", "interrupts", "row_blocks", "machine"},
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
    """Names of this package's modules that a file imports when it runs; those for type checkers alone left out."""
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
            found |= {inner} if inner else {alias.name for alias in node.names}
        elif isinstance(node, ast.Import):
            found |= {alias.name.partition(".")[2] for alias in node.names if alias.name.startswith("comeba_ext.")}
    return found


def modules():
    for path in sorted(ROOT.rglob("*.py")):
        name = path.relative_to(ROOT).with_suffix("").as_posix().replace("/", ".").removesuffix(".__init__")
        if name != "__init__" and "csrc" not in path.parts:
            yield name, path


def test_no_room_uses_one_above_it():
    upward = []
    for name, path in modules():
        room = name.partition(".")[0]
        for used in imports(ast.parse(path.read_text(encoding="utf-8"))):
            other = used.partition(".")[0]
            if other not in FLOOR:  # a name of the package itself, such as __version__ or Editor
                assert other in (*comeba_ext.__all__, "__version__"), (name, used)
            elif room != other and FLOOR[other] >= FLOOR[room]:
                upward.append((name, used))
    assert not upward


def test_every_room_has_a_floor():
    assert {name.partition(".")[0] for name, _ in modules()} == set(FLOOR)


def test_no_file_is_long():
    long = {path.relative_to(ROOT).as_posix(): len(path.read_text(encoding="utf-8").splitlines()) for _, path in modules()}
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
