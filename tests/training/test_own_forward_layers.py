"""The regularizer and `precondition` on layers that pad or compute their weight by themselves."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

import convspectra as cs

X = torch.randn(1, 3, 7, 6, generator=torch.Generator().manual_seed(0))


class Scaled(nn.Conv2d):
    """A gain for each filter, as timm's ScaledStdConv2d, and padding as TensorFlow has it."""

    def __init__(self, *args, **options) -> None:
        super().__init__(*args, **options)
        self.gain = nn.Parameter(torch.linspace(0.5, 1.5, self.out_channels))

    def forward(self, x: Tensor) -> Tensor:
        weight = self.weight * self.gain[:, None, None, None]
        return F.conv2d(F.pad(x, (0, 1, 1, 0)), weight, self.bias, self.stride)


class Padded(nn.Conv2d):
    def forward(self, x: Tensor) -> Tensor:
        return F.conv2d(F.pad(x, (1, 1, 1, 1)), self.weight, self.bias)


def model(layer: nn.Module) -> nn.Module:
    return nn.Sequential(layer, nn.ReLU(), nn.Flatten())


def test_the_penalty_is_that_of_the_layer_as_applied():
    torch.manual_seed(0)
    net = model(Scaled(3, 3, 3))
    reg = cs.SpectralRegularizer(net, X, penalty="frobenius")
    value = reg()
    value.backward()
    weight, gain = (p.detach().double().requires_grad_() for p in (net[0].weight, net[0].gain))
    op = cs.ConvOperator(weight * gain[:, None, None, None], (7, 6), padding=((1, 0), (0, 1)))
    expected = cs.penalties.frobenius(op) * reg.weight / min(op.shape)
    assert float(value.detach()) == pytest.approx(float(expected.detach()), rel=1e-3)
    gradients = torch.autograd.grad(expected, [weight, gain])
    torch.testing.assert_close(net[0].weight.grad.double(), gradients[0], rtol=1e-3, atol=1e-5)
    torch.testing.assert_close(net[0].gain.grad.double(), gradients[1], rtol=1e-3, atol=1e-5)


def test_a_step_on_a_computed_weight_is_refused_by_name():
    reg = cs.SpectralRegularizer(model(Scaled(3, 3, 3)), X)
    with pytest.raises(ValueError, match=r"got layers \['0'\], whose weights .* loss \+ reg\(\)"):
        reg.step(0.1)


def test_precondition_refuses_a_computed_weight_by_name():
    net = model(Scaled(3, 3, 3))
    before = net[0].weight.clone()
    with pytest.raises(ValueError, match=r"layer '0': .* the forward pass of Scaled computes from"):
        cs.precondition(net, X)
    assert torch.equal(net[0].weight, before)


def test_precondition_writes_a_weight_that_is_only_padded():
    torch.manual_seed(0)
    net = model(Padded(3, 3, 3))
    (layer,) = cs.precondition(net, X)
    assert layer.converged
    matrix = cs.ConvOperator.from_module(net[0], (7, 6)).to_dense()
    values = torch.linalg.svdvals(matrix.detach())
    assert float(values[0] / values[-1]) == pytest.approx(layer.sigma_max[1] / layer.sigma_min[1])
    assert float(values[0] / values[-1]) < 2.5
