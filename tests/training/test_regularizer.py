"""SpectralRegularizer against penalties summed by hand."""

from __future__ import annotations

import copy
import math

import pytest
import torch
from helpers.regularized import Net, X, assert_close, recorded, stack
from helpers.training import gradients, seeded
from torch import Tensor, nn

from convspectra import ConvOperator, SpectralRegularizer, penalties

FOLLOWED = ("frobenius", "sigma_min", "sigma_max", "conditioning", "cond", "band")
EXACT = ("stein", "circular_stein", "orthogonality")
NAMES = (*FOLLOWED, *EXACT)
each_penalty = pytest.mark.parametrize("name", NAMES)
# (name, input size) in the order of the forward pass.
LAYERS = [
    ("stem", (8, 6)),
    ("a", (4, 3)),
    ("b", (4, 3)),
    ("c", (4, 3)),
    ("d", (4, 3)),
    ("up", (4, 3)),
    ("a", (8, 6)),
]


def by_hand(model: nn.Module, name: str) -> Tensor:
    total = torch.zeros((), dtype=torch.float64)
    for layer, size in LAYERS:
        op = ConvOperator.from_module(getattr(model, layer), size)
        count = 1 if name in ("sigma_min", "sigma_max", "cond", "band") else min(op.shape)
        total = total + getattr(penalties, name)(op) / count
    return total


# --- value and gradient ---------------------------------------------------------------------------


@each_penalty
def test_value_and_gradient_are_those_of_the_penalties_summed_by_hand(name):
    model = seeded(Net).double()
    reg = SpectralRegularizer(model, X.double(), penalty=name, weight=0.7)
    assert [(layer.name, layer.input_size) for layer in reg.layers] == LAYERS
    expected = 0.7 * by_hand(model, name)
    value = reg()
    assert value.shape == ()
    assert value.dtype == torch.float64
    # Vectors that are good to 1e-3 give values to its square.
    assert torch.isclose(value, expected, rtol=1e-12 if name in EXACT else 1e-5)
    exact = name in (*EXACT, "frobenius")
    assert_close(gradients(model, reg()), gradients(model, expected), 1e-9 if exact else 1e-3)


@pytest.mark.parametrize("name", EXACT)
def test_circular_layers_too(name):
    """Their singular values are repeated, which penalties of single ones do not like."""
    model = seeded(lambda: Net("circular")).double()
    reg = SpectralRegularizer(model, X.double(), penalty=name, weight=1)
    assert_close(gradients(model, reg()), gradients(model, by_hand(model, name)), 1e-9)


@pytest.mark.parametrize("name", ["sigma_min", "sigma_max", "cond", "band", "frobenius"])
def test_a_function_of_that_name_is_exact_at_every_call(name):
    model = seeded(Net).double()
    reg = SpectralRegularizer(model, X.double(), penalty=getattr(penalties, name), weight=1)
    for _ in range(2):
        expected = by_hand(model, name)
        assert torch.isclose(reg(), expected, rtol=1e-12)
        assert_close(gradients(model, reg()), gradients(model, expected), 1e-9)
        with torch.no_grad():
            model.a.weight[0, 0, 0, 0] += 0.5


@each_penalty
def test_it_adds_its_gradient_to_that_of_a_loss(name):
    model = seeded(Net).double().eval()
    reg = SpectralRegularizer(model, X.double(), penalty=name, weight=0.1)
    loss = model(X.double()).square().mean()
    together = gradients(model, loss + reg())
    alone = gradients(model, model(X.double()).square().mean())
    ours = gradients(model, 0.1 * by_hand(model, name))
    assert_close(together, [one + other for one, other in zip(alone, ours, strict=True)])


def test_it_follows_the_weights():
    model = seeded(Net).double()
    reg = SpectralRegularizer(model, X.double(), penalty="frobenius", weight=1)
    before = reg()
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.mul_(2)
    assert torch.isclose(reg(), 4 * before)


@each_penalty
def test_weight_zero_gives_zero_and_no_gradient(name):
    model = seeded(Net)
    value = SpectralRegularizer(model, X, penalty=name, weight=0)()
    assert float(value.detach()) == 0
    assert all(not gradient.any() for gradient in gradients(model, value))


def test_the_weight_can_be_changed_while_training():
    reg = SpectralRegularizer(seeded(Net), X, penalty="stein", weight=1)
    once = reg()
    reg.weight = 3.0
    assert torch.isclose(reg(), 3 * once)


def test_a_penalty_can_be_a_function():
    model = seeded(Net).double()
    seen = []

    def trace(op: ConvOperator) -> Tensor:
        seen.append(op.input_shape)
        return op.weight.sum()

    reg = SpectralRegularizer(model, X.double(), penalty=trace, weight=1)
    assert seen == []
    value = reg()
    assert [shape[1:] for shape in seen] == [size for _, size in LAYERS]
    counts = [
        min(ConvOperator.from_module(getattr(model, layer), size).shape) for layer, size in LAYERS
    ]
    weights = [getattr(model, layer).weight.sum() for layer, _ in LAYERS]
    expected = sum(weight / count for weight, count in zip(weights, counts, strict=True))
    assert torch.isclose(value, expected)
    named, default = (
        SpectralRegularizer(model, X.double(), **options)()
        for options in ({"penalty": penalties.stein}, {})
    )
    assert torch.equal(named, default), "stein is the default"


