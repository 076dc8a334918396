"""The symbols of a layer at a list of frequencies, half of which stand for all."""

from __future__ import annotations

import pytest
import torch
from helpers.strategies import Layer, random

from convspectra.operator._structure import is_circulant
from convspectra.torus._embedding import CirculantEmbedding
from convspectra.torus._symbols import half_frequencies, row_grams_at, symbol_shape, symbols_at

CIRCULAR = {"padding_mode": "circular"}
CIRCULANTS = {
    "1 axis": Layer(random(2, 3, 3), (6,), CIRCULAR),
    "odd": Layer(random(2, 3, 3), (7,), CIRCULAR),
    "2 axes": Layer(random(3, 2, 3, 2), (4, 5), CIRCULAR),
    "3 axes": Layer(random(2, 1, 2, 3, 2), (3, 4, 2), CIRCULAR),
    "groups": Layer(random(4, 2, 3, 3), (4, 6), {"groups": 2, **CIRCULAR}),
    "stride": Layer(
        random(3, 2, 3, 5), (6, 9), {"stride": 3, "padding": [(0, 0), (1, 1)], **CIRCULAR}
    ),
    "stride and dilation": Layer(
        random(2, 2, 3), (12,), {"stride": 2, "dilation": 3, "padding": [(2, 3)], **CIRCULAR}
    ),
}


@pytest.mark.parametrize("layer", CIRCULANTS.values(), ids=CIRCULANTS.keys())
def test_half_of_the_symbols_stand_for_all(layer):
    op = layer.operator()
    assert is_circulant(op)
    frequencies, copies = half_frequencies(op)
    symbols = symbols_at(op, frequencies, 2**30)
    assert symbols.shape == (op.groups * len(frequencies), *symbol_shape(op))
    values = torch.linalg.svdvals(symbols).repeat_interleave(copies.long().repeat(op.groups), dim=0)
    every = CirculantEmbedding(op).symbols(half=False)
    assert torch.allclose(symbols, every[:, frequencies].flatten(0, 1), rtol=1e-12, atol=1e-13)
    every = torch.linalg.svdvals(every).flatten()
    assert torch.allclose(values.flatten().sort().values, every.sort().values, rtol=1e-10)
    some = symbols_at(op, frequencies[1:3], 2**30)
    assert torch.allclose(some[:2], symbols[1:3], rtol=1e-12)
    grams = row_grams_at(op, frequencies, 2**30)
    assert torch.allclose(grams, symbols @ symbols.mH, rtol=1e-12, atol=1e-12 * float(values[0, 0]))


def test_symbols_over_max_bytes_are_refused():
    op = CIRCULANTS["1 axis"].operator()
    with pytest.raises(ValueError, match="expected the symbols to take at most"):
        symbols_at(op, half_frequencies(op)[0], 100)
    with pytest.raises(ValueError, match="expected the Gram matrices of the symbols to take at mo"):
        row_grams_at(op, half_frequencies(op)[0], 100)
