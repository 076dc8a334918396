"""Well-conditioned kernels before training, against the SVD of naive matrices at full size."""

from __future__ import annotations

import copy
import importlib
import math
import warnings

import numpy as np
import pytest
import torch
from helpers.strategies import Layer, layers, random
from helpers.strategies import one_thread as one_thread
from hypothesis import assume, given, settings
from torch import Tensor, nn

import convspectra as cs
from convspectra.testing import naive_dense

# The function of the same name hides the module.
module = importlib.import_module("convspectra.training._preconditioning")


def seeded(make, seed: int = 0) -> nn.Module:
    """A module as PyTorch initializes it, from this seed, without touching the global state."""
    with torch.random.fork_rng(devices=[]), warnings.catch_warnings():
        warnings.filterwarnings("ignore", message="Using padding='same' with even")
        torch.manual_seed(seed)
        return make()


def dense_values(layer: nn.Module, shape: tuple[int, ...]) -> np.ndarray:
    """All singular values by applying the layer to the identity, descending."""
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", message="Using padding='same' with even")
        matrix = naive_dense(copy.deepcopy(layer).double(), shape)
    return np.linalg.svd(matrix.detach().numpy(), compute_uv=False)


def everything(name: str, layer: nn.Module) -> bool:
    return not list(layer.children())


def state(model: nn.Module) -> dict[str, Tensor]:
    return {name: value.clone() for name, value in model.state_dict().items()}


# --- the condition number -------------------------------------------------------------------------

LAYERS = {
    "3 x 3": (lambda: nn.Conv2d(6, 6, 3, padding=1), (6, 10, 9)),
    "3 x 3, beyond the first grid": (lambda: nn.Conv2d(2, 2, 3, padding=1), (2, 18, 19)),
    "same": (lambda: nn.Conv2d(4, 4, (3, 5), padding="same"), (4, 9, 9)),
    "strided": (lambda: nn.Conv2d(3, 6, 4, stride=2, padding=1), (3, 12, 10)),
    "strided, more inputs": (lambda: nn.Conv2d(4, 8, 3, stride=2, padding=1), (4, 12, 11)),
    "patches": (lambda: nn.Conv2d(3, 12, 4, stride=4), (3, 16, 12)),
    "grouped": (lambda: nn.Conv2d(6, 6, 3, padding=1, groups=3), (6, 10, 10)),
    "depthwise": (lambda: nn.Conv2d(4, 4, 3, padding=1, groups=4), (4, 12, 12)),
    "dilated": (lambda: nn.Conv2d(4, 4, 3, padding=2, dilation=2), (4, 11, 11)),
    "1-D": (lambda: nn.Conv1d(5, 5, 5, padding=2), (5, 40)),
    "3-D": (lambda: nn.Conv3d(3, 3, 3, padding=1), (3, 5, 4, 5)),
    "transposed": (lambda: nn.ConvTranspose2d(4, 2, 4, stride=2, padding=1), (4, 5, 6)),
    "transposed, stride 1": (lambda: nn.ConvTranspose2d(4, 4, 3, padding=1), (4, 9, 9)),
    "wide": (lambda: nn.Conv2d(8, 3, 3, padding=1), (8, 9, 9)),
    "tall": (lambda: nn.Conv2d(3, 8, 3, padding=1), (3, 9, 9)),
    "circular": (lambda: nn.Conv2d(3, 6, 3, padding=1, padding_mode="circular"), (3, 9, 10)),
    "reflect": (lambda: nn.Conv2d(4, 4, 3, padding=1, padding_mode="reflect"), (4, 9, 10)),
    "even, wide": (lambda: nn.Conv2d(6, 3, 2, padding="same"), (6, 9, 9)),
    "even, strided": (lambda: nn.Conv2d(4, 8, 4, stride=2, padding=1), (4, 10, 10)),
    "1 x 1": (lambda: nn.Conv2d(5, 7, 1), (5, 6, 6)),
    "a kernel beyond its grid": (lambda: nn.Conv2d(2, 2, 7, padding=3), (2, 4, 4)),
    "linear": (lambda: nn.Linear(12, 7), (12,)),
    "linear, square": (lambda: nn.Linear(12, 12), (12,)),
}


