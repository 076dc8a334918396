"""Upper bounds on the largest eigenvalues of a symmetric operator from block Lanczos, by chance.

A Gaussian start block Omega has a part along every eigenvector that is not tiny, except with a
chosen probability. A polynomial p that is small at all Ritz values and grows beyond them would make
that part of p(A) Omega larger than p(A) Omega is known to be, had an eigenvalue been far above the
Ritz values. For one start vector this is the bound of van Dorsselaer, Hochstenbach and van der
Vorst (SIAM J. Matrix Anal. Appl. 22, 2000).

Note [Block bound]. Let z span the eigenspace of the i largest eigenvalues, of which the i-th is x.
Then z'Omega is an i x b Gaussian matrix; its smallest singular value is below delta_i with
probability `FAILURE_PROBABILITY` at most (Edelman, SIAM J. Matrix Anal. Appl. 9, 1988; Chen and
Dongarra, SIAM J. Matrix Anal. Appl. 27, 2005). For a p that does not decrease beyond x,

    p(x) delta_i <= sigma_i(z' p(A) Omega) <= sigma_i(p(A) Omega),

and the right-hand side is known from the Lanczos matrix for every p of degree up to the number of
steps. The p taken is the Christoffel-Darboux kernel at x of the Ritz values from the i-th on: it is
the one that makes p(x) largest against their weights. Its zeros lie below x, so it increases there.

Note [Isolated bound]. Where the first Ritz values are much larger than the i-th, such a p is huge
at them and drowns in rounding. But once x is known to lie below a limit, p may be given zeros at
the first i - 1 Ritz values as well: for the i-th eigenvector alone

    |p(x)| delta_1 <= ||p(A) Omega||,

which excludes all x where |p| is too large. The logarithm of |p| is concave between its last zero
below and its first zero above, so it is large enough on an interval if it is at both ends.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

FAILURE_PROBABILITY = 1e-10
_ROUNDING = 16 * float(np.finfo(np.float64).eps)

FloatArray = npt.NDArray[np.float64]


@dataclass(frozen=True)
class KrylovBlock:
    """What block Lanczos knows of p(A) Omega: all of it, for p of degree up to the steps.

    Attributes
    ----------
    ritz : array (r,)
        Ritz values, descending.
    components : array (r, b)
        Components of Omega along the Ritz vectors.
    coupling : array (c, b)
        Component of A^steps Omega outside the Krylov space, divided by exp(log_coupling).
    log_coupling : float
    steps : int
    """

    ritz: FloatArray
    components: FloatArray
    coupling: FloatArray
    log_coupling: float
    steps: int

    def upper_bound(self, i: int) -> float:
        """A bound on the i-th largest eigenvalue (i = 1, 2, ...); inf where nothing is known.

        Holds for an i up to the size of the block, except with `FAILURE_PROBABILITY`.
        """
        if i > min(self.components.shape[1], len(self.ritz)):
            return math.inf
        with np.errstate(over="ignore", invalid="ignore"):  # what is not finite is refused below
            if i == 1:
                return self._isolated(1, math.inf)
            # The higher the degree, the larger p at the Ritz values above, and its rounding.
            degrees = {min(self.steps, degree) for degree in (1, 2, 4, 8, self.steps)}
            coarse = min(self._monotone(i, degree) for degree in degrees)
            return coarse if math.isinf(coarse) else self._isolated(i, coarse)

    def _monotone(self, i: int, degree: int) -> float:
        """Note [Block bound], with polynomials of this degree at most."""
        nodes, scale = self._scaled()
        weights = np.square(self.components[i - 1 :]).sum(1)
        polynomials = self._polynomials(nodes[i - 1 :], weights, degree, self.steps)
        threshold = 0.5 * log_smallest_squared_singular_value(i, self.components.shape[1])

        def exceeded(gap: float) -> bool:
            p = polynomials.kernel(nodes[i - 1] + gap)
            values = p(nodes)
            if not np.isfinite(values).all():
                return False
            image = np.concatenate([values[:, None] * self.components, p.lead * self.coupling])
            size = float(np.linalg.svd(image, compute_uv=False)[i - 1])
            size += float(np.abs(values).max()) * self._rounding()
            return p.log_at_x + threshold > math.log(max(size, 1e-300))

        return float(self.ritz[i - 1]) + scale * _smallest(exceeded)

    def _isolated(self, i: int, limit: float) -> float:
        """Note [Isolated bound]; for i = 1 there is no Ritz value above and no limit."""
        nodes, scale = self._scaled()
        above, rest = nodes[: i - 1], nodes[i - 1 :]
        degree = self.steps - len(above)
        if degree < 1:
            return limit
        product = np.prod(rest[:, None] - above[None, :], axis=1)
        weights = np.square(self.components[i - 1 :]).sum(1) * np.square(product)
        polynomials = self._polynomials(rest, weights, degree, degree)
        threshold = 0.5 * log_smallest_squared_singular_value(1, self.components.shape[1])
        coupling = float(np.linalg.norm(self.coupling))
        end = min(limit / scale, float(above[-1])) if i > 1 else math.inf

        def exceeded(gap: float) -> bool:
            x = float(rest[0] + gap)
            if x >= end:
                return True
            p = polynomials.kernel(x)
            values = p(rest)
            if not np.isfinite(values).all():
                return False
            size = math.hypot(float(np.linalg.norm(np.sqrt(weights) * values)), p.lead * coupling)
            size += float(np.abs(values * product).max()) * self._rounding()
            log_size = math.log(max(size, 1e-300))
            at_x = p.log_at_x + float(np.log(np.abs(x - above)).sum())
            if i == 1:
                return at_x + threshold > log_size
            # The kernel itself increases from x to the limit.
            factor = abs(float(np.prod(limit / scale - above)))
            at_end = p.log_at_x + math.log(max(factor, 1e-300))
            return min(at_x, at_end) + threshold > log_size

        x = float(rest[0]) + _smallest(exceeded)
        return scale * x if (x < end and end == limit / scale) or i == 1 else limit

    def _scaled(self) -> tuple[FloatArray, float]:
        """Ritz values relative to the largest in size, and that one."""
        scale = max(float(np.abs(self.ritz).max()), float(np.finfo(np.float64).tiny))
        return self.ritz / scale, scale

    def _polynomials(
        self, nodes: FloatArray, weights: FloatArray, degree: int, full_degree: int
    ) -> _OrthonormalPolynomials:
        _, scale = self._scaled()
        return _OrthonormalPolynomials.of(
            nodes,
            weights + self._rounding() ** 2,
            degree,
            self.log_coupling - self.steps * math.log(scale),
            float(np.linalg.norm(self.coupling)),
            full_degree,
        )

    def _rounding(self) -> float:
        return _ROUNDING * float(np.linalg.norm(self.components))


def _smallest(exceeded: Callable[[float], bool]) -> float:
    """The smallest gap that is exceeded, to a few per cent and from above; inf where none is."""
    high = _ROUNDING
    while not exceeded(high):
        high *= 16
        if high > 1e6:
            return math.inf
    low = high / 16
    for _ in range(6):
        middle = math.sqrt(low * high)
        low, high = (low, middle) if exceeded(middle) else (middle, high)
    return high


@dataclass(frozen=True)
class _Kernel:
    """The Christoffel-Darboux kernel at a point x as a polynomial, all divided by exp(l).

    Attributes
    ----------
    log_at_x : float
        Logarithm of its value at x.
    lead : float
        Its leading coefficient times the size exp(log_coupling) of what it multiplies; 0 where its
        degree is less than the number of steps.
    """

    polynomials: _OrthonormalPolynomials
    coefficients: FloatArray
    log_at_x: float
    lead: float

    def __call__(self, nodes: FloatArray) -> FloatArray:
        """Its values at other points."""
        values = np.array(list(self.polynomials.at(nodes)))
        return self.coefficients @ values


@dataclass(frozen=True)
class _OrthonormalPolynomials:
    """Three-term recurrence of the polynomials orthonormal for nodes and weights.

    The polynomial of the highest degree may vanish at all nodes: its norm is that of the coupling.
    """

    alpha: list[float]
    beta: list[float]
    log_lead: float | None

    @classmethod
    def of(
        cls,
        nodes: FloatArray,
        weights: FloatArray,
        degree: int,
        log_coupling: float,
        coupling: float,
        full_degree: int,
    ) -> _OrthonormalPolynomials:
        total = float(weights.sum())
        basis = [np.sqrt(weights / total)]
        alpha: list[float] = []
        beta: list[float] = []
        log_lead = log_coupling
        for step in range(1, degree + 1):
            image = nodes * basis[-1]
            alpha.append(float(basis[-1] @ image))
            together = np.array(basis)
            for _ in range(2):
                image = image - together.T @ (together @ image)
            norm = float(np.linalg.norm(image))
            if step == full_degree and coupling > 0:
                extra = log_lead + math.log(coupling) - 0.5 * math.log(total)
                norm = math.hypot(norm, math.exp(min(extra, 600.0)))
            beta.append(max(norm, _ROUNDING))
            log_lead -= math.log(beta[-1])
            if norm <= _ROUNDING:
                break
            basis.append(image / norm)
        return cls(alpha, beta, log_lead if len(beta) == full_degree else None)

    def at(self, x: FloatArray) -> Iterator[FloatArray]:
        """Their values, degree by degree."""
        behind, value, b_behind = np.zeros_like(x), np.ones_like(x), 0.0
        yield value
        for a, b in zip(self.alpha, self.beta, strict=True):
            behind, value = value, ((x - a) * value - b_behind * behind) / b
            b_behind = b
            yield value

    def kernel(self, x: float) -> _Kernel:
        """The kernel at x, divided by a power that keeps it in range."""
        values, log_scale, b_behind = [0.0, 1.0], 0.0, 0.0
        for a, b in zip(self.alpha, self.beta, strict=True):
            values.append(((x - a) * values[-1] - b_behind * values[-2]) / b)
            b_behind = b
            if abs(values[-1]) > 1e100:
                values = [y * 1e-100 for y in values]
                log_scale += 100 * math.log(10.0)
        coefficients = np.array(values[1:])
        lead = 0.0
        if self.log_lead is not None and coefficients[-1] != 0.0:
            lead = float(coefficients[-1]) * math.exp(min(self.log_lead, 600.0))
        log_at_x = math.log(float(coefficients @ coefficients)) + log_scale
        return _Kernel(self, coefficients, log_at_x, lead)


def log_smallest_squared_singular_value(rows: int, columns: int) -> float:
    """The log of a t that the squared smallest singular value of a Gaussian matrix is below with
    `FAILURE_PROBABILITY` at most: from the bound ``L t^((columns - rows - 1) / 2)`` on its density.
    """
    excess = columns - rows + 1
    log_density = (
        (excess - 2) / 2 * math.log(2)
        + math.lgamma((columns + 1) / 2)
        - math.lgamma(rows / 2)
        - math.lgamma(excess)
    )
    return 2 / excess * (math.log(FAILURE_PROBABILITY) + math.log(excess / 2) - log_density)
