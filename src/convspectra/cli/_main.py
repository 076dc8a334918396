"""The command ``convspectra``: which command, and what a failure looks like."""

from __future__ import annotations

import argparse
import importlib
import os
import sys
from collections.abc import Sequence
from types import ModuleType
from typing import NoReturn

import convspectra
from convspectra.cli._suggestions import refuse_misspelled
from convspectra.cli._threads import wait_passively, watched
from convspectra.text import plain

COMMANDS = {
    "audit": "which layers of a network blow gradients up or let them vanish",
    "compare": "two audits side by side",
    "demo": "train deep plain CNNs on real images, from several starts and with each penalty",
    "flow": "whether signals and gradients vanish, explode or collapse, where, and what to do",
    "reproduce": "the figures and numbers of the paper's Section 4",
    "show": "an audit that was written as JSON, as a table or a page",
    "spectra": "the extreme singular values of one layer, given by its sizes",
}
"""Each is a module of this package, imported when it is called: see Note [Lazy names]."""
FAILED = 2
"""Exit status for what went wrong, with one line that says what."""
INTERRUPTED = 130
"""Exit status after Ctrl-C, as shells have it: 128 and the signal's number."""


def main(arguments: Sequence[str] | None = None) -> int:
    """Run the command; returns the exit status: 2 for what went wrong, 130 for Ctrl-C."""
    words = list(sys.argv[1:] if arguments is None else arguments)
    if (completing := os.environ.get("COMP_LINE")) and "_ARGCOMPLETE" in os.environ:
        words = completing.split()[1:]
    wait_passively()
    name = next((word for word in words if not word.startswith("-")), None)
    command = importlib.import_module(f"convspectra.cli._{name}") if name in COMMANDS else None
    parser, options = _parsers(name, command)
    if completing:
        _complete(parser)
    refuse_misspelled(words, parser, COMMANDS, options)
    parsed = parser.parse_args(words)
    assert command is not None  # else the parser has left
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


def _parsers(
    name: str | None, command: ModuleType | None
) -> tuple[argparse.ArgumentParser, argparse.ArgumentParser]:
    """The parser of all commands, and that of the chosen one: no other module is imported."""
    listed = "\n".join(f"  {each:<12}{text}" for each, text in COMMANDS.items())
    parser = argparse.ArgumentParser(
        prog="convspectra",
        usage="convspectra [-h] [--version] COMMAND ...",
        description="The numerical linear algebra of convolutional layers.",
        formatter_class=argparse.RawDescriptionHelpFormatter,
        epilog=f"commands:\n{listed}\n\nconvspectra COMMAND --help tells the options of each.",
    )
    parser.add_argument("--version", action=_Version, nargs=0, help="print the version and exit")
    commands = parser.add_subparsers(
        prog="convspectra", metavar="COMMAND", required=True, help=argparse.SUPPRESS
    )
    chosen = parser
    for each, text in COMMANDS.items():
        if each != name or command is None:
            commands.add_parser(each, help=text)
            continue
        chosen = commands.add_parser(
            each,
            help=text,
            description=command.DESCRIPTION,
            formatter_class=argparse.RawDescriptionHelpFormatter,
        )
        command.add_arguments(chosen)
    return parser, chosen


def _complete(parser: argparse.ArgumentParser) -> None:
    """Answer a shell that asks how a line may go on, and leave."""
    try:
        argcomplete = importlib.import_module("argcomplete")
    except ImportError:
        return
    argcomplete.autocomplete(parser)
