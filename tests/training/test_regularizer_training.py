"""SpectralRegularizer in training loops: compiled, mixed precision, accumulated, scheduled."""

from __future__ import annotations

import copy
import math

import pytest
import torch
from helpers.strategies import one_thread as one_thread
from torch import Tensor, nn
from torch.nn.utils import parametrize

import convspectra as cs
from convspectra import ConvOperator, Schedule, SpectralRegularizer
from convspectra.training import _exact_penalties as exact
from convspectra.training import _followed_values as tracked

NAMES = ("conditioning", "band", "frobenius", "stein")
each_penalty = pytest.mark.parametrize("name", NAMES)
# Without a value when all is well: these bounds make it act at both ends.
OPTIONS = {"band": {"lower": 0.95, "upper": 1.02, "k": 2}}
SIZE = (5, 6)


def near_delta(conv: nn.Module, scale: float = 0.1) -> None:
    """A kernel whose layer is close to the identity: simple values, all of the order of 1."""
    with torch.no_grad():
        conv.weight.mul_(scale)
        channels = range(min(conv.weight.shape[:2]))
        conv.weight[channels, channels, 1, 1] += 1


class Net(nn.Module):
    """Two layers of one kind, a shared layer at two input sizes, BatchNorm and a linear head."""

    def __init__(self) -> None:
        super().__init__()
        self.a = nn.Conv2d(2, 2, 3, padding=1)
        self.b = nn.Conv2d(2, 2, 3, padding=1)
        self.norm = nn.BatchNorm2d(2)
        self.shared = nn.Conv2d(2, 2, 3, padding=1)
        self.pool = nn.MaxPool2d(2)
        self.head = nn.Linear(2, 2)
        for conv in (self.a, self.b, self.shared):
            near_delta(conv)

    def forward(self, x: Tensor) -> Tensor:
        x = self.shared(self.norm(self.b(self.a(x).relu())))
        return self.head(self.shared(self.pool(x)).mean((2, 3)))


# (name, input size) in the order of the forward pass.
LAYERS = [("a", SIZE), ("b", SIZE), ("shared", SIZE), ("shared", (2, 3))]


def net(dtype: torch.dtype = torch.float64, seed: int = 0) -> Net:
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        return Net().to(dtype)


def batch(dtype: torch.dtype = torch.float64, count: int = 4) -> Tensor:
    generator = torch.Generator().manual_seed(1)
    return torch.randn(count, 2, *SIZE, generator=generator, dtype=torch.float64).to(dtype)


def regularizer(model: nn.Module, name: str, **options) -> SpectralRegularizer:
    dtype = next(model.parameters()).dtype
    options = {"weight": 0.3, "penalty_options": OPTIONS.get(name)} | options
    return SpectralRegularizer(model, batch(dtype), penalty=name, **options)


def naive(model: Net, name: str, layers: list = LAYERS) -> Tensor:
    """The weighted sum from dense singular values, differentiable."""
    total = torch.zeros((), dtype=torch.float64)
    for layer, size in layers:
        conv = getattr(model, layer)
        basis = torch.eye(2 * math.prod(size), dtype=conv.weight.dtype).reshape(-1, 2, *size)
        matrix = nn.functional.conv2d(basis, conv.weight, padding=1).flatten(1)
        sigma = torch.linalg.svdvals(matrix)
        if name == "band":
            below = (0.95 - sigma[-2:]).clamp_min(0).square().mean()
            above = (sigma[:2] - 1.02).clamp_min(0).square().mean()
            total = total + 0.5 * (below + above)
        elif name == "stein":
            total = total + (0.5 * sigma.square() - sigma.log() - 0.5).mean()
        else:
            frobenius = 0.5 * sigma.square().mean()
            total = total + frobenius - (sigma[-1] if name == "conditioning" else 0)
    return 0.3 * total


def gradients(model: nn.Module, loss: Tensor | None = None) -> list[Tensor]:
    """Of a loss by all parameters, or those already there; zeros where there is none."""
    if loss is not None:
        model.zero_grad()
        loss.backward()
    return [torch.zeros_like(p) if p.grad is None else p.grad.clone() for p in model.parameters()]


