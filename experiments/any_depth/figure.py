"""Test accuracy by depth, one panel an activation, one line an arm with its name at the end."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from convspectra.figures import new_figure, plain_axes, save_figure

COLORS = {
    "default": "#444444",
    "He": "#E69F00",
    "delta-orthogonal": "#CC79A7",
    "batch normalization": "#0072B2",
    "isometry": "#56B4E9",
    "prepare": "#009E73",
}


def draw(table: Sequence[Mapping[str, Any]], stem: Path) -> list[Path]:
    """Write the figure as PNG and SVG; returns the paths."""
    activations = sorted({row["activation"] for row in table})
    figure = new_figure(5.5 * len(activations), 3.8)
    axes = figure.subplots(1, len(activations), sharey=True, squeeze=False)[0]
    depths = sorted({row["depth"] for row in table})
    for ax, activation in zip(axes, activations, strict=True):
        ends: list[tuple[float, float, str]] = []
        for arm, color in COLORS.items():
            rows = [r for r in table if r["arm"] == arm and r["activation"] == activation]
            if not rows:
                continue
            points = sorted((r["depth"], float(r["test accuracy"].rstrip("%"))) for r in rows)
            xs, ys = zip(*points, strict=True)
            ax.plot(xs, ys, "o-", color=color, markersize=4)
            ends.append((ys[-1], xs[-1], arm))
        _label(ax, ends)
        ax.set_xscale("log")
        ax.set_xticks(depths, [str(depth) for depth in depths])
        ax.minorticks_off()
        ax.set_xlim(depths[0] * 0.9, depths[-1] * (depths[-1] / depths[0]) ** 0.45 * 1.1)
        ax.axhline(10, color="#999999", linewidth=0.8, linestyle=":")
        ax.set_ylim(0, 100)
        ax.set_xlabel("layers")
        ax.set_title(activation)
        plain_axes(ax)
    axes[0].set_ylabel("test accuracy (%)")
    return save_figure(figure, stem)


def _label(ax: Any, ends: Sequence[tuple[float, float, str]]) -> None:
    """The name of each line beside its last point, moved apart where two would overlap."""
    lowest: dict[float, float] = {}  # names at the ends of lines of one length may overlap
    for y, x, arm in sorted(ends):
        height = lowest[x] = max(y, lowest.get(x, -100.0) + 6)
        ax.annotate(
            arm, (x, y), xytext=(x * 1.06, height), color=COLORS[arm], va="center", fontsize=8
        )
