"""The nearest kernel of the same taps whose layer has its singular values within bounds."""

from __future__ import annotations

import contextlib
import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal, overload

import numpy as np
import scipy.optimize
import torch
from torch import Tensor, nn

from convspectra.operator import (
    DEFAULT_MAX_BYTES,
    ConvOperator,
    check_positive_number,
    check_type,
    is_isometric_possible,
    isometric_taps,
    isometric_target,
    not_compiled,
    weight_rounding,
    with_gradients,
)
from convspectra.spectra import frobenius_norm, svds
from convspectra.training._clipped_kernels import NormModel, dense_model, nearest, wave_model

DENSE_ORDER = 256
"""Smaller side of a group of M up to which it is formed: some 10 ms a step.

At twice that a step takes eight times as long; at half of it more layers have a wide gap.
"""
ROUNDS = 3
"""Times that the bound of the windowed waves is lowered, so that M itself meets it.

After one the norm was above by 0.01 to 0.3%, after two by 0.02% at most, over ten layers. At half
of it the kernels are up to 1% farther away.
"""
CUTS = 20
"""Times that cutting planes are added, to layers that are not formed.

For 8 channels on 16 x 16 points the gap was 29% without, and 0.1% with 10 at 0.9 of the norm; at
half of it 4% without, 2% with 10 and 1.3% with 20, for twice the time.
"""
CUT_VALUES = 6
"""Singular values whose vectors give a plane each time. A choice."""
PLANE_RANK = 1e-10
"""Eigenvalues of the planes' Gram matrix below this part of the largest are rounding: a choice."""
NEAR_ENOUGH = 2e-4
"""How far the norm may be above the bound, relatively, before the kernel is scaled. A choice."""
BISECTIONS = 12
"""Halvings of the way to the isometric layer: its length is found to 1/4096. A choice."""
LIFTS = 100
"""Steps in which singular values are lifted and cut, of layers that are formed. A choice."""


@dataclass(frozen=True)
class Projection:
    """A projection of a layer, and how near it is to the nearest one.

    Attributes
    ----------
    distance : float
        ``||K - K0||_F``, of weights.
    least_distance : float
        No kernel with a norm of at most `max_norm` is nearer than that, for certain. 0 where
        nothing is known.
    sigma_max : float
        An upper bound on the norm of the result.
    sigma_min : float or None
        A lower bound on its smallest singular value, where a floor was asked for.
    steps : int
        Steps of the dual iteration.
    method : str
        "none" where nothing had to be done, "dense" or "waves": the matrices that were clipped;
        with "+ isometry" where a floor had to be reached.

    Examples
    --------
    >>> round(Projection(1.02, 1.0, 1.0, None, 40, "waves").gap, 4)
    0.02
    """

    distance: float
    least_distance: float
    sigma_max: float
    sigma_min: float | None
    steps: int
    method: str

    @property
    def gap(self) -> float:
        """How much farther than the nearest kernel it can be, relatively; inf if unknown."""
        if self.distance == self.least_distance:
            return 0.0
        return self.distance / self.least_distance - 1 if self.least_distance else math.inf


