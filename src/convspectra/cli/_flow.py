"""``convspectra flow``: gradient flow of a network on images."""

from __future__ import annotations

import argparse
import importlib
from pathlib import Path
from typing import TYPE_CHECKING

from rich.console import Console

from convspectra.cli._outputs import check_outputs
from convspectra.cli._printing import input_shape, print_paths, print_table, say

if TYPE_CHECKING:
    from convspectra.network import GradientFlow

DESCRIPTION = """Whether signals and gradients vanish, explode or collapse, where, and what to do.

A few images go forward and back through the network that the factory returns, in training mode as
it comes: batch normalizations take the statistics of the images, dropout is off. The factory runs
code: give only one that you trust."""
"""The help's first lines."""
SICK = 1
"""Exit status with --check for a network that is not healthy, and for nothing else."""
IMAGES = 16
"""Images that are taken. A choice: of 4 or 64 digits the demo's verdicts are the same."""
OUTPUTS = {"json": "all numbers", "html": "a page", "png": "the figure"}
"""The files that can be written, with what the help says of each."""
IMPORTANCE = ("layer", "gradient", "kernel", "slope", "alignment", "normalization", "differs")
"""Columns that a narrow terminal is given to first."""


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """The options."""
    parser.add_argument(
        "--factory",
        required=True,
        metavar="PACKAGE.MODULE:FUNCTION",
        help="called without arguments, gives the module",
    )
    parser.add_argument(
        "--weights", type=Path, metavar="FILE", help="safetensors or a checkpoint to fill it with"
    )
    parser.add_argument(
        "--allow-pickle",
        action="store_true",
        help="load a pickle of more than tensors: it can run any code that its author chose",
    )
    parser.add_argument(
        "--images",
        required=True,
        metavar="FOLDER|digits",
        help="a folder with .png or .jpg files in it or below; or scikit-learn's digits, 1x8x8",
    )
    parser.add_argument(
        "--input",
        type=input_shape,
        metavar="CxHxW",
        help="what the images are made to, as in 3x224x224 (default: as they are)",
    )
    parser.add_argument(
        "--count",
        type=int,
        default=IMAGES,
        metavar="N",
        help="how many images are taken (default: %(default)s)",
    )
    parser.add_argument(
        "--eval",
        action="store_true",
        help="normalizations by their stored statistics, as a trained network is used",
    )
    parser.add_argument(
        "--check", action="store_true", help="exit with 1 unless the network is healthy"
    )
    for kind, text in OUTPUTS.items():
        parser.add_argument(f"--{kind}", type=Path, metavar="PATH", help=f"write {text}")


def run(parsed: argparse.Namespace, console: Console) -> int:
    """Measure, print and write."""
    check_outputs(
        {kind: getattr(parsed, kind) for kind in OUTPUTS}, {"the weights": parsed.weights}
    )
    if parsed.count < 2:
        raise ValueError(f"expected --count to be at least 2, got {parsed.count}")
    reading = importlib.import_module("convspectra.paper.images")
    images = reading.load_some(parsed.images, parsed.count, parsed.input)
    loading = importlib.import_module("convspectra.models.files")
    model = loading.load_module(parsed.factory, parsed.weights, parsed.allow_pickle)
    network = importlib.import_module("convspectra.network")
    flow = network.gradient_flow(model.train(not parsed.eval), images)
    print_table(
        console,
        flow.rows(),
        importance=IMPORTANCE,
        elsewhere="--json, --html or a wider terminal",
    )
    console.print()
    for sentence in flow.sentences:
        say(console, sentence)
    _write(flow, parsed, console)
    return SICK if parsed.check and flow.verdict != "healthy" else 0


def _write(flow: GradientFlow, parsed: argparse.Namespace, console: Console) -> None:
    for kind in OUTPUTS:
        path = getattr(parsed, kind)
        if path is None:
            continue
        path.parent.mkdir(parents=True, exist_ok=True)
        if kind == "png":
            flow.plot().savefig(path, format="png", dpi=110)
        else:
            getattr(flow, f"to_{kind}")(path)
        print_paths(console, [path])
