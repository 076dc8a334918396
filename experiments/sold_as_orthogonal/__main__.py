"""``python -m experiments.sold_as_orthogonal``: builds each layer, audits it, writes the page."""

from __future__ import annotations

import argparse
import shlex
import sys
from collections.abc import Sequence
from pathlib import Path

import torch
from rich.console import Console

import convspectra as cs
from common.measure import machine, timed
from convspectra.figures import save_figure, write_texts
from experiments.sold_as_orthogonal import table
from experiments.sold_as_orthogonal.layers import (
    CANDIDATES,
    Candidate,
    NotInstalledError,
    circular,
    reshaped,
)

OUT = Path("docs/experiments/sold_as_orthogonal")
"""Where the page is written."""


def audit(candidate: Candidate, channels: int, size: int, seed: int) -> table.Row:
    """Build one layer and compute both of its ends."""
    row = table.Row(candidate.name, candidate.claim, channels, size, seed)
    try:
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(seed)
            weight = candidate.build(channels, size)
    except NotInstalledError as error:
        return table.Row(**{**vars(row), "note": str(error)})
    op = cs.ConvOperator(weight, (size, size))
    seconds, (largest, smallest) = timed(
        lambda: [cs.svds(op, 1, which, return_singular_vectors=False) for which in ("LM", "SM")]
    )
    found = {
        "converged": largest.converged and smallest.converged,
        "method": f"{largest.method}, {smallest.method}",
        "seconds": seconds,
    }
    for name, result in (("sigma_max", largest), ("sigma_min", smallest)):
        found[name] = float(result.s[0])
        found[f"{name}_lower"] = float(result.lower[0])
        found[f"{name}_upper"] = float(result.upper[0])
    for kind, values in (("reshaped", reshaped), ("circular", circular)):
        s = values(weight, size)
        found[f"{kind}_max"], found[f"{kind}_min"] = float(s.max()), float(s.min())
    if candidate.claimed is not None:
        s = candidate.claimed(weight, size)
        found["claimed_max"], found["claimed_min"] = float(s.max()), float(s.min())
    return table.Row(**{**vars(row), **found})


def main(argv: Sequence[str] | None = None) -> list[table.Row]:
    """Parse the arguments, audit every layer and write CSV, page and figure; returns the rows."""
    arguments = sys.argv[1:] if argv is None else list(argv)
    parser = argparse.ArgumentParser(
        prog="python -m experiments.sold_as_orthogonal",
        description="Singular values of orthogonal and normalized layers as they are applied.",
    )
    parser.add_argument("--quick", action="store_true", help="4 channels at 6 x 6 and 7 x 7")
    parser.add_argument("--out", type=Path, default=OUT, help="folder of the results")
    args = parser.parse_args(arguments)
    channels, sizes = (4, (6, 7)) if args.quick else (64, (8, 32))
    console = Console(stderr=True)
    rows = []
    for size in sizes:
        for candidate in CANDIDATES:
            for seed in range(3):
                rows.append(audit(candidate, channels, size, seed))
                row = rows[-1]
                console.print(
                    f"{size} x {size}, {row.layer}, seed {seed}: "
                    f"{row.note or f'sigma_max {row.sigma_max:.4g}, sigma_min {row.sigma_min:.4g}'}"
                )
    command = shlex.join(["python", "-m", "experiments.sold_as_orthogonal", *arguments])
    texts = {
        "sold_as_orthogonal.csv": table.csv_text(rows),
        "sold_as_orthogonal.md": table.page(rows, machine(), command),
    }
    write_texts(texts, args.out)
    save_figure(table.draw(rows), args.out / "sold_as_orthogonal")
    return rows


if __name__ == "__main__":
    main()
