"""Both ends of the Lipschitz constant, against dense Jacobians and difference quotients."""

from __future__ import annotations

import copy
import itertools
import math
from collections.abc import Callable

import numpy as np
import pytest
import torch
from helpers.networks import PARTS, Concatenation, Skip, conv, network, trained
from torch import Tensor, nn
from torch.nn import functional as F

import convspectra as cs

REFUSED = {
    "instance norm": r"native_batch_norm.*'1' \(InstanceNorm2d\).*instance normalization",
    "group norm": r"native_group_norm.*'1' \(GroupNorm\)",
    "layer norm": r"native_layer_norm.*'1' \(LayerNorm\)",
    "attention": r"bmm.*'1.inner.attention' \(MultiheadAttention\).*attention",
    "gate": r"mul.*'2' \(Gate\).*gate",
}
BOUNDED = [name for name in PARTS if name not in REFUSED]


class Function(nn.Module):
    """A function as a model, of modules that it calls."""

    def __init__(self, function: Callable[..., Tensor], *modules: nn.Module) -> None:
        super().__init__()
        self.inner = nn.ModuleList(modules)
        self.function = function

    def forward(self, x: Tensor) -> Tensor:
        return self.function(x, *self.inner)


def dense_norms(model: nn.Module, inputs: Tensor) -> Tensor:
    """Norms of the dense Jacobians at a batch of inputs, by reverse mode, a row at a time."""
    model = copy.deepcopy(model).double().eval()
    x = inputs.detach().double().requires_grad_()
    outputs = model(x.clone()).reshape(len(x), -1)
    rows = [torch.autograd.grad(y.sum(), x, retain_graph=True)[0].flatten(1) for y in outputs.T]
    jacobians = torch.stack(rows, 1).detach()
    if jacobians.shape[1] > jacobians.shape[2]:
        jacobians = jacobians.mT
    return torch.linalg.eigvalsh(jacobians @ jacobians.mT)[:, -1].sqrt()


def upper(model: nn.Module, x: Tensor, expand: int = 2) -> float:
    return cs.lipschitz_bound(model, x, expand=expand, scaling=0, ascent=0).upper


def linear_norm(model: nn.Module, x: Tensor) -> float:
    """The norm of an affine model, by its images of the unit vectors."""
    model = copy.deepcopy(model).double().eval()
    units = torch.eye(x[0].numel(), dtype=torch.float64).reshape(-1, *x.shape[1:])
    with torch.no_grad():
        zero = model(torch.zeros_like(units[:1]))
        images = torch.cat([model(unit[None]) for unit in units]) - zero
    return float(torch.linalg.matrix_norm(images.flatten(1), 2))


def check(model: nn.Module, inputs: Tensor) -> None:
    """No Jacobian and no difference quotient is above the upper end; each end is on its side."""
    result = cs.lipschitz_bound(model, inputs[:1], ascent=1)
    largest = float(dense_norms(model, inputs).amax())
    assert largest <= result.upper * (1 + 1e-12)
    assert 0 < result.lower <= result.upper <= result.plain * (1 + 1e-12)
    frozen = copy.deepcopy(model).double().eval()
    with torch.no_grad():
        outputs = frozen(inputs.double()).flatten(1)
    apart = (inputs[1:] - inputs[:-1]).double().flatten(1).norm(dim=1)
    assert float(((outputs[1:] - outputs[:-1]).norm(dim=1) / apart).amax()) <= result.upper
    at = float(dense_norms(model, result.at).amax())
    assert result.lower == pytest.approx(at, rel=1e-2)
    assert result.lower <= at * (1 + 1e-12)


@pytest.mark.parametrize("name", BOUNDED)
def test_no_jacobian_is_above(name: str) -> None:
    model, _ = network(name, 1)
    torch.manual_seed(0)
    # 10,030 of them altogether; the transposed layer has the most rows.
    count = 150 if name == "transposed" else 520
    check(model, 2 * torch.randn(count, 2, 6, 6))


@pytest.mark.slow
@pytest.mark.parametrize("name", BOUNDED)
@pytest.mark.parametrize("seed", range(3))
def test_no_jacobian_of_ten_thousand_is_above(name: str, seed: int) -> None:
    model, _ = network(name, seed)
    torch.manual_seed(seed)
    check(model, 2 * torch.randn(10_000, 2, 6, 6))


