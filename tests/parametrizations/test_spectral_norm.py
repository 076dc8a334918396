"""Layers whose norm is held: the norm of M, by dense matrices, in every way of use."""

from __future__ import annotations

import copy
import math

import pytest
import torch
from helpers.operators import LAYERS
from helpers.strategies import Layer, random
from torch import nn
from torch.nn.utils import parametrize

import convspectra as cs
from convspectra.parametrizations import spectral_norm


def norm_of(layer: nn.Module, size: int | tuple[int, ...]) -> float:
    """The largest singular value of the dense matrix of the weight that the layer has now."""
    op = cs.ConvOperator.from_module(layer, size)
    return float(torch.linalg.matrix_norm(op.to_dense().detach().double(), 2))


def conv(dtype: torch.dtype = torch.float64, **options: int) -> nn.Conv2d:
    torch.manual_seed(0)
    return nn.Conv2d(2, 4, 3, **{"padding": 1, **options}, dtype=dtype)


def held(layer: nn.Module) -> cs.parametrizations.SpectralNorm:
    return layer.parametrizations.weight[0]


MODULES = {
    name: layer
    for name, layer in LAYERS.items()
    if isinstance(layer.module(), cs.operator.LAYER_TYPES)
    and float(layer.dense().detach().abs().amax()) > 0
}


@pytest.mark.filterwarnings("ignore:Using padding='same' with even")
@pytest.mark.parametrize("layer", MODULES.values(), ids=MODULES.keys())
@pytest.mark.parametrize("bound", [1.0, 0.3])
def test_every_layer_is_held_in_evaluation(layer: Layer, bound: float) -> None:
    module, naive = layer.module(), float(torch.linalg.matrix_norm(layer.dense().detach(), 2))
    spectral_norm(module, layer.input_size, bound).eval()
    factor = float((module.weight / layer.weight).detach().nanmean())
    norm = naive * factor  # independent of ConvOperator
    assert bound * 0.97 <= norm <= bound
    found = held(module).certificate()
    assert found.holds
    assert found.lower <= norm * (1 + 1e-12)
    assert norm <= found.upper * (1 + 1e-12)


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16, torch.float16])
def test_the_bound_holds_for_the_rounded_weight(dtype: torch.dtype) -> None:
    layer = spectral_norm(conv(dtype), 7, 1e-3).eval()
    assert layer.weight.dtype == dtype
    assert 0.9e-3 < norm_of(layer, 7) <= 1e-3
    assert held(layer).certificate().holds


def test_in_training_the_norm_is_the_bound_and_the_certificate_says_so() -> None:
    layer = spectral_norm(conv(), 7, 2.0)
    for _ in range(3):
        assert norm_of(layer, 7) == pytest.approx(2.0, rel=1e-9)
    found = held(layer).certificate()
    assert found.lower <= 2.0 <= found.upper * (1 + 1e-12)
    assert found.upper < 2.1


def test_scale_above_leaves_small_layers_alone() -> None:
    layer = conv()
    weight, norm = layer.weight.detach().clone(), norm_of(layer, 7)
    spectral_norm(layer, 7, bound=1.1 * norm, scale="above")
    for mode in (True, False):
        assert torch.equal(layer.train(mode).weight, weight)
    with torch.no_grad():
        layer.parametrizations.weight.original.mul_(3)
    for mode in (True, False):
        assert norm_of(layer.train(mode), 7) == pytest.approx(1.1 * norm, rel=2e-2)


@pytest.mark.parametrize("scale", ["always", "above"])
@pytest.mark.parametrize("training", [True, False])
def test_the_gradient_is_that_of_the_scaled_weight(scale: str, training: bool) -> None:
    layer = spectral_norm(conv(), 5, 0.5, scale)
    x = random(1, 2, 5, 5)
    layer.train(training)
    layer(x)  # the vectors settle
    weight = layer.parametrizations.weight.original
    v = held(layer).vectors[0]

    def scaled(w: torch.Tensor) -> torch.Tensor:
        op = cs.ConvOperator(w, 5, padding=1)
        dense = op.to_dense()
        u = (dense @ v).detach()
        norm = (u / u.norm()) @ dense @ v
        return w * 0.5 / norm

    (found,) = torch.autograd.grad(layer.weight.square().mul(random(*weight.shape)).sum(), weight)
    expected = torch.autograd.functional.jacobian(
        lambda w: scaled(w).square().mul(random(*w.shape)).sum(), weight.detach()
    )
    # In evaluation the weight is smaller by the width of the enclosure.
    torch.testing.assert_close(found, expected, rtol=1e-6 if training else 5e-2, atol=1e-3)


