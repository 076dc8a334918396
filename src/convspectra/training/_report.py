"""The report of a `SpectralRegularizer`: its layers, their values and their ages."""

from __future__ import annotations

import math
import statistics
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass
from typing import Any

import torch
from rich.console import Console
from rich.table import Table

from convspectra.models import Layer
from convspectra.operator import convolution_options
from convspectra.text import html_table


@dataclass(frozen=True)
class LayerReport:
    """The extreme singular values of one layer as they are known, with their age.

    Attributes
    ----------
    name, input_size
        The layer; one that is used at several sizes has a report for each.
    sigma_min, sigma_max : float or None
        The values followed, ``||M v||`` for a unit vector v; None where none is.
    sigma_min_lower, sigma_min_upper, sigma_max_lower, sigma_max_upper : float or None
        Enclosures for the weights as they stand now: one side from the vector at hand, the other
        from the last exact computation and a bound on the change of M since. 0 and inf say that
        nothing is known on that side.
    condition : float or None
        sigma_max / sigma_min.
    age : int or None
        Steps since the last exact computation.
    lost : bool
        Whether a vector is far from any singular vector: its value is then a bound and no more.
    failures : int
        Exact computations that did not converge.
    skipped : int
        Steps at which the weight was not finite and the layer was left out.
    frozen : bool
        Whether its weight takes no gradient: it is not penalized.
    judged : str
        What the values are those of, where that is not the layer's matrix: H for mirrored kernels
        [H, -H; -H, H], which is what signals see of them. Also why no better target was to be had.

    Examples
    --------
    >>> import torch, convspectra as cs
    >>> conv = torch.nn.Conv1d(1, 1, 3, padding=1)
    >>> reg = cs.SpectralRegularizer(conv, torch.zeros(1, 1, 9), penalty="conditioning")
    >>> value = reg()
    >>> layer = reg.report().layers[0]
    >>> layer.age, layer.sigma_min_lower <= layer.sigma_min <= layer.sigma_max
    (0, True)
    """

    name: str
    input_size: tuple[int, ...]
    sigma_min: float | None = None
    sigma_min_lower: float | None = None
    sigma_min_upper: float | None = None
    sigma_max: float | None = None
    sigma_max_lower: float | None = None
    sigma_max_upper: float | None = None
    condition: float | None = None
    age: int | None = None
    lost: bool = False
    failures: int = 0
    skipped: int = 0
    frozen: bool = False
    judged: str = ""


def unknown(layer: Layer, skipped: int) -> LayerReport:
    """The report of a layer of which nothing is followed."""
    return LayerReport(layer.name, layer.input_size, skipped=skipped, frozen=is_frozen(layer))


def is_frozen(layer: Layer) -> bool:
    """Whether the weight of a layer takes no gradient."""
    with torch.enable_grad():
        return not convolution_options(layer.module)[0].requires_grad


@dataclass(frozen=True)
class RegularizerReport:
    """The layers of a `SpectralRegularizer` at one step; printed as a table.

    Attributes
    ----------
    step : int
        Changes of the weights so far.
    penalty : float or None
        The weighted sum at the last call with a weight: a schedule may have had 0 since. After a
        `SpectralRegularizer.step` with "frobenius", which needs no value, for the weights as they
        stand now.
    layers : tuple of LayerReport

    Examples
    --------
    >>> RegularizerReport(step=3, penalty=0.5, layers=()).aggregates()
    {'penalty': 0.5, 'lost': 0.0, 'failures': 0.0, 'skipped': 0.0}
    """

    step: int
    penalty: float | None
    layers: tuple[LayerReport, ...]

    def records(self) -> list[dict[str, Any]]:
        """One dictionary a layer, of plain values."""
        return [asdict(layer) for layer in self.layers]

    def aggregates(self) -> dict[str, float]:
        """A few numbers for the whole network, for a log; those that are not known are left out."""
        columns = {
            name: [value for layer in self.layers if (value := getattr(layer, name)) is not None]
            for name in ("sigma_min", "sigma_max", "condition", "age")
        }
        found: dict[str, float] = {}
        if self.penalty is not None:
            found["penalty"] = self.penalty
        reductions: dict[str, Callable[[list[float]], float]] = {
            "min": min,
            "median": statistics.median,
            "max": max,
        }
        for name, which in (
            ("sigma_min", ("min", "median")),
            ("sigma_max", ("max", "median")),
            ("condition", ("max", "median")),
            ("age", ("max",)),
        ):
            if columns[name]:
                found |= {f"{name}/{key}": float(reductions[key](columns[name])) for key in which}
        for name in ("lost", "failures", "skipped"):
            found[name] = float(sum(getattr(layer, name) for layer in self.layers))
        return found

    def __repr__(self) -> str:
        numbers = self.aggregates()
        shown = [
            f"{name}={numbers[key]:.4g}"
            for name, key in (("sigma_min", "sigma_min/min"), ("sigma_max", "sigma_max/max"))
            if key in numbers
        ]
        penalty = [] if self.penalty is None else [f"penalty={self.penalty:.4g}"]
        parts = [f"step={self.step}", *penalty, f"{len(self.layers)} layers", *shown]
        return f"RegularizerReport({', '.join(parts)})"

    def _repr_html_(self) -> str:
        return html_table(self._rows(), f"step {self.step}, penalty {_number(self.penalty)}")

    def _rows(self) -> list[dict[str, str]]:
        return [
            {
                "layer": layer.name,
                "input": " x ".join(map(str, layer.input_size)),
                "sigma_min": _number(layer.sigma_min),
                "sigma_min in": _interval(layer.sigma_min_lower, layer.sigma_min_upper),
                "sigma_max": _number(layer.sigma_max),
                "sigma_max in": _interval(layer.sigma_max_lower, layer.sigma_max_upper),
                "age": "" if layer.age is None else str(layer.age),
                "note": _note(layer),
            }
            for layer in self.layers
        ]

    def __str__(self) -> str:
        table = Table(title=f"step {self.step}, penalty {_number(self.penalty)}")
        rows = self._rows()
        for heading in rows[0] if rows else ():
            table.add_column(heading)
        for row in rows:
            table.add_row(*row.values())
        console = Console(width=120, color_system=None)
        with console.capture() as capture:
            console.print(table)
        return capture.get()


def _number(value: float | None) -> str:
    return "" if value is None else f"{value:.4g}"


def _interval(lower: float | None, upper: float | None) -> str:
    if lower is None or upper is None:
        return ""
    return f"[{lower:.3g}, {'inf' if math.isinf(upper) else f'{upper:.3g}'}]"


def _note(layer: LayerReport) -> str:
    notes: Sequence[tuple[bool, str]] = (
        (layer.frozen, "frozen"),
        (layer.lost, "lost: only a bound, prepare or precondition first"),
        (layer.failures > 0, f"{layer.failures} failures"),
        (layer.skipped > 0, f"skipped {layer.skipped} times"),
        (bool(layer.judged), layer.judged),
    )
    return ", ".join(note for holds, note in notes if holds)