LINEAR = {
    "convolutions": lambda: nn.Sequential(conv(2, 3, stride=2), conv(3, 2, bias=False)),
    "circular": lambda: conv(padding_mode="circular"),
    "reflect": lambda: conv(padding_mode="reflect"),
    "replicate": lambda: nn.Sequential(conv(padding_mode="replicate"), nn.ZeroPad2d((2, 0, 1, 0))),
    "transposed": lambda: nn.ConvTranspose2d(2, 3, 3, 2, 1, output_padding=1),
    "batch norm": lambda: nn.Sequential(conv(2, 4), trained(nn.BatchNorm2d(4)), conv(4, 2)),
    "batch norm first": lambda: nn.Sequential(trained(nn.BatchNorm2d(2)), conv(2, 4)),
    "skip": lambda: nn.Sequential(Skip(conv()), Skip(nn.Sequential(conv(), conv()))),
    "concatenation": lambda: nn.Sequential(Concatenation(conv()), conv(4, 1)),
    "average pool": lambda: nn.Sequential(nn.AvgPool2d(3, 1, 1), nn.Flatten(), nn.Linear(72, 3)),
    "upsampled": lambda: nn.Sequential(nn.Upsample(scale_factor=2), conv(), nn.AvgPool2d(4)),
    "bilinear": lambda: nn.Upsample(scale_factor=1.5, mode="bilinear"),
    "tokens": lambda: nn.Sequential(nn.Flatten(2), nn.Linear(36, 5), nn.Flatten()),
    "shuffled": lambda: nn.Sequential(conv(2, 8), nn.PixelShuffle(2), nn.PixelUnshuffle(3)),
    "grouped, dilated": lambda: nn.Conv2d(2, 4, 2, dilation=2, groups=2),
    "constants": lambda: Function(lambda x: 3 - 2 * x / torch.arange(1, 7) + x.flip(-1) - 1),
    "parts": lambda: Function(lambda x: torch.cat([x[:, :1, 1:] * 2, x[:, 1:, :-1]], 1).sum(2)),
    "broadcast": lambda: Function(lambda x: x.mean((2, 3), keepdim=True) + torch.zeros(1, 2, 3, 3)),
    "einsum": lambda: Function(lambda x: torch.einsum("bchw,hk->bck", x, torch.ones(6, 4).to(x))),
    "split": lambda: Function(lambda x: torch.cat([t * i for i, t in enumerate(x.split(2, 3))], 1)),
    "rolled": lambda: Function(lambda x: torch.roll(x, 1, -1).transpose(2, 3).reshape(1, -1)),
    "masked": lambda: Function(lambda x: x.masked_fill(torch.eye(6) > 0, 5.0)),
}  # fmt: skip


@pytest.mark.parametrize("name", LINEAR)
def test_linear_networks_exactly(name: str) -> None:
    torch.manual_seed(0)
    model, x = LINEAR[name](), torch.randn(1, 2, 6, 6)
    result = cs.lipschitz_bound(model, x, ascent=0)
    norm = linear_norm(model, x)
    assert norm * (1 - 1e-12) <= result.upper <= norm * (1 + 2e-4)
    assert norm * (1 - 2e-3) <= result.lower <= norm * (1 + 1e-12)


def writes(x: Tensor) -> Tensor:
    y = torch.zeros(1, 3, 6, 6, dtype=x.dtype)
    y[:, :2] = x
    part = y[:, 1:]
    part *= 2
    y[:, 0].add_(part[:, 0], alpha=-3)
    y[:, 2, ::2].copy_(x[:, 0, ::2])
    part[:, 1, 0].zero_()
    y.mul_(0.5).neg_()
    return y + y.clone().transpose(2, 3)


def test_writes_in_place() -> None:
    x = torch.randn(1, 2, 6, 6)
    assert upper(Function(writes), x) == pytest.approx(linear_norm(Function(writes), x), rel=1e-9)


def writes_its_constant(x: Tensor) -> Tensor:
    factor = torch.ones(8, dtype=x.dtype)
    y = x * factor
    factor.mul_(2)
    return y


def writes_into_several(x: Tensor) -> Tensor:
    y = [x * 2, x * 3]
    torch._foreach_mul_(y, 5.0)
    return y[0] + y[1]


