"""The house: few rooms, each with one job, and no room reaches into another's private files."""

from __future__ import annotations

import ast
from pathlib import Path

PACKAGE = Path(__file__).parents[1] / "src" / "convspectra"
MOST_NAMES = 18


def modules() -> list[tuple[tuple[str, ...], ast.Module]]:
    """Every module by its path inside the package, parsed."""
    return [
        (path.relative_to(PACKAGE).with_suffix("").parts, ast.parse(path.read_text()))
        for path in sorted(PACKAGE.rglob("*.py"))
    ]


def test_the_package_shows_its_architecture() -> None:
    names = {path.name for path in PACKAGE.iterdir() if path.name != "__pycache__"}
    rooms = names - {"__init__.py", "__init__.pyi", "py.typed"}
    assert {"operator", "solvers", "spectra", "training"} <= rooms
    assert len(rooms) <= MOST_NAMES


def test_every_room_says_its_job_in_one_line() -> None:
    for path in PACKAGE.rglob("__init__.py"):
        first = (ast.get_docstring(ast.parse(path.read_text())) or "").splitlines()[0]
        assert first.endswith("."), path


def test_a_room_is_entered_by_its_door() -> None:
    """Another room imports from the package itself, never from a file of it that is private."""
    intruders = []
    for where, tree in modules():
        for node in ast.walk(tree):
            if not isinstance(node, ast.ImportFrom) or not node.module:
                continue
            path = node.module.split(".")
            if path[0] != "convspectra" or len(path) < 2 or path[1] == where[0]:
                continue
            names = [*path[2:], *(alias.name for alias in node.names)]
            if any(name.startswith("_") for name in names):
                intruders.append(f"{'/'.join(where)}: {node.module}")
    assert intruders == []


def test_what_a_door_offers_exists() -> None:
    for path in sorted(PACKAGE.glob("*/__init__.py")):
        stub = path.with_suffix(".pyi")
        tree = ast.parse((stub if stub.exists() else path).read_text())
        imported = {
            alias.asname or alias.name
            for node in tree.body
            if isinstance(node, ast.ImportFrom)
            for alias in node.names
        }
        offered = [
            ast.literal_eval(node.value)
            for node in tree.body
            if isinstance(node, ast.Assign) and ast.unparse(node.targets[0]) == "__all__"
        ]
        assert offered == [] or set(offered[0]) == imported, path


def test_benchmarks_and_experiments_do_not_know_each_other() -> None:
    """What both need lies in ``common``, which knows neither."""
    unknown = {
        "benchmarks": {"experiments"},
        "experiments": {"benchmarks"},
        "common": {"benchmarks", "experiments"},
    }
    for folder, others in unknown.items():
        files = sorted((PACKAGE.parents[1] / folder).rglob("*.py"))
        assert files
        for path in files:
            for node in ast.walk(ast.parse(path.read_text())):
                if isinstance(node, ast.ImportFrom):
                    assert (node.module or "").split(".")[0] not in others, path


def test_every_constant_says_what_it_is() -> None:
    """A string stands below each: what it is, how it was measured or that it is a choice."""
    silent, seen = [], 0
    for where, tree in modules():
        followers = [*tree.body[1:], None]
        for node, after in zip(tree.body, followers, strict=True):
            targets = node.targets if isinstance(node, ast.Assign) else []
            targets = [node.target] if isinstance(node, ast.AnnAssign) else targets
            names = [n.id for t in targets for n in ast.walk(t) if isinstance(n, ast.Name)]
            if not names or not names[0].isupper():
                continue
            seen += 1
            described = isinstance(after, ast.Expr) and isinstance(after.value, ast.Constant)
            if not described:
                silent.append(f"{'/'.join(where)}: {names[0]}")
    assert seen > 200
    assert silent == []


def test_docstrings_begin_with_a_noun_or_a_verb() -> None:
    riddles = []
    for where, tree in modules():
        for node in ast.walk(tree):
            if isinstance(node, (ast.Module, ast.ClassDef, ast.FunctionDef)):
                first = (ast.get_docstring(node) or "").split(" ", 1)[0]
                if first in ("That", "Those", "What", "Of", "As", "It"):
                    riddles.append(f"{'/'.join(where)}: {getattr(node, 'name', 'module')}")
    assert riddles == []
