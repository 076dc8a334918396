"""``convspectra audit``: the conditioning of every layer of a model file."""

from __future__ import annotations

import argparse
import importlib
import os
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.progress import BarColumn, Progress, TaskProgressColumn, TextColumn, TimeRemainingColumn
from rich.table import Table

from convspectra.commands.shared import input_shape
from convspectra.report import audit_table, findings
from convspectra.report.audit_numbers import largest, smallest
from convspectra.report.audit_record import LayerAudit
from convspectra.report.audit_report import AuditReport
from convspectra.report.rules import Rule, parse_rule, violations

DESCRIPTION = """Which layers of a network blow gradients up or let them vanish, and by how much.

Exact singular values of every convolution and linear layer as it is applied, padding counted, with
the interval that holds each. FILE is an ONNX model, a TorchScript or torch.export archive, or, with
--factory, a safetensors or weights-only checkpoint."""
RULE_VIOLATED = 1
INTERRUPTED = 130
FINDINGS_SHOWN = 12


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """The options."""
    parser.add_argument("file", nargs="?", type=Path, metavar="FILE")
    parser.add_argument(
        "--input",
        type=input_shape,
        action="append",
        required=True,
        metavar="CxHxW",
        help="shape of the input without the batch, as in 3x224x224; again for a second input",
    )
    parser.add_argument(
        "--factory",
        metavar="PACKAGE.MODULE:FUNCTION",
        help="called without arguments, gives the module that a checkpoint belongs to",
    )
    parser.add_argument(
        "--allow-pickle",
        action="store_true",
        help="load a pickle that is not weights-only: it can run any code that its author chose",
    )
    parser.add_argument(
        "--spectrum", action="store_true", help="all singular values of every layer too"
    )
    parser.add_argument(
        "--no-fold", action="store_true", help="leave batch normalisation out of account"
    )
    parser.add_argument(
        "--band",
        type=float,
        nargs=2,
        default=findings.BAND,
        metavar=("LOW", "HIGH"),
        help="what the growth along the layers is meant to stay in (default: 0.1 10)",
    )
    parser.add_argument("--workers", type=int, default=1, metavar="N", help="processes")
    parser.add_argument(
        "--devices", nargs="+", default=(), metavar="DEVICE", help="such as cuda:0 cuda:1"
    )
    parser.add_argument(
        "--max-gib", type=float, default=4.0, metavar="GIB", help="limit on a matrix (default: 4)"
    )
    parser.add_argument(
        "--fail-if",
        type=_rule,
        action="append",
        default=[],
        metavar="RULE",
        help='exit with 1 if a layer satisfies a rule such as "sigma_max > 10"; may be repeated',
    )
    for kind, text in (("json", "the report"), ("csv", "one line a layer"), ("html", "a page")):
        parser.add_argument(f"--{kind}", type=Path, metavar="PATH", help=f"write {text}")
    parser.add_argument(
        "--journal",
        type=Path,
        metavar="PATH",
        help="where finished layers are kept (default: beside the first file written)",
    )
    parser.add_argument(
        "--resume", action="store_true", help="take the layers that the journal has"
    )


def run(parsed: argparse.Namespace, console: Console) -> int:
    """Audit, print and write."""
    journal = _journal(parsed)
    distributed = _join_group()
    loading = importlib.import_module("convspectra.loading")
    auditing = importlib.import_module("convspectra.auditing")
    layer_audit = importlib.import_module("convspectra.layer_audit")
    name, targets = loading.load_targets(
        parsed.file, parsed.input, factory=parsed.factory, allow_pickle=parsed.allow_pickle
    )
    first = not distributed or os.environ["RANK"] == "0"
    with _Bar(console, first) as bar:
        report = auditing.audit_targets(
            targets,
            name,
            ", ".join("x".join(map(str, shape)) for shape in parsed.input),
            options=layer_audit.AuditOptions(
                parsed.spectrum, not parsed.no_fold, int(parsed.max_gib * 2**30)
            ),
            band=tuple(parsed.band),
            workers=parsed.workers,
            devices=parsed.devices,
            journal=journal,
            progress=bar,
        )
    if not first:
        return 0
    print_report(report, console)
    write(report, parsed, console)
    if not report.circumstances.complete:
        kept = f"; --resume goes on from {journal}" if journal else ""
        console.print(f"interrupted: this is a part of the layers{kept}", markup=False)
        return INTERRUPTED
    if journal is not None and parsed.journal is None:
        for path in (journal, *journal.parent.glob(f"{journal.name}.*")):
            path.unlink(missing_ok=True)
    return _judge(parsed.fail_if, report, console)