def fills(x: Tensor) -> Tensor:
    y = x * 2
    y[:, :4].fill_(x[0, 5])
    return y


def gives_out(x: Tensor) -> Tensor:
    y = torch.empty(1, 8, dtype=x.dtype)
    torch.mul(x, 2, out=y)
    return y


def branches(x: Tensor) -> Tensor:
    return torch.cond(x.sum() > 0, lambda t: t * 1.0, lambda t: t * 2.0, (x,))


def test_writes_over_its_input() -> None:
    model = Function(lambda x: x.mul_(3)[:, :1].sub_(x[:, 1:]))
    x = torch.ones(1, 2, 6, 6)
    assert upper(model, x) == pytest.approx(3 * math.sqrt(2))
    assert bool((x == 1).all())


def test_two_layers_by_hand() -> None:
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(8, 9), nn.ReLU(), nn.Linear(9, 5))
    first, second = (model[i].weight.detach().double().numpy() for i in (0, 2))

    def norm(a: np.ndarray) -> float:
        return float(np.linalg.norm(a, 2))

    whole, inner, outer = norm(second @ first) / 2, norm(first), norm(second)
    together = (whole + outer / 2 * inner) ** 0.5
    blocks = [second @ first / 2 / whole**0.5, second / 2 * (inner / (outer / 2)) ** 0.5]
    beside = norm(np.hstack(blocks)) * together
    result = cs.lipschitz_bound(model, torch.zeros(1, 8), scaling=0, ascent=0)
    assert result.plain == pytest.approx(inner * outer, rel=1e-6)
    assert result.upper == pytest.approx(beside, rel=1e-6)
    assert beside < together**2 < inner * outer
    assert upper(model, torch.zeros(1, 8), expand=0) == pytest.approx(inner * outer, rel=1e-6)


def test_batch_norm_is_folded() -> None:
    torch.manual_seed(0)
    model = nn.Sequential(conv(2, 4), trained(nn.BatchNorm2d(4)), nn.ReLU()).eval()
    norm: nn.BatchNorm2d = model[1]  # type: ignore[assignment]
    scale = norm.weight / (norm.running_var + norm.eps).sqrt()
    x = torch.randn(1, 2, 6, 6)
    apart = linear_norm(model[0], x) * float(scale.detach().abs().amax())
    value = upper(model, x)
    assert value == pytest.approx(linear_norm(model[:2], x), rel=2e-4)
    assert value < 0.95 * apart


@pytest.mark.parametrize(
    ("pool", "windows"),
    [
        (nn.MaxPool2d(2), 1),
        (nn.MaxPool2d(3, 2, 1), 4),
        (nn.MaxPool2d(3, 1, 1), 9),
        (nn.MaxPool2d(2, 2, dilation=2), 4),
        (nn.MaxPool2d((1, 2), (1, 1)), 2),
        (nn.AdaptiveMaxPool2d(4), 4),
        (nn.AdaptiveMaxPool2d(3), 1),
    ],
)
def test_max_pooling(pool: nn.Module, windows: int) -> None:
    x = torch.randn(1, 2, 6, 6)
    assert upper(pool, x) == pytest.approx(math.sqrt(windows))
    # One large pixel is the largest of all its windows: the constant is attained there.
    points = torch.zeros(36, 1, 6, 6)
    points.reshape(36, 36).fill_diagonal_(1)
    reached = (pool(points) - pool(torch.zeros_like(points))).flatten(1).norm(dim=1).amax()
    assert float(reached) == pytest.approx(math.sqrt(windows))


ACTIVATIONS: dict[str, nn.Module] = {
    type(module).__name__: module
    for module in (
        *(nn.ReLU(), nn.ReLU6(), nn.LeakyReLU(-0.3), nn.PReLU(init=1.7), nn.RReLU(), nn.ELU(2.0)),
        *(nn.CELU(0.3), nn.SELU(), nn.GELU(), nn.SiLU(), nn.Mish(), nn.Softplus(2.0), nn.Tanh()),
        *(nn.Sigmoid(), nn.Hardtanh(-1, 2), nn.Hardswish(), nn.Hardsigmoid(), nn.LogSigmoid()),
        *(nn.Softsign(), nn.Tanhshrink(), nn.Softshrink(0.2), nn.Threshold(0.5, 0.5)),
    )
} | {
    "gelu by tanh": nn.GELU(approximate="tanh"),
    "abs": Function(torch.abs),
    "sin": Function(torch.sin),
    "clamp": Function(lambda x: x.clamp(-0.5, 0.2).clamp_min(-0.4)),
    "maximum": Function(lambda x: torch.maximum(x, torch.ones(6).to(x))),
}


