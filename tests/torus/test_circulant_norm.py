"""The norm of the circulant cut open along one axis, against dense matrices."""

from __future__ import annotations

import pytest
import torch
from helpers.strategies import Layer, random
from helpers.tori import CIRCULAR, embedded, restricted, torus_matrix
from hypothesis import given, settings
from torch import Tensor

from convspectra import ConvOperator
from convspectra.torus._circulant_gram import CirculantGram
from convspectra.torus._circulant_norm import LOWEST, circulant_norm_bound
from convspectra.torus._symbols import smallest_periods


def norm(matrix: Tensor) -> float:
    return float(torch.linalg.matrix_norm(matrix, 2))


def cut_norms(op: ConvOperator) -> list[float]:
    """Of the dense circulant that keeps, along one axis, only the layer's own points.

    Inputs for a layer with at least as many outputs, else outputs. With a stride the inputs are not
    cut.
    """
    g, torus = op.geometry, torus_matrix(op)
    wide = op.shape[0] < op.shape[1]
    norms = []
    for axis, period in enumerate(smallest_periods(g)):
        points = (g.output_size if wide else g.input_size)[axis]
        if points < period * (1 if wide else g.stride[axis]) and (wide or g.stride[axis] == 1):
            cut = {axis: points}
            rows, columns = (cut, {}) if wide else ({}, cut)
            norms.append(norm(restricted(op, torus, rows=rows, columns=columns)))
    return norms


def smooth(*size: int) -> ConvOperator:
    """Positive taps: the largest value is at the frequency 0, far above the others."""
    return ConvOperator(random(2, 2, *[3] * len(size)).abs(), size)


LAYERS = {
    "square": ConvOperator(random(2, 2, 3, 3), (6, 6)),
    "square, 4 x 5": ConvOperator(random(3, 3, 3, 3), (4, 5)),
    "square, 8 x 7": ConvOperator(random(3, 3, 3, 3, seed=1), (8, 7)),
    "square, 4 x 8": ConvOperator(random(2, 2, 3, 3, seed=2), (4, 8)),
    "one channel": ConvOperator(random(1, 1, 3, 3), (8, 8)),
    "5 x 3": ConvOperator(random(2, 2, 5, 3), (6, 7)),
    "3 x 5": ConvOperator(random(2, 2, 3, 5), (7, 6)),
    "even kernel": ConvOperator(random(2, 2, 4, 4), (6, 7)),
    "even and odd": ConvOperator(random(2, 3, 2, 3), (7, 5)),
    "one tap along an axis": ConvOperator(random(2, 2, 1, 3), (5, 8)),
    "asymmetric": ConvOperator(random(2, 2, 3, 3), (6, 5), padding=[(2, 0), (1, 1)]),
    "padded more": ConvOperator(random(2, 2, 3, 3), (5, 5), padding=2),
    "valid, wide": ConvOperator(random(2, 2, 3, 3), (7, 8), padding=0),
    "tall": ConvOperator(random(4, 2, 3, 3), (6, 5)),
    "wide": ConvOperator(random(2, 4, 3, 3), (6, 5)),
    "groups": ConvOperator(random(4, 2, 3, 3), (6, 5), groups=2),
    "depthwise": ConvOperator(random(3, 1, 3, 3), (7, 7), groups=3),
    "tall groups": ConvOperator(random(6, 2, 3, 3), (5, 5), groups=2),
    "wide groups": ConvOperator(random(2, 3, 3, 3), (5, 6), groups=2),
    "dilated": ConvOperator(random(2, 2, 3, 3), (7, 8), dilation=2),
    "wide, strided": ConvOperator(random(2, 2, 3, 3), (8, 8), stride=2, padding=1),
    "wide, strided, groups": ConvOperator(
        random(4, 2, 3, 3), (8, 6), stride=2, padding=1, groups=2
    ),
    "wide, stride 3": ConvOperator(random(3, 1, 5, 5), (15, 13), stride=3, padding=2),
    "tall, strided along one axis": ConvOperator(
        random(6, 2, 3, 3), (8, 7), stride=(1, 2), padding=1
    ),
    "smooth": smooth(8, 8),
    "smooth, 1 axis": smooth(8),
    "1 axis": ConvOperator(random(3, 3, 3), 8),
    "1 axis, long": ConvOperator(random(2, 2, 3), 50),
    "3 axes": ConvOperator(random(2, 2, 3, 3, 3), (4, 5, 4)),
}
each_layer = pytest.mark.parametrize("op", LAYERS.values(), ids=LAYERS.keys())


@each_layer
def test_it_is_the_cut_norm_or_less(op):
    """Bisection and the other torus: within 1% of the best cut, and above the layer's own norm."""
    cuts = cut_norms(op)
    assert cuts
    bound = circulant_norm_bound(op)
    assert isinstance(bound, float)
    assert norm(op.to_dense()) <= bound <= 1.01 * min(cuts)


@pytest.mark.parametrize("n", [20, 33])
@pytest.mark.parametrize("channels", [(2, 2), (3, 2), (2, 3)], ids=["square", "tall", "wide"])
def test_it_is_not_below_the_best_cut(channels, n):
    """Where the twisted torus is not looked at; the cut along either axis can be the better."""
    for size in ((n, 4), (4, n)):
        op = ConvOperator(random(*channels, 3, 3), size)
        cuts = cut_norms(op)
        assert len(cuts) == 2
        bound = circulant_norm_bound(op)
        assert min(cuts) * (1 - 1e-12) <= bound <= 1.01 * min(cuts)
        assert bound < 0.995 * norm(torus_matrix(op))


