"""ConvOperator against the naive matrix: the layer of torch.nn applied to the identity."""

from __future__ import annotations

import contextlib
import itertools
import math
import warnings
from collections.abc import Iterator

import numpy as np
import pytest
import scipy.sparse
import torch
from helpers.strategies import Layer, layers, same_pairs
from helpers.strategies import one_thread as one_thread
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode

import convspectra as cs
from convspectra import ConvOperator, kernel_to_weight, weight_to_kernel
from convspectra.operator import _convolution as convolution
from convspectra.testing import assert_adjoint, assert_matches_dense, naive_dense

DTYPES = (torch.float16, torch.bfloat16, torch.float32, torch.float64)


def normal(*shape: int, seed: int = 0, dtype: torch.dtype = torch.float64) -> Tensor:
    return torch.randn(
        shape, dtype=torch.float64, generator=torch.Generator().manual_seed(seed)
    ).to(dtype)


# One layer for each thing that can go wrong alone; the random layers mix them.
LAYERS = {
    "paper": Layer(normal(3, 2, 3, 3), (5, 4)),
    "even kernel": Layer(normal(2, 2, 4, 2), (3, 5)),
    "strided": Layer(normal(2, 3, 3, 2), (6, 5), {"stride": (2, 3), "padding": 1}),
    "dilated": Layer(normal(2, 1, 3), (7,), {"dilation": 3, "padding": 2}),
    "grouped": Layer(normal(6, 2, 2, 2), (3, 4), {"groups": 3}),
    "depthwise": Layer(normal(3, 1, 3), (5,), {"groups": 3}),
    "depthwise, multiplier 2": Layer(normal(4, 1, 3), (5,), {"groups": 2}),
    "asymmetric": Layer(normal(2, 2, 3), (5,), {"padding": [(0, 3)]}),
    "asymmetric, 2 axes": Layer(normal(1, 1, 2, 3), (4, 5), {"padding": ((0, 3), (2, 1))}),
    "circular": Layer(normal(2, 2, 4, 3), (4, 5), {"padding_mode": "circular"}),
    "circular, wide": Layer(normal(1, 1, 3), (2,), {"padding": 2, "padding_mode": "circular"}),
    "reflect": Layer(normal(2, 2, 4, 3), (4, 5), {"padding_mode": "reflect"}),
    "reflect, asymmetric": Layer(
        normal(2, 1, 3), (4,), {"padding": [(3, 1)], "padding_mode": "reflect", "stride": 2}
    ),
    "replicate": Layer(normal(2, 2, 2, 3, 2), (2, 3, 2), {"padding_mode": "replicate"}),
    "replicate, wide": Layer(normal(1, 2, 3), (1,), {"padding": 4, "padding_mode": "replicate"}),
    "one pixel": Layer(normal(3, 2, 5, 3), (1, 1)),
    "kernel 1": Layer(normal(3, 2, 1, 1), (3, 2)),
    "3 axes": Layer(normal(2, 1, 2, 2, 1), (3, 2, 4), {"padding": (1, 0, 2)}),
    "transposed": Layer(
        normal(2, 3, 3, 2),
        (3, 4),
        {"transposed": True, "stride": 2, "padding": (1, 0), "output_padding": (1, 0)},
    ),
    "transposed, output_padding >= stride": Layer(
        normal(2, 1, 2),
        (3,),
        {"transposed": True, "stride": 1, "dilation": 4, "padding": 1, "output_padding": 3},
    ),
    "transposed, grouped": Layer(
        normal(4, 3, 3), (3,), {"transposed": True, "groups": 2, "padding": 0, "stride": 2}
    ),
    "transposed, same": Layer(normal(2, 2, 4), (5,), {"transposed": True, "padding": "same"}),
    "transposed, asymmetric": Layer(
        normal(1, 2, 4), (4,), {"transposed": True, "padding": [(2, 0)], "stride": 3}
    ),
    "linear": Layer(normal(4, 3), ()),
    # A stride so long that the last window ends before the input begins, or begins after it.
    "window in the padding before": Layer(normal(1, 1, 1), (1,), {"padding": 5, "stride": 20}),
    "window misses the input": Layer(normal(2, 2, 2), (1,), {"padding": [(4, 2)], "stride": 9}),
    "window misses on one axis": Layer(
        normal(1, 2, 1, 2), (3, 4), {"padding": ((3, 1), (0, 0)), "stride": (9, 1)}
    ),
    "windows after the input": Layer(normal(1, 1, 2), (1,), {"padding": [(0, 6)], "stride": 2}),
    "stride jumps over the input": Layer(normal(1, 1, 1), (1,), {"padding": 2, "stride": 4}),
}
each_layer = pytest.mark.parametrize("layer", LAYERS.values(), ids=LAYERS.keys())


