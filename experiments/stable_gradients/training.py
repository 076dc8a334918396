"""One training run of one arm, and what is recorded of it."""

from __future__ import annotations

import itertools
import math
import time
from collections.abc import Callable
from dataclasses import dataclass, field, replace
from functools import lru_cache, partial

import torch
from torch import Tensor, nn
from torch.nn.functional import cross_entropy

import convspectra as cs
from common import peers
from common.networks import as_applied, build, convolutions
from convspectra.models._layers import find_layers
from convspectra.paper.images import ImageSet
from convspectra.paper.threads import flushed_denormals, one_thread
from experiments.stable_gradients.arms import ARMS, GAINS, PRECONDITION, Arm

FINISHED, DIVERGED, STOPPED = "finished", "diverged", "stopped"
"""How a run may end."""

_COUNTS = (
    "channels",
    "steps",
    "batch_size",
    "penalty_interval",
    "projection_interval",
    "gradient_images",
    "train_images",
    "test_images",
)
"""Settings that are counts, and must be positive."""


@dataclass(frozen=True)
class Settings:
    """The settings that all runs share.

    Attributes
    ----------
    channels, head, steps, batch_size, learning_rate
        Of the network and of Adam.
    weight_decay : float
        Adam's, in the arm of that name.
    peer_weight : float
        Of soft orthogonality, SRIP and OCNN, summed over the layers.
    penalty_weight : float
        Of our penalties.
    penalty_interval : int
        Every how many steps our penalty enters the loss, with as many times its weight.
    projection_interval : int
        Every how many steps the circular projection is done.
    projection_limit : float
        What it clips to.
    observations : int
        How often gradients and accuracy are recorded, start and end included.
    gradient_images : int
        Training images that the recorded gradients are taken over.
    train_images, test_images : int
        Images used, evenly over the classes.
    """

    channels: int = 16
    head: str = "flatten"
    steps: int = 150
    batch_size: int = 64
    learning_rate: float = 1e-3
    weight_decay: float = 5e-4
    peer_weight: float = 1e-1
    penalty_weight: float = 1e-2
    penalty_interval: int = 1
    projection_interval: int = 10
    projection_limit: float = 1.0
    observations: int = 5
    gradient_images: int = 64
    train_images: int = 10_000
    test_images: int = 1_000

    def __post_init__(self) -> None:
        for name in _COUNTS:
            if getattr(self, name) < 1:
                raise ValueError(f"expected {name} to be at least 1, got {getattr(self, name)}")
        if self.observations < 2:
            raise ValueError(
                f"expected at least two observations, start and end, got {self.observations}"
            )

    def observed_steps(self) -> list[int]:
        """Steps after which the run is observed, evenly from 0 to the last."""
        last = self.observations - 1
        return sorted({round(i * self.steps / last) for i in range(self.observations)})


@dataclass(frozen=True)
class Run:
    """Which run: everything but the settings and the images."""

    network: str
    arm: str
    depth: int
    activation: str
    seed: int


@dataclass
class Record:
    """The outcome of a run.

    Attributes
    ----------
    status : "finished", "diverged" (the loss was not finite) or "stopped" (a penalty failed)
    note : str
        Why it stopped; what was left out.
    steps_done : int
    seconds : float
        Training and what the arm does before it, without the observing.
    observed_at : list of int
        Steps after which the next three were recorded.
    losses, accuracies : list of float
        Training loss of the last batch before (nan at the start); fraction of the test images.
    ratios : list of float
        Gradient norm of the first layer's kernel over that of the last one's, of the loss without
        any penalty.
    gradients_start, gradients_end : list of float
        Of each layer's kernel; empty at the end of a run that diverged.
    sigma_max, sigma_min : list of float
        Of each layer's matrix at the end.
    """

    status: str = FINISHED
    note: str = ""
    steps_done: int = 0
    seconds: float = 0.0
    observed_at: list[int] = field(default_factory=list)
    losses: list[float] = field(default_factory=list)
    accuracies: list[float] = field(default_factory=list)
    ratios: list[float] = field(default_factory=list)
    gradients_start: list[float] = field(default_factory=list)
    gradients_end: list[float] = field(default_factory=list)
    sigma_max: list[float] = field(default_factory=list)
    sigma_min: list[float] = field(default_factory=list)


