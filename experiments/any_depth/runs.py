"""One training run of one arm at one depth, and what is recorded of it."""

from __future__ import annotations

import math
import time
from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import nn
from torch.nn.functional import cross_entropy

import convspectra as cs
from common.measure import peak_bytes
from convspectra.paper.images import ImageSet

ACTIVATIONS: dict[str, type[nn.Module]] = {"relu": nn.ReLU, "tanh": nn.Tanh}
ARMS = ("default", "He", "delta-orthogonal", "batch normalization", "isometry", "prepare")
"""Starts by PyTorch, He et al., Xiao et al.; the ceiling; ours during and before training."""
RATE_BUDGET = 3.0
"""The learning rate 1 of the grid times the sum of the fan-ins, as in `cs.prepare`."""
ISOMETRY_RATE = 0.1
ISOMETRY_STEPS = 60


@dataclass(frozen=True)
class Settings:
    """What all runs share."""

    channels: int = 16
    steps: int = 150
    batch_size: int = 64
    train_images: int = 10_000
    test_images: int = 1_000


@dataclass(frozen=True)
class Run:
    """One row: an arm at a depth, with a learning rate of so many times the budget."""

    arm: str
    activation: str
    depth: int
    rate: float
    seed: int


@dataclass(frozen=True)
class Outcome:
    """Test accuracy at the end, gradients of the first over the last layer, and the cost.

    The memory is the most that the process has held, in this run or one before.
    """

    accuracy: float
    ratio_before: float
    ratio_after: float
    learning_rate: float
    seconds_a_step: float
    peak_gib: float


def network(run: Run, settings: Settings, image_shape: tuple[int, ...], classes: int) -> nn.Module:
    """`depth` 3 x 3 convolutions, the first with stride 2, average pooling and a linear head."""
    torch.manual_seed(run.seed)
    modules: list[nn.Module] = []
    channels = image_shape[0]
    for i in range(run.depth):
        stride = 1 if i else 2
        modules.append(nn.Conv2d(channels, settings.channels, 3, stride=stride, padding=1))
        channels = settings.channels
        if run.arm == "batch normalization":
            modules.append(nn.BatchNorm2d(channels))
        modules.append(ACTIVATIONS[run.activation]())
    head = [nn.AdaptiveAvgPool2d(2), nn.Flatten(), nn.Linear(4 * channels, classes)]
    return nn.Sequential(*modules, *head)


def started(model: nn.Module, run: Run, images: torch.Tensor) -> None:
    """The kernels that the arm starts from, in place."""
    convolutions = [m for m in model.modules() if isinstance(m, nn.Conv2d)]
    gain = math.sqrt(2) if run.activation == "relu" else 1.0
    if run.arm == "prepare":
        cs.prepare(model, images[:8])
    elif run.arm == "He":
        for conv in convolutions:
            nonlinearity = "relu" if run.activation == "relu" else "tanh"
            nn.init.kaiming_normal_(conv.weight, nonlinearity=nonlinearity)
            nn.init.zeros_(conv.bias)
    elif run.arm == "delta-orthogonal":
        with torch.no_grad():
            for conv in convolutions:
                conv.weight.zero_()
                center = torch.empty(conv.out_channels, conv.in_channels)
                conv.weight[:, :, 1, 1] = gain * nn.init.orthogonal_(center)
                conv.bias.zero_()


def gradient_ratio(model: nn.Module, images: ImageSet) -> float:
    """Norm of the gradient of the loss by the first kernel over that by the last one."""
    kernels = [m.weight for m in model.modules() if isinstance(m, nn.Conv2d)]
    loss = cross_entropy(model(images.train_images[:64]), images.train_labels[:64])
    first, *_, last = torch.autograd.grad(loss, kernels)
    return float(first.double().norm() / last.double().norm().clamp_min(1e-300))


def train(
    run: Run, images: ImageSet, settings: Settings, progress: Callable[[int], None] = lambda i: None
) -> Outcome:
    """Train one network; the same seed gives the same start and the same batches."""
    shape, classes = tuple(images.train_images.shape[1:]), int(images.train_labels.max()) + 1
    model = network(run, settings, shape, classes)
    started(model, run, images.train_images)
    fan_ins = sum(m.weight[0].numel() for m in model.modules() if isinstance(m, nn.Conv2d))
    learning_rate = run.rate * RATE_BUDGET / fan_ins
    before = gradient_ratio(model, images)
    optimizer = torch.optim.Adam(model.parameters(), lr=learning_rate)
    reg = None
    if run.arm == "isometry":
        schedule = cs.Schedule(stop=ISOMETRY_STEPS)
        example = images.train_images[:1]
        reg = cs.SpectralRegularizer(model, example, penalty="isometry", schedule=schedule)
    generator = torch.Generator().manual_seed(run.seed)
    started_at = time.process_time()
    for step in range(settings.steps):
        chosen = torch.randint(
            len(images.train_images), (settings.batch_size,), generator=generator
        )
        loss = cross_entropy(model(images.train_images[chosen]), images.train_labels[chosen])
        if not bool(loss.isfinite()):
            break
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        if reg is not None:
            reg.step(ISOMETRY_RATE)
        progress(step)
    seconds = (time.process_time() - started_at) / settings.steps
    after = gradient_ratio(model, images)
    model.eval()
    with torch.no_grad():
        guesses = torch.cat([model(batch).argmax(1) for batch in images.test_images.split(250)])
    accuracy = float((guesses == images.test_labels).float().mean())
    return Outcome(accuracy, before, after, learning_rate, seconds, peak_bytes() / 2**30)
