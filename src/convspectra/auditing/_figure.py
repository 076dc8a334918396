"""An audit as a Matplotlib figure."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

from convspectra.auditing._record import LayerAudit, Network
from convspectra.figures import new_figure, plain_axes

MOST_NAMES = 60
"""Names along the axis. A choice: more of them overlap on a figure that is 20 inches wide."""


def draw(layers: Sequence[LayerAudit], network: Network) -> Any:
    """Singular values by layer above, the gain of a typical gradient along the layers below."""
    audited = [layer for layer in layers if layer.applied is not None]
    figure = new_figure(min(20.0, max(6.0, 0.3 * len(audited) + 2)), 7.0)
    above, below = figure.subplots(2, 1, sharex=True, height_ratios=(3, 2))
    _draw_values(above, audited)
    _draw_gain(below, network)
    step = -(-len(audited) // MOST_NAMES) or 1
    shown = range(0, len(audited), step)
    below.set_xticks(list(shown), [audited[i].label for i in shown], rotation=90, fontsize=7)
    for axes in (above, below):
        axes.set_yscale("log")
        plain_axes(axes)
        axes.legend(frameon=False, fontsize=8)
    return figure


def _draw_values(axes: Any, layers: Sequence[LayerAudit]) -> None:
    numbers = [layer.applied for layer in layers if layer.applied is not None]
    largest = [_positive(n.sigma_max.value) for n in numbers]
    smallest = [math.nan if n.singular else _positive(n.sigma_min.value) for n in numbers]
    circular = [_circular_value(layer) for layer in layers]
    axes.plot(largest, "o", ms=4, label=r"$\sigma_{\max}$")
    axes.plot(smallest, "D", ms=4, label=r"$\sigma_{\min}$")
    if not all(map(math.isnan, circular)):
        axes.plot(circular, "o", ms=5, mfc="none", label=r"$\sigma_{\min}$ with circular padding")
    known = [value for value in (*largest, *smallest) if not math.isnan(value)]
    zeros = [i for i, n in enumerate(numbers) if n.singular]
    if zeros and known:
        floor = min(known) / 10
        axes.plot(zeros, [floor] * len(zeros), "vr", ms=5, label="0 to working precision")
    axes.set_ylabel("singular values as applied")


def _draw_gain(axes: Any, network: Network) -> None:
    gains = [math.exp(min(total, 700.0)) for total in network.growth]
    axes.plot(gains, ".-", label="from the output back to the layer")
    axes.axhspan(*network.band, alpha=0.12, label=f"{network.band[0]:g} to {network.band[1]:g}")
    alone = ",\nthe layers alone" if network.chain else ""
    axes.set_ylabel(f"typical gain of a gradient{alone}")


def _circular_value(layer: LayerAudit) -> float:
    value = None if layer.circular is None else layer.circular.sigma_min
    noise = 0.0 if layer.applied is None else layer.applied.rank_tolerance
    return math.nan if value is None or value <= noise else value


def _positive(value: float) -> float:
    return value if 0 < value < math.inf else math.nan
