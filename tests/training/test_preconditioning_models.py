"""Which weights of a model `precondition` changes, and what it leaves alone or refuses."""

from __future__ import annotations

import math

import numpy as np
import pytest
import torch
from helpers.preconditioned import dense_values, state
from helpers.training import seeded
from torch import Tensor, nn

import convspectra as cs

# --- what is left alone ---------------------------------------------------------------------------


class Network(nn.Module):
    """Two convolutions that share a weight, others, normalization, dropout and a head."""

    def __init__(self) -> None:
        super().__init__()
        self.stem = nn.Conv2d(3, 4, 3, padding=1)
        self.norm = nn.BatchNorm2d(4)
        self.first = nn.Conv2d(4, 4, 3, padding=1)
        self.second = nn.Conv2d(4, 4, 3, padding=1)
        self.second.weight = self.first.weight
        self.drop = nn.Dropout(0.5)
        self.down = nn.Conv2d(4, 8, 4, stride=2, padding=1)
        self.head = nn.Linear(8, 2)

    def forward(self, x: Tensor) -> Tensor:
        x = self.norm(self.stem(x))
        x = self.drop(self.second(self.first(x)))
        return self.head(self.down(x).mean((2, 3)))


X = torch.zeros(2, 3, 8, 8)


def test_only_the_chosen_weights_change():
    model = seeded(Network).train()
    model.norm.eval()
    model.down.weight.requires_grad_(False)
    before, modes = state(model), [part.training for part in model.modules()]
    parameters = dict(model.named_parameters(remove_duplicate=False))
    rng, rng_numpy = torch.get_rng_state(), np.random.get_state()[1].copy()  # noqa: NPY002
    with pytest.warns(UserWarning, match=r"leaves out the layers \['down'\], which are frozen"):
        reports = cs.precondition(model, X, exclude="stem")
    assert [report.name for report in reports] == ["first"]
    changed = {name for name, value in state(model).items() if not torch.equal(value, before[name])}
    assert changed == {"first.weight", "second.weight"}
    after = dict(model.named_parameters(remove_duplicate=False))
    assert all(after[name] is parameter for name, parameter in parameters.items())
    assert model.first.weight is model.second.weight
    assert [part.training for part in model.modules()] == modes
    assert [p.requires_grad for p in (model.first.weight, model.down.weight)] == [True, False]
    assert all(parameter.grad is None for parameter in model.parameters())
    assert torch.equal(torch.get_rng_state(), rng)
    assert np.array_equal(np.random.get_state()[1], rng_numpy)  # noqa: NPY002
    assert not any(part._forward_pre_hooks for part in model.modules())


def test_linear_layers_are_left_out_unless_asked_for():
    names = [report.name for report in cs.precondition(seeded(Network), X)]
    assert names == ["stem", "first", "down"]
    names = [report.name for report in cs.precondition(seeded(Network), X, include=["head", "st*"])]
    assert names == ["stem", "head"]


