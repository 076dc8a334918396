"""Singular values of a convolution: computed in float64, with a certificate.

Everything is computed for the weight divided by a power of two that brings it near 1, so that
neither tiny nor huge layers lose anything, and scaled back at the end.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch
from torch import Tensor

from convspectra.operator import (
    DEFAULT_MAX_BYTES,
    ConvOperator,
    FloatArray,
    LinearOperatorLike,
    check_choice,
    check_operator,
    check_type,
    ldexp,
    normalized,
    not_compiled,
    squared_frobenius_norm,
)
from convspectra.solvers import SingularTriplets
from convspectra.spectra._auto import METHODS
from convspectra.spectra._block_triplets import layer_triplets
from convspectra.spectra._by_products import ProductRequest, ScaledRows, triplets_by_products
from convspectra.spectra._count import proven_by_counts
from convspectra.spectra._dependent_channels import zero_triplets
from convspectra.spectra._request import Request
from convspectra.text import html_table

NORM_TOLERANCE = 1e-6
"""Default relative accuracy of `sigma_max`; that of `sigma_min` is the 1e-8 of `svds`."""

VALUES_SHOWN = 6
"""Values in the text of a result. A choice: more of them break the line of a terminal."""
ROWS_SHOWN = 20
"""Values in a notebook's table. A choice: they fill a screen."""


class ConvergenceError(RuntimeError):
    """A singular value did not reach the tolerance; `result` holds the best estimate.

    Examples
    --------
    >>> import torch, convspectra as cs
    >>> op = cs.ConvOperator(torch.arange(9.0).reshape(1, 1, 3, 3), 30)
    >>> try:
    ...     cs.sigma_max(op, method="lanczos", maxiter=1, tol=1e-12)
    ... except cs.ConvergenceError as error:
    ...     print(bool(error.result.lower < 36) and bool(error.result.upper > 35))
    True
    """

    def __init__(self, message: str, result: SVDResult) -> None:
        super().__init__(message)
        self.result = result

    def __reduce__(self) -> tuple[type[ConvergenceError], tuple[str, SVDResult]]:
        """Both arguments: a pickle of an exception has the message alone."""
        return type(self), (str(self), self.result)


@dataclass(frozen=True)
class SVDResult:
    """Singular triplets of a `ConvOperator` with their certificate.

    Attributes
    ----------
    u, v : Tensor or None
        Singular vectors, (k, *output_shape) and (k, *input_shape), float64; None if not asked for.
    s : Tensor
        Singular values, (k,), float64: descending for "LM", ascending for "SM".
    residuals : Tensor
        ``sqrt(||M v - s u||^2 + ||M' u - s v||^2)`` of each triplet, measured with M itself.
    lower, upper : Tensor
        Enclosure of each singular value: an upper bound of inf or a lower one of 0 says that
        nothing is known on that side.
    others : float
        Bound on every singular value not among these: from above for "LM", from below for "SM";
        inf and 0 say that nothing is known (or for "SM", inf, that there are no others).
    converged : bool
        Whether every value reached the tolerance.
    method : str
        The way taken: one of those `svds` lists, several joined by "+" where blocks differ;
        "structure" where zeros follow from the layer's shape, "zero" for a zero weight.
    matvecs : int
        Applications of M and M', or of their inverses, taken together.
    certificate : str
        What the enclosure rests on.
    logabsdet : float or None
        Sum of the logarithms of all min(rows, columns) singular values where the way taken gives it
        along; see the function of this name for the others.

    Examples
    --------
    >>> import torch, convspectra as cs
    >>> result = cs.svds(cs.ConvOperator(torch.ones(1, 1, 3), 50), 1, "LM")
    >>> result.u.shape, bool(result.lower < 3.0), bool(result.upper > 2.99)
    (torch.Size([1, 1, 50]), True, True)
    >>> result
    SVDResult(s=[2.996], method='dense', converged=True)
    """

    u: Tensor | None
    s: Tensor
    v: Tensor | None
    residuals: Tensor
    lower: Tensor
    upper: Tensor
    others: float
    converged: bool
    method: str
    matvecs: int
    certificate: str
    logabsdet: float | None

    def numpy(self) -> tuple[FloatArray | None, FloatArray, FloatArray | None]:
        """``U, s, Vh`` as NumPy arrays, in the form of ``scipy.sparse.linalg.svds``.

        ``U`` is (rows, k) and ``Vh`` (k, columns), both None without vectors; ``s`` in the order of
        this result.

        Examples
        --------
        >>> import torch, convspectra as cs
        >>> op = cs.ConvOperator(torch.ones(1, 1, 3), 50)
        >>> U, s, Vh = cs.svds(op, 2).numpy()
        >>> U.shape, s.shape, Vh.shape
        ((50, 2), (2,), (2, 50))
        """
        u, v = (None if w is None else w.flatten(1).cpu().numpy() for w in (self.u, self.v))
        return None if u is None else u.T, self.s.cpu().numpy(), v

    def __repr__(self) -> str:
        shown = ", ".join(f"{value:.4g}" for value in self.s[:VALUES_SHOWN].tolist())
        more = f", ... {len(self.s)} values" if len(self.s) > VALUES_SHOWN else ""
        return f"SVDResult(s=[{shown}{more}], method={self.method!r}, converged={self.converged})"

    def _repr_html_(self) -> str:
        columns = [x.tolist() for x in (self.s, self.lower, self.upper, self.residuals)]
        rows = [
            {
                "value": f"{value:.10g}",
                "lower": f"{lower:.10g}",
                "upper": f"{upper:.10g}",
                "residual": f"{residual:.1e}",
            }
            for value, lower, upper, residual in zip(*columns, strict=True)
        ]
        state = "converged" if self.converged else "not converged"
        return html_table(
            rows[:ROWS_SHOWN],
            f"{len(rows)} singular values by {self.method}, {state}, {self.matvecs} products",
        )


