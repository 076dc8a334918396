"""``python -m experiments.digits_flow``: bits per dimension of flows that differ in one layer.

scikit-learn's digits, 8 x 8 pixels of 17 levels, dequantized; 4 channels of 4 x 4 after a squeeze.
A flow has `STEPS` steps of a scale a channel, an invertible convolution and an affine coupling of
the halves of the channels (Glow: Kingma and Dhariwal, NeurIPS 2018, arXiv:1807.03039). The arms
differ in the convolution alone.
"""

from __future__ import annotations

import argparse
import math
import shlex
import statistics
import sys
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor, nn
from torch.nn.functional import pixel_shuffle, pixel_unshuffle

from common.measure import machine
from convspectra.figures import write_texts
from convspectra.nn import InvertibleConv2d

OUT = Path("docs/experiments/digits_flow")
"""Where the page is written."""
STEPS = 4
"""Steps of a flow."""
HIDDEN = 32
"""Channels of a coupling's network."""
LEVELS = 17
"""Levels of a pixel."""
MARGIN = 0.05
"""Part of the unit interval that the logit is kept away from its ends by. A choice."""
RATE = 2e-3
"""Learning rate of Adam, the same for all arms. A choice."""
BATCH = 128
"""Images a step."""


def convolutions(kind: str) -> list[InvertibleConv2d]:
    """The invertible convolutions of one step."""
    if kind == "1 x 1 (Glow)":
        return [InvertibleConv2d(4, 1, 4)]
    if kind == "3 x 3":
        return [InvertibleConv2d(4, 3, 4)]
    return [InvertibleConv2d(4, 3, 4, order=order) for order in ("forward", "backward")]


ARMS = ("1 x 1 (Glow)", "3 x 3 masked, both ways (emerging)", "3 x 3")
"""What a step mixes the pixels with."""


class Step(nn.Module):
    """A scale, an invertible convolution, and a coupling."""

    def __init__(self, kind: str) -> None:
        super().__init__()
        self.scale = nn.Parameter(torch.zeros(4, 1, 1))
        self.mixing = nn.ModuleList(convolutions(kind))
        last = nn.Conv2d(HIDDEN, 4, 3, padding=1)
        nn.init.zeros_(last.weight)
        nn.init.zeros_(last.bias)
        self.net = nn.Sequential(
            nn.Conv2d(2, HIDDEN, 3, padding=1), nn.ReLU(), nn.Conv2d(HIDDEN, HIDDEN, 1), nn.ReLU(),
            last,
        )  # fmt: skip

    def forward(self, x: Tensor) -> tuple[Tensor, Tensor]:
        """The image of x, and the log-determinant for each."""
        x = x * self.scale.exp()
        volume = 16 * self.scale.sum()
        for layer in self.mixing:
            x = layer(x)
            volume = volume + layer.logabsdet().to(x.dtype)
        kept, moved = x.chunk(2, dim=1)
        shift, size = self.net(kept).chunk(2, dim=1)
        size = torch.tanh(size)
        return torch.cat([kept, moved * size.exp() + shift], 1), volume + size.sum((1, 2, 3))

    def inverse(self, y: Tensor) -> Tensor:
        """Undo a step."""
        kept, moved = y.chunk(2, dim=1)
        shift, size = self.net(kept).chunk(2, dim=1)
        x = torch.cat([kept, (moved - shift) * (-torch.tanh(size)).exp()], 1)
        for layer in reversed(self.mixing):
            x = layer.inverse(x)
        return x * (-self.scale).exp()


class Flow(nn.Module):
    """From images in (0, 1) to Gaussian noise and back."""

    def __init__(self, kind: str) -> None:
        super().__init__()
        self.steps = nn.ModuleList(Step(kind) for _ in range(STEPS))

    def forward(self, x: Tensor) -> Tensor:
        """Log densities of images (b, 1, 8, 8)."""
        inside = MARGIN + (1 - 2 * MARGIN) * x
        z = pixel_unshuffle(torch.logit(inside), 2)
        found = -(inside.log() + (1 - inside).log()).sum((1, 2, 3)) + 64 * math.log(1 - 2 * MARGIN)
        for step in self.steps:
            z, volume = step(z)
            found = found + volume
        return found - 0.5 * (z.square() + math.log(2 * math.pi)).sum((1, 2, 3))

    def sample(self, noise: Tensor) -> Tensor:
        """Images for noise (b, 4, 4, 4)."""
        for step in reversed(self.steps):
            noise = step.inverse(noise)
        return (torch.sigmoid(pixel_shuffle(noise, 2)) - MARGIN) / (1 - 2 * MARGIN)


