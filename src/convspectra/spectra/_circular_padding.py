"""The same weight on a torus: the circular layer that others take for the zero-padded one.

Its symbols are all there is to it, which makes it cheap. It says nothing of the smallest singular
values of the layer itself: docs/mathematics.md, "Circulant embedding".
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import replace
from functools import partial
from typing import NamedTuple

import torch
from torch import Tensor

from convspectra.operator import (
    DEFAULT_MAX_BYTES,
    ConvOperator,
    check_type,
    is_circulant,
    normalized,
)
from convspectra.solvers import (
    GaussRule,
    LinearMap,
    gauss_rules,
    lu_factor,
    random_directions,
    tridiagonals,
)
from convspectra.spectra._parts import Part, parts
from convspectra.torus import symbol_shape

DIRECT_FLOPS = 1.5e9
"""Flops up to which all singular values of all symbols are computed at once: 0.2 s on one core.
Half of it sends layers to Lanczos that a dense SVD answers sooner."""
DIRECT_ORDER = 64
"""The order of symbols up to which that is done whatever the flops: a choice."""
FIRST_STEPS = 6
"""Lanczos steps for all symbols; twice as many for those that may be extreme, and so on: a
choice."""
ACCURACY = 1e-5
"""Relative accuracy of squares of singular values: the numbers stand beside others in a report,
with four digits. It is a choice."""
DEFINITE = 1e-8
"""An LU factor with a pivot below this part of the norm does not tell the smallest value: the
square root of eps, about. A smaller limit would trust factors that have lost it."""


class CircularExtremes(NamedTuple):
    """The answer of `circular_extremes`."""

    sigma_max: float
    sigma_min: float
    mean_log: float


def circular_operator(op: ConvOperator) -> ConvOperator | str:
    """The layer of the same weight on the torus of its input: circular padding, no border.

    A linear layer becomes a convolution on one point. A transposed layer stays one: its torus is
    that of its output.

    Returns
    -------
    ConvOperator or str
        The reason where there is no such layer: a stride that does not divide the input, or a
        kernel that reaches around more than twice.

    Examples
    --------
    >>> import torch, convspectra as cs
    >>> circular_operator(cs.ConvOperator(torch.tensor([[[1.0, 2.0, 3.0]]]), 4)).to_dense()
    tensor([[2., 3., 0., 1.],
            [1., 2., 3., 0.],
            [0., 1., 2., 3.],
            [3., 0., 1., 2.]])
    """
    g = op.geometry
    for n, stride, reach in zip(g.input_size, g.stride, g.reach, strict=True):
        if n % stride:
            return f"the stride {stride} does not divide the input size {n}"
        if max(_balanced_padding(reach, stride)) > n:
            return f"the kernel reaches over {reach} points, more than twice around {n}"
    if g.ndim == 0:
        return ConvOperator(op.weight[:, :, None], 1)
    padding = [
        _balanced_padding(reach, stride) for reach, stride in zip(g.reach, g.stride, strict=True)
    ]
    torus = ConvOperator(
        op.weight,
        g.input_size,
        stride=g.stride,
        padding=padding,
        dilation=g.dilation,
        groups=op.groups,
        padding_mode="circular",
    )
    return torus.T if op.transposed else torus


def is_circular(op: ConvOperator) -> bool:
    """Whether the layer is its `circular_operator`, up to shifts."""
    g = op.geometry
    axes = zip(g.input_size, g.output_size, g.reach, g.stride, g.padding, strict=True)
    return is_circulant(op) or all(
        n == stride * outputs and reach <= stride and padding == (0, 0)
        for n, outputs, reach, stride, padding in axes
    )


def circular_extremes(op: ConvOperator, *, max_bytes: int = DEFAULT_MAX_BYTES) -> CircularExtremes:
    """Largest and smallest singular value and mean log of the circular layer.

    Returns
    -------
    CircularExtremes
        ``(sigma_max, sigma_min, mean_log)``: the values to about 1e-5, relatively; mean_log, the
        mean of log s over the min(rows, columns) singular values, to rounding, and -inf if one is
        0.

    Raises
    ------
    ValueError
        If there is no circular layer, or its symbols take more than `max_bytes`.

    Notes
    -----
    Cost: one LU factorization of every second symbol, or a Cholesky factorization of its smaller
    Gram matrix, and Lanczos on all of them at once, on those that may be extreme to the end. Of
    small symbols all singular values.

    Examples
    --------
    >>> import torch, convspectra as cs
    >>> extremes = circular_extremes(cs.ConvOperator(torch.tensor([[[1.0, 4.0, 1.0]]]), 50))
    >>> [round(x, 6) for x in extremes]
    [6.0, 2.0, 1.316958]
    """
    check_type("op", op, ConvOperator)
    torus = circular_operator(op)
    if isinstance(torus, str):
        raise ValueError(f"expected a layer that fits on a torus, got {op!r}: {torus}")
    scaled, exponent = normalized(torus)
    if exponent is None:
        return CircularExtremes(0.0, 0.0, -math.inf)
    found, zeros = parts(scaled)
    largest, smallest, logs = 0.0, 0.0 if zeros else math.inf, 0.0
    for part in found:
        ends = _extremes(part, max_bytes)
        largest, smallest = max(largest, ends.sigma_max), min(smallest, ends.sigma_min)
        logs += ends.mean_log
    mean = -math.inf if zeros else logs / min(torus.shape) + exponent * math.log(2)
    return CircularExtremes(math.ldexp(largest, exponent), math.ldexp(smallest, exponent), mean)


def _balanced_padding(reach: int, stride: int) -> tuple[int, int]:
    """Padding before and after that leaves one output per stride."""
    total = max(reach - stride, 0)
    return total // 2, total - total // 2


def _extremes(part: Part, max_bytes: int) -> CircularExtremes:
    """The extremes of a block and the sum of all logarithms of its copies for their mean."""
    rows, columns = symbol_shape(part.op)
    if part.flops > DIRECT_FLOPS and min(rows, columns) > DIRECT_ORDER:
        single, _ = replace(part, op=part.op.with_weight(part.op.weight.float())).grams(max_bytes)
        largest = _largest_eigenvalue(partial(_product, single), single) ** 0.5
        del single
        by_factors = _by_lu if rows == columns else _by_cholesky
        found = by_factors(part, largest, max_bytes)
        if found is not None:
            return found
    return _directly(*part.matrices(max_bytes))


def _directly(matrices: Tensor, copies: Tensor) -> CircularExtremes:
    values = torch.linalg.svdvals(matrices)
    rounding = max(matrices.shape[1:]) * torch.finfo(values.dtype).eps * float(values.amax())
    smallest = float(values.amin())
    logs = float(copies @ values.log().sum(1)) if smallest > rounding else -math.inf
    return CircularExtremes(float(values.amax()), smallest, logs)


def _by_lu(part: Part, largest: float, max_bytes: int) -> CircularExtremes | None:
    """The extremes of square matrices; None where a pivot says that they may be singular."""
    matrices, copies = part.matrices(max_bytes)
    factors, pivots = lu_factor(matrices)
    diagonal = factors.diagonal(dim1=1, dim2=2).abs()
    if float(diagonal.amin()) <= DEFINITE * largest:
        return None

    def inverse(chosen: Tensor) -> LinearMap:
        some, order_of_rows = _chosen(factors, chosen), _chosen(pivots, chosen)

        def product(x: Tensor) -> Tensor:
            y = torch.linalg.lu_solve(some, order_of_rows, x[:, :, None], adjoint=True)
            return torch.linalg.lu_solve(some, order_of_rows, y)[:, :, 0]

        return product

    smallest = _largest_eigenvalue(inverse, matrices) ** -0.5
    if smallest <= 1e-14 * largest:
        return None
    return CircularExtremes(largest, smallest, float(copies @ diagonal.log().sum(1)))


def _by_cholesky(part: Part, largest: float, max_bytes: int) -> CircularExtremes | None:
    """The extremes of rectangular matrices; None where Gram matrices do not tell the smallest."""
    grams, copies = part.grams(max_bytes)
    factors, failed = torch.linalg.cholesky_ex(grams)
    diagonal = factors.diagonal(dim1=1, dim2=2).real
    least = largest * (torch.finfo(grams.dtype).eps / ACCURACY) ** 0.5
    if bool(failed.any()) or float(diagonal.amin()) <= least:
        return None
    single = torch.complex64 if grams.is_complex() else torch.float32
    inverses = torch.cholesky_inverse(factors).to(single)
    smallest = _largest_eigenvalue(partial(_product, inverses), inverses) ** -0.5
    if smallest <= least:
        return None
    return CircularExtremes(largest, smallest, float(copies @ diagonal.log().sum(1)))


def _product(matrices: Tensor, chosen: Tensor) -> LinearMap:
    some = _chosen(matrices, chosen)
    return lambda x: (some @ x[:, :, None])[:, :, 0]


def _chosen(tensors: Tensor, chosen: Tensor) -> Tensor:
    return tensors if len(chosen) == len(tensors) else tensors[chosen]


def _largest_eigenvalue(product: Callable[[Tensor], LinearMap], like: Tensor) -> float:
    """The largest eigenvalue of all of several positive definite matrices, of the size of `like`.

    ``product(chosen)`` multiplies the chosen matrices by one row each. Matrices whose Ritz value
    with its residual stays below the best one are left out of the next, longer, run.
    """
    count, _, order = like.shape
    generator = torch.Generator(device=like.device).manual_seed(0)
    chosen, best, steps = torch.arange(count, device=like.device), 0.0, FIRST_STEPS
    while True:
        start = random_directions(len(chosen), order, like, generator)
        runs = tridiagonals(product(chosen), start, steps)
        rules = gauss_rules(runs, steps)
        values = torch.tensor(
            [rule.nodes[-1] for rule in rules], dtype=torch.float64, device=like.device
        )
        residuals = torch.tensor(
            [rule.residuals[-1] for rule in rules], dtype=torch.float64, device=like.device
        )
        errors = torch.tensor(
            [_error_of_largest(rule) for rule in rules], dtype=torch.float64, device=like.device
        )
        best = max(best, float(values.amax()))
        open_ = (values + residuals > best) & (errors > ACCURACY * best)
        if steps >= order or not bool(open_.any()):
            return best
        chosen, steps = chosen[open_], 2 * steps


def _error_of_largest(rule: GaussRule) -> float:
    """Estimated: residual^2 over the gap to the next node, or the residual if that is less."""
    gap = float(rule.nodes[-1] - rule.nodes[-2]) if len(rule.nodes) > 1 else 0.0
    residual = float(rule.residuals[-1])
    return min(residual, residual**2 / max(gap, 1e-300))
