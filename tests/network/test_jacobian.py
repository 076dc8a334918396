"""`JacobianOperator` against `torch.func.jacrev`, and what it refuses and leaves alone."""

from __future__ import annotations

import copy
from typing import Any

import pytest
import torch
from helpers.networks import NETWORKS, Skip, Tokens, conv, network
from torch import Tensor, nn
from torch.nn.attention import SDPBackend, sdpa_kernel

import convspectra as cs
from convspectra.testing import assert_adjoint


def reference(model: nn.Module, x: Tensor) -> Tensor:
    """The Jacobian in double precision, by reverse mode one row at a time."""
    frozen = copy.deepcopy(model).double().eval()
    with sdpa_kernel(SDPBackend.MATH):
        jacobian = torch.func.jacrev(frozen)(x.double())
    return jacobian.reshape(-1, x.numel()).detach()


def near(first: Tensor, second: Tensor) -> bool:
    size = torch.linalg.vector_norm(second)
    return bool(torch.linalg.vector_norm(first - second) <= 1e-12 * size)


class Smooth(torch.autograd.Function):
    """A function as users write them, with a backward and no forward mode."""

    @staticmethod
    def forward(ctx: Any, x: Tensor) -> Tensor:
        ctx.save_for_backward(x)
        return x.sin()

    @staticmethod
    def backward(ctx: Any, g: Tensor) -> Tensor:
        (x,) = ctx.saved_tensors
        return g * x.cos()


class StraightThrough(torch.autograd.Function):
    """Rounding with the gradient of the identity, and the derivative that it has."""

    @staticmethod
    def forward(x: Tensor) -> Tensor:
        return x.round()

    @staticmethod
    def setup_context(ctx: Any, inputs: Any, output: Any) -> None:
        pass

    @staticmethod
    def backward(ctx: Any, g: Tensor) -> Tensor:
        return g

    @staticmethod
    def jvp(ctx: Any, t: Tensor) -> Tensor:
        return torch.zeros_like(t)


class Applied(nn.Module):
    def __init__(self, function: Any) -> None:
        super().__init__()
        self.function = function

    def forward(self, *args: Any) -> Any:
        return self.function(*args)


@pytest.mark.parametrize(("name", "seed"), NETWORKS)
def test_products_are_those_of_the_dense_jacobian(name: str, seed: int) -> None:
    model, x = network(name, seed)
    dense = reference(model, x)
    J = cs.JacobianOperator(model, x)
    assert J.shape == dense.shape
    assert near(J.to_dense(), dense)
    assert_adjoint(J)
    generator = torch.Generator().manual_seed(seed)
    t = torch.randn(3, *J.input_shape, dtype=torch.float64, generator=generator)
    y = torch.randn(3, *J.output_shape, dtype=torch.float64, generator=generator)
    assert near(J.apply(t).reshape(3, -1), t.flatten(1) @ dense.T)
    assert near(J.apply_adjoint(y).flatten(1), y.reshape(3, -1) @ dense)
    assert near(J.matvec(t[0]).flatten(), dense @ t[0].flatten())
    assert near(J.T.to_dense(), dense.T)
    assert J.T.shape == (dense.shape[1], dense.shape[0])
    assert J.T.T.input_shape == J.input_shape


@pytest.mark.parametrize("name", ["tanh", "batch norm", "attention", "deep skips"])
def test_double_backward_gives_the_same(name: str) -> None:
    model, x = network(name, 0)
    J = cs.JacobianOperator(model, x, method="double backward")
    assert J.method == "double backward"
    assert near(J.to_dense(), reference(model, x))
    t = torch.ones(2, *J.input_shape, dtype=torch.float64)
    assert near(J.apply(t).reshape(2, -1), t.flatten(1) @ reference(model, x).T)


def test_an_operation_without_forward_mode_takes_double_backward() -> None:
    model = nn.Sequential(conv(), Applied(Smooth.apply), conv())
    x = torch.randn(1, 2, 6, 6)
    J = cs.JacobianOperator(model, x)
    assert J.method == "double backward"
    assert near(J.to_dense().T, cs.JacobianOperator(model, x).T.to_dense())
    sine = nn.Sequential(model[0], Applied(torch.sin), model[2])
    assert near(J.to_dense(), reference(sine, x))
    with pytest.raises(ValueError, match="errors in every way: forward: "):
        cs.JacobianOperator(model, x, method="forward")


def test_writes_that_cannot_be_batched_are_done_one_by_one() -> None:
    def write(x: Tensor) -> Tensor:
        out = torch.zeros(2, 6, dtype=x.dtype)
        out[0] = x[0].sin()
        out[1] = x[0] ** 2
        return out[None]

    x = torch.linspace(-1, 1, 6)[None]
    J = cs.JacobianOperator(Applied(write), x)
    expected = torch.cat([torch.diag(x[0].double().cos()), torch.diag(2 * x[0].double())])
    assert near(J.to_dense(), expected)
    assert near(J.apply(torch.eye(6, dtype=torch.float64)).flatten(1), expected.T)


