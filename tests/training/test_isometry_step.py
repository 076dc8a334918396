"""`penalty="isometry"`: the term in the loss, the contraction, and what follows each layer."""

from __future__ import annotations

import math

import pytest
import torch
from torch import Tensor, nn

import convspectra as cs
from convspectra.models import Activation
from convspectra.training._isometric_plans import activation_gain

X = torch.zeros(1, 2, 8, 8)


def network(activation: type[nn.Module], *, layers: int = 3, channels: int = 4) -> nn.Sequential:
    torch.manual_seed(0)
    modules: list[nn.Module] = []
    for i in range(layers):
        modules += [nn.Conv2d(channels if i else 2, channels, 3, padding=1), activation()]
    return nn.Sequential(*modules, nn.AdaptiveAvgPool2d(2), nn.Flatten(), nn.Linear(16, 3)).double()


def regularizer(model: nn.Module, **options: object) -> cs.SpectralRegularizer:
    return cs.SpectralRegularizer(model, X.double(), penalty="isometry", **options)


def convolutions(model: nn.Module) -> list[nn.Conv2d]:
    return [module for module in model if isinstance(module, nn.Conv2d)]


def dense(conv: nn.Conv2d) -> Tensor:
    return cs.ConvOperator.from_module(conv, (8, 8)).to_dense()


def test_steps_make_a_tanh_network_isometric() -> None:
    model = network(nn.Tanh)
    reg = regularizer(model)
    for _ in range(200):
        reg.step(0.1)
    gain = 1 + 1 / math.sqrt(3)
    for conv in convolutions(model):
        s = torch.linalg.svdvals(dense(conv))
        torch.testing.assert_close(s, torch.full_like(s, gain))
        assert float(conv.bias.detach().abs().max()) < 1e-9


def test_one_step_is_the_contraction() -> None:
    model = network(nn.Tanh)
    before = [conv.weight.detach().clone() for conv in convolutions(model)]
    biases = [conv.bias.detach().clone() for conv in convolutions(model)]
    regularizer(model, penalty_options={"gain": 1.5, "bias_decay": 0.25}).step(0.2)
    for conv, weight, bias in zip(convolutions(model), before, biases, strict=True):
        u, _, vh = torch.linalg.svd(weight[:, :, 1, 1], full_matrices=False)
        expected = 0.8 * weight
        expected[:, :, 1, 1] += 0.2 * 1.5 * u @ vh
        torch.testing.assert_close(conv.weight.detach(), expected)
        torch.testing.assert_close(conv.bias.detach(), 0.75 * bias)


def test_relu_networks_become_linear_and_isometric() -> None:
    """The Jacobian at any input: M(H3) M(H2) M(H1) on pairs, all singular values equal."""
    model = network(nn.ReLU)
    reg = regularizer(model)
    for _ in range(300):
        reg.step(0.1)
    body = model[:6]
    x = torch.randn(1, 2, 8, 8, dtype=torch.float64)
    jacobian = torch.autograd.functional.jacobian(
        lambda z: torch.sub(*body(z).chunk(2, dim=1)), x
    ).reshape(2 * 64, 2 * 64)
    s = torch.linalg.svdvals(jacobian)
    torch.testing.assert_close(s, torch.ones_like(s))
    for layer in (reg.refresh(), *reg.report().layers)[1:]:
        assert layer.judged == "H of mirrored kernels"
        assert layer.condition == pytest.approx(1.0)


@pytest.mark.parametrize("mirrored", [None, False])
def test_the_term_in_the_loss_is_the_distance(mirrored: bool | None) -> None:
    model = network(nn.ReLU)
    reg = regularizer(model, weight=1.0, penalty_options={"mirrored": mirrored})
    halves = mirrored is None
    convs = convolutions(model)
    expected: Tensor | float = 0.0
    for i, conv in enumerate(convs):
        op = cs.ConvOperator.from_module(conv, (8, 8))
        options = {"mirrored_output": halves, "mirrored_input": halves and i > 0}
        gain = 1.0 if halves else math.sqrt(2)
        expected = expected + cs.penalties.isometry(op, gain=gain, **options) / min(op.shape)
    gradients = torch.autograd.grad(expected, [conv.weight for conv in convs])
    value = reg()
    torch.testing.assert_close(value, expected.detach())
    value.backward()
    for conv, gradient in zip(convs, gradients, strict=True):
        torch.testing.assert_close(conv.weight.grad, gradient)


@pytest.mark.parametrize(
    ("activation", "gain"),
    [
        (None, 1.0),
        (Activation("relu"), math.sqrt(2)),
        (Activation("leaky_relu", 0.5), math.sqrt(2 / 1.25)),
        (Activation("tanh"), 1.1),
        (Activation("softmax"), 1.0),
    ],
)
def test_gains(activation: Activation | None, gain: float) -> None:
    assert activation_gain(activation, 100) == pytest.approx(gain)


