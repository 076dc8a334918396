"""Run a function in a fresh interpreter with a time limit, and measure the memory it took.

``python -m common.measure module:function '{"argument": 1}' threads`` is what the child runs;
its last line is the function's answer (a dict) as JSON, with ``peak_bytes`` added.
"""

from __future__ import annotations

import importlib
import json
import os
import resource
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any, TypeVar

import torch

from convspectra.auditing._environment import processor, versions

T = TypeVar("T")
"""The result of a timed function."""
ROOT = Path(__file__).resolve().parents[1]
"""The folder that a fresh interpreter starts in."""


def call(
    function: str,
    arguments: dict[str, Any],
    *,
    seconds: float = 60.0,
    threads: int = 2,
    fresh: bool = True,
) -> dict[str, Any]:
    """The answer of ``module:function``, or ``{"failure": reason}``: never an exception.

    Without `fresh` it runs in this process, without a time limit: for small layers.
    """
    if not fresh:
        try:
            return {**_function(function)(**arguments), "peak_bytes": peak_bytes()}
        except Exception as error:  # whatever a peer raises is its row in the table
            return {"failure": _one_line(error)}
    variables = dict.fromkeys(
        ("OMP_NUM_THREADS", "MKL_NUM_THREADS", "OPENBLAS_NUM_THREADS"), str(threads)
    )
    command = (sys.executable, "-m", __name__, function, json.dumps(arguments), str(threads))
    try:
        done = subprocess.run(
            command,
            cwd=ROOT,
            env={**os.environ, **variables},
            capture_output=True,
            text=True,
            timeout=seconds,
            check=False,
        )
    except subprocess.TimeoutExpired:
        return {"failure": f"not done in {seconds:g} s"}
    if done.returncode < 0:
        return {"failure": f"killed by signal {-done.returncode}"}
    if done.returncode > 0:
        return {"failure": (done.stderr.strip().splitlines() or ["no message"])[-1][:200]}
    answer: dict[str, Any] = json.loads(done.stdout.splitlines()[-1])
    return answer


def timed(function: Callable[[], T]) -> tuple[float, T]:
    """Seconds of one call, and its result."""
    start = time.perf_counter()
    result = function()
    return time.perf_counter() - start, result


def peak_bytes() -> int:
    """Most memory that this process has held.

    From /proc where there is one: what getrusage says of a fresh process starts at its parent's.
    """
    status = Path("/proc/self/status")
    if status.exists():
        for line in status.read_text().splitlines():
            if line.startswith("VmHWM:"):
                return int(line.split()[1]) * 1024
    unit = 1 if sys.platform == "darwin" else 1024
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * unit


def machine() -> str:
    """The processor and the versions that the figures belong to."""
    return f"{processor()}, {versions('torch')}"


def _function(name: str) -> Callable[..., dict[str, Any]]:
    module, _, attribute = name.partition(":")
    function: Callable[..., dict[str, Any]] = getattr(importlib.import_module(module), attribute)
    return function


def _one_line(error: Exception) -> str:
    lines = str(error).splitlines() or [""]
    return f"{type(error).__name__}: {lines[0]}"[:200]


def main() -> None:
    function, arguments, threads = sys.argv[1:]
    torch.set_num_threads(int(threads))
    answer = _function(function)(**json.loads(arguments))
    print(json.dumps({**answer, "peak_bytes": peak_bytes()}))


if __name__ == "__main__":
    main()