@contextlib.contextmanager
def even_same_padding_warns() -> Iterator[None]:
    """PyTorch's warning that its own padding="same" copies the input for even kernels."""
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", message="Using padding='same' with even")
        yield


def limit_message(what: str, needed: str) -> str:
    return f"the {what} matrix to take at most max_bytes=2,147,483,648 bytes, .* take {needed};"


class LargestTensor(TorchDispatchMode):
    """Records the bytes of the largest tensor that any operation gives."""

    largest = 0

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        result = function(*args, **(kwargs or {}))
        for each in result if isinstance(result, (tuple, list)) else (result,):
            if isinstance(each, Tensor):
                self.largest = max(self.largest, each.untyped_storage().nbytes())
        return result


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
    cotangent = normal(*op.shape, seed=1)
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
    array = normal(2, *shape).requires_grad_()
    assert torch.autograd.gradcheck(
        lambda w, x: getattr(op.with_weight(w), form)(x), (weight, array)
    )


# --- batches, dtypes, devices ---------------------------------------------------------------------


@each_layer
def test_batched_equals_unbatched(layer):
    op = layer.operator()
    for function, shape in ((op.matvec, op.input_shape), (op.rmatvec, op.output_shape)):
        batch = normal(3, *shape)
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
        batch = normal(5, *shape)
        found = []
        for limit in (6 * unfolded, 2 * unfolded, unfolded - 1):
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
        x = normal(*shape[::-1], 2).permute(*range(len(shape), -1, -1))
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
    x, y = normal(*op.input_shape).float(), normal(*op.output_shape).float()
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
        op.matvec(normal(*op.input_shape))


# --- views ----------------------------------------------------------------------------------------


@each_layer
def test_sparse_stores_no_zeros_and_no_duplicates(layer):
    op = layer.operator()
    sparse = op.to_sparse()
    assert isinstance(sparse, scipy.sparse.csr_array)
    assert sparse.shape == op.shape
    assert sparse.nnz == np.count_nonzero(sparse.toarray()) == op.to_dense().count_nonzero()
    pairs = set(zip(*(i.tolist() for i in sparse.tocoo().coords), strict=True))
    assert len(pairs) == sparse.nnz


def test_sparse_leaves_out_zeros_of_the_weight():
    weight = normal(2, 2, 3)
    weight[0, 1] = 0
    op = ConvOperator(weight, 5)
    assert op.to_sparse().nnz == op.to_dense().count_nonzero() == 3 * 13


def test_views_for_scipy_are_detached():
    weight = normal(2, 2, 3).requires_grad_()
    op = ConvOperator(weight, 5)
    assert op.to_sparse().shape == (10, 10)
    assert (op.to_scipy() @ np.ones(10)).shape == (10,)
    assert op.to_dense().requires_grad
    assert op.matvec(torch.ones(2, 5, dtype=torch.float64)).requires_grad


@pytest.mark.parametrize("name", ["strided", "grouped", "transposed", "linear"])
def test_scipy_operator_in_all_calling_forms(name):
    layer = LAYERS[name]
    operator, dense = layer.operator().to_scipy(), layer.dense().detach().numpy()
    rows, columns = operator.shape
    rng = np.random.default_rng(0)
    x, y = rng.standard_normal(columns), rng.standard_normal(rows)
    X, Y = rng.standard_normal((columns, 4)), rng.standard_normal((rows, 4))
    close = {"rtol": 1e-12, "atol": 1e-12}
    np.testing.assert_allclose(operator @ x, dense @ x, **close)
    np.testing.assert_allclose(operator @ x[:, None], dense @ x[:, None], **close)
    np.testing.assert_allclose(operator @ X, dense @ X, **close)
    np.testing.assert_allclose(operator @ np.asfortranarray(X), dense @ X, **close)
    np.testing.assert_allclose(operator.T @ y, dense.T @ y, **close)
    np.testing.assert_allclose(operator.H @ Y, dense.T @ Y, **close)
    np.testing.assert_allclose(operator.rmatmat(Y), dense.T @ Y, **close)
    np.testing.assert_allclose((operator.H @ operator) @ X, dense.T @ dense @ X, **close)