@pytest.mark.parametrize("name", LAYERS)
def test_the_condition_number_asked_for_is_reached(name):
    make, shape = LAYERS[name]
    layer = seeded(make)
    before = dense_values(layer, shape)
    condition = 1.5
    (report,) = cs.precondition(
        layer, torch.zeros(1, *shape), condition=condition, gain=0.7, include=everything
    )
    after = dense_values(layer, shape)
    assert before[0] / before[-1] > condition, "there was something to do"
    assert after[0] / after[-1] <= condition * (1 + 1e-5)
    assert report.converged
    assert np.sqrt(np.mean(after**2)) == pytest.approx(0.7, rel=1e-6)
    # What it says of the layer, to the accuracy of `_ends`.
    assert report.name == ""
    assert report.input_size == shape[1:]
    assert report.sigma_max == pytest.approx((before[0], after[0]), rel=1e-3)
    assert report.sigma_min == pytest.approx((before[-1], after[-1]), rel=1e-3)
    assert report.condition == pytest.approx(
        (before[0] / before[-1], after[0] / after[-1]), rel=2e-3
    )
    assert 0 < report.iterations <= 100
    assert len(report.grid) == len(shape) - 1
    assert all(points <= n for points, n in zip(report.grid, shape[1:], strict=True))


@given(layers())
@settings(max_examples=40)
def test_any_layer_is_scaled_and_reported_truthfully_or_refused(layer: Layer):
    """Whether it converges or not: the report is that of the weight that the layer now has."""
    operator = layer.operator()
    padding = layer.options.get("padding", "same")
    assume(not (isinstance(padding, (tuple, list)) and isinstance(padding[0], (tuple, list))))
    assume(not (layer.options.get("transposed") and isinstance(padding, str)))
    model = layer.module()
    shape = operator.input_shape
    before = dense_values(model, shape)
    unchanged = state(model)
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", message="Using padding='same' with even")
        try:
            (report,) = cs.precondition(
                model, torch.zeros(1, *shape).double(), max_iter=10, include=everything
            )
        except ArithmeticError:
            assert before[-1] <= 1e-9 * before[0]
            assert all(torch.equal(unchanged[k], v) for k, v in state(model).items())
            return
    after = dense_values(model, shape)
    assert np.sqrt(np.mean(after**2)) == pytest.approx(1.0, rel=1e-6)
    assert report.sigma_max == pytest.approx((before[0], after[0]), rel=1e-3)
    if after[-1] > 1e-6 * after[0]:
        assert report.sigma_min[1] in (0.0, pytest.approx(after[-1], rel=1e-3))
        if report.sigma_min[1] and abs(after[0] / after[-1] / 2 - 1) > 2e-3:
            assert report.converged == (after[0] <= 2 * after[-1])
    else:
        assert not report.converged


@pytest.mark.parametrize("condition", [1.05, 1.3, 3.0, 20])
def test_gradients_for_a_condition_number(condition):
    """It stops where it is told to: below 1 / 0.9 as well."""
    make, shape = LAYERS["depthwise"]
    layer = seeded(make)
    (report,) = cs.precondition(layer, torch.zeros(1, *shape), condition=condition)
    values = dense_values(layer, shape)
    assert values[0] / values[-1] <= condition * (1 + 1e-5)
    most = {1.05: 60, 1.3: 40, 3.0: 25, 20: 25}[condition]
    assert report.iterations <= most


@pytest.mark.parametrize("gain", [1, 2**0.5, 1e-3])
def test_the_gain_is_the_root_mean_square(gain):
    make, shape = LAYERS["strided"]
    layer = seeded(make)
    cs.precondition(layer, torch.zeros(1, *shape), gain=gain)
    values = dense_values(layer, shape)
    assert np.sqrt(np.mean(values**2)) == pytest.approx(gain, rel=1e-6)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.float16, torch.bfloat16])
