"""Linear systems with a convolution, and its log-determinant."""

from __future__ import annotations

import contextlib
import math
from dataclasses import dataclass
from typing import Literal, overload

import torch
from torch import Tensor

from convspectra.operator import (
    DEFAULT_MAX_BYTES,
    Block,
    ConvOperator,
    check_array,
    check_bytes,
    check_type,
    gather,
    independent_blocks,
    is_wide,
    ldexp,
    normalized,
    not_compiled,
    rounding_of,
    scatter,
    with_distinct_taps,
)
from convspectra.spectra._auto import direct_ways
from convspectra.spectra._bounds import tap_norm_bound
from convspectra.spectra._least_squares import pseudo_inverse_times
from convspectra.spectra._singular_values import svds

BACKWARD_ERROR_LIMIT = 1e-10
"""Backward error above which `solve` refuses its answer: that of a stable solve is 1e-14 or less,
so that only singular layers come near it."""
RESIDUAL_LIMIT = 1e-2
"""Residual, relative to y, above which it refuses too: a choice, two digits of y are lost then."""


@not_compiled
def logabsdet(op: ConvOperator, *, max_bytes: int = DEFAULT_MAX_BYTES) -> Tensor:
    """The sum of the logarithms of the singular values, a 0-dim float64 tensor with gradient.

    For a square M this is log |det M|; for a rectangular one, the logarithm of the
    pseudo-determinant, half of log det of the smaller Gram matrix.

    Parameters
    ----------
    op : ConvOperator
    max_bytes : int
        Limit on the border matrix, or on the dense matrix.

    Returns
    -------
    Tensor
        -inf where M is rank deficient to working precision: a singular value of at most about
        ``max(rows, columns) eps sigma_max``. Causal and masked layers have a determinant that a
        single tap tells, however small their singular values are.

    Raises
    ------
    ValueError
        If neither the structure of the layer nor its size allows it: a matrix over `max_bytes`.

    Notes
    -----
    Cost: for zero padding one LU factorization of the border matrix of M or, where M is not square,
    of its augmented matrix, and one inversion of it for the gradient; for circular padding a QR
    factorization of every symbol, for a causal or masked layer one of a tap; else one of the dense
    M. The cheapest that fits is taken:
    ``explain(op, "logabsdet")`` tells which. Not twice differentiable: a second derivative raises.

    Examples
    --------
    >>> import torch, convspectra as cs
    >>> op = cs.ConvOperator(torch.tensor([[[1.0, 2.0, 1.0]]]), 50)
    >>> round(cs.logabsdet(op).exp().item(), 6)
    51.0
    """
    check_type("op", op, ConvOperator)
    op = with_distinct_taps(op.with_weight(op.weight.double()))
    weight = op.weight
    largest = float(weight.detach().abs().amax())
    if largest == 0.0:
        return weight.new_full((), -math.inf)
    scaled = op.with_weight(weight / largest)
    shift = min(op.shape) * math.log(largest)
    blocks = independent_blocks(scaled.T if scaled.transposed else scaled)
    if sum(len(b.places) * min(b.op.shape) for b in blocks) < min(op.shape):
        return weight.new_full((), -math.inf)  # zero rows or columns, or blocks of unlike shapes
    total = weight.new_full((), shift)
    for block in blocks:
        total = total + len(block.places) * _block_logabsdet(block.op, max_bytes)
    return total


def _block_logabsdet(op: ConvOperator, max_bytes: int) -> Tensor:
    """The log-determinant of one block by the cheapest way that fits and can say."""
    *others, last = direct_ways(op, "logabsdet", max_bytes)
    for way in others:
        with contextlib.suppress(ArithmeticError):
            return way.logabsdet(op, max_bytes)
    if others:
        size = math.ceil(last.cost(op, "logabsdet").bytes)
        check_bytes("the dense matrix of a layer close to singular", size, max_bytes)
    return last.logabsdet(op, max_bytes)


@dataclass(frozen=True)
class SolveBound:
    """How far a solution can be from the exact one.

    Attributes
    ----------
    error : Tensor
        ``||x - x*||`` is at most that, for every right-hand side, float64: (b,), or 0-dim for one
        array. inf where `sigma_min` is 0.
    residual : Tensor
        ``||M x - y||``, or of least squares ``||M'(M x - y)|| / sigma_min``: what the error rests
        on, rounding included.
    sigma_min : float
        A lower bound on the smallest singular value, as of `svds`.

    Examples
    --------
    >>> import torch
    >>> SolveBound(torch.tensor(1e-15), torch.tensor(5e-16), 0.5).with_noise(0.1)
    tensor(0.2000)
    """

    error: Tensor
    residual: Tensor
    sigma_min: float

    def with_noise(self, size: float) -> Tensor:
        """A bound on the error where y is off by at most `size` in norm: ``size / sigma_min`` more.

        No method knows better: for some noise of that size the error is as large.
        """
        return self.error + (size / self.sigma_min if self.sigma_min else math.inf)


