"""`explain` tells what `svds`, `logabsdet` and `solve` then do."""

from __future__ import annotations

import pytest
import torch
from helpers.strategies import Layer, layers
from hypothesis import given

import convspectra as cs
from convspectra.spectra.ways import WAYS


def random_layer(*shape: int, size: int, **options: object) -> cs.ConvOperator:
    weight = torch.randn(shape, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
    return cs.ConvOperator(weight, (size, size), **options)


@given(layers())
def test_the_first_way_of_small_layers_is_the_one_taken(layer: Layer) -> None:
    op = layer.operator()
    for which in ("LM", "SM"):
        result = cs.svds(op, 1, which)
        first = {block.order[0][0] for block in cs.explain(op, which).blocks}
        taken = set(result.method.split("+")) - {"structure", "zero"}
        assert taken <= first


@pytest.mark.parametrize(
    ("op", "question", "first"),
    [
        (random_layer(16, 16, 3, 3, size=16), "LM", "davidson"),
        (random_layer(16, 16, 3, 3, size=16), "SM", "capacitance"),
        (random_layer(16, 16, 3, 3, size=16), "solve", "capacitance"),
        (random_layer(32, 8, 4, 4, size=24, stride=2, padding=1), "solve", "capacitance"),
        (random_layer(32, 8, 4, 4, size=24, stride=2, padding=1), "logabsdet", "capacitance"),
        (random_layer(32, 16, 3, 3, size=24), "logabsdet", "augmented"),
        (random_layer(16, 16, 3, 3, size=16, padding_mode="reflect"), "solve", "dense"),
        (random_layer(16, 16, 3, 3, size=16, padding_mode="circular"), "solve", "circulant"),
        (random_layer(2, 2, 3, 3, size=4), "solve", "dense"),
    ],
)
def test_structure_is_used_where_there_is_some(op, question, first):
    (block,) = cs.explain(op, question).blocks
    assert block.order[0][0] == first
    price = {way.name: way.flops for way in block.ways if way.admitted}
    assert set(price) >= {name for name, _ in block.order}
    assert all(flops is not None and flops > 0 for flops in price.values())


def test_a_square_strided_layer_is_not_solved_densely() -> None:
    """Its dense matrix takes 170 MB: with less than that only the border matrix is left."""
    op = random_layer(32, 8, 4, 4, size=24, stride=2, padding=1)
    generator = torch.Generator().manual_seed(1)
    x = torch.randn(2, *op.input_shape, dtype=torch.float64, generator=generator)
    for adjoint in (False, True):
        known = op.rmatvec(x.reshape(2, *op.output_shape)) if adjoint else op.matvec(x)
        found = cs.solve(op, known, adjoint, max_bytes=100_000_000)
        expected = x.reshape(2, *op.output_shape) if adjoint else x
        torch.testing.assert_close(found, expected, rtol=1e-6, atol=1e-8)


def test_it_prints_a_table() -> None:
    text = str(cs.explain(random_layer(16, 16, 3, 3, size=16), "SM"))
    assert text.startswith("smallest singular values of ConvOperator(")
    assert "block of 4096 x 4096, at 1 places" in text
    assert "tried: capacitance (square, and the factors fit)" in text
    assert all(way.name in text for way in WAYS.values() if "SM" in way.answers)


def test_a_zero_weight_has_no_ways() -> None:
    found = cs.explain(cs.ConvOperator(torch.zeros(1, 1, 3), 5))
    assert found.blocks == ()
    assert "the weight is 0" in str(found)


def test_what_it_refuses() -> None:
    op = cs.ConvOperator(torch.ones(2, 1, 3), 5)
    with pytest.raises(ValueError, match="expected which to be one of"):
        cs.explain(op, "largest")
    with pytest.raises(ValueError, match="expected a square operator to solve with"):
        cs.explain(op, "solve")
