"""The claim of the paper's title on real images: a deep plain CNN with and without the penalty.

A network of 3 x 3 convolutions and ReLU, with no normalization and no skip connections, in
PyTorch's default initialization, is trained several times from the same start: as it is, with each
penalty, and with batch normalization as the ceiling. With a penalty, the kernels first take some
steps on the penalty alone (the gradient of the loss is too small at first to share a step with),
then train on ``loss + reg()``, where the penalty enters every few steps only, with as much more
weight, so that a solve per layer costs less than the training.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import asdict, dataclass, field

import torch
from torch import nn
from torch.nn.functional import cross_entropy

from convspectra import penalties
from convspectra.models import find_layers
from convspectra.paper.images import ImageSet
from convspectra.paper.threads import one_thread
from convspectra.spectra import sigma_max, sigma_min, svdvals
from convspectra.training import Schedule, SpectralRegularizer

Progress = Callable[[str, int, int], None]
"""Called with (name of the run, steps done, steps in all)."""

ARMS: dict[str, str | None] = {
    "plain": None,
    "frobenius": "frobenius",
    "sigma_min": "sigma_min",
    "conditioning": "conditioning",
    "stein": "stein",
    "batch normalization": None,
}
"""The runs of the demo by name: the penalty of each."""
FULL_SPECTRUM = "stein"
"""The penalty that is about all singular values, and needs them all for its figure."""


@dataclass(frozen=True)
class Settings:
    """The settings that all runs share; the defaults are those of ``convspectra demo``."""

    depth: int = 20
    channels: int = 16
    epochs: int = 8
    batch_size: int = 64
    learning_rate: float = 1e-3
    penalty_steps: int = 50
    penalty_learning_rate: float = 1e-2
    penalty_weight: float = 1e-2
    penalty_interval: int = 16
    seed: int = 0


@dataclass
class Run:
    """One training run.

    Attributes
    ----------
    gradient_norms : list of list of float
        Norm of the gradient of the loss for the kernel of each layer: before training (after the
        steps on the penalty alone), then after each epoch.
    accuracy : list of float
        Fraction of the test images classified right, at the same times.
    extreme_singular_values : list of (float, float)
        Smallest and largest singular value of each layer at the end.
    singular_values : list of list of float
        Of each layer at the end: minimum, lower quartile, median, upper quartile and maximum over
        all its singular values. Only for the run that the figure shows, FULL_SPECTRUM.
    """

    name: str
    gradient_norms: list[list[float]] = field(default_factory=list)
    accuracy: list[float] = field(default_factory=list)
    extreme_singular_values: list[list[float]] = field(default_factory=list)
    singular_values: list[list[float]] = field(default_factory=list)


def plain_network(
    settings: Settings, image_shape: tuple[int, ...], classes: int, *, normalize: bool = False
) -> nn.Sequential:
    """``depth`` 3 x 3 convolutions with ReLU, then one linear layer.

    The kernels start the same whether normalized or not.
    """
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(settings.seed)
        layers: list[nn.Module] = []
        channels = image_shape[0]
        for _ in range(settings.depth):
            layers.append(nn.Conv2d(channels, settings.channels, 3, padding=1))
            if normalize:
                layers.append(nn.BatchNorm2d(settings.channels))
            layers.append(nn.ReLU())
            channels = settings.channels
        features = channels * math.prod(image_shape[1:])
        return nn.Sequential(*layers, nn.Flatten(), nn.Linear(features, classes))


@one_thread()
def compare(
    images: ImageSet, settings: Settings, progress: Progress = lambda name, done, total: None
) -> dict[str, object]:
    """Train every arm. The result holds numbers and strings only, so that it can be JSON."""
    shape = tuple(images.train_images.shape[1:])
    classes = int(images.train_labels.max()) + 1
    start = plain_network(settings, shape, classes)
    runs = []
    for name, penalty in ARMS.items():
        normalize = name == "batch normalization"
        network = plain_network(settings, shape, classes, normalize=normalize)
        runs.append(_train(name, penalty, network, images, settings, progress))
    return {
        "images": images.name,
        "train_images": len(images.train_images),
        "test_images": len(images.test_images),
        "settings": asdict(settings),
        "gradient_norms_at_start": _gradient_norms(start, images),
        "singular_values_at_start": _singular_values(start, images),
        "runs": [asdict(run) for run in runs],
    }


def _train(
    name: str,
    penalty: str | None,
    network: nn.Sequential,
    images: ImageSet,
    settings: Settings,
    progress: Progress,
) -> Run:
    run = Run(name)
    batches = math.ceil(len(images.train_images) / settings.batch_size)
    total = batches * settings.epochs + (settings.penalty_steps if penalty else 0)
    done = 0
    progress(name, done, total)
    regularizer = None
    if penalty is not None:
        exact = getattr(penalties, penalty)  # anew at every call: nothing is followed here
        example = images.train_images[:1]
        alone = SpectralRegularizer(network, example, penalty=exact, weight=1.0)
        kernels = [module.weight for module in network if isinstance(module, nn.Conv2d)]
        optimizer = torch.optim.Adam(kernels, lr=settings.penalty_learning_rate)
        for _ in range(settings.penalty_steps):
            optimizer.zero_grad()
            alone().backward()
            optimizer.step()
            done += 1
            progress(name, done, total)
        regularizer = SpectralRegularizer(
            network,
            example,
            penalty=exact,
            weight=settings.penalty_weight,
            schedule=Schedule(every=settings.penalty_interval),
        )
    _observe(run, network, images)
    optimizer = torch.optim.Adam(network.parameters(), lr=settings.learning_rate)
    generator = torch.Generator().manual_seed(settings.seed)
    for _ in range(settings.epochs):
        network.train()
        order = torch.randperm(len(images.train_images), generator=generator)
        for batch in order.split(settings.batch_size):
            loss = cross_entropy(network(images.train_images[batch]), images.train_labels[batch])
            if regularizer is not None:
                loss = loss + regularizer()
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
            done += 1
            progress(name, done, total)
        _observe(run, network, images)
    ops = [layer.operator() for layer in find_layers(network, images.train_images[:1])]
    run.extreme_singular_values = [[sigma_min(op), sigma_max(op)] for op in ops]
    if name == FULL_SPECTRUM:
        run.singular_values = _singular_values(network, images)
    return run


def _observe(run: Run, network: nn.Sequential, images: ImageSet) -> None:
    run.gradient_norms.append(_gradient_norms(network, images))
    network.eval()
    with torch.no_grad():
        guesses = [network(batch).argmax(1) for batch in images.test_images.split(1000)]
    run.accuracy.append(float((torch.cat(guesses) == images.test_labels).float().mean()))


def _gradient_norms(network: nn.Sequential, images: ImageSet) -> list[float]:
    """The gradient's norm of each kernel, for the loss on the first 256 training images."""
    network.eval()
    kernels = [module.weight for module in network if isinstance(module, nn.Conv2d)]
    loss = cross_entropy(network(images.train_images[:256]), images.train_labels[:256])
    # In float64: the norm of gradients near 1e-20 squares to nothing in float32.
    gradients = torch.autograd.grad(loss, kernels)
    return [float(torch.linalg.vector_norm(g.double())) for g in gradients]


def _singular_values(network: nn.Sequential, images: ImageSet) -> list[list[float]]:
    quantiles = torch.tensor([0.0, 0.25, 0.5, 0.75, 1.0], dtype=torch.float64)
    with torch.no_grad():
        return [
            torch.quantile(svdvals(layer.operator()), quantiles).tolist()
            for layer in find_layers(network, images.train_images[:1])
        ]
