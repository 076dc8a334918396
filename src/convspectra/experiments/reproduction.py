"""Section 4 of the paper: Algorithms 3.1 to 3.3 on MATLAB's ``rand('state',1); rand(3,3,g,h)``.

Each algorithm runs with the paper's constant step and, from the same kernel, with the step that
needs no tuning (``step_size="auto"``): on the paper's two kernels, 3 x 3 x 3 x 1 and
3 x 3 x 1 x 3, and on others, square layers too.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import asdict, dataclass

import torch

from convspectra import matlab
from convspectra.descent import ALGORITHMS, PAPER_STEPS, descend

Progress = Callable[[str, int, int], None]
"""Called with (name of the run, steps done, steps in all)."""

PAPER_CHANNELS = ((3, 1), (1, 3))
TAPS = (3, 3)
STATE = 1
STEP_RULES = ("paper", "auto")


@dataclass(frozen=True)
class Settings:
    """What is run; the defaults are those of ``convspectra reproduce``.

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
    max_iter: int = 300
    further_max_iter: int = 75
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
                f"expected an input_size of at least 2, which a 3 x 3 kernel needs, got "
                f"{self.input_size}"
            )


def run(
    settings: Settings, progress: Progress = lambda name, done, total: None
) -> dict[str, object]:
    """Run all descents. The result holds numbers and strings only, so that it can be JSON.

    Notes
    -----
    Cost with the default settings: 1,500 steps of 10 to 80 ms for each of the paper's kernels, and
    375 for each further one; two to three minutes. Runs in one thread.
    """
    kernels = dict.fromkeys((*PAPER_CHANNELS, *settings.further))
    threads = torch.get_num_threads()
    # Matrices are small: on a busy machine threads that wait for each other cost twenty times more.
    torch.set_num_threads(1)
    try:
        runs = [
            _descent(channels, algorithm, rule, settings, progress)
            for channels in kernels
            for algorithm in ALGORITHMS
            for rule in STEP_RULES
        ]
    finally:
        torch.set_num_threads(threads)
    return {"settings": asdict(settings), "runs": runs}


def _descent(
    channels: tuple[int, int], algorithm: str, rule: str, settings: Settings, progress: Progress
) -> dict[str, object]:
    """One run, as plain numbers."""
    in_paper = channels in PAPER_CHANNELS
    max_iter = settings.max_iter if in_paper else settings.further_max_iter
    shape = (*TAPS, *channels)
    kernel = " x ".join(map(str, shape))
    name = f"{algorithm}, {kernel}, {rule}"
    progress(name, 0, max_iter)
    result = descend(
        torch.from_numpy(matlab.rand(shape, STATE)),
        settings.input_size,
        algorithm=algorithm,
        step_size=rule,
        max_iter=max_iter,
        callback=lambda done, objective: progress(name, done, max_iter),
    )
    progress(name, max_iter, max_iter)
    smallest_side = settings.input_size**2 * min(channels)
    return {
        "algorithm": algorithm,
        "kernel": kernel,
        "in_paper": in_paper,
        "step_rule": rule,
        "paper_step": PAPER_STEPS[algorithm],
        "status": result.status,
        "iterations": result.iterations,
        "floor": {"3.1": 0.0, "3.2": None, "3.3": -0.5 * smallest_side}[algorithm],
        "sigma_max": result.sigma_max.tolist(),
        "sigma_min": result.sigma_min.tolist(),
        "objective": result.objective.tolist(),
        "gap": None if result.gap is None else result.gap.tolist(),
        "step": result.step_size.tolist(),
    }
