"""Geometry of an audit's plots, on logarithmic axes; the templates turn it into SVG."""

from __future__ import annotations

import math
from collections.abc import Iterable, Sequence
from dataclasses import dataclass

from convspectra.auditing._record import Certified, LayerAudit, Spectrum

OVERVIEW_SIZE = (1120.0, 330.0)
"""Width and height of the overview in pixels of its own. A choice: the page scales it."""
SPECTRUM_SIZE = (720.0, 260.0)
"""Width and height of a histogram in pixels of its own. A choice: the page scales it."""
MOST_TICKS = 7
"""Powers of ten on an axis. A choice: twice as many touch each other at the plot's height."""
CHARACTER = 7.5
"""Pixels of a character below the axis. A choice: at the font's 12 pixels names do not touch."""
LEAST_NAME = 6
"""Characters of a name worth showing. A choice: the ends of most names are "conv1" or longer."""
SUPERSCRIPTS = str.maketrans("-0123456789", "⁻⁰¹²³⁴⁵⁶⁷⁸⁹")
"""Digits of an exponent."""


@dataclass(frozen=True)
class Tick:
    """A label on an axis, at a position in pixels."""

    at: float
    label: str


@dataclass(frozen=True)
class LogAxis:
    """From positive numbers to pixels; zeros have a place of their own.

    Attributes
    ----------
    low, high : float
        log10 of the numbers at both ends.
    start, stop : float
        Pixels of both ends.
    zero : float
        Pixel of 0 and all that is below the axis.
    """

    low: float
    high: float
    start: float
    stop: float
    zero: float

    def at(self, value: float) -> float:
        """The pixel of a number; what lies above the axis is at its end."""
        if value <= 0 or (exponent := _log10(value)) < self.low:
            return self.zero
        part = min((exponent - self.low) / (self.high - self.low), 1.0)
        return self.start + part * (self.stop - self.start)

    def ticks(self) -> tuple[Tick, ...]:
        """Powers of ten; also 2 and 5 times them on a short axis."""
        first, last = math.ceil(self.low - 1e-9), math.floor(self.high + 1e-9)
        if last - first >= 2:
            step = math.ceil((last - first) / MOST_TICKS)
            found = [(float(n), _power(n)) for n in range(first, last + 1) if n % step == 0]
        else:
            found = list(self._fine_ticks(first - 1, last))
        span = (self.stop - self.start) / (self.high - self.low)
        return tuple(Tick(self.start + (n - self.low) * span, label) for n, label in found)

    def _fine_ticks(self, first: int, last: int) -> Iterable[tuple[float, str]]:
        for n in range(first, last + 1):
            for factor in (1, 2, 5):
                exponent = n + math.log10(factor)
                if self.low - 1e-9 <= exponent <= self.high + 1e-9:
                    yield exponent, f"{factor * 10.0**n:g}"


def _log10(value: float) -> float:
    return math.log10(value) if value < math.inf else math.inf


def _power(exponent: int) -> str:
    return "1" if exponent == 0 else "10" + str(exponent).translate(SUPERSCRIPTS)


def _axis(values: Iterable[float], start: float, stop: float, zero: float) -> LogAxis:
    """An axis that holds all positive finite values, a twentieth wider on both sides."""
    logs = [math.log10(value) for value in values if 0 < value < math.inf]
    low, high = (min(logs), max(logs)) if logs else (-1.0, 1.0)
    margin = max(0.05 * (high - low), 0.15)
    return LogAxis(low - margin, high + margin, start, stop, zero)


@dataclass(frozen=True)
class Mark:
    """One layer in the overview.

    Attributes
    ----------
    x : float
    largest, smallest : float, optional
        Heights of sigma_max and sigma_min; None where the layer was skipped.
    circular : float, optional
        Height of the smallest singular value with circular padding.
    whiskers : str
        Path of both enclosures.
    """

    x: float
    largest: float | None
    smallest: float | None
    circular: float | None
    whiskers: str


@dataclass(frozen=True)
class Overview:
    """Extreme singular values by layer.

    Attributes
    ----------
    width, height : float
    left, right, top, bottom : float
        The frame of the plot.
    zero : float, optional
        Height of the line for 0, if a value or an enclosure needs it: what is at or below the
        tolerance of the rank is drawn there.
    radius : float
        Of the marks.
    x_ticks, y_ticks : tuple of Tick
    marks : tuple of Mark
        One a layer, in order.
    """

    width: float
    height: float
    left: float
    right: float
    top: float
    bottom: float
    zero: float | None
    radius: float
    x_ticks: tuple[Tick, ...]
    y_ticks: tuple[Tick, ...]
    marks: tuple[Mark, ...]


