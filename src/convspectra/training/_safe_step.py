"""How long a step against the gradient of a penalty may be, so that it cannot overflow.

Note [Step length]. A step of length t moves M by ``t L L' G``, where G is the gradient by M and L
the map from weights to matrices; ``||L L'||`` is the most that a tap is used, max |Omega|, and on
matrices of rank k no more than k times the number of taps, since each entry of ``L' u v'`` is an
inner product of parts of unit vectors. With the largest curvature c of the penalty as a function
of a singular value, steps of ``t c ||L L'|| <= 1`` do not overshoot along it. Penalties whose slope
grows without limit as sigma_min goes to 0 may also move a weight by `OWN_PART` of its size at most.
"""

from __future__ import annotations

import torch
from torch import Tensor

from convspectra.operator import ConvOperator
from convspectra.spectra import glimpsed_ends, tap_norm_bound
from convspectra.training._gradients import Gradient

LANCZOS_STEPS = 8
"""Products with M'M from which sigma_max is taken where the bound from the taps is not enough.

A choice: steps of up to twice the limit do not grow along a curvature, so that sigma_max, whose
square is in it, may be seen 30% too small.
"""

OWN_PART = 0.1
"""The part of its own norm by which a step may move a weight where slopes have no bound.

A choice: the gradient of "cond" is orthogonal to the weight, which therefore grows with each step
that is shortened, by sqrt(1 + OWN_PART^2): 0.5% here, to 1.16 times as much in 30 steps; twice that
part grows it by 2% a step.
"""


def whole_spectrum_step(op: ConvOperator) -> float:
    """The longest step for the mean over all n values of a function of curvature 1."""
    return min(op.shape) / max(1.0, float(op.geometry.tap_counts().max()))


def ends_step(op: ConvOperator, k: int) -> float:
    """The longest step for the mean over k values of a function of curvature 1."""
    counts = op.geometry.tap_counts()
    return max(k / max(1.0, float(counts.max())), 1.0 / max(1, int((counts > 0).sum())))


def quartic_step(op: ConvOperator, gain: float, wanted: float) -> float:
    """The longest step for the mean of ``(s^2 - gain^2)^2``, or one of at least `wanted`.

    Its second derivative is at most ``8 s^2 + 4 max(s^2 - gain^2, gain^2)`` in any direction.
    """
    alpha = gain**2

    def longest(sigma: float) -> float:
        square = sigma**2
        return whole_spectrum_step(op) / (8 * square + 4 * max(square - alpha, alpha))

    bounded = longest(tap_norm_bound(op))
    if bounded >= wanted:
        return bounded
    with torch.no_grad():
        return longest(glimpsed_ends(op.with_weight(op.weight.detach()), LANCZOS_STEPS)[1])


def own_size_step(weight: Tensor, gradient: Gradient) -> float:
    """The longest step that moves a weight by no more than `OWN_PART` of its own norm."""
    change = torch.linalg.vector_norm(gradient.product(weight, weight.dtype))
    return OWN_PART * float(torch.linalg.vector_norm(weight.detach()) / change.clamp_min(1e-30))