@dataclass(frozen=True)
class Run:
    """One flow, trained from one seed."""

    arm: str
    seed: int
    bits: float
    parameters: int
    milliseconds: float
    inversion: float


def digits() -> tuple[Tensor, Tensor]:
    """Images for training and for testing, of whole levels."""
    from sklearn.datasets import load_digits

    images = torch.from_numpy(load_digits().images).float()[:, None]
    return images[:1500], images[1500:]


def dequantized(levels: Tensor, generator: torch.Generator) -> Tensor:
    """Levels with uniform noise, in the unit interval."""
    return (levels + torch.rand(levels.shape, generator=generator)) / LEVELS


def trained(arm: str, seed: int, steps: int) -> Run:
    """Train a flow, and measure it on images that it has not seen."""
    torch.manual_seed(seed)
    generator = torch.Generator().manual_seed(seed)
    train, test = digits()
    flow = Flow(arm)
    optimizer = torch.optim.Adam(flow.parameters(), RATE)
    start = time.process_time()
    for _ in range(steps):
        chosen = torch.randint(len(train), (BATCH,), generator=generator)
        loss = -flow(dequantized(train[chosen], generator)).mean()
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
    milliseconds = 1e3 * (time.process_time() - start) / steps
    with torch.no_grad():
        images = dequantized(test, torch.Generator().manual_seed(0))
        nats = -flow(images).mean().item()
        noise = torch.randn(64, 4, 4, 4, generator=generator)
        there = noise
        for step in reversed(flow.steps):
            there = step.inverse(there)
        for step in flow.steps:
            there, _ = step(there)
        inversion = float((there - noise).abs().max())
    bits = nats / (64 * math.log(2)) + math.log2(LEVELS)
    parameters = sum(int(p.numel()) for p in flow.parameters())
    return Run(arm, seed, bits, parameters, milliseconds, inversion)


def page(runs: Sequence[Run], steps: int, command: str) -> str:
    """The table in Markdown."""
    lines = [
        "# A flow on digits, by its invertible convolution",
        "",
        f"scikit-learn's digits, {STEPS} steps, {steps} steps of Adam at {RATE}, batch {BATCH}; "
        "means over the seeds, and their range. Made by "
        f"`{command}` on {machine()}.",
        "",
        "Bits per dimension are those of 297 images that were not trained on, with uniform noise: "
        "less is better. *Undone to* is the largest error after noise has gone back to an image "
        "and forth again, in float32. *Step* is the CPU time of a training step, of one thread; "
        "that of 1 x 1 is 1.",
        "",
        "| convolution | parameters | bits per dimension | range | step | undone to |",
        "|---|---|---|---|---|---|",
    ]
    by_arm = {arm: [run for run in runs if run.arm == arm] for arm in ARMS}
    plain = statistics.median(run.milliseconds for run in by_arm[ARMS[0]])
    for arm, found in by_arm.items():
        bits = [run.bits for run in found]
        lines.append(
            f"| {arm} | {found[0].parameters} | {statistics.mean(bits):.3f} | "
            f"{min(bits):.3f} to {max(bits):.3f} | "
            f"{statistics.median(run.milliseconds for run in found) / plain:.2f} | "
            f"{max(run.inversion for run in found):.0e} |"
        )
    return "\n".join([*lines, ""])


def main(arguments: Sequence[str] | None = None, say: Callable[[str], object] = print) -> list[Run]:
    """Train every arm from every seed, and write the page."""
    parser = argparse.ArgumentParser(prog="python -m experiments.digits_flow", description=__doc__)
    parser.add_argument("--steps", type=int, default=500, help="of training")
    parser.add_argument("--seeds", type=int, default=3)
    parser.add_argument("--out", type=Path, default=OUT, help="folder of the page")
    options = parser.parse_args(arguments)
    given = sys.argv[1:] if arguments is None else arguments
    runs = []
    for seed in range(options.seeds):
        for arm in ARMS:
            runs.append(trained(arm, seed, options.steps))
            say(f"{arm}, seed {seed}: {runs[-1].bits:.3f} bits, {runs[-1].milliseconds:.0f} ms")
    command = shlex.join(["python", "-m", "experiments.digits_flow", *given])
    write_texts({"digits_flow.md": page(runs, options.steps, command)}, options.out)
    return runs


if __name__ == "__main__":
    main()