@not_compiled
def svds(
    op: ConvOperator | LinearOperatorLike,
    k: int = 1,
    which: str = "LM",
    *,
    return_singular_vectors: bool = True,
    method: str = "auto",
    tol: float = 1e-8,
    maxiter: int | None = None,
    generator: torch.Generator | None = None,
    separation: float | None = None,
    certify: str = "auto",
    max_bytes: int = DEFAULT_MAX_BYTES,
) -> SVDResult:
    """The k largest or smallest singular values of a convolution, certified.

    Parameters
    ----------
    op : ConvOperator
        Any layer; a float32, float16 or bfloat16 weight is widened to float64, exactly. Or a
        `JacobianOperator`, or whatever has its products in float64: for these `method` is one of
        "auto", "dense" (formed by products) and "lanczos" (docs/network.md).
    k : int
        1 to min(op.shape).
    which : {"LM", "SM"}
        Largest (descending) or smallest (ascending) of the min(op.shape) singular values.
    return_singular_vectors : bool
    method : {"auto", "dense", "gram", "qr", "circulant", "capacitance", "augmented", "lanczos", \
              "davidson", "lobpcg"}
        Of every independent block of the layer (sub-lattices of dilation, kernel 1, ...). "dense"
        forms it; "gram" forms its smaller Gram matrix; "qr", for the smallest values, factors it
        line by line along an axis: layers of few channels, or in one dimension; "circulant" takes
        the symbols of a layer with circular padding all around; "capacitance" inverts a square
        zero-padded layer exactly, for its smallest values, and "augmented" a zero-padded one that
        is not, by the inverse of ``[[a I, M], [M', 0]]``; "lanczos" needs only products with M;
        "davidson" and, for the smallest values down to rounding, "lobpcg" precondition them by the
        layer's circulant.
        "auto" takes the cheapest that can be certified, and goes on to others if it is not; zeros
        by dependent channels, without vectors, it reads off the weight ("structure").
    tol : float
        Relative: of the residuals where vectors are asked for, of the values themselves otherwise
        (two nearer than ten tolerances may then be taken for one). An iteration with the inverse
        applies it to the singular values of that.
    maxiter : int, optional
        Most steps of an iteration. By default 300 with factors; for the largest and the smallest
        values 300 and 600 of "davidson", 7,500 and 1,500 of "lanczos"; 600 of "lobpcg".
    generator : torch.Generator, optional
        Of the random start vectors. Without it they come from a fixed seed: the answer is the same
        at every call.
    separation : float, optional
        Have the iterative ways go on until `others` shows the k-th value separated from the rest by
        this fraction of it, or not: a repeated value is told from a simple one so.
    certify : {"auto", "count"}
        "auto" takes the bounds that the way to the values gives along; some of them fail with a
        probability of 1e-10. "count" proves by `count` that no value was missed: the far end of
        each interval, and `others`, rest on no probability. It finds one value more than k.
    max_bytes : int
        Limit on the dense matrix, the Gram matrix, the border matrix or the Lanczos basis.

    Returns
    -------
    SVDResult
        With `converged` False if an iterative way stopped at `maxiter`; nothing is raised then.

    Raises
    ------
    ValueError
        For a k, which, method, tol or maxiter that cannot be, a method that the layer does not
        admit, or a matrix over `max_bytes`.
    ArithmeticError
        If "capacitance" or "augmented" is forced on a layer it cannot factor (a rank-deficient
        weight).

    Notes
    -----
    Cost, per block: "dense" 10 m n min(m, n) flops; "gram" 9 min(m, n)^3; "qr" some 27 N
    (channels N)^3 for 3 x 3 taps in two dimensions, linear in N in one; "capacitance" in two
    dimensions 8/3 (channels N)^3 once for 3 x 3 taps, then some ten solves; "augmented" the same
    for the channels of both sides, the inputs' times stride^d; "lanczos" two convolutions a step,
    "davidson" and "lobpcg" with two FFTs and a product per frequency besides.
    ``certify="count"`` adds one factorization a value, for k + 1 values, of what `count` takes.
    docs/mathematics.md says which way is taken for which layer and on what its bounds rest.

    Examples
    --------
    >>> import torch
    >>> import convspectra as cs
    >>> op = cs.ConvOperator(torch.tensor([[[1.0, 2.0, 1.0]]]), 50)
    >>> result = cs.svds(op, 2, "SM")
    >>> [f"{s:.4e}" for s in result.s.tolist()], result.converged, result.method
    (['3.7933e-03', '1.5159e-02'], True, 'dense')
    """
    check_operator("op", op)
    check_choice("which", which, ("LM", "SM"))
    check_choice("certify", certify, ("auto", "count"))
    check_count(op, k)
    if isinstance(tol, bool) or not isinstance(tol, (int, float)) or not 0 < tol < 1:
        raise ValueError(f"expected a tol between 0 and 1, got {tol!r}")
    if maxiter is not None and (
        isinstance(maxiter, bool) or not isinstance(maxiter, int) or maxiter < 1
    ):
        raise ValueError(f"expected maxiter to be a positive integer or None, got {maxiter!r}")
    if separation is not None and not 0 <= separation < 1:
        raise ValueError(f"expected a separation between 0 and 1, or None, got {separation!r}")
    largest, values_only = which == "LM", not return_singular_vectors
    start = generator or torch.Generator(device=op.device).manual_seed(0)
    if not isinstance(op, ConvOperator):
        if certify == "count":
            raise ValueError(
                f"expected a ConvOperator for certify='count', got {type(op).__name__}, of which "
                "only products are known"
            )
        wanted = ProductRequest(k, largest, values_only, tol, maxiter, start, max_bytes, separation)
        return _by_products(op, wanted, method)
    check_choice(f"method for which={which!r}", method, METHODS[which])
    scaled, exponent = normalized(op)
    if exponent is None:
        return _zero_result(op, k, return_singular_vectors)

    def request(block: ConvOperator, count: int) -> Request:
        return Request(
            block, count, largest, values_only, tol, maxiter, start, max_bytes, separation
        )

    direct = scaled.T if scaled.transposed else scaled
    zeros = zero_triplets(direct, k) if values_only and not largest and method == "auto" else None
    if zeros is not None:
        triplets, method = zeros, "structure"
    else:
        more = min(k + 1, *op.shape) if certify == "count" else k
        triplets, method = layer_triplets(
            direct, more, largest, return_singular_vectors, method, request
        )
        if certify == "count":
            triplets = proven_by_counts(direct, triplets, k, largest, tol, max_bytes)
    if scaled.transposed:
        triplets = triplets.transposed()
    return _finish(scaled, triplets, method, exponent, return_singular_vectors)


