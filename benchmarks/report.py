"""Rows of a benchmark, and how they are written: rich table, Markdown, JSON, a plot."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from rich import box
from rich.console import Console
from rich.table import Table

from convspectra.figures import new_figure, plain_axes
from convspectra.text import markdown_table

OURS = "convspectra"
"""The name of this package among those of peers."""


@dataclass(frozen=True)
class Row:
    """One figure: what was measured, of which layer, by whom, and what was to be reached.

    `error` is relative to convspectra's value; `peak_bytes` is that of the whole process;
    `reached` is None where there is no target, or where it could not be judged.
    """

    layer: str
    what: str
    who: str = OURS
    value: float | None = None
    lower: float | None = None
    upper: float | None = None
    error: float | None = None
    seconds: float | None = None
    ratio: str = ""
    applications: int | None = None
    peak_bytes: int | None = None
    target: str = ""
    reached: bool | None = None
    note: str = ""

    @property
    def width(self) -> float | None:
        """Width of the enclosure relative to the value."""
        if self.value is None or self.lower is None or self.upper is None:
            return None
        width = self.upper - self.lower
        return width / self.value if self.value > 0 else width

    def cells(self) -> dict[str, str]:
        """The row as texts, by column."""
        return {
            "layer": self.layer,
            "what": self.what,
            "by": self.who,
            "value": _number(self.value, ".8g"),
            "enclosure": ""
            if self.lower is None
            else f"[{_number(self.lower, '.6g')}, {_number(self.upper, '.6g')}]",
            "width": _number(self.width, ".0e"),
            "error": _number(self.error, ".0e"),
            "time (s)": _number(self.seconds, ".3g"),
            "ratio": self.ratio,
            "applications": "" if self.applications is None else str(self.applications),
            "memory (GiB)": ""
            if self.peak_bytes is None
            else _number(self.peak_bytes / 2**30, ".2f"),
            "target": self.target,
            "reached": {True: "yes", False: "no", None: "not known" if self.target else ""}[
                self.reached
            ],
            "note": self.note,
        }


def print_rows(rows: Sequence[Row], console: Console) -> None:
    """A table without the columns that are empty throughout."""
    columns = _columns(rows)
    table = Table(*columns, box=box.SIMPLE_HEAD, padding=(0, 1, 0, 0))
    for row in rows:
        style = {False: "red", True: "green", None: ""}[row.reached]
        style = style if row.who == OURS else "dim"
        table.add_row(*(row.cells()[column] for column in columns), style=style)
    console.print(table, markup=False)


def markdown(title: str, facts: Mapping[str, object], rows: Sequence[Row]) -> str:
    """The table under its circumstances."""
    lines = "".join(f"- {name}: {fact}\n" for name, fact in facts.items())
    cells = [{name: text.replace("|", "\\|") for name, text in row.cells().items()} for row in rows]
    return f"# {title}\n\n{lines}\n{markdown_table(_columns(rows), cells)}"


def write_report(
    stem: Path, title: str, facts: Mapping[str, object], rows: Sequence[Row]
) -> list[Path]:
    """``stem.md`` and ``stem.json``, in a folder made if need be."""
    stem.parent.mkdir(parents=True, exist_ok=True)
    text, data = stem.with_suffix(".md"), stem.with_suffix(".json")
    text.write_text(markdown(title, facts, rows), encoding="utf-8")
    report = {**facts, "rows": [{**asdict(row), "width": row.width} for row in rows]}
    data.write_text(json.dumps(report, indent=1) + "\n", encoding="utf-8")
    return [text, data]


def plot(path: Path, rows: Sequence[Row], growth: Mapping[str, Mapping[str, Any]]) -> Path:
    """Left: how far each peer is from our sigma_min. Right: times as layers grow."""
    figure = new_figure(12, 4.5)
    errors, times = figure.subplots(1, 2)
    peers = [row for row in rows if row.what == "sigma_min" and row.error is not None]
    names = list(dict.fromkeys(row.who for row in peers))
    for layer in dict.fromkeys(row.layer for row in peers):
        mine = [row for row in peers if row.layer == layer]
        shown = [max(row.error or 0.0, 1e-16) for row in mine]
        errors.plot(shown, [names.index(row.who) for row in mine], "o", label=layer, alpha=0.8)
    errors.set(
        xscale="log",
        xlabel="relative difference from convspectra's sigma_min",
        yticks=range(len(names)),
        yticklabels=names,
    )
    for name, curve in growth.items():
        style = "x--" if name.startswith("dense") else "o-"
        label = f"{name}: exponent {curve['exponent']:.2f}"
        times.plot(curve["sizes"], curve["seconds"], style, label=label)
    times.set(xscale="log", yscale="log", xlabel="N or channels", ylabel="seconds for sigma_min")
    for axes in (errors, times):
        plain_axes(axes)
        if axes.get_legend_handles_labels()[0]:
            axes.legend(fontsize=7)
    path.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(path, metadata={"Date": None})
    return path


def _columns(rows: Sequence[Row]) -> list[str]:
    cells = [row.cells() for row in rows]
    return [name for name in Row("", "").cells() if any(row[name] for row in cells)]


def _number(x: float | None, style: str) -> str:
    return "" if x is None else format(x, style)
