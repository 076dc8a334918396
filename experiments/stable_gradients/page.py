"""The tables of a page, from rows: mean and range over seeds; what was not run says so."""

from __future__ import annotations

import math
import statistics
from collections.abc import Callable, Iterable, Sequence
from dataclasses import asdict, dataclass

from convspectra.text import comma_separated, markdown_table
from experiments.stable_gradients.arms import arms_for
from experiments.stable_gradients.command import FULL
from experiments.stable_gradients.table import Row
from experiments.stable_gradients.training import FINISHED, Record

NOT_RUN = "not run"
"""The text of a cell without any run."""
TITLES = {
    "plain": "Plain networks",
    "residual": "Residual networks with batch normalization",
}
"""Titles of the two kinds of networks."""


@dataclass(frozen=True)
class Group:
    """Rows that may be compared: of one kind of network, one set of images, the same settings."""

    slug: str
    rows: tuple[Row, ...]

    @property
    def network(self) -> str:
        """Which kind."""
        return self.rows[0].run.network

    @property
    def depths(self) -> list[int]:
        """The depths of the full table, and any others there are."""
        return sorted({*FULL.depths, *(row.run.depth for row in self.rows)})

    def records(self, arm: str, depth: int, activation: str) -> list[Record]:
        """One a seed."""
        asked = (arm, depth, activation)
        return [
            row.record
            for row in self.rows
            if (row.run.arm, row.run.depth, row.run.activation) == asked
        ]


def groups(rows: Sequence[Row]) -> list[Group]:
    """Rows by what may be compared, in the order in which they came; of a run twice, the last."""
    parts: dict[object, list[Row]] = {}
    for row in {row.key: row for row in rows}.values():
        parts.setdefault((row.run.network, row.images, row.settings), []).append(row)
    found: list[Group] = []
    for part in parts.values():
        stem = f"{part[0].run.network}_{part[0].images.split(',')[0]}"
        slug = "".join(c if c.isalnum() or c in "_-" else "-" for c in stem)
        twins = sum(group.slug.startswith(slug) for group in found)
        found.append(Group(f"{slug}-{twins + 1}" if twins else slug, tuple(part)))
    return found


def markdown(group: Group, pictures: Sequence[str], summary: str) -> str:
    """A section: circumstances, figures, accuracies, and `summary`, the file of all the rest."""
    first = group.rows[0]
    settings = ", ".join(f"{name} {value}" for name, value in asdict(first.settings).items())
    lines = [f"## {TITLES[group.network]}, {first.images}", ""]
    lines += [f"- machine: {machine}" for machine in _distinct(row.machine for row in group.rows)]
    lines += [f"- command: `{text}`" for text in _distinct(row.command for row in group.rows)]
    lines += [f"- settings: {settings}", f"- runs: {len(group.rows)}", ""]
    lines += [f"![{name}]({name})" for name in pictures]
    lines += ["", f"Every quantity with its range over the seeds: [{summary}]({summary})."]
    for activation in FULL.activations:
        title = f"Test accuracy at the end, mean over the seeds: {activation}"
        columns = ["arm", *(f"{depth} layers" for depth in group.depths)]
        rows = [
            dict(zip(columns, [arm, *cells], strict=True))
            for arm in arms_for(group.network)
            for cells in [_cells(group, arm, activation, _mean_accuracy)]
        ]
        lines += ["", f"### {title}", "", markdown_table(columns, rows)]
    return "\n".join(lines)


def summary_csv(group: Group) -> str:
    """All quantities of a group as CSV: one line an activation, arm and quantity."""
    columns = ["activation", "arm", "quantity", *(f"{depth} layers" for depth in group.depths)]
    rows = [
        dict(zip(columns, [activation, arm, title, *cells], strict=True))
        for activation in FULL.activations
        for title, cell in QUANTITIES.items()
        for arm in arms_for(group.network)
        for cells in [_cells(group, arm, activation, cell)]
    ]
    return comma_separated(columns, rows)


def _cells(
    group: Group, arm: str, activation: str, cell: Callable[[Sequence[Record]], str]
) -> list[str]:
    return [_cell(group.records(arm, depth, activation), cell) for depth in group.depths]


def _cell(records: Sequence[Record], cell: Callable[[Sequence[Record]], str]) -> str:
    """The quantity over the runs that finished, and how many there are where it is not all."""
    if not records:
        return NOT_RUN
    finished = [record for record in records if record.status == FINISHED]
    ends = _distinct(record.status for record in records if record.status != FINISHED)
    counts = [f"{sum(r.status == end for r in records)} {end}" for end in ends]
    if len(records) < len(FULL.seeds):
        counts.append(f"{len(records)} of {len(FULL.seeds)} seeds")
    return ", ".join(([cell(finished)] if finished else []) + counts)


def _accuracy(records: Sequence[Record]) -> str:
    values = [100 * record.accuracies[-1] for record in records]
    return f"{statistics.mean(values):.1f}%" + _range(values, ".1f")


def _mean_accuracy(records: Sequence[Record]) -> str:
    return f"{statistics.mean(100 * record.accuracies[-1] for record in records):.1f}%"


def _ratio_at_end(records: Sequence[Record]) -> str:
    return _geometric([record.ratios[-1] for record in records], "no gradient left")


def _ratio_at_start(records: Sequence[Record]) -> str:
    return _geometric([record.ratios[0] for record in records], "no gradient")


def _largest(records: Sequence[Record]) -> str:
    return _geometric([max(_known(record.sigma_max)) for record in records], "not converged")


def _smallest(records: Sequence[Record]) -> str:
    medians = [statistics.median(_known(record.sigma_min)) for record in records]
    return _geometric(medians, "not converged")


def _seconds(records: Sequence[Record]) -> str:
    values = [record.seconds for record in records]
    return f"{statistics.mean(values):.1f} s" + _range(values, ".1f")


QUANTITIES: dict[str, Callable[[Sequence[Record]], str]] = {
    "Test accuracy at the end": _accuracy,
    "Gradient norm, first over last layer, before training": _ratio_at_start,
    "Gradient norm, first over last layer, at the end": _ratio_at_end,
    "Largest singular value of all layers at the end": _largest,
    "Smallest singular value at the end, median over layers": _smallest,
    "Time of training": _seconds,
}
"""Quantities of the summary, with what gives their text."""


def geometric_mean(values: Sequence[float]) -> float:
    """The geometric mean of values that are not negative; 0 if one of them is."""
    if min(values) == 0:
        return 0.0
    return math.exp(statistics.mean(math.log(value) for value in values))


def _geometric(values: Sequence[float], none: str) -> str:
    known = [value for value in values if not math.isnan(value)]
    if not known:
        return none
    return f"{geometric_mean(known):.1e}" + _range(known, ".1e")


def _range(values: Sequence[float], style: str) -> str:
    """Nothing for one value, which is its own range."""
    return f" ({min(values):{style}} to {max(values):{style}})" if len(values) > 1 else ""


def _known(values: Sequence[float]) -> list[float]:
    """The values of runs that converged; nan alone if none did."""
    return [value for value in values if not math.isnan(value)] or [math.nan]


def _distinct(texts: Iterable[str]) -> list[str]:
    return list(dict.fromkeys(texts))
