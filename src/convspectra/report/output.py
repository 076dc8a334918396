"""What every report writes with: figures in two formats, and tables as CSV and Markdown."""

from __future__ import annotations

import csv
import io
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any


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
    figure.savefig(png, dpi=110)
    figure.savefig(svg, metadata={"Date": None})
    return [png, svg]


def write_texts(texts: Mapping[str, str], folder: Path) -> list[Path]:
    """Write each text into the folder, made if need be, under its name; returns the paths."""
    folder.mkdir(parents=True, exist_ok=True)
    for name, text in texts.items():
        (folder / name).write_text(text, encoding="utf-8")
    return [folder / name for name in texts]


def plain_axes(axes: Any) -> None:
    """No box around the data, and a faint grid."""
    axes.spines[["top", "right"]].set_visible(False)
    axes.grid(alpha=0.25)


def comma_separated(columns: Sequence[str], rows: Iterable[Mapping[str, object]]) -> str:
    """Rows as CSV with a header."""
    text = io.StringIO()
    writer = csv.DictWriter(text, columns, lineterminator="\n")
    writer.writeheader()
    writer.writerows(rows)
    return text.getvalue()


def markdown_table(columns: Sequence[str], rows: Iterable[Mapping[str, object]]) -> str:
    """Rows as a Markdown table with a header."""
    lines = ["| " + " | ".join(columns) + " |", "|" + "---|" * len(columns)]
    lines += ["| " + " | ".join(str(row[column]) for column in columns) + " |" for row in rows]
    return "\n".join(lines) + "\n"


def plain(text: str) -> str:
    r"""Text for a terminal: what cannot be printed, such as a control character, is escaped.

    Examples
    --------
    >>> print(plain("a\x1b[31m\nb"))
    a\x1b[31m\nb
    """
    return "".join(c if c.isprintable() else c.encode("unicode_escape").decode() for c in text)


def text_table(columns: Sequence[str], rows: Sequence[Mapping[str, str]]) -> str:
    """Rows in columns of equal width, with a header."""
    lines = [list(columns), *([plain(row[c]) for c in columns] for row in rows)]
    widths = [max(map(len, texts)) for texts in zip(*lines, strict=True)]
    return "\n".join(
        "  ".join(text.ljust(width) for text, width in zip(line, widths, strict=True)).rstrip()
        for line in lines
    )