def test_scipy_operator_refuses_complex_arrays():
    operator = ConvOperator(normal(2, 2, 3), 5).to_scipy()
    with pytest.raises(ValueError, match="complex"):
        operator @ (1j * np.ones(10))


@each_layer
def test_transpose(layer):
    op = layer.operator()
    assert op.T.shape == op.shape[::-1]
    assert op.T.input_shape == op.output_shape
    assert op.T.output_shape == op.input_shape
    assert op.T.weight is op.weight
    assert op.T.transposed is not op.transposed
    assert torch.equal(op.T.to_dense(), op.to_dense().T)
    assert torch.equal(op.T.T.to_dense(), op.to_dense())
    assert repr(op.T.T) == repr(op)
    y = normal(2, *op.output_shape)
    assert torch.equal(op.T.matvec(y), op.rmatvec(y))
    rows, columns = op.index_set((0,) * op.weight.ndim)
    assert [i.tolist() for i in op.T.index_set((0,) * op.weight.ndim)] == [
        columns.tolist(),
        rows.tolist(),
    ]


def test_repr_says_all_that_matters():
    op = ConvOperator(
        torch.ones(4, 1, 3, 2), (6, 5), stride=2, padding=((1, 2), (0, 1)), groups=2, dilation=2
    )
    assert repr(op) == (
        "ConvOperator((2, 6, 5) -> (4, 3, 2), kernel=(3, 2), stride=(2, 2), "
        "padding=((1, 2), (0, 1)), dilation=(2, 2), groups=2, padding_mode='zeros', "
        "dtype=torch.float32, device=cpu)"
    )
    assert "(4, 3, 2) -> (2, 6, 5), transposed, kernel" in repr(op.T)


def test_with_weight():
    layer = LAYERS["strided"]
    op = layer.operator()
    other = normal(*op.weight.shape, seed=5)
    assert_matches_dense(op.with_weight(other), layer.dense(other))
    assert_matches_dense(op, layer.dense())
    assert op.with_weight(other.float()).dtype == torch.float32
    assert op.T.with_weight(other).transposed is not op.transposed
    with pytest.raises(ValueError, match=r"weight of shape \(2, 3, 3, 2\), got \(2, 3, 2, 3\)"):
        op.with_weight(normal(2, 3, 2, 3))
    with pytest.raises(ValueError, match="finite weight"):
        op.with_weight(other * math.nan)


def test_defaults_are_the_papers_layer():
    weight = normal(3, 2, 4, 4)
    explicit = ConvOperator(
        weight,
        (5, 5),
        stride=(1, 1),
        padding=((1, 2), (1, 2)),
        dilation=(1, 1),
        groups=1,
        padding_mode="zeros",
        transposed=False,
        output_padding=(0, 0),
    )
    assert repr(ConvOperator(weight, 5)) == repr(explicit)
    assert torch.equal(ConvOperator(weight, [5, 5]).to_dense(), explicit.to_dense())
    assert ConvOperator(weight, torch.Size((5, 5))).shape == explicit.shape
    assert explicit.groups == 1
    assert explicit.weight is weight


def test_operator_follows_its_weight():
    weight = normal(1, 1, 3)
    op = ConvOperator(weight, 4)
    before = op.to_dense()
    weight.mul_(2)
    assert torch.equal(op.to_dense(), 2 * before)


# --- the paper's layer ----------------------------------------------------------------------------


def paper_layer(K: np.ndarray, X: np.ndarray) -> np.ndarray:
    """Y[r,s,c] = sum_{d,p,q} X[r-m+p, s-m+q, d] K[p,q,d,c] in loops, indices from 1."""
    *taps, g, h = K.shape
    sizes = X.shape[:-1]
    m = [math.ceil(k / 2) for k in taps]
    Y = np.zeros((*sizes, h))
    for r in itertools.product(*(range(1, n + 1) for n in sizes)):
        for p in itertools.product(*(range(1, k + 1) for k in taps)):
            source = [ri - mi + pi for ri, mi, pi in zip(r, m, p, strict=True)]
            if all(1 <= s <= n for s, n in zip(source, sizes, strict=True)):
                for d in range(g):
                    for c in range(h):
                        Y[(*(i - 1 for i in r), c)] += (
                            X[(*(i - 1 for i in source), d)] * K[(*(i - 1 for i in p), d, c)]
                        )
    return Y