def test_any_floating_weight(dtype):
    """Computed in double precision and rounded once; a bfloat16 is good to 0.4%."""
    layer = seeded(lambda: nn.Conv2d(4, 4, 3, padding=1)).to(dtype)
    (report,) = cs.precondition(layer, torch.zeros(1, 4, 8, 8, dtype=dtype), condition=1.3)
    values = dense_values(layer, (4, 8, 8))
    eps = torch.finfo(dtype).eps
    assert layer.weight.dtype == dtype
    assert report.converged
    assert values[0] / values[-1] == pytest.approx(report.condition[1], rel=1e-5 + 4 * eps)
    assert np.sqrt(np.mean(values**2)) == pytest.approx(1.0, rel=1e-6 + eps)


def test_the_scale_of_the_initialization_does_not_matter():
    make, shape = LAYERS["1-D"]
    small, large = seeded(make), seeded(make)
    with torch.no_grad():
        small.weight.mul_(2.0**-40)
        large.weight.mul_(2.0**40)
    for layer in (small, large):
        cs.precondition(layer, torch.zeros(1, *shape))
    torch.testing.assert_close(small.weight, large.weight, rtol=1e-6, atol=1e-7)


# --- grids ----------------------------------------------------------------------------------------


def test_a_small_grid_is_enough_for_a_large_layer():
    layer = seeded(lambda: nn.Conv2d(2, 2, 3, padding=1))
    (report,) = cs.precondition(layer, torch.zeros(1, 2, 20, 20))
    assert report.grid == (module.FIRST_SIZE,) * 2
    values = dense_values(layer, (2, 20, 20))
    assert values[0] <= 2 * values[-1]


def test_the_grid_grows_where_a_small_one_is_not_enough(monkeypatch):
    """A descent that does nothing is called on all grids up to the layer's own size."""
    grids = []

    def nothing(op, condition, max_iter):
        grids.append((op.geometry.input_size, max_iter))
        return op.weight, 3

    monkeypatch.setattr(module, "_by_stein", nothing)
    layer = seeded(lambda: nn.Conv1d(2, 2, 3, padding=1))
    (report,) = cs.precondition(layer, torch.zeros(1, 2, 40))
    assert grids == [((8,), 300), ((16,), 297), ((32,), 294), ((40,), 291)]
    assert (report.grid, report.iterations, report.converged) == ((40,), 12, False)
    grids.clear()
    (report,) = cs.precondition(layer, torch.zeros(1, 2, 40), max_iter=5)
    assert grids == [((8,), 5), ((16,), 2)]
    assert (report.grid, report.iterations) == ((16,), 6)


@pytest.mark.parametrize(
    ("make", "shape", "first"),
    [
        (lambda: nn.Conv2d(2, 4, 3, stride=3, padding=1), (2, 30, 20), (24, 20)),
        (lambda: nn.Conv1d(1, 1, 31), (1, 40), (31,)),
        (lambda: nn.Conv2d(1, 2, 9), (1, 20, 20), (9, 9)),
        (lambda: nn.Conv1d(1, 1, 3, padding=10, padding_mode="reflect"), (1, 20), (11,)),
        (lambda: nn.Conv1d(1, 1, 3, padding=10, padding_mode="circular"), (1, 20), (11,)),
        (lambda: nn.Conv2d(600, 600, 3, padding=1, stride=1), (600, 5, 5), (3, 3)),
        (lambda: nn.Linear(3, 4), (3,), ()),
    ],
)
def test_first_grids(monkeypatch, make, shape, first):
    """Some points of the output, and never too few for the kernel and its padding."""
    seen = []

    def nothing(op, condition, max_iter):
        seen.append(op)
        return op.weight, 1

    monkeypatch.setattr(module, "_by_stein", nothing)
    monkeypatch.setattr(module, "_ends", lambda op: (0.0, 1.0))
    cs.precondition(seeded(make), torch.zeros(1, *shape), include=everything)
    sizes = [op.input_shape[1:] for op in seen]
    assert sizes[0] == first
    assert sizes[-1] == shape[1:]
    assert sizes == sorted(set(sizes))


# --- what is left alone ---------------------------------------------------------------------------


