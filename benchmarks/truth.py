"""Every way to singular values, compared with a dense SVD on random layers of all options.

``python -m benchmarks.truth --layers 2000 --seed 0 [--workers 2] [--out docs/benchmarks]``;
``--only I`` reruns one layer and prints every value. The last row is that of `count`. The reference
is LAPACK's SVD of the layer applied to the identity, in float64, scaled by a power of two; where it
disagrees with a value by more than 1e-9 it is recomputed by one-sided Jacobi rotations in extended
precision. Enclosures, and the bound on the values not asked for, are allowed the reference's own
error, max(m, n) eps sigma_max. Values under 1e-7 sigma_max count for the enclosures only. Exit code
1 for an error over 1e-8, an enclosure missed, vectors that are wrong, or an unexpected exception.
"""

from __future__ import annotations

import argparse
import json
import math
import multiprocessing
import os
import time
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import ProcessPoolExecutor
from dataclasses import asdict, dataclass
from functools import partial
from pathlib import Path

import numpy as np
import torch
from rich import box
from rich.console import Console
from rich.progress import track
from rich.table import Table

import convspectra as cs
from benchmarks.random_layers import RandomLayer, random_layer
from convspectra.spectra import _auto as auto
from convspectra.spectra import _count as counting
from convspectra.testing import naive_dense

EPS = float(np.finfo(float).eps)
"""The relative spacing of doubles."""
WORST_ERROR = 1e-8
"""Relative error of a value above which a way has failed. A choice."""
SMALLEST_COMPARED = 1e-7
"""Parts of sigma_max: below, a dense SVD itself is not sure of the digits that are compared."""
DOUBTFUL_ERROR = 1e-9
"""Relative error above which the dense SVD is done again with more digits before anybody is
blamed. A choice."""
WORST_VECTORS = 1e-10
"""Residual of vectors, in parts of sigma_max, above which a way has failed. A choice."""


@dataclass(frozen=True)
class Outcome:
    """The answer of one way for one layer; `error` is the worst relative error of its values."""

    index: int
    way: str
    status: str  # converged, not converged, refused or crashed
    values: int = 0
    compared: int = 0
    error: float = 0.0
    missed: int = 0
    wrong_vectors: float = 0.0
    seconds: float = 0.0
    message: str = ""

    @property
    def failed(self) -> bool:
        """Whether the way claimed something that is not so."""
        return (
            self.error > WORST_ERROR
            or self.missed > 0
            or self.wrong_vectors > WORST_VECTORS
            or self.status == "crashed"
        )


