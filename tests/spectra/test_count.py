"""Counts of singular values, against dense SVDs."""

from __future__ import annotations

import itertools
import math

import pytest
import torch
from helpers.strategies import Layer, direct, layers, one_thread, random  # noqa: F401
from hypothesis import assume, given
from hypothesis import strategies as st

import convspectra as cs
from convspectra import ConvOperator
from convspectra.operator import normalized
from convspectra.spectra._count import ByInertia
from convspectra.spectra._parts import parts


def singular_values(layer: Layer) -> torch.Tensor:
    """Ascending, from the naive matrix."""
    return torch.linalg.svdvals(layer.dense().detach()).flip(0)


@given(layer=layers(), data=st.data())
def test_the_count_is_that_of_the_dense_svd(layer: Layer, data: st.DataObject) -> None:
    values = singular_values(layer)
    op = layer.operator()
    # A value that is 0 comes out as 1e-17 or so.
    positive = values[values > 1e-10 * values[-1]]
    near = [*positive.tolist(), *(1.01 * positive).tolist()]
    ends = sorted(data.draw(st.sampled_from([0.0, *near, math.inf])) for _ in range(2))
    result = cs.count(op, *ends)
    inside = int(((values >= ends[0]) & (values < ends[1])).sum())
    assert result.least <= inside <= result.most
    far = [float((values - end).abs().amin()) for end in ends if 0 < end < math.inf]
    if min(far, default=math.inf) > 1e-9 * float(values[-1]):
        assert int(result) == inside


@given(layer=layers(kinds=("conv", "transposed")), data=st.data())
def test_by_inertia(layer: Layer, data: st.DataObject) -> None:
    """Small layers, which `count` would take a dense SVD of."""
    op, _ = direct(layer)
    found, _ = parts(normalized(op)[0])
    assume(found)
    part = data.draw(st.sampled_from(found))
    g = part.op.geometry
    assume(g.padding_mode == "zeros")
    assume(all(s <= n for s, n in zip(g.stride, g.input_size, strict=True)))
    values = torch.linalg.svdvals(part.op.to_dense())
    place = data.draw(st.integers(0, len(values) - 1))
    counter = ByInertia(part, 2**30)
    s = float(values[place])
    assume(s > 1e-10 * float(values[0]))
    least, most = counter.at_least(s)
    assert least <= part.places * place
    assert most >= part.places * (place + 1)
    below = float(values[place + 1]) if place + 1 < len(values) else 0.0
    if s - below > 1e-6 * float(values[0]) and s > 1e-5 * float(values[0]):
        exact = part.places * (place + 1)
        assert counter.at_least((s + below) / 2) == (exact, exact)
    assert counter.at_least(2 * counter.norm) == (0, 0)
    assert counter.factorizations > 0


def test_every_value_is_counted_once() -> None:
    op = ConvOperator(random(3, 2, 3, 3), (5, 6), stride=(2, 1), padding=1)
    values = torch.linalg.svdvals(op.to_dense())
    middles = ((values[1:] + values[:-1]) / 2).tolist()
    ends = [math.inf, *middles, 0.0]
    for upper, lower in itertools.pairwise(ends):
        assert int(cs.count(op, lower, upper)) == 1


def test_a_repeated_value_is_as_many() -> None:
    op = ConvOperator(2 * torch.eye(3)[:, :, None, None], (4, 5))
    assert int(cs.count(op, 1.9, 2.1)) == 60
    result = cs.count(op, 2.0)
    assert (result.least, result.most, result.exact) == (0, 60, False)
    with pytest.raises(ValueError, match="one of 0 to 60"):
        int(result)


def test_zeros_are_counted() -> None:
    unread = ConvOperator(torch.ones(2, 1, 1, 1), (4, 4), stride=2, padding=0)
    assert int(cs.count(unread, 0.0, 1e-9)) == min(unread.shape) - 4
    assert int(cs.count(ConvOperator(torch.zeros(2, 3, 3), 5), 0.0, 1.0)) == 10
    assert int(cs.count(ConvOperator(torch.zeros(2, 3, 3), 5), 0.5)) == 0


@pytest.mark.parametrize("exponent", [-300, 300])
def test_scaled_layers(exponent: int) -> None:
    op = ConvOperator(random(2, 2, 3) * 2.0**exponent, 9)
    middle = torch.linalg.svdvals(op.to_dense())[3:5].mean()
    assert int(cs.count(op, float(middle))) == 4


def test_an_empty_interval_and_ends_that_are_none() -> None:
    op = ConvOperator(random(2, 2, 3), 9)
    assert int(cs.count(op, 1.0, 1.0)) == 0
    with pytest.raises(ValueError, match="expected 0 <= lower <= upper"):
        cs.count(op, 2.0, 1.0)


def test_too_much_memory_is_refused_with_the_number() -> None:
    op = ConvOperator(random(8, 8, 3, 3), (24, 24))
    with pytest.raises(
        ValueError,
        match=r"border matrices to take at most max_bytes=1,048,576 bytes, it would take \d",
    ):
        cs.count(op, 1.0, max_bytes=2**20)
    reflected = ConvOperator(random(8, 8, 3, 3), (24, 24), padding_mode="reflect")
    with pytest.raises(ValueError, match="it would take"):
        cs.count(reflected, 1.0, max_bytes=2**20)
