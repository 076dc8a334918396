"""Which layers of a model a forward pass uses, and at which sizes."""

from __future__ import annotations

import copy

import pytest
import torch
from helpers.models import Branches, X, sizes
from torch import Tensor, nn

from convspectra.models import (
    Layer,
    find_layers,
    is_convolution,
)


class Given(nn.Module):
    """A model with a forward pass given as a function of its one layer."""

    def __init__(self, layer: nn.Module, function) -> None:
        super().__init__()
        self.layer = layer
        self.function = function

    def forward(self, *inputs: Tensor) -> Tensor:
        return self.function(self.layer, *inputs)


# --- what is found --------------------------------------------------------------------------------


def test_sizes_are_those_of_the_forward_pass_in_its_order():
    expected = [("stem.0", (8, 6)), ("shared", (4, 3)), ("up", (4, 3)), ("shared", (8, 6))]
    assert sizes(Branches(), X) == expected


def test_a_module_under_two_names_is_listed_once():
    conv = nn.Conv2d(3, 3, 3, padding=1)
    assert sizes(nn.Sequential(conv, nn.ReLU(), conv), X) == [("0", (8, 6))]


@pytest.mark.parametrize(
    ("conv", "shape"),
    [
        (nn.Conv1d(2, 3, 3), (1, 2, 7)),
        (nn.Conv2d(2, 3, 3), (1, 2, 7, 5)),
        (nn.Conv3d(2, 3, 2), (1, 2, 4, 3, 5)),
        (nn.ConvTranspose1d(2, 3, 3), (1, 2, 7)),
        (nn.ConvTranspose2d(2, 3, 3), (1, 2, 7, 5)),
        (nn.ConvTranspose3d(2, 3, 2), (1, 2, 4, 3, 5)),
    ],
    ids=lambda value: type(value).__name__ if isinstance(value, nn.Module) else "",
)
@pytest.mark.parametrize("batch", [True, False], ids=["batch", "no batch"])
def test_every_kind_of_convolution(conv, shape, batch):
    x = torch.zeros(shape) if batch else torch.zeros(shape[1:])
    (layer,) = find_layers(nn.Sequential(conv), x)
    assert layer.name == "0"
    assert layer.module is conv
    assert layer.input_size == shape[2:]
    assert layer.operator().input_shape == shape[1:]
    assert layer.operator().output_shape == tuple(conv(torch.zeros(shape)).shape[1:])
    assert is_convolution("0", conv)


def test_a_model_that_is_itself_a_layer_has_no_name():
    assert sizes(nn.Conv2d(3, 1, 1), X) == [("", (8, 6))]


def test_linear_layers_are_found_where_they_are_included():
    found = sizes(Branches(), X, include=lambda name, module: isinstance(module, nn.Linear))
    assert found == [("head", ())]
    assert not is_convolution("head", nn.Linear(2, 2))


def test_include_chooses_by_name_and_module():
    found = sizes(Branches(), X, include=lambda name, module: name in ("stem.0", "up"))
    assert [name for name, _ in found] == ["stem.0", "up"]


def test_several_inputs_are_given_as_a_tuple():
    model = Given(nn.Conv1d(2, 2, 3), lambda layer, x, y: layer(x + y))
    assert sizes(model, (torch.zeros(1, 2, 9), torch.ones(1, 2, 9))) == [("layer", (9,))]


def test_an_input_may_be_given_by_its_keyword():
    model = Given(nn.Conv2d(3, 3, 3), lambda layer, x: layer(input=x))
    assert sizes(model, X) == [("layer", (8, 6))]


class Branching(nn.Module):
    """Applies one of two functions, as ``torch.cond`` does it, after its layer."""

    def __init__(self) -> None:
        super().__init__()
        self.layer = nn.Conv2d(3, 3, 3)

    def forward(self, x: Tensor) -> Tensor:
        y = self.layer(x)
        return torch.cond(y.sum() > 0, torch.sin, torch.cos, (y,))


@pytest.mark.filterwarnings("ignore::DeprecationWarning")
def test_operators_of_a_higher_order_are_passed():
    assert sizes(Branching(), X) == [("layer", (8, 6))]


def test_parts_that_are_compiled_keep_their_names():
    model = Branches()
    model.stem = torch.compile(model.stem, backend="eager")
    assert sizes(model, X) == sizes(Branches(), X)


def test_operators_follow_the_weight():
    model = nn.Sequential(nn.Conv2d(3, 2, 3, bias=False))
    (layer,) = find_layers(model, X)
    assert layer.operator().weight is model[0].weight
    model[0].weight = nn.Parameter(torch.ones(2, 3, 3, 3))
    assert torch.equal(layer.operator().weight, torch.ones(2, 3, 3, 3))


def test_kinds_are_equal_for_layers_that_differ_in_their_weights_only():
    def kind(size: tuple[int, ...] = (8, 6), dtype: torch.dtype = torch.float32, **options):
        options = {"padding": 1, "kernel_size": 3} | options
        return Layer("", nn.Conv2d(4, 4, **options).to(dtype), size).kind()

    assert kind() == kind()
    assert kind(bias=False) == kind()
    others = [
        kind((8, 7)),
        kind(dtype=torch.float64),
        kind(kernel_size=5, padding=2),
        kind(groups=2),
        kind(stride=2),
        kind(padding=0),
        kind(dilation=2, padding=2),
        kind(padding_mode="circular"),
        Layer("", nn.ConvTranspose2d(4, 4, 3, padding=1), (8, 6)).kind(),
        Layer("", nn.Conv2d(8, 4, 3, padding=1, groups=2), (8, 6)).kind(),
    ]
    assert len({kind(), *others}) == len(others) + 1


