"""Steps of any length keep the weights finite, and short ones are what they were."""

from __future__ import annotations

import pytest
import torch
from torch import nn

from convspectra import ConvOperator, SpectralRegularizer

SIZE = (7, 6)
X = torch.zeros(1, 4, *SIZE)
NAMED = [
    ("frobenius", {}),
    ("conditioning", {}),
    ("band", {"k": 1, "upper": 0.5}),
    ("band", {"k": 25}),
    ("cond", {}),
    ("stein", {}),
    ("circular_stein", {}),
    ("orthogonality", {}),
    ("orthogonality", {"gain": 2.0}),
]
each_penalty = pytest.mark.parametrize(("name", "options"), NAMED)


def layer() -> nn.Module:
    with torch.random.fork_rng():
        torch.manual_seed(0)
        return nn.Conv2d(4, 4, 3, padding=1)


def norm(conv: nn.Module) -> float:
    """The largest singular value of the dense matrix."""
    matrix = ConvOperator.from_module(conv, SIZE).to_dense().detach().double()
    return float(torch.linalg.matrix_norm(matrix, 2))


@each_penalty
@pytest.mark.filterwarnings("ignore:step\\(:UserWarning")
def test_no_step_is_too_long(name, options):
    conv = layer()
    reg = SpectralRegularizer(conv, X, penalty=name, weight=1.0, penalty_options=options)
    for _ in range(30):
        reg.step(1e6)
    assert norm(conv) < 100


def test_a_step_that_is_shortened_is_told_once():
    reg = SpectralRegularizer(layer(), X, penalty="orthogonality", weight=1.0)
    with pytest.warns(UserWarning, match=r"^step\(50\) is shortened to .* for layer ''"):
        reg.step(50.0)
    reg.step(50.0)  # Here a warning is an error.


@each_penalty
def test_a_short_step_is_the_gradient_times_the_rate(name, options):
    conv = layer().double()
    reg = SpectralRegularizer(conv, X.double(), penalty=name, weight=1.0, penalty_options=options)
    (gradient,) = torch.autograd.grad(reg(), conv.weight)
    before = conv.weight.detach().clone()
    reg.step(1e-6)
    assert torch.allclose(conv.weight, before - 1e-6 * gradient, rtol=0, atol=1e-14)


@pytest.mark.filterwarnings("ignore:step\\(:UserWarning")
def test_a_weight_of_two_layers_takes_the_step_of_one():
    one, twin = layer(), layer()
    twin.weight = one.weight
    alone = layer()
    for model in (nn.Sequential(one, nn.ReLU(), twin), alone):
        SpectralRegularizer(model, X, penalty="orthogonality", weight=1.0).step(1e6)
    assert torch.allclose(one.weight, alone.weight, rtol=1e-4, atol=1e-6)
