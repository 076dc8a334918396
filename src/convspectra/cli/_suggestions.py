"""Suggestions for commands and options that there are not."""

from __future__ import annotations

import argparse
import difflib
from collections.abc import Collection, Sequence


def refuse_misspelled(
    words: Sequence[str],
    parser: argparse.ArgumentParser,
    commands: Collection[str],
    options: argparse.ArgumentParser,
) -> None:
    """Leave with a suggestion if a word is no command, or no option or start of one.

    argparse first asks for what is required, and so hides a misspelled ``--input``.

    Parameters
    ----------
    words : sequence of str
        The command line.
    parser : ArgumentParser
        The parser of all commands.
    commands : collection of str
    options : ArgumentParser
        The parser of the chosen command; `parser` itself where none is chosen.
    """
    command = next((word for word in words if not word.startswith("-")), None)
    if command is not None and command not in commands:
        parser.error(f"no command {command!r}{_suggestion(command, commands)}")
    known = options._option_string_actions
    for word in words:
        option, _, _ = word.partition("=")
        if option == "--":
            return
        if option.startswith("--") and not any(name.startswith(option) for name in known):
            options.error(f"no option {option}{_suggestion(option, known)}")


def _suggestion(word: str, known: Collection[str]) -> str:
    close = difflib.get_close_matches(word, known, n=2)
    return f"; did you mean {' or '.join(close)}?" if close else f"; there are {', '.join(known)}"
