"""What several commands print with and take as arguments."""

from __future__ import annotations

import argparse
from collections.abc import Sequence
from pathlib import Path

from rich.console import Console
from rich.progress import (
    BarColumn,
    MofNCompleteColumn,
    Progress,
    TaskID,
    TextColumn,
    TimeElapsedColumn,
    TimeRemainingColumn,
)
from rich.table import Table

BARS_KEPT = 8


class Bars:
    """One progress bar for each named run, made when it is first heard of; old ones go."""

    def __init__(self, progress: Progress) -> None:
        self._progress = progress
        self._tasks: dict[str, TaskID] = {}

    def __call__(self, name: str, done: int, total: int) -> None:
        """Move a run's bar."""
        if name not in self._tasks:
            self._tasks[name] = self._progress.add_task(name, total=total)
            for task in list(self._tasks.values())[:-BARS_KEPT]:
                self._progress.update(task, visible=False)
        self._progress.update(self._tasks[name], completed=done)


def add_out(parser: argparse.ArgumentParser, default: str) -> None:
    """The option for the folder to write into."""
    parser.add_argument(
        "--out",
        type=Path,
        default=Path(default),
        metavar="DIR",
        help="where to write (default: %(default)s)",
    )


def progress_bars(console: Console) -> Progress:
    """Bars with counts and times, to use in a with statement."""
    return Progress(
        TextColumn("{task.description:>20}"),
        BarColumn(),
        MofNCompleteColumn(),
        TimeElapsedColumn(),
        TimeRemainingColumn(),
        console=console,
    )


def print_table(console: Console, rows: list[dict[str, str]]) -> None:
    """Rows with their keys above; nothing for none."""
    if not rows:
        return
    table = Table(*rows[0])
    for row in rows:
        table.add_row(*row.values())
    console.print(table)


def print_paths(console: Console, paths: Sequence[Path]) -> None:
    """Where something was written."""
    for path in paths:
        console.print(f"wrote {path}", markup=False, highlight=False, soft_wrap=True)


def input_shape(text: str) -> tuple[int, ...]:
    """The shape that an argument as 3x224x224 says."""
    sizes = text.lower().split("x")
    if not all(size.isdigit() and int(size) > 0 for size in sizes):
        raise argparse.ArgumentTypeError(f"expected a shape as in 3x224x224, got {text}")
    return tuple(map(int, sizes))