def print_report(report: AuditReport, console: Console) -> None:
    """The table, the network and what to look at first."""
    table = Table(*audit_table.columns(), header_style="bold", row_styles=("", "dim"))
    for layer in report.layers:
        table.add_row(*(_plain(text) for text in audit_table.row(layer).values()))
    console.print(table)
    for label, text in findings.facts(report.network):
        console.print(f"{label}: {text}", markup=False, highlight=False)
    shown = report.findings[:FINDINGS_SHOWN]
    if shown:
        console.print("\nlook first at", style="bold")
    for finding in shown:
        console.print(f"  {finding.layer}: {finding.text}", markup=False, highlight=False)
    if len(report.findings) > len(shown):
        console.print(f"  and {len(report.findings) - len(shown)} more: see the JSON or the page")


def write(report: AuditReport, parsed: argparse.Namespace, console: Console) -> None:
    """The files that were asked for."""
    for kind in ("json", "csv", "html"):
        path = getattr(parsed, kind)
        if path is not None:
            path.parent.mkdir(parents=True, exist_ok=True)
            getattr(report, f"to_{kind}")(path)
            console.print(f"wrote {path}", markup=False, highlight=False, soft_wrap=True)


class _Bar:
    """A bar with the time left, by the work and not by the number of layers; a line a layer."""

    def __init__(self, console: Console, shown: bool) -> None:
        columns = (TextColumn("audit"), BarColumn(), TaskProgressColumn(), TimeRemainingColumn())
        self._progress = Progress(*columns, console=console, disable=not shown, transient=True)

    def __enter__(self) -> _Bar:
        self._progress.start()
        self._task = self._progress.add_task("audit", total=1.0)
        return self

    def __exit__(self, *error: Any) -> None:
        self._progress.stop()

    def __call__(self, layer: LayerAudit, part: float) -> None:
        numbers = layer.applied
        if numbers is None:
            text = f"skipped: {layer.skipped}"
        else:
            text = f"sigma_max {largest(numbers)}, sigma_min {smallest(numbers)}"
        if not self._progress.disable:
            line = f"{layer.name}: {text}  ({layer.seconds:.1f} s)"
            self._progress.console.print(line, markup=False, highlight=False)
        self._progress.update(self._task, completed=part)


def _plain(text: str) -> str:
    """Text in which Rich finds no markup."""
    return text.replace("[", r"\[")


def _journal(parsed: argparse.Namespace) -> Path | None:
    outputs = [path for path in (parsed.json, parsed.csv, parsed.html) if path is not None]
    journal = parsed.journal
    if journal is None and outputs:
        journal = outputs[0].with_name(f"{outputs[0].name}.journal")
    if parsed.resume and journal is None:
        raise ValueError("expected --json, --csv, --html or --journal with --resume, got none")
    if journal is not None and not parsed.resume and os.environ.get("RANK", "0") == "0":
        for path in (journal, *journal.parent.glob(f"{journal.name}.*")):
            path.unlink(missing_ok=True)
    return journal


def _join_group() -> bool:
    """Under torchrun, one of its processes; False in a process of its own."""
    if int(os.environ.get("WORLD_SIZE", "1")) == 1:
        return False
    distributed = importlib.import_module("torch.distributed")
    distributed.init_process_group("gloo")
    return True


def _judge(rules: list[Rule], report: AuditReport, console: Console) -> int:
    found = violations(rules, report.layers)
    for violation in found:
        word = "fails" if violation.certain else "cannot be decided"
        console.print(
            f'"{violation.rule}" {word} at {violation.layer}: {violation.text}', markup=False
        )
    return RULE_VIOLATED if any(violation.certain for violation in found) else 0


def _rule(text: str) -> Rule:
    try:
        return parse_rule(text)
    except ValueError as error:
        raise argparse.ArgumentTypeError(str(error)) from error
