"""Calls spread over processes, with the answers as they come."""

from __future__ import annotations

import multiprocessing
import os
import signal
import threading
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ProcessPoolExecutor, as_completed
from multiprocessing.queues import Queue
from typing import TypeAlias, TypeVar

import torch

Argument = TypeVar("Argument")
"""One call's argument."""
Answer = TypeVar("Answer")
"""One call's answer."""
Device: TypeAlias = str | torch.device | None
"""Where a call computes; None leaves the choice to the function."""


def answers(
    function: Callable[[Argument, Device], Answer],
    arguments: Sequence[Argument],
    devices: Sequence[Device],
) -> Iterator[tuple[int, Answer]]:
    """The function of every argument with its position, in the order in which they finish.

    They are begun in the order given, by one process a device; where there is one device or one
    argument by this process. The processes share out this one's threads.

    Parameters
    ----------
    function : callable (argument, device) -> answer
        At the top level of a module, so that processes can find it.
    devices : sequence of device or None
        None leaves the choice to the function.
    """
    if len(devices) <= 1 or len(arguments) <= 1:
        for i, argument in enumerate(arguments):
            yield i, function(argument, devices[0])
        return
    devices = devices[: len(arguments)]
    threads = max(1, torch.get_num_threads() // len(devices))
    # Spawned: a fork of a process in which torch has threads can hang.
    context = multiprocessing.get_context("spawn")
    free: Queue[Device] = context.Queue()
    for device in devices:
        free.put(device)
    with ProcessPoolExecutor(len(devices), context, _begin, (threads, free)) as pool:
        futures = {pool.submit(_call, function, a): i for i, a in enumerate(arguments)}
        processes = list((pool._processes or {}).values())
        try:
            for future in as_completed(futures):
                yield futures[future], future.result()
        except BaseException:
            # What a process has in hand may take minutes.
            for process in processes:
                process.terminate()
            raise
        finally:
            pool.shutdown(wait=False, cancel_futures=True)


_device: Device
"""The device of this worker process, from its start on."""


def _begin(threads: int, free: Queue[Device]) -> None:
    global _device
    _device = free.get()
    torch.set_num_threads(threads)
    # Ctrl-C is for the parent, which ends its workers.
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    threading.Thread(target=end_with_parent, daemon=True).start()


def _call(function: Callable[[Argument, Device], Answer], argument: Argument) -> Answer:
    return function(argument, _device)


def end_with_parent() -> None:
    """A killed parent takes its workers along."""
    parent = multiprocessing.parent_process()
    if parent is not None:
        parent.join()
        os._exit(1)