@not_compiled
def sigma_max(
    op: ConvOperator | LinearOperatorLike,
    *,
    method: str = "auto",
    tol: float = NORM_TOLERANCE,
    maxiter: int | None = None,
    generator: torch.Generator | None = None,
    max_bytes: int = DEFAULT_MAX_BYTES,
) -> float:
    """The largest singular value of the layer: its operator norm.

    Parameters
    ----------
    op : ConvOperator
    method, tol, maxiter, generator, max_bytes
        As for `svds`.

    Returns
    -------
    float

    Raises
    ------
    ConvergenceError
        If the tolerance was not reached; it carries the result.

    Examples
    --------
    >>> import torch, convspectra as cs
    >>> round(cs.sigma_max(cs.ConvOperator(torch.ones(1, 1, 3), 50)), 6)
    2.996207
    """
    return float(_certified(op, "LM", method, tol, maxiter, generator, max_bytes).s[0])


@not_compiled
def sigma_min(
    op: ConvOperator | LinearOperatorLike,
    *,
    method: str = "auto",
    tol: float = 1e-8,
    maxiter: int | None = None,
    generator: torch.Generator | None = None,
    max_bytes: int = DEFAULT_MAX_BYTES,
) -> float:
    """The smallest of the min(rows, columns) singular values.

    Parameters
    ----------
    op : ConvOperator
    method, tol, maxiter, generator, max_bytes
        As for `svds`.

    Returns
    -------
    float

    Raises
    ------
    ConvergenceError
        If the tolerance was not reached; it carries the result.

    Examples
    --------
    >>> import torch, convspectra as cs
    >>> f"{cs.sigma_min(cs.ConvOperator(torch.tensor([[[1.0, 2.0, 1.0]]]), 50)):.4e}"
    '3.7933e-03'
    """
    return float(_certified(op, "SM", method, tol, maxiter, generator, max_bytes).s[0])


