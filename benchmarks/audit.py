"""The cost of an audit over the spectra engine, for the 53 convolutions of a ResNet-50 at 224x224.

``python -m benchmarks.audit`` takes each layer with random weights and a random batch normalization
after it. It computes both ends of the spectrum by `svds`, of the layer and of the layer with the
normalization folded in: two matrices. Then it audits the layer (with ``--order audit-first`` the
other way round), and writes ``audit.json`` and ``audit.md``. The audit adds the logarithm of the
volume and the rank of both, and what circular padding would give. Also timed: ``convspectra
--help`` in fresh processes.
"""

from __future__ import annotations

import argparse
import json
import shlex
import subprocess
import sys
from collections.abc import Sequence
from functools import partial
from pathlib import Path
from typing import Any

import torch
from rich.console import Console
from rich.progress import track

import convspectra as cs
from benchmarks.layers import resnet50
from common.measure import machine, peak_bytes, timed
from convspectra.auditing._layer_audit import TOLERANCE, AuditOptions, audit_layer
from convspectra.figures import write_texts
from convspectra.models._named_operators import NamedOperator
from convspectra.operator._convolution import scaled_outputs
from convspectra.text import markdown_table

HELP = "import sys; from convspectra.cli import main; sys.exit(main(['--help']))"
"""The program that starts the command for its help alone."""
STARTS = 5
"""Starts of it, of which the fastest counts. A choice: the first one reads files from the disk."""


def both_ends(op: cs.ConvOperator) -> None:
    """The engine's share of an audit, alone."""
    for which in ("LM", "SM"):
        cs.svds(op, 1, which, return_singular_vectors=False, tol=TOLERANCE)


def measured(width: int, size: int, audit_first: bool, console: Console) -> list[dict[str, Any]]:
    """Seconds of both for every layer, one after the other."""
    rows = []
    for layer in track(resnet50(width, size), console=console, description="ResNet-50"):
        op = layer.operator()
        scale = 0.5 + torch.rand(op.output_shape[0], dtype=torch.float64)
        folded = op.with_weight(scaled_outputs(op.weight, scale, op.groups, op.transposed))
        named = NamedOperator(layer.name, "Conv2d", op, scale=scale, batch_norm="random")
        times, answers = {}, {}
        runs = {
            "engine": partial(both_ends, op),
            "engine, folded": partial(both_ends, folded),
            "audit": partial(audit_layer, named, None, AuditOptions()),
        }
        for name in reversed(runs) if audit_first else runs:
            times[name], answers[name] = timed(runs[name])
        found = answers["audit"]
        numbers = found.applied
        assert numbers is not None, found.skipped
        rows.append(
            {
                "layer": layer.name,
                **{name: times[name] for name in runs},
                "sigma_max": numbers.sigma_max.value,
                "sigma_min": numbers.sigma_min.value,
                "enclosed": numbers.sigma_max.enclosed and numbers.sigma_min.enclosed,
                "growth": numbers.log_growth,
                "growth by": numbers.log_growth_method,
            }
        )
    return rows


def start_up() -> float:
    """Seconds of the command's help in a fresh process, the best of a few."""
    command = [sys.executable, "-c", HELP]
    times = [timed(lambda: subprocess.run(command, capture_output=True, check=True))[0]
             for _ in range(STARTS)]  # fmt: skip
    return min(times)


def main(argv: Sequence[str] | None = None) -> dict[str, Any]:
    """Measure, print and write."""
    arguments = sys.argv[1:] if argv is None else list(argv)
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--width", type=int, default=64, help="64 in the original")
    parser.add_argument("--size", type=int, default=224, help="224 in the original")
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--order", choices=("engine-first", "audit-first"), default="engine-first")
    parser.add_argument("--out", type=Path, default=Path("docs/benchmarks"))
    args = parser.parse_args(arguments)
    torch.set_num_threads(args.threads)
    console = Console(stderr=True)
    rows = measured(args.width, args.size, args.order == "audit-first", console)
    engine, folded, audit = (
        sum(row[name] for row in rows) for name in ("engine", "engine, folded", "audit")
    )
    facts = {
        "command": shlex.join(["python", "-m", "benchmarks.audit", *arguments]),
        "machine": machine(),
        "threads": args.threads,
        "layers": len(rows),
        "enclosed": sum(row["enclosed"] for row in rows),
        "engine seconds": round(engine, 2),
        "engine seconds, folded": round(folded, 2),
        "audit seconds": round(audit, 2),
        "ratio of the audit to the engine for both": round(audit / (engine + folded), 3),
        "peak GiB": round(peak_bytes() / 2**30, 2),
        "seconds of convspectra --help": round(start_up(), 3),
    }
    shown = [{key: f"{v:.4g}" if isinstance(v, float) else v for key, v in row.items()}
             for row in rows]  # fmt: skip
    listed = "\n".join(f"- {name}: {value}" for name, value in facts.items())
    page = f"# What an audit costs\n\n{listed}\n\n{markdown_table(list(rows[0]), shown)}"
    text = json.dumps(facts | {"rows": rows}, indent=1) + "\n"
    write_texts({"audit.json": text, "audit.md": page}, args.out)
    console.print(listed)
    return facts


if __name__ == "__main__":
    main()
