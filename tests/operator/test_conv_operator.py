"""ConvOperator against the naive matrix: the layer of torch.nn applied to the identity."""

from __future__ import annotations

import math

import numpy as np
import pytest
import torch
from helpers.operators import LAYERS, each_layer, even_same_padding_warns
from helpers.strategies import layers, random
from hypothesis import given, settings
from hypothesis import strategies as st
from torch.utils._python_dispatch import TorchDispatchMode

import convspectra as cs
from convspectra.operator import _convolution as convolution
from convspectra.testing import assert_adjoint, assert_matches_dense, naive_dense

DTYPES = (torch.float16, torch.bfloat16, torch.float32, torch.float64)


class Sizes(TorchDispatchMode):
    """Keeps the batch sizes of the convolutions."""

    def __init__(self) -> None:
        super().__init__()
        self.of_convolutions: list[int] = []

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        if function.overloadpacket is torch.ops.aten.convolution:
            self.of_convolutions.append(len(args[0]))
        return function(*args, **kwargs or {})


# --- against the naive matrix ---------------------------------------------------------------------


@each_layer
def test_every_form_matches_the_naive_matrix(layer):
    assert_matches_dense(layer.operator(), layer.dense(), rtol=1e-13)


@each_layer
def test_adjoint(layer):
    assert_adjoint(layer.operator(), rtol=1e-13)
    assert_adjoint(layer.operator().T, rtol=1e-13)


@given(layers())
@settings(max_examples=400)
def test_random_layers_match_the_naive_matrix(layer):
    op = layer.operator()
    assert_matches_dense(op, layer.dense(), rtol=1e-13)
    assert_adjoint(op, rtol=1e-12)


@given(layers())
@settings(max_examples=60)
def test_shapes_are_those_of_the_layer(layer):
    op = layer.operator()
    x = torch.zeros(2, *op.input_shape, dtype=torch.float64)
    with even_same_padding_warns():
        y = layer.module()(x)
    assert op.output_shape == tuple(y.shape[1:])
    assert op.input_shape[1:] == layer.input_size
    assert op.shape == (math.prod(op.output_shape), math.prod(op.input_shape))
    assert op.matvec(x).shape == y.shape


@given(layers(), st.data())
@settings(max_examples=100)
def test_omega_is_where_one_kernel_entry_stands(layer, data):
    """The naive matrix of a one-hot weight is the derivative of M by that entry."""
    op = layer.operator()
    index = tuple(data.draw(st.integers(0, n - 1)) for n in layer.weight.shape)
    one_hot = torch.zeros_like(layer.weight, memory_format=torch.contiguous_format)
    one_hot[index] = 1
    derivative = layer.dense(one_hot).detach()
    rows, columns = op.index_set(index)
    indicator = torch.zeros(op.shape, dtype=torch.float64)
    indicator[torch.from_numpy(rows), torch.from_numpy(columns)] = 1
    assert torch.equal(indicator, derivative)
    assert len(rows) == op.geometry.tap_counts()[index[2:]] == derivative.count_nonzero()
    assert len(set(zip(rows.tolist(), columns.tolist(), strict=True))) == len(rows)


@given(layers())
@settings(max_examples=60)
def test_gradient_of_every_view_is_that_of_the_naive_matrix(layer):
    module = layer.module()
    parameter = next(p for name, p in module.named_parameters() if name.endswith("weight"))
    op = layer.operator(parameter)
    cotangent = random(*op.shape, seed=1)
    with even_same_padding_warns():
        naive = naive_dense(module, op.input_shape)
    (expected,) = torch.autograd.grad((naive * cotangent).sum(), parameter)
    batch = torch.eye(op.shape[1], dtype=torch.float64).reshape(-1, *op.input_shape)
    co_batch = torch.eye(op.shape[0], dtype=torch.float64).reshape(-1, *op.output_shape)
    views = {
        "to_dense": op.to_dense(),
        "matvec": op.matvec(batch).flatten(1).T,
        "rmatvec": op.rmatvec(co_batch).flatten(1),
    }
    for name, view in views.items():
        (gradient,) = torch.autograd.grad((view * cotangent).sum(), parameter)
        torch.testing.assert_close(gradient, expected, rtol=1e-12, atol=1e-12, msg=name)


@pytest.mark.parametrize("form", ["to_dense", "matvec", "rmatvec"])
@pytest.mark.parametrize(
    "name", ["paper", "strided", "grouped", "circular", "reflect", "transposed", "linear"]
)
def test_gradcheck_in_weight_and_array(name, form):
    layer = LAYERS[name]
    weight = layer.weight[:, :1].clone() if name == "grouped" else layer.weight.clone()
    weight.requires_grad_()
    op = layer.operator(weight)
    if form == "to_dense":
        assert torch.autograd.gradcheck(lambda w: op.with_weight(w).to_dense(), weight)
        return
    shape = op.input_shape if form == "matvec" else op.output_shape
    array = random(2, *shape).requires_grad_()
    assert torch.autograd.gradcheck(
        lambda w, x: getattr(op.with_weight(w), form)(x), (weight, array)
    )


# --- batches, dtypes, devices ---------------------------------------------------------------------


