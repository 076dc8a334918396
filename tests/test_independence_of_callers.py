"""Every public function that computes gives the same numbers whatever surrounds its call."""

from __future__ import annotations

import ast
import contextlib
import copy
import math
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import convspectra as cs

SOURCES = Path(cs.__file__).parent
FACTORIES = {
    "arange", "as_tensor", "empty", "eye", "full", "linspace", "logspace", "normal", "ones",
    "rand", "randint", "randn", "randperm", "tensor", "zeros",
}  # fmt: skip
NUMBERS_ONLY = {
    "matlab",
    "nn",
    "parametrizations",
    "penalties",
    "kernel_to_weight",
    "weight_to_kernel",
    "Schedule",
}
"""Public names with nothing to compute that a surrounding could change, or tested under another."""


def model() -> nn.Sequential:
    torch.manual_seed(0)
    conv = nn.Conv2d(3, 4, 3, padding=1, dtype=torch.float32, device="cpu")
    head = nn.Linear(144, 3, dtype=torch.float32, device="cpu")
    return nn.Sequential(conv, nn.ReLU(), nn.Flatten(), head)


def images() -> Tensor:
    return torch.linspace(-1, 1, 4 * 108, dtype=torch.float32, device="cpu").reshape(4, 3, 6, 6)


def operator(channels: int = 4) -> cs.ConvOperator:
    generator = torch.Generator().manual_seed(0)
    weight = torch.randn(4, channels, 3, 3, generator=generator, dtype=torch.float64, device="cpu")
    return cs.ConvOperator(weight, (6, 6), padding=1)


def penalized(name: str) -> Callable[[], Any]:
    net, x = model(), images()

    def run() -> Any:
        reg = cs.SpectralRegularizer(net, x[:1], penalty=name)
        value = float(reg().detach())
        reg.refresh()
        reg.step(0.01)
        # Without gradients nothing moves on, and a layer is younger.
        known = [record | {"age": 0} for record in reg.report().records()]
        return value, known, [p.detach().tolist() for p in net.parameters()]

    return run


def changed(function: Callable[..., Any]) -> Callable[[], Any]:
    """What a function makes of a model."""
    net, x = model(), images()

    def run() -> Any:
        function(net, x)
        return [p.detach().tolist() for p in net.parameters()]

    return run


def held(net: nn.Module, x: Tensor) -> Any:
    """A layer whose norm is held: its weights in training and in evaluation."""
    layer = cs.parametrizations.spectral_norm(copy.deepcopy(net[0]), (6, 6))
    found = [layer.train(mode).weight.detach().tolist() for mode in (True, False)]
    return found, layer.parametrizations.weight[0].certificate()


def projected(net: nn.Module, x: Tensor) -> Any:
    """A layer's weight, projected in place, and the report."""
    report = cs.project_(net[0], (3, 3), max_norm=0.5)
    return net[0].weight.detach().tolist(), report


def on_model(function: Callable[..., Any]) -> Callable[[], Any]:
    net, x = model(), images()
    return lambda: function(net, x)


def numbers_of_audit(net: nn.Module, x: Tensor) -> Any:
    return [(layer.skipped, layer.applied) for layer in cs.audit(net, x[:1]).layers]


OP, WIDE = operator(), operator(3)
TENSOR = torch.linspace(0, 1, 144, dtype=torch.float64, device="cpu").reshape(4, 6, 6)
KERNEL = torch.linspace(-1, 1, 36, dtype=torch.float64, device="cpu").reshape(2, 2, 3, 3)
SMALL = cs.ConvOperator(OP.weight[:2, :2], (3, 3), padding=1)
METHODS = ("dense", "gram", "lanczos", "lobpcg", "davidson", "capacitance")