@one_thread()
def train(run: Run, images: ImageSet, settings: Settings) -> Record:
    """Train one arm from the kernels of its seed.

    A loss that is no longer finite, and a penalty that fails to converge, end the run and are
    recorded.
    """
    arm, record = ARMS[run.arm], Record()
    network = _network(run, images, settings)
    watch = _Stopwatch()
    if arm.start == PRECONDITION:
        start, seconds = _preconditioned(replace(run, arm=PRECONDITION), images, settings)
        network.load_state_dict(start)
        watch.seconds += seconds
    try:
        with watch:
            training = _Training(network, arm, run, images, settings)
            record.note = training.note
        gradients = _observe(record, network, images, settings, math.nan)
        record.gradients_start = gradients
        for done, following in itertools.pairwise(settings.observed_steps()):
            with watch, flushed_denormals():
                for _ in range(done, following):
                    loss = training.step()
                    record.steps_done += 1
            gradients = _observe(record, network, images, settings, loss)
        record.gradients_end = gradients
    except FloatingPointError:
        record.status = DIVERGED
    except (ArithmeticError, cs.ConvergenceError) as error:
        record.status = STOPPED
        record.note = f"{type(error).__name__}: {str(error).splitlines()[0]}"
    record.seconds = watch.seconds
    if all(bool(p.isfinite().all()) for p in network.parameters()):
        _singular_values(record, network, images)
    return record


def _network(run: Run, images: ImageSet, settings: Settings) -> nn.Module:
    return build(
        run.network,
        run.depth,
        settings.channels,
        images.train_images.shape[1:],
        int(images.train_labels.max()) + 1,
        activation=run.activation,
        normalize=ARMS[run.arm].normalize,
        head=settings.head,
        seed=run.seed,
    )


@lru_cache(maxsize=1)
def _preconditioned(
    run: Run, images: ImageSet, settings: Settings
) -> tuple[dict[str, Tensor], float]:
    """The state of the preconditioned network and the seconds that took, once for all its arms."""
    network = _network(run, images, settings)
    watch = _Stopwatch()
    with watch:
        cs.precondition(network, images.train_images[:1], gain=GAINS[run.activation])
        for conv in convolutions(network):
            nn.init.zeros_(conv.bias)
    return network.state_dict(), watch.seconds


class _Training:
    """A network with what its arm adds, a step at a time."""

    def __init__(
        self, network: nn.Module, arm: Arm, run: Run, images: ImageSet, settings: Settings
    ) -> None:
        self._network, self._arm = network, arm
        self._images, self._settings = images, settings
        self._batches = torch.Generator().manual_seed(run.seed)
        # Its own generator: every arm of a seed sees the same batches.
        self._draws = torch.Generator().manual_seed(run.seed)
        self._order = torch.empty(0, dtype=torch.int64)
        self._done = 0
        example = images.train_images[:1]
        if arm.start == "delta-orthogonal":
            for conv in convolutions(network):
                peers.delta_orthogonal_(conv.weight, GAINS[run.activation], self._draws)
                nn.init.zeros_(conv.bias)  # As in the paper's networks that keep a signal's size.
        if arm.spectral_norm:
            peers.normalize_spectrally(network, run.seed)
        self._regularizer = None
        if arm.penalty is not None:
            options = {"penalty_options": dict(arm.penalty_options)} if arm.penalty_options else {}
            self._regularizer = cs.SpectralRegularizer(
                network, example, penalty=arm.penalty, weight=settings.penalty_weight, **options
            )
        self.note = ""
        self._projected = []
        if arm.project:
            layers = find_layers(network, example)
            self._projected = [layer for layer in layers if layer.module.stride == (1, 1)]
            strided = len(layers) - len(self._projected)
            self.note = (
                f"{strided} strided layer left as it is"
                if strided == 1
                else (f"{strided} strided layers left as they are")
            )
            self._project()
        self._optimizer = torch.optim.Adam(
            network.parameters(),
            lr=settings.learning_rate,
            weight_decay=settings.weight_decay if arm.weight_decay else 0.0,
        )

    def step(self) -> float:
        """One step of Adam; returns the loss without penalties.

        Raises
        ------
        FloatingPointError
            If the loss, penalties included, is not finite.
        """
        self._network.train()
        batch = self._next_batch()
        images, labels = self._images.train_images[batch], self._images.train_labels[batch]
        loss = _finite(cross_entropy(self._network(images), labels))
        total = _finite(loss + self._penalty()) if self._penalised() else loss
        self._optimizer.zero_grad()
        total.backward()
        self._optimizer.step()
        self._done += 1
        if self._projected and self._done % self._settings.projection_interval == 0:
            self._project()
        return float(loss.detach())

    def _penalised(self) -> bool:
        due = self._done % self._settings.penalty_interval == 0
        return self._arm.peer_penalty is not None or (self._regularizer is not None and due)

    def _penalty(self) -> Tensor:
        if self._arm.peer_penalty is not None:
            terms = [
                self._arm.peer_penalty(conv, self._draws) for conv in convolutions(self._network)
            ]
            return self._settings.peer_weight * torch.stack(terms).sum()
        assert self._regularizer is not None
        # With tanh the loss stays finite while kernels overflow: a penalty refuses those.
        kernels = convolutions(self._network)
        _finite(torch.stack([conv.weight.detach().square().sum() for conv in kernels]).sum())
        return self._settings.penalty_interval * self._regularizer()

    def _next_batch(self) -> Tensor:
        size = min(self._settings.batch_size, len(self._images.train_images))
        if len(self._order) < size:
            self._order = torch.randperm(len(self._images.train_images), generator=self._batches)
        batch, self._order = self._order[:size], self._order[size:]
        return batch

    def _project(self) -> None:
        limit = self._settings.projection_limit
        with torch.no_grad():
            for layer in self._projected:
                weight = layer.module.weight
                if not bool(weight.isfinite().all()):
                    return  # There is no SVD to take; the next loss says that the run diverged.
                weight.copy_(peers.project_circular(weight, layer.input_size, limit))


