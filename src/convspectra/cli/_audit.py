"""``convspectra audit``: the conditioning of every layer of a model file."""

from __future__ import annotations

import argparse
import contextlib
import importlib
import math
import os
from collections.abc import Iterator
from pathlib import Path

from rich.console import Console

from convspectra.auditing import (
    BAND,
    PURPOSES,
    AuditReport,
    LayerAudit,
    Listener,
    Rule,
    flag,
    journal_files,
    largest,
    parse_rule,
    remove_journal,
    smallest,
    smallest_flag,
    violations,
    work_bar,
)
from convspectra.cli._outputs import check_outputs
from convspectra.cli._printing import input_shape, print_paths, print_report, say
from convspectra.text import sizes

DESCRIPTION = """Which layers of a network blow gradients up or let them vanish, and by how much.

Exact singular values of every convolution and linear layer as it is applied, padding counted, with
the interval that holds each. FILE is an ONNX model, a TorchScript or torch.export archive, or, with
--factory, a safetensors or weights-only checkpoint. A TorchScript archive runs its own code when it
is loaded, and so does the factory: audit only those that you trust."""
"""The help's first lines."""
RULE_VIOLATED = 1
"""Exit status if a rule fails, and for nothing else."""
INTERRUPTED = 130
"""Exit status after Ctrl-C, as shells have it: 128 and the signal's number."""
OUTPUTS = {"json": "the report", "csv": "one line a layer", "html": "a page"}
"""The files that can be written, with what the help says of each."""


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """The options, in three groups."""
    _add_model(parser.add_argument_group("the model"))
    _add_work(parser.add_argument_group("what is computed, and where"))
    _add_results(parser.add_argument_group("what comes of it"))


def _add_model(parser: argparse._ArgumentGroup) -> None:
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
        help="load a pickle or torch.export archive that holds more than tensors and operators: "
        "it can run any code that its author chose",
    )


def _add_work(parser: argparse._ArgumentGroup) -> None:
    parser.add_argument(
        "--spectrum", action="store_true", help="all singular values of every layer too"
    )
    parser.add_argument(
        "--no-fold", action="store_true", help="leave batch normalization out of account"
    )
    parser.add_argument(
        "--band",
        type=float,
        nargs=2,
        default=BAND,
        metavar=("LOW", "HIGH"),
        help="what the growth along the layers is meant to stay in (default: 0.1 10)",
    )
    parser.add_argument(
        "--purpose",
        choices=PURPOSES,
        default=PURPOSES[0],
        help="what the layers are judged for (default: %(default)s)",
    )
    parser.add_argument(
        "--workers", type=int, default=1, metavar="N", help="processes (default: 1)"
    )
    parser.add_argument(
        "--devices",
        nargs="+",
        default=(),
        metavar="DEVICE",
        help="a process for each, instead of --workers, such as cuda:0 cuda:1",
    )
    parser.add_argument(
        "--max-gib", type=float, default=4.0, metavar="GIB", help="limit on a matrix (default: 4)"
    )


def _add_results(parser: argparse._ArgumentGroup) -> None:
    parser.add_argument(
        "--fail-if",
        type=_rule,
        action="append",
        default=[],
        metavar="RULE",
        help='exit with 1 if a layer satisfies a rule such as "sigma_max > 10", or if it cannot be '
        "decided at any; may be repeated",
    )
    for kind, text in OUTPUTS.items():
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
    limit = max_bytes(parsed.max_gib)
    paths = {kind: getattr(parsed, kind) for kind in (*OUTPUTS, "journal")}
    check_outputs(paths, {"the model file": parsed.file})
    journal = _journal(parsed)
    loading = importlib.import_module("convspectra.models.files")
    auditing = importlib.import_module("convspectra.auditing")
    name, operators = loading.load_operators(
        parsed.file, parsed.input, factory=parsed.factory, allow_pickle=parsed.allow_pickle
    )
    with _group() as first, _progress(console, first) as finished:
        report = auditing.audit_operators(
            operators,
            name,
            ", ".join(sizes((1, *shape)) for shape in parsed.input),
            options=auditing.AuditOptions(parsed.spectrum, not parsed.no_fold, limit),
            band=tuple(parsed.band),
            purpose=parsed.purpose,
            workers=parsed.workers,
            devices=parsed.devices,
            journal=journal,
            progress=finished,
        )
    if not first:
        return 0
    print_report(report, console)
    write(report, parsed, console)
    if not report.circumstances.complete:
        kept = f"; --resume goes on from {journal}" if journal else ""
        say(console, f"interrupted: this is a part of the layers{kept}")
        return INTERRUPTED
    if journal is not None and parsed.journal is None:
        remove_journal(journal)
    return _judge(parsed.fail_if, report, console)


