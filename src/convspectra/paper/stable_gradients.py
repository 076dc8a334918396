"""The claim of the paper's title on real images: deep plain CNNs from several starts.

Networks of 3 x 3 convolutions and ReLU, with no shortcuts and no normalization, of two depths, are
trained from PyTorch's default initialization, with each of the paper's penalties, with isometry
steps, after `prepare`, from He's initialization, and with batch normalization. The penalties act by
`SpectralRegularizer.step`, apart from the optimizer; the learning rate is the same for every arm
without normalization, 3 over the sum of the fan-ins.
"""

from __future__ import annotations

import copy
import math
from collections.abc import Callable
from dataclasses import asdict, dataclass, field
from typing import Any

import torch
from torch import nn
from torch.nn.functional import cross_entropy

from convspectra.models import Layer, find_layers
from convspectra.operator import ConvOperator, seen_operator
from convspectra.paper.images import ImageSet
from convspectra.paper.threads import flushed_denormals, one_thread
from convspectra.spectra import sigma_max, sigma_min
from convspectra.training import Schedule, SpectralRegularizer, prepare

Progress = Callable[[str, int, int], None]
"""Called with (name of the run, steps done, steps in all)."""
PAPER_PENALTIES = ("frobenius", "sigma_min", "conditioning")
"""The penalties of the paper, arXiv:2102.04294."""
ARMS = ("default", "He", "batch normalization", *PAPER_PENALTIES, "isometry", "prepare")
"""The runs at each depth."""
OBSERVATIONS = 5
"""Times at which accuracy and gradients are recorded, start and end included: a choice."""


@dataclass(frozen=True)
class Settings:
    """The common settings of all runs; the defaults are those of ``convspectra demo``."""

    depth: int = 20
    deep: int = 100
    channels: int = 12
    steps: int = 160
    batch_size: int = 64
    rate_budget: float = 3.0
    normalized_learning_rate: float = 1e-3
    penalty_rate: float = 0.1
    penalty_steps: int = 60
    penalty_interval: int = 10
    seed: int = 0


@dataclass
class Run:
    """One training run.

    Attributes
    ----------
    name : str
        The arm.
    depth : int
    learning_rate : float
        Adam's.
    steps : list of int
        When the following were recorded.
    gradient_norms : list of list of float
        Norm of the gradient of the loss for the kernel of each layer.
    accuracy : list of float
        Fraction of the test images classified right.
    extreme_singular_values : list of (float, float)
        Smallest and largest singular value at the end of some layers, as signals see them: of M(H)
        for mirrored kernels.
    """

    name: str
    depth: int
    learning_rate: float
    steps: list[int] = field(default_factory=list)
    gradient_norms: list[list[float]] = field(default_factory=list)
    accuracy: list[float] = field(default_factory=list)
    extreme_singular_values: list[list[float]] = field(default_factory=list)


def plain_network(
    depth: int, settings: Settings, image_shape: tuple[int, ...], classes: int, arm: str
) -> nn.Sequential:
    """``depth`` 3 x 3 convolutions with ReLU, average pooling to 2 x 2 and one linear layer.

    The kernels start the same whether normalized or not; those of He's initialization do not.
    """
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(settings.seed)
        layers: list[nn.Module] = []
        channels = image_shape[0]
        for _ in range(depth):
            conv = nn.Conv2d(channels, settings.channels, 3, padding=1)
            if arm == "He":
                nn.init.kaiming_normal_(conv.weight, nonlinearity="relu")
                nn.init.zeros_(conv.bias)  # type: ignore[arg-type]
            channels = settings.channels
            normalization = [nn.BatchNorm2d(channels)] if arm == "batch normalization" else []
            layers += [conv, *normalization, nn.ReLU()]
        head = [nn.AdaptiveAvgPool2d(2), nn.Flatten(), nn.Linear(4 * channels, classes)]
        return nn.Sequential(*layers, *head)


@one_thread()
def compare(
    images: ImageSet, settings: Settings, progress: Progress = lambda name, done, total: None
) -> dict[str, Any]:
    """Train every arm at both depths. The result is numbers and strings only, as JSON holds."""
    runs = [
        _train(arm, depth, images, settings, progress)
        for depth in (settings.depth, settings.deep)
        for arm in ARMS
    ]
    return {
        "images": images.name,
        "train_images": len(images.train_images),
        "test_images": len(images.test_images),
        "settings": asdict(settings),
        "runs": [asdict(run) for run in runs],
    }