def test_a_layer_at_two_sizes_is_treated_once_at_the_first():
    class Twice(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.conv = nn.Conv2d(2, 2, 3, padding=1)

        def forward(self, x: Tensor) -> Tensor:
            return self.conv(self.conv(x)[:, :, ::2, ::2])

    (report,) = cs.precondition(seeded(Twice), torch.zeros(1, 2, 10, 10))
    assert report.input_size == (10, 10)


def test_wrapped_models_have_plain_names():
    model = seeded(Network)
    reports = cs.precondition(nn.DataParallel(model), X)
    assert [report.name for report in reports] == ["stem", "first", "down"]
    assert reports == cs.precondition(seeded(Network), X)


def test_several_inputs_are_given_as_a_tuple():
    class Sum(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.conv = nn.Conv1d(2, 2, 3, padding=1)

        def forward(self, x: Tensor, y: Tensor) -> Tensor:
            return self.conv(x + y)

    (report,) = cs.precondition(seeded(Sum), (torch.zeros(1, 2, 9), torch.zeros(1, 2, 9)))
    assert report.converged


def test_gradients_may_be_off():
    layer = seeded(lambda: nn.Conv1d(2, 2, 3, padding=1))
    with torch.no_grad():
        (report,) = cs.precondition(layer, torch.zeros(1, 2, 9))
    assert report.converged


def test_the_callback_sees_each_layer_in_turn_with_its_new_weight():
    model, seen = seeded(Network), []

    def callback(report: cs.PreconditionedLayer) -> None:
        layer = model.get_submodule(report.name)
        values = dense_values(layer, (layer.in_channels, *report.input_size))
        assert report.sigma_max[1] == pytest.approx(values[0], rel=1e-3)
        seen.append(report)

    assert cs.precondition(model, X, callback=callback) == tuple(seen)
    assert len(seen) == 3


def test_what_goes_wrong_in_a_callback_is_left_as_it_is():
    def callback(report: cs.PreconditionedLayer) -> None:
        raise ValueError("of the callback's own")

    with pytest.raises(ValueError, match=r"^of the callback's own$"):
        cs.precondition(seeded(Network), X, callback=callback)


def test_it_is_the_same_every_time():
    models = [seeded(Network), seeded(Network)]
    reports = [cs.precondition(model, X) for model in models]
    assert reports[0] == reports[1]
    for one, other in zip(models[0].parameters(), models[1].parameters(), strict=True):
        assert torch.equal(one, other)


def test_a_layer_that_is_well_conditioned_is_only_scaled():
    layer = seeded(lambda: nn.Conv1d(3, 3, 3, padding=1))
    with torch.no_grad():
        nn.init.dirac_(layer.weight).mul_(3.0)
    (report,) = cs.precondition(layer, torch.zeros(1, 3, 9), gain=2.0)
    expected = torch.zeros(3, 3, 3)
    expected[:, :, 1] = 2 * torch.eye(3)
    torch.testing.assert_close(layer.weight.detach(), expected)
    assert report.sigma_min == pytest.approx((3.0, 2.0))
    assert report.sigma_max == pytest.approx((3.0, 2.0))


# --- what is refused ------------------------------------------------------------------------------


@pytest.mark.parametrize("kind", ["zero", "repeated channel"])
def test_layers_of_deficient_rank_are_named(kind):
    layer = seeded(lambda: nn.Conv2d(4, 4, 3, padding="same"))
    with torch.no_grad():
        if kind == "zero":
            layer.weight.zero_()
        elif kind == "repeated channel":
            layer.weight[1] = layer.weight[0]
    model = nn.Sequential(nn.Identity(), layer)
    before = state(model)
    with pytest.raises(ArithmeticError, match=r"layer '1'.*(rank deficient|zero)"):
        cs.precondition(model, torch.zeros(1, 4, 12, 12))
    assert all(torch.equal(before[name], value) for name, value in state(model).items())


@pytest.mark.filterwarnings("ignore:Using padding='same' with even")
def test_an_even_kernel_is_triangular_and_no_longer_refused():
    """Singular to working precision as a whole; its determinant is that of one tap."""
    layer = seeded(lambda: nn.Conv2d(4, 4, 2, padding="same"))
    (report,) = cs.precondition(layer, torch.zeros(1, 4, 12, 12))
    assert report.sigma_min[0] < 1e-12
    values = dense_values(layer, (4, 12, 12))
    assert report.converged
    assert values[0] <= 2 * values[-1]


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"algorithm": "3.2"}, "expected algorithm .*got '3.2'"),
        ({"algorithm": None}, "expected algorithm .*got None"),
        ({"condition": 0.5}, "expected condition to be finite and at least 1, got 0.5"),
        ({"condition": math.inf}, "expected condition to be finite and at least 1, got inf"),
        ({"condition": math.nan}, "expected condition to be finite and at least 1, got nan"),
        ({"condition": "2"}, "expected condition to be a number, got '2'"),
        ({"condition": True}, "expected condition to be a number, got True"),
        ({"gain": 0}, "expected gain to be finite and above 0, got 0"),
        ({"gain": -1.0}, "expected gain to be finite and above 0, got -1.0"),
        ({"gain": "2"}, "expected gain to be a number, got '2'"),
        ({"activation": "relu7"}, "expected activation .*got 'relu7'"),
        ({"max_iter": 0}, "expected max_iter to be a positive integer, got 0"),
        ({"max_iter": 10.0}, "expected max_iter to be a positive integer, got 10.0"),
        ({"max_iter": True}, "expected max_iter to be a positive integer, got True"),
        ({"include": "nothing"}, "expected layers to include in Network, got none"),
        ({"include": 3}, "'int' object is not iterable|expected a selection"),
    ],
)
def test_bad_options(options, message):
    model = seeded(Network)
    before = state(model)
    with pytest.raises((ValueError, TypeError), match=message):
        cs.precondition(model, X, **options)
    assert all(torch.equal(before[name], value) for name, value in state(model).items())


