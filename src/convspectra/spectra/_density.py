"""The distribution of all singular values of a layer: counted where that is affordable, otherwise
estimated with an error.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Protocol

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

from convspectra.operator import (
    DEFAULT_MAX_BYTES,
    ConvOperator,
    LinearOperatorLike,
    Product,
    check_bytes,
    check_choice,
    check_operator,
    check_positive_integer,
    is_circulant,
    normalized,
    not_compiled,
)
from convspectra.solvers import (
    Tridiagonals,
    bin_fractions,
    gauss_rules,
    mean_log,
    random_directions,
    tridiagonals,
)
from convspectra.spectra._by_products import ScaledRows
from convspectra.spectra._circular_padding import circular_operator
from convspectra.spectra._count import ByInertia, ByValues, counter_of
from convspectra.spectra._parts import Part, parts
from convspectra.text import html_table
from convspectra.torus import half_frequencies, symbols_at

FloatArray = npt.NDArray[np.float64]

METHODS = ("auto", "exact", "count", "quadrature", "circular")
"""The names that `spectral_density(method=...)` takes."""
AFFORDABLE_FLOPS = 2e10
"""About two seconds of one core, for all singular values by dense decompositions."""
SAMPLE_FLOPS = 1e10
"""Flops for a random sample of symbols of a large circulant: a second of one core; a choice. Half
of it makes errors larger by the square root of 2."""
LOWEST_EDGE = 1e-4
"""Where the first bin of all ends at the lowest, relative to the largest value."""
LEAST_FREQUENCIES = 8
"""The smallest sample of symbols: fewer give no error that means anything; a choice."""
LEAST_QUADRATURE = 1024
"""Products, one for each value, up to which an operator of which only products are known is formed.
A choice: a quadrature takes 400, and has an error."""

BAR, BAR_LENGTH = "\N{FULL BLOCK}", 30
"""The histogram in a notebook's table: a choice, the length is that of a narrow column."""


@dataclass(frozen=True)
class SpectralDensity:
    """How the min(rows, columns) singular values of a layer are distributed.

    Attributes
    ----------
    edges : tuple of float
        Ascending, one more than there are bins. A bin has its lower edge; what lies beyond the
        first or the last edge counts for the bin there.
    fractions : tuple of float
        Part of the singular values in each bin; they sum to 1.
    errors : tuple of float
        Standard error of each fraction; 0 where they were counted, except where a singular value
        lies within rounding of an edge: half of what that leaves open.
    mean_log : float
        Mean of log s; -inf where one is 0, to working precision.
    mean_log_error : float
        Its standard error; inf where the quadrature cannot tell values from 0.
    method : str
        "exact", "count", "quadrature" or "sampled" (some frequencies of a circulant), several
        joined by "+" where blocks of the layer differ; with "circular: " before it for the circular
        layer.
    probes : int
        Random vectors of a quadrature, of which the mean logarithm is with "count"; else 0.
    products : int
        Applications of M and M' taken together.

    Examples
    --------
    >>> import torch, convspectra as cs
    >>> density = cs.spectral_density(cs.ConvOperator(torch.ones(1, 1, 3), 50), edges=[0, 1, 3])
    >>> density.fractions, density.method
    ((0.5, 0.5), 'exact')
    >>> density
    SpectralDensity(2 bins from 0 to 3, mean_log=-inf, method='exact')
    """

    edges: tuple[float, ...]
    fractions: tuple[float, ...]
    errors: tuple[float, ...]
    mean_log: float
    mean_log_error: float
    method: str
    probes: int
    products: int

    def __repr__(self) -> str:
        bins, first, last = len(self.fractions), self.edges[0], self.edges[-1]
        error = f" ± {self.mean_log_error:.1g}" if self.mean_log_error else ""
        return (
            f"SpectralDensity({bins} bins from {first:.4g} to {last:.4g}, "
            f"mean_log={self.mean_log:.4g}{error}, method={self.method!r})"
        )

    def _repr_html_(self) -> str:
        whole = max(self.fractions) or 1.0
        rows = [
            {
                "from": f"{low:.3g}",
                "to": f"{high:.3g}",
                "part": f"{part:.4f}" + (f" ± {error:.0e}" if error else ""),
                "": BAR * round(BAR_LENGTH * part / whole),
            }
            for low, high, part, error in zip(
                self.edges, self.edges[1:], self.fractions, self.errors, strict=False
            )
            if part > 0
        ]
        return html_table(rows, repr(self))


