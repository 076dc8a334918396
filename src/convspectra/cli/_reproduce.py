"""``convspectra reproduce``: the figures and numbers of the paper's Section 4."""

from __future__ import annotations

import argparse

from rich.console import Console

from convspectra.cli._printing import Bars, add_out, print_paths, print_table, progress_bars
from convspectra.paper import reproduction
from convspectra.paper import reproduction_figures as report

DESCRIPTION = reproduction.__doc__ or ""
"""The help's first lines."""


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """The options."""
    defaults = reproduction.Settings()
    add_out(parser, "out/reproduce")
    for name in ("input_size", "max_iter", "further_max_iter"):
        parser.add_argument(
            f"--{name.replace('_', '-')}",
            type=int,
            default=getattr(defaults, name),
            help="default: %(default)s",
        )
    parser.add_argument(
        "--sizes",
        type=_channels,
        nargs="*",
        default=defaults.further,
        metavar="GxH",
        help="channels of further kernels (default: "
        f"{' '.join(f'{g}x{h}' for g, h in defaults.further)})",
    )


def run(parsed: argparse.Namespace, console: Console) -> int:
    """Run, print and write."""
    settings = reproduction.Settings(
        input_size=parsed.input_size,
        max_iter=parsed.max_iter,
        further_max_iter=parsed.further_max_iter,
        further=tuple(parsed.sizes),
    )
    with progress_bars(console) as progress:
        results = reproduction.run(settings, Bars(progress))
    written = report.write(results, parsed.out)
    print_table(console, report.table(results))
    print_paths(console, written)
    return 0


def _channels(text: str) -> tuple[int, int]:
    g, separator, h = text.partition("x")
    if not (separator and g.isdigit() and h.isdigit()):
        raise argparse.ArgumentTypeError(f"expected two numbers of channels as in 2x3, got {text}")
    return int(g), int(h)
