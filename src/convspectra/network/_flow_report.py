"""The result of `gradient_flow` in words, as a table, a figure and a page."""

from __future__ import annotations

import json
import math
from collections.abc import Mapping
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from convspectra.figures import new_figure
from convspectra.network._flow_page import flow_page, flow_section
from convspectra.text import data_frame, text_table, write_whole

COLLAPSED = 0.01
"""Share of the second moment that depends on the image below which images count as the same: their
cosine is then above 0.99. A choice."""
NAMES_SHOWN = 64
"""Names of layers below a figure. A choice: more overlap at 16 inches."""
NAME_LENGTH = 24
"""Characters of a name below a figure. A choice: a third of the figure's height."""
COLUMNS = {
    "layer": "name",
    "signal": "second_moment",
    "differs": "image_share",
    "cosine": "cosine",
    "gradient": "relative",
    "predicted": "predicted",
    "weight gradient": "weight_gradient",
    "kernel": "kernel",
    "alignment": "alignment",
    "normalization": "normalization",
    "slope": "slope",
    "biases": "bias",
    "dead": "dead",
    "saturated": "saturated",
}
"""Headings of the table, and the attribute of `FlowLayer` below each."""


@dataclass(frozen=True)
class FlowLayer:
    """One call of a layer, at its output, before the activation.

    Attributes
    ----------
    name : str
    second_moment : float
        Mean square of the output over images and entries.
    image_share : float
        Part of it that is left without the mean over the images.
    cosine : float
        Mean cosine between the outputs for two images.
    bias : float
        Mean square of the bias over `second_moment`.
    gradient, weight_gradient : float
        Norms of the gradients of the loss at the output and at the weight; that of a weight which a
        parametrization computes is nan.
    relative : float
        The same norm, behind the normalization if there is one, over the flow behind the last layer
        except the head.
    predicted : float
        `relative`, by kernels, slopes, normalizations and branches alone.
    kernel : float
        ``||M||_F / sqrt(rows)``: the root mean square gain of M' for a gradient of any direction.
    measured : float
        Gain of the gradient through this layer, from its output to its input.
    alignment : float
        `measured` over `kernel`.
    normalization : float
        Root mean square gain of gradients through the normalization that reads the output; 1
        without one.
    slope : float
        Root mean square slope of what lies behind, up to the next layer; nan for the last one.
    dead : float
        Share of channels whose slope is 0 for every image.
    saturated : float
        Share of entries with less than a tenth of the largest slope; 0 for piecewise linear
        activations.
    """

    name: str
    second_moment: float
    image_share: float
    cosine: float
    bias: float
    gradient: float
    weight_gradient: float
    relative: float
    predicted: float
    kernel: float
    measured: float
    alignment: float
    normalization: float
    slope: float
    dead: float
    saturated: float


