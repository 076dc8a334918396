"""Tables as text, CSV and Markdown, texts that a terminal can show, and files written whole."""

from __future__ import annotations

import csv
import html
import io
import os
import shutil
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any


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


def data_frame(rows: Sequence[Mapping[str, object]]) -> Any:
    """Rows as a pandas data frame.

    Raises
    ------
    ImportError
        Without pandas.
    """
    try:
        import pandas
    except ImportError as error:
        raise ImportError("a data frame takes pandas: pip install 'convspectra[pandas]'") from error
    return pandas.DataFrame(rows)


def plain(text: str) -> str:
    r"""Text for a terminal: what cannot be printed, such as a control character, is escaped.

    Examples
    --------
    >>> print(plain("a\x1b[31m\nb"))
    a\x1b[31m\nb
    """
    return "".join(c if c.isprintable() else c.encode("unicode_escape").decode() for c in text)


def html_table(rows: Sequence[Mapping[str, str]], caption: str) -> str:
    """Rows as a table for a notebook, every text escaped.

    Examples
    --------
    >>> html_table([{"s": "<1"}], "one")
    '<table><caption>one</caption><tr><th>s</th></tr><tr><td>&lt;1</td></tr></table>'
    """
    heads = [f"<th>{html.escape(heading)}</th>" for heading in (rows[0] if rows else ())]
    lines = [[f"<td>{html.escape(plain(text))}</td>" for text in row.values()] for row in rows]
    body = "".join(f"<tr>{''.join(line)}</tr>" for line in [heads, *lines] if line)
    return f"<table><caption>{html.escape(plain(caption))}</caption>{body}</table>"


def text_table(columns: Sequence[str], rows: Sequence[Mapping[str, str]]) -> str:
    """Rows in columns of equal width, with a header."""
    lines = [list(columns), *([plain(row[c]) for c in columns] for row in rows)]
    widths = [max(map(len, texts)) for texts in zip(*lines, strict=True)]
    return "\n".join(
        "  ".join(text.ljust(width) for text, width in zip(line, widths, strict=True)).rstrip()
        for line in lines
    )


def write_whole(path: str | Path, content: str | bytes) -> None:
    """Write a file whole or not at all: a reader never finds half of it.

    The content is written beside the file, under a hidden name, and then renamed. Two kinds
    are written in place: what is no regular file, such as ``/dev/stdout``, and a file in a folder
    that cannot be written to.

    Parameters
    ----------
    path : path
        A link is followed: what it points to is replaced.
    content : str or bytes
        Text is written as UTF-8.

    Raises
    ------
    OSError
        With the path in it, such as where the disk is full; what stood there before stays.

    Examples
    --------
    >>> import tempfile
    >>> with tempfile.TemporaryDirectory() as folder:
    ...     write_whole(Path(folder, "a.txt"), "whole")
    ...     [(file.name, file.read_text()) for file in Path(folder).iterdir()]
    [('a.txt', 'whole')]
    """
    data = content.encode() if isinstance(content, str) else content
    target = Path(os.path.realpath(path))
    in_place = target.exists() and not (target.is_file() and os.access(target.parent, os.W_OK))
    written = target if in_place else target.with_name(f".{target.name}.{os.getpid()}")
    try:
        written.write_bytes(data)
        if not in_place:
            if target.exists():
                shutil.copymode(target, written)
            written.replace(target)
    except OSError as error:
        if not in_place:
            written.unlink(missing_ok=True)
        raise type(error)(error.errno, error.strerror, str(path)) from error
