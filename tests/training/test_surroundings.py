"""Training under autocast, after surgery on the model, and with weights that are computed."""

from __future__ import annotations

import math
import pickle

import pytest
import torch
from torch import nn
from torch.nn.utils import parametrizations, prune, spectral_norm, weight_norm

import convspectra as cs
from convspectra import ConvOperator, SpectralRegularizer

X = torch.zeros(1, 4, 7, 6)
PENALTIES = ("cond", "band", "frobenius", "stein", "orthogonality")
EXACT = ("stein", "circular_stein", "orthogonality")
each_penalty = pytest.mark.parametrize("name", PENALTIES)


def net(out_channels: int = 4) -> nn.Sequential:
    with torch.random.fork_rng():
        torch.manual_seed(0)
        first = nn.Conv2d(4, 4, 3, padding=1)
        return nn.Sequential(first, nn.ReLU(), nn.Conv2d(4, out_channels, 3, padding=1))


def condition(conv: nn.Module) -> float:
    """By the singular values of the dense matrix."""
    s = torch.linalg.svdvals(ConvOperator.from_module(conv, (7, 6)).to_dense().detach().double())
    return float(s[0] / s[-1])


@each_penalty
def test_autocast_changes_nothing(name):
    plain, cast = (SpectralRegularizer(net(), X, penalty=name) for _ in range(2))
    expected = [plain.refresh(), float(plain().detach()), plain.report().records()]
    with torch.autocast("cpu", dtype=torch.bfloat16):
        found = [cast.refresh(), float(cast().detach()), cast.report().records()]
    assert found == expected


def test_autocast_does_not_touch_preconditioning():
    plain, cast = net(), net()
    expected = cs.precondition(plain, X)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        assert cs.precondition(cast, X) == expected
    assert torch.equal(plain[0].weight, cast[0].weight)


@each_penalty
def test_a_model_may_change_its_dtype_between_calls(name):
    model = net()
    reg = SpectralRegularizer(model, X, penalty=name, weight=1.0)
    before = float(reg().detach())
    for dtype in (torch.float64, torch.float32):
        value = reg() if model.to(dtype) is model else None
        assert value.dtype == dtype
        assert float(value.detach()) == pytest.approx(before, rel=1e-2)
        value.backward()
        assert model[0].weight.grad.dtype == dtype
        model.zero_grad()


@each_penalty
def test_surgery_is_named(name):
    model = net()
    reg = SpectralRegularizer(model, X, penalty=name)
    reg()
    kept, model[2] = model[2], nn.Conv2d(4, 4, 3, padding=1)
    for call in (reg, reg.refresh, reg.report):
        with pytest.raises(ValueError, match=r"^layer '2': expected the module that was there"):
            call()
    model[2] = kept
    kept.weight = nn.Parameter(torch.ones(5, 4, 3, 3))
    with pytest.raises(ValueError, match=r"^layer '2': expected a weight of shape \(4, 4, 3, 3\)"):
        reg()


def test_the_state_of_other_widths_is_refused():
    reg = SpectralRegularizer(net(8), X, penalty="cond")
    reg()
    other = SpectralRegularizer(net(), X, penalty="cond")
    message = r"^layer '2': expected the state of a weight of shape \(4, 4, 3, 3\), got one of \(8"
    with pytest.raises(ValueError, match=message):
        other.load_state_dict(reg.state_dict())


@each_penalty
def test_a_regularizer_can_be_pickled(name):
    reg = SpectralRegularizer(net(), X, penalty=name, weight=1.0)
    value = float(reg().detach())
    copy = pickle.loads(pickle.dumps(reg))
    assert float(copy().detach()) == pytest.approx(value, rel=1e-5)


def test_an_error_of_convergence_can_be_pickled():
    op = ConvOperator(torch.arange(9.0).reshape(1, 1, 3, 3), 30)
    with pytest.raises(cs.ConvergenceError) as caught:
        cs.sigma_max(op, method="lanczos", maxiter=1, tol=1e-12)
    copy = pickle.loads(pickle.dumps(caught.value))
    assert str(copy) == str(caught.value)
    assert torch.equal(copy.result.s, caught.value.result.s)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"layer_weights": 1}, "expected layer_weights to be a mapping of names"),
        ({"process_group": 1}, "expected process_group to be 'default', None or a process group"),
        ({"schedule": lambda step: "x"}, "expected the schedule at step 0 to be a number, got 'x'"),
    ],
)
def test_options_of_another_type_are_named(options, message):
    with pytest.raises(ValueError, match=message):
        SpectralRegularizer(net(), X, **options)()


