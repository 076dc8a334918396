"""A bar with the part of the work that is done and the time that is left."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager

from rich.console import Console
from rich.progress import BarColumn, Progress, TaskProgressColumn, TextColumn, TimeRemainingColumn

from convspectra.auditing._record import LayerAudit

Listener = Callable[[LayerAudit, float], None]
"""Called with every finished layer and the part of the whole work that is done by then."""


@contextmanager
def work_bar(console: Console | None = None, shown: bool = True) -> Iterator[Listener]:
    """Show a bar while the body runs: by the work, not by the number of layers.

    Parameters
    ----------
    console : rich.console.Console, optional
        Without one the bar is drawn in the terminal, or in the notebook where there is one.
    shown : bool
    """
    columns = (
        TextColumn("audit"),
        BarColumn(),
        TaskProgressColumn(),
        TimeRemainingColumn(),
        TextColumn("{task.description}"),
    )
    with Progress(*columns, console=console, disable=not shown, transient=True) as progress:
        task = progress.add_task("", total=1.0)
        yield lambda layer, part: progress.update(task, completed=part, description=layer.label)


@contextmanager
def listener(progress: Listener | bool | None) -> Iterator[Listener | None]:
    """Give the callable, a bar for True, or None."""
    if progress is True:
        with work_bar() as bar:
            yield bar
    else:
        yield progress or None