def same(got: list[Tensor], expected: list[Tensor]) -> bool:
    return all(torch.equal(one, other) for one, other in zip(got, expected, strict=True))


def close(got: list[Tensor], expected: list[Tensor], tol: float) -> bool:
    size = max(float(tensor.detach().abs().max()) for tensor in expected)
    assert size > 0
    return all(
        torch.allclose(one.double(), other.double(), rtol=tol, atol=tol * size)
        for one, other in zip(got, expected, strict=True)
    )


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


# --- gradient accumulation ------------------------------------------------------------------------


@each_penalty
@pytest.mark.parametrize("fused", [False, True])
def test_accumulated_gradients_are_those_of_one_call(name, fused):
    """Over several steps: the vectors must move on once a step, however many parts there are."""
    found = []
    for parts in (1, 4):
        model = net().eval()
        reg = regularizer(model, name, improve_interval=2, refresh_interval=3)
        optimizer = torch.optim.Adam(model.parameters(), lr=1e-3, fused=fused)
        for step in range(4):
            optimizer.zero_grad()
            for chunk in batch().chunk(parts):
                ((model(chunk).square().mean() + reg()) / parts).backward()
            assert reg.step_count == step
            optimizer.step()
        found.append((list(model.parameters()), reg.report()))
    (once, first), (often, second) = found
    assert close(often, once, 1e-9)
    assert second.step == first.step == 3
    assert second.penalty == pytest.approx(first.penalty, rel=1e-9)
    assert [layer.age for layer in second.layers] == [layer.age for layer in first.layers]


def test_fused_optimizers_change_no_version_and_are_counted_all_the_same():
    model = net()
    reg = regularizer(model, "frobenius")
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1, fused=True)
    before = float(reg().detach())
    for step in (1, 2, 3):
        reg().backward()
        optimizer.step()
        assert float(reg().detach()) < before
        reg()
        assert reg.step_count == step


def test_without_gradients_nothing_moves_on():
    model = net()
    reg = regularizer(model, "conditioning", improve_interval=1, refresh_interval=1)
    value = reg()
    with torch.no_grad():
        for _ in range(3):
            model.a.weight.mul_(1.1)
            reg()
    assert reg.step_count == 0
    assert {layer.age for layer in reg.report().layers} == {0}
    assert float(reg().detach()) != float(value.detach())
    assert reg.step_count == 1


class Double(nn.Module):
    def forward(self, x: Tensor) -> Tensor:
        return 2 * x

    def right_inverse(self, x: Tensor) -> Tensor:
        return x / 2


def parametrized() -> Net:
    model = net()
    parametrize.register_parametrization(model.b, "weight", Double())
    return model


def test_weights_from_a_parametrization_are_new_tensors_but_no_new_step():
    model = parametrized()
    reg = regularizer(model, "conditioning")
    kept = [reg() for _ in range(4)]
    assert reg.step_count == 0
    assert torch.equal(kept[0], kept[-1])
    with torch.no_grad():
        model.b.parametrizations.weight.original.mul_(1.01)
    reg()
    assert reg.step_count == 1


def test_weights_from_a_parametrization_get_twice_the_gradient():
    plain, model = net(), parametrized()
    expected = gradients(plain, regularizer(plain, "conditioning")())
    regularizer(model, "conditioning")().backward()
    got = model.b.parametrizations.weight.original.grad
    assert torch.allclose(got, 2 * plain.b.weight.grad, rtol=1e-9)
    assert torch.allclose(model.a.weight.grad, expected[0], rtol=1e-9)


def test_weights_from_a_parametrization_count_without_gradients_too():
    model = parametrized()
    reg = regularizer(model, "conditioning")
    value = float(reg().detach())
    with torch.no_grad():
        assert float(reg()) == pytest.approx(value, rel=1e-12)
        assert not any(layer.frozen for layer in reg.report().layers)


# --- frozen, shared, grouped ----------------------------------------------------------------------


