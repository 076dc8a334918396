"""A file of finished layers, a line each, that an audit goes on from."""

from __future__ import annotations

import json
import os
from pathlib import Path

from convspectra.report.audit_record import LayerAudit, decode, encode


def read_journal(path: Path) -> dict[str, LayerAudit]:
    """The layers of a journal by their keys; a last line that was cut short is passed over.

    Raises
    ------
    ValueError
        If a whole line is no such layer.
    """
    if not path.exists():
        return {}
    text = path.read_text(encoding="utf-8")
    lines = text[: text.rfind("\n") + 1].split("\n")[:-1]
    return dict(_entry(line, f"{path}, line {i}") for i, line in enumerate(lines, 1))


def _entry(line: str, where: str) -> tuple[str, LayerAudit]:
    try:
        entry = json.loads(line)
        return entry["key"], decode(LayerAudit, entry["layer"], "layer")
    except (ValueError, KeyError, TypeError) as error:
        raise ValueError(f"{where}: {error}; remove the file or start anew") from error


def append_to_journal(path: Path, key: str, layer: LayerAudit) -> None:
    """Add a layer, on the disk when this returns; a line that was cut short is removed."""
    path.parent.mkdir(parents=True, exist_ok=True)
    line = json.dumps({"key": key, "layer": encode(layer)}, allow_nan=False) + "\n"
    with path.open("a+b") as file:
        end = file.seek(0, os.SEEK_END)
        if end:
            file.seek(0)
            file.truncate(file.read().rfind(b"\n") + 1)
        file.write(line.encode())
        file.flush()
        os.fsync(file.fileno())