def _train(arm: str, depth: int, images: ImageSet, settings: Settings, progress: Progress) -> Run:
    shape, classes = tuple(images.train_images.shape[1:]), int(images.train_labels.max()) + 1
    network = plain_network(depth, settings, shape, classes, arm)
    fan_ins = sum(conv.weight[0].numel() for conv in _convolutions(network))
    rate = settings.rate_budget / fan_ins
    if arm == "batch normalization":
        rate = settings.normalized_learning_rate
    run, name = Run(arm, depth, rate), f"{depth} layers, {arm}"
    progress(name, 0, settings.steps)
    if arm == "prepare":
        prepare(network, images.train_images[:8])
    regularizer = _regularizer(arm, network, images, settings)
    optimizer = torch.optim.Adam(network.parameters(), lr=rate)
    generator = torch.Generator().manual_seed(settings.seed)
    last = OBSERVATIONS - 1
    times = {round(settings.steps * i / last) for i in range(OBSERVATIONS)}
    _observe(run, network, images, 0)
    for step in range(1, settings.steps + 1):
        chosen = torch.randint(
            len(images.train_images), (settings.batch_size,), generator=generator, device="cpu"
        )
        with flushed_denormals():
            network.train()
            loss = cross_entropy(network(images.train_images[chosen]), images.train_labels[chosen])
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
        if regularizer is not None:
            regularizer.step(settings.penalty_rate)
        if step in times:
            _observe(run, network, images, step)
        progress(name, step, settings.steps)
    mirrored = arm in ("isometry", "prepare")
    layers = find_layers(network, images.train_images[:1])
    every = max(1, len(layers) // 10)
    run.extreme_singular_values = [
        [sigma_min(op), sigma_max(op)]
        for op in (_seen(layer, layers, mirrored) for layer in layers[::every])
    ]
    return run


def _regularizer(
    arm: str, network: nn.Module, images: ImageSet, settings: Settings
) -> SpectralRegularizer | None:
    """The penalty of the arm, for the first steps; the paper's enter every few of them."""
    if arm not in (*PAPER_PENALTIES, "isometry"):
        return None
    every = 1 if arm == "isometry" else settings.penalty_interval
    return SpectralRegularizer(
        network,
        images.train_images[:1],
        penalty=arm,
        weight=1.0,
        schedule=Schedule(stop=settings.penalty_steps, every=every),
    )


def _seen(layer: Layer, layers: list[Layer], mirrored: bool) -> ConvOperator:
    """The layer that signals see: H where isometry has made mirrored kernels."""
    op = layer.operator()
    if not mirrored or op.output_shape[0] % 2:
        return op
    return seen_operator(op, mirrored_input=layer is not layers[0], mirrored_output=True)


def _convolutions(network: nn.Module) -> list[nn.Conv2d]:
    return [module for module in network.modules() if isinstance(module, nn.Conv2d)]


def _observe(run: Run, network: nn.Sequential, images: ImageSet, step: int) -> None:
    run.steps.append(step)
    run.gradient_norms.append(_gradient_norms(network, images))
    network.eval()
    with torch.no_grad():
        guesses = [network(batch).argmax(1) for batch in images.test_images.split(1000)]
    run.accuracy.append(float((torch.cat(guesses) == images.test_labels).float().mean()))


def _gradient_norms(network: nn.Sequential, images: ImageSet) -> list[float]:
    """The norm for each kernel, of the loss on the first 256 training images.

    In training mode, as the optimizer sees it, of a copy: batch normalization keeps its averages.
    """
    network = copy.deepcopy(network).train()
    kernels = [conv.weight for conv in _convolutions(network)]
    loss = cross_entropy(network(images.train_images[:256]), images.train_labels[:256])
    # In float64: the norm of gradients near 1e-20 squares to nothing in float32.
    gradients = torch.autograd.grad(loss, kernels)
    norms = [float(torch.linalg.vector_norm(g.double())) for g in gradients]
    return [norm if math.isfinite(norm) else 0.0 for norm in norms]
