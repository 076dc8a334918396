"""What every report writes with: figures in two formats, and tables as CSV and Markdown."""

from __future__ import annotations

import csv
import io
from collections.abc import Iterable, Mapping, Sequence


def sizes(entries: Sequence[int]) -> str:
    """Sizes along the axes, as in 3x3."""
    return "x".join(str(entry) for entry in entries)


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
