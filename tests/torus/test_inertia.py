"""Counts by inertia on one torus, against dense SVDs and against the formula in dense matrices."""

from __future__ import annotations

import math

import pytest
import torch
from helpers.strategies import Layer, direct, layers, one_thread, random  # noqa: F401
from hypothesis import assume, given
from hypothesis import strategies as st

from convspectra import ConvOperator
from convspectra.torus import InertiaTorus, inertia_cost


def test_the_formula_in_dense_matrices() -> None:
    """positive(K) = positive(A) - positive(W) with a circulant written out."""
    kernel, period, points = random(3, 2, 3), 9, range(8)
    circulant = torch.zeros(period, 3, period, 2, dtype=torch.float64)
    for row in range(period):
        for tap in range(3):
            circulant[row, :, (row + tap - 1) % period] += kernel[:, :, tap]
    matrix = circulant[: len(points), :, : len(points)].reshape(24, 16)
    whole = circulant.reshape(27, 18)
    s = 1.3
    a = torch.cat(
        [
            torch.cat([-s * torch.eye(27, dtype=torch.float64), whole], 1),
            torch.cat([whole.T, -s * torch.eye(18, dtype=torch.float64)], 1),
        ]
    )
    border = [*range(24, 27), *range(27 + 16, 45)]
    w = torch.linalg.inv(a)[border][:, border]
    above = int((torch.linalg.svdvals(whole) > s).sum())
    in_border = int((torch.linalg.eigvalsh(w) > 0).sum())
    assert in_border > 0
    expected = int((torch.linalg.svdvals(matrix) > s).sum())
    assert above - in_border == expected
    op = ConvOperator(kernel, 8)
    assert InertiaTorus(op).count(s).above == expected


@given(
    layer=layers(kinds=("conv", "transposed")),
    extra=st.integers(0, 2),
    phase=st.sampled_from([0.0, 0.5]),
    data=st.data(),
)
def test_counts_at_the_middle_between_neighbors(
    layer: Layer, extra: int, phase: float, data: st.DataObject
) -> None:
    op, dense = direct(layer)
    g = op.geometry
    assume(g.padding_mode == "zeros" and set(g.dilation) == {1})
    assume(all(s <= n for s, n in zip(g.stride, g.input_size, strict=True)))
    values = torch.linalg.svdvals(dense)
    place = data.draw(st.integers(0, len(values) - 1))
    below = float(values[place + 1]) if place + 1 < len(values) else 0.0
    s = (float(values[place]) + below) / 2
    assume(s > 1e-6 * float(values[0]))
    above, rounding = InertiaTorus(op, extra, phase).count(s)
    if rounding < float(values[place]) - s:
        assert above == place + 1


@pytest.mark.parametrize("options", [{}, {"stride": 2, "padding": 1}, {"padding": 0}])
def test_several_groups_at_once_and_one_by_one(options: dict[str, int]) -> None:
    op = ConvOperator(random(6, 2, 3, 3), (6, 7), groups=3, **options)
    values = torch.linalg.svdvals(op.to_dense())
    middle = float(values[10:12].mean())
    assert InertiaTorus(op).count(middle).above == 11


def test_a_number_at_a_symbol_value_is_said_to_be_open() -> None:
    op = ConvOperator(random(1, 1, 3), 10)
    torus = InertiaTorus(op)
    assert torus.count(torus.norm).rounding == math.inf
    assert torus.rounding(torus.norm) == math.inf


def test_the_cost_grows_as_it_should() -> None:
    small, large = (inertia_cost(ConvOperator(random(16, 16, 3, 3), (n, n))) for n in (32, 64))
    assert 6 < large.count_flops / small.count_flops < 9
    assert 3 < large.bytes / small.bytes < 4.5
