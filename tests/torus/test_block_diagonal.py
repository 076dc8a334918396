"""The dense blocks that a layer falls into, against NumPy's SVD of the naive matrix."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from helpers.closed_forms import dense_values
from helpers.strategies import Layer, layers, random
from helpers.strategies import one_thread as one_thread
from hypothesis import given, settings

from convspectra.operator._conv_operator import ConvOperator
from convspectra.operator._structure import is_circulant
from convspectra.torus._block_diagonal import parts
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


@given(layers())
@settings(max_examples=100)
def test_blocks_have_the_singular_values_of_the_layer(layer):
    found, zeros = parts(layer.operator())
    values = [np.zeros(zeros)]
    for part in found:
        matrices, copies = part.matrices(2**30)
        block = torch.linalg.svdvals(matrices)
        repeated = block.repeat_interleave(copies.long(), dim=0).flatten().numpy()
        assert len(repeated) == part.count
        values.append(repeated)
    joined = np.sort(np.concatenate(values))[::-1]
    true = dense_values(layer)
    assert joined.shape == true.shape
    assert np.abs(joined - true).max(initial=0) <= 1e-12 * max(true[0], 1e-300)


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


def test_work_is_counted_for_every_group_and_symbol():
    dense = parts(ConvOperator(random(6, 2, 3), 10, groups=3))[0][0]
    assert dense.flops == 4 * 3 * 20**3
    circulant = parts(CIRCULANTS["groups"].operator())[0][0]
    assert circulant.flops == 16 * 2 * 13 * 2 * 2 * 2


def test_symbols_over_max_bytes_are_refused():
    op = CIRCULANTS["1 axis"].operator()
    with pytest.raises(ValueError, match="expected the symbols to take at most"):
        symbols_at(op, half_frequencies(op)[0], 100)
    with pytest.raises(ValueError, match="expected the Gram matrices of the symbols to take at mo"):
        row_grams_at(op, half_frequencies(op)[0], 100)