class Network(nn.Module):
    """Two convolutions that share a weight, others, normalization, dropout and a head."""

    def __init__(self) -> None:
        super().__init__()
        self.stem = nn.Conv2d(3, 4, 3, padding=1)
        self.norm = nn.BatchNorm2d(4)
        self.first = nn.Conv2d(4, 4, 3, padding=1)
        self.second = nn.Conv2d(4, 4, 3, padding=1)
        self.second.weight = self.first.weight
        self.drop = nn.Dropout(0.5)
        self.down = nn.Conv2d(4, 8, 4, stride=2, padding=1)
        self.head = nn.Linear(8, 2)

    def forward(self, x: Tensor) -> Tensor:
        x = self.norm(self.stem(x))
        x = self.drop(self.second(self.first(x)))
        return self.head(self.down(x).mean((2, 3)))


X = torch.zeros(2, 3, 8, 8)


def test_only_the_chosen_weights_change():
    model = seeded(Network).train()
    model.norm.eval()
    model.down.weight.requires_grad_(False)
    before, modes = state(model), [part.training for part in model.modules()]
    parameters = dict(model.named_parameters(remove_duplicate=False))
    rng, rng_numpy = torch.get_rng_state(), np.random.get_state()[1].copy()  # noqa: NPY002
    reports = cs.precondition(model, X, exclude="stem")
    assert [report.name for report in reports] == ["first", "down"]
    changed = {name for name, value in state(model).items() if not torch.equal(value, before[name])}
    assert changed == {"first.weight", "second.weight", "down.weight"}
    after = dict(model.named_parameters(remove_duplicate=False))
    assert all(after[name] is parameter for name, parameter in parameters.items())
    assert model.first.weight is model.second.weight
    assert [part.training for part in model.modules()] == modes
    assert [p.requires_grad for p in (model.first.weight, model.down.weight)] == [True, False]
    assert all(parameter.grad is None for parameter in model.parameters())
    assert torch.equal(torch.get_rng_state(), rng)
    assert np.array_equal(np.random.get_state()[1], rng_numpy)  # noqa: NPY002
    assert not any(part._forward_pre_hooks for part in model.modules())


def test_linear_layers_are_left_out_unless_asked_for():
    names = [report.name for report in cs.precondition(seeded(Network), X)]
    assert names == ["stem", "first", "down"]
    names = [report.name for report in cs.precondition(seeded(Network), X, include=["head", "st*"])]
    assert names == ["stem", "head"]