@pytest.mark.parametrize(("h", "g"), [(2, 2), (3, 2), (2, 3)], ids=["square", "tall", "wide"])
def test_bisection_is_finer_where_there_are_more_points(h, g):
    for seed in range(3):
        op = ConvOperator(random(h, g, 3, seed=seed).abs(), 40)
        (cut,) = cut_norms(op)
        bound = circulant_norm_bound(op)
        assert cut * (1 - 1e-12) <= bound <= cut * (1 + 1e-4)
        assert bound < norm(torus_matrix(op)) * (1 - 1e-3)


def test_a_cut_norm_far_below_the_circulant_s_is_not_looked_for():
    """A kernel of half the layer's size: the search ends LOWEST over the squared points below."""
    op = ConvOperator(random(2, 2, 5, 5), (8, 7))
    whole, shortest = norm(torus_matrix(op)), min(smallest_periods(op.geometry))
    end = whole * (1 - LOWEST / shortest**2) ** 0.5
    assert 1.01 * min(cut_norms(op)) < end
    bound = circulant_norm_bound(op)
    assert norm(op.to_dense()) <= bound <= end * (1 + 1e-10)


@pytest.mark.parametrize("layer", CIRCULAR.values(), ids=CIRCULAR.keys())
def test_of_a_circulant_it_is_the_norm(layer):
    true = norm(layer.dense().detach())
    bound = circulant_norm_bound(layer.operator())
    assert (1 - 1e-13) * true <= bound <= (1 + 1e-10) * true


def test_without_a_border_it_is_the_circulant_s_norm():
    """Inputs that fill the torus: no padding, or strided inputs with all phases of every point."""
    for op in (
        ConvOperator(random(3, 1, 3, 3), (17, 18), padding=0),
        ConvOperator(random(5, 1, 3), 40, stride=2, padding=1),
    ):
        assert cut_norms(op) == []
        whole = norm(torus_matrix(op))
        assert norm(op.to_dense()) <= circulant_norm_bound(op)
        assert circulant_norm_bound(op) == pytest.approx(whole, rel=1e-10)


def test_a_single_tap_cannot_be_cut():
    op = ConvOperator(random(2, 3, 1, 1), (4, 5))
    assert cut_norms(op) == []
    bound = circulant_norm_bound(op)
    assert bound == pytest.approx(norm(op.weight[..., 0, 0]), rel=1e-10)


def test_equal_columns_of_all_frequencies():
    """An orthogonal layer: many frequencies share the norm, and every column must be looked at."""
    weight = torch.zeros(3, 3, 3, 3, dtype=torch.float64)
    weight[..., 1, 1] = torch.linalg.qr(random(3, 3)).Q
    op = ConvOperator(weight, (6, 5))
    assert 1 - 1e-13 <= circulant_norm_bound(op) <= 1 + 1e-10
    weight[..., 0, 1] = 1e-9 * random(3, 3, seed=1)
    op = ConvOperator(weight, (6, 5))
    assert norm(op.to_dense()) - 1e-13 <= circulant_norm_bound(op) <= 1 + 1e-8


@pytest.mark.parametrize("group", range(3))
def test_the_largest_group_counts(group):
    weight = random(6, 2, 3, 3)
    weight[2 * group : 2 * group + 2] *= 3
    op = ConvOperator(weight, (6, 5), groups=3)
    alone = ConvOperator(weight[2 * group : 2 * group + 2], (6, 5))
    assert norm(op.to_dense()) <= circulant_norm_bound(op) <= 1.01 * min(cut_norms(alone))


@pytest.mark.parametrize("scale", [1e-8, 1e8])
def test_it_scales_with_the_weight(scale):
    op = LAYERS["groups"]
    scaled = circulant_norm_bound(op.with_weight(scale * op.weight))
    assert scaled == pytest.approx(scale * circulant_norm_bound(op), rel=1e-9)


@given(embedded())
@settings(max_examples=150)
def test_it_is_never_below_the_norm_nor_above_the_circulant_s(drawn):
    op, dense = drawn
    bound = circulant_norm_bound(op)
    true = norm(dense)
    assert bound >= (1 - 1e-13) * true
    assert bound <= float(CirculantGram(op).upper_bounds(1)) * (1 + 1e-12)


@given(embedded())
@settings(max_examples=100)
def test_smooth_layers_are_never_above_it(drawn):
    """Positive taps: the layers that lose most to the torus, and so the tightest cuts."""
    op, _ = drawn
    op = op.with_weight(op.weight.abs())
    assert circulant_norm_bound(op) >= (1 - 1e-13) * norm(op.to_dense())


def test_many_random_square_layers():
    """Small tori, with all kinds of gaps between the largest values."""
    for seed in range(60):
        n = 4 + seed % 4
        op = Layer(random(2, 2, 3, 3, seed=seed), (n, 3 + seed % 5)).operator()
        bound = circulant_norm_bound(op)
        assert norm(op.to_dense()) <= bound <= 1.01 * min(cut_norms(op))
