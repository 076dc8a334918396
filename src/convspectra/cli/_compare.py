"""``convspectra compare``: two audits side by side."""

from __future__ import annotations

import argparse
from pathlib import Path

from rich.console import Console

from convspectra.auditing import CHANGE_IMPORTANCE, CHANGE_TEXTS, INCOMPLETE, AuditReport, compare
from convspectra.cli._printing import print_paths, print_table, say
from convspectra.text import comma_separated, write_whole

DESCRIPTION = """Two audits that were written as JSON, layer by layer.

A difference is said to be beyond the enclosures where the two intervals do not meet."""
"""The help's first lines."""


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """The options."""
    parser.add_argument("first", type=Path, metavar="A.json")
    parser.add_argument("second", type=Path, metavar="B.json")
    parser.add_argument("--csv", type=Path, metavar="PATH", help="write one line a layer")


def run(parsed: argparse.Namespace, console: Console) -> int:
    """Read, compare and print."""
    reports = [AuditReport.from_json(path) for path in (parsed.first, parsed.second)]
    for letter, report in zip("AB", reports, strict=True):
        facts = report.circumstances
        say(console, f"{letter}: {facts.model}, input {facts.input_shape}, {facts.created}")
        if not facts.complete:
            say(console, f"{letter} is {INCOMPLETE}")
    rows = compare(reports[0].layers, reports[1].layers)
    print_table(
        console,
        rows,
        importance=CHANGE_IMPORTANCE,
        texts=CHANGE_TEXTS,
        elsewhere="--csv or a wider terminal",
    )
    if parsed.csv is not None:
        parsed.csv.parent.mkdir(parents=True, exist_ok=True)
        write_whole(parsed.csv, comma_separated(list(rows[0]) if rows else [], rows))
        print_paths(console, [parsed.csv])
    return 0