@each_penalty
def test_frozen_layers_are_left_out_until_they_are_unfrozen(name):
    model = net()
    model.b.weight.requires_grad_(False)
    reg = regularizer(model, name)
    trained = [layer for layer in LAYERS if layer[0] != "b"]
    expected = naive(model, name, trained)
    got = reg()
    assert float(got.detach()) == pytest.approx(float(expected.detach()), rel=1e-7)
    with torch.no_grad():
        assert float(reg()) == pytest.approx(float(expected.detach()), rel=1e-7)
    got.backward()
    assert model.b.weight.grad is None
    assert model.a.weight.grad.any()
    report = reg.report()
    assert [layer.frozen for layer in report.layers] == [False, True, False, False]
    assert "frozen" in str(report)
    model.b.weight.requires_grad_()
    whole = naive(model, name)
    got = reg()
    assert float(got.detach()) == pytest.approx(float(whole.detach()), rel=1e-7)
    assert close(gradients(model, got), gradients(model, whole), 1e-3)
    assert not any(layer.frozen for layer in reg.report().layers)


def test_a_model_frozen_as_a_whole_costs_nothing_and_can_be_trained_with_all_the_same():
    model = net().requires_grad_(False)
    reg = regularizer(model, "conditioning")
    with pytest.warns(UserWarning, match="^all layers of the regularizer are frozen"):
        value = reg()
    assert float(value) == 0
    assert not value.requires_grad
    assert float(reg()) == 0  # Said once: a second warning would be an error here.


@each_penalty
def test_one_module_under_two_names_counts_once_and_one_weight_in_two_modules_twice(name):
    conv = net().a
    once = nn.Sequential(conv, nn.ReLU(), conv)
    reg = regularizer(once, name)
    assert [layer.name for layer in reg.layers] == ["0"]
    twin = copy.deepcopy(conv)
    twin.weight = conv.weight
    tied = regularizer(nn.Sequential(conv, nn.ReLU(), twin), name)
    assert [layer.name for layer in tied.layers] == ["0", "2"]
    assert float(tied().detach()) == pytest.approx(2 * float(reg().detach()), rel=1e-9)
    single = gradients(once, reg())
    assert close(gradients(once, tied()), [2 * gradient for gradient in single], 1e-9)


@each_penalty
def test_a_layer_at_several_sizes_counts_for_each(name):
    model = net()
    reg = regularizer(model, name, include="shared")
    expected = naive(model, name, LAYERS[2:])
    assert float(reg().detach()) == pytest.approx(float(expected.detach()), rel=1e-7)
    assert close(gradients(model, reg()), gradients(model, expected), 1e-3)
    assert float(expected.detach()) != float(naive(model, name, LAYERS[2:3]).detach())


def test_parameter_groups_move_at_their_own_rates():
    model = net()
    reg = regularizer(model, "conditioning")
    expected = gradients(model, reg())
    before = [parameter.detach().clone() for parameter in model.parameters()]
    rest = [p for name, p in model.named_parameters() if not name.startswith("a.")]
    groups = [{"params": list(model.a.parameters()), "lr": 0.1}, {"params": rest, "lr": 0.01}]
    optimizer = torch.optim.SGD(groups)
    gradients(model, reg())
    optimizer.step()
    for (name, parameter), old, gradient in zip(
        model.named_parameters(), before, expected, strict=True
    ):
        rate = 0.1 if name.startswith("a.") else 0.01
        assert torch.allclose(parameter, old - rate * gradient, rtol=1e-12)
    assert not torch.equal(model.a.weight, before[0])


@each_penalty
def test_channels_last_weights_give_the_same(name):
    plain, model = net(), net().to(memory_format=torch.channels_last)
    assert model.a.weight.stride() != plain.a.weight.stride()
    expected, reg = regularizer(plain, name), regularizer(model, name)
    for _ in range(3):
        one, other = reg(), expected()
        assert float(one.detach()) == pytest.approx(float(other.detach()), rel=1e-10)
        assert close(gradients(model, one), gradients(plain, other), 1e-7)
        for network in (plain, model):
            with torch.no_grad():
                for parameter in network.parameters():
                    parameter.sub_(0.01 * parameter.grad if parameter.grad is not None else 0)
    assert reg.step_count == 2
    reg.step(0.1)
    expected.step(0.1)
    assert close(list(model.parameters()), list(plain.parameters()), 1e-8)
    assert model.a.weight.is_contiguous(memory_format=torch.channels_last)