def _finite(loss: Tensor) -> Tensor:
    if not bool(loss.isfinite()):
        raise FloatingPointError(f"the loss is {float(loss.detach())}")
    return loss


def _observe(
    record: Record, network: nn.Module, images: ImageSet, settings: Settings, loss: float
) -> list[float]:
    """Append to the record; returns the gradient norms by layer.

    Raises
    ------
    FloatingPointError
        If one of them is not finite.
    """
    gradients = gradient_norms(network, images, settings.gradient_images)
    if not all(map(math.isfinite, gradients)):
        raise FloatingPointError(f"the gradient norms are {gradients}")
    record.observed_at.append(record.steps_done)
    record.losses.append(loss)
    record.ratios.append(gradients[0] / gradients[-1] if gradients[-1] > 0 else math.nan)
    network.eval()
    with torch.no_grad(), flushed_denormals():
        guesses = [network(batch).argmax(1) for batch in images.test_images.split(500)]
    record.accuracies.append(float((torch.cat(guesses) == images.test_labels).double().mean()))
    return gradients


def gradient_norms(network: nn.Module, images: ImageSet, count: int) -> list[float]:
    """Norm of the loss's gradient for each kernel as it is applied, over the first `count` images.

    In float64, the network too: after many layers a gradient is below what float32 holds. With
    batch normalization by the statistics of these images, as in a training step.
    """
    applied = as_applied(network).train()
    kernels = [conv.weight for conv in convolutions(applied)]
    outputs = applied(images.train_images[:count].double())
    loss = cross_entropy(outputs, images.train_labels[:count])
    gradients = torch.autograd.grad(loss, kernels)
    return [float(torch.linalg.vector_norm(gradient)) for gradient in gradients]


def _singular_values(record: Record, network: nn.Module, images: ImageSet) -> None:
    applied = as_applied(network)
    for layer in find_layers(applied, images.train_images[:1].double()):
        op = layer.operator()
        # A certified value in a tenth of the time that the dense SVD of so small a layer takes.
        record.sigma_max.append(_certified(partial(cs.sigma_max, method="lanczos"), op))
        record.sigma_min.append(_certified(cs.sigma_min, op))


def _certified(function: Callable[[cs.ConvOperator], float], op: cs.ConvOperator) -> float:
    """The singular value, or nan where it did not converge: a table has no place for estimates."""
    try:
        return function(op)
    except cs.ConvergenceError:
        return math.nan


class _Stopwatch:
    """Adds up the wall time of the blocks that it guards."""

    def __init__(self) -> None:
        self.seconds = 0.0

    def __enter__(self) -> None:
        self._start = time.perf_counter()

    def __exit__(self, *error: object) -> None:
        self.seconds += time.perf_counter() - self._start