def test_a_segment_goes_from_one_module_to_another() -> None:
    model, x = network("deep skips", 0)
    whole = cs.JacobianOperator(model, x).to_dense()
    parts = [cs.JacobianOperator(model, x, str(i), str(i)).to_dense() for i in range(3)]
    assert near(parts[2] @ parts[1] @ parts[0], whole)
    assert near(cs.JacobianOperator(model, x, end="1").to_dense(), parts[1] @ parts[0])
    assert near(cs.JacobianOperator(model, x, start="1").to_dense(), parts[2] @ parts[1])


def test_what_goes_around_the_start_is_held_fixed() -> None:
    model = nn.Sequential(Skip(conv()))
    x = torch.randn(1, 2, 6, 6)
    around = cs.JacobianOperator(model, x, "0.inner", "0").to_dense()
    inner = cs.JacobianOperator(model, x, "0.inner", "0.inner").to_dense()
    assert near(around, inner)
    assert near(cs.JacobianOperator(model, x).to_dense(), inner + torch.eye(72).double())


def test_a_selector_takes_the_tensor_that_is_meant() -> None:
    model = nn.LSTM(4, 3, batch_first=True)
    x = torch.randn(1, 5, 4)
    J = cs.JacobianOperator(model, x, select=lambda output: output[1][0])
    # jacrev has no rule for the LSTM's fused operation: each row by itself.
    frozen, z = copy.deepcopy(model).double(), x.double().requires_grad_()
    state = frozen(z)[1][0].flatten()
    rows = [torch.autograd.grad(entry, z, retain_graph=True)[0].flatten() for entry in state]
    assert near(J.to_dense(), torch.stack(rows))
    with pytest.raises(ValueError, match="expected an output with one floating tensor in it"):
        cs.JacobianOperator(model, x)


def test_further_arguments_are_held_fixed() -> None:
    x, y = torch.randn(1, 3), torch.randn(1, 3)
    J = cs.JacobianOperator(Applied(torch.mul), (x, y))
    assert near(J.to_dense(), torch.diag(y[0].double()))


def test_scipy_sees_the_same_matrix() -> None:
    model, x = network("strided", 0)
    J = cs.JacobianOperator(model, x)
    linear = J.to_scipy()
    dense = J.to_dense().numpy()
    vector = torch.arange(72.0, dtype=torch.float64).numpy()
    assert abs(linear @ vector - dense @ vector).max() <= 1e-12 * abs(dense @ vector).max()
    assert linear.rmatvec(dense @ vector).shape == (72,)


def test_nothing_of_the_model_changes() -> None:
    model, x = network("spectral norm", 0)
    model(x.requires_grad_()).sum().backward()
    calls: list[str] = []
    handle = model[0].register_forward_hook(lambda *_: calls.append("called"))
    before = copy.deepcopy(model.state_dict())
    gradients = [p.grad.clone() for p in model.parameters()]
    modes = [m.training for m in model.modules()]
    hooks = [list(m._forward_hooks) for m in model.modules()]
    random, original = torch.get_rng_state(), x.detach().clone()
    J = cs.JacobianOperator(model, x)
    J.apply(torch.ones(2, *J.input_shape, dtype=torch.float64))
    after = model.state_dict()
    assert all(torch.equal(before[key], after[key]) for key in before)
    pairs = zip(gradients, model.parameters(), strict=True)
    assert all(torch.equal(g, p.grad) for g, p in pairs if p.grad is not None)
    assert [m.training for m in model.modules()] == modes
    assert [list(m._forward_hooks) for m in model.modules()] == hooks
    assert torch.equal(torch.get_rng_state(), random)
    assert torch.equal(x, original)
    assert {p.dtype for p in model.parameters()} == {torch.float32}
    handle.remove()


def test_weights_that_change_later_do_not_matter() -> None:
    model, x = network("tanh", 0)
    J = cs.JacobianOperator(model, x)
    before = J.to_dense()
    with torch.no_grad():
        model[0].weight.zero_()
    assert torch.equal(J.to_dense(), before)


def test_single_precision_is_there_for_those_who_ask() -> None:
    model, x = network("tanh", 0)
    J = cs.JacobianOperator(model, x, dtype=torch.float32)
    assert J.dtype == J.to_dense().dtype == torch.float32
    assert torch.allclose(J.to_dense().double(), reference(model, x), atol=1e-5)


def test_attention_goes_by_operations_that_have_both_products() -> None:
    model = nn.TransformerEncoderLayer(8, 2, 16, batch_first=True)
    x = torch.randn(1, 3, 8)
    J = cs.JacobianOperator(model, x)
    assert J.method == "forward"
    assert near(J.to_dense(), reference(model, x))
    tokens = nn.Sequential(conv(2, 4), Tokens(4, 2))
    image = torch.randn(1, 2, 4, 4)
    assert near(cs.JacobianOperator(tokens, image).to_dense(), reference(tokens, image))


