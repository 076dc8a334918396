"""What needs the inverse of a convolution: linear systems and the log-determinant."""

from __future__ import annotations

import contextlib
import math
from typing import Any

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
    group_matrices,
    has_augmented,
    independent_blocks,
    is_circulant,
    is_square_grid,
    is_square_toeplitz,
    ldexp,
    normalized,
    polyphase,
    scatter,
)
from convspectra.solvers import differentiable_once, inverse_and_logabsdet, lu_factor
from convspectra.spectra._strategy import SMALL_WORK
from convspectra.torus import (
    AugmentedFactorization,
    CapacitanceFactorization,
    CirculantEmbedding,
    augmented_bytes,
    augmented_flops,
)

BACKWARD_ERROR_LIMIT = 1e-10
RESIDUAL_LIMIT = 1e-2


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
        ``max(rows, columns) eps sigma_max``.

    Raises
    ------
    ValueError
        If neither the structure of the layer nor its size allows it: a matrix over `max_bytes`.

    Notes
    -----
    A layer with zero padding costs one LU factorization of the border matrix of M or, where that is
    not square, of its augmented matrix (`CapacitanceFactorization`), and one inversion of it for
    the gradient, if that is less than what any other layer costs: a QR factorization of the dense
    M. Twice differentiable nowhere: a second derivative raises.

    Examples
    --------
    >>> import torch, convspectra as cs
    >>> op = cs.ConvOperator(torch.tensor([[[1.0, 2.0, 1.0]]]), 50)
    >>> round(cs.logabsdet(op).exp().item(), 6)
    51.0
    """
    check_type("op", op, ConvOperator)
    weight = op.weight.double()
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
    if is_circulant(op):
        return _log_pseudo_det(CirculantEmbedding(op).symbols(half=False))
    rows, columns = (n // op.groups for n in op.shape)
    work = rows * columns * min(rows, columns)
    square = rows == columns and is_square_grid(op)
    is_large = op.groups * work > SMALL_WORK and has_augmented(op)
    by_augmented = is_large and not square and augmented_bytes(op) <= max_bytes
    if is_large and (square or (by_augmented and augmented_flops(op) < 2.0 * op.groups * work)):
        with contextlib.suppress(ArithmeticError):
            factorization = (
                CapacitanceFactorization(polyphase(op), max_bytes)
                if square
                else AugmentedFactorization(op, max_bytes)
            )
            if not factorization.is_singular():
                return factorization.logabsdet()
        size = 8 * op.groups * rows * columns
        check_bytes("the dense matrix of a layer close to singular", size, max_bytes)
    return _log_pseudo_det(group_matrices(op, max_bytes))


def _log_pseudo_det(matrices: Tensor) -> Tensor:
    """The sum of log s over all the matrices (..., m, n), real or complex, with gradient."""
    fixed = matrices.detach()
    tall = fixed if fixed.shape[-2] >= fixed.shape[-1] else fixed.mH
    negligible = tall.shape[-2] * math.prod(tall.shape[:-2]) * torch.finfo(tall.dtype).eps
    q, r = torch.linalg.qr(tall)
    identity = torch.eye(r.shape[-1], dtype=r.dtype, device=r.device)
    r_inverse = torch.linalg.solve_triangular(r, identity.expand_as(r), upper=True)
    # Frobenius norms bound sigma_min from below and sigma_max from above.
    smallest = 1 / torch.linalg.matrix_norm(r_inverse).amax()
    largest = torch.linalg.matrix_norm(r).amax()
    if not float(smallest) > negligible * float(largest):
        values = torch.linalg.svdvals(tall)
        if float(values.amin()) <= negligible * float(values.amax()):
            return values.new_full((), -math.inf)
    total: Tensor = r.diagonal(dim1=-2, dim2=-1).abs().log().sum()
    if matrices.requires_grad:
        gradient = q @ r_inverse.mH
        if tall.shape != fixed.shape:
            gradient = gradient.mH
        anchor = matrices.sum()
        total = _LogPseudoDet.apply(matrices, gradient, total, anchor)  # type: ignore[no-untyped-call]
    return total


def solve(
    op: ConvOperator, y: Tensor, adjoint: bool = False, *, max_bytes: int = DEFAULT_MAX_BYTES
) -> Tensor:
    """The x with M x = y, or with M' x = y if `adjoint`, for a square M.

    Parameters
    ----------
    op : ConvOperator
        With as many rows as columns.
    y : Tensor
        (*output_shape) or (b, *output_shape), or of input_shape if `adjoint`; of the operator's
        dtype and device.

    Returns
    -------
    Tensor
        Of y's dtype, computed in float64, detached. A small backward error does not make x
        accurate: the forward error is up to cond(op) times as large.

    Raises
    ------
    ValueError
        If M is not square, y has another shape, dtype or device, or a matrix is over `max_bytes`.
    ArithmeticError
        If M is singular to working precision: the backward error
        ``||M x - y|| / (||weight|| ||x||)`` came out above 1e-10, or the residual
        ``||M x - y||`` above 1e-2 ``||y||``.

    Notes
    -----
    Cost: one LU factorization of the border matrix for zero padding and stride 1, of the dense M
    otherwise; then two FFTs, or ``2 n^2`` flops, for each right-hand side.

    Examples
    --------
    >>> import torch, convspectra as cs
    >>> op = cs.ConvOperator(torch.tensor([[[1.0, 4.0, 1.0]]]), 4)
    >>> cs.solve(op, op.matvec(torch.tensor([[1.0, 2.0, 3.0, 4.0]])))
    tensor([[1., 2., 3., 4.]])
    """
    check_type("op", op, ConvOperator)
    rows, columns = op.shape
    if rows != columns:
        raise ValueError(
            f"expected a square operator to solve with, got {op!r} of shape {op.shape}"
        )
    shape = op.input_shape if adjoint else op.output_shape
    check_array("y", y, shape, like=op.weight)
    scaled, exponent = normalized(op)
    if exponent is None:
        raise ArithmeticError(f"expected a layer that is not zero, got {op!r} with a weight of 0")
    y_exponent = int(torch.frexp(y.detach().double().abs().amax()).exponent)
    batch = ldexp(y.detach().double(), -y_exponent).reshape(-1, *shape)
    system = scaled.T if adjoint else scaled
    x = _solve_blocks(system, batch, max_bytes)
    residual = torch.linalg.vector_norm((batch - system.apply(x)).flatten(1), dim=1)
    size = torch.linalg.vector_norm(scaled.weight) * torch.linalg.vector_norm(x.flatten(1), dim=1)
    allowed = torch.minimum(
        BACKWARD_ERROR_LIMIT * size,
        RESIDUAL_LIMIT * torch.linalg.vector_norm(batch.flatten(1), dim=1),
    )
    if not bool((residual <= allowed).all()):
        worst = float((residual / size).nan_to_num(math.inf).amax())
        raise ArithmeticError(
            f"expected a backward error of at most {BACKWARD_ERROR_LIMIT:.0e} and a residual of at "
            f"most {RESIDUAL_LIMIT:.0e} of y, got a backward error of {worst:.1e} and a residual "
            f"of {float(residual.amax()):.1e}: the layer is singular to working precision"
        )
    x = ldexp(x, y_exponent - exponent).to(y.dtype)
    return x.reshape(*y.shape[: y.ndim - len(shape)], *system.input_shape)


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
    op = block.op.T if adjoint else block.op
    if is_circulant(block.op):
        embedding = CirculantEmbedding(block.op)
        inverse, _ = inverse_and_logabsdet(embedding.symbols())
        if adjoint:
            on_torus = embedding.embed_input(right)
            return embedding.restrict_output(embedding.multiply(inverse.mH, on_torus))
        return embedding.restrict_input(embedding.multiply(inverse, embedding.embed_output(right)))
    order = op.shape[0] // op.groups
    if is_square_toeplitz(block.op) and op.groups * order**3 > SMALL_WORK:
        return CapacitanceFactorization(op, max_bytes).solve(right)
    matrices = group_matrices(block.op, max_bytes)
    lu, pivots = lu_factor(matrices.mT if adjoint else matrices)
    grouped = right.reshape(len(right), op.groups, order).permute(1, 2, 0)
    solution = torch.linalg.lu_solve(lu, pivots, grouped)
    return solution.permute(2, 0, 1).reshape(-1, *op.input_shape)


class _LogPseudoDet(torch.autograd.Function):
    """A log-pseudo-determinant whose gradient, the adjoint of the pseudo-inverse, is at hand."""

    @staticmethod
    def forward(
        ctx: Any, matrix: Tensor, gradient: Tensor, value: Tensor, anchor: Tensor
    ) -> Tensor:
        ctx.save_for_backward(gradient, anchor)
        return value.clone()

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        gradient, anchor = ctx.saved_tensors
        with torch.no_grad():
            scaled = grad * gradient
        return differentiable_once(scaled, anchor), None, None, None