@pytest.mark.parametrize("device", ["cpu", "meta"])
def test_a_model_without_data_is_refused(device):
    with torch.device("meta"):
        model = Net.__new__(Net)
        nn.Module.__init__(model)
        model.a = nn.Conv2d(2, 2, 3, padding=1)
    model.forward = lambda x: model.a(x.to("meta"))
    with pytest.raises(ValueError, match=r"^layer 'a': expected a weight with data, got .* meta"):
        SpectralRegularizer(model, torch.zeros(1, 2, *SIZE, device=device))


# --- apart from the loss --------------------------------------------------------------------------


@each_penalty
def test_a_step_is_the_learning_rate_times_the_gradient(name):
    model = net()
    reg = regularizer(model, name)
    value = reg()
    expected = gradients(model, value)
    before = [parameter.detach().clone() for parameter in model.parameters()]
    model.zero_grad()
    reg.step(0.25)
    assert all(parameter.grad is None for parameter in model.parameters())
    after = [old - 0.25 * gradient for old, gradient in zip(before, expected, strict=True)]
    assert close(list(model.parameters()), after, 1e-12)
    assert not torch.equal(model.a.weight, before[0])


@each_penalty
def test_a_report_has_the_value_of_a_step(name):
    model = net()
    reg = regularizer(model, name)
    before = float(reg().detach())
    reg.step(0.25)
    found = reg.report(settle=False).penalty
    with torch.no_grad():
        after = float(regularizer(model, name)())
    assert found == pytest.approx(after if name == "frobenius" else before, rel=1e-12)
    assert abs(after - before) > 1e-6 * abs(before)


def test_a_step_that_needs_no_value_computes_none(monkeypatch):
    model = net()
    reg = regularizer(model, "frobenius", schedule=lambda step: 2.0 * (step == 0))
    reg.step(0.1)
    state = reg.state_dict()
    value = reg.report().penalty
    reg.step(0.1)  # without a weight, as the schedule says
    with torch.no_grad():
        assert value == pytest.approx(2 * float(regularizer(model, "frobenius")()), rel=1e-12)
    assert reg.report().penalty == value
    resumed = regularizer(model, "frobenius", schedule=lambda step: 0.0)
    resumed.load_state_dict(state)
    assert resumed.report().penalty == value
    monkeypatch.setattr(tracked.Stack, "mean_square", lambda *_: pytest.fail("computed"))
    regularizer(model, "frobenius").step(0.1)


@pytest.mark.parametrize("name", ["sigma_min", "sigma_max"])
def test_a_report_settles_or_gives_what_the_penalty_reads(name):
    model = net()
    reg = regularizer(model, name)
    reg()
    for _ in range(12):
        reg.step(0.05)
    sign = 1 if name == "sigma_max" else -1
    with torch.no_grad():
        value = float(reg())
    read, settled = (
        [getattr(layer, name) for layer in reg.report(settle=settle).layers]
        for settle in (False, True)
    )
    assert value == pytest.approx(sign * reg.weight * sum(read), rel=1e-9)
    exact = [getattr(cs, name)(layer.operator()) for layer in reg.layers]
    assert settled == pytest.approx(exact, rel=2e-3)
    assert all(sign * new >= sign * old for new, old in zip(settled, read, strict=True))
    assert max(abs(one / s - 1) for one, s in zip(read, exact, strict=True)) > 1e-6
    assert [getattr(layer, name) for layer in reg.report(settle=False).layers] != settled


def test_a_step_leaves_the_moments_of_adam_as_they_were_without_it():
    moments, weights = [], []
    for decoupled in (False, True):
        model = net().eval()
        reg = regularizer(model, "conditioning")
        optimizer = torch.optim.Adam(model.parameters(), lr=1e-3)
        gradients(model, model(batch()).square().mean())
        optimizer.step()
        if decoupled:
            reg.step(1e-2)
        weights.append(model.a.weight.detach().clone())
        moments.append([
            value for p in model.parameters() for value in optimizer.state[p].values()
        ])  # fmt: skip
    assert same(moments[1], moments[0])
    assert moments[0][1].any()
    assert not torch.equal(*weights)