CASES: dict[str, Callable[[], Callable[[], Any]]] = {
    "ConvOperator": lambda: lambda: OP.matvec(TENSOR).tolist() + OP.to_dense().tolist(),
    "sigma_max": lambda: lambda: cs.sigma_max(OP),
    "sigma_min": lambda: lambda: cs.sigma_min(WIDE),
    "cond": lambda: lambda: cs.cond(OP),
    "svdvals": lambda: lambda: cs.svdvals(OP).tolist(),
    "svds": lambda: lambda: cs.svds(WIDE, 2, "SM", method="augmented").s.tolist(),
    **{
        f"svds {method}": lambda method=method: lambda: cs.svds(
            OP, 1, "SM", method=method, maxiter=500
        ).s.tolist()
        for method in METHODS
    },
    "frobenius_norm": lambda: lambda: cs.frobenius_norm(OP),
    "norm_bound": lambda: lambda: cs.norm_bound(OP),
    "logabsdet": lambda: lambda: float(cs.logabsdet(OP)),
    "solve": lambda: lambda: cs.solve(OP, TENSOR).tolist(),
    "count": lambda: lambda: int(cs.count(OP, 2.0, 3.1)),
    "spectral_density": lambda: lambda: cs.spectral_density(OP),
    "spectral_density quadrature": lambda: lambda: cs.spectral_density(OP, method="quadrature"),
    "stable_rank": lambda: on_model(
        lambda net, x: cs.stable_rank(cs.JacobianOperator(net, x[:1])).value
    ),
    "explain": lambda: lambda: str(cs.explain(OP)),
    "audit": lambda: on_model(numbers_of_audit),
    "JacobianOperator": lambda: on_model(
        lambda net, x: cs.svds(cs.JacobianOperator(net, x[:1]), 2, "SM").s.tolist()
    ),
    "lipschitz_bound": lambda: on_model(
        lambda net, x: (b := cs.lipschitz_bound(net, x[:1], ascent=1)) and (b.lower, b.upper)
    ),
    "parametrizations.spectral_norm": lambda: on_model(held),
    "project": lambda: lambda: cs.project(SMALL, 2.0).weight.tolist(),
    "project_": lambda: on_model(projected),
    "gradient_flow": lambda: on_model(lambda net, x: str(cs.gradient_flow(net, x))),
    "precondition": lambda: changed(cs.precondition),
    "prepare": lambda: changed(cs.prepare),
    "descend": lambda: lambda: cs.descend(
        KERNEL, (5, 5), algorithm="3.3", step_size="auto", max_iter=3
    ).kernel.tolist(),
    **{
        f"SpectralRegularizer {name}": lambda name=name: penalized(name)
        for name in (
            "band", "circular_stein", "cond", "conditioning", "frobenius", "isometry",
            "orthogonality", "sigma_max", "sigma_min", "stein",
        )
    },
}  # fmt: skip


@contextlib.contextmanager
def default_dtype() -> Iterator[None]:
    before = torch.get_default_dtype()
    torch.set_default_dtype(torch.float16)
    try:
        yield
    finally:
        torch.set_default_dtype(before)


SURROUNDINGS: dict[str, Callable[[], contextlib.AbstractContextManager[Any]]] = {
    "autocast": lambda: torch.autocast("cpu", dtype=torch.bfloat16),
    "default dtype": default_dtype,
    "default device": lambda: torch.device("meta"),  # where nothing can be computed
    "inference mode": torch.inference_mode,
    "no gradients": torch.no_grad,
}


def text(value: Any) -> str:
    return repr(value)  # nan is equal to itself there


@pytest.mark.parametrize("name", CASES)
def test_what_surrounds_a_call_changes_nothing(name: str) -> None:
    expected = text(CASES[name]()())
    for surrounding, context in SURROUNDINGS.items():
        run = CASES[name]()
        with context():
            found = text(run())
        assert found == expected, surrounding


def test_every_public_function_is_among_them() -> None:
    functions = {name for name in cs.__all__ if name[0].islower()} | {
        "ConvOperator", "JacobianOperator", "SpectralRegularizer"
    }  # fmt: skip
    assert functions - NUMBERS_ONLY <= {name.split()[0] for name in CASES}


def test_compiled_callers_get_the_same_number() -> None:
    @torch.compile(backend="eager")
    def twice(x: Tensor) -> Tensor:
        return 2 * x * cs.sigma_max(OP)

    x = torch.ones((), dtype=torch.float64)
    assert math.isclose(float(twice(x)), 2 * cs.sigma_max(OP), rel_tol=1e-12)


@pytest.mark.filterwarnings("ignore:The .grad attribute of a Tensor")  # of the compiler
def test_a_regularizer_in_a_compiled_loss() -> None:
    net, x = model(), images()
    reg = cs.SpectralRegularizer(copy.deepcopy(net), x[:1], penalty="frobenius")
    expected = float(reg().detach())
    compiled = torch.compile(lambda: reg() + 1, backend="eager")
    assert float(compiled().detach()) == pytest.approx(expected + 1)


def test_every_new_array_says_where_it_is() -> None:
    """A default device of the caller would take it along otherwise."""
    silent = []
    for path in SOURCES.rglob("*.py"):
        for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
            if not isinstance(node, ast.Call) or not isinstance(node.func, ast.Attribute):
                continue
            if ast.unparse(node.func.value) == "torch" and node.func.attr in FACTORIES:
                given = {keyword.arg for keyword in node.keywords}
                if not given & {"device", None}:
                    silent.append(f"{path.name}:{node.lineno}")
    assert silent == []
