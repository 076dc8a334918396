"""The command ``convspectra``: argument parsing and printing only."""

from __future__ import annotations

import argparse
import sys
from collections.abc import Sequence
from dataclasses import fields
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

import convspectra
from convspectra.experiments import images, reproduction, stable_gradients
from convspectra.report import reproduction as reproduction_report
from convspectra.report import stable_gradients as stable_gradients_report

BARS_KEPT = 8


class _Bars:
    """One progress bar for each named run, made when it is first heard of; old ones go."""

    def __init__(self, progress: Progress) -> None:
        self._progress = progress
        self._tasks: dict[str, TaskID] = {}

    def __call__(self, name: str, done: int, total: int) -> None:
        if name not in self._tasks:
            self._tasks[name] = self._progress.add_task(name, total=total)
            for task in list(self._tasks.values())[:-BARS_KEPT]:
                self._progress.update(task, visible=False)
        self._progress.update(self._tasks[name], completed=done)


def main(arguments: Sequence[str] | None = None) -> int:
    """Run the command; returns the exit status."""
    parsed = _parser().parse_args(arguments)
    console = Console()
    try:
        parsed.run(parsed, console)
    except (ValueError, ImportError, OSError) as error:
        Console(stderr=True).print(f"convspectra: {error}", style="red", markup=False)
        return 1
    return 0


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="convspectra", description="The numerical linear algebra of convolutional layers."
    )
    parser.add_argument("--version", action="version", version=convspectra.__version__)
    commands = parser.add_subparsers(required=True, metavar="COMMAND")
    _add_demo(commands)
    _add_reproduce(commands)
    return parser


def _add_demo(commands: argparse._SubParsersAction[argparse.ArgumentParser]) -> None:
    demo = commands.add_parser(
        "demo",
        help="train a deep plain CNN on real images with and without each penalty",
        description=stable_gradients.__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    demo.set_defaults(run=_demo)
    demo.add_argument(
        "--data",
        type=Path,
        metavar="DIR",
        help="folder with a set in the format of MNIST (default: scikit-learn's digits)",
    )
    _add_out(demo, "out/demo")
    for setting in fields(stable_gradients.Settings):
        demo.add_argument(
            f"--{setting.name.replace('_', '-')}",
            type=type(setting.default),
            default=setting.default,
            help="default: %(default)s",
        )


def _add_reproduce(commands: argparse._SubParsersAction[argparse.ArgumentParser]) -> None:
    defaults = reproduction.Settings()
    reproduce = commands.add_parser(
        "reproduce",
        help="the figures and numbers of the paper's Section 4",
        description=reproduction.__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    reproduce.set_defaults(run=_reproduce)
    _add_out(reproduce, "out/reproduce")
    for name in ("input_size", "max_iter", "further_max_iter"):
        reproduce.add_argument(
            f"--{name.replace('_', '-')}",
            type=int,
            default=getattr(defaults, name),
            help="default: %(default)s",
        )
    reproduce.add_argument(
        "--sizes",
        type=_channels,
        nargs="*",
        default=defaults.further,
        metavar="GxH",
        help="channels of further kernels (default: "
        f"{' '.join(f'{g}x{h}' for g, h in defaults.further)})",
    )


def _channels(text: str) -> tuple[int, int]:
    g, separator, h = text.partition("x")
    if not (separator and g.isdigit() and h.isdigit()):
        raise argparse.ArgumentTypeError(f"expected two numbers of channels as in 2x3, got {text}")
    return int(g), int(h)


def _add_out(parser: argparse.ArgumentParser, default: str) -> None:
    parser.add_argument(
        "--out",
        type=Path,
        default=Path(default),
        metavar="DIR",
        help="where to write (default: %(default)s)",
    )


def _demo(parsed: argparse.Namespace, console: Console) -> None:
    data = images.load_digits() if parsed.data is None else images.load_mnist_format(parsed.data)
    names = [setting.name for setting in fields(stable_gradients.Settings)]
    settings = stable_gradients.Settings(**{name: getattr(parsed, name) for name in names})
    with _progress(console) as progress:
        results = stable_gradients.compare(data, settings, _Bars(progress))
    written = stable_gradients_report.write(results, parsed.out)
    _print_table(console, stable_gradients_report.table(results))
    _print_paths(console, written)


def _reproduce(parsed: argparse.Namespace, console: Console) -> None:
    settings = reproduction.Settings(
        input_size=parsed.input_size,
        max_iter=parsed.max_iter,
        further_max_iter=parsed.further_max_iter,
        further=tuple(parsed.sizes),
    )
    with _progress(console) as progress:
        results = reproduction.run(settings, _Bars(progress))
    written = reproduction_report.write(results, parsed.out)
    _print_table(console, reproduction_report.table(results))
    _print_paths(console, written)


def _progress(console: Console) -> Progress:
    return Progress(
        TextColumn("{task.description:>20}"),
        BarColumn(),
        MofNCompleteColumn(),
        TimeElapsedColumn(),
        TimeRemainingColumn(),
        console=console,
    )


def _print_table(console: Console, rows: list[dict[str, str]]) -> None:
    table = Table(*rows[0])
    for row in rows:
        table.add_row(*row.values())
    console.print(table)


def _print_paths(console: Console, paths: Sequence[Path]) -> None:
    for path in paths:
        console.print(f"wrote {path}", markup=False, highlight=False, soft_wrap=True)


if __name__ == "__main__":
    sys.exit(main())
