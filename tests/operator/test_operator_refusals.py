"""What ConvOperator refuses, and its limits on memory."""

from __future__ import annotations

import math

import pytest
import torch
from helpers.strategies import random
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode

from convspectra import ConvOperator


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


# --- bad input ------------------------------------------------------------------------------------


W = random(4, 2, 3, 3)
BAD_WEIGHTS = [
    (W.tolist(), "expected weight to be a torch.Tensor, got list"),
    (W.long().numpy(), "expected weight of a real floating type, got int64"),
    (W.numpy().astype("g"), "expected weight of a real floating type, got float128|longdouble"),
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
        ConvOperator(random(4, 2), **{"input_size": (), **change})


x_shape, y_shape = (2, 5, 4), (4, 5, 4)


def bad_arrays(shape: tuple[int, ...]) -> list[tuple[object, str]]:
    good = random(*shape)
    expected = rf"\({', '.join(map(str, shape))}\)"
    return [
        (random(shape[0] + 1, *shape[1:]), f"of shape {expected} or .* got"),
        (random(3, shape[0] + 1, *shape[1:]), f"of shape {expected} or .* got"),
        (random(1, *shape[1:]), f"of shape {expected} or .* got"),
        (good.transpose(1, 2), f"of shape {expected} or .* got"),
        (good.flatten()[:-1], f"of shape {expected} or .* got"),
        (good[0], f"of shape {expected} or .* got"),
        (good[None, None], f"of shape {expected} or .* got"),
        (random(0, *shape), rf"of shape {expected} or .* got \(0, "),
        (torch.tensor(1.0).double(), rf"of shape {expected} or .* got \(\)"),
        (good.numpy()[:, :1], f"of shape {expected} or .* got"),
        (good.cfloat().numpy(), "of a real floating type, got complex64"),
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
    op = ConvOperator(random(1, 1, 3, 3), 10**4, transposed=transposed)
    with (
        LargestTensor() as record,
        pytest.raises(ValueError, match=limit_message("dense", f"{8 * 10**16:,}")),
    ):
        op.to_dense()
    assert record.largest == 0


@pytest.mark.parametrize("transposed", [False, True])
def test_sparse_over_the_limit_is_refused_before_anything_is_allocated(transposed):
    op = ConvOperator(random(1, 1, 3, 3), 10**5, transposed=transposed)
    with (
        LargestTensor() as record,
        pytest.raises(ValueError, match=limit_message("sparse", r"[\d,]+")),
    ):
        op.to_sparse()
    assert record.largest <= op.weight.nbytes


def test_limits_are_exact_and_can_be_moved():
    op = ConvOperator(random(2, 3, 3), 5)
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
    op = ConvOperator(random(*shape), size, groups=groups)
    with LargestTensor() as record:
        matrix = op.to_dense()
    assert record.largest <= matrix.nbytes


def test_sparse_of_a_depthwise_layer_does_not_fill_in_the_other_groups():
    op = ConvOperator(random(256, 1, 3, 3), (2, 2), groups=256)
    with LargestTensor() as record:
        sparse = op.to_sparse()
    assert sparse.nnz == 256 * 16
    assert record.largest <= 16 * sparse.nnz