@overload
def project(
    op: ConvOperator,
    max_norm: float | None = ...,
    min_singular: float | None = ...,
    *,
    return_report: Literal[False] = ...,
    max_bytes: int = ...,
) -> ConvOperator: ...
@overload
def project(
    op: ConvOperator,
    max_norm: float | None = ...,
    min_singular: float | None = ...,
    *,
    return_report: Literal[True],
    max_bytes: int = ...,
) -> tuple[ConvOperator, Projection]: ...
@not_compiled
@with_gradients
def project(
    op: ConvOperator,
    max_norm: float | None = None,
    min_singular: float | None = None,
    *,
    return_report: bool = False,
    max_bytes: int = DEFAULT_MAX_BYTES,
) -> ConvOperator | tuple[ConvOperator, Projection]:
    """The nearest layer of the same taps with ``sigma_max <= max_norm``, as it is applied.

    Near is meant in the plain Frobenius norm of the weight, ``||K - K0||_F``.

    Parameters
    ----------
    op : ConvOperator
    max_norm : float, optional
        The largest singular value allowed. A convex problem: what is found is the nearest kernel to
        within ``report.gap``, a duality gap.
    min_singular : float, optional
        The smallest singular value allowed, at most `max_norm`. Not convex: the best kernel found,
        on the way to the nearest isometric layer.
    return_report : bool
        Whether a `Projection` is returned, too.
    max_bytes : int
        As for `svds`.

    Returns
    -------
    ConvOperator
        Of the same options, with a new weight of the same dtype, detached; its norm is at most
        `max_norm` for certain, rounding included. The operator itself where nothing has to be done.
    Projection
        If `return_report`.

    Raises
    ------
    ValueError
        If neither bound is given, for bounds that are not positive or cross each other, and for a
        floor that was not reached: the message says the largest one that was.

    Notes
    -----
    Method: accelerated proximal steps on the dual problem, which clip the singular values of a
    matrix at `max_norm`; every step gives a lower bound on the distance. The matrix is M where its
    smaller side is at most 256: the gap is 0.1% then. For larger layers it is the symbols of
    windowed plane waves, whose norms are at most that of M; the bound is lowered until M itself
    meets it, and cutting planes by singular vectors of M close most of the gap: 0.1 to 0.3% of the
    distance is left where a tenth of the norm was cut off, 1.5% where half of it was (8 and 16
    channels on 16 x 16 points; docs/mathematics.md, "Projections"). Cost: an eigendecomposition for
    each matrix or frequency a step, 20 to 300 steps, and some 20 calls of `svds`: 0.1 s for 3
    channels on 6 x 6 points, 4 to 9 s for those two. A floor takes some 12 calls for the smallest
    value.

    Clipping the symbols of the circularly padded layer and dropping the taps that do not fit, as
    Sedghi, Gupta and Long ("The Singular Values of Convolutional Layers", ICLR 2019,
    arXiv:1805.10408) do, neither is the nearest layer nor meets the bound.

    Examples
    --------
    >>> import torch, convspectra as cs
    >>> op = cs.ConvOperator(torch.tensor([[[1.0, 2.0, 1.0]]]), 10)
    >>> clipped, report = cs.project(op, max_norm=1.0, return_report=True)
    >>> cs.sigma_max(clipped) <= 1.0, round(report.distance, 2), report.gap < 2e-3
    (True, 1.73, True)
    >>> lifted = cs.project(op, min_singular=0.5)
    >>> cs.sigma_min(lifted) >= 0.5
    True
    """
    check_type("op", op, ConvOperator)
    _check_bounds(max_norm, min_singular)
    with torch.no_grad():
        direct = op.T if op.transposed else op
        wide = direct.with_weight(direct.weight.detach().double())
        kernel, least, steps, method = wide.weight, 0.0, 0, "none"
        if max_norm is not None:
            kernel, least, steps, method = _clipped(wide, max_norm, op.dtype, max_bytes)
        if min_singular is not None:
            kernel, method = _lifted(wide, kernel, min_singular, max_norm, method, max_bytes)
        unchanged = kernel is wide.weight
        result = op if unchanged else op.with_weight(kernel.to(op.dtype))
        if not return_report:
            return result
        upper = _norm(result, max_bytes)
        lower = None if min_singular is None else _least(result, max_bytes)
        distance = float(torch.linalg.vector_norm(result.weight.double() - wide.weight))
    if max_norm is not None and "isometry" not in method:
        upper = min(upper, max_norm)  # to which the kernel was scaled
    return result, Projection(distance, min(least, distance), upper, lower, steps, method)


@not_compiled
@with_gradients
def project_(
    conv: nn.Module,
    input_size: int | Sequence[int] = (),
    max_norm: float | None = None,
    min_singular: float | None = None,
    *,
    max_bytes: int = DEFAULT_MAX_BYTES,
) -> Projection:
    """Replace a layer's weight by that of `project`, in place.

    Parameters
    ----------
    conv : nn.Module
        An ``nn.ConvNd``, ``nn.ConvTransposeNd`` or ``nn.Linear`` whose weight is its parameter.
    input_size : int or sequence of int
        Spatial size of its inputs.
    max_norm, min_singular, max_bytes
        As for `project`.

    Returns
    -------
    Projection
        What was done, as ``project(..., return_report=True)`` tells. Cost and errors are those of
        `project`; a ValueError, too, for a weight that is computed from other parameters.

    Examples
    --------
    >>> import torch, convspectra as cs
    >>> conv = torch.nn.Conv2d(1, 2, 3, padding=1)
    >>> report = cs.project_(conv, (8, 8), max_norm=0.5)
    >>> cs.sigma_max(cs.ConvOperator.from_module(conv, (8, 8))) <= 0.5
    True
    """
    op = ConvOperator.from_module(conv, input_size)
    if op.weight is not conv._parameters.get("weight"):
        raise ValueError(
            f"expected a layer whose weight is its own parameter, got {conv!r}; remove its "
            "parametrization first, or give its weight to project"
        )
    result, report = project(op, max_norm, min_singular, return_report=True, max_bytes=max_bytes)
    with torch.no_grad():
        op.weight.copy_(result.weight)
    return report


