"""The descents of `precondition`: their grids, where they end, and Algorithm 3.3."""

from __future__ import annotations

import importlib

import numpy as np
import pytest
import torch
from helpers.preconditioned import dense_values, everything, state
from helpers.strategies import Layer, random
from helpers.training import seeded
from torch import Tensor, nn

import convspectra as cs

# The function of the same name hides the module.
module = importlib.import_module("convspectra.training._preconditioning")


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

    # Which grids are asked for is seen without their descents.
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

    # Only the grids are looked at, not what a descent makes of them.
    monkeypatch.setattr(module, "_by_stein", nothing)
    monkeypatch.setattr(module, "_ends", lambda op: (0.0, 1.0))
    cs.precondition(seeded(make), torch.zeros(1, *shape), include=everything)
    sizes = [op.input_shape[1:] for op in seen]
    assert sizes[0] == first
    assert sizes[-1] == shape[1:]
    assert sizes == sorted(set(sizes))


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
    # Without the fallback the same layer is stuck: it is what helps.
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