class Truth:
    """The layer's matrix divided by a power of two, and its singular values, descending."""

    def __init__(self, layer: RandomLayer) -> None:
        weight = layer.weight.double()
        self.exponent = int(torch.frexp(weight.abs().max()).exponent)
        scaled = torch.ldexp(weight, torch.tensor(-self.exponent // 2))
        scaled = torch.ldexp(scaled, torch.tensor(-self.exponent - -self.exponent // 2))
        if layer.kind == "cancelling":
            self.matrix = _exact_dense(layer, scaled)
        else:
            self.matrix = naive_dense(layer.reference(scaled), layer.input_shape).numpy()
        self.values = np.linalg.svd(self.matrix, compute_uv=False)
        self.error = max(self.matrix.shape) * EPS * float(self.values[0])
        self.refined = False

    def scaled(self, x: torch.Tensor) -> np.ndarray:
        """Values of the layer as values of the scaled matrix."""
        half = -self.exponent // 2
        return (x.double() * 2.0**half * 2.0 ** (-self.exponent - half)).numpy()

    def refine(self) -> None:
        """Recompute the values in extended precision, once."""
        if not self.refined:
            self.values, self.refined = extended_svdvals(self.matrix), True


def _exact_dense(layer: RandomLayer, weight: torch.Tensor) -> np.ndarray:
    """The matrix with every entry the correctly rounded sum of its taps."""
    taps = weight.flatten(2)
    parts = []
    for tap in range(taps.shape[2]):
        alone = torch.zeros_like(taps)
        alone[..., tap] = taps[..., tap]
        parts.append(naive_dense(layer.reference(alone.reshape(weight.shape)), layer.input_shape))
    together = torch.stack(parts).numpy()
    matrix = together.sum(0)
    for entry in np.argwhere((together != 0).sum(0) > 1):
        matrix[tuple(entry)] = math.fsum(together[(slice(None), *entry)])
    return matrix


def extended_svdvals(matrix: np.ndarray, sweeps: int = 12) -> np.ndarray:
    """Singular values by one-sided Jacobi in extended precision, from LAPACK's vectors.

    Error about 1e-19 sigma_max where long double has 64 bits; no better than LAPACK where it
    does not.
    """
    tall = matrix if matrix.shape[0] >= matrix.shape[1] else matrix.T
    start = np.linalg.svd(tall, full_matrices=False)[2].T
    vectors, triangle = np.linalg.qr(start)
    vectors = vectors * np.sign(np.diag(triangle))
    columns = tall.astype(np.longdouble) @ _orthonormal(vectors.astype(np.longdouble))
    tolerance = 8 * np.finfo(np.longdouble).eps
    for _ in range(sweeps):
        gram = columns.T @ columns
        norms = np.sqrt(np.diag(gram))
        outer = np.multiply.outer(norms, norms)
        floor = np.finfo(np.longdouble).eps * norms.max() * np.minimum.outer(norms, norms)
        pairs = np.argwhere(np.triu(np.abs(gram) > np.maximum(tolerance * outer, floor), 1))
        if len(pairs) == 0:
            break
        for i, j in pairs:
            _rotate(columns, i, j)
    return np.sort(np.sqrt((columns * columns).sum(0)))[::-1].astype(float)


def _orthonormal(vectors: np.ndarray) -> np.ndarray:
    """Two Newton steps to the nearest orthogonal matrix."""
    identity = np.eye(vectors.shape[1], dtype=vectors.dtype)
    for _ in range(2):
        vectors = vectors @ (identity + (identity - vectors.T @ vectors) / 2)
    return vectors


def _rotate(columns: np.ndarray, i: int, j: int) -> None:
    x, y = columns[:, i].copy(), columns[:, j].copy()
    inner, first, second = x @ y, x @ x, y @ y
    if inner == 0:
        return
    ratio = (second - first) / (2 * inner)
    tangent = 1 / (abs(ratio) + np.sqrt(1 + ratio * ratio))
    tangent = tangent if ratio >= 0 else -tangent
    cosine = 1 / np.sqrt(1 + tangent * tangent)
    columns[:, i] = cosine * (x - tangent * y)
    columns[:, j] = cosine * (y + tangent * x)


def outcomes(index: int, seed: int, small_work: float | None = None) -> list[Outcome]:
    """Every way of svds on layer `index`."""
    torch.set_num_threads(1)
    if small_work is not None:
        auto.SMALL_WORK = small_work
    layer = random_layer(seed, index)
    op, truth = layer.operator(), Truth(layer)
    k = 1 + index % min(4, min(op.shape))
    by_svds = [
        _outcome(index, op, truth, which, method, k)
        for which in ("LM", "SM")
        for method in auto.METHODS[which]
    ]
    return [*by_svds, _counts(index, op, truth, small_work is not None)]


def _counts(index: int, op: cs.ConvOperator, truth: Truth, by_inertia: bool) -> Outcome:
    """Counts at the exact middle between neighboring values, and at the values themselves.

    `missed` says how many bounds do not hold; it has converged where all counts at middles are
    exact. Middles whose neighbors rounding does not tell apart are left out.
    """
    if by_inertia:
        counting.DENSE_WORK = 0.0
    start = time.perf_counter()
    values = truth.values
    places = sorted({0, len(values) // 3, len(values) - 1, index % len(values)})
    asked = missed = inexact = 0
    for place in places:
        below = values[place + 1] if place + 1 < len(values) else 0.0
        middle, distance = (values[place] + below) / 2, (values[place] - below) / 2
        for s in (values[place], middle):
            near = np.abs(values - s) <= 2 * truth.error
            if s <= 2 * truth.error or (s == middle and distance <= 2 * truth.error):
                continue
            result = cs.count(op, math.ldexp(s, truth.exponent))
            sure = int((values[~near] > s).sum())
            asked += 1
            missed += not (result.least <= sure + int(near.sum()) and sure <= result.most)
            inexact += s == middle and not result.exact
    return Outcome(
        index,
        "count",
        "not converged" if inexact else "converged",
        values=asked,
        missed=missed,
        seconds=time.perf_counter() - start,
    )


def _outcome(
    index: int, op: cs.ConvOperator, truth: Truth, which: str, method: str, k: int
) -> Outcome:
    start = time.perf_counter()
    way = f"{which} {method}"
    try:
        result = cs.svds(op, k, which, method=method)
    except Exception as error:
        expected = method != "auto" and isinstance(error, (ValueError, ArithmeticError))
        status = "refused" if expected else "crashed"
        return Outcome(index, way, status, message=f"{type(error).__name__}: {error}")
    seconds = time.perf_counter() - start
    s, lower, upper = (truth.scaled(x) for x in (result.s, result.lower, result.upper))
    compared = _true_values(truth, which, k) >= SMALLEST_COMPARED * truth.values[0]
    compared &= result.converged and truth.values[0] > 0
    error = _error(s, _true_values(truth, which, k), compared)
    if error > DOUBTFUL_ERROR:
        truth.refine()
        error = _error(s, _true_values(truth, which, k), compared)
    true = _true_values(truth, which, k)
    held = (lower <= true + truth.error) & (upper >= true - truth.error)
    return Outcome(
        index,
        way,
        "converged" if result.converged else "not converged",
        values=k,
        compared=int(compared.sum()),
        error=error,
        missed=int(k - held.sum()) + (not _others_hold(truth, which, k, result.others)),
        wrong_vectors=_wrong_vectors(result, truth) if result.converged else 0.0,
        seconds=seconds,
        message=f"{result.method}: s {s}, true {true}, lower {lower}, upper {upper}",
    )


def _true_values(truth: Truth, which: str, k: int) -> np.ndarray:
    return truth.values[:k] if which == "LM" else truth.values[::-1][:k]


def _others_hold(truth: Truth, which: str, k: int, others: float) -> bool:
    """Whether every value that is not among the k keeps to the bound on it."""
    if k == len(truth.values):
        return True
    bound = float(truth.scaled(torch.tensor(others, dtype=torch.float64)))
    if which == "LM":
        return bound >= truth.values[k] - truth.error
    return bound <= truth.values[-1 - k] + truth.error


def _error(s: np.ndarray, true: np.ndarray, compared: np.ndarray) -> float:
    if not compared.any():
        return 0.0
    worst = np.max(np.abs(s[compared] - true[compared]) / true[compared])
    return float(worst) if math.isfinite(worst) else math.inf


def _wrong_vectors(result: cs.SVDResult, truth: Truth) -> float:
    """Loss of orthonormality, or how far the residuals are from what they are said to be."""
    if result.u is None or result.v is None:
        return math.inf
    u, v = result.u.flatten(1).numpy(), result.v.flatten(1).numpy()
    identity = np.eye(len(u))
    loss = max(np.abs(u @ u.T - identity).max(), np.abs(v @ v.T - identity).max())
    s = truth.scaled(result.s)[:, None]
    forward, adjoint = v @ truth.matrix.T - s * u, u @ truth.matrix - s * v
    residuals = np.sqrt((forward**2).sum(1) + (adjoint**2).sum(1))
    difference = np.abs(residuals - truth.scaled(result.residuals)).max()
    return float(max(loss, difference / truth.values[0] if truth.values[0] > 0 else difference))


def _all_outcomes(
    indices: Iterable[int], one: Callable[[int], list[Outcome]], workers: int
) -> Iterator[list[Outcome]]:
    if workers == 1:
        yield from map(one, indices)
        return
    os.environ["OMP_NUM_THREADS"] = os.environ["OPENBLAS_NUM_THREADS"] = "1"  # of the workers
    # Unlike a multiprocessing.Pool this raises when a worker is killed, and waits for no answer.
    with ProcessPoolExecutor(workers, multiprocessing.get_context("spawn")) as pool:
        yield from pool.map(one, indices, chunksize=8)


def summaries(found: list[Outcome], seed: int) -> list[dict[str, object]]:
    """One row a way: counts, worst relative error, enclosures missed, and the worst layer."""
    rows = []
    for way in dict.fromkeys(outcome.way for outcome in found):
        mine = [outcome for outcome in found if outcome.way == way]
        worst = max(mine, key=lambda outcome: (outcome.error, -outcome.index))
        counts = {
            status: sum(outcome.status == status for outcome in mine)
            for status in ("converged", "not converged", "refused", "crashed")
        }
        rows.append(
            {
                "way": way,
                "values": sum(outcome.values for outcome in mine),
                "compared": sum(outcome.compared for outcome in mine),
                "error": worst.error,
                "missed": sum(outcome.missed for outcome in mine),
                "vectors": max(outcome.wrong_vectors for outcome in mine),
                **counts,
                "seconds": sum(outcome.seconds for outcome in mine),
                "worst layer": f"--only {worst.index}: {random_layer(seed, worst.index)}",
            }
        )
    return rows


def _print(console: Console, rows: list[dict[str, object]], failures: list[Outcome]) -> None:
    table = Table(*[name for name in rows[0] if name != "worst layer"], box=box.SIMPLE)
    for row in rows:
        cells = [value for name, value in row.items() if name != "worst layer"]
        table.add_row(*[f"{x:.1e}" if isinstance(x, float) else str(x) for x in cells])
    console.print(table)
    for row in rows:
        console.print(f"{row['way']}: worst at {row['worst layer']}", highlight=False, markup=False)
    for outcome in failures[:20]:
        console.print(
            f"FAILED --only {outcome.index} {outcome.way}: error {outcome.error:.1e}, missed "
            f"{outcome.missed}, vectors {outcome.wrong_vectors:.1e}, {outcome.message}",
            highlight=False,
            markup=False,
        )


def main(argv: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--layers", type=int, default=2000)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--workers", type=int, default=2)
    parser.add_argument("--only", type=int, metavar="I", help="one layer, with every value")
    parser.add_argument(
        "--small-work",
        type=float,
        metavar="FLOPS",
        help="another auto.SMALL_WORK: with 0, auto goes the ways that it has for large layers",
    )
    parser.add_argument("--out", type=Path, help="folder for truth.json")
    args = parser.parse_args(argv)
    console = Console()
    indices = range(args.layers) if args.only is None else [args.only]
    workers = args.workers if args.only is None else 1
    one = partial(outcomes, seed=args.seed, small_work=args.small_work)
    done = track(_all_outcomes(indices, one, workers), "layers", len(indices), console=console)
    found = sorted((one for many in done for one in many), key=lambda one: one.index)
    if args.only is not None:
        console.print(random_layer(args.seed, args.only), highlight=False)
        for outcome in found:
            console.print(outcome, highlight=False, markup=False)
    rows = summaries(found, args.seed)
    failures = [outcome for outcome in found if outcome.failed]
    _print(console, rows, failures)
    console.print(f"{len(indices)} layers of seed {args.seed}, {len(failures)} failures")
    if args.out:
        args.out.mkdir(parents=True, exist_ok=True)
        report = {"layers": len(indices), "seed": args.seed, "ways": rows,
                  "failures": [asdict(outcome) for outcome in failures]}  # fmt: skip
        (args.out / "truth.json").write_text(json.dumps(report, indent=1) + "\n")
    return 1 if failures else 0


if __name__ == "__main__":
    raise SystemExit(main())