@pytest.mark.parametrize(
    ("taps", "sizes"),
    [
        ((1, 1), (3, 2)),
        ((2, 2), (3, 4)),
        ((3, 3), (4, 3)),
        ((4, 4), (3, 5)),
        ((5, 5), (4, 4)),
        ((2, 3), (4, 3)),
        ((6, 6), (2, 3)),
        ((3,), (6,)),
        ((4,), (6,)),
        ((2, 3, 2), (3, 2, 2)),
    ],
    ids=str,
)
@pytest.mark.parametrize(("g", "h"), [(1, 1), (3, 1), (1, 3), (2, 3)])
def test_the_papers_formula(taps, sizes, g, h):
    K, X = normal(*taps, g, h).numpy(), normal(*sizes, g, seed=1).numpy()
    op = ConvOperator(kernel_to_weight(torch.from_numpy(K)), sizes)
    y = op.matvec(torch.from_numpy(X).movedim(-1, 0))
    np.testing.assert_allclose(y.movedim(0, -1).numpy(), paper_layer(K, X), atol=1e-12)


def test_kernel_and_weight_are_views_of_each_other():
    K = normal(3, 4, 2, 5).requires_grad_()
    weight = kernel_to_weight(K)
    assert weight.shape == (5, 2, 3, 4)
    assert torch.equal(weight, K.permute(3, 2, 0, 1))
    assert torch.equal(weight_to_kernel(weight), K)
    assert weight.data_ptr() == weight_to_kernel(weight).data_ptr() == K.data_ptr()
    (gradient,) = torch.autograd.grad(weight[1, 0, 2, 3], K)
    assert gradient[2, 3, 0, 1] == gradient.abs().sum() == 1


@pytest.mark.parametrize("function", [kernel_to_weight, weight_to_kernel])
@pytest.mark.parametrize("shape", [(), (3,), (3, 3), (1, 1, 1, 1, 1, 1)])
def test_kernels_of_the_wrong_number_of_axes_are_refused(function, shape):
    with pytest.raises(ValueError, match=r"1 to 3 axes of taps, got \("):
        function(torch.zeros(shape))


# --- from_module ----------------------------------------------------------------------------------

MODULES = {
    "Conv1d": (nn.Conv1d(4, 6, 3, 2, 1, 2, 2), (9,)),
    "Conv2d": (nn.Conv2d(2, 3, (3, 2), (1, 2), (2, 0), (1, 2), padding_mode="reflect"), (4, 6)),
    "Conv3d": (nn.Conv3d(2, 1, 2, padding="same", padding_mode="circular"), (2, 3, 2)),
    "ConvTranspose1d": (nn.ConvTranspose1d(4, 6, 3, 3, 1, 2, 2, True, 1), (4,)),
    "ConvTranspose2d": (nn.ConvTranspose2d(2, 3, (2, 3), 2, (0, 1), (1, 0)), (3, 2)),
    "ConvTranspose3d": (nn.ConvTranspose3d(1, 2, 2, 1, 0, 1, dilation=2), (2, 1, 2)),
    "Linear": (nn.Linear(5, 7), ()),
    "no bias": (nn.Conv2d(1, 2, 3, bias=False, padding="valid"), (4, 5)),
}


@pytest.mark.parametrize(("module", "size"), MODULES.values(), ids=MODULES.keys())
def test_from_module(module, size):
    op = ConvOperator.from_module(module, size)
    assert op.weight is module.weight
    dense = naive_dense(module, op.input_shape)
    assert_matches_dense(op, dense)
    assert_adjoint(op)
    offset = module(torch.zeros(1, *op.input_shape))
    x = normal(2, *op.input_shape, dtype=torch.float32)
    torch.testing.assert_close(op.matvec(x) + offset, module(x))


def test_from_module_of_even_same_padding():
    conv = nn.Conv2d(2, 2, (4, 2), padding="same", dilation=(1, 3))
    op = ConvOperator.from_module(conv, (5, 4))
    with even_same_padding_warns():
        assert_matches_dense(op, naive_dense(conv, (2, 5, 4)))
    assert op.geometry.padding == tuple(same_pairs((4, 2), (1, 3)))


def test_from_module_takes_an_int_for_every_axis():
    assert ConvOperator.from_module(nn.Conv2d(1, 1, 3), 5).shape == (9, 25)


