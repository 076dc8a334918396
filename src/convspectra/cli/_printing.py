"""Tables, bars and sentences that several commands print, and arguments that they share."""

from __future__ import annotations

import argparse
import os
import textwrap
from collections.abc import Collection, Mapping, Sequence
from pathlib import Path

from rich import box
from rich.cells import cell_len
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
from rich.text import Text

from convspectra.auditing import (
    ABSENT,
    COLUMN_IMPORTANCE,
    INCOMPLETE,
    AuditReport,
    network_facts,
    table_row,
)
from convspectra.text import plain

BARS_KEPT = 8
"""Progress bars on the screen. A choice: more push the latest ones off a small terminal."""
FINDINGS_SHOWN = 12
"""Lines of findings. A choice: each stands for a kind, and more than ten kinds are rare."""
SEPARATION = 3
"""Cells between two columns, as rich draws them; another number cuts the last column off."""
LEAST_NAME, LEAST_TEXT = 24, 14
"""Widths down to which a name is shortened and a text wrapped."""
ELLIPSIS = "\N{HORIZONTAL ELLIPSIS}"
"""The mark of what was left out."""


class PipedConsole(Console):
    """A console whose reader may leave, as that of ``convspectra audit ... | head -1`` does.

    The rest is not printed; the files are still written, and the exit status is that of the work.
    """

    def on_broken_pipe(self) -> None:
        """Print into nothing from here on."""
        self.quiet = True
        nowhere = os.open(os.devnull, os.O_WRONLY)
        os.dup2(nowhere, self.file.fileno())
        os.close(nowhere)


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


def print_report(report: AuditReport, console: Console) -> None:
    """The table, the network and what to look at first."""
    if not report.circumstances.complete:
        say(console, INCOMPLETE)
    rows = [table_row(layer) for layer in report.layers]
    print_table(
        console,
        rows,
        importance=COLUMN_IMPORTANCE,
        texts=("note",),
        elsewhere="--csv, --html or a wider terminal",
    )
    for label, text in network_facts(report.network):
        say(console, f"{label}: {text}")
    for heading, alarm in (("look at", True), ("good to know", False)):
        found = [finding for finding in report.findings if finding.alarm is alarm]
        if found:
            console.print(f"\n{heading} (for {report.circumstances.purpose})", style="bold")
        for finding in found[:FINDINGS_SHOWN]:
            advice = f"; {finding.advice}" if finding.advice else ""
            say(console, f"  {finding.kind}: {finding.line}{advice}")
        if len(found) > FINDINGS_SHOWN:
            say(console, f"  and {len(found) - FINDINGS_SHOWN} more: see the JSON or the page")


def print_table(
    console: Console,
    rows: Sequence[Mapping[str, str]],
    *,
    importance: Sequence[str] = (),
    texts: Collection[str] = (),
    elsewhere: str = "a wider terminal",
) -> None:
    """Rows with their keys above, as many columns as the console is wide enough for.

    Columns without any entry are left out. The first one is shortened at its start if need be,
    numbers never are.

    Parameters
    ----------
    console : Console
    rows : sequence of dict
        With the same keys each; nothing is printed for none.
    importance : sequence of str
        The columns that the width is given to first; the others follow in their order.
    texts : collection of str
        Columns that may be wrapped.
    elsewhere : str
        Where the columns are that do not fit.
    """
    if not rows:
        return
    cells = {key: [plain(row[key]) for row in rows] for key in rows[0]}
    columns = [key for key in cells if set(cells[key]) - {"", ABSENT}]
    order = sorted(columns, key=lambda key: [*importance, *cells].index(key))
    widths = _column_widths({key: cells[key] for key in order}, texts, console.width)
    table = Table(box=box.SIMPLE_HEAD, show_edge=False, pad_edge=False, header_style="bold")
    shown = [key for key in columns if key in widths]
    for key in shown:
        header = "\n".join(_wrapped(key, widths[key]))
        table.add_column(header, width=widths[key], no_wrap=key not in texts, overflow="fold")
    for row in zip(*(cells[key] for key in shown), strict=True):
        pairs = zip(shown, row, strict=True)
        short = (_end(text, widths[key]) if key == order[0] else text for key, text in pairs)
        table.add_row(*map(Text, short))
    console.print(table)
    if left_out := [key for key in columns if key not in widths]:
        say(console, f"not shown: {', '.join(left_out)}; {elsewhere} has them")


def _column_widths(
    cells: Mapping[str, Sequence[str]], texts: Collection[str], whole: int
) -> dict[str, int]:
    """Widths of the columns that fit, the first ones first; what is left goes to those cut short.

    The first column and wrapped texts may be narrower than what stands in them.
    """
    first = next(iter(cells), "")
    natural, widths, left = {}, {}, whole + SEPARATION
    for key, entries in cells.items():
        heading = max(map(cell_len, key.split()))
        natural[key] = max(heading, *map(cell_len, entries))
        least = LEAST_NAME if key == first else LEAST_TEXT if key in texts else natural[key]
        width = max(heading, min(natural[key], least))
        if key == first or width + SEPARATION <= left:
            widths[key] = width
            left -= width + SEPARATION
    for key in widths:
        extra = max(0, min(natural[key] - widths[key], left))
        widths[key] += extra
        left -= extra
    return widths


def _wrapped(heading: str, width: int) -> list[str]:
    return textwrap.wrap(heading, width, break_long_words=False, break_on_hyphens=False)


def _end(text: str, width: int) -> str:
    """The end of a text that is too long, where names differ most."""
    if cell_len(text) <= width:
        return text
    kept: list[str] = []
    left = width - cell_len(ELLIPSIS)
    for character in reversed(text):
        left -= cell_len(character)
        if left < 0:
            break
        kept.append(character)
    return ELLIPSIS + "".join(reversed(kept))


def print_paths(console: Console, paths: Sequence[Path]) -> None:
    """Where something was written."""
    for path in paths:
        say(console, f"wrote {path}", soft_wrap=True)


def say(console: Console, text: str, soft_wrap: bool = False) -> None:
    """Print a text as it is: no markup, no emoji, what cannot be printed escaped."""
    console.print(plain(text), markup=False, highlight=False, emoji=False, soft_wrap=soft_wrap)


def input_shape(text: str) -> tuple[int, ...]:
    """The shape that an argument as 3x224x224 says."""
    sizes = text.lower().split("x")
    if not all(size.isdigit() and int(size) > 0 for size in sizes):
        raise argparse.ArgumentTypeError(f"expected a shape as in 3x224x224, got {text}")
    return tuple(map(int, sizes))
