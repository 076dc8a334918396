"""A layer's triplets from those of its blocks: merging, multiplicities, and zeros by structure."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import replace

import numpy as np
import pytest
import torch
from helpers.strategies import Layer, direct, layers, random
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from convspectra import ConvOperator
from convspectra.operator._blocks import independent_blocks
from convspectra.solvers._result import SingularTriplets
from convspectra.spectra import _block_triplets as assembly
from convspectra.spectra._auto import answer
from convspectra.spectra._block_triplets import layer_triplets
from convspectra.spectra._request import Request


def requesting(largest: bool, vectors: bool = True) -> Callable[[ConvOperator, int], Request]:
    generator = torch.Generator().manual_seed(0)
    return lambda op, k: Request(
        op, k, largest, not vectors, 1e-9, 400, generator, 2**30, separation=None
    )


def triplets(op: ConvOperator, k: int, largest: bool, *, vectors: bool = True):
    return layer_triplets(op, k, largest, vectors, "auto", requesting(largest, vectors))


def check(dense: Tensor, result: SingularTriplets, k: int, largest: bool) -> None:
    """All that `SingularTriplets` promises, against NumPy's SVD of the naive matrix."""
    rows, columns = dense.shape
    true = np.linalg.svd(dense.numpy(), compute_uv=False)
    scale, ordered = float(true[0]), true if largest else true[::-1]
    slack = 1e-13 * scale
    s, lower, upper = (x.numpy() for x in (result.s, result.lower, result.upper))
    assert s.shape == lower.shape == upper.shape == (k,)
    assert result.u.shape == (k, rows)
    assert result.v.shape == (k, columns)
    assert result.converged
    assert (np.diff(s) * (-1 if largest else 1) >= 0).all()
    assert np.abs(s - ordered[:k]).max() <= slack
    assert (lower <= ordered[:k] + slack).all()
    assert (ordered[:k] <= upper + slack).all()
    assert (lower <= s).all()
    assert (s <= upper).all()
    assert (upper - lower).max() <= 100 * slack
    if k < len(true):
        further = float(ordered[k])
        if largest:
            assert further - slack <= result.others
        else:
            assert result.others <= further + slack
    for x in (result.u, result.v):
        assert (x @ x.T - torch.eye(k, dtype=torch.float64)).abs().max() <= 1e-8
    forward = result.v @ dense.T - result.s[:, None] * result.u
    adjoint = result.u @ dense - result.s[:, None] * result.v
    assert forward.abs().max() <= 1e-7 * scale
    assert adjoint.abs().max() <= 1e-7 * scale


# --- all layers -----------------------------------------------------------------------------------


@given(layers(), st.integers(1, 6), st.booleans())
@settings(max_examples=120)
def test_triplets_of_any_layer(layer, k, largest):
    op, dense = direct(layer)
    if not dense.any():
        return
    k = min(k, *op.shape)
    check(dense, triplets(op, k, largest)[0], k, largest)


# --- zeros by structure ---------------------------------------------------------------------------

# Layer, and how many of its min(rows, columns) values are 0 whatever the weight is.
ZEROS = {
    # Of 8 points only 0, 4 are read; each gives 3 outputs from 1 channel, 4 more are left open.
    "unread inputs, more outputs": (
        Layer(random(6, 1, 1), (8,), {"stride": 4, "padding": 0}),
        6,
    ),
    "unread inputs, more outputs, 2 axes": (
        Layer(random(9, 1, 1, 2), (4, 4), {"stride": (2, 3), "padding": 0}),
        12,
    ),
    "even kernel, dilated, odd": (Layer(random(1, 1, 2), (7,), {"dilation": 2}), 1),
    "even kernel, dilated, odd, padding": (
        Layer(random(2, 2, 2), (7,), {"dilation": 2, "padding": 1}),
        2,
    ),
    "even kernel, dilated, odd, 2 axes": (
        Layer(random(1, 1, 2, 2), (5, 5), {"dilation": 2, "padding": 1}),
        None,
    ),
    "one tap, padded": (Layer(random(2, 2, 1), (3,), {"padding": 2}), 0),
    "outputs without inputs and inputs without outputs": (
        Layer(random(2, 2, 1), (5,), {"stride": 3, "padding": [(3, 2)]}),
        None,
    ),
    "groups": (Layer(random(12, 1, 1), (8,), {"stride": 4, "padding": 0, "groups": 2}), 12),
}
each_zero = pytest.mark.parametrize(("layer", "zeros"), ZEROS.values(), ids=ZEROS.keys())


def count_zeros(op: ConvOperator) -> int:
    """By the ranks of the blocks of a generic weight: a matching, done by a dense SVD."""
    generic = op.with_weight(random(*op.weight.shape, seed=77))
    values = np.linalg.svd(generic.to_dense().numpy(), compute_uv=False)
    return int((values <= 1e-12 * values[0]).sum())


