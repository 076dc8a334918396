"""Training of one network for some epochs, stopped and gone on with between any two of them."""

from __future__ import annotations

import time
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from torch.nn.functional import cross_entropy, pad

import convspectra as cs
from common import peers
from common.networks import convolutions
from convspectra.paper.images import ImageSet
from experiments.degradation.networks import network

RATE_BUDGET = 3.0
"""The learning rate 1 of the grid times the sum of the fan-ins, as in `cs.prepare`."""
ISOMETRY_RATE = 0.1
"""The part of the way to isometric kernels in a step, while a default start is taken there."""
KEPT_RATE = 1e-3
"""The same all along the training, after `prepare`: a choice, about Adam's own step."""
ISOMETRY_STEPS = 200
"""Steps with the first rate. A choice: 0.9 to the power of 200 is 1e-9."""
OCNN_WEIGHT = 1e-4
"""Weight of the orthogonality term in ISONet's recipe, its published value."""
CONDITIONING_WEIGHT = 1e-3
"""Weight of the penalty "conditioning". A choice."""


@dataclass(frozen=True)
class Settings:
    """What all runs share."""

    width: int = 8
    epochs: int = 10
    batch_size: int = 128
    train_images: int = 50_000
    test_images: int = 10_000


@dataclass(frozen=True)
class Run:
    """An arm at a depth, with a learning rate of so many times the budget."""

    arm: str
    depth: int
    rate: float
    seed: int


@dataclass(frozen=True)
class Epoch:
    """The state after an epoch: what the table has a row of.

    Attributes
    ----------
    epoch : int
        From 1.
    loss : float
        Mean training loss, without penalties; nan after it was not finite.
    accuracy : float
        On all test images.
    ratio : float
        Gradient norm of the first kernel over that of the last convolution.
    learning_rate : float
        The largest of the run.
    seconds : float
        CPU time of the epoch.
    """

    epoch: int
    loss: float
    accuracy: float
    ratio: float
    learning_rate: float
    seconds: float


