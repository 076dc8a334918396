"""Invertible convolutions against the dense matrix."""

from __future__ import annotations

import copy
import io

import pytest
import torch
from helpers.strategies import random
from torch import Tensor

import convspectra as cs
from convspectra.nn import InvertibleConv2d
from convspectra.nn import _factors as factors

F64 = {"dtype": torch.float64}


def layer(*args: object, seed: int = 0, **options: object) -> InvertibleConv2d:
    torch.manual_seed(seed)
    return InvertibleConv2d(*args, **{**F64, **options})


def matrix(module: InvertibleConv2d) -> Tensor:
    """The Jacobian of the forward pass, by automatic differentiation."""
    shape = (module.channels, *module.input_size)
    found = torch.autograd.functional.jacobian(module, torch.zeros(shape, **F64))
    n = module.channels * module.input_size[0] * module.input_size[1]
    return found.reshape(n, n)


CASES = {
    "plain": (2, 3, (4, 5), {}),
    "kernels of two sizes": (3, (1, 5), 4, {}),
    "one channel": (1, 5, 6, {"bias": False}),
    "forward": (2, 3, (4, 3), {"order": "forward"}),
    "backward": (2, (3, 1), (4, 3), {"order": "backward"}),
    "kernel 1": (3, 1, 4, {}),
    "capacitance": (3, 3, (14, 13), {}),
}


@pytest.mark.parametrize("case", CASES.values(), ids=CASES.keys())
def test_inverse_and_determinant_are_those_of_the_matrix(case: tuple) -> None:
    *sizes, options = case
    module = layer(*sizes, **options)
    x = random(3, module.channels, *module.input_size)
    torch.testing.assert_close(module.inverse(module(x)), x)
    torch.testing.assert_close(module(module.inverse(x)), x)
    torch.testing.assert_close(module.inverse(module(x[0])), x[0])
    dense = matrix(module)
    torch.testing.assert_close(module.logabsdet(), torch.linalg.slogdet(dense).logabsdet)
    n = len(dense)
    assert float(torch.linalg.cond(dense)) < 10, "the start is well-conditioned"
    assert (n > factors.DENSE_ORDER) == (case is CASES["capacitance"])


@pytest.mark.parametrize("name", ["plain", "forward", "capacitance"])
def test_gradients(name: str) -> None:
    *sizes, options = CASES[name] if name != "capacitance" else (3, 3, (14, 13), {})
    module = layer(*sizes, **options)
    x = random(1, module.channels, *module.input_size, seed=1)
    probe = random(*x.shape, seed=2)
    module.logabsdet().backward()
    found = module.weight.grad.clone()
    variable = module.weight.detach().clone().requires_grad_()
    op = cs.ConvOperator(variable * module.mask, module.input_size)
    dense = op.to_dense()
    torch.linalg.slogdet(dense).logabsdet.backward()
    torch.testing.assert_close(found, variable.grad)

    y = x.clone().requires_grad_()
    module.zero_grad()
    (module.inverse(y) * probe).sum().backward()
    right = x.clone().requires_grad_()
    variable.grad = None
    dense = cs.ConvOperator(variable * module.mask, module.input_size).to_dense()
    (torch.linalg.solve(dense, right.flatten()) * probe.flatten()).sum().backward()
    torch.testing.assert_close(y.grad, right.grad)
    torch.testing.assert_close(module.weight.grad, variable.grad)
    # The bias is subtracted before the solve.
    torch.testing.assert_close(module.bias.grad, -right.grad.sum((0, 2, 3)))


def test_gradcheck() -> None:
    module = layer(2, 3, 3)

    def inverse(y: Tensor, weight: Tensor) -> Tensor:
        op = cs.ConvOperator(weight.detach(), (3, 3))
        return factors.Inverse.apply(y, weight, op, factors.Factors(op))

    weight = module.weight.detach().clone().requires_grad_()
    y = random(2, 2, 3, 3).requires_grad_()
    assert torch.autograd.gradcheck(inverse, (y, weight))
    (slope,) = torch.autograd.grad(module.logabsdet(), module.weight, create_graph=True)
    with pytest.raises(RuntimeError, match="at most one derivative"):
        slope.square().sum().backward()


