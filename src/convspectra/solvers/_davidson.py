"""Extreme eigenpairs of a symmetric operator by block Davidson, with a preconditioner or not.

Source: Davidson (1975); Stathopoulos and Saad (1998) for the restart, which keeps the Ritz vectors
of the last step beside those of this one. Without a preconditioner and a restart it is block
Lanczos.

References
----------
E. R. Davidson (1975), "The iterative calculation of a few of the lowest eigenvalues and
    corresponding eigenvectors of large real-symmetric matrices", J. Comput. Phys. 17,
    doi:10.1016/0021-9991(75)90065-0.
A. Stathopoulos and Y. Saad (1998), "Restarting techniques for the (Jacobi-)Davidson symmetric
    eigenvalue methods", Electron. Trans. Numer. Anal. 7.
"""

from __future__ import annotations

import math
from collections.abc import Callable

import torch
from torch import Tensor

from convspectra.solvers._orthonormal import inner_products, orthonormal
from convspectra.solvers._result import PAIRS_COUNT_AS_ONE, Eigenpairs, check_products
from convspectra.solvers._stop import Stop

GUARD_VECTORS = 2
"""Vectors beside the k wanted: the last of those converges by its distance to the next beyond.

Where the values beyond are near, too: 1 takes 12 % fewer products and 4 takes 17 % more where they
are not (three of 8 channels, 16 x 16 points, Gaussian weights).
"""
BASIS_BLOCKS = 8
"""Most vectors of the basis, in blocks of the start: see `BASIS_LEAST`."""
BASIS_LEAST = 48
"""Most vectors of the basis where `BASIS_BLOCKS` allows fewer.

Memory against restarts. With 24 at the least three values take 5 % more products, with 96 they take
8 % fewer; with 4 blocks eight values take 16 % more, with 16 they take 7 % fewer.
"""
ROUNDING_UNITS = 16
"""The operator is known to so many eps of its norm.

A residual below is rounding error. At too little of it the iteration goes on to `maxiter` for
residuals that no step makes less; at more, values small beside the norm end early.
"""
KEPT_DIRECTION = 1e-9
"""Directions of the last step that add less than this to those of this one are dropped.

A choice, between eps, of which they are made below, and what would be missed.
"""


