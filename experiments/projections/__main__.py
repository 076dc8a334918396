"""``python -m experiments.projections``: random layers by every way, and the page.

All bounds are checked on the true M, with zero padding. The distance is that of weights, over the
least that any kernel within the bound can have.
"""

from __future__ import annotations

import argparse
import shlex
import sys
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor

import convspectra as cs
from common.measure import machine
from common.peers import project_circular
from convspectra.figures import write_texts

OUT = Path("docs/experiments/projections")
"""Where the page is written."""
LAYERS = ((3, 6), (8, 16))
"""Channels and points per axis of 3 x 3 layers. The first is small enough to be formed."""
PARTS = (0.9, 0.5)
"""Bounds, as parts of the norm."""
REPEATS = 20
"""Times that a way which is repeated is repeated. A choice, told on the page."""


@dataclass(frozen=True)
class Row:
    """One way on one layer."""

    channels: int
    size: int
    part: float
    way: str
    violation: float
    distance: float
    least: float
    seconds: float


def scaled(op: cs.ConvOperator, limit: float) -> Tensor:
    """The kernel divided by its norm, times the bound."""
    return op.weight * (limit / cs.sigma_max(op))


def reshaped(op: cs.ConvOperator, limit: float) -> Tensor:
    """Divided by the norm of the reshaped weight, where that is larger: torch's `spectral_norm`."""
    return op.weight * min(1.0, limit / float(torch.linalg.matrix_norm(op.weight.flatten(1), 2)))


def circular(op: cs.ConvOperator, limit: float) -> Tensor:
    """The symbols with circular padding clipped, and cropped: Sedghi et al. 2019."""
    return centered(op, op.weight, limit)


def circular_repeated(op: cs.ConvOperator, limit: float) -> Tensor:
    """The same, `REPEATS` times."""
    weight = op.weight
    for _ in range(REPEATS):
        weight = centered(op, weight, limit)
    return weight


def centered(op: cs.ConvOperator, weight: Tensor, limit: float) -> Tensor:
    """One step of that."""
    return project_circular(weight, op.geometry.input_size, limit)


def one_at_a_time(op: cs.ConvOperator, limit: float) -> Tensor:
    """The largest singular value of the true M brought to the bound, `REPEATS` times.

    A step is ``(sigma - c) A'(u v') / ||A'(u v')||^2``, with A' the taps of a matrix: the idea of
    FastClip (Boroojeny, Telgarsky and Sundaram, "Spectrum Extraction and Clipping for Implicitly
    Linear Layers", AISTATS 2024, arXiv:2402.16017), with exact singular vectors.
    """
    weight = op.weight
    for _ in range(REPEATS):
        variable = weight.clone().requires_grad_()
        largest = cs.penalties.sigma_max(op.with_weight(variable))
        excess = float(largest.detach()) - limit
        if excess <= 0:
            break
        (slope,) = torch.autograd.grad(largest, variable)
        slope = slope.double()
        weight = weight - excess / float(slope.square().sum()) * slope
    return weight


WAYS: dict[str, Callable[[cs.ConvOperator, float], Tensor]] = {
    "`cs.project`": lambda op, limit: cs.project(op, limit).weight,
    "scaled by sigma_max": scaled,
    "reshaped, as torch's `spectral_norm`": reshaped,
    "circular, cropped (Sedghi et al.)": circular,
    f"the same, {REPEATS} times": circular_repeated,
    f"{REPEATS} largest values in turn (as FastClip)": one_at_a_time,
}
"""Ways to meet a bound."""


def rows_of(channels: int, size: int, part: float) -> list[Row]:
    """Every way on one layer."""
    generator = torch.Generator().manual_seed(channels)
    weight = torch.randn(channels, channels, 3, 3, generator=generator, dtype=torch.float64)
    op = cs.ConvOperator(weight / (9 * channels) ** 0.5, (size, size), padding=1)
    limit = part * cs.sigma_max(op)
    least = cs.project(op, limit, return_report=True)[1].least_distance
    found = []
    for way, function in WAYS.items():
        start = time.process_time()
        kernel = function(op, limit)
        seconds = time.process_time() - start
        violation = cs.sigma_max(op.with_weight(kernel)) / limit - 1
        distance = float(torch.linalg.vector_norm(kernel - op.weight))
        found.append(Row(channels, size, part, way, violation, distance, least, seconds))
    return found


def page(rows: Sequence[Row], command: str) -> str:
    """The table in Markdown."""
    lines = [
        "# Projections onto a bound, by several ways",
        "",
        f"3 x 3 layers with zero padding and random weights, in float64. Made by `{command}` on "
        f"{machine()}.",
        "",
        "*Above the bound* is what the norm of the layer itself exceeds the bound by: 0 or less is "
        "what was asked for. *Distance* is that of the weights, over a lower bound for every "
        "kernel that meets the bound, so that 1 is the best there is; a way that does not meet the "
        "bound can be below 1. CPU seconds are of one thread.",
        "",
        "practical_svd_conv (Senderovich, Bulatova, Obukhov and Rakhuba, 'Towards Practical "
        "Control of Singular Values of Convolutional Layers', NeurIPS 2022, arXiv:2211.13771) "
        "clips the symbols of the core of a tensor-train layer, with circular padding; at full "
        "rank that is the line of Sedghi et al.",
        "",
        "| layer | bound / norm | way | above the bound | distance | CPU seconds |",
        "|---|---|---|---|---|---|",
    ]
    lines += [
        f"| {row.channels} channels, {row.size} x {row.size} | {row.part} | {row.way} | "
        f"{100 * row.violation:.2f}% | {row.distance / row.least:.3f} | {row.seconds:.2g} |"
        for row in rows
    ]
    return "\n".join([*lines, ""])


def main(arguments: Sequence[str] | None = None, say: Callable[[str], object] = print) -> list[Row]:
    """Every layer by every way, and the page."""
    parser = argparse.ArgumentParser(prog="python -m experiments.projections", description=__doc__)
    parser.add_argument("--out", type=Path, default=OUT, help="folder of the page")
    parser.add_argument("--quick", action="store_true", help="the smallest layer alone")
    options = parser.parse_args(arguments)
    given = sys.argv[1:] if arguments is None else arguments
    rows = []
    for channels, size in LAYERS[:1] if options.quick else LAYERS:
        for part in PARTS:
            rows += rows_of(channels, size, part)
            say(f"{channels} channels, {size} x {size}, {part}")
    command = shlex.join(["python", "-m", "experiments.projections", *given])
    write_texts({"projections.md": page(rows, command)}, options.out)
    return rows


if __name__ == "__main__":
    main()
