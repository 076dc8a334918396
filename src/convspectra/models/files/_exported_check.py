"""Whether a torch.export archive holds tensors and a program only, and nothing that runs code.

``torch.export.load`` unpickles members without restriction, and evaluates names and sizes in the
program as Python. Both are checked before it is called.
"""

from __future__ import annotations

import io
import json
import re
import zipfile
from collections import Counter
from collections.abc import Iterator
from pathlib import Path, PurePosixPath
from typing import Any

import torch

from convspectra.models.files._errors import LoadError, refusing

_PROGRAMS = ("models/", "serialized_exported_program.json")
"""Members that hold a program, as JSON."""

_PICKLED = ("data/sample_inputs/", "serialized_")
"""Members that ``torch.export.load`` unpickles."""

_PICKLED_TENSORS = ("weight_", "tensor_")
"""Beginnings of the names under which weights and constants are stored as tensors."""

_LIBRARIES = "data/aotinductor/"
"""Folder of compiled code, which is loaded as it is."""

_UNEVALUATED = {"metadata", "as_string", "as_strings", "guards_code"}
"""Keys whose texts nobody evaluates; guards are left out on loading."""

_OPERATOR = re.compile(
    r"(torch\.ops\.[A-Za-z]\w*\.\w+(\.[A-Za-z]\w*)?|(_operator|math)\.[a-z]\w*|torch\.sym_\w+)?"
)
"""Names of operators: of PyTorch's own libraries, of comparison, of sizes."""

_SIZE = re.compile(  # calls of classes such as Mul(...), and no call of what a call returned
    r"([A-Z]\w*\b|[a-z]\w*\b(?!\s*\()|'[\w.]+'|\d+(\.\d+)?\b|\)(?!\s*\()|[\s(,+\-*/%<>=&|~])*"
)
"""Sizes as SymPy writes them: calls of classes such as Mul(...), none of what a call returned."""

_TREE = re.compile(r"(?!.*(__enum__|default_factory|\\u))[\w\s.,:\"\[\]{}\\/-]*")
"""Structures of inputs and outputs, without enumerations and factories, which name Python
objects.
"""

_NAME = re.compile(r"[\w.:+/-]*")
"""Plain names, for every other text."""

_PATTERNS = {
    "target": _OPERATOR,
    "as_operator": _OPERATOR,
    "expr_str": _SIZE,
    "in_spec": _TREE,
    "out_spec": _TREE,
}
"""Patterns that the texts under a key must match."""


def check_export(path: Path) -> None:
    """Raise unless loading the archive runs no code but PyTorch's own.

    Raises
    ------
    LoadError
        For compiled libraries, pickles of more than tensors, custom objects, and operators, names
        or sizes in the program that are none.
    """
    with (
        refusing(path, "not a whole torch.export archive", "save it again with torch.export.save"),
        zipfile.ZipFile(path) as archive,
    ):
        reason = next(_reasons(archive), "")
    if reason:
        raise LoadError(
            f"{path}: {reason}, and loading that may run arbitrary code; --allow-pickle "
            "(allow_pickle=True) loads it if you trust the file"
        )


def _reasons(archive: zipfile.ZipFile) -> Iterator[str]:
    """All that the archive has besides tensors and a program."""
    names = archive.namelist()
    for name, times in Counter(names).items():
        if times > 1:  # readers differ in which one they take
            yield f"{name!r} is in it {times} times"
    for name in names:
        inner = _inner(name)
        if inner.startswith(_LIBRARIES):
            yield f"{name!r} is a compiled library"
        elif inner.startswith(_PROGRAMS):
            yield from _evaluated(json.loads(archive.read(name)))
        elif inner.startswith(_PICKLED) or inner.endswith(".pt"):
            yield from _unsafe_pickle(name, archive.read(name))
        elif inner.endswith("_config.json"):
            yield from _unsafe_payloads(archive, name)


def _inner(name: str) -> str:
    """A member's name without the folder that everything is in."""
    first, _, rest = name.partition("/")
    return name if first in ("models", "data") or not rest else rest


def _unsafe_payloads(archive: zipfile.ZipFile, config: str) -> Iterator[str]:
    """The pickles among the weights or constants that a configuration lists."""
    for key, payload in json.loads(archive.read(config))["config"].items():
        file = payload["path_name"]
        if not file.startswith(_PICKLED_TENSORS):
            yield f"{key!r} is a custom object"
        elif payload["use_pickle"]:
            member = str(PurePosixPath(config).parent / file)
            yield from _unsafe_pickle(member, archive.read(member))


def _unsafe_pickle(name: str, data: bytes) -> Iterator[str]:
    if not data:
        return
    try:
        torch.load(io.BytesIO(data), map_location="cpu", weights_only=True)
    except Exception:  # whatever is wrong, torch.export.load goes on to unpickle it
        yield f"{name!r} is a pickle of more than tensors"


def _evaluated(value: Any, key: str = "text") -> Iterator[str]:
    """The texts of a program that PyTorch may evaluate and that are no plain names or sizes."""
    if isinstance(value, dict):
        for name, entry in value.items():
            if name not in _UNEVALUATED:
                yield from _evaluated(entry, name)
    elif isinstance(value, list):
        for entry in value:
            yield from _evaluated(entry, key)
    elif isinstance(value, str) and not _PATTERNS.get(key, _NAME).fullmatch(value):
        yield f"its program has a {key} {value[:60]!r}"
