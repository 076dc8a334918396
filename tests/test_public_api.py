"""`convspectra.__all__` is what users may use: it is complete, and each entry has an example."""

from __future__ import annotations

import inspect
from types import ModuleType
from typing import Any

import convspectra


def is_public(name: str, value: object) -> bool:
    """Return whether `value` is there for users, and not only for `convspectra/__init__.py`."""
    if name.startswith("_") or inspect.ismodule(value):
        return False
    return is_ours(value)


def is_ours(value: object) -> bool:
    return getattr(value, "__module__", "convspectra").split(".")[0] == "convspectra"


def entries(module: ModuleType) -> dict[str, Any]:
    """Return the public functions and classes, and those of the modules named in `__all__`."""
    own = [n for n, v in vars(module).items() if getattr(v, "__module__", "") == module.__name__]
    found: dict[str, Any] = {}
    for name in getattr(module, "__all__", own):
        value = getattr(module, name)
        if name.startswith("_"):
            continue
        if inspect.ismodule(value):
            found |= {f"{name}.{inner}": entry for inner, entry in entries(value).items()}
        elif inspect.isroutine(value) or inspect.isclass(value):
            found[name] = value
    return found


def test_all_names_what_exists_and_what_is_imported() -> None:
    names = convspectra.__all__
    assert len(set(names)) == len(names)
    assert [name for name in names if not hasattr(convspectra, name)] == []
    modules = [name for name, value in vars(convspectra).items() if inspect.ismodule(value)]
    assert set(modules) & set(names) == {
        "matlab",
        "nn",
        "parametrizations",
        "penalties",
    }  # Note [Lazy names]
    public = {name for name, value in vars(convspectra).items() if is_public(name, value)}
    assert public - set(names) == set()


def test_every_entry_was_written_here() -> None:
    found = entries(convspectra)
    assert "ConvOperator" in found
    assert [name for name, entry in found.items() if not is_ours(entry)] == []


def test_every_entry_has_an_example() -> None:
    # Not inspect.getdoc, which would hand a class the example of its parent.
    found = entries(convspectra)
    assert "ConvOperator" in found
    assert [name for name, entry in found.items() if ">>>" not in (entry.__doc__ or "")] == []
