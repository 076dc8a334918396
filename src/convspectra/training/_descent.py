"""Gradient descent on a kernel: Algorithms 3.1, 3.2 and 3.3 of the paper, and steps without tuning.

The step of each algorithm is a constant in the paper, which leaves its size open. "auto" is
one that needs no tuning:

- 3.1 minimizes ``1/2 sum_p |Omega_p| ||K_p||^2``, whose Hessian is diag(|Omega|): the best constant
  step is ``2 / (min |Omega| + max |Omega|)``.
- 3.2 and 3.3 are neither smooth nor convex. Their step is that of the subgradient level method
  (Goffin and Kiwiel, Math. Program. 85, 1999): Polyak's step ``(R - level) / ||G||^2`` towards a
  level below the best objective so far. The level goes down, twice as deep, while it is reached;
  where it is not, its depth is halved. It starts at the known floor -n/2 of 3.3, and for 3.2,
  which has no floor (-sigma_min scales with the kernel), at twice the objective.

Note [Patience]. The search for a level may take twice as many steps each time that its depth is
halved, so that the kernel can travel as far as before. With a fixed number of steps the whole
way left is a geometric series, and the descent ends where no minimum is: 3.2 stalls on every
square layer, although scaling the kernel alone would go on for ever.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from numbers import Integral, Real

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

from convspectra import penalties
from convspectra.operator import (
    ConvOperator,
    check_choice,
    kernel_to_weight,
    not_compiled,
    weight_to_kernel,
    with_gradients,
)
from convspectra.spectra import sigma_max, sigma_min

ALGORITHMS = ("3.1", "3.2", "3.3")
"""The algorithms of the paper, arXiv:2102.04294, by their numbers."""
PAPER_STEPS = {"3.1": 1e-5, "3.2": 1e-4, "3.3": 1e-5}
"""The constant step of each in the paper's Section 4."""
PATIENCE = 5
"""Iterations that miss the first level before its depth is halved (Note [Patience])."""
FIRST_MOVE = 0.01
"""The first level of 3.2 is no nearer than a move of the kernel by this part of it."""


@dataclass(frozen=True)
class DescentResult:
    """Where a descent ended, and how it went.

    Attributes
    ----------
    kernel : Tensor
        The kernel with the lowest objective, in the paper's layout (*taps, g, h), float64.
    status : {"converged", "stalled", "max_iter"}
        "stalled" where the level of the "auto" rule has closed in on the best objective, to `tol`
        of it, without being reached: a kink, where several singular values are smallest together.
    iterations : int
        Number of steps taken.
    sigma_max, sigma_min, objective, step_size : ndarray
        Per iterate, the start first: shapes (iterations + 1,), but (iterations,) for step_size.
    gap : ndarray or None
        For Algorithm 3.3, the objective less its floor -n/2, shape (iterations + 1,).

    Examples
    --------
    >>> import torch, convspectra as cs
    >>> result = cs.descend(torch.ones(3, 3, 1, 1), 8, algorithm="3.1", step_size="auto")
    >>> result.converged, result.iterations < 10
    (True, True)
    """

    kernel: Tensor
    status: str
    iterations: int
    sigma_max: npt.NDArray[np.float64]
    sigma_min: npt.NDArray[np.float64]
    objective: npt.NDArray[np.float64]
    step_size: npt.NDArray[np.float64]
    gap: npt.NDArray[np.float64] | None

    @property
    def converged(self) -> bool:
        """Whether the convergence test was met."""
        return self.status == "converged"


