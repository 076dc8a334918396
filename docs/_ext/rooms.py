"""The table of rooms in CONTRIBUTING.md: ``python docs/_ext/rooms.py --write``.

Without ``--write`` the table is printed. A room's floor is its line in ``[tool.importlinter]`` of
pyproject.toml, counted from below; its job is the first line of its docstring.
"""

from __future__ import annotations

import argparse
import ast
import re
import sys
from pathlib import Path

if sys.version_info >= (3, 11):
    import tomllib
else:
    import tomli as tomllib

ROOT = Path(__file__).parents[2]
PACKAGE = ROOT / "src" / "convspectra"
PAGE = ROOT / "CONTRIBUTING.md"
PLACE = re.compile(r"(?<=<!-- rooms -->\n).*?(?=<!-- end of rooms -->)", re.DOTALL)


def floors() -> list[list[str]]:
    """The rooms of each floor, from the roof down."""
    contracts = tomllib.loads((ROOT / "pyproject.toml").read_text())["tool"]["importlinter"]
    layers = next(c["layers"] for c in contracts["contracts"] if c["type"] == "layers")
    return [[room.strip() for room in layer.split("|")] for layer in layers]


def job(room: str) -> str:
    """The first line of a room's docstring, in Markdown."""
    folder = PACKAGE / room
    path = folder / "__init__.py" if folder.is_dir() else folder.with_suffix(".py")
    first = (ast.get_docstring(ast.parse(path.read_text())) or "").splitlines()[0]
    return first.replace("``", "`").replace("|", r"\|").rstrip(".")


def table() -> str:
    """The table in Markdown, one line a room."""
    lines = ["| floor | room | job |", "|---|---|---|"]
    for number, floor in zip(range(len(floors()), 0, -1), floors(), strict=True):
        for room in floor:
            name = f"{room}/" if (PACKAGE / room).is_dir() else f"{room}.py"
            lines.append(f"| {number} | `{name}` | {job(room)} |")
    return "\n".join(lines) + "\n"


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description="Print the table of rooms.")
    parser.add_argument("--write", action="store_true", help="write it into CONTRIBUTING.md")
    if parser.parse_args().write:
        PAGE.write_text(PLACE.sub(lambda match: table(), PAGE.read_text()))
    else:
        print(table(), end="")