def test_gradcheck() -> None:
    layer = spectral_norm(conv(), 4)
    layer.weight  # noqa: B018 - the vectors settle: only then does a step not move them
    norm = held(layer)
    start = norm.vectors.clone()

    def function(weight: torch.Tensor) -> torch.Tensor:
        norm.vectors.copy_(start)
        return norm(weight)

    weight = layer.parametrizations.weight.original.detach().clone().requires_grad_()
    assert torch.autograd.gradcheck(function, weight, atol=1e-6)


def critic(bound: float = 1.0) -> tuple[nn.Sequential, list[tuple[nn.Module, tuple[int, ...]]]]:
    torch.manual_seed(0)
    layers = [
        (nn.Conv2d(1, 12, 4, stride=2, padding=1), (8, 8)),
        (nn.Conv2d(12, 16, 3, padding=1), (4, 4)),
        (nn.Linear(256, 1), ()),
    ]
    for layer, size in layers:
        spectral_norm(layer, size, bound)
    a, b, c = (layer for layer, _ in layers)
    act = nn.LeakyReLU(0.2)
    return nn.Sequential(a, act, b, act, nn.Flatten(), c), layers


def train(net: nn.Module, steps: int, rate: float = 2e-4) -> None:
    optimizer = torch.optim.Adam(net.parameters(), rate, betas=(0.0, 0.9))
    generator = torch.Generator().manual_seed(0)
    for _ in range(steps):
        real, fake = (torch.rand(8, 1, 8, 8, generator=generator) for _ in range(2))
        loss = net(fake).mean() - net(real.cumsum(2) / 4).mean()
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()


def test_a_critic_is_held_after_200_steps() -> None:
    net, layers = critic()
    train(net, 200)
    norms = [norm_of(layer, size) for layer, size in layers]  # training mode
    assert max(norms) <= 1 + 1e-3
    assert min(norms) >= 1 - 1e-3
    net.eval()
    assert all(norm_of(layer, size) <= 1 for layer, size in layers)
    assert cs.lipschitz_bound(net, torch.rand(2, 1, 8, 8)).upper <= 1 + 1e-9


def test_what_is_followed_is_the_same_after_saving_loading_and_copying() -> None:
    net, layers = critic()
    train(net, 5)
    copied = copy.deepcopy(net)
    again, _ = critic()
    again.load_state_dict(net.state_dict())
    for other in (copied, again):
        twin = other[2]
        assert torch.equal(held(twin).vectors, held(net[2]).vectors)
        assert held(twin)._owner[0] is twin
    weight = layers[1][0].weight.detach()  # moves the vectors of the net alone
    assert torch.equal(copied[2].weight, weight)
    assert torch.equal(again[2].weight, weight)
    before = held(net[2]).vectors.clone()
    train(copied, 1)
    assert torch.equal(held(net[2]).vectors, before)


def test_evaluation_knows_when_the_weight_changes(monkeypatch: pytest.MonkeyPatch) -> None:
    layer = spectral_norm(conv(), 6).eval()
    with torch.no_grad():
        first = layer.weight
        assert torch.equal(layer.weight, first)
        layer.parametrizations.weight.original.data[0] += 1.0  # no version counts this
        assert norm_of(layer, 6) == pytest.approx(1.0, rel=2e-2)
        assert not torch.equal(layer.weight, first)
        layer.weight = 5 * first  # as one assigns to a parametrized layer
        torch.testing.assert_close(layer.weight, first, rtol=1e-2, atol=1e-3)
    buffers = held(layer).vectors.clone()
    layer(random(1, 2, 6, 6))
    assert torch.equal(held(layer).vectors, buffers), "evaluation does not touch training"


def test_torch_removes_it_and_a_plain_layer_is_left() -> None:
    layer = spectral_norm(conv(), 6).eval()
    norm = held(layer)
    weight = layer.weight.detach().clone()
    parametrize.remove_parametrizations(layer, "weight")
    assert type(layer) is nn.Conv2d
    assert torch.equal(layer.weight, weight)
    layer(random(1, 2, 9, 9))  # any size again
    assert not layer._forward_pre_hooks
    assert not layer._forward_pre_hooks_with_kwargs
    with pytest.raises(ValueError, match="one that was removed"):
        norm.certificate()


def test_autocast_does_not_touch_the_norm() -> None:
    layer = spectral_norm(conv(torch.float32), 6)
    other = copy.deepcopy(layer)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        weight = layer.weight
        assert layer(torch.ones(1, 2, 6, 6)).dtype == torch.bfloat16
    assert weight.dtype == torch.float32
    assert torch.equal(weight, other.weight)


