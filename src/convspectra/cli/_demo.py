"""``convspectra demo``: deep plain CNNs on real images, from several starts."""

from __future__ import annotations

import argparse
from dataclasses import fields
from pathlib import Path

from rich.console import Console

from convspectra.cli._printing import Bars, add_out, print_paths, print_table, progress_bars
from convspectra.paper import images, stable_gradients
from convspectra.paper import stable_gradients_figure as report

DESCRIPTION = stable_gradients.__doc__ or ""
"""The help's first lines."""


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """The options."""
    parser.add_argument(
        "--data",
        type=Path,
        metavar="DIR",
        help="folder with a set in the format of MNIST (default: scikit-learn's digits)",
    )
    add_out(parser, "out/demo")
    for setting in fields(stable_gradients.Settings):
        parser.add_argument(
            f"--{setting.name.replace('_', '-')}",
            type=type(setting.default),
            default=setting.default,
            help="default: %(default)s",
        )


def run(parsed: argparse.Namespace, console: Console) -> int:
    """Train, print and write."""
    data = images.load_digits() if parsed.data is None else images.load_mnist_format(parsed.data)
    names = [setting.name for setting in fields(stable_gradients.Settings)]
    settings = stable_gradients.Settings(**{name: getattr(parsed, name) for name in names})
    with progress_bars(console) as progress:
        results = stable_gradients.compare(data, settings, Bars(progress))
    written = report.write(results, parsed.out)
    print_table(console, report.table(results))
    print_paths(console, written)
    return 0
