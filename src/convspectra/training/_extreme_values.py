"""Penalties that can be tracked, as functions of ||M||_F^2 and of singular values at the ends.

All are per singular value: of the order of 1 for a layer of any size whose singular values are.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from functools import partial
from typing import Any, TypeAlias

import torch
from torch import Tensor

from convspectra.operator import ConvOperator, check_band, check_gain, check_positive_integer
from convspectra.training._safe_step import ends_step, whole_spectrum_step

Function: TypeAlias = Callable[[Tensor, Tensor, Tensor], Tensor]


@dataclass(frozen=True)
class ExtremePenalty:
    """A penalty of the extreme singular values of a layer.

    Attributes
    ----------
    smallest, largest : int
        How many singular values it reads at each end.
    function : callable
        Of the smallest values, ascending, (count, smallest), the largest, descending, (count,
        largest), and ``||M||_F^2 / min(rows, columns)``, (count,), to the penalties (count,).
    longest_step : callable, optional
        The longest step against its gradient for a layer (Note [Step length]); None where its
        slopes do not grow with the singular values, so that no step can overflow.
    bounded_slope : bool
        Whether the slopes stay finite as sigma_min goes to 0.
    """

    smallest: int
    largest: int
    function: Function
    longest_step: Callable[[ConvOperator], float] | None = None
    bounded_slope: bool = True


def _frobenius() -> ExtremePenalty:
    return ExtremePenalty(0, 0, _half_mean_square, whole_spectrum_step)


def _half_mean_square(low: Tensor, high: Tensor, mean_square: Tensor) -> Tensor:
    return 0.5 * mean_square


def _sigma_min(k: int = 1) -> ExtremePenalty:
    check_positive_integer("k", k)
    return ExtremePenalty(k, 0, partial(_minus_smallest, k=k))


def _minus_smallest(low: Tensor, high: Tensor, mean_square: Tensor, k: int) -> Tensor:
    return -low[:, :k].mean(1)


def _sigma_max(k: int = 1) -> ExtremePenalty:
    check_positive_integer("k", k)
    return ExtremePenalty(0, k, partial(_largest, k=k))


def _largest(low: Tensor, high: Tensor, mean_square: Tensor, k: int) -> Tensor:
    return high[:, :k].mean(1)


def _conditioning(gain: float = 1.0, k: int = 1) -> ExtremePenalty:
    check_gain(gain)
    check_positive_integer("k", k)
    function = partial(_square_less_smallest, gain=gain, k=k)
    return ExtremePenalty(k, 0, function, whole_spectrum_step)


def _square_less_smallest(
    low: Tensor, high: Tensor, mean_square: Tensor, gain: float, k: int
) -> Tensor:
    return 0.5 * mean_square - gain * low[:, :k].mean(1)


def _cond() -> ExtremePenalty:
    return ExtremePenalty(1, 1, _log_ratio, bounded_slope=False)


def _log_ratio(low: Tensor, high: Tensor, mean_square: Tensor) -> Tensor:
    return high[:, 0].log() - low[:, 0].log()


def _band(lower: float = 0.5, upper: float = 2.0, k: int = 1, gain: float = 1.0) -> ExtremePenalty:
    check_band(lower, upper)
    check_positive_integer("k", k)
    check_gain(gain)
    hinge = partial(_hinge, lower=gain * lower, upper=gain * upper, k=k)
    return ExtremePenalty(k, k, hinge, partial(ends_step, k=k))


def _hinge(
    low: Tensor, high: Tensor, mean_square: Tensor, lower: float, upper: float, k: int
) -> Tensor:
    below = (lower - low[:, :k]).clamp_min(0)
    above = (high[:, :k] - upper).clamp_min(0)
    return 0.5 * (below.square().mean(1) + above.square().mean(1))


EXTREME_PENALTIES: dict[str, Callable[..., ExtremePenalty]] = {
    "frobenius": _frobenius,
    "sigma_min": _sigma_min,
    "sigma_max": _sigma_max,
    "conditioning": _conditioning,
    "cond": _cond,
    "band": _band,
}
"""Penalties of singular values at the ends, which are followed from step to step."""


def extreme_penalty(name: str, options: Mapping[str, Any]) -> ExtremePenalty:
    """The penalty of that name.

    Raises
    ------
    ValueError
        For options that the penalty does not have, or that cannot be.
    """
    try:
        return EXTREME_PENALTIES[name](**options)
    except TypeError as error:
        raise ValueError(f"penalty_options of {name!r}: {error}") from error


def weighted(
    penalty: ExtremePenalty, scale: Tensor, mean_square: Tensor, low: Tensor, high: Tensor
) -> tuple[Tensor, tuple[Tensor | None, ...]]:
    """The weighted sum of penalties, and its derivatives by ||M||_F^2 / n and the values."""
    variables = [x.detach().double().requires_grad_() for x in (mean_square, low, high)]
    with torch.enable_grad():
        value = (scale * penalty.function(variables[1], variables[2], variables[0])).sum()
        slopes = torch.autograd.grad(value, variables, allow_unused=True)
    narrow = (None if slope is None else slope.to(mean_square.dtype) for slope in slopes)
    return value.detach(), tuple(narrow)