def overview(layers: Sequence[LayerAudit]) -> Overview:
    """The plot of sigma_max and sigma_min by layer."""
    width, height = OVERVIEW_SIZE
    left, right, top, bottom = 58.0, width - 20.0, 12.0, height - 44.0
    values = [value for layer in layers for value in _drawn(layer)]
    zero_needed = any(value == 0 for value in values)
    axis = _axis(values, bottom - (34.0 if zero_needed else 0.0), top, bottom - 8.0)
    slot = (right - left) / max(len(layers), 1)
    marks = tuple(_mark(layer, left + (i + 0.5) * slot, axis) for i, layer in enumerate(layers))
    step = _step(len(layers))
    width_of_label = int(step * slot / CHARACTER)
    numbers = range(step, len(layers) + 1, step)
    return Overview(
        width,
        height,
        left,
        right,
        top,
        bottom,
        axis.zero if zero_needed else None,
        max(1.2, min(4.5, slot / 3)),
        tuple(
            Tick(left + (n - 0.5) * slot, _tick_label(n, layers[n - 1], width_of_label))
            for n in numbers
        ),
        axis.ticks(),
        marks,
    )


def _step(count: int) -> int:
    """Every how many layers one is numbered: 1, 2 or 5 times a power of ten, at most 25 numbers."""
    steps = (factor * 10**n for n in range(20) for factor in (1, 2, 5))
    return next(step for step in steps if count <= 25 * step)


def _tick_label(number: int, layer: LayerAudit, width: int) -> str:
    """The end of the layer's name, where names differ most; its number where there is no room."""
    if width < LEAST_NAME:
        return str(number)
    name = layer.label
    return name if len(name) <= width else "\N{HORIZONTAL ELLIPSIS}" + name[1 - width :]


def _drawn(layer: LayerAudit) -> list[float]:
    circular = _circular_sigma_min(layer)
    drawn = [] if circular is None else [circular]
    if layer.applied is not None:
        for entry in (layer.applied.sigma_max, layer.applied.sigma_min):
            drawn += [_cleared(layer, x) for x in (entry.value, entry.lower, entry.upper)]
    return drawn


def _cleared(layer: LayerAudit, value: float) -> float:
    """A number, or 0 where it is rounding noise."""
    return 0.0 if layer.applied and value <= layer.applied.rank_tolerance else value


def _circular_sigma_min(layer: LayerAudit) -> float | None:
    value = layer.circular.sigma_min if layer.circular else None
    return None if value is None else _cleared(layer, value)


def _mark(layer: LayerAudit, x: float, axis: LogAxis) -> Mark:
    circular = _circular_sigma_min(layer)
    height = None if circular is None else axis.at(circular)
    if layer.applied is None:
        return Mark(x, None, None, height, "")
    largest, smallest = layer.applied.sigma_max, layer.applied.sigma_min
    low, high = (axis.at(_cleared(layer, entry.value)) for entry in (smallest, largest))
    whiskers = _whisker(layer, largest, x, axis) + _whisker(layer, smallest, x, axis)
    return Mark(x, high, low, height, whiskers)


def _whisker(layer: LayerAudit, certified: Certified, x: float, axis: LogAxis) -> str:
    low, high = (axis.at(_cleared(layer, end)) for end in (certified.lower, certified.upper))
    if low - high < 0.5:
        return ""
    return f"M{x - 3:.1f} {low:.1f}h6m-3 0V{high:.1f}m-3 0h6"


@dataclass(frozen=True)
class Bar:
    """One bin of a histogram: its path, that of its error, and its numbers as text."""

    path: str
    error_path: str
    title: str


@dataclass(frozen=True)
class Histogram:
    """Density of the singular values over log10 s.

    Attributes
    ----------
    width, height, left, right, top, bottom : float
    zero : float, optional
        Where the bin that starts at 0 ends: left of it the axis is no longer logarithmic.
    x_ticks, y_ticks : tuple of Tick
    bars : tuple of Bar
        Those that are not empty.
    circular : str
        Path of the density with circular padding; "" if there is none.
    """

    width: float
    height: float
    left: float
    right: float
    top: float
    bottom: float
    zero: float | None
    x_ticks: tuple[Tick, ...]
    y_ticks: tuple[Tick, ...]
    bars: tuple[Bar, ...]
    circular: str


