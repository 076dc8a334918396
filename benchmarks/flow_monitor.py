"""The share of a training step that `GradientFlowMonitor` takes.

``python -m benchmarks.flow_monitor`` trains two copies of a network, with and without a monitor,
which take turns in random order, a step each, on one thread; its processor time counts, which the
machine's other work disturbs least. The networks are the demo's 20 layers of 12 channels
on 8 x 8 images, where hooks weigh most, and ResNet-18 on 32 x 32 images. Steps are compared by
their medians, those that are recorded and those that are not by themselves.
"""

from __future__ import annotations

import argparse
import random
import statistics
import sys
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from pathlib import Path

import torch
from rich.console import Console
from torch import Tensor, nn
from torch.nn.functional import cross_entropy

import convspectra as cs
from benchmarks.resnet18 import resnet18
from common.measure import machine
from convspectra.figures import write_texts
from convspectra.paper.stable_gradients import Settings, plain_network
from convspectra.text import markdown_table

EVERY = 10
"""Steps from one record to the next in the last column. A choice: often, for a run of thousands."""


@dataclass
class Arm:
    """A network in training, with a monitor that records every second step, or with none."""

    network: nn.Module
    monitor: cs.GradientFlowMonitor | None
    seconds: list[float] = field(default_factory=list)

    def __post_init__(self) -> None:
        self.optimizer = torch.optim.SGD(self.network.parameters(), lr=1e-3)

    def step(self, images: Tensor, labels: Tensor) -> None:
        """One step of SGD."""
        self.optimizer.zero_grad()
        cross_entropy(self.network(images), labels).backward()
        if self.monitor is not None:
            self.monitor.step()
        self.optimizer.step()


def demo_network() -> nn.Module:
    """The demo's 20 layers."""
    return plain_network(20, Settings(), (1, 8, 8), 10, "He")


NETWORKS: dict[str, tuple[Callable[[], nn.Module], tuple[int, ...], int]] = {
    "20 layers of 12 channels, 8 x 8, batch 64": (demo_network, (64, 1, 8, 8), 400),
    "ResNet-18, 32 x 32, batch 8": (resnet18, (8, 3, 32, 32), 120),
}
"""Networks, shapes of a batch, and steps."""


def measured(build: Callable[[], nn.Module], shape: Sequence[int], steps: int) -> dict[str, float]:
    """Milliseconds of a step, and what recorded and other steps take over it."""
    arms = [Arm(build(), None), Arm(build(), None)]
    arms[1].monitor = cs.GradientFlowMonitor(arms[1].network, every=2)
    order = random.Random(0)
    labels = torch.arange(shape[0]) % 10
    for step in range(steps):
        images = torch.randn(*shape, generator=torch.Generator().manual_seed(step))
        for arm in order.sample(arms, 2):
            start = time.process_time()
            arm.step(images, labels)
            arm.seconds.append(time.process_time() - start)
    plain, watched = (arm.seconds[steps // 10 // 2 * 2 :] for arm in arms)  # the first ones warm up
    base = statistics.median(plain)
    recorded, other = (
        statistics.median(b - a for a, b in zip(plain[k::2], watched[k::2], strict=True))
        for k in (0, 1)
    )
    return {
        "step, ms": 1e3 * base,
        "recorded step": recorded / base,
        "other step": other / base,
        f"every {EVERY} steps": (recorded + (EVERY - 1) * other) / EVERY / base,
    }


def main(arguments: Sequence[str] | None = None) -> int:
    """Run everything and write the page."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--out", type=Path, default=Path("docs/benchmarks"), metavar="DIR")
    parser.add_argument("--steps", type=int, metavar="N", help="instead of 400 and 120")
    options = parser.parse_args(arguments)
    torch.set_num_threads(1)
    rows = []
    for name, (build, shape, steps) in NETWORKS.items():
        numbers = measured(build, shape, options.steps or steps)
        shown = {
            key: f"{value:.3g}" if "ms" in key else f"{value:.2%}" for key, value in numbers.items()
        }
        rows.append({"network": name, **shown})
    page = (
        "# What a monitor of gradient flow costs\n\n"
        "Extra processor time of a training step with `GradientFlowMonitor`, over a step without; "
        "medians of differences between steps in turns, on the same batch, one thread. "
        f"{machine()}.\n"
        "Made by `python -m benchmarks.flow_monitor`.\n\n" + markdown_table(list(rows[0]), rows)
    )
    Console().print(page, markup=False)
    write_texts({"flow_monitor.md": page}, options.out)
    return 0


if __name__ == "__main__":
    sys.exit(main())