def test_include_chooses_the_layers():
    model = seeded(Net).double()
    reg = SpectralRegularizer(
        model,
        X.double(),
        penalty="stein",
        weight=1,
        include=lambda name, module: name in ("b", "head"),
    )
    assert [layer.name for layer in reg.layers] == ["b", "head"]
    expected = sum(
        penalties.stein(op) / min(op.shape)
        for op in (ConvOperator.from_module(model.b, (4, 3)), ConvOperator.from_module(model.head))
    )
    assert torch.isclose(reg(), expected)


def test_only_the_layers_have_gradients():
    model = seeded(Net)
    SpectralRegularizer(model, X, penalty="stein")().backward()
    assert {name for name, p in model.named_parameters() if p.grad is not None} == {
        f"{name}.weight" for name, _ in LAYERS
    }


# --- dtypes and autocast --------------------------------------------------------------------------


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@each_penalty
def test_narrow_weights(name, dtype):
    model = seeded(Net).to(dtype)
    reg = SpectralRegularizer(model, X.to(dtype), penalty=name, weight=0.5)
    value = reg()
    assert value.dtype == torch.float32
    wide = copy.deepcopy(model).double()
    assert math.isclose(
        float(value.detach()), 0.5 * float(by_hand(wide, name).detach()), rel_tol=1e-5
    )
    assert all(gradient.isfinite().all() for gradient in gradients(model, value))


@each_penalty
def test_autocast_changes_nothing(name):
    model = seeded(Net)
    reg = SpectralRegularizer(model, X, penalty=name)
    value, expected = reg(), gradients(model, reg())
    with torch.autocast("cpu", dtype=torch.bfloat16):
        assert torch.equal(reg(), value)
        again = SpectralRegularizer(model, X, penalty=name)
        assert torch.equal(again(), value)
        inside = reg()
    assert all(
        torch.equal(one, other)
        for one, other in zip(gradients(model, inside), expected, strict=True)
    )


@pytest.mark.parametrize("name", ["frobenius", "conditioning"])
@pytest.mark.parametrize("mode", ["zeros", "circular"])
@pytest.mark.parametrize("move", [lambda reg: reg().backward(), lambda reg: reg.step(0.1)])
def test_gradients_that_are_formed_under_autocast_are_exact(name, mode, move):
    found = []
    for enabled in (False, True):
        with torch.random.fork_rng():
            torch.manual_seed(0)
            conv = nn.Conv2d(3, 3, 3, padding=1, padding_mode=mode)
        reg = SpectralRegularizer(conv, X[:, :1].expand(-1, 3, -1, -1), penalty=name)
        with torch.autocast("cpu", dtype=torch.bfloat16, enabled=enabled):
            move(reg)
        found.append((conv.weight.detach(), conv.weight.grad))
    (weight, gradient), (other_weight, other_gradient) = found
    assert torch.equal(weight, other_weight)
    assert gradient is None or torch.equal(gradient, other_gradient)


def test_autocast_is_off_for_penalties_of_the_user_too():
    def product(op: ConvOperator) -> Tensor:
        rows = op.weight.flatten(1)
        return (rows @ rows.T).square().sum()

    reg = SpectralRegularizer(seeded(Net), X, penalty=product)
    value = reg()
    with torch.autocast("cpu", dtype=torch.bfloat16):
        assert torch.equal(reg(), value)


# --- what is left alone ---------------------------------------------------------------------------


def test_the_model_is_left_as_it_was():
    model = seeded(Net).train()
    model.norm.eval()
    before = copy.deepcopy(model.state_dict())
    names = [name for name, _ in model.named_parameters()]
    modes = [module.training for module in model.modules()]
    state = torch.get_rng_state()
    reg = SpectralRegularizer(model, X + torch.arange(6.0))
    reg()
    assert [module.training for module in model.modules()] == modes
    assert [name for name, _ in model.named_parameters()] == names
    assert list(model.state_dict()) == list(before)
    assert all(torch.equal(value, before[name]) for name, value in model.state_dict().items())
    assert all(p.grad is None for p in model.parameters())
    assert not any(m._forward_pre_hooks or m._forward_hooks for m in model.modules())
    assert type(model.a) is nn.Conv2d
    assert torch.equal(torch.get_rng_state(), state)


def test_construction_computes_nothing(monkeypatch):
    asked = recorded(monkeypatch, "stein")
    SpectralRegularizer(seeded(Net), X, penalty="stein")
    assert asked == []


@each_penalty
def test_without_gradients_nothing_moves_on(name):
    model = seeded(Net)
    reg = SpectralRegularizer(model, X, penalty=name)
    with torch.no_grad():
        value = reg()
        assert not value.requires_grad
        model.a.weight[0, 0, 0, 0] += 0.01
        moved = reg()
    assert moved != value
    assert reg.step_count == 0


def test_a_training_loop_lowers_it():
    model = stack(2)
    reg = SpectralRegularizer(model, torch.zeros(1, 3, 6, 6).double(), weight=1)
    optimizer = torch.optim.Adam(model.parameters(), lr=1e-2)
    first = float(reg().detach())
    for _ in range(40):
        optimizer.zero_grad()
        reg().backward()
        optimizer.step()
    assert float(reg().detach()) < 0.5 * first