def davidson(
    product: Callable[[Tensor], Tensor],
    size: int,
    k: int,
    *,
    largest: bool = True,
    stop: Stop,
    like: Tensor,
    generator: torch.Generator | None = None,
    start: Tensor | None = None,
    precondition: Callable[[Tensor], Tensor] | None = None,
    most_kept: int | None = None,
) -> Eigenpairs:
    """The k largest or smallest eigenpairs, repeated ones too where the start tells them apart.

    Parameters
    ----------
    product : callable
        The operator on rows, (b, n) -> (b, n).
    size : int
        n.
    k : int
        At most n.
    largest : bool
        The smallest are those of a positive semidefinite operator.
    stop : Stop
        A pair has converged when its residual is at most ``tol value``, and a smallest one when it
        is at most ``tol sqrt(value norm)``; with `values_only`, when the error of the value is
        estimated to be ``tol value``, residual^2 over the gap to the next Ritz value, and the
        residual is at most ten times what pairs need: an eigenvalue is that near. Steps are of
        whole blocks.
    like : Tensor
        Gives the dtype and the device. In single precision no tolerance below 1e-6 is reached.
    generator : torch.Generator, optional
        Source of the Gaussian start vectors, on that device.
    start : Tensor, optional
        Independent rows to start from instead, k or more.
    precondition : callable, optional
        On rows, symmetric positive definite: near |t - A|^{-1} for a t beyond the spectrum.
    most_kept : int, optional
        Vectors of length n that are kept, twice the basis; three of its blocks at the least.

    Returns
    -------
    Eigenpairs
        Without a bound: the iteration cannot tell that it missed a value. Smallest
        values that are lost in the rounding errors of the products do not converge.

    Raises
    ------
    ArithmeticError
        If a product is not finite.

    Notes
    -----
    Cost per step: one product for every pair that has not converged, and ``8 n`` flops for each of
    those and each vector of the basis, of which there are at most 48 or 8 (k + 2).
    """
    eps = float(torch.finfo(like.dtype).eps)
    block = min(size, k + (GUARD_VECTORS if k > 1 else 0))
    if start is not None:
        block = len(start)
    most = max(BASIS_LEAST, BASIS_BLOCKS * block)
    if most_kept is not None:
        most = max(min(most, most_kept // 2), 3 * block)
    most = min(most, size)
    new = start
    if new is None:
        new = torch.randn(block, size, dtype=like.dtype, device=like.device, generator=generator)
    basis, images = new.new_empty(most, size), new.new_empty(most, size)
    projected = torch.zeros(0, 0, dtype=torch.float64, device=like.device)
    before = projected.new_zeros(block, 0)
    sign = 1.0 if largest else -1.0
    order, products, converged, norm = 0, 0, False, 0.0
    for step in range(stop.maxiter):
        check_products(bool(torch.isfinite(new).all()))
        new = orthonormal(new[: most - order], basis[:order])
        if len(new) == 0:  # nothing that the basis does not have
            break
        old, order = order, order + len(new)
        basis[old:order] = new
        images[old:order] = sign * product(new)
        products += len(new)
        projected = _bordered(projected, basis[:order], images[:order])
        check_products(bool(torch.isfinite(projected).all()))
        every, vectors = torch.linalg.eigh(projected)
        every, vectors = every.flip(0), vectors.flip(1)
        chosen = vectors[:, :block].to(like.dtype).mT
        values, x, ax = every[:block], chosen @ basis[:order], chosen @ images[:order]
        norm = max(norm, float(every.abs().amax()))
        residuals = ax - values[:, None].to(like.dtype) * x
        sizes = torch.linalg.vector_norm(residuals, dim=1).double()
        floor = ROUNDING_UNITS * eps * norm
        reached = _reached(sizes, every, stop, norm, floor, largest)
        done = reached | (sizes <= floor)  # rounding error: no step makes it less
        enough, whole = len(values) >= k, order == size
        converged = (enough and bool(reached[:k].all())) or (largest and whole)
        if (enough and bool(done[:k].all())) or whole or step == stop.maxiter - 1:
            break
        new = residuals[~done]
        new = new if precondition is None else precondition(new)
        if order + len(new) > most and most < size:
            kept = _restart(vectors[:, :block], before)
            order = kept.shape[1]
            for rows in (basis, images):
                rows[:order] = kept.to(like.dtype).mT @ rows[: len(kept)]
            projected = kept.mT @ projected @ kept
            vectors = kept.mT @ vectors
        before = vectors[:, :block]
    return Eigenpairs(
        values=sign * values[:k].to(like.dtype),
        vectors=x[:k],
        residuals=sizes[:k].to(like.dtype),
        bound=sign * math.inf,
        norm=norm,
        converged=converged,
        products=products,
    )


def _reached(
    sizes: Tensor,
    every: Tensor,
    stop: Stop,
    norm: float,
    floor: float,
    largest: bool,
) -> Tensor:
    error = stop.tol * every[: len(sizes)].abs()
    residual = error if largest else stop.tol * (every[: len(sizes)].abs() * norm).sqrt()
    if largest:
        error, residual = error.clamp_min(floor), residual.clamp_min(floor)
    if not stop.values_only:
        return sizes <= residual
    beyond = every[len(sizes)] if len(every) > len(sizes) else every[-1]
    gaps = (every[: len(sizes)] - beyond).clamp_min(floor)
    return (sizes**2 <= error * gaps) & (sizes <= PAIRS_COUNT_AS_ONE * residual)


def _bordered(projected: Tensor, basis: Tensor, images: Tensor) -> Tensor:
    """The projected operator, known except for its last rows and columns."""
    old, order = len(projected), len(basis)
    border = inner_products(basis, images[old:]).double()
    border[old:] = (border[old:] + border[old:].mT) / 2
    grown = projected.new_empty(order, order)
    grown[:old, :old] = projected
    grown[:, old:], grown[old:] = border, border.mT
    return grown


def _restart(now: Tensor, before: Tensor) -> Tensor:
    """Orthonormal columns: the coefficients of these Ritz vectors, and what the last ones add."""
    before = torch.nn.functional.pad(before, (0, 0, 0, len(now) - len(before)))
    rest = before - now @ (now.mT @ before)
    left, s, _ = torch.linalg.svd(rest, full_matrices=False)
    both = torch.cat([now, left[:, s > KEPT_DIRECTION]], dim=1)
    kept: Tensor = torch.linalg.qr(both).Q
    return kept
