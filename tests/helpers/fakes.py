"""A regularizer whose gradient is known in closed form, and notes of what was asked of it.

The penalty is half the squared Euclidean norm of the weights: its gradient is the weight itself.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from torch import nn


@dataclass(frozen=True)
class FakeReport:
    step: int
    numbers: dict[str, float]
    layers: list[dict[str, Any]]

    def aggregates(self):
        return self.numbers

    def records(self):
        return self.layers


class FakeRegularizer:
    made: list[FakeRegularizer]  # Set by the fixture, anew for every test.

    def __init__(self, model, example_input, *, penalty="stein", weight=1e-2):
        self.model, self.example_input = model, example_input
        self.penalty, self.weight = penalty, weight
        modules = [(n, m) for n, m in model.named_modules() if isinstance(m, nn.Conv2d)]
        self.names = [name for name, _ in modules]
        self.weights = [module.weight for _, module in modules]
        self.at_start = [weight.detach().clone() for weight in self.weights]
        self.count = 0
        self.calls: list[tuple[str, float]] = []
        self.made.append(self)

    def __call__(self):
        self.count += 1
        self.calls.append(("call", 1.0))
        return self.weight / 2 * sum(weight.double().square().sum() for weight in self.weights)

    def add_gradient(self, scale=1.0):
        self.count += 1
        self.calls.append(("add_gradient", scale))
        with torch.no_grad():
            for weight in self.weights:
                weight.grad.add_(weight, alpha=scale * self.weight)
        return 0.0

    def step(self, learning_rate):
        self.count += 1
        self.calls.append(("step", learning_rate))
        with torch.no_grad():
            for weight in self.weights:
                weight.mul_(1 - learning_rate * self.weight)
        return 0.0

    def report(self):
        norms = [weight.norm().item() for weight in self.weights]
        layers = [
            {"name": name, "input_size": (8, 8), "sigma_max": norm, "sigma_min": None}
            for name, norm in zip(self.names, norms, strict=True)
        ]
        return FakeReport(self.count, {"sigma_max/max": max(norms), "failures": 0.0}, layers)

    def state_dict(self):
        return {"count": self.count, "vector": torch.full((2,), float(self.count))}

    def load_state_dict(self, state):
        assert state["vector"].tolist() == [state["count"]] * 2
        self.count = state["count"]
        self.calls.append(("load", state["count"]))

    def to(self, device):
        self.calls.append(("to", torch.device(device)))
        return self