def test_a_step_factors_once(monkeypatch: pytest.MonkeyPatch) -> None:
    module, made = layer(2, 3, 4), []

    class Counted(factors.Factors):
        def __init__(self, *args: object) -> None:
            made.append(1)
            super().__init__(*args)

    monkeypatch.setattr("convspectra.nn._invertible.Factors", Counted)
    optimizer = torch.optim.SGD(module.parameters(), 0.01)
    x = random(2, 2, 4, 4)
    for step in range(1, 4):
        optimizer.zero_grad()
        for _ in range(2):  # accumulated: the graph is used and freed twice
            (module(x).square().mean() - module.logabsdet()).backward()
        module.inverse(x)
        optimizer.step()
        assert len(made) == step - 1  # the first is that of the construction
        module.logabsdet()
    torch.testing.assert_close(module.logabsdet(), torch.linalg.slogdet(matrix(module)).logabsdet)


def test_the_volume_can_be_trained() -> None:
    module = layer(2, 3, 4)
    optimizer = torch.optim.Adam(module.parameters(), 0.05)
    for _ in range(40):
        optimizer.zero_grad()
        (module.logabsdet() - 10).square().backward()
        optimizer.step()
    assert float(module.logabsdet().detach()) == pytest.approx(10, abs=0.5)
    assert float(torch.linalg.slogdet(matrix(module)).logabsdet) == pytest.approx(10, abs=0.5)


def test_copies_files_and_types() -> None:
    module = layer(2, 3, 4, dtype=torch.float32)
    module.logabsdet()
    twin = copy.deepcopy(module)
    buffer = io.BytesIO()
    torch.save(module, buffer)
    buffer.seek(0)
    again = torch.load(buffer, weights_only=False)
    assert list(module.state_dict()) == ["weight", "bias"]
    for other in (twin, again):
        assert torch.equal(other.logabsdet(), module.logabsdet())
    x = torch.randn(1, 2, 4, 4)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        assert module(x).dtype == torch.bfloat16
        assert module.inverse(x).dtype == torch.float32
        inside = module.logabsdet()
    assert torch.equal(inside, module.logabsdet())
    with torch.inference_mode():
        assert module.inverse(x).shape == x.shape
    assert module.double().inverse(x.double()).dtype == torch.float64
    module.logabsdet().backward()


@pytest.mark.parametrize("order", [None, "forward"])
def test_singular_layers_are_named_in_training(order: str | None) -> None:
    module = layer(2, 3, 4, order=order)
    with torch.no_grad():
        module.weight[:, 0] = 0
    for ask in (module.logabsdet, lambda: module.inverse(random(1, 2, 4, 4))):
        with pytest.raises(ArithmeticError, match=r"not singular, got Inv.*sigma_min = \d.*lower"):
            ask()


def test_singular_layers_are_named_at_construction(monkeypatch: pytest.MonkeyPatch) -> None:
    def zero(self: InvertibleConv2d) -> None:
        with torch.no_grad():
            self.weight.fill_(1.0)

    monkeypatch.setattr(InvertibleConv2d, "reset_parameters", zero)
    with pytest.raises(ArithmeticError, match="sigma_min = "):
        layer(2, 3, 4)


@pytest.mark.parametrize(
    ("args", "options", "message"),
    [
        ((2, 4, 8), {}, "expected an odd kernel_size, got 4"),
        ((0, 3, 8), {}, "expected channels to be a positive integer"),
        ((2, 3, (8, 0)), {}, "expected input_size to be a positive integer or two of them"),
        ((2, 3, (8, 8, 8)), {}, "expected input_size to be a positive integer or two"),
        ((2, 3, 8), {"order": "causal"}, "expected order to be one of"),
    ],
)
def test_bad_input_is_refused(args: tuple, options: dict, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        layer(*args, **options)


def test_images_of_another_shape_are_refused() -> None:
    module = layer(2, 3, (4, 5))
    for method in (module, module.inverse):
        with pytest.raises(ValueError, match=r"of shape \(2, 4, 5\) or \(b, 2, 4, 5\), as given"):
            method(random(1, 2, 5, 4))
