"""One training run of one arm at one depth, and what is recorded of it."""

from __future__ import annotations

import math
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import nn
from torch.nn.functional import cross_entropy

import convspectra as cs
from common import peers
from common.measure import peak_bytes
from common.networks import ShiftedReLU
from convspectra.paper.images import ImageSet
from convspectra.paper.threads import flushed_denormals
from experiments.any_depth.starts import (
    layer_sequential_unit_variance,
    looks_linear,
    peer_penalty,
    tailored_slope,
)

ACTIVATIONS: dict[str, type[nn.Module]] = {"relu": nn.ReLU, "tanh": nn.Tanh}
STARTS = ("default", "He", "delta-orthogonal", "batch normalization", "isometry", "prepare")
"""Starts by PyTorch, He et al., Xiao et al.; the ceiling; ours during and before training."""
PEERS = (
    "LSUV",
    "looks-linear",
    "tailored leaky ReLU",
    "ISONet",
    "OCNN",
    "SRIP",
    "spectral norm",
)
"""What others propose, in `common.peers` and `experiments.any_depth.starts`."""
PENALTIES: dict[str, tuple[str, Mapping[str, Any]]] = {
    "prepare, frobenius": ("frobenius", {}),
    "prepare, sigma_min": ("sigma_min", {}),
    "prepare, conditioning": ("conditioning", {}),
    "prepare, conditioning of 16": ("conditioning", {"k": 16}),
}
"""The paper's penalties in steps of their own, beside those of Adam, after `cs.prepare`."""
ARMS = (*STARTS, *PEERS, *PENALTIES)
RATE_BUDGET = 3.0
"""The learning rate 1 of the grid times the sum of the fan-ins, as in `cs.prepare`."""
ISOMETRY_RATE = 0.1
ISOMETRY_STEPS = 60
PENALTY_RATE = 0.01
"""Step size of the paper's penalties. A choice: their gradients then move a kernel by about one
step of Adam."""
PEER_WEIGHTS = {"OCNN": 0.1, "SRIP": 0.1, "ISONet": 1e-4}
"""Weights of penalties in the loss: the one of `experiments.stable_gradients`, and ISONet's own."""


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
        modules.append(activation(run, channels))
    head = [nn.AdaptiveAvgPool2d(2), nn.Flatten(), nn.Linear(4 * channels, classes)]
    return nn.Sequential(*modules, *head)


def activation(run: Run, channels: int) -> nn.Module:
    """What stands behind a layer: the activation of the run, but for two recipes of their own."""
    if run.arm == "ISONet" and run.activation == "relu":
        return ShiftedReLU(channels)
    if run.arm == "tailored leaky ReLU" and run.activation == "relu":
        return nn.LeakyReLU(tailored_slope(run.depth))
    return ACTIVATIONS[run.activation]()


def started(model: nn.Module, run: Run, images: torch.Tensor) -> None:
    """The kernels that the arm starts from, in place."""
    convolutions = [m for m in model.modules() if isinstance(m, nn.Conv2d)]
    gain = math.sqrt(2) if run.activation == "relu" else 1.0
    if run.arm.startswith("prepare"):
        cs.prepare(model, images[:8])
    elif run.arm == "LSUV":
        layer_sequential_unit_variance(model, images[:64])
    elif run.arm == "looks-linear":
        looks_linear(convolutions)
    elif run.arm == "ISONet":
        for conv in convolutions:
            nn.init.dirac_(conv.weight)
            nn.init.zeros_(conv.bias)
    elif run.arm == "spectral norm":
        peers.normalize_spectrally(model, run.seed)
    elif run.arm == "He":
        for conv in convolutions:
            nonlinearity = "relu" if run.activation == "relu" else "tanh"
            nn.init.kaiming_normal_(conv.weight, nonlinearity=nonlinearity)
            nn.init.zeros_(conv.bias)
    elif run.arm in ("delta-orthogonal", "tailored leaky ReLU"):
        if run.arm != "delta-orthogonal" and run.activation == "relu":
            gain = math.sqrt(2 / (1 + tailored_slope(run.depth) ** 2))
        with torch.no_grad():
            for conv in convolutions:
                conv.weight.zero_()
                center = torch.empty(conv.out_channels, conv.in_channels)
                conv.weight[:, :, 1, 1] = gain * nn.init.orthogonal_(center)
                conv.bias.zero_()


def gradient_ratio(model: nn.Module, images: ImageSet) -> float:
    """Norm of the gradient of the loss by the first kernel over that by the last one."""
    kernels = [p for p in model.parameters() if p.ndim == 4]
    loss = cross_entropy(model(images.train_images[:64]), images.train_labels[:64])
    first, *_, last = torch.autograd.grad(loss, kernels)
    return float(first.double().norm() / last.double().norm().clamp_min(1e-300))


def _regularizer(
    model: nn.Module, run: Run, example: torch.Tensor
) -> tuple[cs.SpectralRegularizer | None, float]:
    """Our penalty of an arm and the size of its steps."""
    if run.arm == "isometry":
        schedule = cs.Schedule(stop=ISOMETRY_STEPS)
        reg = cs.SpectralRegularizer(model, example, penalty="isometry", schedule=schedule)
        return reg, ISOMETRY_RATE
    if run.arm in PENALTIES:
        penalty, options = PENALTIES[run.arm]
        reg = cs.SpectralRegularizer(model, example, penalty=penalty, penalty_options=options)
        return reg, PENALTY_RATE
    return None, 0.0


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
    reg, step_size = _regularizer(model, run, images.train_images[:1])
    kernels = [m for m in model.modules() if isinstance(m, nn.Conv2d)]
    generator = torch.Generator().manual_seed(run.seed)
    started_at = time.process_time()
    for step in range(settings.steps):
        chosen = torch.randint(
            len(images.train_images), (settings.batch_size,), generator=generator
        )
        with flushed_denormals():
            loss = cross_entropy(model(images.train_images[chosen]), images.train_labels[chosen])
            if not bool(loss.isfinite()):
                break
            total = loss
            if run.arm in PEER_WEIGHTS:
                total = loss + PEER_WEIGHTS[run.arm] * peer_penalty(run.arm, kernels, generator)
            optimizer.zero_grad()
            total.backward()
            optimizer.step()
        if reg is not None:
            reg.step(step_size)
        progress(step)
    seconds = (time.process_time() - started_at) / settings.steps
    after = gradient_ratio(model, images)
    model.eval()
    with torch.no_grad():
        guesses = torch.cat([model(batch).argmax(1) for batch in images.test_images.split(250)])
    accuracy = float((guesses == images.test_labels).float().mean())
    return Outcome(accuracy, before, after, learning_rate, seconds, peak_bytes() / 2**30)