@pytest.mark.parametrize("name", ACTIVATIONS)
def test_slopes_of_activations(name: str) -> None:
    model = ACTIVATIONS[name].double()
    x = torch.linspace(-8, 8, 40_001, dtype=torch.float64)
    with torch.no_grad():
        y = copy.deepcopy(model).eval()(x[:, None].expand(-1, 6))[:, 0]
    steepest = float(((y[1:] - y[:-1]) / (x[1:] - x[:-1])).abs().amax())
    # Tightest where nothing is expanded: the constant is the largest slope.
    value = upper(model, torch.zeros(1, 6) + 0.1, expand=0)
    assert steepest * (1 - 1e-9) <= value <= steepest * (1 + 1e-3)


@pytest.mark.parametrize("name", ACTIVATIONS)
def test_both_ends_of_slopes(name: str) -> None:
    """Around an activation, ``a x + f(x)`` has the slopes of f moved by a."""
    activation = ACTIVATIONS[name].double()
    x = torch.linspace(-8, 8, 4_001, dtype=torch.float64)
    for a in (-2.0, 2.0):
        model = Function(lambda x, f, a=a: a * x + f(x), activation).eval()
        with torch.no_grad():
            y = model(x[:, None].expand(-1, 6))[:, 0]
        steepest = float(((y[1:] - y[:-1]) / (x[1:] - x[:-1])).abs().amax())
        assert steepest * (1 - 1e-9) <= upper(model, torch.zeros(1, 6) + 0.1)


@pytest.mark.parametrize(
    ("function", "constant"),
    [
        (lambda x: x.softmax(1), 0.5),
        (lambda x: x.log_softmax(1), math.sqrt(8)),
        (lambda x: x.logsumexp(1), 1.0),
        (lambda x: x.sort(1)[0], 1.0),
        (lambda x: x.reshape(-1, 2, 4).amax(1), 1.0),
        (lambda x: x.reshape(-1, 2, 4).max(1)[0], 1.0),
        (lambda x: x.norm(dim=1), 1.0),
        (lambda x: torch.maximum(x[:, :4], x[:, 4:]), 1.0),
    ],
)
def test_other_constants(function: Callable[[Tensor], Tensor], constant: float) -> None:
    model = Function(function)
    x = torch.randn(1, 8)
    assert upper(model, x) == pytest.approx(constant)
    norms = dense_norms(model, 3 * torch.randn(2000, 8))
    assert 0.5 * constant < float(norms.amax()) <= constant * (1 + 1e-12)


@pytest.mark.parametrize("name", REFUSED)
def test_parts_without_a_bound_are_named(name: str) -> None:
    model, x = network(name, 0)
    with pytest.raises(ValueError, match=REFUSED[name]):
        cs.lipschitz_bound(model, x)