@not_compiled
def spectral_density(
    op: ConvOperator | LinearOperatorLike,
    bins: int = 60,
    *,
    edges: Sequence[float] | None = None,
    method: str = "auto",
    probes: int = 4,
    steps: int = 50,
    max_bytes: int = DEFAULT_MAX_BYTES,
    generator: torch.Generator | None = None,
) -> SpectralDensity:
    """The distribution of all singular values of a layer, in bins, and their mean logarithm.

    Parameters
    ----------
    op : ConvOperator
        Any layer; computed in float64. Or a `JacobianOperator`, or whatever has its products in
        float64.
    bins : int
        The first one from 0, the others evenly spaced in log s from the smallest value, but at
        least 1e-4 of the largest, to the largest.
    edges : sequence of float, optional
        In the place of `bins`: non-negative, ascending.
    method : {"auto", "exact", "count", "quadrature", "circular"}
        "exact" computes all singular values of the independent blocks of the layer, or of the
        symbols of a circulant; "count" does that where it is a matter of two seconds, and else
        counts the values below each edge as `count` does, exactly: for a few edges of a large
        layer; "quadrature" runs stochastic Lanczos quadrature on the smaller Gram
        matrix; "auto" takes "exact" where it is a matter of two seconds (of a large circulant,
        some symbols). "circular" is for another layer: that of the same weight with circular
        padding on the torus of the input.
    probes : int
        Random vectors of the quadrature: errors go down with the square root.
    steps : int
        Lanczos steps from each: how fine a structure is resolved, about 1 / steps of the norm.
    max_bytes : int
        Limit on dense matrices, symbols and the Lanczos basis.
    generator : torch.Generator, optional
        Without it random vectors come from a fixed seed.

    Returns
    -------
    SpectralDensity

    Raises
    ------
    ValueError
        For options that cannot be, matrices over `max_bytes`, or "circular" for a layer that does
        not fit on a torus.

    Notes
    -----
    The errors of the quadrature join those of the random vectors and those of the finite number of
    steps, as far as nodes and weights tell of them: three of them hold the truth for more than 99%
    of bins. Below the first node nothing is resolved: the smallest values are not what it is for.
    The mean log lies between two quadrature rules if no singular value is below 2e-16 of the
    norm. For square layers with zero padding and stride 1 ``logabsdet(op) / op.shape[0]`` is
    exact. Cost: "exact" ``4 m n min(m, n)`` flops a block, 16 for a symbol; "quadrature" 2 probes
    steps convolutions, "count" as much, for the mean log, and two factorizations for each edge
    between two bins; quadrature takes ``8 probes steps min(m, n)`` bytes.

    Examples
    --------
    >>> import torch, convspectra as cs
    >>> op = cs.ConvOperator(torch.tensor([[[[0.0, 1, 0], [1, -4, 1], [0, 1, 0]]]]), (32, 32))
    >>> true = cs.spectral_density(op, edges=[0, 2, 4, 6, 8], method="exact")
    >>> found = cs.spectral_density(op, edges=[0, 2, 4, 6, 8], method="quadrature")
    >>> errors = [abs(a - b) for a, b in zip(true.fractions, found.fractions)]
    >>> all(error <= 3 * bar for error, bar in zip(errors, found.errors))
    True
    """
    check_operator("op", op)
    check_choice("method", method, METHODS)
    for name, value in (("bins", bins), ("probes", probes), ("steps", steps)):
        check_positive_integer(name, value)
    given = None if edges is None else _checked(edges)
    random = generator or torch.Generator(device=op.device).manual_seed(0)
    layer = _on_its_torus(op) if method == "circular" else op
    if isinstance(layer, ConvOperator):
        spectra, counts, exponent = _of_layer(layer, method, probes, steps, max_bytes, random)
    else:
        spectra, counts, exponent = _by_products(layer, method, probes, steps, max_bytes, random)
    count = min(layer.shape)
    zeros = count - sum(counts)
    shift = exponent or 0
    points = _default_edges(spectra, bins) if given is None else np.ldexp(given, -shift)
    fractions, variances = np.zeros(len(points) - 1), np.zeros(len(points) - 1)
    fractions[max(int(np.searchsorted(points, 0.0, side="right")) - 1, 0)] = zeros / count
    logs, log_variance = (-math.inf if zeros else shift * math.log(2)), 0.0
    for values, spectrum in zip(counts, spectra, strict=True):
        share = values / count
        of_part, errors = spectrum.bins(points)
        fractions += share * of_part
        variances += (share * errors) ** 2
        log, error = spectrum.mean_log()
        logs, log_variance = logs + share * log, log_variance + (share * error) ** 2
    used = sorted({spectrum.method for spectrum in spectra})
    return SpectralDensity(
        edges=tuple(np.ldexp(points, shift).tolist() if given is None else given.tolist()),
        fractions=tuple((fractions / fractions.sum()).tolist()),
        errors=tuple(np.sqrt(variances).tolist()),
        mean_log=logs,
        mean_log_error=0.0 if math.isinf(logs) else math.sqrt(log_variance),
        method=("circular: " if method == "circular" else "") + ("+".join(used) or "exact"),
        probes=probes if {"quadrature", "count"} & set(used) else 0,
        products=sum(spectrum.products for spectrum in spectra),
    )