def histogram(spectrum: Spectrum) -> Histogram:
    """The plot of a spectrum; heights are parts of all singular values per decade of s."""
    width, height = SPECTRUM_SIZE
    left, right, top, bottom = 58.0, width - 14.0, 14.0, height - 44.0
    starts_at_zero = bool(spectrum.edges) and spectrum.edges[0] <= 0
    slot = 26.0 if starts_at_zero else 0.0
    positive = [math.log10(edge) for edge in spectrum.edges if 0 < edge < math.inf] or [-1.0, 1.0]
    low, high = _spread(positive[0], positive[-1])
    axis = LogAxis(low, high, left + slot, right, left)
    bins = list(zip(spectrum.edges, spectrum.edges[1:], strict=False))
    decades = _decades(bins, axis, slot)
    densities = [f / d for f, d in zip(spectrum.fractions, decades, strict=True)]
    errors = [e / d for e, d in zip(spectrum.errors, decades, strict=True)]
    others = [f / d for f, d in zip(spectrum.circular, decades, strict=False)]
    tallest = max([d + e for d, e in zip(densities, errors, strict=True)] + others, default=0.0)
    scale = (bottom - top) / (1.05 * tallest) if tallest > 0 else 0.0
    sides = [(axis.at(a), axis.at(b)) for a, b in bins]
    rows = zip(sides, bins, densities, errors, spectrum.fractions, spectrum.errors, strict=True)
    bars = tuple(
        Bar(
            _box(x, bottom, d * scale),
            _error_path((x[0] + x[1]) / 2, bottom - d * scale, e * scale, bottom),
            _bar_title(edges, fraction, error),
        )
        for x, edges, d, e, fraction, error in rows
        if fraction > 0 or error > 0
    )
    heights = [bottom - density * scale for density in others]
    return Histogram(
        width,
        height,
        left,
        right,
        top,
        bottom,
        left + slot if starts_at_zero else None,
        tuple(tick for tick in axis.ticks() if tick.at > left + 1.4 * slot - 1),  # clear of 0
        _linear_ticks(tallest, bottom, scale),
        bars,
        _steps(sides, heights, bottom),
    )


def _spread(low: float, high: float) -> tuple[float, float]:
    """An interval of at least a tenth of a decade."""
    lack = max(0.1 - (high - low), 0.0) / 2
    return low - lack, high + lack


def _decades(bins: Sequence[tuple[float, float]], axis: LogAxis, slot: float) -> list[float]:
    """Width of every bin as it is drawn, in decades: what starts at 0 has the width of its slot."""
    per_pixel = (axis.high - axis.low) / (axis.stop - axis.start)
    at_zero = slot * per_pixel
    return [max(math.log10(b) - math.log10(a) if a > 0 else at_zero, per_pixel) for a, b in bins]


def _box(sides: tuple[float, float], bottom: float, height: float) -> str:
    left, right = sides
    right = max(right, left + 1.0)
    return f"M{left:.1f} {bottom:.1f}V{bottom - height:.1f}H{right:.1f}V{bottom:.1f}z"


def _bar_title(edges: tuple[float, float], fraction: float, error: float) -> str:
    spread = f" ± {100 * error:.2g}" if error > 0 else ""
    return f"{edges[0]:.3g} to {edges[1]:.3g}: {100 * fraction:.3g}{spread} %"


def _error_path(x: float, y: float, error: float, bottom: float) -> str:
    if error <= 0:
        return ""
    return f"M{x - 2:.1f} {y - error:.1f}h4m-2 0V{min(y + error, bottom):.1f}m-2 0h4"


def _steps(sides: Sequence[tuple[float, float]], heights: Sequence[float], bottom: float) -> str:
    if not heights:
        return ""
    steps = "".join(f"V{y:.1f}H{right:.1f}" for (_, right), y in zip(sides, heights, strict=False))
    return f"M{sides[0][0]:.1f} {bottom:.1f}{steps}V{bottom:.1f}"


def _linear_ticks(tallest: float, bottom: float, scale: float) -> tuple[Tick, ...]:
    if tallest <= 0:
        return (Tick(bottom, "0"),)
    power = 10.0 ** math.floor(math.log10(tallest))
    step = next(f * power for f in (0.25, 0.5, 1.0, 2.5) if tallest <= 4.5 * f * power)
    count = math.floor(1.05 * tallest / step)
    return tuple(Tick(bottom - n * step * scale, f"{n * step:.3g}") for n in range(count + 1))
