"""Figures 4.1 to 4.3 of the paper, the numbers behind them and a summary, from plain results."""

from __future__ import annotations

import itertools
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any, TypeAlias

from convspectra.figures import new_figure, plain_axes, save_figure, write_texts
from convspectra.text import comma_separated, markdown_table

Results: TypeAlias = dict[str, Any]
"""The results of `reproduction.run`."""
Run: TypeAlias = dict[str, Any]
"""One descent in it."""

BLUE, VERMILION, GRAY = "#0072B2", "#D55E00", "#444444"
"""Colors that the color-blind tell apart."""
SIZE_COLORS = ("#0072B2", "#E69F00", "#009E73", "#CC79A7", "#56B4E9", "#D55E00", "#000000")
"""Colors of the further sizes, told apart by the color-blind."""
SIGMA_MAX, SIGMA_MIN = r"$\sigma_{\max}(M)$", r"$\sigma_{\min}(M)$"
"""Labels of the axes."""
STYLES: dict[str, Any] = {"paper": "-", "auto": "--"}
"""Lines of the step rules."""
LABELS = {"paper": "the paper's step", "auto": "tuned step"}
"""Names of the step rules in legends."""

HISTORY_COLUMNS = (
    "algorithm", "kernel", "step_rule", "iteration", "sigma_max", "sigma_min", "objective", "gap",
    "step",
)  # fmt: skip
"""Columns of the file with every iteration."""
SUMMARY_COLUMNS = (
    "algorithm", "kernel", "floor", "paper_step", "paper_status", "paper_iterations", "paper_best",
    "tuned_status", "tuned_iterations", "tuned_best", "tuned_iterations_to_paper_best",
    "iterations_saved",
)  # fmt: skip
"""Columns of the file with one line a run."""
TABLE_COLUMNS = ("alg.", "kernel", "steps", "paper's best", "tuned best", "reached at", "saved")
"""Columns of the table in the terminal."""


def write(results: Results, folder: Path) -> list[Path]:
    """Write the history, the summary and the figures into a folder; returns their paths.

    Raises
    ------
    ImportError
        Without Matplotlib: install ``convspectra[demo]``. The numbers are written before.
    """
    texts = {
        "history.csv": history(results),
        "summary.csv": comma_separated(SUMMARY_COLUMNS, summary(results)),
        "summary.md": markdown(results),
    }
    return write_texts(texts, folder) + draw(results, folder)


def history(results: Results) -> str:
    """Every iterate of every run as CSV in long form, with the columns of HISTORY_COLUMNS.

    ``gap`` is the distance to the floor of Algorithm 3.3, and ``step`` the step taken from this
    iterate; both are empty where there is none.
    """
    return comma_separated(
        HISTORY_COLUMNS,
        (
            {
                **{name: run[name] for name in HISTORY_COLUMNS[:3]},
                "iteration": i,
                **{name: run[name][i] for name in ("sigma_max", "sigma_min", "objective")},
                "gap": "" if run["gap"] is None else run["gap"][i],
                "step": run["step"][i] if i < run["iterations"] else "",
            }
            for run in results["runs"]
            for i in range(run["iterations"] + 1)
        ),
    )


def summary(results: Results) -> list[dict[str, Any]]:
    """One row for each algorithm and kernel, with the columns of SUMMARY_COLUMNS.

    The best objective of the paper's step is that of all its iterations; what is saved counts from
    the iteration at which that step reached it. None where there is no floor, or where the tuned
    step did not get so far.
    """
    runs = {(run["algorithm"], run["kernel"], run["step_rule"]): run for run in results["runs"]}
    rows = []
    for (algorithm, kernel, rule), paper in runs.items():
        if rule != "paper":
            continue
        tuned = runs[algorithm, kernel, "auto"]
        best = min(paper["objective"])
        needed = next((i for i, value in enumerate(tuned["objective"]) if value <= best), None)
        values = (
            algorithm,
            kernel,
            paper["floor"],
            paper["paper_step"],
            paper["status"],
            paper["iterations"],
            best,
            tuned["status"],
            tuned["iterations"],
            min(tuned["objective"]),
            needed,
            None if needed is None else paper["objective"].index(best) - needed,
        )
        rows.append(dict(zip(SUMMARY_COLUMNS, values, strict=True)))
    return rows