class Training:
    """One run. Adam; the rate rises for a fifth of the steps and then falls along a cosine."""

    def __init__(self, run: Run, images: ImageSet, settings: Settings) -> None:
        self._run, self._images, self._settings = run, images, settings
        classes = int(images.train_labels.max()) + 1
        self.model = network(run.arm, run.depth, settings.width, classes, run.seed)
        self.model = self.model.to(memory_format=torch.channels_last)
        example = images.train_images[:8]
        if run.arm.startswith("prepare"):
            cs.prepare(self.model, example)
        fan_ins = sum(conv.weight[0].numel() for conv in convolutions(self.model))
        self.learning_rate = run.rate * RATE_BUDGET / fan_ins
        self._optimizer = torch.optim.Adam(self.model.parameters(), lr=self.learning_rate)
        self._batches = len(images.train_images) // min(
            settings.batch_size, len(images.train_images)
        )
        self._schedule = torch.optim.lr_scheduler.OneCycleLR(
            self._optimizer,
            self.learning_rate,
            max(settings.epochs * self._batches, 10),
            pct_start=0.2,
            cycle_momentum=False,
        )
        self._generator = torch.Generator().manual_seed(run.seed)
        self.done = 0
        self._regularizer = self._penalty(example[:1])

    def _penalty(self, example: Tensor) -> cs.SpectralRegularizer | None:
        if self._run.arm == "isometry":
            stop = cs.Schedule(stop=ISOMETRY_STEPS)
            return cs.SpectralRegularizer(self.model, example, penalty="isometry", schedule=stop)
        if self._run.arm == "prepare, then isometry":
            return cs.SpectralRegularizer(self.model, example, penalty="isometry")
        if self._run.arm == "prepare, then conditioning":
            return cs.SpectralRegularizer(
                self.model, example, penalty="conditioning", weight=CONDITIONING_WEIGHT
            )
        return None

    def epoch(self) -> Epoch:
        """Train one epoch and test."""
        self.model.train()
        order = torch.randperm(len(self._images.train_images), generator=self._generator)
        started, losses = time.process_time(), 0.0
        size = len(order) // self._batches
        for batch in range(self._batches):
            losses += self._step(order[batch * size : (batch + 1) * size])
        self.done += 1
        return Epoch(
            self.done,
            losses / self._batches,
            self._accuracy(),
            self._ratio(),
            self.learning_rate,
            time.process_time() - started,
        )

    def _step(self, chosen: Tensor) -> float:
        images = augmented(self._images.train_images[chosen], self._generator)
        images = images.contiguous(memory_format=torch.channels_last)
        loss = cross_entropy(self.model(images), self._images.train_labels[chosen])
        total = loss
        if self._run.arm == "ISONet":
            terms = [
                peers.convolutional_orthogonality(conv.weight, conv.stride[0])
                for conv in convolutions(self.model)
            ]
            total = loss + OCNN_WEIGHT * torch.stack(terms).sum()
        elif self._run.arm == "prepare, then conditioning" and self._regularizer is not None:
            total = loss + self._regularizer()
        self._optimizer.zero_grad()
        total.backward()
        self._optimizer.step()
        self._schedule.step()
        if self._regularizer is not None and "isometry" in self._run.arm:
            self._regularizer.step(ISOMETRY_RATE if self._run.arm == "isometry" else KEPT_RATE)
        return float(loss.detach())

    def _accuracy(self) -> float:
        self.model.eval()
        with torch.no_grad():
            guesses = [self.model(part).argmax(1) for part in self._images.test_images.split(500)]
        return float((torch.cat(guesses) == self._images.test_labels).double().mean())

    def _ratio(self) -> float:
        kernels = [conv.weight for conv in convolutions(self.model)]
        self.model.eval()
        images, labels = self._images.train_images[:128], self._images.train_labels[:128]
        loss = cross_entropy(self.model(images), labels)
        first, *_, last = torch.autograd.grad(loss, kernels)
        return float(first.double().norm() / last.double().norm().clamp_min(1e-300))

    def save(self, path: Path) -> None:
        """Everything that the next epoch needs, in one file."""
        path.parent.mkdir(parents=True, exist_ok=True)
        beside = path.with_suffix(".new")
        torch.save(self._state(), beside)
        beside.replace(path)

    def load(self, path: Path) -> None:
        """Go on from a saved epoch of the same run."""
        state = torch.load(path, weights_only=True)
        if state["run"] != self._key():
            raise ValueError(f"expected {path} to be of {self._key()}, got {state['run']}")
        self.model.load_state_dict(state["model"])
        self._optimizer.load_state_dict(state["optimizer"])
        self._schedule.load_state_dict(state["schedule"])
        self._generator.set_state(state["generator"])
        if self._regularizer is not None:
            self._regularizer.load_state_dict(state["regularizer"])
        self.done = state["done"]

    def _key(self) -> str:
        return f"{asdict(self._run)} {asdict(self._settings)} {self._images.name}"

    def _state(self) -> dict[str, Any]:
        regularizer = self._regularizer
        return {
            "run": self._key(),
            "model": self.model.state_dict(),
            "optimizer": self._optimizer.state_dict(),
            "schedule": self._schedule.state_dict(),
            "generator": self._generator.get_state(),
            "regularizer": None if regularizer is None else regularizer.state_dict(),
            "done": self.done,
        }


def augmented(images: Tensor, generator: torch.Generator) -> Tensor:
    """Each image mirrored or not, and cut anew from 4 more pixels of zeros on each side."""
    count, _, height, width = images.shape
    flip = torch.rand(count, generator=generator) < 0.5
    images = torch.where(flip[:, None, None, None], images.flip(3), images)
    rows = torch.randint(9, (count,), generator=generator)[:, None] + torch.arange(height)
    columns = torch.randint(9, (count,), generator=generator)[:, None] + torch.arange(width)
    padded = pad(images, (4, 4, 4, 4)).permute(0, 2, 3, 1)
    picked = padded[torch.arange(count)[:, None, None], rows[:, :, None], columns[:, None, :]]
    return picked.permute(0, 3, 1, 2)