@overload
def solve(
    op: ConvOperator,
    y: Tensor,
    adjoint: bool = ...,
    *,
    return_bound: Literal[False] = ...,
    max_bytes: int = ...,
) -> Tensor: ...
@overload
def solve(
    op: ConvOperator,
    y: Tensor,
    adjoint: bool = ...,
    *,
    return_bound: Literal[True],
    max_bytes: int = ...,
) -> tuple[Tensor, SolveBound]: ...
@not_compiled
def solve(
    op: ConvOperator,
    y: Tensor,
    adjoint: bool = False,
    *,
    return_bound: bool = False,
    max_bytes: int = DEFAULT_MAX_BYTES,
) -> Tensor | tuple[Tensor, SolveBound]:
    """The x with M x = y, or with M' x = y if `adjoint`; of least squares if M is not square.

    With more rows than columns x minimizes ``||M x - y||``; with fewer it is the solution of least
    norm.

    Parameters
    ----------
    op : ConvOperator
        Of full rank.
    y : Tensor
        (*output_shape) or (b, *output_shape), or of input_shape if `adjoint`; of the operator's
        dtype and device.
    return_bound : bool
        Whether a `SolveBound` is returned, too: how far x is from the exact solution at most, by
        the residual and sigma_min.

    Returns
    -------
    Tensor
        Of y's dtype, computed in float64, detached. A small backward error does not make x
        accurate: the forward error is up to cond(op) times as large.
    SolveBound
        If `return_bound`. Its sigma_min is computed by `svds`.

    Raises
    ------
    ValueError
        If y has another shape, dtype or device, or a matrix is over `max_bytes`.
    ArithmeticError
        If M is rank deficient to working precision: the backward error
        ``||M x - y|| / (||weight|| ||x||)`` came out above 1e-10, or the residual
        ``||M x - y||`` above 1e-2 ``||y||``. Of least squares M'(M x - y) is looked at instead.

    Notes
    -----
    Cost: one LU factorization of the border matrix for zero padding, strided or not, of the symbols
    for circular padding, of the dense M otherwise; then two FFTs, or ``2 n^2`` flops, for each
    right-hand side. ``explain(op, "solve")`` tells which. Of rectangular layers: a QR factorization
    up to 4 million entries, else the factors of ``[[a I, M], [M', 0]]``. A bound costs one `svds`
    of the smallest value. ``||x - x*|| <= ||M x - y|| / sigma_min`` follows from
    ``M (x - x*) = M x - y``; of least squares ``M'M (x - x*) = M'(M x - y)``.

    Examples
    --------
    >>> import torch, convspectra as cs
    >>> op = cs.ConvOperator(torch.tensor([[[1.0, 4.0, 1.0]]]), 4)
    >>> x, bound = cs.solve(op, op.matvec(torch.tensor([[1.0, 2, 3, 4]])), return_bound=True)
    >>> x, bool(bound.error < 1e-6), round(bound.with_noise(0.1).item(), 3)
    (tensor([[1., 2., 3., 4.]]), True, 0.042)
    """
    check_type("op", op, ConvOperator)
    shape = op.input_shape if adjoint else op.output_shape
    check_array("y", y, shape, like=op.weight)
    scaled, exponent = normalized(op)
    if exponent is None:
        raise ArithmeticError(f"expected a layer that is not zero, got {op!r} with a weight of 0")
    batch = y.detach().double().reshape(-1, *shape)
    # Each right-hand side has a scale of its own.
    exponents = torch.frexp(batch.flatten(1).abs().amax(1)).exponent
    batch = ldexp(batch, -exponents)
    system = scaled.T if adjoint else scaled
    square = op.shape[0] == op.shape[1]
    solver = _solve_blocks if square else pseudo_inverse_times
    x = solver(system, batch, max_bytes)
    _check_residual(system, batch, x, square)
    wide = x
    x = ldexp(x, exponents - exponent).to(y.dtype)
    if not bool(x.isfinite().all()):
        raise ArithmeticError(
            f"expected a solution that {y.dtype} can hold, got one that overflows; scale the "
            "weight or y"
        )
    batched = y.ndim > len(shape)
    found = x if batched else x[0]
    if not return_bound:
        return found
    back = ldexp(x.double(), exponent - exponents)
    error, residual, least = _error_bound(system, batch, back, max_bytes)
    error = ldexp(error + _norms(back - wide) * torch.finfo(back.dtype).eps, exponents - exponent)
    residual = ldexp(residual, exponents)
    sigma_min = float(ldexp(residual.new_tensor(least), exponent))
    if not batched:
        error, residual = error[0], residual[0]
    return found, SolveBound(error, residual, sigma_min)


