"""Learning rate of Adam at which a network of isometric layers trains."""

from __future__ import annotations

LEARNING_RATE_BUDGET = 3.0
"""Adam's learning rate times the sum of all fan-ins: 0.02 / L for L layers of 16 channels and 3 x 3
taps, with which 20 to 1,000 layers train. One step changes the product of all layers by a part that
grows with that sum: with 1e-3 at 100 layers it is seven times as long, and they do not train."""
HIGHEST_RATE = 1e-2
"""The learning rate of shallow networks: a choice, ten times Adam's default."""


def suggested_rate(fan_ins: int) -> float:
    """The rate for layers whose fan-ins, inputs of one output number each, have this sum.

    Examples
    --------
    >>> f"{suggested_rate(50 * 72):.1e}"
    '8.3e-04'
    """
    return min(HIGHEST_RATE, LEARNING_RATE_BUDGET / max(1, fan_ins))