def test_from_module_of_a_parametrized_weight():
    conv = nn.utils.parametrizations.weight_norm(nn.Conv2d(2, 3, 3, padding=1))
    op = ConvOperator.from_module(conv, (4, 3))
    assert_matches_dense(op, naive_dense(conv, (2, 4, 3)))
    op.to_dense().square().sum().backward()
    gradients = [p.grad for name, p in conv.named_parameters() if "parametrizations" in name]
    assert len(gradients) == 2
    assert all(g is not None and g.abs().sum() > 0 for g in gradients)


@pytest.mark.parametrize(
    ("lazy", "shape"),
    [
        (nn.LazyConv1d(2, 3), (3, 5)),
        (nn.LazyConv2d(2, 3), (3, 5, 4)),
        (nn.LazyConvTranspose2d(2, 3), (3, 5, 4)),
        (nn.LazyLinear(2), (3,)),
    ],
    ids=["Conv1d", "Conv2d", "ConvTranspose2d", "Linear"],
)
def test_lazy_modules_need_a_forward_pass(lazy, shape):
    with pytest.raises(ValueError, match=r"got the lazy Lazy.*; run one forward pass first"):
        ConvOperator.from_module(lazy, shape[1:])
    lazy(torch.zeros(1, *shape))
    op = ConvOperator.from_module(lazy, shape[1:])
    assert op.input_shape == shape
    assert_matches_dense(op, naive_dense(lazy, shape))


@pytest.mark.parametrize(
    "module",
    [nn.ReLU(), nn.BatchNorm2d(3), nn.Bilinear(2, 2, 2), nn.Sequential(nn.Conv2d(1, 1, 1))],
)
def test_from_module_names_what_it_takes(module):
    name = type(module).__name__
    with pytest.raises(ValueError, match=rf"nn.Conv1d, .* nn.Linear, got {name}$"):
        ConvOperator.from_module(module, (4, 4))


def test_from_module_refuses_the_meta_device():
    with pytest.raises(ValueError, match="meta device"):
        ConvOperator.from_module(nn.Conv2d(1, 1, 3, device="meta"), (4, 4))


def test_from_module_refuses_a_wrong_number_of_axes():
    with pytest.raises(ValueError, match=r"input_size of 2 integers .* got \(4, 4, 4\)"):
        ConvOperator.from_module(nn.Conv2d(1, 1, 3), (4, 4, 4))
    with pytest.raises(ValueError, match="input_size of 2 integers"):
        ConvOperator.from_module(nn.Conv2d(1, 1, 3))
    with pytest.raises(ValueError, match="input_size of 0 integers"):
        ConvOperator.from_module(nn.Linear(1, 1), (4,))


# --- bad input ------------------------------------------------------------------------------------

W = normal(4, 2, 3, 3)
BAD_WEIGHTS = [
    (W.tolist(), "expected weight to be a torch.Tensor, got list"),
    (W.numpy(), "expected weight to be a torch.Tensor, got ndarray"),
    (W.to(torch.complex128), "real floating type, got torch.complex128"),
    (W.long(), "real floating type, got torch.int64"),
    (W.bool(), "real floating type, got torch.bool"),
    (W * math.nan, "finite weight, got NaN or Inf"),
    (W.index_fill(3, torch.tensor([2]), -math.inf), "finite weight, got NaN or Inf"),
    (W.to("meta"), "meta device"),
    (W[:0], r"weight with entries, got the shape \(0, 2, 3, 3\)"),
    (W[:, :0], r"weight with entries, got the shape \(4, 0, 3, 3\)"),
    (W[..., :0], r"weight with entries, got the shape \(4, 2, 3, 0\)"),
    (W[0, 0, 0, 0], r"\(h, g / groups, \*kernel\).* got \(\)"),
    (W[0, 0, 0], r"\(h, g / groups, \*kernel\).* got \(3,\)"),
    (W[None, None], "at most 3 kernel axes"),
    (W.to_sparse(), "expected"),
    (W.to(torch.float8_e4m3fn), "expected"),
]


@pytest.mark.parametrize(("weight", "message"), BAD_WEIGHTS)
def test_bad_weights_are_refused(weight, message):
    with pytest.raises(ValueError, match=message):
        ConvOperator(weight, (5, 5))


