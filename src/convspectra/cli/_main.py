"""The command ``convspectra``: which command, and what a failure looks like."""

from __future__ import annotations

import argparse
import importlib
from collections.abc import Sequence

import convspectra
from convspectra.text import plain

COMMANDS = {
    "audit": "which layers of a network blow gradients up or let them vanish",
    "compare": "two audits side by side",
    "demo": "train a deep plain CNN on real images with and without each penalty",
    "reproduce": "the figures and numbers of the paper's Section 4",
    "show": "an audit that was written as JSON, as a table or a page",
}
"""Each is a module of this package, imported when it is called: see Note [Lazy names]."""
FAILED = 2
INTERRUPTED = 130


def main(arguments: Sequence[str] | None = None) -> int:
    """Run the command; returns the exit status: 2 for what went wrong, 130 for Ctrl-C."""
    chosen = _parser().parse_args(arguments)
    command = importlib.import_module(f"convspectra.cli._{chosen.command}")
    parser = argparse.ArgumentParser(
        prog=f"convspectra {chosen.command}",
        description=command.DESCRIPTION,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    command.add_arguments(parser)
    parsed = parser.parse_args(chosen.rest)
    from rich.console import Console  # not for the help, which is to be there at once

    try:
        return int(command.run(parsed, Console(emoji=False)))
    except KeyboardInterrupt:
        return INTERRUPTED
    except (ValueError, ImportError, OSError, RecursionError) as error:
        message = plain(" ".join(str(error).split()))
        Console(stderr=True, emoji=False).print(
            f"convspectra: {message}", style="red", markup=False, soft_wrap=True
        )
        return FAILED


def _parser() -> argparse.ArgumentParser:
    listed = "\n".join(f"  {name:<12}{text}" for name, text in COMMANDS.items())
    parser = argparse.ArgumentParser(
        prog="convspectra",
        description="The numerical linear algebra of convolutional layers.",
        formatter_class=argparse.RawDescriptionHelpFormatter,
        epilog=f"commands:\n{listed}\n\nconvspectra COMMAND --help tells the options of each.",
    )
    parser.add_argument("--version", action="version", version=convspectra.__version__)
    parser.add_argument("command", choices=COMMANDS, metavar="COMMAND")
    parser.add_argument("rest", nargs=argparse.REMAINDER, help=argparse.SUPPRESS)
    return parser
