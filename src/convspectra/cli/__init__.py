"""The command ``convspectra``: parsing and printing, one command a file."""

from convspectra.cli._main import main

__all__ = ["main"]
