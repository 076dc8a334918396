"""Which modules of a model are meant: by a pattern of their names, or by a function."""

from __future__ import annotations

import fnmatch
from collections.abc import Callable, Iterable, Iterator
from typing import Any, TypeAlias

from torch import nn

from convspectra.operator import CONVOLUTION_TYPES, LAYER_TYPES

Predicate = Callable[[str, nn.Module], bool]
Selection: TypeAlias = str | Iterable[str] | Predicate
"""Layers by a shell-style pattern of their names, by several, or by a function (name, module)."""


def is_convolution(name: str, module: nn.Module) -> bool:
    """The default choice of layers: every convolution, transposed or not."""
    return isinstance(module, CONVOLUTION_TYPES)


def selected(name: str, module: nn.Module, selection: Selection) -> bool:
    """Whether a selection includes a module; a pattern chooses among convolutions only.

    Raises
    ------
    ValueError
        For anything that is not a selection.
    """
    if callable(selection):
        return bool(selection(name, module))
    patterns: list[Any] = [selection]
    if isinstance(selection, Iterable) and not isinstance(selection, str):
        patterns = list(selection)
    if not all(isinstance(pattern, str) for pattern in patterns):
        raise ValueError(
            "expected a selection of layers to be a name pattern, several of them, or a function "
            f"of (name, module), got {selection!r}"
        )
    named = any(fnmatch.fnmatchcase(name, pattern) for pattern in patterns)
    return named and isinstance(module, LAYER_TYPES)


def unwrapped(model: nn.Module) -> nn.Module:
    """The module inside ``torch.compile`` and (Distributed)DataParallel, whose names are shorter.

    Examples
    --------
    >>> unwrapped(nn.DataParallel(nn.ReLU()))
    ReLU()
    """
    while True:
        if isinstance(model, (nn.parallel.DistributedDataParallel, nn.DataParallel)):
            model = model.module
        elif isinstance(inner := getattr(model, "_orig_mod", None), nn.Module):
            model = inner
        else:
            return model


def modules_of(model: nn.Module) -> Iterator[tuple[str, nn.Module]]:
    """The modules and their names as they are without ``torch.compile`` of some of them."""
    for name, module in model.named_modules():
        if "_orig_mod" not in module._modules:
            yield ".".join(part for part in name.split(".") if part != "_orig_mod"), module
