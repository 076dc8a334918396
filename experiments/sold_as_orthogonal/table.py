"""One row a layer, size and seed, and its CSV, Markdown and figure."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass, fields
from typing import Any

from convspectra.figures import new_figure, plain_axes
from convspectra.text import comma_separated, markdown_table

SMALLEST = 1e-18
"""Where a singular value of 0 stands on a logarithmic axis."""

CONTEXT = (
    "Each claim holds. Most are about another matrix than that of the zero-padded layer. "
    "`nn.init.orthogonal_` does not make a zero-padded convolution orthogonal. "
    "Neither does orthogonality with circular padding by itself: BCOP and AOC keep their norm of 1 "
    "and lose their lower end at the border, which the documentation of orthogonium says too. SOC "
    "at its initialization is near the identity, and loses little.",
    "",
    "Layers that multiply in the Fourier domain, such as Cayley's (Trockman and Kolter 2021, "
    '"Orthogonalizing Convolutional Layers with the Cayley Transform", arXiv:2104.07167), have no '
    "kernel that could be applied with zero padding, and are not in the table. Local Fourier "
    "analysis neglects the border: it computes the column *circular*. Gram iteration bounds the "
    "upper end of that column ([Lipschitz constants of networks](../../benchmarks/lipschitz.md)).",
)
"""What a reader should know before the tables."""


@dataclass(frozen=True)
class Row:
    """The findings about one layer; all numbers are NaN where the layer could not be made.

    Attributes
    ----------
    layer, claim : str
    channels, size, seed : int
    claimed_max, claimed_min : float
        The extreme singular values of what the claim is about; NaN where nothing is claimed.
    sigma_max, sigma_max_lower, sigma_max_upper : float
        Of the zero-padded layer, and the enclosure; the same for sigma_min.
    reshaped_max, reshaped_min : float
        Of the weight reshaped to a matrix.
    circular_max, circular_min : float
        Of the layer with circular padding at the same size.
    converged : bool
    method : str
        Of sigma_max and of sigma_min.
    seconds : float
        For both, without making the layer.
    note : str
        Why there are no numbers.
    """

    layer: str
    claim: str
    channels: int
    size: int
    seed: int
    claimed_max: float = math.nan
    claimed_min: float = math.nan
    sigma_max: float = math.nan
    sigma_max_lower: float = math.nan
    sigma_max_upper: float = math.nan
    sigma_min: float = math.nan
    sigma_min_lower: float = math.nan
    sigma_min_upper: float = math.nan
    reshaped_max: float = math.nan
    reshaped_min: float = math.nan
    circular_max: float = math.nan
    circular_min: float = math.nan
    converged: bool = False
    method: str = ""
    seconds: float = math.nan
    note: str = ""

    @property
    def condition(self) -> float:
        """sigma_max / sigma_min; inf where the enclosure of sigma_min reaches 0."""
        return self.sigma_max / self.sigma_min if self.sigma_min_lower > 0 else math.inf


def csv_text(rows: Sequence[Row]) -> str:
    """All rows, with the digits that they have."""
    return comma_separated([field.name for field in fields(Row)], [asdict(row) for row in rows])


def page(rows: Sequence[Row], machine: str, command: str) -> str:
    """The page: how it was made, and one table a size."""
    channels, seeds = rows[0].channels, len({row.seed for row in rows})
    lines = [
        "# Orthogonal layers as they are applied",
        "",
        f'Layers of {channels} -> {channels} channels, 3 x 3 (SOC: 7 x 7), stride 1, "same" zero '
        "padding, widened to float64, "
        f"{seeds} seeds. Made by `{command}` on {machine}.",
        "",
        "*As applied* are the singular values of the layer itself: the range over the seeds, and "
        "in brackets the range of their enclosures, which holds the true values of all seeds. "
        "What people look at stands beside it: *reshaped* are those of the weight as a matrix of "
        "channels by 9 channels, "
        "*circular* those of the same kernel with circular padding. *Claimed* are the smallest and "
        "the largest singular value of what the claim is about. `spectral_norm` had enough power "
        "iterations to converge; a kernel that is orthogonal with circular padding is so where it "
        "is applied with that, which this table does not do.",
        "",
        *CONTEXT,
        "",
        "![Extreme singular values](sold_as_orthogonal.png)",
        "",
        "[All rows](sold_as_orthogonal.csv), with methods and times.",
    ]
    for size in _distinct(row.size for row in rows):
        table = [_line(group) for group in _groups(rows, size)]
        lines += ["", f"## At {size} x {size}", "", markdown_table(list(table[0]), table).rstrip()]
    return "\n".join(lines) + "\n"


def draw(rows: Sequence[Row]) -> Any:
    """From the smallest to the largest singular value of each layer: as applied and otherwise."""
    sizes = _distinct(row.size for row in rows)
    figure = new_figure(4.6 * len(sizes) + 1.6, 4.4)
    panels = figure.subplots(1, len(sizes), sharex=True, sharey=True, squeeze=False)[0]
    kinds = {"reshaped": "tab:gray", "circular": "tab:blue", "sigma": "tab:red"}
    names = _distinct(row.layer for row in rows)
    for ax, size in zip(panels, sizes, strict=True):
        for group in _groups(rows, size):
            place = names.index(group[0].layer)
            for shift, (kind, color) in enumerate(kinds.items()):
                for row in group:
                    low = max(getattr(row, f"{kind}_min"), SMALLEST)
                    high = getattr(row, f"{kind}_max")
                    height = -place + 0.25 * (1 - shift)
                    ax.plot([low, high], [height] * 2, "|-", color=color, alpha=0.6, markersize=9)
        ax.axvline(1, color="black", linewidth=0.8)
        ax.set(xscale="log", title=f"{size} x {size}", xlabel="singular values, each seed")
        ax.set_yticks([-place for place in range(len(names))], names)
        plain_axes(ax)
    labels = ("reshaped weight", "circular padding", "as applied, zero padding")
    for label, color in zip(labels, kinds.values(), strict=True):
        panels[0].plot([], [], color=color, label=label)
    figure.legend(loc="outside lower center", ncols=len(kinds), frameon=False)
    return figure


def _groups(rows: Sequence[Row], size: int) -> list[list[Row]]:
    """The seeds of each layer at a size, in the order of the table."""
    here = [row for row in rows if row.size == size]
    return [[row for row in here if row.layer == name] for name in _distinct(r.layer for r in here)]


def _line(group: Sequence[Row]) -> dict[str, str]:
    def over_seeds(number: Callable[[Row], float]) -> str:
        return _range([number(row) for row in group])

    def ends(kind: str) -> str:
        largest, smallest = f"{kind}_max", f"{kind}_min"
        return f"{over_seeds(lambda r: getattr(r, smallest))} / " + over_seeds(
            lambda r: getattr(r, largest)
        )

    def enclosed(name: str) -> str:
        lower = min(getattr(row, f"{name}_lower") for row in group)
        upper = max(getattr(row, f"{name}_upper") for row in group)
        return f"{over_seeds(lambda row: getattr(row, name))} [{lower:.4g}, {upper:.4g}]"

    first = group[0]
    if first.note:
        return _cells(first, "", *[first.note] * 3, "", "")
    claimed = "" if math.isnan(first.claimed_max) else ends("claimed")
    missed = sum(not row.converged for row in group)
    condition = over_seeds(lambda row: row.condition) + (
        f", {missed} not converged" if missed else ""
    )
    return _cells(
        first, claimed, enclosed("sigma_max"), enclosed("sigma_min"), condition,
        ends("reshaped"), ends("circular"),
    )  # fmt: skip


def _cells(row: Row, *texts: str) -> dict[str, str]:
    columns = (
        "claimed, smallest / largest",
        "sigma_max as applied",
        "sigma_min as applied",
        "condition as applied",
        "reshaped, smallest / largest",
        "circular, smallest / largest",
    )
    start = {"layer": row.layer, "claim": row.claim}
    return start | dict(zip(columns, texts, strict=True))


def _range(values: Sequence[float]) -> str:
    ends = [f"{value:.3g}" for value in (min(values), max(values))]
    return ends[0] if ends[0] == ends[1] else " to ".join(ends)


def _distinct(values: Any) -> list[Any]:
    return list(dict.fromkeys(values))
