"""``convspectra compare``: two audits side by side."""

from __future__ import annotations

import argparse
from pathlib import Path

from rich.console import Console

from convspectra.commands.shared import print_table
from convspectra.report.audit_comparison import compare
from convspectra.report.audit_report import AuditReport

DESCRIPTION = """Two audits that were written as JSON, layer by layer.

A difference is said to be beyond the enclosures where the two intervals do not meet."""


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """The options."""
    parser.add_argument("first", type=Path, metavar="A.json")
    parser.add_argument("second", type=Path, metavar="B.json")


def run(parsed: argparse.Namespace, console: Console) -> int:
    """Read, compare and print."""
    reports = [AuditReport.from_json(path) for path in (parsed.first, parsed.second)]
    for letter, report in zip("AB", reports, strict=True):
        facts = report.circumstances
        console.print(
            f"{letter}: {facts.model}, input {facts.input_shape}, {facts.created}",
            markup=False,
            highlight=False,
        )
    print_table(console, compare(reports[0].layers, reports[1].layers))
    return 0