@not_compiled
def cond(
    op: ConvOperator | LinearOperatorLike,
    *,
    method: str = "auto",
    tol: float = NORM_TOLERANCE,
    maxiter: int | None = None,
    generator: torch.Generator | None = None,
    max_bytes: int = DEFAULT_MAX_BYTES,
) -> float:
    """Condition number sigma_max / sigma_min; inf where the enclosure of sigma_min reaches 0.

    Parameters
    ----------
    op : ConvOperator
    method, tol, maxiter, generator, max_bytes
        As for `svds`, of both values.

    Returns
    -------
    float

    Raises
    ------
    ConvergenceError
        If the tolerance was not reached for one of them; it carries the result.

    Examples
    --------
    >>> import torch, convspectra as cs
    >>> round(cs.cond(cs.ConvOperator(torch.tensor([[[1.0, 2.0, 1.0]]]), 50)))
    1053
    """
    smallest, largest = (
        _certified(op, which, method, tol, maxiter, generator, max_bytes) for which in ("SM", "LM")
    )
    if float(smallest.lower[0]) == 0.0:
        return math.inf
    return float(largest.s[0]) / float(smallest.s[0])


@not_compiled
def svdvals(op: ConvOperator | LinearOperatorLike, *, max_bytes: int = DEFAULT_MAX_BYTES) -> Tensor:
    """All min(rows, columns) singular values, descending, float64.

    Raises
    ------
    ValueError
        If the dense matrix takes more than `max_bytes`.

    Notes
    -----
    Cost: a dense SVD without vectors, about ``4 m n min(m, n)`` flops. The error of each value is
    at most about ``max(m, n) eps sigma_max``.

    Examples
    --------
    >>> import torch, convspectra as cs
    >>> cs.svdvals(cs.ConvOperator(torch.eye(2)[:, :, None], 3))
    tensor([1., 1., 1., 1., 1., 1.], dtype=torch.float64)
    """
    check_operator("op", op)
    if not isinstance(op, ConvOperator):
        rows = ScaledRows(op, torch.Generator(device=op.device).manual_seed(0))
        return ldexp(torch.linalg.svdvals(rows.dense(max_bytes)), rows.exponent or 0)
    scaled, exponent = normalized(op)
    if exponent is None:
        return torch.zeros(min(op.shape), dtype=torch.float64, device=op.device)
    return ldexp(torch.linalg.svdvals(scaled.to_dense(max_bytes)), exponent)


@not_compiled
def frobenius_norm(op: ConvOperator) -> float:
    """||M||_F, from the weight and the tap counts alone.

    ``||M||_F^2 = sum_p |Omega_p| ||weight[:, :, p]||^2`` for zero padding; with other padding
    modes the taps that read one pixel are summed first. Cost: a few operations per weight.

    Examples
    --------
    >>> import torch, convspectra as cs
    >>> round(cs.frobenius_norm(cs.ConvOperator(torch.ones(1, 1, 3), 50)) ** 2)
    148
    """
    check_type("op", op, ConvOperator)
    scaled, exponent = normalized(op)
    if exponent is None:
        return 0.0
    square = squared_frobenius_norm(scaled.weight, scaled.geometry)
    return float(ldexp(square.sqrt(), exponent))


