"""The numerical rank of a layer, and the mean logarithm of its singular values: for an audit."""

from __future__ import annotations

import contextlib
import math

import torch

from convspectra.operator import ConvOperator, independent_blocks, normalized
from convspectra.spectra._auto import direct_cost
from convspectra.spectra._count import Counter
from convspectra.spectra._density import spectral_density
from convspectra.spectra._dependent_channels import without_dependent_channels
from convspectra.spectra._inverse import logabsdet
from convspectra.spectra._parts import Part, parts
from convspectra.spectra._singular_values import SVDResult, svds
from convspectra.spectra.ways import CAPACITANCE, DENSE

LOST_AT_MOST = 31
"""Directions that a layer too large for dense factorizations may lack for its rank to be counted: a
choice, since 32 smallest values take a few seconds."""
SHOWN_AT_MOST = 256
"""Directions that vectors are looked for in to show that they are lost: a choice, for as many
singular vectors of a layer too large to be dense."""
RANK_TOLERANCE = 1e-2
"""Relative tolerance of those values: how near they come to the tolerance of the rank."""
EXACT_WORK = 2e10
"""m n min(m, n) up to which a dense factorization is taken for what no faster way gives: about a
second on two cores."""
QUADRATURE_COMPONENTS = 25_000
"""Numbers drawn for all random vectors of a quadrature together: the error of the mean logarithm is
then about 0.003 of Gaussian layers. It grows with the square root of a smaller number."""
QUADRATURE_STEPS = 24
"""Lanczos steps from each of them: a choice."""


def numerical_rank(
    op: ConvOperator, tolerance: float, smallest: SVDResult, *, max_bytes: int
) -> int | None:
    """The number of singular values above the tolerance; None where that is not known.

    Counted in the independent blocks of the layer. Where these are too large: all those of the
    layer without the channels that depend on others, except up to `LOST_AT_MOST` that are not
    above, which the capacitance method finds; where it does not, what counts by inertia leave no
    doubt of.

    Parameters
    ----------
    op : ConvOperator
    tolerance : float
        Absolute.
    smallest : SVDResult
        The smallest singular value of the layer.
    max_bytes : int
        Limit on any matrix that is formed.

    Notes
    -----
    Cost: nothing where the enclosure of the smallest value lies above the tolerance; dense SVDs
    where they take about a second; else the smallest 32 values, and a few factorizations of those
    that `count` makes.

    Examples
    --------
    >>> import torch, convspectra as cs
    >>> op = cs.ConvOperator(torch.tensor([[[1.0, 0.0, -1.0]]]), 5)
    >>> numerical_rank(op, 1e-12, cs.svds(op, 1, "SM"), max_bytes=2**20)
    4
    """
    if float(smallest.lower[0]) > tolerance:
        return min(op.shape)
    scaled, exponent = normalized(op)
    if exponent is None:
        return 0
    scaled_tolerance = math.ldexp(tolerance, -exponent)
    found, _ = parts(scaled)
    if sum(part.flops for part in found) <= EXACT_WORK:
        return _counted(found, scaled_tolerance, max_bytes)
    direct = scaled.T if scaled.transposed else scaled
    independent = without_dependent_channels(direct)
    try:
        if independent is direct:
            rank = None
            if float(smallest.s[0]) <= tolerance:  # else no bound says that there is none below
                rank = _order_less_lost(independent, scaled_tolerance, max_bytes)
        else:
            lowest = _smallest(independent, 1, 1e-6, max_bytes)
            if float(lowest.lower[0]) > scaled_tolerance:
                return min(independent.shape)
            rank = _order_less_lost(independent, scaled_tolerance, max_bytes)
        return (
            _counted_by_inertia(independent, scaled_tolerance, max_bytes) if rank is None else rank
        )
    except (ArithmeticError, ValueError):  # the other numbers stand without it
        return None


def _smallest(op: ConvOperator, k: int, tol: float, max_bytes: int) -> SVDResult:
    return svds(op, k, "SM", return_singular_vectors=False, tol=tol, max_bytes=max_bytes)


def _order_less_lost(op: ConvOperator, tolerance: float, max_bytes: int) -> int | None:
    """All values except the few that the capacitance method finds not above the tolerance."""
    if not CAPACITANCE.admits(op, "SM"):  # many small values would take too long
        return None
    count = min(LOST_AT_MOST + 1, min(op.shape))
    lowest = _smallest(op, count, RANK_TOLERANCE, max_bytes)
    lost = int((lowest.s <= tolerance).sum())
    return min(op.shape) - lost if lowest.converged and lost < count else None


def _counted_by_inertia(op: ConvOperator, tolerance: float, max_bytes: int) -> int | None:
    """By counts, and where rounding hides the last values by vectors that show them to be lost."""
    bounds = Counter(op, max_bytes).at_least(tolerance)
    doubtful = min(op.shape) - bounds.least
    if bounds.least < bounds.most:
        if doubtful > SHOWN_AT_MOST:
            return None
        # Rayleigh-Ritz values: at least as many singular values are not above them.
        lowest = _smallest(op, doubtful, RANK_TOLERANCE, max_bytes)
        if not bool((lowest.s <= tolerance).all()):
            return None
    return bounds.least


def _counted(found: list[Part], tolerance: float, max_bytes: int) -> int | None:
    rank = 0.0
    for part in found:
        try:
            matrices, copies = part.matrices(max_bytes)
        except ValueError:  # too large
            return None
        values = torch.linalg.svdvals(matrices)
        rank += float(copies @ (values > tolerance).sum(1).to(copies))
    return round(rank)


def mean_log_singular_value(op: ConvOperator, *, max_bytes: int) -> tuple[float, float, str]:
    """The mean of log s over all min(rows, columns) singular values, its error, and the way to it.

    By the log-determinant where a factorization of the structure gives it or a dense one takes
    about a second, otherwise by stochastic Lanczos quadrature.

    Examples
    --------
    >>> import torch, convspectra as cs
    >>> op = cs.ConvOperator(torch.tensor([[[1.0, 2.0, 1.0]]]), 50)
    >>> mean, error, way = mean_log_singular_value(op, max_bytes=2**20)
    >>> round(50 * mean, 6) == round(math.log(51), 6), error, way
    (True, 0.0, 'dense')
    """
    count = min(op.shape)
    cost, ways = direct_cost(op, "logabsdet", max_bytes)
    is_dense = DENSE.name in ways
    if not is_dense or cost.flops <= 2 * EXACT_WORK:
        limit = max_bytes if is_dense else min(max_bytes, _less_than_dense(op))
        with contextlib.suppress(ArithmeticError, ValueError):
            return float(logabsdet(op, max_bytes=limit)) / count, 0.0, ways
    probes = -(-QUADRATURE_COMPONENTS // count)
    density = spectral_density(op, method="quadrature", probes=probes, steps=QUADRATURE_STEPS)
    way = f"stochastic Lanczos quadrature, probes {probes}, steps {QUADRATURE_STEPS}"
    return density.mean_log, density.mean_log_error, way


def _less_than_dense(op: ConvOperator) -> int:
    """Bytes that no dense block of the layer fits in: what is singular is not factored again."""
    blocks = independent_blocks(op.T if op.transposed else op)
    return int(min(DENSE.cost(block.op, "logabsdet").bytes for block in blocks)) - 1