@pytest.mark.parametrize(
    ("function", "match"),
    [
        (lambda x: x if x.sum() > 0 else -x, "'_local_scalar_dense'.*take this choice out"),
        (lambda x: x * len(x.tolist()), r"Tensor\.tolist.*take this choice out"),
        (lambda x: torch.where(x > 0, x, 2 * x), "'gt'.*torch.bool, and a choice by it may jump"),
        (lambda x: x / x.norm(), "'div'.*a division by an array that depends on the input"),
        (lambda x: x.exp(), "'exp'.*the slope of exp is not bounded"),
        (lambda x: x**2, "'pow'.*the slope of a power is not bounded"),
        (lambda x: x * x, "'mul'.*a product of two arrays that both depend"),
        (lambda x: F.threshold(x, 0.5, 2.0), "'threshold'.*it jumps"),
        (lambda x: F.hardshrink(x), "'hardshrink'.*it jumps"),
        (lambda x: x.float(), "'_to_copy'.*it casts to torch.float32"),
        (lambda x: F.dropout(x, training=True), "without randomness in evaluation mode"),
        (lambda x: F.rrelu(x, training=True), "'rrelu_with_noise'.*it is random"),
        (lambda x: x + torch.rand_like(x), "'rand_like'.*it is random"),
        (lambda x: x + torch.rand(8).to(x), "without randomness in evaluation mode"),
        (writes_its_constant, "'mul', that is written to later"),
        (writes_into_several, "_foreach_mul_.*it writes into an array that it is given"),
        (fills, "'fill'.*no bound is known"),
        (gives_out, "'mul'.*it writes into an array that it is given"),
        (branches, "'cond'|cond.*take this choice out"),
        (lambda x: F.celu(x, -1.0), "'celu'.*where alpha is negative"),
        (lambda x: x.std(1), "'std'.*no bound is known"),
        (lambda x: 2 * x - x.detach(), "'detach'.*derivative that gradients see is another one"),
        (torch.no_grad()(lambda x: x + 1), "'add'.*it runs without gradients"),
        (lambda x: x + torch.no_grad()(torch.sin)(x), "'sin'.*it runs without gradients"),
        (lambda x: x.float().double(), "'_to_copy'.*it casts to torch.float32"),
    ],
)
def test_operations_without_a_bound_are_named(
    function: Callable[[Tensor], Tensor], match: str
) -> None:
    with pytest.raises(ValueError, match=match):
        cs.lipschitz_bound(Function(function), torch.randn(1, 8) + 3)


def test_what_has_no_bound_does_not_matter_beside_the_output() -> None:
    model = Function(lambda x: (2 * x, x.exp(), x.argmax()))
    result = cs.lipschitz_bound(model, torch.randn(1, 4), select=lambda output: output[0])
    assert result.upper == pytest.approx(2)


@pytest.mark.parametrize(
    ("x", "options", "match"),
    [
        (torch.zeros(0, 2, 6, 6), {}, r"inputs \(b, \.\.\.\), got \(0, 2, 6, 6\)"),
        ("image", {}, r"inputs \(b, \.\.\.\), got str"),
        (torch.zeros(1, 2, 6, 6), {"expand": -1}, "expand to be an integer of at least 0, got -1"),
        (torch.zeros(1, 2, 6, 6), {"ascent": 1.5}, "ascent to be an integer .*got 1.5"),
        (torch.full((1, 2, 6, 6), math.nan), {}, "expected a finite input"),
        (torch.zeros(1, 2, 6, 6, dtype=torch.long), {}, "expected a floating input"),
    ],
)
def test_bad_arguments(x: object, options: dict[str, object], match: str) -> None:
    with pytest.raises(ValueError, match=match):
        cs.lipschitz_bound(conv(), x, **options)  # type: ignore[arg-type]


def test_nothing_of_the_model_changes() -> None:
    torch.manual_seed(0)
    model = nn.Sequential(
        nn.utils.spectral_norm(conv(2, 4)), trained(nn.BatchNorm2d(4)), nn.Dropout(0.5), nn.ReLU()
    ).train()
    x = torch.randn(2, 2, 6, 6)
    state, kept = copy.deepcopy(model.state_dict()), x.clone()
    random = torch.random.get_rng_state()
    first = cs.lipschitz_bound(model, x, ascent=1)
    second = cs.lipschitz_bound(model, x, ascent=1)
    assert (first.lower, first.upper) == (second.lower, second.upper)
    assert torch.equal(random, torch.random.get_rng_state())
    assert torch.equal(x, kept)
    assert all(module.training for module in model.modules())
    assert all(p.grad is None for p in model.parameters())
    assert all(torch.equal(value, state[key]) for key, value in model.state_dict().items())
    assert all(len(m._forward_hooks) == 0 for m in model.modules())


def test_other_arguments_are_held_fixed() -> None:
    class Scaled(nn.Module):
        def forward(self, x: Tensor, factor: Tensor) -> Tensor:
            return factor * x.tanh()

    result = cs.lipschitz_bound(Scaled(), (torch.zeros(1, 5), torch.tensor(3.0)))
    assert result.upper == pytest.approx(3)
    assert result.lower == pytest.approx(3, rel=2e-3)