# --- weights that are computed --------------------------------------------------------------------


def test_preconditioning_writes_through_weight_norm():
    model = net()
    parametrizations.weight_norm(model[0])
    before = condition(model[0])
    (layer,) = cs.precondition(model, X, include="0", condition=1.5)
    assert layer.condition[0] == pytest.approx(before, rel=1e-3)
    assert condition(model[0]) == pytest.approx(layer.condition[1], rel=1e-4)
    assert condition(model[0]) < 1.5


@pytest.mark.parametrize(
    ("changed", "message"),
    [
        (parametrizations.spectral_norm, "which does not give back the weight"),
        (parametrizations.orthogonal, "the parametrization"),
        (spectral_norm, "that a hook computes from"),
        (weight_norm, "that a hook computes from"),
        (lambda conv: prune.l1_unstructured(conv, "weight", 0.5), "that a hook computes from"),
    ],
)
@pytest.mark.filterwarnings("ignore:.*weight_norm.* is deprecated")
def test_preconditioning_refuses_what_it_cannot_write(changed, message):
    model = net()
    changed(model[2])
    before = [parameter.clone() for parameter in model.parameters()]
    with pytest.raises(ValueError, match=f"^layer '2': expected a weight that is .*{message}"):
        cs.precondition(model, X)
    for parameter, old in zip(model.parameters(), before, strict=True):
        assert torch.equal(parameter, old)


def test_preconditioning_leaves_frozen_weights_out_and_says_so():
    model = net()
    model[2].weight.requires_grad_(False)
    before = model[2].weight.clone()
    with pytest.warns(UserWarning, match=r"leaves out the layers \['2'\], which are frozen"):
        layers = cs.precondition(model, X)
    assert [layer.name for layer in layers] == ["0"]
    assert torch.equal(model[2].weight, before)


# --- targets other than 1 -------------------------------------------------------------------------


@pytest.mark.parametrize("gain", [0.5, 1.0, math.sqrt(2)])
@pytest.mark.parametrize(
    ("name", "value"),
    [
        ("stein", lambda s, g: ((s / g) ** 2 / 2 - (s / g).log() - 0.5).sum()),
        ("orthogonality", lambda s, g: ((s**2 - g**2) ** 2).sum()),
        ("conditioning", lambda s, g: (s**2).sum() / 2 - len(s) * g * s[-1]),
        (
            "band",
            lambda s, g: 0.5 * ((g / 2 - s[-1]).relu() ** 2 + (s[0] - 2 * g).relu() ** 2),
        ),
    ],
)
def test_the_gain_is_the_value_to_reach(name, value, gain):
    conv = net()[0].double()
    op = ConvOperator.from_module(conv, (7, 6))
    s = torch.linalg.svdvals(op.to_dense().detach())
    expected = value(s, gain)
    assert torch.allclose(getattr(cs.penalties, name)(op, gain=gain), expected, rtol=1e-9)
    count = 1 if name == "band" else len(s)
    reg = SpectralRegularizer(
        conv, X.double(), penalty=name, weight=1.0, penalty_options={"gain": gain}
    )
    assert float(reg().detach()) == pytest.approx(float(expected) / count, rel=1e-5)


def test_the_circular_gain_is_the_value_to_reach():
    """A circular layer is its own torus."""
    weight = net()[0].weight.detach().double()
    op = ConvOperator(weight, (7, 6), padding=1, padding_mode="circular")
    expected = cs.penalties.stein(op, gain=0.7)
    assert torch.allclose(cs.penalties.circular_stein(op, gain=0.7), expected, rtol=1e-9)


@pytest.mark.parametrize("gain", [0, -1.0, math.inf, math.nan, "1", True])
@pytest.mark.parametrize(
    "name", ["stein", "circular_stein", "orthogonality", "conditioning", "band"]
)
def test_a_gain_that_cannot_be_is_refused(name, gain):
    message = "expected gain to be a finite number above 0, got"
    with pytest.raises(ValueError, match=message):
        getattr(cs.penalties, name)(ConvOperator(torch.ones(1, 1, 3), 5), gain=gain)
    with pytest.raises(ValueError, match=message):
        SpectralRegularizer(net(), X, penalty=name, penalty_options={"gain": gain})