def write(report: AuditReport, parsed: argparse.Namespace, console: Console) -> None:
    """The files that were asked for."""
    for kind in OUTPUTS:
        path = getattr(parsed, kind)
        if path is not None:
            path.parent.mkdir(parents=True, exist_ok=True)
            getattr(report, f"to_{kind}")(path)
            print_paths(console, [path])


@contextlib.contextmanager
def _progress(console: Console, shown: bool) -> Iterator[Listener]:
    """A line a layer, with a bar below."""
    with work_bar(console, shown) as bar:

        def finished(layer: LayerAudit, part: float) -> None:
            numbers = layer.applied
            if numbers is None:
                text = f"skipped: {layer.skipped}"
            else:
                marks = ["~" * bool(f) for f in (flag(numbers.sigma_max), smallest_flag(numbers))]
                text = (
                    f"sigma_max {marks[0]}{largest(numbers)}, "
                    f"sigma_min {marks[1]}{smallest(numbers)}"
                )
            if shown:
                say(console, f"{layer.label}: {text}  ({layer.seconds:.1f} s)")
            bar(layer, part)

        yield finished


def _journal(parsed: argparse.Namespace) -> Path | None:
    """Where finished layers are kept, empty unless the audit is to go on from them."""
    outputs = [path for kind in OUTPUTS if (path := getattr(parsed, kind)) is not None]
    journal: Path | None = parsed.journal
    if journal is None and outputs:
        journal = outputs[0].with_name(f"{outputs[0].name}.journal")
    if parsed.resume and journal is None:
        raise ValueError("expected --json, --csv, --html or --journal with --resume, got none")
    if journal is not None and os.environ.get("RANK", "0") == "0":
        if parsed.resume:
            journal_files(journal)
        else:
            remove_journal(journal)
    return journal


@contextlib.contextmanager
def _group() -> Iterator[bool]:
    """Under torchrun, one of its processes; whether it is the first, or one of its own."""
    if int(os.environ.get("WORLD_SIZE", "1")) == 1:
        yield True
        return
    distributed = importlib.import_module("torch.distributed")
    distributed.init_process_group("gloo")
    try:
        yield distributed.get_rank() == 0
    finally:  # Threads of the group that still run at exit may abort the process.
        distributed.destroy_process_group()


def _judge(rules: list[Rule], report: AuditReport, console: Console) -> int:
    return max((_judge_one(rule, report, console) for rule in rules), default=0)


def _judge_one(rule: Rule, report: AuditReport, console: Console) -> int:
    found = violations([rule], report.layers)
    for violation in found:
        word = "fails" if violation.certain else "cannot be decided"
        say(console, f'"{rule.text}" {word} at {violation.layer}: {violation.text}')
    if any(violation.certain for violation in found):
        return RULE_VIOLATED
    if len(found) == len(report.layers):
        say(console, f'"{rule.text}" fails: it cannot be decided at any layer')
        return RULE_VIOLATED
    return 0


def max_bytes(gib: float) -> int:
    """The limit of ``--max-gib`` in bytes."""
    if not 2**-30 <= gib < math.inf:
        raise ValueError(f"expected --max-gib to be positive and finite, got {gib}")
    if gib >= 2**33:
        raise ValueError(f"expected --max-gib to be below 2**33, what 64 bits address, got {gib}")
    return int(gib * 2**30)


def _rule(text: str) -> Rule:
    try:
        return parse_rule(text)
    except ValueError as error:
        raise argparse.ArgumentTypeError(str(error)) from error