def _check_residual(system: ConvOperator, y: Tensor, x: Tensor, square: bool) -> None:
    """Raise an ArithmeticError unless x solves the system."""
    rest, weight = y - system.apply(x), float(torch.linalg.vector_norm(system.weight))
    if not square and not is_wide(system):  # of least squares the rest may be anything orthogonal
        rest = system.apply_adjoint(rest) / weight
    residual, size = _norms(rest), weight * _norms(x)
    allowed = torch.minimum(BACKWARD_ERROR_LIMIT * size, RESIDUAL_LIMIT * _norms(y))
    if not bool((residual <= allowed).all()):
        worst = float((residual / size).nan_to_num(math.inf).amax())
        raise ArithmeticError(
            f"expected a backward error of at most {BACKWARD_ERROR_LIMIT:.0e} and a residual of at "
            f"most {RESIDUAL_LIMIT:.0e} of y, got a backward error of {worst:.1e} and a residual "
            f"of {float(residual.amax()):.1e}: the layer is singular to working precision"
        )


def _error_bound(
    system: ConvOperator, y: Tensor, x: Tensor, max_bytes: int
) -> tuple[Tensor, Tensor, float]:
    """A bound on the error of each solution, the residual it rests on, and sigma_min at least."""
    found = svds(system, 1, "SM", return_singular_vectors=False, tol=1e-6, max_bytes=max_bytes)
    least = float(found.lower[0])
    rest = system.apply(x) - y
    rounding = rounding_of(system) * (tap_norm_bound(system) * _norms(x) + _norms(y))
    residual = _norms(rest) + rounding
    if system.shape[0] > system.shape[1]:
        norm = tap_norm_bound(system)
        slope = _norms(system.apply_adjoint(rest)) + norm * (rounding_of(system) * residual)
        residual = (slope + norm * rounding) / least if least else residual * math.inf
    if least == 0.0:
        return residual * math.inf, residual, least
    error = residual / least
    if system.shape[0] < system.shape[1]:  # what lies in the kernel of M is error, too
        rows = pseudo_inverse_times(system.T, x, max_bytes)
        error = torch.hypot(error, _norms(x - system.apply_adjoint(rows)))
    return error, residual, least


def _norms(x: Tensor) -> Tensor:
    """The norm of every array of a batch, (b,)."""
    return torch.linalg.vector_norm(x.flatten(1), dim=1)


def _solve_blocks(system: ConvOperator, batch: Tensor, max_bytes: int) -> Tensor:
    """The solution for (b, *output_shape), block by block; NaN where a block is singular."""
    direct = system.T if system.transposed else system
    blocks = independent_blocks(direct)
    x = batch.new_zeros(len(batch), *system.input_shape)
    for block in blocks:
        if block.op.shape[0] != block.op.shape[1]:
            return torch.full_like(x, math.nan)
        ends = [(p.inputs, p.outputs) for p in block.places]
        if not system.transposed:
            ends = [(outputs, inputs) for inputs, outputs in ends]
        right = torch.cat([gather(batch, known) for known, _ in ends])
        solution = _solve_block(block, right, system.transposed, max_bytes)
        for part, (_, unknown) in zip(solution.split(len(batch)), ends, strict=True):
            x = x + scatter(part, unknown, system.input_shape[1:])
    return x


def _solve_block(block: Block, right: Tensor, adjoint: bool, max_bytes: int) -> Tensor:
    """The solution of one block by the cheapest way that fits and can say."""
    *others, last = direct_ways(block.op, "solve", max_bytes)
    for way in others:
        with contextlib.suppress(ArithmeticError):
            return way.solve(block.op, right, adjoint, max_bytes)
    return last.solve(block.op, right, adjoint, max_bytes)