# --- what is left alone ---------------------------------------------------------------------------


def test_the_model_is_left_as_it_was():
    model = Branches().train()
    model.stem[1].eval()
    before = copy.deepcopy(model.state_dict())
    modes = [module.training for module in model.modules()]
    state = torch.get_rng_state()
    find_layers(model, torch.randn(2, 3, 8, 6, generator=torch.Generator().manual_seed(0)))
    assert [module.training for module in model.modules()] == modes
    assert all(torch.equal(model.state_dict()[name], before[name]) for name in before)
    assert model.state_dict().keys() == before.keys()
    assert not any(module._forward_pre_hooks for module in model.modules())
    assert all(p.grad is None for p in model.parameters())
    assert torch.equal(torch.get_rng_state(), state)


class Frozen(nn.Sequential):
    """Turns its dropout off for good whenever training is switched on."""

    def train(self, mode: bool = True) -> Frozen:
        super().train(mode)
        if mode:
            self[1].p = 0.0
        return self


def test_modes_are_restored_without_what_a_model_does_on_train():
    model = Frozen(nn.Conv2d(3, 3, 3), nn.Dropout(0.5))
    find_layers(model, X)
    assert model.training
    assert model[1].training
    assert model[1].p == 0.5


def test_the_forward_pass_is_in_evaluation_mode_and_without_gradients():
    seen = []

    def forward(layer: nn.Module, x: Tensor) -> Tensor:
        seen.append((layer.training, torch.is_grad_enabled()))
        return layer(x)

    find_layers(Given(nn.Conv2d(3, 1, 3), forward).train(), X)
    assert seen == [(False, False)]
    assert torch.is_grad_enabled()


def test_modes_and_hooks_are_restored_after_a_failure():
    def fail(layer: nn.Module, x: Tensor) -> Tensor:
        raise KeyError("of the model's own")

    model = Given(nn.Conv2d(3, 1, 3), fail).train()
    with pytest.raises(KeyError, match="of the model's own"):
        find_layers(model, X)
    assert all(module.training for module in model.modules())
    assert not model.layer._forward_pre_hooks


# --- what is refused ------------------------------------------------------------------------------


class Blurred(nn.Conv2d):
    def forward(self, x: Tensor) -> Tensor:
        return super().forward(x * 0.5)


class Twice(nn.Conv2d):
    def forward(self, x: Tensor) -> Tensor:
        return super().forward(super().forward(x))


def all_of(name: str, module: nn.Module) -> bool:
    return name != ""


REFUSED = [
    (lambda: find_layers(None, X), "expected model to be a torch.nn.Module, got NoneType"),
    (
        lambda: find_layers(Branches(), X * torch.nan),
        "expected a finite example_input, got NaN or Inf",
    ),
    (
        lambda: find_layers(Branches(), (X / 0,)),
        "expected a finite example_input, got NaN or Inf",
    ),
    (
        lambda: find_layers(nn.Sequential(nn.ReLU()), X),
        r"layers to include in Sequential, got none; its convolutions are \[\]",
    ),
    (
        lambda: find_layers(Branches(), X, include=lambda *_: False),
        r"got none; its convolutions are \['stem.0', 'shared', 'up'\]",
    ),
    (
        lambda: find_layers(nn.Sequential(nn.Conv2d(3, 3, 3), nn.ReLU()), X, include=all_of),
        "layer '1': expected one of nn.Conv1d, .* nn.Linear, got ReLU",
    ),
    (
        lambda: find_layers(nn.Sequential(nn.Identity(), Blurred(3, 3, 3)), X),
        "layer '1': expected a layer .* got Blurred, whose own pass .* changes its input before",
    ),
    (
        lambda: find_layers(nn.Sequential(Twice(3, 3, 1)), X),
        "layer '0': the forward pass of Twice is its own, and not one convolution at every call",
    ),
    (
        lambda: find_layers(Given(nn.Conv2d(3, 3, 3), lambda layer, x: x), X),
        r"reached by the forward pass .* these were not: \['layer'\]; exclude them",
    ),
    (
        lambda: find_layers(
            Given(nn.Conv2d(3, 3, 3, device="meta"), lambda layer, x: layer(x.to("meta"))), X
        ),
        r"a model with data, got 'layer\.weight' on the meta device",
    ),
]


@pytest.mark.parametrize(("call", "message"), REFUSED)
def test_what_cannot_be_handled_is_named(call, message):
    with pytest.raises(ValueError, match=message):
        call()


def test_a_weight_that_is_not_finite_is_named():
    model = nn.Sequential(nn.Conv2d(3, 3, 3), nn.Conv2d(3, 3, 3))
    layers = find_layers(model, X)
    with torch.no_grad():
        model[1].weight[0, 0, 0, 0] = torch.nan
    with pytest.raises(ValueError, match="layer '1': expected a finite weight"):
        layers[1].operator()
    with pytest.raises(ValueError, match="layer '1': expected a finite weight"):
        find_layers(model, X)


def test_lazy_layers_are_reached_by_their_own_forward_pass_first():
    """The pass through the model gives them their weight."""
    model = nn.Sequential(nn.LazyConv2d(2, 3))
    assert sizes(model, X) == [("0", (8, 6))]
