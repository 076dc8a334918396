"""The dense blocks that a layer falls into, against NumPy's SVD of the naive matrix."""

from __future__ import annotations

import numpy as np
import torch
from helpers.closed_forms import dense_values
from helpers.strategies import Layer, layers, random
from hypothesis import given, settings

from convspectra.operator._conv_operator import ConvOperator
from convspectra.spectra._parts import parts


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


def test_work_is_counted_for_every_group_and_symbol():
    dense = parts(ConvOperator(random(6, 2, 3), 10, groups=3))[0][0]
    assert dense.flops == 4 * 3 * 20**3
    layer = Layer(random(4, 2, 3, 3), (4, 6), {"groups": 2, "padding_mode": "circular"})
    circulant = parts(layer.operator())[0][0]
    assert circulant.flops == 16 * 2 * 13 * 2 * 2 * 2