def check_count(op: LinearOperatorLike, k: int) -> None:
    """Raise a ValueError unless k singular values can be asked for."""
    if isinstance(k, bool) or not isinstance(k, int) or not 1 <= k <= min(op.shape):
        raise ValueError(f"expected k in 1 to {min(op.shape)} = min(op.shape), got {k!r}")


def _by_products(op: LinearOperatorLike, request: ProductRequest, method: str) -> SVDResult:
    """The answer for an operator of which only its products are known."""
    rows = ScaledRows(op, request.generator)
    triplets, way = triplets_by_products(rows, request, method)
    s = triplets.s
    taller = triplets.transposed() if rows.wide else triplets
    residuals = torch.hypot(
        torch.linalg.vector_norm(rows.apply(taller.v) - s[:, None] * taller.u, dim=1),
        torch.linalg.vector_norm(rows.apply_adjoint(taller.u) - s[:, None] * taller.v, dim=1),
    )
    vectors = not request.values_only
    return _scaled_back(op, triplets, residuals, way, rows.exponent or 0, vectors)


def _certified(
    op: ConvOperator | LinearOperatorLike,
    which: str,
    method: str,
    tol: float,
    maxiter: int | None,
    generator: torch.Generator | None,
    max_bytes: int,
) -> SVDResult:
    """One extreme value, or a ConvergenceError."""
    result = svds(
        op,
        1,
        which,
        return_singular_vectors=False,
        method=method,
        tol=tol,
        maxiter=maxiter,
        generator=generator,
        max_bytes=max_bytes,
    )
    if not result.converged:
        raise ConvergenceError(
            f"the {'largest' if which == 'LM' else 'smallest'} singular value did not converge: "
            f"best estimate {float(result.s[0]):.6e} in [{float(result.lower[0]):.6e}, "
            f"{float(result.upper[0]):.6e}] after {result.matvecs} applications "
            f"({result.method}); raise maxiter, or take .result of this exception",
            result,
        )
    return result


def _zero_result(op: ConvOperator, k: int, vectors: bool) -> SVDResult:
    """Every unit vector is singular for the value 0: the first k coordinate vectors are given."""
    zeros = torch.zeros(k, dtype=torch.float64, device=op.device)
    u, v = (torch.zeros(k, n, dtype=torch.float64, device=op.device) for n in op.shape)
    for vectors_of_one_side in (u, v):
        vectors_of_one_side.fill_diagonal_(1)
    return SVDResult(
        u=u.reshape(k, *op.output_shape) if vectors else None,
        s=zeros,
        v=v.reshape(k, *op.input_shape) if vectors else None,
        residuals=zeros,
        lower=zeros,
        upper=zeros,
        others=0.0,
        converged=True,
        method="zero",
        matvecs=0,
        certificate="exact: the weight is zero",
        logabsdet=-math.inf,
    )


def _finish(
    op: ConvOperator, triplets: SingularTriplets, method: str, exponent: int, vectors: bool
) -> SVDResult:
    u = triplets.u.reshape(-1, *op.output_shape)
    v = triplets.v.reshape(-1, *op.input_shape)
    s = triplets.s
    residuals = triplets.residuals
    if residuals is None:
        forward = (op.apply(v).flatten(1) - s[:, None] * triplets.u).square().sum(1)
        adjoint = (op.apply_adjoint(u).flatten(1) - s[:, None] * triplets.v).square().sum(1)
        residuals = (forward + adjoint).sqrt()
    return _scaled_back(op, triplets, residuals, method, exponent, vectors)


def _scaled_back(
    op: LinearOperatorLike,
    triplets: SingularTriplets,
    residuals: Tensor,
    method: str,
    exponent: int,
    vectors: bool,
) -> SVDResult:
    """The result for the operator itself from the triplets of it over 2^exponent."""
    return SVDResult(
        u=triplets.u.reshape(-1, *op.output_shape) if vectors else None,
        s=ldexp(triplets.s, exponent),
        v=triplets.v.reshape(-1, *op.input_shape) if vectors else None,
        residuals=ldexp(residuals, exponent),
        lower=ldexp(triplets.lower, exponent),
        upper=ldexp(triplets.upper, exponent),
        others=float(ldexp(triplets.s.new_tensor(triplets.others), exponent)),
        converged=triplets.converged,
        method=method,
        matvecs=triplets.matvecs,
        certificate=triplets.certificate,
        logabsdet=None
        if triplets.logabsdet is None
        else triplets.logabsdet + min(op.shape) * exponent * math.log(2),
    )