BAD_OPTIONS = [
    ({"input_size": (5,)}, r"input_size of 2 integers for a weight of shape \(4, 2, 3, 3\)"),
    ({"input_size": (5, 5, 5)}, "input_size of 2 integers"),
    ({"input_size": ()}, "input_size of 2 integers"),
    ({"input_size": None}, "input_size of 2 integers .* got None"),
    ({"input_size": 5.0}, "input_size of 2 integers .* got 5.0"),
    ({"input_size": (5, 5.5)}, "integers >= 1 for input_size"),
    ({"input_size": 0}, "integers >= 1 for input_size"),
    ({"input_size": (5, 0)}, "integers >= 1 for input_size"),
    ({"input_size": -5}, "integers >= 1 for input_size"),
    ({"input_size": True}, "integers >= 1 for input_size"),
    ({"input_size": "55"}, "integers for input_size"),
    ({"groups": 0}, "groups to be a positive integer, got 0"),
    ({"groups": -2}, "groups to be a positive integer, got -2"),
    ({"groups": True}, "groups to be a positive integer, got True"),
    ({"groups": 2.0}, "groups to be a positive integer, got 2.0"),
    ({"groups": 3}, "4 channels of weight.shape.0. to be divisible by groups, got groups=3"),
    ({"groups": 3, "transposed": True}, "to be divisible by groups, got groups=3"),
    ({"groups": 8}, "to be divisible by groups"),
    ({"stride": 0, "padding": 1}, "integers >= 1 for stride"),
    ({"stride": 1.0}, "integers >= 1 for stride"),
    ({"stride": 2}, "expected stride 1 with padding='same'"),
    ({"stride": 2, "transposed": True}, "expected stride 1 with padding='same'"),
    ({"dilation": 0}, "integers >= 1 for dilation"),
    ({"dilation": (1, 1, 1)}, "expected 2 integers for dilation"),
    ({"padding": "Same"}, "got 'Same'"),
    ({"padding": "full"}, "got 'full'"),
    ({"padding": -1}, "integers >= 0 for padding"),
    ({"padding": (1, 1, 1, 1)}, "expected 2 integers for padding"),
    ({"padding_mode": "symmetric"}, "padding_mode in .* got 'symmetric'"),
    ({"padding_mode": "reflect", "padding": 5}, "reflect padding of at most 4"),
    ({"padding_mode": "circular", "padding": 6}, "circular padding of at most 5"),
    ({"padding_mode": "circular", "transposed": True}, "padding_mode='zeros' for a transposed"),
    ({"input_size": (5, 2), "padding": 0}, "reaches past the padded input on axis 1"),
    ({"padding": "valid", "dilation": 3}, "reaches past the padded input on axis 0"),
    ({"output_padding": 1}, "output_padding=0 unless transposed=True, got 1"),
    ({"output_padding": (0, 1)}, "output_padding=0 unless transposed=True"),
    ({"output_padding": None}, "output_padding=0 unless transposed=True"),
    ({"output_padding": 1, "transposed": True}, r"output_padding < max\(stride, dilation\)"),
    ({"padding": 4, "transposed": True}, "empty output on axis 0"),
]


@pytest.mark.parametrize(("change", "message"), BAD_OPTIONS)
def test_bad_options_are_refused(change, message):
    options = {"input_size": (5, 5), **change}
    with pytest.raises(ValueError, match=message):
        ConvOperator(W, **options)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"input_size": (1,)}, "input_size of 0 integers"),
        ({"input_size": 7}, "input_size"),
        ({"groups": 2}, "groups=1 .*for a linear"),
        ({"transposed": True}, "transposed=False for a linear"),
        ({"stride": 2, "padding": 0}, "stride"),
        ({"dilation": 0}, "dilation"),
        ({"padding": 1}, "padding"),
        ({"padding": "smae"}, "got 'smae'"),
        ({"padding_mode": "zero"}, "got 'zero'"),
        ({"output_padding": 1}, "output_padding=0"),
    ],
)
def test_options_that_a_linear_layer_has_not_are_refused(change, message):
    with pytest.raises(ValueError, match=message):
        ConvOperator(normal(4, 2), **{"input_size": (), **change})


x_shape, y_shape = (2, 5, 4), (4, 5, 4)