def test_the_step_counts_once_for_each_decoupled_step():
    model = net()
    reg = regularizer(model, "conditioning")
    optimizer = torch.optim.Adam(model.parameters(), lr=1e-3, fused=True)
    values = []
    for step in range(4):
        gradients(model, model(batch()).square().mean())
        optimizer.step()
        reg.step(0.05)
        values.append(reg.report(settle=False).penalty)
        assert reg.step_count == step
    assert values[-1] < values[0]


def test_a_step_without_parameters_to_move_moves_none():
    model = parametrized()
    reg = regularizer(model, "conditioning")
    before = model.a.weight.detach().clone()
    with pytest.raises(ValueError, match=r"got one that a parametrization computes; use the add"):
        reg.step(0.1)
    assert torch.equal(model.a.weight, before)


@pytest.mark.parametrize("rate", [-0.1, math.nan, "1"])
def test_a_step_refuses_rates_that_cannot_be(rate):
    with pytest.raises(ValueError, match="expected learning_rate to be"):
        regularizer(net(), "frobenius").step(rate)


@each_penalty
@pytest.mark.parametrize("scale", [1.0, 2.5, -0.5])
def test_an_added_gradient_is_that_of_the_scaled_penalty(name, scale):
    model = net().eval()
    reg = regularizer(model, name)
    loss = model(batch()).square().mean()
    expected = gradients(model, loss + scale * reg())
    gradients(model, model(batch()).square().mean())
    value = reg.add_gradient(scale)
    assert value == pytest.approx(float(reg().detach()), rel=1e-12), "without the scale"
    assert close(gradients(model), expected, 1e-12)


def test_an_added_gradient_needs_none_before_it_and_goes_through_parametrizations():
    model = parametrized()
    reg = regularizer(model, "conditioning")
    expected = gradients(model, reg())
    model.zero_grad()
    reg.add_gradient()
    assert same(gradients(model), expected)
    assert model.b.parametrizations.weight.original.grad.any()


# --- schedules, factors, choice of layers ---------------------------------------------------------


def moved(model: nn.Module, factor: float = 1.001) -> None:
    with torch.no_grad():
        for conv in (model.a, model.b, model.shared):
            conv.weight.mul_(factor)


def test_the_schedule_is_the_factor_of_every_step():
    model = net()
    schedule = Schedule(warmup=3, half_life=2, stop=7)
    reg = regularizer(model, "frobenius", schedule=schedule)
    factors = []
    for _ in range(8):
        reg()
        factors.append(float(reg().detach() / naive(model, "frobenius").detach()))
        moved(model)
    expected = [1 / 3, 2 / 3, 1, 1, 0.5**0.5, 0.5, 0.5**1.5, 0]
    assert factors == pytest.approx(expected, rel=1e-7)


@each_penalty
def test_nothing_is_computed_where_the_schedule_is_zero(name, monkeypatch):
    model = net()
    reg = regularizer(
        model, name, schedule=Schedule(stop=1), improve_interval=1, refresh_interval=1
    )
    first = float(reg().detach())
    assert first != 0
    moved(model)
    for module, attribute in (
        (tracked, "svds"),
        (tracked, "improved"),
        (tracked.Stack, "evaluate"),
        (tracked.Stack, "mean_square"),
        (exact, "block_diagonal"),
        (exact.ExactPenalties, "_value"),
    ):
        monkeypatch.setattr(module, attribute, lambda *_, **__: pytest.fail("computed"))
    value = reg()
    assert float(value.detach()) == 0
    assert all(not gradient.any() for gradient in gradients(model, value))
    weight = model.a.weight.detach().clone()
    reg.step(1.0)
    assert torch.equal(model.a.weight, weight)
    assert reg.step_count == 1


@each_penalty
def test_every_third_step_counts_three_times(name):
    model = net()
    often, now_and_then = (
        regularizer(model, name),
        regularizer(model, name, schedule=Schedule(every=3)),
    )
    for step in range(4):
        value = float(often().detach())
        expected = 0.0 if step % 3 else 3 * value
        assert float(now_and_then().detach()) == pytest.approx(expected, rel=1e-5)
        moved(model)
    assert now_and_then.step_count == 3


