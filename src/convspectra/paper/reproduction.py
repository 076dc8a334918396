"""Section 4 of the paper: Algorithms 3.1 to 3.3 on MATLAB's ``rand('state',1); rand(3,3,g,h)``.

Each algorithm runs with the paper's constant step and, from the same kernel, with the step that
needs no tuning (``step_size="auto"``): on the paper's two kernels, 3 x 3 x 3 x 1 and
3 x 3 x 1 x 3, and on others, square layers too.
"""

from __future__ import annotations

import itertools
from collections.abc import Callable, Iterator
from dataclasses import asdict, dataclass

import torch

from convspectra import matlab
from convspectra.paper.threads import one_thread
from convspectra.training import ALGORITHMS, PAPER_STEPS, descend

Progress = Callable[[str, int, int], None]
"""Called with (kernel, steps done, steps in all) as the six runs on a kernel go on."""

PAPER_CHANNELS = ((3, 1), (1, 3))
"""Input and output channels of the paper's Figures 4.1 to 4.3."""
TAPS = (3, 3)
"""Size of the paper's kernels."""
STATE = 1
"""State of MATLAB's generator in the paper."""
STEP_RULES = ("paper", "auto")
"""The fixed step of the paper, and one that is tuned."""


@dataclass(frozen=True)
class Settings:
    """The choice of runs; the defaults are those of ``convspectra reproduce``.

    Attributes
    ----------
    input_size : int
        N of the N x N input; 20 in the paper.
    max_iter : int
        Most steps on the paper's kernels. With its steps of 1e-5 the kernel shrinks by 0.4% a
        step, so that a few hundred show where it is going.
    further_max_iter : int
        Most steps on the further kernels.
    further : tuple of (g, h)
        Channels of the further kernels; one of the paper's two is not run twice.
    """

    input_size: int = 20
    max_iter: int = 200
    further_max_iter: int = 60
    further: tuple[tuple[int, int], ...] = ((1, 1), (2, 2), (3, 3), (2, 3))

    def __post_init__(self) -> None:
        for channels in self.further:
            if len(channels) != 2 or not all(isinstance(c, int) and c > 0 for c in channels):
                raise ValueError(
                    f"expected two positive channel numbers (g, h) for each size, got {channels!r}"
                )
        for name in ("input_size", "max_iter", "further_max_iter"):
            value = getattr(self, name)
            if isinstance(value, bool) or not isinstance(value, int) or value < 1:
                raise ValueError(f"expected {name} to be a positive integer, got {value!r}")
        if self.input_size < 2:
            raise ValueError(
                f"expected an input_size of at least 2, so that every tap reads a pixel, got "
                f"{self.input_size}"
            )


@one_thread()
def run(
    settings: Settings, progress: Progress = lambda name, done, total: None
) -> dict[str, object]:
    """Run all descents. The result holds numbers and strings only, so that it can be JSON.

    Notes
    -----
    Cost with the default settings: 1,000 steps of 10 to 80 ms for each of the paper's kernels, and
    300 for each further one: three minutes, in one thread.
    """
    kernels = dict.fromkeys((*PAPER_CHANNELS, *settings.further))
    runs = [entry for channels in kernels for entry in _on_kernel(channels, settings, progress)]
    return {"settings": asdict(settings), "runs": runs}


def _on_kernel(
    channels: tuple[int, int], settings: Settings, progress: Progress
) -> Iterator[dict[str, object]]:
    """Every algorithm with both step rules from one kernel."""
    shape = (*TAPS, *channels)
    name = " x ".join(map(str, shape))
    in_paper = channels in PAPER_CHANNELS
    max_iter = settings.max_iter if in_paper else settings.further_max_iter
    cases = list(itertools.product(ALGORITHMS, STEP_RULES))
    total = len(cases) * max_iter
    for i, (algorithm, rule) in enumerate(cases):

        def advance(done: int, objective: float = 0.0, before: int = i * max_iter) -> None:
            progress(name, before + done, total)

        result = descend(
            torch.from_numpy(matlab.rand(shape, STATE)),
            settings.input_size,
            algorithm=algorithm,
            step_size=rule,
            max_iter=max_iter,
            callback=advance,
        )
        advance(max_iter)
        yield {
            "algorithm": algorithm,
            "kernel": name,
            "in_paper": in_paper,
            "step_rule": rule,
            "paper_step": PAPER_STEPS[algorithm],
            "status": result.status,
            "iterations": result.iterations,
            "floor": _floor(algorithm, settings.input_size**2 * min(channels)),
            "sigma_max": result.sigma_max.tolist(),
            "sigma_min": result.sigma_min.tolist(),
            "objective": result.objective.tolist(),
            "gap": None if result.gap is None else result.gap.tolist(),
            "step": result.step_size.tolist(),
        }


def _floor(algorithm: str, smaller_side: int) -> float | None:
    """A bound that the objective cannot go below; None for the one that has no such bound."""
    return {"3.1": 0.0, "3.2": None, "3.3": -0.5 * smaller_side}[algorithm]
