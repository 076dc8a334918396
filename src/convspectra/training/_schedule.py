"""How the weight of a penalty changes over the steps of training."""

from __future__ import annotations

import math
from dataclasses import dataclass


@dataclass(frozen=True)
class Schedule:
    """A factor for every step: a linear warm-up, an exponential decay, an end; or for every nth.

    Parameters
    ----------
    warmup : int
        Steps over which the factor grows from 1 / warmup to 1.
    half_life : int, optional
        Steps after the warm-up in which the factor halves; None for no decay.
    stop : int, optional
        Step from which on the factor is 0 and nothing is computed; None for never.
    every : int
        The factor is as many times larger at every so many-th step, and 0 between: the same pull at
        a fraction of the cost (lazy regularization: Karras et al., CVPR 2020).

    Raises
    ------
    ValueError
        For a number of steps that cannot be.

    Examples
    --------
    >>> schedule = Schedule(warmup=4, half_life=10, stop=100)
    >>> [schedule(step) for step in (0, 3, 14, 99, 100)]
    [0.25, 1.0, 0.5, 0.0013810679320049757, 0.0]
    >>> [Schedule(every=4)(step) for step in range(6)]
    [4.0, 0.0, 0.0, 0.0, 4.0, 0.0]
    """

    warmup: int = 0
    half_life: int | None = None
    stop: int | None = None
    every: int = 1

    def __post_init__(self) -> None:
        for name, least in (("warmup", 0), ("half_life", 1), ("stop", 0), ("every", 1)):
            value = getattr(self, name)
            if value is None and name in ("half_life", "stop"):
                continue
            if isinstance(value, bool) or not isinstance(value, int) or value < least:
                raise ValueError(f"expected {name} to be an integer >= {least}, got {value!r}")

    def __call__(self, step: int) -> float:
        """The factor at a step, counted from 0."""
        if step % self.every or (self.stop is not None and step >= self.stop):
            return 0.0
        factor = float(self.every) * (min(1.0, (step + 1) / self.warmup) if self.warmup else 1.0)
        if self.half_life is not None:
            factor *= math.pow(0.5, max(0, step - self.warmup) / self.half_life)
        return factor