@pytest.mark.parametrize(("name", "function"), [("gelu", nn.GELU()), ("silu", nn.SiLU())])
def test_gains_of_smooth_activations_keep_the_second_moment(name: str, function: nn.Module) -> None:
    z = torch.randn(2_000_000, generator=torch.Generator().manual_seed(0)).double()
    gain = activation_gain(Activation(name), 10)
    assert gain**2 * float(function(z).square().mean()) == pytest.approx(1.0, abs=5e-3)


def test_layers_that_cannot_be_halved_are_named() -> None:
    model = nn.Sequential(
        nn.Conv2d(2, 5, 3, padding=1), nn.ReLU(), nn.Conv2d(5, 4, 3, padding=1), nn.ReLU(),
        nn.Conv2d(4, 4, 3, padding=1, groups=2),
    )  # fmt: skip
    reg = cs.SpectralRegularizer(model, X, penalty="isometry", penalty_options={"mirrored": True})
    notes = {layer.name: layer.judged for layer in reg.report().layers}
    assert "not mirrored" in notes["0"]
    assert "not mirrored" in notes["2"]
    assert notes["4"] == ""
    assert [plan.gain for plan in reg._penalties.plans] == [math.sqrt(2), math.sqrt(2), 1.0]


def test_a_padding_without_isometric_kernels_is_named() -> None:
    model = nn.Sequential(nn.Conv2d(2, 6, 3))
    report = cs.SpectralRegularizer(model, X, penalty="isometry").report()
    assert report.layers[0].judged == "no isometric kernel with this padding: nearly isometric"
    assert "nearly isometric" in str(report)


def test_frozen_layers_stay_and_shared_weights_move_once() -> None:
    model = network(nn.Tanh)
    convs = convolutions(model)
    convs[0].weight.requires_grad_(False)
    convs[2].weight = convs[1].weight
    before = [conv.weight.detach().clone() for conv in convs]
    regularizer(model, penalty_options={"gain": 1.0}).step(0.5)
    assert torch.equal(convs[0].weight, before[0])
    u, _, vh = torch.linalg.svd(before[1][:, :, 1, 1])
    torch.testing.assert_close(
        convs[1].weight[:, :, 1, 1], 0.5 * before[1][:, :, 1, 1] + 0.5 * u @ vh
    )


def test_a_schedule_ends_the_steps() -> None:
    model = network(nn.Tanh)
    reg = regularizer(model, schedule=cs.Schedule(stop=2))
    weights = []
    for _ in range(4):
        reg.step(0.5)
        weights.append(convolutions(model)[0].weight.detach().clone())
    assert not torch.equal(weights[0], weights[1])
    assert torch.equal(weights[1], weights[2])
    assert torch.equal(weights[2], weights[3])


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"gain": 0}, "expected gain to be a finite number above 0, got 0"),
        ({"mirrored": "yes"}, "expected mirrored to be True, False or None, got 'yes'"),
        ({"bias_decay": 2}, "expected bias_decay between 0 and 1 or None, got 2"),
        ({"lower": 1}, "expected penalty_options among"),
    ],
)
def test_bad_options(options: dict[str, object], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        regularizer(network(nn.ReLU), penalty_options=options)


def test_bad_steps() -> None:
    model = network(nn.ReLU)
    reg = regularizer(model)
    with pytest.raises(
        ValueError, match=r"expected a tau between 0 and 1 for .isometry., got 1\.5"
    ):
        reg.step(1.5)
    with torch.no_grad():
        convolutions(model)[1].weight[0] = math.nan
    with pytest.raises(ValueError, match="layer '2': expected a finite weight"):
        reg.step(0.1)
    computed = nn.Sequential(nn.utils.parametrizations.weight_norm(nn.Conv2d(2, 2, 3, padding=1)))
    reg = cs.SpectralRegularizer(computed, X, penalty="isometry")
    with pytest.raises(ValueError, match=r"got layers .*, whose weights a parametrization"):
        reg.step(0.1)


def test_strided_and_transposed_layers_and_linear_ones() -> None:
    torch.manual_seed(0)
    model = nn.Sequential(
        nn.Conv2d(2, 8, 3, stride=2, padding=1), nn.Tanh(),
        nn.ConvTranspose2d(8, 2, 2, stride=2), nn.Tanh(), nn.Flatten(), nn.Linear(128, 16),
    ).double()  # fmt: skip
    reg = cs.SpectralRegularizer(
        model, X.double(), penalty="isometry", include="*", penalty_options={"gain": 1.0}
    )
    for _ in range(300):
        reg.step(0.1)
    for layer in reg.layers:
        s = torch.linalg.svdvals(layer.operator().to_dense())
        torch.testing.assert_close(s, torch.ones_like(s))
