"""The files that a command writes, checked before anything is computed."""

from __future__ import annotations

import os
from collections.abc import Mapping
from pathlib import Path


def check_outputs(outputs: Mapping[str, Path | None], inputs: Mapping[str, Path | None]) -> None:
    """Raise if a file cannot be written, or would replace one that is read.

    Parameters
    ----------
    outputs : mapping
        Paths by the names of their options, without the dashes; None for those not given.
    inputs : mapping
        Paths by what they are, as in "the model file".

    Raises
    ------
    ValueError
        With the option and the path in it.
    """
    taken = {os.path.realpath(path): what for what, path in inputs.items() if path is not None}
    for kind, path in outputs.items():
        if path is None:
            continue
        real = Path(os.path.realpath(path))  # resolve() raises on a link that leads to itself
        if str(real) in taken:
            raise ValueError(
                f"expected a file of its own for --{kind}, got {path}, {taken[str(real)]}"
            )
        taken[str(real)] = f"that of --{kind}"
        if real.is_dir():
            raise ValueError(f"expected a file for --{kind}, got {path}, which is a folder")
        if any(place.is_symlink() for place in (real, *real.parents)):
            raise ValueError(
                f"expected a file for --{kind}, got {path}, a link that leads to itself"
            )
        present = next(place for place in (real, *real.parents) if place.exists())
        if not (os.access(present, os.W_OK) and (present == real or present.is_dir())):
            raise ValueError(f"expected a file that can be written for --{kind}, got {path}")