@each_layer
def test_batched_equals_unbatched(layer):
    op = layer.operator()
    for function, shape in ((op.matvec, op.input_shape), (op.rmatvec, op.output_shape)):
        batch = random(3, *shape)
        one_by_one = torch.stack([function(x) for x in batch])
        torch.testing.assert_close(function(batch), one_by_one, rtol=1e-13, atol=1e-13)
        single = function(batch[:1])
        torch.testing.assert_close(single, one_by_one[:1], rtol=1e-13, atol=1e-13)


@each_layer
def test_a_batch_in_parts_is_the_batch(layer, monkeypatch):
    weight = layer.weight.clone().requires_grad_()
    op = layer.operator(weight)
    unfolded = 8 * layer.weight[0].numel() * math.prod(op.geometry.output_size)
    for function, shape in ((op.matvec, op.input_shape), (op.rmatvec, op.output_shape)):
        batch = random(5, *shape)
        found = []
        for limit in (6 * unfolded, 2 * unfolded, unfolded - 1):
            # Small batches in parts: the limit is no option.
            monkeypatch.setattr(convolution, "UNFOLDED_BYTES", limit)
            with Sizes() as sizes:
                y = function(batch)
            (gradient,) = torch.autograd.grad((y * y.detach()).sum(), weight)
            found.append((y, gradient, function(batch[0]), sizes.of_convolutions))
        if op.geometry.ndim:
            assert [sizes for *_, sizes in found] == [[5], [2, 2, 1], [1] * 5]
        for y, gradient, single, _ in found[1:]:
            torch.testing.assert_close(y, found[0][0], rtol=1e-13, atol=1e-13)
            torch.testing.assert_close(gradient, found[0][1], rtol=1e-12, atol=1e-12)
            torch.testing.assert_close(single, found[0][0][0], rtol=1e-13, atol=1e-13)


@each_layer
def test_arrays_need_not_be_contiguous_and_are_left_alone(layer):
    op = layer.operator()
    for function, shape in ((op.matvec, op.input_shape), (op.rmatvec, op.output_shape)):
        x = random(*shape[::-1], 2).permute(*range(len(shape), -1, -1))
        before = x.clone()
        torch.testing.assert_close(function(x), function(x.contiguous()), rtol=1e-13, atol=1e-13)
        expanded = x[:1].expand(3, *shape)
        torch.testing.assert_close(
            function(expanded), function(expanded.contiguous()), rtol=1e-13, atol=1e-13
        )
        function(x).mul_(0)
        assert torch.equal(x, before)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@each_layer
def test_dtypes_are_kept(layer, dtype):
    weight = layer.weight.to(dtype)
    op = layer.operator(weight)
    assert op.dtype == dtype
    assert_matches_dense(op, layer.dense(weight.double()))
    assert_adjoint(op)
    wide = np.dtype("float64") if dtype == torch.float64 else np.dtype("float32")
    assert op.to_sparse().dtype == wide
    assert op.to_scipy().dtype == wide
    assert op.T.dtype == dtype


@pytest.mark.parametrize("name", ["paper", "transposed", "linear"])
def test_autocast_changes_nothing(name):
    layer = LAYERS[name]
    op = layer.operator(layer.weight.float())
    x, y = random(*op.input_shape).float(), random(*op.output_shape).float()
    expected = op.matvec(x), op.rmatvec(y), op.to_dense()
    with torch.autocast("cpu", dtype=torch.bfloat16):
        got = op.matvec(x), op.rmatvec(y), op.to_dense()
    for have, want in zip(got, expected, strict=True):
        assert have.dtype == torch.float32
        torch.testing.assert_close(have, want, rtol=0, atol=0)


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
@each_layer
def test_device_is_kept(layer):
    op = layer.operator(layer.weight.cuda())
    assert op.device.type == "cuda"
    assert_matches_dense(op, layer.dense().cuda())
    assert_adjoint(op, rtol=1e-12)
    with pytest.raises(ValueError, match=r"on cuda:0 like the weight, got .* on cpu"):
        op.matvec(random(*op.input_shape))


# --- the weight is looked at once -----------------------------------------------------------------


@pytest.mark.parametrize("which", ["LM", "SM"])
@pytest.mark.parametrize(
    "options", [{"padding": 1}, {"padding": 1, "stride": 2}, {"padding": 1, "groups": 2}]
)
def test_derived_layers_do_not_look_at_the_entries_again(monkeypatch, options, which):
    """One pass over the weight when the layer is made; its parts and adjoint are made of it."""
    looks: list[torch.Size] = []
    isfinite = torch.isfinite
    monkeypatch.setattr(torch, "isfinite", lambda x: looks.append(x.shape) or isfinite(x))
    weight = torch.randn(4, 4 // options.get("groups", 1), 3, 3, dtype=torch.float64)
    op = cs.ConvOperator(weight, (6, 6), **options)
    assert looks == [weight.shape]
    cs.svds(op, 1, which=which)
    assert [shape for shape in looks if len(shape) == weight.ndim] == [weight.shape]


@pytest.mark.parametrize("bad", [float("nan"), float("inf")])
def test_a_weight_that_is_spoiled_later_is_refused(bad):
    weight = torch.randn(2, 2, 3, 3, dtype=torch.float64)
    op = cs.ConvOperator(weight, (6, 6), padding=1)
    weight[1, 0, 1, 2] = bad
    with pytest.raises(ValueError, match="expected a finite weight, got NaN or Inf"):
        cs.svds(op, 1)
