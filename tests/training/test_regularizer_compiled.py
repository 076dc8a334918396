"""SpectralRegularizer of compiled models and under mixed precision."""

from __future__ import annotations

import math

import pytest
import torch
from helpers.training import (
    LAYERS,
    batch,
    close,
    each_penalty,
    gradients,
    naive,
    net,
    regularizer,
    same,
)
from torch import Tensor, nn


@each_penalty
def test_value_and_gradient_are_those_of_dense_singular_values(name):
    model = net()
    reg = regularizer(model, name)
    assert [(layer.name, layer.input_size) for layer in reg.layers] == LAYERS
    expected = naive(model, name)
    assert math.isclose(float(reg().detach()), float(expected.detach()), rel_tol=1e-7)
    # The vectors of an exact computation are good to about 1e-4, and so is their gradient.
    assert close(gradients(model, reg()), gradients(model, expected), 1e-3)


# --- torch.compile --------------------------------------------------------------------------------


@pytest.mark.parametrize("backend", ["eager", "aot_eager"])
def test_a_compiled_model_trains_as_the_plain_one(backend):
    plain, inner = net(), net()
    compiled = torch.compile(inner, backend=backend)
    losses = []
    for model, whole in ((plain, plain), (inner, compiled)):
        reg = regularizer(whole, "conditioning")
        assert [(layer.name, layer.input_size) for layer in reg.layers] == LAYERS
        assert [layer.name for layer in reg.report().layers] == [name for name, _ in LAYERS]
        optimizer = torch.optim.Adam(whole.parameters(), lr=1e-2)
        for _ in range(3):
            optimizer.zero_grad()
            loss = whole(batch()).square().mean() + reg()
            loss.backward()
            optimizer.step()
            losses.append(float(loss.detach()))
        assert reg.step_count == 2
        assert not any("_orig_mod" in key for key in reg.state_dict()["layers"])
        assert all(torch.isfinite(p).all() for p in model.parameters())
    assert losses[:3] == pytest.approx(losses[3:], rel=1e-9)
    assert close(list(inner.parameters()), list(plain.parameters()), 1e-8)


def test_the_state_of_a_compiled_model_is_that_of_the_plain_one():
    model = net()
    reg = regularizer(torch.compile(model, backend="eager"), "conditioning")
    reg()
    plain = regularizer(model, "conditioning")
    plain.load_state_dict(reg.state_dict())
    assert plain.state_dict()["step"] == reg.step_count


def test_compiled_parts_of_a_model_keep_their_names():
    model = net()
    model.a = torch.compile(model.a, backend="eager")
    block = torch.compile(nn.Sequential(model.b), backend="eager")
    model.b = block
    reg = regularizer(model, "frobenius", include=["a", "b.*", "shared"])
    assert [layer.name for layer in reg.layers] == ["a", "b.0", "shared", "shared"]
    with pytest.raises(ValueError, match=r"its convolutions are \['a', 'b\.0', 'shared'\]"):
        regularizer(model, "frobenius", include=["nothing"])


@pytest.mark.filterwarnings("ignore")  # dynamo warns of its own doing
@pytest.mark.parametrize("traced", [False, pytest.param(True, marks=pytest.mark.slow)])
def test_the_penalty_is_called_inside_a_compiled_step(traced):
    model = net()
    reg = regularizer(model, "frobenius")
    penalty = reg if traced else torch.compiler.disable(reg.__call__)
    step = torch.compile(lambda x: model(x).square().mean() + penalty(), backend="eager")
    expected = gradients(model, model(batch()).square().mean() + naive(model, "frobenius"))
    assert close(gradients(model, step(batch())), expected, 1e-7)


# --- mixed precision ------------------------------------------------------------------------------


@each_penalty
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_autocast_does_not_touch_the_penalty(name, dtype):
    model = net(torch.float32)
    reg, plain = regularizer(model, name), regularizer(model, name)
    expected = gradients(model, plain())
    with torch.autocast("cpu", dtype=dtype):
        value = reg()
        assert model(batch(torch.float32)).dtype == dtype, "autocast is on"
    assert value.dtype == torch.float32
    assert torch.equal(value, plain())
    assert same(gradients(model, value), expected)


@each_penalty
def test_the_gradient_under_autocast_is_that_of_the_parts(name):
    model = net(torch.float32).eval()
    reg = regularizer(model, name)

    def loss() -> Tensor:
        with torch.autocast("cpu", dtype=torch.bfloat16):
            return model(batch(torch.float32)).float().square().mean()

    parts = [one + other for one, other in zip(
        gradients(model, loss()), gradients(model, reg()), strict=True
    )]  # fmt: skip
    with torch.autocast("cpu", dtype=torch.bfloat16):
        together = loss() + reg()
    assert close(gradients(model, together), parts, 1e-6)


@each_penalty
def test_a_gradient_scaler_leaves_the_gradient_of_the_penalty(name):
    model = net(torch.float32)
    reg = regularizer(model, name)
    expected = gradients(model, reg())
    scaler = torch.amp.GradScaler("cpu", init_scale=2.0**12)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    optimizer.zero_grad()
    with torch.autocast("cpu", dtype=torch.float16):
        value = reg()
    scaler.scale(value).backward()
    assert close(gradients(model), [2.0**12 * gradient for gradient in expected], 1e-6)
    scaler.unscale_(optimizer)
    assert same(gradients(model), expected), "a power of two is exact"
    before = model.a.weight.detach().clone()
    scaler.step(optimizer)
    scaler.update()
    assert torch.allclose(model.a.weight, before - 0.1 * expected[0], rtol=1e-6)