def test_a_layer_at_two_sizes_is_treated_once_at_the_first():
    class Twice(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.conv = nn.Conv2d(2, 2, 3, padding=1)

        def forward(self, x: Tensor) -> Tensor:
            return self.conv(self.conv(x)[:, :, ::2, ::2])

    (report,) = cs.precondition(seeded(Twice), torch.zeros(1, 2, 10, 10))
    assert report.input_size == (10, 10)


def test_wrapped_models_have_plain_names():
    model = seeded(Network)
    reports = cs.precondition(nn.DataParallel(model), X)
    assert [report.name for report in reports] == ["stem", "first", "down"]
    assert reports == cs.precondition(seeded(Network), X)


def test_several_inputs_are_given_as_a_tuple():
    class Sum(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.conv = nn.Conv1d(2, 2, 3, padding=1)

        def forward(self, x: Tensor, y: Tensor) -> Tensor:
            return self.conv(x + y)

    (report,) = cs.precondition(seeded(Sum), (torch.zeros(1, 2, 9), torch.zeros(1, 2, 9)))
    assert report.converged


def test_gradients_may_be_off():
    layer = seeded(lambda: nn.Conv1d(2, 2, 3, padding=1))
    with torch.no_grad():
        (report,) = cs.precondition(layer, torch.zeros(1, 2, 9))
    assert report.converged


def test_the_callback_sees_each_layer_in_turn_with_its_new_weight():
    model, seen = seeded(Network), []

    def callback(report: cs.PreconditionedLayer) -> None:
        layer = model.get_submodule(report.name)
        values = dense_values(layer, (layer.in_channels, *report.input_size))
        assert report.sigma_max[1] == pytest.approx(values[0], rel=1e-3)
        seen.append(report)

    assert cs.precondition(model, X, callback=callback) == tuple(seen)
    assert len(seen) == 3


def test_what_goes_wrong_in_a_callback_is_left_as_it_is():
    def callback(report: cs.PreconditionedLayer) -> None:
        raise ValueError("of the callback's own")

    with pytest.raises(ValueError, match=r"^of the callback's own$"):
        cs.precondition(seeded(Network), X, callback=callback)


def test_it_is_the_same_every_time():
    models = [seeded(Network), seeded(Network)]
    reports = [cs.precondition(model, X) for model in models]
    assert reports[0] == reports[1]
    for one, other in zip(models[0].parameters(), models[1].parameters(), strict=True):
        assert torch.equal(one, other)


def test_a_layer_that_is_well_conditioned_is_only_scaled():
    layer = seeded(lambda: nn.Conv1d(3, 3, 3, padding=1))
    with torch.no_grad():
        nn.init.dirac_(layer.weight).mul_(3.0)
    (report,) = cs.precondition(layer, torch.zeros(1, 3, 9), gain=2.0)
    expected = torch.zeros(3, 3, 3)
    expected[:, :, 1] = 2 * torch.eye(3)
    torch.testing.assert_close(layer.weight.detach(), expected)
    assert report.sigma_min == pytest.approx((3.0, 2.0))
    assert report.sigma_max == pytest.approx((3.0, 2.0))


# --- where it ends --------------------------------------------------------------------------------


def stein(layer: nn.Module, shape: tuple[int, ...]) -> float:
    """The mean of s^2 - 1 - log s^2, by the SVD, at the best scale."""
    squares = dense_values(layer, shape) ** 2
    squares = squares / squares.mean()
    return float((squares - 1 - np.log(squares)).mean())


def test_too_few_gradients_are_said_and_what_was_won_is_kept():
    layer = seeded(lambda: nn.Conv2d(4, 4, 3, padding=1))
    losses = [stein(layer, (4, 8, 8))]
    for max_iter in (1, 4, 7, 10):
        layer = seeded(lambda: nn.Conv2d(4, 4, 3, padding=1))
        (report,) = cs.precondition(
            layer, torch.zeros(1, 4, 8, 8), condition=1.001, max_iter=max_iter
        )
        assert not report.converged
        assert report.condition[1] > 1.001
        assert max_iter <= report.iterations <= max_iter + 20, "a line search is finished"
        losses.append(stein(layer, (4, 8, 8)))
    assert losses == sorted(losses, reverse=True)
    assert losses[-1] < 0.5 * losses[0]


def test_the_best_kernel_is_kept_where_a_descent_from_elsewhere_is_cut_short():
    """An off-center kernel that is orthogonal on two points: Note [Shifted channels] leaves it."""
    ends, moved = [], []
    original = module._towards_the_center

    def towards_the_center(weight, op):
        moved.append(weight)
        return original(weight, op)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(module, "_towards_the_center", towards_the_center)
        for max_iter in range(6, 20):
            layer = nn.Conv1d(1, 1, 3, padding=1).double()
            with torch.no_grad():
                layer.weight.copy_(torch.tensor([[[1.0, 0.3, 1.2]]]))
            cs.precondition(
                layer, torch.zeros(1, 1, 2).double(), condition=1 + 1e-14, max_iter=max_iter
            )
            ends.append(stein(layer, (1, 2)))
    assert moved
    assert max(ends[3:]) <= 1e-10


def without_the_fallback(weight: Tensor, op: cs.ConvOperator) -> Tensor:
    return weight


@pytest.mark.parametrize(
    ("make", "shape", "seed"),
    [
        (lambda: nn.Conv2d(16, 16, 3, padding=1), (16, 8, 8), 1),
        (lambda: nn.Conv2d(4, 4, 3, padding=1), (4, 8, 8), 2),
        (lambda: nn.Conv1d(3, 3, 3, padding=1), (3, 8), 1),
    ],
)
def test_shifted_channels_need_the_fallback(monkeypatch, make, shape, seed):
    layer = seeded(make, seed)
    (report,) = cs.precondition(layer, torch.zeros(1, *shape))
    values = dense_values(layer, shape)
    assert report.converged
    assert values[0] <= 2 * values[-1]
    monkeypatch.setattr(module, "_towards_the_center", without_the_fallback)
    layer = seeded(make, seed)
    (stuck,) = cs.precondition(layer, torch.zeros(1, *shape), max_iter=40)
    values = dense_values(layer, shape)
    assert not stuck.converged
    assert values[0] > 3 * values[-1]


@pytest.mark.parametrize(
    ("make", "shape"),
    [
        (lambda: nn.Conv2d(4, 4, 3, padding=1), (4, 8, 8)),
        (lambda: nn.Conv1d(3, 3, 5, padding=2), (3, 12)),
        (lambda: nn.Conv2d(4, 4, 3, padding=2, dilation=2, groups=2), (4, 9, 9)),
        (lambda: nn.ConvTranspose1d(3, 3, 3, padding=1), (3, 10)),
    ],
)
def test_delta_kernels(make, shape):
    """Near condition 1 the energy is in the center, whose taps are an orthogonal matrix a group."""
    layer = seeded(make)
    (report,) = cs.precondition(layer, torch.zeros(1, *shape), condition=1.01)
    assert report.converged
    assert report.iterations < 150
    values = dense_values(layer, shape)
    assert values[0] <= 1.01 * values[-1] * (1 + 1e-6)
    taps = layer.weight.detach().flatten(2)
    energy = taps.square().sum((0, 1))
    center = taps.shape[2] // 2
    assert energy[center] >= 0.99 * energy.sum()
    middle = taps[:, :, center].unflatten(0, (layer.groups, -1)).numpy()
    np.testing.assert_allclose(np.linalg.svd(middle)[1], 1.0, atol=0.01)


def test_delta_kernels_are_not_the_only_ones_on_a_grid_below_the_kernel():
    """On k - 1 points a rotation has three taps; on k points the same kernel is not orthogonal."""
    layer = nn.Conv1d(1, 1, 3, padding=1).double()
    with torch.no_grad():
        layer.weight.copy_(torch.tensor([[[0.8, 0.6, -0.8]]]))
    np.testing.assert_allclose(dense_values(layer, (1, 2)), 1.0)
    assert dense_values(layer, (1, 3))[0] > 1.1
    with torch.no_grad():
        layer.weight[0, 0, 0] = 0.9
    (report,) = cs.precondition(layer, torch.zeros(1, 1, 2).double(), condition=1.01)
    assert report.converged
    energy = layer.weight.detach().square().flatten()
    assert energy[1] < 0.5 * energy[0]


@pytest.mark.parametrize(
    ("kernel", "size"),
    [((3,), (3,)), ((5,), (5,)), ((4,), (4,)), ((5,), (9,)), ((3, 3), (3, 4)), ((3, 5), (4, 5))],
)
@pytest.mark.parametrize("channels", [(2, 2), (3, 1)])
def test_neighbouring_rows_differ_by_the_taps_that_leave_the_image(kernel, size, channels):
    """The proof of Note [Delta kernels]: rows of equal norms leave no energy beside the center."""
    weight = random(*channels, *kernel)
    matrix = Layer(weight, size, {"padding": [((k - 1) // 2, k // 2) for k in kernel]}).dense()
    norms = matrix.square().sum(1).reshape(channels[0], *size)
    energy = weight.square().sum(1)
    for axis, k in enumerate(kernel, start=1):
        line, taps = norms.movedim(axis, 1), energy.movedim(axis, 1)
        if len(kernel) == 2:
            # Where all taps of the other axis are inside.
            line, taps = line[:, :, (kernel[2 - axis] - 1) // 2], taps.sum(2)
        steps = line.diff(dim=1).abs().sum(1)
        torch.testing.assert_close(steps, taps.sum(1) - taps[:, (k - 1) // 2])


# --- Algorithm 3.3 --------------------------------------------------------------------------------


def test_algorithm_3_3():
    layer = seeded(lambda: nn.Conv2d(2, 2, 3, padding=1))
    before = dense_values(layer, (2, 4, 4))
    (report,) = cs.precondition(
        layer, torch.zeros(1, 2, 4, 4), algorithm="3.3", max_iter=100, condition=3.0
    )
    after = dense_values(layer, (2, 4, 4))
    assert before[0] > 10 * before[-1]
    assert report.converged
    assert after[0] <= 3.0 * after[-1]
    assert 0 < report.iterations <= 100
    assert np.sqrt(np.mean(after**2)) == pytest.approx(1.0, rel=1e-6)


@pytest.mark.parametrize(
    "options",
    [
        {"stride": 2, "padding": 1},
        {"padding": 0},
        {"padding": 1, "groups": 2},
        {"padding": 1, "padding_mode": "circular"},
        {"padding": 2, "dilation": 2, "padding_mode": "reflect"},
    ],
)
def test_layers_that_algorithm_3_3_is_not_for_are_named(options):
    model = nn.Sequential(nn.Identity(), nn.Conv2d(2, 2, 3, **options))
    before = state(model)
    with pytest.raises(ValueError, match=r"layer '1': expected stride 1, .* use algorithm='stein'"):
        cs.precondition(model, torch.zeros(1, 2, 6, 6), algorithm="3.3")
    assert all(torch.equal(before[name], value) for name, value in state(model).items())


def test_transposed_layers_are_refused_by_algorithm_3_3():
    model = nn.Sequential(nn.ConvTranspose2d(2, 2, 3, padding=1))
    with pytest.raises(ValueError, match="layer '0': expected stride 1"):
        cs.precondition(model, torch.zeros(1, 2, 6, 6), algorithm="3.3")


# --- what is refused ------------------------------------------------------------------------------


@pytest.mark.parametrize("kind", ["zero", "repeated channel", "even"])
def test_layers_of_deficient_rank_are_named(kind):
    layer = seeded(lambda: nn.Conv2d(4, 4, 2 if kind == "even" else 3, padding="same"))
    with torch.no_grad():
        if kind == "zero":
            layer.weight.zero_()
        elif kind == "repeated channel":
            layer.weight[1] = layer.weight[0]
    model = nn.Sequential(nn.Identity(), layer)
    before = state(model)
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", message="Using padding='same' with even")
        with pytest.raises(ArithmeticError, match=r"layer '1'.*(rank deficient|zero)"):
            cs.precondition(model, torch.zeros(1, 4, 12, 12))
    assert all(torch.equal(before[name], value) for name, value in state(model).items())


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"algorithm": "3.2"}, "expected algorithm .*got '3.2'"),
        ({"algorithm": None}, "expected algorithm .*got None"),
        ({"condition": 1.0}, "expected condition to be finite and above 1, got 1.0"),
        ({"condition": 0.5}, "expected condition to be finite and above 1, got 0.5"),
        ({"condition": math.inf}, "expected condition to be finite and above 1, got inf"),
        ({"condition": math.nan}, "expected condition to be finite and above 1, got nan"),
        ({"condition": "2"}, "expected condition to be a number, got '2'"),
        ({"condition": True}, "expected condition to be a number, got True"),
        ({"gain": 0}, "expected gain to be finite and above 0, got 0"),
        ({"gain": -1.0}, "expected gain to be finite and above 0, got -1.0"),
        ({"gain": None}, "expected gain to be a number, got None"),
        ({"max_iter": 0}, "expected max_iter to be a positive integer, got 0"),
        ({"max_iter": 10.0}, "expected max_iter to be a positive integer, got 10.0"),
        ({"max_iter": True}, "expected max_iter to be a positive integer, got True"),
        ({"include": "nothing"}, "expected layers to include in Network, got none"),
        ({"include": 3}, "'int' object is not iterable|expected a selection"),
    ],
)
def test_bad_options(options, message):
    model = seeded(Network)
    before = state(model)
    with pytest.raises((ValueError, TypeError), match=message):
        cs.precondition(model, X, **options)
    assert all(torch.equal(before[name], value) for name, value in state(model).items())


def test_condition_is_infinite_where_the_smallest_value_is_lost():
    report = cs.PreconditionedLayer("a", (3,), (0.0, 0.5), (2.0, 1.0), 1, (3,), True)
    assert report.condition == (math.inf, 2.0)
