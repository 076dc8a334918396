"""``convspectra show``: an audit that was written as JSON."""

from __future__ import annotations

import argparse
from pathlib import Path

from rich.console import Console

from convspectra.auditing import PURPOSES, AuditReport
from convspectra.cli._audit import write
from convspectra.cli._printing import print_report

DESCRIPTION = "An audit that was written as JSON, as a table, a page or a line a layer."
"""The help's first lines."""


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """The options."""
    parser.add_argument("report", type=Path, metavar="A.json")
    parser.add_argument("--html", type=Path, metavar="PATH", help="write a page")
    parser.add_argument("--csv", type=Path, metavar="PATH", help="write one line a layer")
    parser.add_argument("--purpose", choices=PURPOSES, help="judge the layers for another purpose")
    parser.set_defaults(json=None)


def run(parsed: argparse.Namespace, console: Console) -> int:
    """Read, print and write."""
    report = AuditReport.from_json(parsed.report)
    if parsed.purpose is not None:
        report = report.judged_for(parsed.purpose)
    print_report(report, console)
    write(report, parsed, console)
    return 0
