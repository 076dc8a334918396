"""Test accuracy by epoch: one panel a depth, one line an arm with its name at the end."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

from convspectra.figures import new_figure, plain_axes, save_figure

COLORS = {
    "PyTorch": "#444444",
    "He": "#E69F00",
    "batch normalization": "#0072B2",
    "residual": "#999999",
    "ISONet": "#CC79A7",
    "isometry": "#56B4E9",
    "prepare": "#009E73",
    "prepare, then isometry": "#004D40",
    "prepare, then conditioning": "#D55E00",
}
GAP = 5.0
"""Points of accuracy between two names, at least: their height."""


def draw(rows: Sequence[dict[str, str]], stem: Path) -> list[Path]:
    """Write the figure as PNG and SVG; returns the paths."""
    depths = sorted({int(row["depth"]) for row in rows})
    last = max(int(row["epoch"]) for row in rows)
    figure = new_figure(4.2 * len(depths), 3.8)
    axes = figure.subplots(1, len(depths), sharey=True, squeeze=False)[0]
    for ax, depth in zip(axes, depths, strict=True):
        ends: list[tuple[float, int, str]] = []
        for arm, color in COLORS.items():
            found = [r for r in rows if r["arm"] == arm and int(r["depth"]) == depth]
            epochs = sorted({int(row["epoch"]) for row in found})
            if not epochs:
                continue
            means = []
            for epoch in epochs:
                values = [float(r["accuracy"]) for r in found if int(r["epoch"]) == epoch]
                means.append(100 * sum(values) / len(values))
            ax.plot(epochs, means, "o-", color=color, markersize=3)
            ends.append((means[-1], epochs[-1], arm))
        lowest: dict[int, float] = {}  # names at the ends of lines of one length may overlap
        for y, x, arm in sorted(ends):
            height = lowest[x] = max(y, lowest.get(x, -100.0) + GAP)
            ax.annotate(
                arm, (x, y), xytext=(x + 0.2, height), color=COLORS[arm], va="center", fontsize=8
            )
        ax.set_xlim(0.5, last * 1.7)
        ax.set_xticks(range(1, last + 1))
        ax.set_ylim(0, 100)
        ax.set_xlabel("epoch")
        ax.set_title(f"{depth} layers")
        plain_axes(ax)
    axes[0].set_ylabel("test accuracy (%)")
    return save_figure(figure, stem)