def check_null(op: ConvOperator, dense: Tensor, zeros: int) -> None:
    for k in sorted({1, zeros, min(zeros + 2, *op.shape)}):
        result, _ = triplets(op, k, largest=False)
        check(dense, result, k, largest=False)
        exact = min(k, zeros)
        for x in (result.s, result.lower, result.upper):
            assert torch.equal(x[:exact], torch.zeros(exact, dtype=torch.float64))
        assert (result.s[exact:] > 0).all()
        scale = float(dense.norm())
        assert (result.v[:exact] @ dense.T).abs().max() <= 1e-8 * scale, "M v = 0"
        assert (result.u[:exact] @ dense).abs().max() <= 1e-8 * scale, "M' u = 0"
        assert "structure" in result.certificate


@each_zero
def test_zeros_by_structure_are_exact(layer, zeros):
    op, dense = direct(layer)
    found = count_zeros(op)
    assert zeros is None or found == zeros
    if found:
        check_null(op, dense, found)
    else:
        check(dense, triplets(op, 1, largest=False)[0], 1, largest=False)


@each_zero
def test_zeros_by_structure_of_the_transposed_layer(layer, zeros):
    """The same the other way round: the sides change places."""
    op, dense = direct(layer)
    found = count_zeros(op)
    result = triplets(op, max(1, found), largest=False)[0].transposed()
    check(dense.T.contiguous(), result, max(1, found), largest=False)


@each_zero
def test_all_triplets_with_the_zeros_last(layer, zeros):
    op, dense = direct(layer)
    count = min(op.shape)
    for k in {count, count - 1}:
        result, _ = triplets(op, k, largest=True)
        check(dense, result, k, largest=True)
    found = count_zeros(op)
    result, _ = triplets(op, count, largest=True)
    assert torch.equal(result.s[count - found :], torch.zeros(found, dtype=torch.float64))
    assert result.others == 0.0


@each_zero
def test_values_only(layer, zeros):
    op, dense = direct(layer)
    count = min(op.shape)
    true = np.linalg.svd(dense.numpy(), compute_uv=False)
    for largest in (True, False):
        result, _ = triplets(op, count, largest, vectors=False)
        ordered = true if largest else true[::-1]
        assert np.abs(result.s.numpy() - ordered).max() <= 1e-12 * true[0]


def test_nothing_but_zeros():
    """Every output reads padding: no block at all."""
    op = ConvOperator(random(2, 2, 1), 3, stride=4, padding=[(1, 0)])
    assert independent_blocks(op) == []
    for largest in (True, False):
        result, way = triplets(op, 2, largest)
        assert way == "structure"
        assert torch.equal(result.s, torch.zeros(2, dtype=torch.float64))
        identity = torch.eye(2, dtype=torch.float64)
        assert torch.equal(result.u @ result.u.T, identity)
        assert torch.equal(result.v @ result.v.T, identity)
        assert result.upper.max() == 0


def test_null_vectors_that_did_not_converge_are_not_passed_off_as_converged(monkeypatch):
    """1 -1 on 401 points, every other one: too large to be dense, and LOBPCG takes some steps."""
    layer = Layer(torch.tensor([[[1.0, -1.0]]]).double(), (801,), {"dilation": 2})
    op, dense = direct(layer)
    # No option reaches these steps.
    monkeypatch.setattr(assembly, "NULL_VECTOR_STEPS", 3)
    result, _ = triplets(op, 1, largest=False)
    assert torch.equal(result.s, torch.zeros(1, dtype=torch.float64))
    assert float((result.v @ dense.T).norm()) > 1e-6
    assert not result.converged


def test_only_zeros_take_no_search():
    op, _ = direct(ZEROS["unread inputs, more outputs"][0])
    result, way = triplets(op, 3, largest=False, vectors=False)
    assert way == "structure"
    assert result.matvecs == 0
    assert result.others == 0.0, "there are more zeros"


# --- merging --------------------------------------------------------------------------------------


