"""Threads on a busy machine: how they wait for each other, and a word where they lose by it.

Note [Spinning]. A thread of OpenMP that waits spins: it asks again and again whether the others
are done, and takes a core for that. On busy cores the thread that is waited for has lost its core
to the one that waits. A wait policy of PASSIVE has threads sleep instead. The runtime reads the
policy once, when torch is loaded.
"""

from __future__ import annotations

import os
import sys
import time
from collections.abc import Callable, Iterator, Mapping, MutableMapping
from contextlib import contextmanager

WAIT_VARIABLES = ("OMP_WAIT_POLICY", "GOMP_SPINCOUNT", "KMP_BLOCKTIME")
"""The variables by which OpenMP, GNU's and Intel's runtime are told how to wait."""
LEAST_SECONDS = 5.0
"""Processor time from which on advice is given. A choice: below it there is little to save."""
STARVED = 0.5
"""Share of the time in which the first thread runs, below which a machine counts as busy. An
audit of 11 layers, two threads on two cores with five other jobs: 0.18 with spinning. Alone it is
near 1, and at half of this value the spinning of fewer other jobs goes unnoticed."""
WAITING = 0.5
"""Processor time of the other threads over that of the first from which on they count as spinning.
In that audit 0.9 with spinning and 0.2 with a passive policy; both sides have room for a factor
of two."""


def wait_passively(environ: MutableMapping[str, str] = os.environ) -> None:
    """Set a passive wait policy, unless the user has set one or torch is loaded already."""
    if "torch" not in sys.modules and not any(name in environ for name in WAIT_VARIABLES):
        environ["OMP_WAIT_POLICY"] = "PASSIVE"


def advice(
    wall: float, first: float, whole: float, threads: int, environ: Mapping[str, str]
) -> str | None:
    """A sentence with the variable to set if threads lost their time to waiting, or None.

    Parameters
    ----------
    wall, first, whole : float
        Seconds that went by, of processor time of the first thread, and of all threads.
    threads : int
        How many threads PyTorch uses.
    environ : mapping
        The environment, for the wait policy at hand.
    """
    starved = first < STARVED * wall
    waiting = whole - first > WAITING * first
    if threads == 1 or whole < LEAST_SECONDS or not (starved and waiting):
        return None
    other = " or OMP_WAIT_POLICY=PASSIVE"
    if environ.get("OMP_WAIT_POLICY", "").upper() == "PASSIVE":
        other = ""
    return (
        f"the machine is busy: {threads} threads had {whole:.0f} s of processor time in "
        f"{wall:.0f} s and spent much of it waiting for each other; set OMP_NUM_THREADS=1{other}"
    )


@contextmanager
def watched(say: Callable[[str], None]) -> Iterator[None]:
    """Run the body, and say what would help if its threads lost their time to waiting."""
    before = time.perf_counter(), time.thread_time(), time.process_time()
    try:
        yield
    finally:
        after = time.perf_counter(), time.thread_time(), time.process_time()
        if (torch := sys.modules.get("torch")) is not None:
            wall, first, whole = (b - a for a, b in zip(before, after, strict=True))
            sentence = advice(wall, first, whole, torch.get_num_threads(), os.environ)
            if sentence is not None:
                say(sentence)
