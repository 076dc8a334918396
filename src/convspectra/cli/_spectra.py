"""``convspectra spectra``: one layer, given by its sizes."""

from __future__ import annotations

import argparse
import importlib
from pathlib import Path
from typing import Any

from rich.console import Console

from convspectra.auditing import circular_line, fact_rows
from convspectra.cli._audit import max_bytes, write
from convspectra.cli._outputs import check_outputs
from convspectra.cli._printing import input_shape, print_table, say
from convspectra.text import sizes

DESCRIPTION = """The extreme singular values of one layer as it is applied, padding counted.

Each comes with the interval that holds it, and beside what circular padding would give. The weight
is random, as PyTorch initializes a layer, or is read from a file."""
"""The help's first lines."""
OUTPUTS = {"json": "the numbers, for convspectra show", "html": "a page"}
"""The files that can be written, with what the help says of each."""


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """The options."""
    weight = parser.add_mutually_exclusive_group(required=True)
    weight.add_argument(
        "--kernel",
        type=input_shape,
        metavar="OUTxINxHxW",
        help="shape of a random weight, as in 64x64x3x3: as PyTorch has it, so that IN counts the "
        "channels of one group, and IN comes first with --transposed",
    )
    weight.add_argument("--weight", type=Path, metavar="FILE.npy", help="a weight of this shape")
    parser.add_argument(
        "--input",
        type=input_shape,
        default=(),
        metavar="HxW",
        help="spatial size of the input, as in 32x32; nothing for a linear layer",
    )
    for name in ("stride", "dilation", "groups"):
        parser.add_argument(f"--{name}", type=int, default=1, metavar="N", help="default: 1")
    parser.add_argument(
        "--padding",
        type=int,
        metavar="N",
        help='points before and after each axis (default: half of the kernel, as in "same")',
    )
    parser.add_argument(
        "--padding-mode",
        choices=("zeros", "circular", "reflect", "replicate"),
        default="zeros",
        help="default: %(default)s",
    )
    parser.add_argument("--transposed", action="store_true", help="a transposed convolution")
    parser.add_argument(
        "--seed", type=int, default=0, help="of the random weight (default: %(default)s)"
    )
    parser.add_argument(
        "--max-gib", type=float, default=4.0, metavar="GIB", help="limit on a matrix (default: 4)"
    )
    for kind, text in OUTPUTS.items():
        parser.add_argument(f"--{kind}", type=Path, metavar="PATH", help=f"write {text}")
    parser.set_defaults(csv=None)


def run(parsed: argparse.Namespace, console: Console) -> int:
    """Compute, print and write."""
    limit = max_bytes(parsed.max_gib)
    check_outputs({kind: getattr(parsed, kind) for kind in OUTPUTS}, {"the weight": parsed.weight})
    operator = _operator(parsed)
    auditing = importlib.import_module("convspectra.auditing")
    models = importlib.import_module("convspectra.models")
    kind = f"Conv{'Transpose' if parsed.transposed else ''}{len(parsed.input)}d"
    layer = models.NamedOperator("layer", kind if parsed.input else "Linear", operator)
    report = auditing.audit_operators(
        [layer],
        "one layer",
        sizes(layer.operator.input_shape),
        options=auditing.AuditOptions(max_bytes=limit),
    )
    if not report.layers:
        raise KeyboardInterrupt
    say(console, f"M is {sizes(operator.shape)}")
    print_table(console, fact_rows(report.layers[0]))
    if circular := circular_line(report.layers[0]):
        say(console, circular)
    write(report, parsed, console)
    return 0


def _operator(parsed: argparse.Namespace) -> Any:
    """The layer that the options describe."""
    weight = _weight(parsed)
    padding = parsed.padding
    if padding is None:
        padding = [parsed.dilation * (size - 1) // 2 for size in weight.shape[2:]]
    cs = importlib.import_module("convspectra")
    return cs.ConvOperator(
        weight,
        parsed.input,
        stride=parsed.stride,
        padding=padding,
        dilation=parsed.dilation,
        groups=parsed.groups,
        padding_mode=parsed.padding_mode,
        transposed=parsed.transposed,
    )


def _weight(parsed: argparse.Namespace) -> Any:
    """The weight from the file, or one as PyTorch initializes a layer."""
    torch = importlib.import_module("torch")
    if parsed.weight is not None:
        numpy = importlib.import_module("numpy")
        return torch.from_numpy(numpy.load(parsed.weight, allow_pickle=False))
    if len(parsed.kernel) < 2:
        raise ValueError(f"expected --kernel as in 64x64x3x3, got {sizes(parsed.kernel)}")
    weight = torch.empty(parsed.kernel, dtype=torch.float32, device="cpu")
    generator = torch.Generator().manual_seed(parsed.seed)
    return torch.nn.init.kaiming_uniform_(weight, 5**0.5, generator=generator)
