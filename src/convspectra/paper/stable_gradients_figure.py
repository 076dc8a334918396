"""Figure and table of the stable-gradients experiment, from its JSON form."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any, TypeAlias

from convspectra.figures import new_figure, plain_axes, save_figure, write_texts
from convspectra.text import comma_separated, markdown_table

Results: TypeAlias = dict[str, Any]
"""What `stable_gradients.compare` gives."""

COLORS = {
    "plain": "#444444",
    "frobenius": "#E69F00",
    "sigma_min": "#56B4E9",
    "conditioning": "#CC79A7",
    "stein": "#009E73",
    "batch normalization": "#0072B2",
}
"""Colors of the runs, told apart by the color-blind."""
COLUMNS = (
    "run",
    "gradient, first / last layer, before training",
    "gradient, first / last layer, at the end",
    "smallest singular value at the end, median over layers",
    "largest singular value at the end, median over layers",
    "test accuracy",
)
"""Columns of the table of runs."""


def table(results: Results) -> list[dict[str, str]]:
    """One row a run, with the columns of COLUMNS."""
    return [
        dict(
            zip(
                COLUMNS,
                (
                    run["name"],
                    _ratio(run["gradient_norms"][0]),
                    _ratio(run["gradient_norms"][-1]),
                    f"{_median(low for low, _ in run['extreme_singular_values']):.1e}",
                    f"{_median(high for _, high in run['extreme_singular_values']):.2g}",
                    f"{100 * run['accuracy'][-1]:.1f}%",
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
        f"{settings['depth']} layers of {settings['channels']} channels, 3 x 3, ReLU, no "
        f"normalization, no skips; {results['train_images']} training images "
        f"({results['images']}), {settings['epochs']} epochs of Adam at "
        f"{settings['learning_rate']}; penalties: {settings['penalty_steps']} steps on the penalty "
        f"alone at {settings['penalty_learning_rate']}, then weight "
        f"{settings['penalty_weight']} in the loss, every {settings['penalty_interval']} steps; "
        f"seed {settings['seed']}."
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
    """The figure: gradient norms by layer, singular values by layer, and test accuracy.

    Raises
    ------
    ImportError
        Without Matplotlib: install ``convspectra[demo]``.
    """
    figure = new_figure(11, 7.2)
    axes = figure.subplots(2, 2)
    runs = {run["name"]: run for run in results["runs"]}
    _draw_gradients(axes[0, 0], runs["plain"], "Gradient norm by layer: plain")
    _draw_gradients(axes[0, 1], runs["stein"], "Gradient norm by layer: with Stein's loss")
    low = min(ax.get_ylim()[0] for ax in axes[0])
    high = max(ax.get_ylim()[1] for ax in axes[0])
    for ax in axes[0]:
        ax.set_ylim(low, high)
    _draw_singular_values(axes[1, 0], results, runs)
    _draw_accuracy(axes[1, 1], results["runs"])
    for ax in axes.flat:
        plain_axes(ax)
    return figure


def _draw_gradients(ax: Any, run: Results, title: str) -> None:
    from matplotlib import colormaps

    colors = colormaps["viridis"].resampled(len(run["gradient_norms"]) + 1)
    for epoch, norms in enumerate(run["gradient_norms"]):
        floor = [max(norm, 1e-30) for norm in norms]
        label = "before training" if epoch == 0 else f"after epoch {epoch}"
        last = len(run["gradient_norms"]) - 1
        shown = label if epoch in (0, last // 2, last) else None
        ax.semilogy(range(1, len(norms) + 1), floor, color=colors(epoch), label=shown)
    ax.set_xlabel("layer")
    ax.set_ylabel("norm of the kernel's gradient")
    ax.set_title(title)
    ax.legend(frameon=False)


def _draw_singular_values(ax: Any, results: Results, runs: dict[str, Results]) -> None:
    shown = {
        "at the start": (results["singular_values_at_start"], "#444444"),
        "with Stein's loss, at the end": (runs["stein"]["singular_values"], COLORS["stein"]),
    }
    for offset, (label, (summaries, color)) in enumerate(shown.items()):
        layers = [layer + 1 + 0.3 * (offset - 0.5) for layer in range(len(summaries))]
        low, lower, middle, upper, high = (list(column) for column in zip(*summaries, strict=True))
        ax.vlines(layers, low, high, color=color, linewidth=1)
        ax.vlines(layers, lower, upper, color=color, linewidth=4)
        ax.plot(layers, middle, "o", color=color, markersize=3, label=label)
    ax.set_yscale("log")
    ax.set_xlabel("layer")
    ax.set_ylabel("singular values (range, quartiles, median)")
    ax.set_title("Singular values by layer")
    ax.legend(frameon=False)


def _draw_accuracy(ax: Any, runs: list[Results]) -> None:
    for run in runs:
        percent = [100 * value for value in run["accuracy"]]
        ax.plot(percent, color=COLORS[run["name"]], label=run["name"])
    ax.set_xlabel("epoch")
    ax.set_ylabel("test accuracy (%)")
    ax.set_title("Test accuracy")
    ax.legend(frameon=False)


def _ratio(norms: list[float]) -> str:
    return f"{norms[0] / norms[-1]:.1e}" if norms[-1] > 0 else "no gradient left"


def _median(values: Any) -> float:
    ordered = sorted(values)
    return float(ordered[len(ordered) // 2])