def table(results: Results) -> list[dict[str, str]]:
    """The summary to be read, with the columns of TABLE_COLUMNS."""
    rows = []
    for row in summary(results):
        needed = row["tuned_iterations_to_paper_best"]
        values = (
            row["algorithm"],
            row["kernel"].replace(" ", ""),
            str(row["paper_iterations"]),
            f"{row['paper_best']:.4g}",
            f"{row['tuned_best']:.4g}",
            "never" if needed is None else str(needed),
            "none" if needed is None else str(row["iterations_saved"]),
        )
        rows.append(dict(zip(TABLE_COLUMNS, values, strict=True)))
    return rows


def markdown(results: Results) -> str:
    """The summary as Markdown, with a sentence on what was run."""
    size = results["settings"]["input_size"]
    sentence = (
        f"Kernels from MATLAB's `rand('state',1); rand(3,3,g,h)`, inputs of {size} x {size}. "
        "Objectives: 3.1 `1/2 ||M||_F^2`, 3.2 `-sigma_min(M)`, 3.3 `1/2 ||M||_F^2 - n sigma_min(M)`"
        ". The lowest one in so many steps of the paper's size, and in as many tuned ones; the "
        "tuned step at which the paper's best was reached; and the steps that saves."
    )
    return f"{sentence}\n\n{markdown_table(TABLE_COLUMNS, table(results))}"


def draw(results: Results, folder: Path) -> list[Path]:
    """Draw Figures 4.1, 4.2 and 4.3 and one of the further sizes, as PNG and SVG.

    Raises
    ------
    ImportError
        Without Matplotlib: install ``convspectra[demo]``.
    """
    paper = [run for run in results["runs"] if run["in_paper"]]
    further = [run for run in results["runs"] if not run["in_paper"]]
    figures: dict[str, Any] = {}
    figures["figure_4_1"] = figure = new_figure(9, 3.8)
    _draw_4_1(figure, _of("3.1", paper))
    figures["figure_4_2"] = figure = new_figure(9, 5.8)
    _draw_4_2(figure, _of("3.2", paper))
    figures["figure_4_3"] = figure = new_figure(9, 3.8)
    _draw_4_3(figure, _of("3.3", paper))
    if further:
        figures["further_sizes"] = figure = new_figure(11, 4)
        _draw_further(figure, further)
    return [path for name, figure in figures.items() for path in save_figure(figure, folder / name)]


def _draw_4_1(figure: Any, kernels: Mapping[str, list[Run]]) -> None:
    figure.suptitle(r"Figure 4.1: Algorithm 3.1 on $\frac{1}{2}||M||_F^2$")
    # Both fall at one rate: without headroom on the right one curve would hide the other.
    _draw_two_sides(figure, kernels, headroom=1.5)


def _draw_4_2(figure: Any, kernels: Mapping[str, list[Run]]) -> None:
    figure.suptitle(r"Figure 4.2: Algorithm 3.2 on $-\sigma_{\min}(M)$")
    upper, lower = _panels(figure, 2, kernels)
    for axes, (kernel, runs) in zip(upper, kernels.items(), strict=True):
        _curves(axes, [run for run in runs if run["step_rule"] == "paper"], "sigma_min", VERMILION)
        axes.set(title=f"{_times(kernel)}: the paper's step", xlabel="iteration", ylabel=SIGMA_MIN)
    for axes, (kernel, runs) in zip(lower, kernels.items(), strict=True):
        _curves(axes, runs, "sigma_min", VERMILION)
        axes.set(
            title=f"{_times(kernel)}: both", xlabel="iteration", ylabel=SIGMA_MIN, yscale="log"
        )
    _rule_legend(figure)