@dataclass(frozen=True, repr=False)
class GradientFlow:
    """The result of `gradient_flow`: numbers of every layer, a verdict and three sentences.

    Attributes
    ----------
    layers : tuple of FlowLayer
        In the order of the forward pass.
    verdict : {"healthy", "vanishing", "exploding", "collapsing", "saturated"}
    begins : str
        Name of the module where it begins; "" for a healthy network.
    causes : dict of str to float
        Powers of ten by which kernels, alignment, activations, biases, normalization and branches
        change gradients between the last layer except the head and the first; they add up to what
        is measured.
    sentences : tuple of str
        What it is, why, and what to do.
    band : (float, float)
        Flow of gradients that counts as healthy: 0.1 to 10; 0.001 to 1,000 with normalizations, or
        where alignment makes most of the change.

    Examples
    --------
    >>> import torch, convspectra as cs
    >>> _ = torch.manual_seed(0)
    >>> parts = [p for _ in range(8) for p in (torch.nn.Linear(16, 16), torch.nn.ReLU())]
    >>> flow = cs.gradient_flow(torch.nn.Sequential(*parts), torch.randn(8, 16))
    >>> flow
    GradientFlow('vanishing', begins='8', 8 layers)
    """

    layers: tuple[FlowLayer, ...]
    verdict: str
    begins: str
    causes: Mapping[str, float]
    sentences: tuple[str, str, str]
    band: tuple[float, float]

    def __repr__(self) -> str:
        begins = f"begins={self.begins!r}, " if self.begins else ""
        return f"GradientFlow({self.verdict!r}, {begins}{len(self.layers)} layers)"

    def __str__(self) -> str:
        rows = self.rows()
        return "\n".join([text_table(list(rows[0]), rows), "", *self.sentences])

    def rows(self) -> list[dict[str, str]]:
        """The table: one dictionary a layer, of texts by heading; what says nothing is left out."""
        rows = [
            {heading: _cell(getattr(layer, key)) for heading, key in COLUMNS.items()}
            for layer in self.layers
        ]
        silent = {"normalization": "1", "biases": "0", "dead": "0", "saturated": "0"}
        shown = [h for h in COLUMNS if any(row[h] != silent.get(h) for row in rows)]
        return [{heading: row[heading] for heading in shown} for row in rows]

    def records(self) -> list[dict[str, Any]]:
        """One flat record a layer, of all its numbers."""
        return [asdict(layer) for layer in self.layers]

    def to_dataframe(self) -> Any:
        """A pandas data frame, one row a layer.

        Raises
        ------
        ImportError
            Without pandas.
        """
        return data_frame(self.records())

    def to_json(self, path: str | Path) -> None:
        """Write everything as JSON; numbers that are not finite are written as null."""
        content = {
            "verdict": self.verdict,
            "begins": self.begins,
            "sentences": self.sentences,
            "causes": dict(self.causes),
            "layers": [
                {k: _finite(v) if isinstance(v, float) else v for k, v in record.items()}
                for record in self.records()
            ],
        }
        write_whole(path, json.dumps(content, indent=2, allow_nan=False) + "\n")

    def to_html(self, path: str | Path) -> None:
        """Write the sentences, a figure and the table as one page that needs nothing else."""
        write_whole(path, flow_page(self))

    def _repr_html_(self) -> str:
        return flow_section(self)

    def plot(self) -> Any:
        """A Matplotlib figure: gradients, measured and predicted, and signals, layer by layer.

        Raises
        ------
        ImportError
            Without Matplotlib: install ``convspectra[demo]``.
        """
        figure = new_figure(min(16.0, max(6.0, 0.22 * len(self.layers))), 5.5)
        above, below = figure.subplots(2, 1, sharex=True)
        places = range(len(self.layers))
        above.axhspan(*self.band, color="#2b6299", alpha=0.1, linewidth=0)
        for key, style in (("relative", "o-"), ("predicted", "x--")):
            values = [_logarithmic(getattr(layer, key)) for layer in self.layers]
            label = "measured" if key == "relative" else "by gains alone"
            above.semilogy(places, values, style, markersize=4, linewidth=1, label=label)
        above.set_ylabel("gradient over that\nat the last layer")
        for key, label in (
            ("second_moment", "second moment"),
            ("image_share", "share that depends on the image"),
        ):
            values = [_logarithmic(getattr(layer, key)) for layer in self.layers]
            below.semilogy(places, values, "o-", markersize=4, linewidth=1, label=label)
        below.axhline(COLLAPSED, color="#8a8577", linestyle=":", linewidth=1)
        below.set_ylabel("signal")
        names = [layer.name for layer in self.layers]
        for axes in (above, below):
            axes.grid(alpha=0.25)
            axes.legend(fontsize=8)
            if self.begins in names:
                axes.axvline(names.index(self.begins), color="#b0491f", linewidth=1, alpha=0.7)
        step = -(-len(names) // NAMES_SHOWN)
        below.set_xticks(places[::step], map(_end, names[::step]), rotation=90, fontsize=7)
        figure.suptitle(self.sentences[0], fontsize=9, wrap=True)
        return figure


def _end(name: str) -> str:
    """The end of a name that is too long, where names differ most."""
    return name if len(name) <= NAME_LENGTH else "..." + name[3 - NAME_LENGTH :]


def _cell(value: str | float) -> str:
    if isinstance(value, str):
        return value
    return "" if math.isnan(value) else f"{value:.3g}"


def _finite(value: float) -> float | None:
    return value if math.isfinite(value) else None


def _logarithmic(value: float) -> float:
    """A number that a logarithmic axis can show; what is 0 leaves a gap."""
    return value if 0 < value < math.inf else math.nan
