"""The CSV of runs: one row each, appended whole, read back by resumed commands and by figures."""

from __future__ import annotations

import csv
import io
import json
import os
from collections.abc import Sequence
from dataclasses import asdict, dataclass, fields
from pathlib import Path
from typing import Any

from experiments.stable_gradients.training import Record, Run, Settings

DIGITS = 6
"""Significant digits kept of every number: a row of 100 layers stays at a few kilobytes."""

CIRCUMSTANCES = ("images", "settings", "machine", "command")
"""Columns about the machine and the settings."""
COLUMNS = (
    *(field.name for field in fields(Run)),
    *CIRCUMSTANCES,
    *(field.name for field in fields(Record)),
)
"""All columns of the file, a line a run."""


@dataclass(frozen=True)
class Row:
    """A run with its circumstances and what it gave."""

    run: Run
    images: str
    settings: Settings
    machine: str
    command: str
    record: Record

    @property
    def key(self) -> tuple[Run, str, Settings]:
        """Rows of the same key are of the same run."""
        return self.run, self.images, self.settings


def read(path: Path) -> list[Row]:
    """All whole rows of a table; none if there is no file.

    Raises
    ------
    ValueError
        If the file has other columns, or a cell that cannot be read.
    """
    if not path.exists():
        return []
    text = path.read_text(encoding="utf-8")
    reader = csv.DictReader(io.StringIO(text[: text.rfind("\n") + 1]))
    if reader.fieldnames is None:
        return []
    if tuple(reader.fieldnames) != COLUMNS:
        raise ValueError(
            f"expected {path} to have the columns {COLUMNS}, got {tuple(reader.fieldnames)}; it is "
            "of another version: give another --out, or move it"
        )
    try:
        return [_row(cells) for cells in reader]
    except (TypeError, ValueError) as error:
        raise ValueError(f"{path}, line {reader.line_num}: {error}") from error


def append(path: Path, rows: Sequence[Row]) -> None:
    """Add rows at the end of a table, made if need be; a line that was cut short is removed.

    They are one write of whole lines, so that a killed command, or two at once, leave whole rows.
    """
    path.parent.mkdir(parents=True, exist_ok=True)
    if path.exists():
        text = path.read_bytes()
        if not text.endswith(b"\n"):
            os.truncate(path, text.rfind(b"\n") + 1)
    buffer = io.StringIO()
    writer = csv.DictWriter(buffer, COLUMNS, lineterminator="\n")
    if not path.exists() or path.stat().st_size == 0:
        writer.writeheader()
    writer.writerows(map(_cells, rows))
    with path.open("ab", buffering=0) as file:
        file.write(buffer.getvalue().encode())
        os.fsync(file.fileno())


def _cells(row: Row) -> dict[str, str | int]:
    record = {
        name: value if isinstance(value, str) else json.dumps(_rounded(value))
        for name, value in asdict(row.record).items()
    }
    return {
        **asdict(row.run),
        "images": row.images,
        "settings": json.dumps(asdict(row.settings)),
        "machine": row.machine,
        "command": row.command,
        **record,
        # A row is a line: no cell may break it.
        "note": " ".join(row.record.note.split()),
    }


def _row(cells: dict[str, str]) -> Row:
    run = {name: cells[name] for name in ("network", "arm", "activation")}
    values: dict[str, Any] = {
        field.name: cells[field.name]
        if field.name in ("status", "note")
        else json.loads(cells[field.name])
        for field in fields(Record)
    }
    return Row(
        Run(depth=int(cells["depth"]), seed=int(cells["seed"]), **run),
        cells["images"],
        Settings(**json.loads(cells["settings"])),
        cells["machine"],
        cells["command"],
        Record(**values),
    )


def _rounded(value: Any) -> Any:
    if isinstance(value, list):
        return [_rounded(entry) for entry in value]
    return float(f"{value:.{DIGITS}g}") if isinstance(value, float) else value
