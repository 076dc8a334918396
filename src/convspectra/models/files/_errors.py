"""The one error of a file that cannot be read."""

from __future__ import annotations

import contextlib
import logging
import warnings
from collections.abc import Iterator

from convspectra.text import plain

_LONGEST = 200
"""Characters of a cause in a message; a choice: one line of it, two at most, on a wide terminal."""

_IN_TORCHSCRIPT = "The following operation failed in the TorchScript interpreter"
"""How TorchScript begins its errors, whose last line is the one that tells something."""


class LoadError(ValueError):
    """A model file that is missing, broken, unsafe or unlike what was asked; one line says why."""

    def __init__(self, message: str) -> None:
        super().__init__(plain(message))


@contextlib.contextmanager
def refusing(subject: object, problem: str, advice: str = "") -> Iterator[None]:
    """Turn whatever a library raises on a bad file into a `LoadError`, and keep it silent.

    The message is "subject: problem (first line of the cause); advice".
    """
    try:
        with warnings.catch_warnings(), _unlogged():
            warnings.simplefilter("ignore")
            yield
    except LoadError:
        raise
    except Exception as error:  # libraries raise anything on hostile bytes
        end = f"; {advice}" if advice else ""
        raise LoadError(f"{subject}: {problem} ({first_line(error)}){end}") from error


@contextlib.contextmanager
def _unlogged() -> Iterator[None]:
    """No warnings or tracebacks of loggers, such as those of torch.export; an outer level stays."""
    before = logging.root.manager.disable
    logging.disable(max(before, logging.ERROR))
    try:
        yield
    finally:
        logging.disable(before)


def first_line(error: BaseException) -> str:
    """The message of an error in one line of bounded length: the first that tells something."""
    lines = [line.strip() for line in str(error).splitlines() if line.strip()]
    kind = type(error).__name__
    text = f"{kind}: {_telling(lines).removeprefix(f'{kind}: ')}" if lines else kind
    return text if len(text) <= _LONGEST else f"{text[:_LONGEST]}..."


def _telling(lines: list[str]) -> str:
    told = [line for line in lines if not line.endswith(":")] or lines
    return told[-1] if lines[0].startswith(_IN_TORCHSCRIPT) else told[0]
