"""NumPy and SciPy people: arrays in, arrays out, and flat vectors."""

from __future__ import annotations

import numpy as np
import pytest
import scipy.sparse.linalg as sla
import torch
from helpers.operators import each_layer
from helpers.strategies import Layer, random

import convspectra as cs


@each_layer
def test_flat_vectors_and_arrays_are_those_of_the_matrix(layer: Layer) -> None:
    op, dense = layer.operator(), layer.dense().detach().numpy()
    array = cs.ConvOperator(layer.weight.numpy(), layer.input_size, **layer.options)
    assert np.array_equal(array.to_dense().numpy(), op.to_dense().numpy())
    x, y = (random(n, seed=n).numpy() for n in (op.shape[1], op.shape[0]))
    np.testing.assert_allclose(op.matvec(x), dense @ x, atol=1e-12)
    np.testing.assert_allclose(op.rmatvec(y), dense.T @ y, atol=1e-12)
    assert torch.equal(op.matvec(torch.from_numpy(x)), torch.from_numpy(op.matvec(x)))
    batch = random(2, *op.input_shape).numpy()
    assert op.matvec(batch).shape == (2, *op.output_shape)
    assert op.matvec(batch[0]).shape == op.output_shape


@pytest.mark.parametrize("dtype", ["f4", ">f8", "f8", "f2"])
def test_arrays_of_any_floating_type(dtype: str) -> None:
    weight = np.array([[[1.0, 2.0, 3.0]]], dtype=dtype)
    weight.flags.writeable = False
    op = cs.ConvOperator(weight, 4)
    assert op.dtype == {"2": torch.float16, "4": torch.float32, "8": torch.float64}[dtype[-1]]
    found = op.matvec(np.ones(4, dtype=int))
    assert found.dtype == np.dtype("f4" if dtype == "f2" else dtype).newbyteorder("=")
    assert found.tolist() == [5.0, 6.0, 6.0, 3.0]


def test_the_operator_has_an_array_of_its_own() -> None:
    weight = np.ones((1, 1, 3))
    op = cs.ConvOperator(weight, 4)
    weight[:] = 7
    assert float(op.weight.sum()) == 3.0


def test_gradients_flow_through_flat_tensors() -> None:
    op = cs.ConvOperator(random(2, 2, 3), 5)
    x = random(10).requires_grad_()
    op.matvec(x).square().sum().backward()
    torch.testing.assert_close(x.grad, 2 * op.to_dense().T @ op.to_dense() @ x.detach())


@pytest.mark.parametrize("which", ["LM", "SM"])
def test_triplets_are_those_of_scipy(which: str) -> None:
    op = cs.ConvOperator(random(3, 2, 3, 3), (5, 4))
    U, s, Vh = cs.svds(op, 3, which).numpy()
    dense = op.to_dense().numpy()
    np.testing.assert_allclose(U.T @ U, np.eye(3), atol=1e-8)
    np.testing.assert_allclose(dense @ Vh.T, U * s, atol=1e-7)
    if which == "LM":
        expected = sla.svds(op.to_scipy(), 3, return_singular_vectors=False)
        np.testing.assert_allclose(np.sort(s), np.sort(expected), rtol=1e-9)
    without = cs.svds(op, 2, which, return_singular_vectors=False).numpy()
    assert without[0] is None
    assert without[2] is None