@pytest.mark.parametrize("largest", [True, False], ids=["largest", "smallest"])
def test_equal_blocks_share_one_search(largest):
    """Four equal blocks: every value four times, from a quarter of the searches."""
    layer = Layer(random(2, 2, 3, 3), (6, 6), {"dilation": 2})
    op, dense = direct(layer)
    asked = []
    request = requesting(largest)

    def counting(block: ConvOperator, k: int) -> Request:
        asked.append((block.shape, k))
        return request(block, k)

    for k in (1, 4, 5, 8):
        asked.clear()
        result, way = layer_triplets(op, k, largest, True, "auto", counting)
        assert asked == [((18, 18), math.ceil(k / 4))]
        assert way == "dense"
        check(dense, result, k, largest)
        assert torch.equal(result.s, result.s[torch.arange(k) // 4 * 4])


@pytest.mark.parametrize("largest", [True, False], ids=["largest", "smallest"])
def test_blocks_of_unlike_sizes_are_merged_in_order(largest):
    layer = Layer(random(2, 2, 3), (9,), {"dilation": 2})
    op, dense = direct(layer)
    assert len(independent_blocks(op)) == 2
    for k in (1, 2, 3, 7, 18):
        check(dense, triplets(op, k, largest)[0], k, largest)


# Values, lower and upper bounds of a block of 3 and one of 4 points, made up.
SCRIPT = {
    3: ([3.0, 2.0], [2.9, 1.0], [3.5, 2.6]),
    4: ([2.5, 1.0], [2.4, 0.9], [2.8, 2.2]),
}


def scripted_answer(request: Request, method: str) -> tuple[SingularTriplets, str]:
    """An answer whose enclosures are known: wide, and out of order between the blocks."""
    points = request.op.input_shape[1]
    s, lower, upper = (
        torch.tensor(sorted(x, reverse=request.largest)[: request.k], dtype=torch.float64)
        for x in SCRIPT[points]
    )
    vectors = torch.eye(points, dtype=torch.float64)[: request.k]
    result = SingularTriplets(
        u=vectors,
        s=s,
        v=vectors,
        lower=lower,
        upper=upper,
        others={3: 1.9, 4: 0.8}[points] if request.largest else {3: 0.5, 4: 0.6}[points],
        converged=points == 3 or request.k == 1,
        matvecs=points,
        certificate=f"block of {points}",
    )
    return result, f"way {points}"


@pytest.fixture
def scripted(monkeypatch):
    """The triplets that the made-up answers give."""
    monkeypatch.setattr(assembly, "answer", scripted_answer)
    op = ConvOperator(random(1, 1, 3), 7, dilation=2)
    assert sorted(b.op.input_shape[1] for b in independent_blocks(op)) == [3, 4]
    return lambda k, largest: layer_triplets(op, k, largest, True, "auto", requesting(largest))


def test_enclosures_are_those_of_the_rank_and_not_of_the_block(scripted):
    """The i-th largest lower bound is below the i-th largest value; the same for the upper ones."""
    result, way = scripted(2, largest=True)
    assert way == "way 3+way 4"
    assert result.s.tolist() == [3.0, 2.5]
    assert result.lower.tolist() == [2.9, 2.4]
    assert result.upper.tolist() == [3.5, 2.8]
    # Not given are 2.0 and 1.0 with upper bounds 2.6 and 2.2, and what the blocks did not give.
    assert result.others == 2.6
    assert result.matvecs == 7
    assert not result.converged, "one of the blocks has not"
    assert result.certificate.split("; ") in (
        ["block of 3", "block of 4"],
        ["block of 4", "block of 3"],
    )


def test_enclosures_of_the_smallest(scripted):
    result, _ = scripted(2, largest=False)
    assert result.s.tolist() == [1.0, 2.0]
    assert result.lower.tolist() == [0.9, 1.0]
    assert result.upper.tolist() == [2.2, 2.6]
    assert result.others == 0.5


def test_others_with_one_value_from_each_block(scripted):
    largest, _ = scripted(1, largest=True)
    assert largest.s.tolist() == [3.0]
    assert largest.upper.tolist() == [3.5]
    assert largest.others == 2.8
    assert largest.converged
    smallest, _ = scripted(1, largest=False)
    assert smallest.s.tolist() == [1.0]
    assert smallest.lower.tolist() == [0.9]
    assert smallest.others == 0.5


def test_nothing_is_left_beyond_the_last():
    layer = Layer(random(1, 1, 3), (7,), {"dilation": 2})
    op, dense = direct(layer)
    for largest, rest in ((True, 0.0), (False, math.inf)):
        result, _ = triplets(op, 7, largest)
        check(dense, result, 7, largest)
        assert result.others == rest


def test_a_single_block_is_passed_on_as_it_is():
    op = ConvOperator(random(2, 2, 3), 7)
    result, way = triplets(op, 2, largest=True)
    alone, _ = answer(requesting(True)(independent_blocks(op)[0].op, 2), "auto")
    assert way == "dense"
    assert torch.equal(result.u, alone.u)
    assert result.others == alone.others


def test_a_method_that_fits_no_block_is_refused():
    op = ConvOperator(random(3, 2, 3), 7)
    for method, expected in (
        (
            "capacitance",
            "expected a square layer with zero padding and N = stride N_out on every axis",
        ),
        ("circulant", "expected a layer with circular padding all around"),
    ):
        with pytest.raises(ValueError, match=rf"{expected} for method='{method}', got ConvOp"):
            layer_triplets(op, 1, False, True, method, requesting(False))


def test_transposed_changes_sides():
    result, _ = triplets(ConvOperator(random(2, 3, 3), 7), 2, largest=True)
    other = result.transposed()
    assert other.u is result.v
    assert other.v is result.u
    assert replace(other, u=result.u, v=result.v) == result