def _of_layer(
    op: ConvOperator,
    method: str,
    probes: int,
    steps: int,
    max_bytes: int,
    random: torch.Generator,
) -> tuple[list[_Spectrum], list[int], int | None]:
    """The spectra of the parts of a layer, how many values each stands for, and the exponent.

    Values that no part stands for are zeros.
    """
    scaled, exponent = normalized(op)
    found = parts(scaled)[0] if exponent is not None else []
    spectra: list[_Spectrum] = []
    for part in found:
        affordable = method == "exact" or part.flops <= AFFORDABLE_FLOPS / len(found)
        if is_circulant(part.op) and method in ("auto", "circular") and not affordable:
            spectra.append(_sampled(part, SAMPLE_FLOPS / len(found), max_bytes, random))
        elif method != "quadrature" and affordable:
            spectra.append(_counted(part, max_bytes))
        else:
            estimate = _estimated(part, probes, steps, max_bytes, random)
            by_count = method == "count"
            spectra.append(_ByCounts.of(part, estimate, max_bytes) if by_count else estimate)
    return spectra, [part.count for part in found], exponent


def _by_products(
    op: LinearOperatorLike,
    method: str,
    probes: int,
    steps: int,
    max_bytes: int,
    random: torch.Generator,
) -> tuple[list[_Spectrum], list[int], int | None]:
    """The same of an operator of which only its products are known, as one part."""
    if method == "count":
        raise ValueError(f"expected a ConvOperator for method='count', got {type(op).__name__}")
    rows = ScaledRows(op, random)
    if rows.exponent is None:
        return [], [], None
    order = rows.columns
    affordable = order <= LEAST_QUADRATURE and 4.0 * rows.rows * order**2 <= AFFORDABLE_FLOPS
    if method == "exact" or (method == "auto" and affordable):
        matrix = rows.dense(max_bytes)[None]
        return [_of_matrices(matrix, rows.like.new_ones(1), 1.0)], [order], rows.exponent
    steps = min(steps, order)
    check_bytes("the Lanczos basis", 8 * probes * steps * order, max_bytes)
    runs = tridiagonals(rows.gram, rows.random(probes, random), steps)
    return [_Estimate(runs, order, 2 * probes * runs.steps)], [order], rows.exponent


class _Spectrum(Protocol):
    """The knowledge of the singular values of one part of a layer."""

    @property
    def method(self) -> str: ...
    @property
    def products(self) -> int: ...
    @property
    def ends(self) -> tuple[float, float]: ...
    def bins(self, edges: FloatArray) -> tuple[FloatArray, FloatArray]: ...
    def mean_log(self) -> tuple[float, float]: ...


@dataclass(frozen=True)
class _Values:
    """Singular values of some of the matrices, (b, k), how often each stands, and part of them."""

    values: FloatArray
    copies: FloatArray
    part: float
    rounding: float
    products: int = 0

    @property
    def method(self) -> str:
        return "exact" if self.part == 1.0 else "sampled"

    @property
    def ends(self) -> tuple[float, float]:
        return float(self.values.min()), float(self.values.max())

    def bins(self, edges: FloatArray) -> tuple[FloatArray, FloatArray]:
        bins = len(edges) - 1
        places = np.clip(np.searchsorted(edges, self.values, side="right") - 1, 0, bins - 1)
        rows = np.arange(len(places))[:, None] * bins + places
        counts = np.bincount(rows.ravel(), minlength=len(places) * bins).reshape(-1, bins)
        return self._mean(counts / self.values.shape[1], 1 / self.values.size)

    def mean_log(self) -> tuple[float, float]:
        if self.ends[0] <= self.rounding * self.ends[1]:
            return -math.inf, 0.0
        mean, error = self._mean(np.log(self.values).mean(axis=1, keepdims=True), 0.0)
        return float(mean[0]), float(error[0])

    def _mean(self, rows: FloatArray, least: float) -> tuple[FloatArray, FloatArray]:
        """The mean of rows, one a matrix, with its error if the matrices are a random sample."""
        weights = self.copies / self.copies.sum()
        mean: FloatArray = weights @ rows
        if self.part == 1.0:
            return mean, np.zeros_like(mean)
        count = len(weights)
        square = weights**2 @ (rows - mean) ** 2 * count / (count - 1) + least**2
        return mean, np.sqrt((1 - self.part) * square)


