"""The preconditioner from the Gram matrix of a circulant near the norm of a layer."""

from __future__ import annotations

import pytest
import torch
from helpers.strategies import direct, layers, random
from helpers.tori import NEAR_NORM, embedded, matrix, torus_matrix
from hypothesis import given, settings

from convspectra import ConvOperator
from convspectra.solvers._leading import COUNT
from convspectra.torus._circulant_gram import (
    LEAST_MARGIN,
    OTHERS,
    PROOF_MARGIN,
    WINDOW,
    CirculantGram,
)
from convspectra.torus._embedding import CirculantEmbedding


@given(layers())
@settings(max_examples=100)
def test_near_the_norm_it_is_symmetric_and_positive_definite(layer):
    """For any layer: padding that is not of zeros is taken for zeros."""
    op, dense = direct(layer)
    if not dense.any():
        return
    order = min(dense.shape)
    b = matrix(CirculantGram(op).inverse_near_norm()[0], order)
    assert b.shape == (order, order)
    assert torch.isfinite(b).all()
    values = torch.linalg.eigvalsh(0.5 * (b + b.T))
    assert (b - b.T).norm() <= 1e-5 * float(b.norm())
    assert values[0] > 0
    # Between 1/t and 1/(margin t): the condition is limited, and single precision is enough.
    assert values[-1] <= 1.01 * (1 + 1 / LEAST_MARGIN) * values[0]


@given(embedded())
@settings(max_examples=100)
def test_near_the_norm_its_bound_is_above_the_largest_value(drawn):
    op, dense = drawn
    true = float(torch.linalg.matrix_norm(dense, 2))
    _, bound = CirculantGram(op).inverse_near_norm()
    assert isinstance(bound, float)
    assert bound >= true


@pytest.mark.parametrize("op", NEAR_NORM.values(), ids=NEAR_NORM.keys())
def test_near_the_norm_it_is_the_dense_inverse_on_the_layer_s_points(op):
    if op.geometry.ndim == 0:
        torus, around = op.to_dense(), ConvOperator(op.weight[:, :, None], 1)
    else:
        torus, around = torus_matrix(op), op
    wide = op.shape[0] < op.shape[1]
    gram = torus @ torus.T if wide else torus.T @ torus
    margin = max(WINDOW / min(CirculantEmbedding(around).periods) ** 2, LEAST_MARGIN)
    t = float(torch.linalg.eigvalsh(gram)[-1]) * (1 + margin)
    inverse = torch.linalg.inv(t * torch.eye(len(gram), dtype=torch.float64) - gram)
    points = dict(enumerate(op.geometry.output_size if wide else op.geometry.input_size))
    # An identity's rows at the layer's points pick them out of the torus.
    sizes = [op.output_shape[0], *CirculantEmbedding(around).periods]
    if not wide:
        strides = around.geometry.stride
        sizes = [op.input_shape[0], *(p * s for p, s in zip(sizes[1:], strides, strict=True))]
    kept = torch.arange(len(gram)).reshape(sizes)
    for axis, count in points.items():
        kept = kept.narrow(1 + axis, 0, count)
    kept = kept.flatten()
    circulant = CirculantGram(op)
    apply, bound = circulant.inverse_near_norm()
    if circulant.blocks.shape[-1] <= COUNT:
        b = matrix(apply, len(kept))
        reference = inverse[kept][:, kept]
        assert (b - reference).norm() <= 2e-6 / margin * reference.norm()
    norm = float(torch.linalg.matrix_norm(torus, 2))
    assert norm <= bound <= norm * (1 + PROOF_MARGIN)


@pytest.mark.parametrize("size", [(8, 8), (30,)])
def test_near_the_norm_it_has_the_leading_vectors_of_larger_blocks(size):
    """A circular layer is the circulant: its top singular vector is one of the preconditioner."""
    op = ConvOperator(random(20, 20, *[3] * len(size)), size, padding_mode="circular")
    _, s, v = torch.linalg.svd(op.to_dense())
    apply, _ = CirculantGram(op).inverse_near_norm()
    t = float(s[0]) ** 2 * (1 + max(WINDOW / min(size) ** 2, LEAST_MARGIN))
    assert float(v[:1] @ apply(v[:1]).T) == pytest.approx(1 / (t - float(s[0]) ** 2), rel=0.05)
    inner = float(v[-1:] @ apply(v[-1:]).T)
    assert 1 / t <= inner <= 1 / (t - OTHERS * float(s[0]) ** 2)


def test_near_the_norm_rows_keep_their_type():
    op = NEAR_NORM["tall"]
    apply, _ = CirculantGram(op).inverse_near_norm()
    x = random(5, min(op.shape))
    together = apply(x)
    assert together.dtype == torch.float64
    assert apply(x.float()).dtype == torch.float32
    alone = torch.cat([apply(row[None]) for row in x])
    assert torch.allclose(together, alone, rtol=1e-4, atol=1e-5 * float(together.abs().max()))