def test_condition_is_infinite_where_the_smallest_value_is_lost():
    report = cs.PreconditionedLayer("a", (3,), (0.0, 0.5), (2.0, 1.0), 1, (3,), True)
    assert report.condition == (math.inf, 2.0)


# --- gains ----------------------------------------------------------------------------------------


def deep(activation: type[nn.Module], depth: int) -> nn.Sequential:
    layers: list[nn.Module] = []
    for _ in range(depth):
        layers += [nn.Conv2d(3, 3, 3, padding=1), activation()]
    return nn.Sequential(*layers, nn.Flatten(), nn.Linear(48, 2))


SMALL = torch.zeros(1, 3, 4, 4)


def values_of(conv: nn.Module) -> np.ndarray:
    """All singular values on 4 x 4 points, by applying the layer to each unit vector."""
    inputs = torch.eye(48).reshape(48, 3, 4, 4)
    with torch.no_grad():
        images = nn.functional.conv2d(inputs, conv.weight, padding=1).flatten(1)
    return np.linalg.svd(images.double().numpy(), compute_uv=False)


@pytest.mark.parametrize(
    ("activation", "gain"),
    [(nn.ReLU, 2**0.5), (nn.Tanh, 1 + 2**-0.5), (nn.Identity, 1.0), (nn.GELU, 1.5335)],
)
def test_the_gain_is_that_of_the_activation_behind_each_layer(
    activation: type[nn.Module], gain: float
) -> None:
    torch.manual_seed(0)
    model = deep(activation, 2)
    for condition in (1.5, 1):
        for layer in cs.precondition(model, SMALL, condition=condition):
            values = values_of(dict(model.named_modules())[layer.name])
            assert np.sqrt(np.mean(values**2)) == pytest.approx(gain, rel=1e-4)


def test_an_activation_that_is_said() -> None:
    torch.manual_seed(0)
    model = deep(nn.Identity, 1)
    (layer,) = cs.precondition(model, SMALL, activation="relu", condition=1)
    assert layer.sigma_max[1] == pytest.approx(2**0.5)
    (layer,) = cs.precondition(deep(nn.ReLU, 1), SMALL, activation="none", condition=1)
    assert layer.sigma_max[1] == pytest.approx(1.0)


def test_condition_1_is_the_nearest_isometric_kernel() -> None:
    torch.manual_seed(0)
    model = deep(nn.Identity, 1)
    before = model[0].weight.detach().clone()
    (layer,) = cs.precondition(model, SMALL, condition=1)
    values = values_of(model[0])
    np.testing.assert_allclose(values, 1.0, rtol=1e-5)
    assert (layer.converged, layer.iterations) == (True, 0)
    assert layer.condition[1] == pytest.approx(1.0, rel=1e-5)
    u, _, vh = np.linalg.svd(before[:, :, 1, 1].double().numpy())
    np.testing.assert_allclose(model[0].weight.detach()[:, :, 1, 1], u @ vh, atol=1e-6)


def test_condition_1_needs_a_layer_with_isometric_kernels() -> None:
    growing = nn.Conv2d(3, 3, 3, padding=2)
    model = nn.Sequential(nn.Conv2d(3, 3, 3, padding=1), growing)
    before = state(model)
    with pytest.raises(ValueError, match="layer '1': expected a layer that has isometric kernels"):
        cs.precondition(model, SMALL, condition=1)
    assert all(torch.equal(before[name], value) for name, value in state(model).items())


@pytest.mark.parametrize("activation", ["auto", "relu"])
def test_a_gain_that_lets_signals_die_is_warned_of(activation: str) -> None:
    model = deep(nn.ReLU if activation == "auto" else nn.Identity, 24)
    options = {"condition": 1, "activation": activation}
    with pytest.warns(UserWarning, match="gain 1: a signal is 2e-04 of itself after the 24 layers"):
        cs.precondition(model, SMALL, gain=1.0, **options)
    cs.precondition(model, SMALL, gain=2**0.5, **options)
    cs.precondition(deep(nn.Tanh, 24), SMALL, gain=1.0, condition=1)
    cs.precondition(deep(nn.ReLU, 20), SMALL, gain=1.0, condition=1)