def _check_bounds(max_norm: float | None, min_singular: float | None) -> None:
    if max_norm is None and min_singular is None:
        raise ValueError("expected max_norm, min_singular or both, got neither")
    for name, value in (("max_norm", max_norm), ("min_singular", min_singular)):
        if value is not None:
            check_positive_number(name, value)
    if max_norm is not None and min_singular is not None and min_singular > max_norm:
        raise ValueError(
            f"expected min_singular <= max_norm, got {min_singular!r} and {max_norm!r}"
        )


def _clipped(
    op: ConvOperator, limit: float, dtype: torch.dtype, max_bytes: int
) -> tuple[Tensor, float, int, str]:
    """The kernel with a norm of at most `limit`, the least distance, steps and the method."""
    norm = _norm(op, max_bytes)
    if norm <= limit:
        return op.weight, 0.0, 0, "none"
    model: NormModel | None
    if min(op.shape) // op.groups <= DENSE_ORDER:
        model, method = dense_model(op, max_bytes), "dense"
    else:
        model, method = wave_model(op), "waves"
    best, least, steps, dual, target = op.weight * (limit / norm), 0.0, 0, None, limit
    planes: list[Tensor] = []
    for attempt in range(ROUNDS):
        if model is None:
            break
        found = nearest(model, op.weight, target, dual)
        dual, steps = found.dual, steps + found.steps
        if attempt == 0:
            least = math.sqrt(2 * max(0.0, found.bound))
        planes += [] if found.plane is None else [found.plane]
        norm = _value(op.with_weight(found.kernel), max_bytes)
        best = _nearer(op, best, found.kernel * min(1.0, limit / norm))
        if abs(norm - limit) <= NEAR_ENOUGH * limit or model.exact:
            break
        target *= limit / norm
    if model is None or not model.exact:
        best, cut = _cut(op, best, planes, limit, max_bytes)
        least = max(least, cut)
    upper = _norm(op.with_weight(best), max_bytes)
    best = best * min(1.0, limit / upper)
    rounding = weight_rounding(op.with_weight(best), dtype)
    return best * (limit / (limit + rounding)), least * (1 - 1e-9), steps, method


def _cut(
    op: ConvOperator, best: Tensor, planes: list[Tensor], limit: float, max_bytes: int
) -> tuple[Tensor, float]:
    """A nearer kernel by cutting planes, and a bound on the distance.

    Every plane ``<A'(u v'), K> <= c`` holds for all kernels within the bound. The nearest point of
    those at hand, a quadratic program of their number, is the next kernel, whose largest singular
    vectors give the next planes (Kelley, "The Cutting-Plane Method for Solving Convex Programs",
    J. SIAM 8 (1960), doi:10.1137/0108053).
    """
    least, kernel = 0.0, best
    for attempt in range(CUTS):
        if planes and attempt:
            kernel, least = _within(op.weight, torch.stack(planes), limit)
        found = svds(op.with_weight(kernel), min(CUT_VALUES, *op.shape), "LM", tol=1e-4)
        best = _nearer(op, best, kernel * min(1.0, limit / float(found.s[0])))
        if attempt and float(found.s[0]) <= (1 + NEAR_ENOUGH) * limit:
            break
        if float((best - op.weight).norm()) <= (1 + NEAR_ENOUGH) * least:
            break
        assert found.u is not None
        assert found.v is not None
        with torch.enable_grad():
            variable = op.weight.clone().requires_grad_()
            products = (found.u * op.with_weight(variable).apply(found.v)).flatten(1).sum(1)
            for product in products:
                planes += torch.autograd.grad(product, variable, retain_graph=True)
    return best, least


def _within(kernel: Tensor, planes: Tensor, limit: float) -> tuple[Tensor, float]:
    """The kernel nearest to one given with ``<plane, K> <= limit`` for all, and its distance."""
    rows = planes.flatten(1)
    gram = (rows @ rows.T).cpu().numpy()
    excess = (rows @ kernel.flatten() - limit).cpu().numpy()
    # max b'x - x'H x / 2 over x >= 0 is a problem of least squares, with H = R'R.
    values, vectors = np.linalg.eigh(gram)
    kept = values > PLANE_RANK * values[-1]
    root = (vectors[:, kept] * values[kept] ** 0.5).T
    right = (vectors[:, kept] / values[kept] ** 0.5).T @ excess
    try:
        shares, _ = scipy.optimize.nnls(root, right)
    except RuntimeError:  # it did not end: no plane is used then
        shares = np.zeros(len(rows))
    multipliers = torch.from_numpy(shares).to(kernel)
    drop = (multipliers @ rows).reshape(kernel.shape)
    bound = float(multipliers @ (rows @ kernel.flatten() - limit) - 0.5 * drop.square().sum())
    return kernel - drop, math.sqrt(2 * max(0.0, bound))


