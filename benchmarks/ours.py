"""Measurements of convspectra itself for `benchmarks.spectra`, each to run in its own process.

Functions take and return what JSON can carry. Times of one function are comparable with each
other: what is compared runs alternately in one process, the best of `repeats` of each.
"""

from __future__ import annotations

import csv
import math
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import torch

import convspectra as cs
from benchmarks.layers import find, random_layer, resnet50
from benchmarks.peers import lanczos_float32
from common.measure import timed

RESNET_COLUMNS = (
    "layer", "rows", "columns", "which", "value", "lower", "upper", "residual", "converged",
    "certified", "method", "matvecs", "seconds", "note",
)  # fmt: skip
"""Columns of the file about a ResNet-50."""


def smallest(
    layer: str, seed: int = 0, repeats: int = 1, lu_order: int | None = None
) -> dict[str, Any]:
    """sigma_min, as `cs.sigma_min` asks for it; with `lu_order` also the time of such an LU."""
    op = find(layer).operator(seed)
    matrix = None if lu_order is None else torch.randn(lu_order, lu_order, dtype=torch.float64)
    ours, lus = [], []
    for _ in range(repeats):
        seconds, result = timed(partial(cs.svds, op, 1, "SM", return_singular_vectors=False))
        ours.append(seconds)
        if matrix is not None:
            lus.append(timed(partial(torch.linalg.lu_factor, matrix))[0])
    return {**_answer(result), "seconds": min(ours), "lu_seconds": min(lus, default=None)}


def largest(layer: str, seed: int = 0, repeats: int = 1) -> dict[str, Any]:
    """sigma_max, as `cs.sigma_max` asks for it, and the time of 200 plain float32 Lanczos steps."""
    op = find(layer).operator(seed)
    options = {"tol": 1e-6, "return_singular_vectors": False}
    ours, plain = [], []
    for _ in range(repeats):
        seconds, result = timed(partial(cs.svds, op, 1, "LM", **options))
        ours.append(seconds)
        plain.append(timed(partial(lanczos_float32, op))[0])
    return {**_answer(result), "seconds": min(ours), "plain_seconds": min(plain)}


def norm_bound(layer: str, seed: int = 0, repeats: int = 1) -> dict[str, Any]:
    """The upper bound on sigma_max that needs no iteration."""
    op = find(layer).operator(seed)
    runs = [timed(partial(cs.norm_bound, op)) for _ in range(repeats)]
    return {"value": runs[0][1], "seconds": min(seconds for seconds, _ in runs)}


def ten_and_ten(layer: str, seed: int = 0, tol: float = 1e-6, repeats: int = 1) -> dict[str, Any]:
    """The 10 largest and the 10 smallest with vectors, to residuals of `tol`."""
    op = find(layer).operator(seed)
    runs = [
        timed(lambda: [cs.svds(op, 10, w, tol=tol) for w in ("LM", "SM")]) for _ in range(repeats)
    ]
    results = runs[0][1]
    return {
        "seconds": min(seconds for seconds, _ in runs),
        "values": {
            name: result.s.tolist()
            for name, result in zip(("10 largest", "10 smallest"), results, strict=True)
        },
        "applications": sum(result.matvecs for result in results),
        "converged": all(result.converged for result in results),
        "method": " and ".join(result.method for result in results),
    }


def resnet(path: str, width: int = 64, size: int = 224, seed: int = 0) -> dict[str, Any]:
    """Both ends of every convolution of a ResNet-50; rows are written to `path` as they come."""
    total = 0.0
    with Path(path).open("w", newline="", encoding="utf-8") as file:
        writer = csv.DictWriter(file, RESNET_COLUMNS, lineterminator="\n")
        writer.writeheader()
        for layer in resnet50(width, size):
            op = layer.operator(seed)
            for which, tol in (("LM", 1e-6), ("SM", 1e-8)):
                options = {"tol": tol, "return_singular_vectors": False}
                seconds, row = timed(partial(certified, op, which, **options))
                total += seconds
                rows, columns = op.shape
                row |= {"layer": layer.name, "rows": rows, "columns": columns, "seconds": seconds}
                writer.writerow(row)
                file.flush()
    return {"seconds": total}


def certified(op: cs.ConvOperator, which: str, **options: Any) -> dict[str, Any]:
    """One singular value with its certificate as a row; an exception is a row with its reason."""
    row: dict[str, Any] = {"which": which, "converged": False, "certified": False}
    try:
        result = cs.svds(op, 1, which, **options)
    except Exception as error:  # its row in the table
        return row | {"note": f"{type(error).__name__}: {error}"}
    lower, upper = float(result.lower[0]), float(result.upper[0])
    return row | {
        "value": float(result.s[0]),
        "lower": lower,
        "upper": upper,
        "residual": float(result.residuals[0]),
        "converged": result.converged,
        "certified": upper < math.inf and (lower > 0 or upper == 0),
        "method": result.method,
        "matvecs": result.matvecs,
    }


def growth(
    channels: list[int], sizes: list[int], dense: bool = False, seed: int = 0, repeats: int = 3
) -> dict[str, Any]:
    """Time of sigma_min along one of `channels` and `sizes` (the other has one entry)."""
    seconds, values = [], []
    for count in channels:
        for size in sizes:
            op = random_layer(count, count, 3, size).operator(seed)
            run = partial(_dense_smallest if dense else _certified_smallest, op)
            taken = [timed(run) for _ in range(repeats)]
            seconds.append(min(time for time, _ in taken))
            values.append(taken[-1][1])
    varied = channels if len(channels) > 1 else sizes
    exponent = np.polyfit(np.log(varied), np.log(seconds), 1)[0]
    return {"sizes": varied, "times": seconds, "smallest": values, "exponent": float(exponent)}


def _certified_smallest(op: cs.ConvOperator) -> float:
    return float(cs.svds(op, 1, "SM", return_singular_vectors=False).s[0])


def _dense_smallest(op: cs.ConvOperator) -> float:
    return float(torch.linalg.svdvals(op.to_dense()).min())


def _answer(result: cs.SVDResult) -> dict[str, Any]:
    return {
        "value": float(result.s[0]),
        "lower": float(result.lower[0]),
        "upper": float(result.upper[0]),
        "applications": result.matvecs,
        "converged": result.converged,
        "method": result.method,
    }
