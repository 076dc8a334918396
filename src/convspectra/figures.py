"""Figures: one without pyplot's global state, plain axes, and files of them."""

from __future__ import annotations

import io
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from convspectra.text import write_whole


def new_figure(width: float, height: float) -> Any:
    """An empty Matplotlib figure, in inches, outside pyplot's global state.

    Raises
    ------
    ImportError
        Without Matplotlib: install ``convspectra[demo]``.
    """
    try:
        from matplotlib.figure import Figure
    except ImportError as error:
        raise ImportError(
            "figures are drawn with Matplotlib: pip install 'convspectra[demo]'"
        ) from error
    return Figure(figsize=(width, height), layout="constrained")


def save_figure(figure: Any, stem: Path) -> list[Path]:
    """Write ``stem.png`` and ``stem.svg``; the same numbers give the same files."""
    png, svg = stem.with_suffix(".png"), stem.with_suffix(".svg")
    for path, options in ((png, {"dpi": 110}), (svg, {"metadata": {"Date": None}})):
        drawn = io.BytesIO()
        figure.savefig(drawn, format=path.suffix[1:], **options)
        write_whole(path, drawn.getvalue())
    return [png, svg]


def write_texts(texts: Mapping[str, str], folder: Path) -> list[Path]:
    """Write each text into the folder, made if need be, under its name; returns the paths."""
    folder.mkdir(parents=True, exist_ok=True)
    for name, text in texts.items():
        write_whole(folder / name, text)
    return [folder / name for name in texts]


def plain_axes(axes: Any) -> None:
    """No box around the data, and a faint grid."""
    axes.spines[["top", "right"]].set_visible(False)
    axes.grid(alpha=0.25)