@not_compiled
@with_gradients
def descend(
    kernel: Tensor,
    input_size: int | Sequence[int],
    *,
    algorithm: str = "3.3",
    step_size: float | str = "paper",
    max_iter: int = 500,
    tol: float = 1e-6,
    callback: Callable[[int, float], None] | None = None,
) -> DescentResult:
    """Gradient descent on one of the paper's penalties, for a stride-1, zero-padded layer.

    Parameters
    ----------
    kernel : Tensor
        (*taps, g, h), the paper's layout; left as it is.
    input_size : int or sequence of int
        N, or one size per axis.
    algorithm : {"3.1", "3.2", "3.3"}
        On 1/2 ||M||_F^2, -sigma_min(M), or 1/2 ||M||_F^2 - min(rows, columns) sigma_min(M).
    step_size : float or {"paper", "auto"}
        A constant step; the paper's (1e-5, 1e-4 and 1e-5); or, with "auto", the step of the module
        documentation that needs no tuning.
    max_iter : int
        Most steps.
    tol : float
        Stop when ``||G||_F <= tol * ||G_0||_F`` for the gradient G; Algorithm 3.3 also stops when
        the gap to its floor is at most ``tol * n / 2``. The paper says "while not converged" only.
    callback : callable (iteration, objective) -> None, optional
        Called after each step with its number and the objective there; what it raises reaches the
        caller.

    Returns
    -------
    DescentResult
        With ``converged=False`` where the descent stalled or ran to `max_iter`. Algorithm 3.2 never
        converges: its objective is unbounded below.

    Raises
    ------
    ValueError
        For a kernel or size that `ConvOperator` refuses, or an option outside its range.
    FloatingPointError
        If the kernel overflows or becomes NaN: the step is too long.

    Notes
    -----
    Cost per step: one sigma_max, one sigma_min, and one weight gradient. Source: the paper,
    Section 3.

    Examples
    --------
    >>> import torch, convspectra as cs
    >>> start = torch.full((3, 3, 1, 1), 0.1)
    >>> start[1, 1] = 1.0
    >>> result = cs.descend(start, 8, algorithm="3.3", step_size="auto", max_iter=40)
    >>> bool(result.gap[-1] < 0.1 * result.gap[0])
    True
    """
    check_choice("algorithm", algorithm, ALGORITHMS)
    if isinstance(max_iter, bool) or not isinstance(max_iter, Integral) or max_iter < 0:
        raise ValueError(f"expected max_iter to be an integer of at least 0, got {max_iter!r}")
    if isinstance(tol, bool) or not isinstance(tol, Real) or not 0 <= tol < math.inf:
        raise ValueError(f"expected tol to be a finite number of at least 0, got {tol!r}")
    weight = kernel_to_weight(kernel).detach().clone()
    op = ConvOperator(weight, input_size)
    op = op.with_weight(weight.double())
    constant = _constant_step(algorithm, step_size, op)
    floor = -0.5 * min(op.shape) if algorithm == "3.3" else None
    level = _Level(floor) if step_size == "auto" and algorithm != "3.1" else None
    best = (math.inf, 0, op, op.weight)
    history: list[tuple[float, float, float]] = []
    steps: list[float] = []
    first_size, status = math.inf, "max_iter"
    while True:
        objective, smallest_value, gradient = _evaluate(algorithm, op)
        history.append((sigma_max(op), smallest_value, objective))
        if callback is not None and steps:
            callback(len(steps), objective)
        size = _norm(gradient)
        first_size = size if len(history) == 1 else first_size
        best = min(best, (objective, len(steps), op, gradient), key=lambda entry: entry[:2])
        if size <= tol * first_size or (
            floor is not None and objective - floor <= tol * abs(floor)
        ):
            status = "converged"
            break
        if len(steps) == max_iter:
            break
        if level is None:
            step = constant
        else:
            if level.missed(objective, FIRST_MOVE * size * (_norm(op.weight) or 1.0)):
                objective, _, op, gradient = best
            step = level.step(objective, _norm(gradient))
            if level.depth <= tol * abs(best[0]):
                status = "stalled"
                break
        op = _moved(op, gradient, step)
        steps.append(step)
    largest, smallest, objectives = np.array(history).T
    return DescentResult(
        kernel=weight_to_kernel(best[2].weight),
        status=status,
        iterations=len(steps),
        sigma_max=largest,
        sigma_min=smallest,
        objective=objectives,
        step_size=np.array(steps),
        gap=None if floor is None else objectives - floor,
    )


class _Level:
    """The level that Polyak's step aims at: `depth` below the best objective."""

    def __init__(self, floor: float | None) -> None:
        self._floor = floor
        self._best = math.inf
        self._misses = 0
        self._patience = PATIENCE
        self.depth = 0.0

    def missed(self, objective: float, least: float) -> bool:
        """Take note of an objective; True when the level is given up, to go on from the best.

        `least` is the least depth to begin with, where the floor is not known.
        """
        if self._best == math.inf:
            self._best = objective
            if self._floor is None:
                self.depth = max(abs(objective), least)
            else:
                self.depth = objective - self._floor
            return False
        reached = objective <= self._best - 0.5 * self.depth
        self._best = min(self._best, objective)
        if reached:
            self._misses = 0
            self.depth *= 2
        else:
            self._misses += 1
        if self._floor is not None:
            self.depth = min(self.depth, self._best - self._floor)
        if self._misses < self._patience:
            return False
        self._misses = 0
        self._patience *= 2
        self.depth *= 0.5
        return True

    def step(self, objective: float, gradient_norm: float) -> float:
        """Polyak's step to the level."""
        return (objective - self._best + self.depth) / gradient_norm**2


def _constant_step(algorithm: str, step_size: float | str, op: ConvOperator) -> float:
    """The constant step asked for; the "auto" rule has one for Algorithm 3.1 only."""
    if step_size == "auto":
        counts = op.geometry.tap_counts()
        used = counts[counts > 0]
        return 2.0 / float(used.min() + used.max())
    step = PAPER_STEPS[algorithm] if step_size == "paper" else step_size
    if isinstance(step, (bool, str)) or not isinstance(step, Real):
        raise ValueError(
            f"expected step_size to be a positive number, 'paper' or 'auto', got {step_size!r}"
        )
    if not 0 < step < math.inf:
        raise ValueError(f"expected a positive, finite step_size, got {step_size!r}")
    return float(step)


def _evaluate(algorithm: str, op: ConvOperator) -> tuple[float, float, Tensor]:
    """Objective, sigma_min and gradient, with the singular values computed once."""
    variable = op.weight.detach().requires_grad_()
    layer = op.with_weight(variable)
    if algorithm == "3.1":
        value = penalties.frobenius(layer)
        smallest = sigma_min(op)
    else:
        value = penalties.sigma_min(layer)
        smallest = -value.item()
    if algorithm == "3.3":
        value = penalties.frobenius(layer) + min(op.shape) * value
    (gradient,) = torch.autograd.grad(value, variable)
    return value.item(), smallest, gradient


def _moved(op: ConvOperator, gradient: Tensor, step: float) -> ConvOperator:
    weight = op.weight - step * gradient
    if not bool(torch.isfinite(weight).all()):
        raise FloatingPointError(
            f"the kernel is no longer finite after a step of {step:.3e}; use a shorter step_size"
        )
    return op.with_weight(weight)


def _norm(x: Tensor) -> float:
    return float(torch.linalg.vector_norm(x))