class Noise(nn.Module):
    def forward(self, x: Tensor) -> Tensor:
        return x + torch.randn_like(x)


class Twice(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.inner = conv()

    def forward(self, x: Tensor) -> Tensor:
        return self.inner(self.inner(x))


X = torch.linspace(-1, 1, 72).reshape(1, 2, 6, 6)
torch.manual_seed(0)  # the kernels below: some of their outputs are negative
REFUSED: dict[str, tuple[Any, Any, dict[str, Any], str]] = {
    "no module": (torch.tanh, X, {}, "expected model to be a torch.nn.Module, got builtin"),
    "a batch": (
        conv(),
        X.repeat(2, 1, 1, 1),
        {},
        r"one sample with its batch axis.*\(2, 2, 6, 6\)",
    ),
    "no tensor": (
        conv(),
        [X],
        {},
        "expected x to be a tensor, or a tuple or mapping of arguments.*got list",
    ),
    "integers": (
        nn.Embedding(9, 4),
        torch.tensor([[1, 2]]),
        {},
        "floating input of the model, got torch.int64.*start=",
    ),
    "not finite": (conv(), X / 0, {}, "expected a finite input of the model.*NaN or Inf"),
    "unknown start": (conv(), X, {"start": "nowhere"}, "expected start to be the name of a module"),
    "unknown end": (conv(), X, {"end": "nowhere"}, "expected end to be the name of a module"),
    "twice": (Twice(), X, {"end": "inner"}, "to call end='inner' once, it did so 2 times"),
    "start twice": (
        Twice(),
        X,
        {"start": "inner"},
        "to call start='inner' once, it did so 2 times",
    ),
    "random": (
        nn.Sequential(conv(), Noise(), conv()),
        X,
        {},
        "without randomness in evaluation mode.*from module '1' on",
    ),
    "rounding": (nn.Sequential(conv(), Applied(torch.argmax)), X, {}, "one floating tensor in it"),
    "detached": (nn.Sequential(conv(), Applied(torch.detach)), X, {}, "differentiably"),
    "a root at 0": (
        nn.Sequential(conv(), nn.ReLU(), Applied(torch.sqrt), conv()),
        X,
        {},
        "differentiable at x, got NaN or Inf.*output of module '2'",
    ),
    "straight through": (
        nn.Sequential(conv(), Applied(StraightThrough.apply)),
        X,
        {},
        "forward and reverse products of one matrix.*straight-through",
    ),
    "a cast": (
        nn.Sequential(conv(), Applied(Tensor.float)),
        X,
        {},
        "float64, got torch.float32: the model casts",
    ),
    "no tensor out": (
        nn.Sequential(conv(), Applied(Tensor.tolist)),
        X,
        {},
        "one floating tensor in it, got list",
    ),
    "does not run": (nn.Linear(3, 3), X, {}, "expected a forward pass that runs, got RuntimeError"),
    "written over": (
        nn.Sequential(nn.Sigmoid(), Applied(lambda x: x.mul_(2) * x.add_(1))),
        X,
        {},
        "expected a backward pass that runs, got RuntimeError.*inplace",
    ),
    "infinite": (Applied(lambda x: x / 0), X, {}, "expected a finite output.*NaN or Inf"),
    "a method": (conv(), X, {"method": "finite differences"}, "expected method to be one of"),
    "half": (conv(), X, {"dtype": torch.float16}, "expected dtype to be torch.float64 or"),
    "selector": (
        conv(),
        X,
        {"select": lambda y: 1.0},
        "expected select.output. to be a floating tensor, got float",
    ),
    "lazy": (nn.LazyLinear(3), X, {}, "got 'weight', which has no shape yet"),
    "meta": (nn.Linear(6, 3, device="meta"), X, {}, "got 'weight' on the meta device"),
}


@pytest.mark.parametrize("case", REFUSED)
def test_what_is_refused_is_named(case: str) -> None:
    model, x, options, message = REFUSED[case]
    with pytest.raises(ValueError, match=message):
        cs.JacobianOperator(model, x, **options)


def test_arrays_are_checked_at_the_door() -> None:
    J = cs.JacobianOperator(conv(), X)
    with pytest.raises(ValueError, match=r"expected x of shape \(2, 6, 6\)"):
        J.matvec(torch.zeros(3, dtype=torch.float64))
    with pytest.raises(ValueError, match=r"expected y of torch.float64"):
        J.rmatvec(torch.zeros(2, 6, 6))
    with pytest.raises(ValueError, match="expected the dense Jacobian to take at most"):
        J.to_dense(max_bytes=1000)