@pytest.mark.filterwarnings("ignore:.torch.jit:DeprecationWarning")
def test_wrappers_and_inference_mode() -> None:
    torch.manual_seed(0)
    model, x = nn.Sequential(conv(), nn.ReLU(), conv()), torch.randn(1, 2, 6, 6)
    value = upper(model, x)
    assert upper(nn.DataParallel(model), x) == value
    assert upper(torch.compile(model), x) == value
    with torch.inference_mode():
        assert upper(model, x + 0) == value


def test_ascent_raises_the_lower_end() -> None:
    torch.manual_seed(0)
    model = nn.Sequential(
        nn.Linear(6, 30), nn.ReLU(), nn.Linear(30, 30), nn.ReLU(), nn.Linear(30, 4)
    )
    x = torch.randn(3, 6)
    still = cs.lipschitz_bound(model, x, ascent=0)
    climbed = cs.lipschitz_bound(model, x, ascent=30)
    assert still.lower == pytest.approx(float(dense_norms(model, x).amax()), rel=2e-3)
    assert 1.05 * still.lower < climbed.lower <= climbed.upper == still.upper


def scaled_apart(model: nn.Sequential) -> None:
    """Multiply channels before each ReLU by powers of ten, and divide by them after it."""
    layers = [module for module in model if isinstance(module, (nn.Linear, nn.Conv2d))]
    for first, second in itertools.pairwise(layers):
        factors = 10 ** torch.rand(len(first.weight))
        ones = (1,) * (first.weight.ndim - 2)
        first.weight.data *= factors.reshape(-1, 1, *ones)
        first.bias.data *= factors
        second.weight.data /= factors.reshape(1, -1, *ones)


@pytest.mark.parametrize(
    "make",
    [
        lambda: [nn.Linear(20, 20), nn.Tanh(), nn.Linear(20, 20), nn.ReLU(), nn.Linear(20, 5)],
        lambda: [conv(2, 8), nn.ReLU(), nn.MaxPool2d(2), conv(8, 8), nn.ReLU(), conv(8, 2)],
    ],
)
def test_scaled_channels_are_found(make: Callable[[], list[nn.Module]]) -> None:
    torch.manual_seed(0)
    model = nn.Sequential(*make())
    x = torch.randn(1, 20) if isinstance(model[0], nn.Linear) else torch.randn(1, 2, 6, 6)
    before = upper(model, x, expand=0)
    scaled_apart(model)
    result = cs.lipschitz_bound(model, x, expand=0, scaling=100, ascent=0)
    assert result.scaled
    assert result.plain > 3 * before
    assert result.upper < 1.1 * before
    if isinstance(model[1], nn.ReLU):
        check(model, 2 * torch.randn(50, *x.shape[1:]))


def test_channels_that_are_balanced_are_left() -> None:
    model = nn.Sequential(conv(2, 2), nn.ReLU(), conv(2, 2))
    for layer in (model[0], model[2]):
        nn.init.dirac_(layer.weight)  # type: ignore[arg-type]
    result = cs.lipschitz_bound(model, torch.randn(1, 2, 6, 6), ascent=0)
    assert not result.scaled
    assert result.upper == pytest.approx(1)


def test_an_input_at_a_kink() -> None:
    # The constant is 1; at 0 the gradients that PyTorch gives add up to 2.
    model = Function(lambda x: 2 * x - x.relu() + (-x).relu())
    result = cs.lipschitz_bound(model, torch.zeros(1, 6), ascent=0)
    assert float(dense_norms(model, torch.zeros(1, 6))) == pytest.approx(2)
    assert result.lower == pytest.approx(1, rel=2e-3)
    assert result.lower <= 1


def test_the_table_names_layers() -> None:
    torch.manual_seed(0)
    model = nn.Sequential(conv(2, 4), nn.BatchNorm2d(4), nn.ReLU(), Skip(conv(4, 4)), nn.ReLU())
    result = cs.lipschitz_bound(model, torch.randn(1, 2, 6, 6), ascent=0)
    assert [layer.name for layer in result.layers] == ["0, 1", "3.inner, 3"]
    assert math.prod(layer.factor for layer in result.layers) == pytest.approx(result.upper)
    lines = str(result).splitlines()
    assert lines[0].startswith("Lipschitz constant in [")
    assert [line.split("  ")[0] for line in lines[2:]] == ["0, 1", "3.inner, 3"]
