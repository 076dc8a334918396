"""Figures and tables of the experiment, from the CSVs alone.

``python -m experiments.stable_gradients.figures`` reads plain.csv and residual.csv in --out and
writes beside them a page, stable_gradients.md, its figures as PNG and SVG, and one CSV a section
with every quantity.
"""

from __future__ import annotations

import argparse
import math
import statistics
import sys
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

from rich.console import Console

from common.networks import NETWORKS
from convspectra.figures import new_figure, plain_axes, save_figure, write_texts
from experiments.stable_gradients import table
from experiments.stable_gradients.arms import ARMS
from experiments.stable_gradients.command import FULL, OUT
from experiments.stable_gradients.page import (
    NOT_RUN,
    Group,
    geometric_mean,
    groups,
    markdown,
    summary_csv,
)
from experiments.stable_gradients.training import FINISHED, Record

SHOWN = {
    "plain": "#444444",
    "batch normalization": "#0072B2",
    "delta-orthogonal": "#56B4E9",
    "soft orthogonality": "#CC79A7",
    "OCNN": "#E69F00",
    "spectral_norm": "#999933",
    "stein": "#D55E00",
    "precondition": "#88CC88",
    "stein + precondition": "#009E73",
}
"""Arms that figures show unless told otherwise; the tables have all."""
SMALLEST = 1e-40
"""What smaller gradients are drawn at."""

Panel = Callable[[Any, Group, str, int, str, str], None]
"""What draws one panel of a figure."""


def main(argv: Sequence[str] | None = None) -> list[Path]:
    """Write the page and its figures; returns their paths."""
    parser = argparse.ArgumentParser(
        prog="python -m experiments.stable_gradients.figures", description=__doc__
    )
    parser.add_argument("--out", type=Path, default=OUT, help="folder of the CSVs")
    parser.add_argument(
        "--arms",
        nargs="+",
        choices=tuple(ARMS),
        default=list(SHOWN),
        metavar="ARM",
        help="what figures show",
    )
    args = parser.parse_args(argv)
    try:
        rows = [row for name in NETWORKS for row in table.read(args.out / f"{name}.csv")]
    except ValueError as error:
        parser.error(str(error))
    if not rows:
        parser.error(
            f"expected plain.csv or residual.csv in {args.out}, with rows: run "
            "python -m experiments.stable_gradients.plain first"
        )
    files, sections = [], []
    for group in groups(rows):
        figures = {
            "accuracy": draw_accuracy(group, args.arms),
            "ratio": draw_panels(
                group, args.arms, _ratio_panel, "training step", "gradient norm, first / last layer"
            ),
            "gradients": draw_panels(
                group,
                args.arms,
                _gradient_panel,
                "layer",
                "norm of the kernel's gradient at the end",
            ),
        }
        drawn = [
            save_figure(figure, args.out / f"{group.slug}_{name}")
            for name, figure in figures.items()
        ]
        files += [path for paths in drawn for path in paths]
        summary = f"{group.slug}_summary.csv"
        files += write_texts({summary: summary_csv(group)}, args.out)
        sections.append(markdown(group, [paths[0].name for paths in drawn], summary))
    arguments = " ".join(sys.argv[1:] if argv is None else argv)
    command = f"python -m experiments.stable_gradients.figures {arguments}".rstrip()
    text = f"# Stable gradients\n\nWritten by `{command}` from the CSVs beside it.\n\n"
    text += "\n\n".join(sections)
    files += write_texts({"stable_gradients.md": text.rstrip() + "\n"}, args.out)
    Console(stderr=True).print("wrote", ", ".join(map(str, files)))
    return files


def draw_accuracy(group: Group, arms: Sequence[str]) -> Any:
    """Accuracy by depth of the network: mean and range over seeds, a panel an activation."""
    figure = new_figure(11, 4.5)
    panels = figure.subplots(1, len(FULL.activations), sharey=True)
    for ax, activation in zip(panels, FULL.activations, strict=True):
        for arm in arms:
            points = []
            for depth in group.depths:
                finished = _finished(group.records(arm, depth, activation))
                if finished:
                    points.append((depth, [100 * r.accuracies[-1] for r in finished]))
            if points:
                depths, values = zip(*points, strict=True)
                mean = [statistics.mean(v) for v in values]
                ax.plot(depths, mean, "o-", color=_color(arm), label=arm, markersize=4)
                ax.fill_between(
                    depths,
                    list(map(min, values)),
                    list(map(max, values)),
                    color=_color(arm),
                    alpha=0.15,
                    linewidth=0,
                )
        ax.set(
            title=activation,
            xscale="log",
            xlabel="convolutions",
            xticks=group.depths,
            xticklabels=group.depths,
            xlim=(group.depths[0] / 1.1, group.depths[-1] * 1.1),
        )
        ax.minorticks_off()
        plain_axes(ax)
    panels[0].set_ylabel("test accuracy (%)")
    _legend(figure, panels)
    return figure


def draw_panels(group: Group, arms: Sequence[str], panel: Panel, x: str, y: str) -> Any:
    """A panel for each activation (down) and each depth that was run (across)."""
    depths = sorted({row.run.depth for row in group.rows})
    figure = new_figure(3.4 * len(depths) + 2, 3 * len(FULL.activations) + 0.6)
    panels = figure.subplots(len(FULL.activations), len(depths), sharey=True, squeeze=False)
    for across, activation in zip(panels, FULL.activations, strict=True):
        for ax, depth in zip(across, depths, strict=True):
            for arm in arms:
                panel(ax, group, arm, depth, activation, _color(arm))
            ax.set(title=f"{depth} layers, {activation}", yscale="log", xlabel=x)
            if not ax.lines:
                ax.set_xticks([])
                ax.text(0.5, 0.5, NOT_RUN, transform=ax.transAxes, ha="center")
            plain_axes(ax)
    figure.supylabel(y)
    _legend(figure, panels.flat)
    return figure


def _ratio_panel(ax: Any, group: Group, arm: str, depth: int, activation: str, color: str) -> None:
    finished = _finished(group.records(arm, depth, activation))
    if finished:
        values = _over_seeds([record.ratios for record in finished])
        ax.plot(finished[0].observed_at, values, "o-", color=color, label=arm, markersize=3)


def _gradient_panel(
    ax: Any, group: Group, arm: str, depth: int, activation: str, color: str
) -> None:
    finished = _finished(group.records(arm, depth, activation))
    if finished:
        values = _over_seeds([record.gradients_end for record in finished])
        ax.plot(range(1, depth + 1), values, color=color, label=arm)


def _finished(records: Sequence[Record]) -> list[Record]:
    return [record for record in records if record.status == FINISHED]


def _over_seeds(series: Sequence[Sequence[float]]) -> list[float]:
    """Geometric mean over the seeds at each point; a gap where one of them has no value."""
    return [
        math.nan if any(map(math.isnan, values)) else max(geometric_mean(values), SMALLEST)
        for values in zip(*series, strict=True)
    ]


def _color(arm: str) -> str:
    """One for each arm: the palette's, then greys by name."""
    return SHOWN.get(arm) or f"{0.2 + 0.6 * list(ARMS).index(arm) / len(ARMS):.3f}"


def _legend(figure: Any, panels: Any) -> None:
    """One for all panels: each arm that any of them shows."""
    lines: dict[str, Any] = {}
    for ax in panels:
        handles, labels = ax.get_legend_handles_labels()
        lines.update(zip(labels, handles, strict=True))
    if lines:
        figure.legend(lines.values(), lines.keys(), loc="outside right center", frameon=False)


if __name__ == "__main__":
    main()
