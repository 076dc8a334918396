"""A file of finished layers, a line each, that an audit goes on from."""

from __future__ import annotations

import hashlib
import json
import os
import re
from pathlib import Path

from convspectra.auditing._record import LayerAudit, decode, encode

_FIELDS = {"key", "layer", "checksum"}
"""The fields of a line."""
_START = b'{"key": "'
"""How the first line begins, so that one that was cut short is known."""
_LONGEST_LINE = 2**26
"""Bytes of the first line that are read to tell a journal from another file. A choice, far above
any line that an audit writes."""


def journal_files(journal: Path) -> list[Path]:
    """The files of a journal that are there: its own, and those of ranks with a number behind it.

    Raises
    ------
    ValueError
        If one of them is no journal.
    """
    name = re.compile(rf"{re.escape(journal.name)}(\.\d+)?")
    folder = journal.parent
    files = sorted(folder.iterdir()) if folder.is_dir() else []
    files = [path for path in files if name.fullmatch(path.name)]
    for path in files:
        if not _is_journal(path):
            raise ValueError(
                f"expected a new file or the journal of an audit, got {path}, which is neither; "
                "give another journal"
            )
    return files


def remove_journal(journal: Path) -> None:
    """Delete the files of a journal; raises as `journal_files`, before anything is deleted."""
    for path in journal_files(journal):
        path.unlink(missing_ok=True)


def _is_journal(path: Path) -> bool:
    """Whether the first line is that of a journal, perhaps cut short."""
    if not path.is_file():
        return False
    with path.open("rb") as file:
        line = file.readline(_LONGEST_LINE)
    if not line.endswith(b"\n"):
        return line[: len(_START)] == _START[: len(line)]
    try:
        entry = json.loads(line)
    except ValueError:
        return False
    return isinstance(entry, dict) and set(entry) == _FIELDS


def read_journal(path: Path) -> dict[str, LayerAudit]:
    """The layers of a journal by their keys; a last line that was cut short is passed over.

    Raises
    ------
    ValueError
        If a whole line is no such layer, or was altered since it was written: its checksum says so.
    """
    if not path.exists():
        return {}
    text = path.read_text(encoding="utf-8")
    lines = text[: text.rfind("\n") + 1].split("\n")[:-1]
    return dict(_entry(line, f"{path}, line {i}") for i, line in enumerate(lines, 1))


def _entry(line: str, where: str) -> tuple[str, LayerAudit]:
    try:
        entry = json.loads(line)
        if entry["checksum"] != _checksum(entry["key"], entry["layer"]):
            raise ValueError("the line was altered after it was written, its checksum is another")
        return entry["key"], decode(LayerAudit, entry["layer"], "layer")
    except (ValueError, KeyError, TypeError) as error:
        raise ValueError(f"{where}: {error}; remove the file or start anew") from error


def append_to_journal(path: Path, key: str, layer: LayerAudit) -> None:
    """Add a layer, on the disk when this returns; a line that was cut short is removed."""
    path.parent.mkdir(parents=True, exist_ok=True)
    values = encode(layer)
    entry = {"key": key, "layer": values, "checksum": _checksum(key, values)}
    line = json.dumps(entry, allow_nan=False) + "\n"
    try:
        with path.open("a+b") as file:
            end = file.seek(0, os.SEEK_END)
            if end:
                file.seek(0)
                file.truncate(file.read().rfind(b"\n") + 1)
            file.write(line.encode())
            file.flush()
            os.fsync(file.fileno())
    except OSError as error:
        raise type(error)(error.errno, error.strerror, str(path)) from error


def _checksum(key: object, layer: object) -> str:
    """The hash of an entry by its values, however its line is written."""
    values = json.dumps([key, layer], sort_keys=True, allow_nan=False)
    return hashlib.sha256(values.encode()).hexdigest()