def bad_arrays(shape: tuple[int, ...]) -> list[tuple[object, str]]:
    good = normal(*shape)
    expected = rf"\({', '.join(map(str, shape))}\)"
    return [
        (normal(shape[0] + 1, *shape[1:]), f"of shape {expected} or .* got"),
        (normal(3, shape[0] + 1, *shape[1:]), f"of shape {expected} or .* got"),
        (normal(1, *shape[1:]), f"of shape {expected} or .* got"),
        (good.transpose(1, 2), f"of shape {expected} or .* got"),
        (good.flatten(), f"of shape {expected} or .* got"),
        (good[0], f"of shape {expected} or .* got"),
        (good[None, None], f"of shape {expected} or .* got"),
        (normal(0, *shape), rf"of shape {expected} or .* got \(0, "),
        (torch.tensor(1.0).double(), rf"of shape {expected} or .* got \(\)"),
        (good.numpy(), "got ndarray"),
        (None, "got NoneType"),
        (good.float(), "of torch.float64 on cpu like the weight, got torch.float32"),
        (good.long(), "like the weight, got torch.int64"),
        (good.cfloat(), "like the weight, got torch.complex64"),
        (good.to("meta"), "on cpu like the weight, got torch.float64 on meta"),
        (good * math.nan, "NaN or Inf"),
        (torch.cat([good.flatten()[:-1], torch.tensor([math.inf]).double()]).view(shape), "NaN"),
    ]


@pytest.mark.parametrize(("x", "message"), bad_arrays(x_shape))
def test_bad_x_is_refused(x, message):
    op = ConvOperator(W, x_shape[1:])
    with pytest.raises(ValueError, match=f"x .*{message}|x, .*{message}"):
        op.matvec(x)
    with pytest.raises(ValueError, match=message):
        op.T.rmatvec(x)


@pytest.mark.parametrize(("y", "message"), bad_arrays(y_shape))
def test_bad_y_is_refused(y, message):
    op = ConvOperator(W, x_shape[1:])
    with pytest.raises(ValueError, match=f"y .*{message}|y, .*{message}"):
        op.rmatvec(y)


@pytest.mark.parametrize(
    "index", [(0, 0, 0), (0, 0, 0, 0, 0), (4, 0, 0, 0), (0, 2, 0, 0), (0, 0, 3, 0), (0, 0, 0, -1)]
)
def test_index_set_outside_the_weight_is_refused(index):
    with pytest.raises(ValueError, match=r"index into a weight of shape \(4, 2, 3, 3\), got \("):
        ConvOperator(W, 5).index_set(index)


@pytest.mark.parametrize("index", [(0, 0.9, 1.5, 0), "0000", (0, 0, "a", 0), 3, None])
def test_index_set_takes_integers_only(index):
    with pytest.raises(ValueError, match="expected an index into a weight of shape"):
        ConvOperator(W, 5).index_set(index)


# --- limits on memory -----------------------------------------------------------------------------


@pytest.mark.parametrize("transposed", [False, True])
def test_dense_over_the_limit_is_refused_before_anything_is_allocated(transposed):
    op = ConvOperator(normal(1, 1, 3, 3), 10**4, transposed=transposed)
    with (
        LargestTensor() as record,
        pytest.raises(ValueError, match=limit_message("dense", f"{8 * 10**16:,}")),
    ):
        op.to_dense()
    assert record.largest == 0


@pytest.mark.parametrize("transposed", [False, True])
def test_sparse_over_the_limit_is_refused_before_anything_is_allocated(transposed):
    op = ConvOperator(normal(1, 1, 3, 3), 10**5, transposed=transposed)
    with (
        LargestTensor() as record,
        pytest.raises(ValueError, match=limit_message("sparse", r"[\d,]+")),
    ):
        op.to_sparse()
    assert record.largest <= op.weight.nbytes


def test_limits_are_exact_and_can_be_moved():
    op = ConvOperator(normal(2, 3, 3), 5)
    needed = op.shape[0] * op.shape[1] * 8
    assert op.to_dense(max_bytes=needed).shape == op.shape
    with pytest.raises(ValueError, match=f"max_bytes=1,199 bytes, it would take {needed:,}; work"):
        op.to_dense(max_bytes=needed - 1)
    stored = 2 * 3 * 13
    assert op.to_sparse(max_bytes=16 * stored).nnz == stored
    with pytest.raises(ValueError, match=f"it would take {16 * stored:,}; .* raise max_bytes"):
        op.to_sparse(max_bytes=16 * stored - 1)


