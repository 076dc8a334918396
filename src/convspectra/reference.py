"""What the last exact computation of a layer found, and when its vectors are next improved."""

from __future__ import annotations

from dataclasses import dataclass

from torch import Tensor

FOLLOWED_TO = (0.05, 0.01)
"""Relative errors of smallest and of largest values that are allowed for."""
MUCH, LITTLE = 0.5, 0.12
"""Parts of these that an improvement changes, above which the next comes in half the time, and up
to which it comes in twice the time.
"""
LONGEST = 6
"""The longest time between two improvements, in least ones."""
CHANGE_EVERY = 2
"""Every so many improvements the direction of the change is followed, too."""


@dataclass
class Reference:
    """The last exact computation of a layer, and what happened since.

    Attributes
    ----------
    weight : Tensor
        The weight at that time.
    lower, upper : list of float
        Enclosures of sigma_min and sigma_max at that time.
    step : int
        When it was.
    tried : int
        When the last one was tried, this one or one that failed.
    failures : int
        Exact computations that did not converge; the vectors at hand were kept.
    interval, due : int
        Steps from the last improvement of the vectors to the next, and when that is.
    improvements : int
        How many there were.
    """

    weight: Tensor
    lower: list[float]
    upper: list[float]
    step: int
    tried: int
    failures: int
    interval: int
    due: int
    improvements: int = 0

    @property
    def follows_change(self) -> bool:
        """Whether the next improvement follows the direction of the change, too."""
        return self.improvements % CHANGE_EVERY == 0

    def moved(self, drift: float) -> tuple[list[float], list[float]]:
        """Lower and upper bounds on sigma_min and sigma_max of a matrix that near, in 2-norm."""
        lower = [max(0.0, bound - drift) for bound in self.lower]
        return lower, [bound + drift for bound in self.upper]

    def take_turn(self, step: int, smallest: float, largest: float, least: int) -> None:
        """Note an improvement that moved smallest and largest values by these parts of them.

        The next one comes after `least` steps or more: what has not changed much is left longer.
        """
        self.improvements += 1
        moved = max(smallest / FOLLOWED_TO[0], largest / FOLLOWED_TO[1])
        if moved > MUCH:
            self.interval = max(least, self.interval // 2)
        elif moved <= LITTLE:
            self.interval = min(LONGEST * least, 2 * self.interval)
        self.due = step + self.interval
