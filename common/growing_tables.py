"""Tables of experiments that grow run by run: CSV files that name the code of each row."""

from __future__ import annotations

import csv
import subprocess
from collections.abc import Sequence
from pathlib import Path

import convspectra as cs


def code_version() -> str:
    """The commit that the code is of, marked where files of code differ; else the version."""
    commit, changed = (
        subprocess.run(("git", *command), capture_output=True, text=True, check=False)
        for command in (
            ("describe", "--always"),
            ("status", "--porcelain", "--untracked-files=no", "--", "*.py"),
        )
    )
    if commit.returncode != 0:
        return cs.__version__
    return commit.stdout.strip() + ("-dirty" if changed.stdout.strip() else "")


def read(path: Path, columns: Sequence[str]) -> list[dict[str, str]]:
    """The rows of a table that was written, or none; a column that it lacks is empty."""
    if not path.exists():
        return []
    with path.open(newline="", encoding="utf-8") as file:
        return [{name: row.get(name, "") for name in columns} for row in csv.DictReader(file)]


def write(path: Path, rows: Sequence[dict[str, str]], columns: Sequence[str]) -> None:
    """Write the whole table; a run that is stopped leaves the rows before it."""
    path.parent.mkdir(parents=True, exist_ok=True)
    beside = path.with_suffix(".new")
    with beside.open("w", newline="", encoding="utf-8") as file:
        writer = csv.DictWriter(file, columns)
        writer.writeheader()
        writer.writerows(rows)
    beside.replace(path)