@dataclass(frozen=True)
class _Estimate:
    """Lanczos runs on the smaller Gram matrix, of this order."""

    runs: Tridiagonals
    order: int
    products: int
    method: str = "quadrature"

    @property
    def ends(self) -> tuple[float, float]:
        rules = [rule.roots for rule in gauss_rules(self.runs, self.runs.steps)]
        return min(float(r.nodes[0]) for r in rules), max(float(r.nodes[-1]) for r in rules)

    def bins(self, edges: FloatArray) -> tuple[FloatArray, FloatArray]:
        return bin_fractions(self.runs, self.order, edges)

    def mean_log(self) -> tuple[float, float]:
        mean, error = mean_log(self.runs, self.order)
        return 0.5 * mean, 0.5 * error


@dataclass(frozen=True)
class _ByCounts:
    """Counts at the edges; the ends and the mean logarithm are those of an estimate."""

    counter: ByInertia | ByValues
    count: int
    estimate: _Estimate
    method: str = "count"

    @classmethod
    def of(cls, part: Part, estimate: _Estimate, max_bytes: int) -> _ByCounts:
        return cls(counter_of(part, max_bytes), part.count, estimate)

    @property
    def products(self) -> int:
        return self.estimate.products

    @property
    def ends(self) -> tuple[float, float]:
        return self.estimate.ends

    def bins(self, edges: FloatArray) -> tuple[FloatArray, FloatArray]:
        inner = [self.counter.at_least(edge) for edge in edges[1:-1].tolist()]
        least = np.array([self.count, *(bounds.least for bounds in inner), 0.0])
        most = np.array([self.count, *(bounds.most for bounds in inner), 0.0])
        fractions = -np.diff((least + most) / 2) / self.count
        open_ = (most - least) / 2
        return np.clip(fractions, 0.0, None), (open_[1:] + open_[:-1]) / self.count

    def mean_log(self) -> tuple[float, float]:
        return self.estimate.mean_log()


def _counted(part: Part, max_bytes: int) -> _Values:
    matrices, copies = part.matrices(max_bytes)
    return _of_matrices(matrices, copies, 1.0)


def _sampled(part: Part, flops: float, max_bytes: int, generator: torch.Generator) -> _Values:
    """The symbols at some frequencies drawn at random, as many as the flops allow."""
    frequencies, copies = half_frequencies(part.op)
    wanted = max(LEAST_FREQUENCIES, int(len(frequencies) * flops / part.flops))
    if wanted >= len(frequencies):
        return _counted(part, max_bytes)
    order = torch.randperm(len(frequencies), generator=generator, device=part.op.device)[:wanted]
    matrices = symbols_at(part.op, frequencies[order], max_bytes)
    share = wanted / len(frequencies)
    return _of_matrices(matrices, copies[order].repeat(part.op.groups), share)


def _of_matrices(matrices: Tensor, copies: Tensor, part: float) -> _Values:
    rounding = max(matrices.shape[1:]) * torch.finfo(copies.dtype).eps
    values = torch.linalg.svdvals(matrices)
    return _Values(values.cpu().numpy(), copies.cpu().numpy(), part, rounding)


def _estimated(
    part: Part, probes: int, steps: int, max_bytes: int, generator: torch.Generator
) -> _Estimate:
    order = min(part.op.shape)
    steps = min(steps, order)
    check_bytes("the Lanczos basis", 8 * probes * steps * order, max_bytes)
    tall, _ = Product.tall(part.op, fast=True)
    start = random_directions(probes, order, part.op.weight, generator)
    runs = tridiagonals(tall.gram, start, steps)
    return _Estimate(runs, order, 2 * probes * runs.steps)


def _on_its_torus(op: ConvOperator | LinearOperatorLike) -> ConvOperator:
    if not isinstance(op, ConvOperator):
        raise ValueError(f"expected a ConvOperator for method='circular', got {type(op).__name__}")
    torus = circular_operator(op)
    if isinstance(torus, str):
        raise ValueError(
            f"expected a layer that fits on a torus for method='circular', got {op!r}: {torus}"
        )
    return torus


def _checked(edges: Sequence[float]) -> FloatArray:
    points = np.asarray(edges, dtype=float)
    if (
        points.ndim != 1
        or len(points) < 2
        or not np.isfinite(points).all()
        or points[0] < 0
        or (np.diff(points) <= 0).any()
    ):
        raise ValueError(f"expected at least two non-negative, ascending edges, got {edges!r}")
    return points


def _default_edges(spectra: list[_Spectrum], bins: int) -> FloatArray:
    """0, then evenly spaced in the logarithm over the range of the values."""
    ends = [spectrum.ends for spectrum in spectra] or [(1.0, 1.0)]
    highest = max(high for _, high in ends) * (1 + 1e-9) or 1.0
    lowest = min(low for low, _ in ends) * (1 - 1e-9)
    lowest = min(max(lowest, LOWEST_EDGE * highest), highest / 2)
    if bins == 1:
        return np.array([0.0, highest])
    return np.append(0.0, np.geomspace(lowest, highest, bins))
