"""``python -m experiments.jacobian_spectrum``: all singular values, as CSV, page and figure."""

from __future__ import annotations

import argparse
import math
import shlex
import sys
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import nn

import convspectra as cs
from common.measure import machine
from convspectra.figures import new_figure, plain_axes, save_figure, write_texts
from convspectra.text import comma_separated, markdown_table

OUT = Path("docs/experiments/jacobian_spectrum")
"""Where the page is written."""
ACTIVATIONS: dict[str, type[nn.Module]] = {"relu": nn.ReLU, "tanh": nn.Tanh}
STARTS = ("default", "He", "prepare")
"""PyTorch's initialization, He et al.'s with zero biases, and `cs.prepare` from the default."""
COLORS = {"default": "#444444", "He": "#E69F00", "prepare": "#009E73"}
"""One color a start: of the Okabe-Ito palette."""
PAGE = """# The Jacobian of a deep plain network, before and after

{depth} layers of 16 channels at 14 x 14 points, one input of standard normal numbers, seed 0: J is
the derivative of the last layer's output by the input, a {rows} x {columns} matrix. All its
singular values are computed in double precision by `cs.svds(J, k, method="dense")`, with an
enclosure each.

Gradients are stable where the values lie near 1. The stable rank is ||J||_F^2 / ||J||^2: of how
many directions of the input the output tells anything.

- command: {command}
- machine: {machine}

{table}
![Singular values](jacobian_spectrum.png)
"""
"""The page, to be filled in."""


@dataclass(frozen=True)
class Spectrum:
    """All singular values of one Jacobian, descending."""

    activation: str
    start: str
    values: tuple[float, ...]
    error: float

    @property
    def stable_rank(self) -> float:
        """||J||_F^2 / ||J||^2."""
        largest = self.values[0]
        return math.fsum((value / largest) ** 2 for value in self.values) if largest else 0.0


def network(activation: str, depth: int) -> nn.Sequential:
    """`depth` 3 x 3 convolutions of 16 channels, an activation behind each except the last."""
    torch.manual_seed(0)
    modules: list[nn.Module] = []
    for i in range(depth):
        modules.append(nn.Conv2d(16 if i else 1, 16, 3, padding=1))
        if i < depth - 1:
            modules.append(ACTIVATIONS[activation]())
    return nn.Sequential(*modules)


def he(model: nn.Module, activation: str) -> None:
    """He et al.'s initialization with zero biases, in place."""
    for module in model.modules():
        if isinstance(module, nn.Conv2d):
            nn.init.kaiming_normal_(module.weight, nonlinearity=activation)  # type: ignore[arg-type]
            nn.init.zeros_(module.bias)  # type: ignore[arg-type]


def spectrum(activation: str, start: str, depth: int) -> Spectrum:
    """All singular values of the Jacobian at one random input."""
    model = network(activation, depth)
    x = torch.randn(8, 1, 14, 14)
    if start == "He":
        he(model, activation)
    if start == "prepare":
        cs.prepare(model, x)
    jacobian = cs.JacobianOperator(model, x[:1])
    result = cs.svds(jacobian, min(jacobian.shape), method="dense", return_singular_vectors=False)
    error = float((result.upper - result.lower).max())
    return Spectrum(activation, start, tuple(result.s.tolist()), error)


def row(found: Spectrum) -> dict[str, str]:
    """The ends, the middle and the stable rank in short texts."""
    middle = found.values[len(found.values) // 2]
    return {
        "activation": found.activation,
        "start": found.start,
        "largest": f"{found.values[0]:.3g}",
        "median": f"{middle:.3g}",
        "smallest": f"{found.values[-1]:.3g}",
        "stable rank": f"{found.stable_rank:.1f}",
        "widest enclosure": f"{found.error:.1g}",
    }


def draw(spectra: Sequence[Spectrum]) -> Any:
    """Singular values in descending order, one panel an activation."""
    figure = new_figure(10.0, 3.8)
    panels = figure.subplots(1, len(ACTIVATIONS), sharey=True)
    for axes, activation in zip(panels, ACTIVATIONS, strict=True):
        for found in (one for one in spectra if one.activation == activation):
            color = COLORS[found.start]
            shown = [value or math.nan for value in found.values]
            axes.plot(range(1, len(shown) + 1), shown, color=color)
            end = len(shown), shown[-1]
            axes.annotate(found.start, end, (5, 0), textcoords="offset points", color=color,
                          va="center")  # fmt: skip
        axes.set_yscale("log")
        axes.axhline(1.0, color="#999999", linewidth=0.8, linestyle=":")
        axes.set_xlim(0, 1.25 * len(spectra[0].values))
        axes.set_xlabel("singular value, by size")
        axes.set_title(activation)
        plain_axes(axes)
    panels[0].set_ylabel("singular values of J")
    return figure


def main(
    argv: Sequence[str] | None = None, progress: Callable[[str], None] = print
) -> list[Spectrum]:
    """Parse the arguments, compute all spectra and write CSV, page and figure; returns them."""
    arguments = sys.argv[1:] if argv is None else list(argv)
    parser = argparse.ArgumentParser(
        prog="python -m experiments.jacobian_spectrum", description=__doc__
    )
    parser.add_argument("--quick", action="store_true", help="6 layers instead of 50")
    parser.add_argument("--out", type=Path, default=OUT, help="folder of the results")
    args = parser.parse_args(arguments)
    depth = 6 if args.quick else 50
    spectra = []
    for activation in ACTIVATIONS:
        for start in STARTS:
            spectra.append(spectrum(activation, start, depth))
            progress(", ".join(f"{k} {v}" for k, v in row(spectra[-1]).items()))
    rows = [row(found) for found in spectra]
    values = [
        {"activation": one.activation, "start": one.start, "rank": i, "value": value}
        for one in spectra
        for i, value in enumerate(one.values, 1)
    ]
    page = PAGE.format(
        depth=depth,
        rows=16 * 14 * 14,
        columns=14 * 14,
        command=shlex.join(["python", "-m", "experiments.jacobian_spectrum", *arguments]),
        machine=machine(),
        table=markdown_table(list(rows[0]), rows),
    )
    texts = {
        "jacobian_spectrum.csv": comma_separated(list(values[0]), values),
        "jacobian_spectrum.md": page,
    }
    write_texts(texts, args.out)
    save_figure(draw(spectra), args.out / "jacobian_spectrum")
    return spectra


if __name__ == "__main__":
    main()
