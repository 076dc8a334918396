"""Figure and table of the stable-gradients experiment, from its JSON form."""

from __future__ import annotations

import json
import math
import statistics
from collections.abc import Sequence
from pathlib import Path
from typing import Any, TypeAlias

from convspectra.figures import new_figure, plain_axes, save_figure, write_texts
from convspectra.text import comma_separated, markdown_table

Results: TypeAlias = dict[str, Any]
"""The result of `stable_gradients.compare`."""
COLORS = {
    "default": "#444444",
    "He": "#E69F00",
    "batch normalization": "#0072B2",
    "frobenius": "#999999",
    "sigma_min": "#CC79A7",
    "conditioning": "#D55E00",
    "isometry": "#56B4E9",
    "prepare": "#009E73",
}
"""Okabe and Ito's colors, which readers with any color vision tell apart."""
DRAWN_BY_LAYER = ("default", "He", "batch normalization", "prepare")
"""The arms of the panels by layer: more lines would hide one another."""
COLUMNS = (
    "run",
    "layers",
    "test accuracy",
    "gradient, first / last layer, before training",
    "gradient, first / last layer, at the end",
    "smallest singular value at the end, median over layers",
    "largest singular value at the end, median over layers",
    "learning rate",
)
"""The columns of the table."""
FLOOR = 1e-30
"""The least gradient norm that is drawn; what vanishes altogether lies on it."""
LABEL_GAP = 6.0
"""The least distance of two labels, in percent of the axis."""


def table(results: Results) -> list[dict[str, str]]:
    """One row a run, with the columns of COLUMNS."""
    return [
        dict(
            zip(
                COLUMNS,
                (
                    run["name"],
                    str(run["depth"]),
                    f"{100 * run['accuracy'][-1]:.1f}%",
                    _ratio(run["gradient_norms"][0]),
                    _ratio(run["gradient_norms"][-1]),
                    f"{statistics.median(low for low, _ in run['extreme_singular_values']):.1e}",
                    f"{statistics.median(high for _, high in run['extreme_singular_values']):.2g}",
                    f"{run['learning_rate']:.1e}",
                ),
                strict=True,
            )
        )
        for run in results["runs"]
    ]


def markdown(results: Results) -> str:
    """The table as Markdown, with a sentence on what was trained."""
    settings = results["settings"]
    sentence = (
        f"{settings['depth']} and {settings['deep']} layers of {settings['channels']} channels, "
        f"3 x 3, ReLU, no shortcuts, no normalization except in the arm of that name; "
        f"{results['train_images']} training images ({results['images']}), {settings['steps']} "
        f"steps of Adam in batches of {settings['batch_size']}. Penalties act for "
        f"{settings['penalty_steps']} steps at the rate {settings['penalty_rate']}, the paper's at "
        f"every {settings['penalty_interval']}th of them with as many times the rate; seed "
        f"{settings['seed']}. Singular values are those that signals see: of H for mirrored "
        "kernels."
    )
    return f"{sentence}\n\n{markdown_table(COLUMNS, table(results))}"


def write(results: Results, folder: Path) -> list[Path]:
    """Write results, table and figure into a folder; returns their paths.

    Raises
    ------
    ImportError
        Without Matplotlib: install ``convspectra[demo]``. The numbers are written before.
    """
    texts = {
        "stable_gradients.json": json.dumps(results, indent=1) + "\n",
        "stable_gradients.csv": comma_separated(COLUMNS, table(results)),
        "stable_gradients.md": markdown(results),
    }
    return write_texts(texts, folder) + save_figure(draw(results), folder / "stable_gradients")


def draw(results: Results) -> Any:
    """The figure: accuracy by step at both depths, and gradient norms by layer at the greater one.

    Raises
    ------
    ImportError
        Without Matplotlib: install ``convspectra[demo]``.
    """
    figure = new_figure(11, 7.6)
    axes = figure.subplots(2, 2)
    depths = sorted({run["depth"] for run in results["runs"]})
    for ax, depth in zip(axes[0], (depths[0], depths[-1]), strict=True):
        _draw_accuracy(ax, [run for run in results["runs"] if run["depth"] == depth], depth)
    deep = [run for run in results["runs"] if run["depth"] == depths[-1]]
    chosen = [run for run in deep if run["name"] in DRAWN_BY_LAYER]
    for ax, at, when in ((axes[1, 0], 0, "before training"), (axes[1, 1], -1, "at the end")):
        _draw_gradients(ax, chosen, at, f"Gradient norm by layer, {depths[-1]} layers, {when}")
    for ax in axes.flat:
        plain_axes(ax)
    return figure


def _draw_accuracy(ax: Any, runs: Sequence[Results], depth: int) -> None:
    ends = []
    for run in runs:
        percent = [100 * value for value in run["accuracy"]]
        ax.plot(run["steps"], percent, "o-", markersize=3, color=COLORS[run["name"]])
        ends.append((percent[-1], run["name"]))
    last = runs[0]["steps"][-1]
    heights = _apart([percent for percent, _ in sorted(ends)], 100.0)
    for (_, name), height in zip(sorted(ends), heights, strict=True):
        ax.text(1.03 * last, height, name, color=COLORS[name], va="center", fontsize=9)
    ax.set_xlim(0, 1.5 * last)
    ax.set_xticks(runs[0]["steps"])
    ax.set_ylim(0, 105)
    ax.set_xlabel("step")
    ax.set_ylabel("test accuracy (%)")
    ax.set_title(f"Test accuracy, {depth} layers")


def _draw_gradients(ax: Any, runs: Sequence[Results], at: int, title: str) -> None:
    from matplotlib.ticker import MaxNLocator

    ends = []
    for run in runs:
        norms = [max(norm, FLOOR) for norm in run["gradient_norms"][at]]
        ax.semilogy(range(1, len(norms) + 1), norms, color=COLORS[run["name"]])
        ends.append((norms[0], run["name"]))
    low, high = (math.log(end) for end in ax.get_ylim())
    percents = [100 * (math.log(norm) - low) / (high - low) for norm, _ in sorted(ends)]
    for (_, name), percent in zip(sorted(ends), _apart(percents, 100.0), strict=True):
        height = math.exp(low + percent / 100 * (high - low))
        ax.text(-1, height, name, color=COLORS[name], va="center", ha="right", fontsize=9)
    layers = len(runs[0]["gradient_norms"][at])
    ax.set_xlim(-0.45 * layers, layers + 1)
    ax.xaxis.set_major_locator(MaxNLocator(integer=True, nbins=6))
    ax.set_xticks([tick for tick in ax.get_xticks() if 0 <= tick <= layers])
    ax.set_xlabel("layer")
    ax.set_ylabel("norm of the kernel's gradient")
    ax.set_title(title)


def _apart(heights: Sequence[float], highest: float) -> list[float]:
    """Heights in ascending order, moved so that none is too near the next or above the highest."""
    moved: list[float] = []
    for height in heights:
        moved.append(max(height, moved[-1] + LABEL_GAP) if moved else height)
    limit = highest
    for i in reversed(range(len(moved))):
        moved[i] = min(moved[i], limit)
        limit = moved[i] - LABEL_GAP
    return moved


def _ratio(norms: list[float]) -> str:
    return f"{norms[0] / norms[-1]:.1e}" if norms[-1] > 0 else "no gradient left"