@pytest.mark.parametrize("every", [1, 3, 4, 20])
def test_every_layer_has_its_turn_whatever_the_schedule(every):
    """Turns come every two steps here; a layer is computed at the next step with a penalty."""
    model = net()
    reg = regularizer(model, "conditioning", schedule=Schedule(every=every), refresh_interval=8)
    assert len(reg.layers) == 4
    computed = [0] * 4
    for step in range(41):
        reg()
        if step % every == 0:
            for turn in range(1, step // 2 + 1):
                if 2 * turn > computed[turn % 4]:
                    computed[turn % 4] = step
        assert [layer.age for layer in reg.report().layers] == [step - at for at in computed]
        moved(model)


def test_a_computation_that_failed_is_tried_again_in_its_next_turn(monkeypatch):
    model = net()
    reg = regularizer(model, "conditioning", refresh_interval=4)
    reg()

    def fails(*args, **options):
        raise ArithmeticError("none")

    monkeypatch.setattr(tracked, "svds", fails)
    for _ in range(8):
        moved(model)
        reg()
        reg()
    assert [layer.failures for layer in reg.report().layers] == [2] * 4
    assert [layer.age for layer in reg.report().layers] == [8] * 4


def test_the_report_has_the_last_penalty_that_had_a_weight():
    model = net()
    reg = regularizer(model, "frobenius", schedule=Schedule(every=2))
    expected = float(reg().detach())
    moved(model)
    assert float(reg().detach()) == 0
    assert reg.report().penalty == pytest.approx(expected, rel=1e-6)


@pytest.mark.parametrize("entry", [(1, 0), (0, 1)])
def test_a_step_that_leaves_no_trace_but_the_entries_is_counted(entry):
    """As fused optimizers do, which do not change the version of a tensor."""
    model = net()
    reg = regularizer(model, "frobenius")
    reg()
    version = model.a.weight._version
    model.a.weight.detach().numpy()[entry] += 0.25
    assert model.a.weight._version == version
    reg()
    reg()
    assert reg.step_count == 1


def test_a_step_that_moves_biases_only_is_none():
    model = net()
    reg = regularizer(model, "frobenius")
    reg()
    with torch.no_grad():
        model.a.bias.add_(1.0)
    reg()
    assert reg.step_count == 0


def test_a_channel_is_seen_wherever_it_is():
    conv = nn.Conv2d(40, 40, 3, padding=1)
    reg = SpectralRegularizer(conv, torch.zeros(1, 40, *SIZE), penalty="frobenius")
    reg()
    for step, where in enumerate([(slice(None), 5), (35, slice(None))], start=1):
        conv.weight.detach().numpy()[where] += 0.25
        reg()
        assert reg.step_count == step


def test_the_schedule_is_asked_once_a_call():
    model = net()
    asked = []
    reg = regularizer(model, "frobenius", schedule=lambda step: asked.append(step) or 1.0)
    reg()
    reg.add_gradient()
    reg.step(0.1)
    assert asked == [0, 0, 0]


def test_a_schedule_of_the_users_starts_late():
    model = net()
    reg = regularizer(model, "conditioning", schedule=lambda step: float(step >= 2))
    for step in range(4):
        value = float(reg().detach())
        started = step >= 2
        assert (value != 0) == started
        assert all((layer.sigma_min is not None) == started for layer in reg.report().layers)
        moved(model)
    assert [layer.age for layer in reg.report().layers] == [1] * 4


@pytest.mark.parametrize("given", ["names", "function"])
def test_layers_have_weights_of_their_own(given):
    model = net()
    factors = {"a": 2.0, "shared": 0.5, "b": 0.0}
    weights = factors if given == "names" else lambda name, module: factors[name]
    reg = regularizer(model, "conditioning", layer_weights=weights)
    expected = 2 * naive(model, "conditioning", LAYERS[:1]) + 0.5 * naive(
        model, "conditioning", LAYERS[2:]
    )
    assert float(reg().detach()) == pytest.approx(float(expected.detach()), rel=1e-7)
    assert close(gradients(model, reg()), gradients(model, expected), 1e-3)


def test_layers_that_a_mapping_leaves_out_count_once():
    model = net()
    reg = regularizer(model, "frobenius", layer_weights={"a": 3.0})
    expected = naive(model, "frobenius") + 2 * naive(model, "frobenius", LAYERS[:1])
    assert float(reg().detach()) == pytest.approx(float(expected.detach()), rel=1e-7)


@pytest.mark.parametrize(
    ("given", "message"),
    [
        ({"c": 1.0}, r"expected layer_weights of the layers \['a', 'b', .* got some for \['c'\]"),
        ({"a": -1.0}, r"expected the weight of layer 'a' to be finite and at least 0, got -1\.0"),
        (lambda *_: None, r"expected the weight of layer 'a' to be a number, got None"),
    ],
)
def test_layer_weights_that_cannot_be_are_refused(given, message):
    with pytest.raises(ValueError, match=message):
        regularizer(net(), "frobenius", layer_weights=given)


@pytest.mark.parametrize(
    ("options", "names"),
    [
        ({"include": "a"}, ["a"]),
        ({"include": ["a", "sha*"]}, ["a", "shared", "shared"]),
        ({"include": "[ab]"}, ["a", "b"]),
        ({"include": "*", "exclude": "head"}, ["a", "b", "shared", "shared"]),
        ({"exclude": ["shared"]}, ["a", "b"]),
        ({"exclude": lambda name, module: name == "a"}, ["b", "shared", "shared"]),
        ({"include": ["a", "head"]}, ["a", "head"]),
    ],
)
def test_patterns_choose_the_layers(options, names):
    reg = regularizer(net(), "frobenius", **options)
    assert [layer.name for layer in reg.layers] == names


def test_patterns_that_leave_nothing_are_refused():
    with pytest.raises(ValueError, match=r"its convolutions are \['a', 'b', 'shared'\]"):
        regularizer(net(), "frobenius", include="a", exclude="a*")


# --- weights that are no longer finite ------------------------------------------------------------


@pytest.mark.parametrize("name", ["frobenius", "stein", "circular_stein", "orthogonality"])
def test_a_penalty_that_follows_nothing_reports_from_the_last_refresh(name):
    model = net()
    reg = regularizer(model, name)
    before = reg()
    assert {layer.sigma_max for layer in reg.report().layers} == {None}
    reg.refresh()
    expected = gradients(model, before)
    assert close(gradients(model, reg()), expected, 1e-12), "the penalty reads nothing of it"
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.mul_(1.01)
    reg()
    for layer, found in zip(reg.layers, reg.report().layers, strict=True):
        values = torch.linalg.svdvals(layer.operator().to_dense().detach().double())
        assert found.age == 1
        assert found.sigma_max == pytest.approx(float(values[0]), rel=1e-3)
        assert found.sigma_min == pytest.approx(float(values[-1]), rel=1e-2)
        assert found.sigma_max_lower <= float(values[0]) <= found.sigma_max_upper
        assert found.sigma_min_lower <= float(values[-1]) <= found.sigma_min_upper
    again = regularizer(copy.deepcopy(model), name)
    again.load_state_dict(reg.state_dict())
    assert again.report().layers == reg.report().layers


@each_penalty
@pytest.mark.parametrize("bad", [math.nan, math.inf])
def test_a_weight_that_is_no_longer_finite_is_named_with_the_step(name, bad):
    model = net()
    reg = regularizer(model, name)
    reg()
    moved(model)
    reg()
    with torch.no_grad():
        model.b.weight[1, 0, 2, 1] = bad
    message = r"^layer 'b': expected a finite weight, .* at step 2$"
    with pytest.raises(ValueError, match=message):
        reg()
    with pytest.raises(ValueError, match=message):
        reg.step(0.1)


@each_penalty
@pytest.mark.parametrize("bad", [math.nan, math.inf])
def test_a_weight_that_is_no_longer_finite_can_be_left_out(name, bad):
    model = net()
    reg = regularizer(model, name, nonfinite="skip")
    reg()
    healthy = model.b.weight.detach().clone()
    with torch.no_grad():
        model.b.weight[1, 0, 2, 1] = bad
    expected = naive(model, name, [layer for layer in LAYERS if layer[0] != "b"])
    value = reg()
    assert reg.step_count == 1
    assert float(value.detach()) == pytest.approx(float(expected.detach()), rel=1e-7)
    assert close(gradients(model, value), gradients(model, expected), 1e-3)
    report = reg.report()
    assert [layer.skipped for layer in report.layers] == [0, 1, 0, 0]
    assert report.layers[1].sigma_min is None
    assert report.aggregates()["skipped"] == 1
    assert "skipped 1 times" in " ".join(str(report).split())
    with torch.no_grad():
        reg()
    assert reg.report().layers[1].skipped == 1
    assert reg.step_count == 1, "NaN differs from itself, and is no step for all that"
    with torch.no_grad():
        model.b.weight.copy_(healthy)
    whole = naive(model, name)
    assert float(reg().detach()) == pytest.approx(float(whole.detach()), rel=1e-7)
    assert reg.report().layers[1].skipped == 1


def test_accumulation_with_a_layer_left_out_is_one_step():
    model = net()
    reg = regularizer(model, "conditioning", nonfinite="skip")
    reg()
    with torch.no_grad():
        model.b.weight.fill_(math.nan)
    for _ in range(3):
        reg()
    assert reg.step_count == 1


def test_an_exact_computation_of_a_weight_that_is_not_finite_names_the_layer_once():
    model = net()
    reg = regularizer(model, "conditioning", nonfinite="skip")
    with torch.no_grad():
        model.a.weight.fill_(math.nan)
    with pytest.raises(ValueError, match=r"^layer 'a': expected a finite weight"):
        reg.refresh()


# --- exact computations that fail -----------------------------------------------------------------


class Unconverged:
    """What a solver that gave up returns."""

    def __init__(self, result: object) -> None:
        self.result = result
        self.converged = False

    def __getattr__(self, name: str) -> object:
        return getattr(self.result, name)


@pytest.mark.parametrize("how", [None, ArithmeticError, torch.linalg.LinAlgError])
def test_an_exact_computation_that_fails_keeps_the_last_good_vectors(monkeypatch, how):
    model = net()
    reg = regularizer(model, "conditioning", refresh_interval=1, improve_interval=100)
    reg()
    before = reg.state_dict()["layers"]
    original = tracked.svds

    def failing(op: ConvOperator, *args: object, **options: object) -> object:
        if not torch.equal(op.weight, model.a.weight):
            return original(op, *args, **options)
        if how is not None:
            raise how("not today")
        return Unconverged(original(op.with_weight(op.weight + 1), *args, **options))

    monkeypatch.setattr(tracked, "svds", failing)
    moved(model, 1.01)
    value = reg()
    assert float(value.detach()) == pytest.approx(
        float(naive(model, "conditioning").detach()), rel=1e-3
    )
    value.backward()
    assert model.a.weight.grad.isfinite().all()
    first, second = reg.report().layers[:2]
    assert (first.failures, first.age) == (1, 1)
    assert (second.failures, second.age) == (0, 0)
    assert first.sigma_min_lower <= first.sigma_min <= first.sigma_min_upper
    state = reg.state_dict()["layers"]
    key = "a@5x6"
    for name in ("vectors", "weight"):
        assert torch.equal(state[key][name], before[key][name])
    assert "1 failures" in " ".join(str(reg.report()).split())
    monkeypatch.setattr(tracked, "svds", original)
    moved(model, 1.01)
    reg()
    assert reg.report().layers[0].age == 0
    assert reg.report().aggregates()["failures"] == reg.report().layers[0].failures


def test_a_first_exact_computation_without_any_result_is_an_error(monkeypatch):
    def failing(op: ConvOperator, *args: object, **options: object) -> object:
        raise ArithmeticError("not today")

    reg = regularizer(net(), "conditioning")
    monkeypatch.setattr(tracked, "svds", failing)
    with pytest.raises(ArithmeticError, match=r"^layer 'a': not today$"):
        reg()
