"""The one error of a file that cannot be read."""

from __future__ import annotations

import contextlib
import warnings
from collections.abc import Iterator

_LONGEST = 200


class LoadError(ValueError):
    """A model file that is missing, broken, unsafe or unlike what was asked; one line says why."""


@contextlib.contextmanager
def refusing(subject: object, problem: str, advice: str = "") -> Iterator[None]:
    """Turn whatever a library raises on a bad file into a `LoadError`, and keep it silent.

    The message is "subject: problem (first line of the cause); advice".
    """
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            yield
    except LoadError:
        raise
    except Exception as error:  # libraries raise anything on hostile bytes
        end = f"; {advice}" if advice else ""
        raise LoadError(f"{subject}: {problem} ({first_line(error)}){end}") from error


def first_line(error: BaseException) -> str:
    """What an error says, in one line of bounded length."""
    lines = [line.strip() for line in str(error).splitlines() if line.strip()]
    text = f"{type(error).__name__}: {lines[0]}" if lines else type(error).__name__
    return text if len(text) <= _LONGEST else f"{text[:_LONGEST]}..."
