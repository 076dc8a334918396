"""The command ``convspectra``: which command, and what a failure looks like."""

from __future__ import annotations

import argparse
import importlib
from collections.abc import Sequence
from typing import NoReturn

import convspectra
from convspectra.cli._threads import wait_passively, watched
from convspectra.text import plain

COMMANDS = {
    "audit": "which layers of a network blow gradients up or let them vanish",
    "compare": "two audits side by side",
    "demo": "train deep plain CNNs on real images, from several starts and with each penalty",
    "flow": "whether signals and gradients vanish, explode or collapse, where, and what to do",
    "reproduce": "the figures and numbers of the paper's Section 4",
    "show": "an audit that was written as JSON, as a table or a page",
}
"""Each is a module of this package, imported when it is called: see Note [Lazy names]."""
FAILED = 2
"""Exit status for what went wrong, with one line that says what."""
INTERRUPTED = 130
"""Exit status after Ctrl-C, as shells have it: 128 and the signal's number."""


def main(arguments: Sequence[str] | None = None) -> int:
    """Run the command; returns the exit status: 2 for what went wrong, 130 for Ctrl-C."""
    chosen = _parser().parse_args(arguments)
    wait_passively()
    command = importlib.import_module(f"convspectra.cli._{chosen.command}")
    parser = argparse.ArgumentParser(
        prog=f"convspectra {chosen.command}",
        description=command.DESCRIPTION,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    command.add_arguments(parser)
    parsed = parser.parse_args(chosen.rest)
    # Here and not above: rich comes with it, and the help is to be there at once.
    from convspectra.cli._printing import PipedConsole

    def complain(text: str, style: str) -> None:
        PipedConsole(stderr=True, emoji=False).print(
            f"convspectra: {plain(text)}", style=style, markup=False, soft_wrap=True
        )

    try:
        with watched(lambda text: complain(text, "yellow")):
            return int(command.run(parsed, PipedConsole(emoji=False)))
    except KeyboardInterrupt:
        return INTERRUPTED
    except (ValueError, ImportError, OSError, RecursionError) as error:
        complain(" ".join(str(error).split()), "red")
        return FAILED


class _Version(argparse.Action):
    """Print the version, which is looked up only when it is asked for."""

    def __call__(self, parser: argparse.ArgumentParser, *others: object) -> NoReturn:
        print(convspectra.__version__)
        parser.exit()


def _parser() -> argparse.ArgumentParser:
    listed = "\n".join(f"  {name:<12}{text}" for name, text in COMMANDS.items())
    parser = argparse.ArgumentParser(
        prog="convspectra",
        description="The numerical linear algebra of convolutional layers.",
        formatter_class=argparse.RawDescriptionHelpFormatter,
        epilog=f"commands:\n{listed}\n\nconvspectra COMMAND --help tells the options of each.",
    )
    parser.add_argument("--version", action=_Version, nargs=0, help="print the version and exit")
    parser.add_argument("command", choices=COMMANDS, metavar="COMMAND")
    parser.add_argument("rest", nargs=argparse.REMAINDER, help=argparse.SUPPRESS)
    return parser