@pytest.mark.filterwarnings("ignore:The .grad attribute of a Tensor")
def test_compiled_training_gives_the_same_weights() -> None:
    layer = spectral_norm(conv(torch.float32), 6)
    other = copy.deepcopy(layer)
    x = torch.ones(2, 2, 6, 6)
    compiled = torch.compile(other, backend="aot_eager", fullgraph=True)
    for _ in range(2):
        expected, found = layer(x), compiled(x)
        torch.testing.assert_close(found, expected)
        (one,) = torch.autograd.grad(
            expected.square().sum(), layer.parametrizations.weight.original
        )
        (two,) = torch.autograd.grad(found.square().sum(), other.parametrizations.weight.original)
        torch.testing.assert_close(one, two)
    torch.compiler.reset()


@pytest.mark.filterwarnings("ignore:The .grad attribute of a Tensor")
def test_compiled_evaluation_breaks_the_graph_and_holds() -> None:
    layer = spectral_norm(conv(torch.float32), 6).eval()
    compiled = torch.compile(lambda x: layer(x), backend="eager")
    x = torch.ones(2, 2, 6, 6)
    torch.testing.assert_close(compiled(x), layer(x))
    torch.compiler.reset()


def test_two_passes_before_one_backward_pass() -> None:
    layer = spectral_norm(conv(), 6)
    x = random(3, 2, 6, 6)
    loss = layer(x).mean() - layer(2 * x).mean()
    loss.backward()
    assert bool(layer.parametrizations.weight.original.grad.isfinite().all())


def test_a_gradient_penalty_differentiates_twice() -> None:
    layer = spectral_norm(conv(), 6)
    x = random(3, 2, 6, 6).requires_grad_()
    (slope,) = torch.autograd.grad(layer(x).square().sum(), x, create_graph=True)
    slope.square().sum().backward()
    assert bool(layer.parametrizations.weight.original.grad.any())


def test_weights_that_are_not_finite_are_seen_and_forgotten() -> None:
    layer = spectral_norm(conv(), 6)
    weight = layer.parametrizations.weight.original
    kept = weight.detach().clone()
    with torch.no_grad():
        weight[0, 0, 0, 0] = math.nan
    assert bool(layer.weight.isnan().any())
    with torch.no_grad():
        weight.copy_(kept)
    assert norm_of(layer, 6) == pytest.approx(1.0, rel=1e-6)


def test_inputs_of_another_size_are_refused() -> None:
    layer = spectral_norm(conv(), (6, 5))
    layer(random(2, 6, 5))  # without a batch
    layer(input=random(1, 2, 6, 5))
    with pytest.raises(ValueError, match=r"expected inputs of size \(6, 5\).*\(1, 2, 5, 6\)"):
        layer(random(1, 2, 5, 6))
    with pytest.raises(ValueError, match="parametrize it for that size"):
        copy.deepcopy(layer)(input=random(1, 2, 7, 7))


@pytest.mark.parametrize("bound", [0, -1.0, math.inf, math.nan, True, "1"])
def test_bounds_that_are_not_positive_are_refused(bound: object) -> None:
    with pytest.raises(ValueError, match="expected bound to be a finite number above 0"):
        spectral_norm(conv(), 6, bound)  # type: ignore[arg-type]


def test_layers_that_cannot_be_held_are_refused_and_left_alone() -> None:
    with pytest.raises(ValueError, match="expected scale to be one of"):
        spectral_norm(conv(), 6, scale="never")
    with pytest.raises(ValueError, match=r"expected one of nn\.Conv1d.*got ReLU"):
        spectral_norm(nn.ReLU(), 6)
    layer = conv()
    with torch.no_grad():
        layer.weight.zero_()
    with pytest.raises(ValueError, match="a norm above 0 for scale='always'"):
        spectral_norm(layer, 6)
    assert not parametrize.is_parametrized(layer)
    spectral_norm(layer, 6, scale="above")
    assert not bool(layer.weight.any())
    with pytest.raises(ValueError, match="norm is not held yet"):
        spectral_norm(layer, 6)
    nan = conv()
    with torch.no_grad():
        nan.weight.fill_(math.nan)
    with pytest.raises(ValueError, match="finite weight"):
        spectral_norm(nan, 6)


def test_after_another_parametrization() -> None:
    layer = nn.utils.parametrizations.weight_norm(conv())
    spectral_norm(layer, 6).eval()
    assert norm_of(layer, 6) == pytest.approx(1.0, rel=2e-2)
    found = layer.parametrizations.weight[1].certificate()
    assert found.lower <= norm_of(layer, 6) * (1 + 1e-12)
    assert found.holds


def test_several_processes_share_what_is_followed() -> None:
    """Data parallel training broadcasts buffers: they are all there is."""
    layer = spectral_norm(conv(), 6)
    assert [name for name, _ in layer.named_buffers()] == ["parametrizations.weight.0.vectors"]
    assert "vectors" not in dict(layer.named_parameters())