def _nearer(op: ConvOperator, one: Tensor, other: Tensor) -> Tensor:
    """Whichever of two kernels is nearer to that of op."""
    return min(one, other, key=lambda kernel: float((kernel - op.weight).norm()))


def _lifted(
    op: ConvOperator,
    kernel: Tensor,
    floor: float,
    limit: float | None,
    method: str,
    max_bytes: int,
) -> tuple[Tensor, str]:
    """A kernel with singular values of at least `floor`, near to that of op."""
    if _least(op.with_weight(kernel), max_bytes) >= floor:
        return kernel, method
    starts = [kernel]
    if min(op.shape) // op.groups <= DENSE_ORDER:
        starts.append(_alternated(op, kernel, floor, limit, max_bytes))
    root_mean_square = frobenius_norm(op.with_weight(kernel)) / math.sqrt(min(op.shape))
    gain = min(max(root_mean_square, 1.25 * floor), math.inf if limit is None else limit)
    target = isometric_target(kernel[None], op.groups, isometric_taps(op.geometry).taps, gain)[0]
    found, reached = [], 0.0
    for start in starts:
        way, most = _towards(op, start, target, floor, max_bytes)
        reached = max(reached, most)
        if way is not None and (limit is None or _norm(op.with_weight(way), max_bytes) <= limit):
            found.append(way)
    if not found:
        possible = is_isometric_possible(op)
        why = "" if possible else ": with its padding and stride no layer is isometric"
        raise ValueError(
            f"expected a min_singular that {op!r} can reach, got {floor:g}; the largest that was "
            f"found is {reached:.6g}{why}"
        )
    best = min(found, key=lambda one: float((one - op.weight).norm()))
    return best, "isometry" if method == "none" else f"{method} + isometry"


def _towards(
    op: ConvOperator, start: Tensor, target: Tensor, floor: float, max_bytes: int
) -> tuple[Tensor | None, float]:
    """The first kernel on the way to a target that has the floor, or None; the largest one met."""
    floor *= 1 + 1e-6  # for rounding the weight
    values = [_least(op.with_weight(one), max_bytes) for one in (start, target)]
    if values[0] >= floor:
        return start, values[0]
    if values[1] < floor:
        return None, max(values)
    low, high = 0.0, 1.0
    for _ in range(BISECTIONS):
        middle = (low + high) / 2
        if _least(op.with_weight(torch.lerp(start, target, middle)), max_bytes) >= floor:
            high = middle
        else:
            low = middle
    return torch.lerp(start, target, high), values[1]


def _alternated(
    op: ConvOperator, kernel: Tensor, floor: float, limit: float | None, max_bytes: int
) -> Tensor:
    """Singular values of the dense M lifted and cut, and its taps averaged, by turns."""
    model = dense_model(op, max_bytes)
    counts = model.adjoint(model.apply(torch.ones_like(kernel)), kernel).clamp_min(1.0)
    for _ in range(LIFTS):
        u, s, vh = torch.linalg.svd(model.apply(kernel), full_matrices=False)
        change = (u * (s.clamp(floor, limit) - s)[:, None]) @ vh
        kernel = kernel + model.adjoint(change, kernel) / counts
    if limit is not None:
        kernel = kernel * min(1.0, limit / _norm(op.with_weight(kernel), max_bytes))
    return kernel


def _value(op: ConvOperator, max_bytes: int) -> float:
    """The norm, as it is found."""
    return float(svds(op, 1, "LM", tol=1e-6, max_bytes=max_bytes).s[0])


def _norm(op: ConvOperator, max_bytes: int) -> float:
    """The upper end of the norm, by counts where it is not near the value."""
    found = svds(op, 1, "LM", tol=1e-6, max_bytes=max_bytes)
    if float(found.upper[0]) > (1 + NEAR_ENOUGH) * float(found.s[0]):
        with contextlib.suppress(ValueError, ArithmeticError):  # matrices over max_bytes
            counted = svds(op, 1, "LM", tol=1e-6, certify="count", max_bytes=max_bytes)
            return min(float(counted.upper[0]), float(found.upper[0]))
    return float(found.upper[0])


def _least(op: ConvOperator, max_bytes: int) -> float:
    """The lower end of the smallest singular value."""
    found = svds(op, 1, "SM", return_singular_vectors=False, tol=1e-6, max_bytes=max_bytes)
    return float(found.lower[0])