def _draw_4_3(figure: Any, kernels: Mapping[str, list[Run]]) -> None:
    figure.suptitle(r"Figure 4.3: Algorithm 3.3 on $\frac{1}{2}||M||_F^2 - n\,\sigma_{\min}(M)$")
    _draw_two_sides(figure, kernels, headroom=1.05)


def _draw_two_sides(figure: Any, kernels: Mapping[str, list[Run]], headroom: float) -> None:
    """sigma_max on the left axis, sigma_min on the right one, for each kernel."""
    for axes, (kernel, runs) in zip(_panels(figure, 1, kernels)[0], kernels.items(), strict=True):
        right = axes.twinx()
        right.spines[["top", "left"]].set_visible(False)
        for side, name, label, color in (
            (axes, "sigma_max", SIGMA_MAX, BLUE),
            (right, "sigma_min", SIGMA_MIN, VERMILION),
        ):
            _curves(side, runs, name, color)
            side.set_ylabel(label, color=color)
            side.tick_params(axis="y", colors=color)
        axes.set(title=_times(kernel), xlabel="iteration")
        axes.set_ylim(0, None)
        right.set_ylim(0, headroom * max(max(run["sigma_min"]) for run in runs))
    _rule_legend(figure)


def _draw_further(figure: Any, runs: list[Run]) -> None:
    figure.suptitle("Other numbers of channels, square layers among them")
    names = list(dict.fromkeys(run["kernel"] for run in runs))
    colors = {name: SIZE_COLORS[i % len(SIZE_COLORS)] for i, name in enumerate(names)}
    all_axes = figure.subplots(1, 3)
    for axes, algorithm, column, label in zip(
        all_axes,
        ("3.1", "3.2", "3.3"),
        ("sigma_max", "sigma_min", "gap"),
        (SIGMA_MAX, SIGMA_MIN, "smallest gap so far, in parts of $n/2$"),
        strict=True,
    ):
        for kernel, pair in _of(algorithm, runs).items():
            for run in pair:
                values = run[column]
                if column == "gap":
                    values = [value / -run["floor"] for value in itertools.accumulate(values, min)]
                style = STYLES[run["step_rule"]]
                axes.plot(values, style, color=colors[kernel], linewidth=1.5)
        axes.set(title=f"Algorithm {algorithm}", xlabel="iteration", ylabel=label, yscale="log")
        plain_axes(axes)
    # Algorithm 3.1 goes on to zero with the tuned step; what matters is above.
    top = max(max(run["sigma_max"]) for run in runs if run["algorithm"] == "3.1")
    all_axes[0].set_ylim(1e-3 * top, 2 * top)
    for kernel in names:
        all_axes[0].plot([], [], color=colors[kernel], label=_times(kernel))
    _rule_legend(figure)
    all_axes[0].legend(frameon=False, fontsize="small")


def _panels(figure: Any, rows: int, kernels: Mapping[str, list[Run]]) -> Any:
    panels = figure.subplots(rows, len(kernels), squeeze=False)
    for axes in panels.flat:
        plain_axes(axes)
    return panels


def _curves(axes: Any, runs: Iterable[Run], column: str, color: str) -> None:
    for run in runs:
        axes.plot(run[column], STYLES[run["step_rule"]], color=color, linewidth=1.8)
    axes.margins(x=0.01)


def _times(kernel: str) -> str:
    return kernel.replace("x", "\N{MULTIPLICATION SIGN}")


def _rule_legend(figure: Any) -> None:
    """Solid and dashed, once for all panels, below them."""
    from matplotlib.lines import Line2D

    handles = [
        Line2D([], [], linestyle=STYLES[rule], color=GRAY, label=LABELS[rule]) for rule in STYLES
    ]
    figure.legend(handles=handles, loc="outside lower center", ncols=len(handles), frameon=False)


def _of(algorithm: str, runs: Iterable[Run]) -> dict[str, list[Run]]:
    """The runs of an algorithm by kernel."""
    chosen: dict[str, list[Run]] = {}
    for run in runs:
        if run["algorithm"] == algorithm:
            chosen.setdefault(run["kernel"], []).append(run)
    return chosen