@pytest.mark.parametrize(
    ("shape", "size", "groups"),
    [((1, 1, 21), (500,), 1), ((2, 2, 9), (400,), 1), ((8, 8, 3, 3), (12, 12), 1)],
    ids=["1 axis", "1 axis, channels", "2 axes"],
)
def test_dense_takes_no_more_memory_than_it_says(shape, size, groups):
    """Twice M is promised, so no single array may be larger than M."""
    op = ConvOperator(normal(*shape), size, groups=groups)
    with LargestTensor() as record:
        matrix = op.to_dense()
    assert record.largest <= matrix.nbytes


def test_sparse_of_a_depthwise_layer_does_not_fill_in_the_other_groups():
    op = ConvOperator(normal(256, 1, 3, 3), (2, 2), groups=256)
    with LargestTensor() as record:
        sparse = op.to_sparse()
    assert sparse.nnz == 256 * 16
    assert record.largest <= 16 * sparse.nnz


# --- the checkers themselves ----------------------------------------------------------------------


class Spoiled(ConvOperator):
    """An operator whose answers are spoiled on the way out."""

    def __init__(self, spoil: str, change) -> None:
        super().__init__(normal(2, 1, 3), 5)
        inner = getattr(self, spoil)
        setattr(self, spoil, lambda *args: change(inner(*args)))


@pytest.mark.parametrize("form", ["matvec", "rmatvec"])
@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda a: a * (1 + 1e-9), "differ"),
        (lambda a: -a, "differ"),
        (lambda a: a.flip(-1), "differ"),
        (lambda a: a.float(), "dtype"),
        (lambda a: a[..., 1:], "shape"),
        (lambda a: a * math.nan, "NaN"),
    ],
)
def test_checkers_see_a_wrong_matvec(form, change, message):
    op = Spoiled(form, change)
    dense = ConvOperator(normal(2, 1, 3), 5).to_dense()
    with pytest.raises(AssertionError, match=message):
        assert_adjoint(op)
    with pytest.raises(AssertionError, match=rf"(T\.)?{form} .*{message}"):
        assert_matches_dense(op, dense)


@pytest.mark.parametrize("form", ["to_dense", "to_sparse"])
def test_checkers_see_a_wrong_view(form):
    op = Spoiled(form, lambda a: a * (1 + 1e-9))
    dense = ConvOperator(normal(2, 1, 3), 5).to_dense()
    with pytest.raises(AssertionError, match=rf"{form}\(\) differs from the dense matrix by"):
        assert_matches_dense(op, dense)


def test_checkers_see_a_wrong_dense_matrix():
    op = ConvOperator(normal(2, 1, 3), 5)
    with pytest.raises(AssertionError, match=r"to_dense\(\) differs"):
        assert_matches_dense(op, op.to_dense() + 1e-9)
    with pytest.raises(AssertionError, match=r"shape is \(10, 5\), expected \(5, 10\)"):
        assert_matches_dense(op, op.to_dense().T)
    with pytest.raises(AssertionError, match="rmatvec is not the adjoint of matvec: <Mx, y> = "):
        assert_adjoint(ConvOperator(normal(2, 1, 3), 5), rtol=-1.0)


def test_checkers_leave_the_global_generator_alone_and_take_another():
    op = ConvOperator(normal(2, 1, 3), 5)
    state = torch.get_rng_state()
    generator = torch.Generator().manual_seed(3)
    before = generator.get_state()
    naive_dense(nn.AvgPool1d(2), (1, 4))
    assert_adjoint(op)
    assert_adjoint(op, generator=generator)
    assert not torch.equal(generator.get_state(), before)
    assert_matches_dense(op, op.to_dense(), generator=generator)
    assert torch.equal(torch.get_rng_state(), state)


def test_naive_dense_refuses_what_is_not_affine():
    assert naive_dense(nn.BatchNorm1d(2).eval(), (2, 3)).shape == (6, 6)
    with pytest.raises(ValueError, match="affine in its input, got ReLU"):
        naive_dense(nn.ReLU(), (2, 3))
    with pytest.raises(ValueError, match="affine in its input, got BatchNorm1d"):
        naive_dense(nn.BatchNorm1d(2), (2, 3))


def test_naive_dense_has_a_limit():
    assert naive_dense(nn.Identity(), (4,), max_bytes=4 * 32).shape == (4, 4)
    with pytest.raises(ValueError, match="at most max_bytes=127 bytes, it would take 128"):
        naive_dense(nn.Identity(), (4,), max_bytes=127)
    with pytest.raises(ValueError, match="input_shape of positive integers"):
        naive_dense(nn.Identity(), (0,))


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
