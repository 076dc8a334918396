"""The embedding in a circulant, and what it tells, against the naive matrix."""

from __future__ import annotations

import math

import pytest
import torch
from helpers.strategies import Layer, random
from helpers.tori import each_circular, embedded
from hypothesis import assume, given, settings
from hypothesis import strategies as st
from torch import Tensor

from convspectra import ConvOperator
from convspectra.operator._structure import has_embedding, is_circulant
from convspectra.spectra.ways._circulant import circulant_triplets
from convspectra.torus._embedding import CirculantEmbedding

# --- which layers ---------------------------------------------------------------------------------


@each_circular
def test_circular_layers_are_admitted(layer):
    assert is_circulant(layer.operator())
    assert has_embedding(layer.operator())


W = random(2, 2, 3)
REFUSED = {
    "zeros": (ConvOperator(W, 5), True),
    "reflect": (ConvOperator(W, 5, padding_mode="reflect"), False),
    "replicate": (ConvOperator(W, 5, padding_mode="replicate"), False),
    "more outputs": (ConvOperator(W, 5, padding=2, padding_mode="circular"), False),
    "fewer outputs": (ConvOperator(W, 5, padding=0, padding_mode="circular"), False),
    "a stride that does not divide": (
        ConvOperator(W, 5, stride=2, padding=1, padding_mode="circular"),
        False,
    ),
    "linear": (ConvOperator(random(3, 3), ()), False),
}


@pytest.mark.parametrize(("op", "embeddable"), REFUSED.values(), ids=REFUSED.keys())
def test_other_layers_are_not_circulants(op, embeddable):
    assert not is_circulant(op)
    assert has_embedding(op) is embeddable


# --- the embedding --------------------------------------------------------------------------------


def check_embedding(op: ConvOperator, dense: Tensor) -> None:
    embedding = CirculantEmbedding(op)
    symbols = embedding.symbols()
    x, y = random(2, *op.input_shape), random(2, *op.output_shape, seed=1)
    image = embedding.restrict_output(embedding.multiply(symbols, embedding.embed_input(x)))
    back = embedding.restrict_input(embedding.multiply(symbols.mH, embedding.embed_output(y)))
    scale = float(op.weight.norm())
    assert image.shape == y.shape
    assert back.shape == x.shape
    assert (image.flatten(1) - x.flatten(1) @ dense.T).abs().max() <= 1e-12 * scale
    assert (back.flatten(1) - y.flatten(1) @ dense).abs().max() <= 1e-12 * scale


@given(embedded())
@settings(max_examples=120)
def test_the_circulant_acts_on_the_layer_s_points_as_the_layer(drawn):
    check_embedding(*drawn)


@each_circular
def test_circular_layers_are_their_circulants(layer):
    check_embedding(layer.operator(), layer.dense().detach())


@given(embedded())
@settings(max_examples=60)
def test_restriction_is_the_adjoint_of_embedding(drawn):
    op, _ = drawn
    embedding = CirculantEmbedding(op)
    for embed, restrict, shape in (
        (embedding.embed_input, embedding.restrict_input, op.input_shape),
        (embedding.embed_output, embedding.restrict_output, op.output_shape),
    ):
        x = random(2, *shape)
        large = embed(x)
        assert large.shape[3:] == embedding.periods
        z = random(*large.shape, seed=1)
        assert torch.isclose((large * z).sum(), (x * restrict(z)).sum(), rtol=1e-12, atol=1e-12)
        assert torch.equal(restrict(large), x)


# --- triplets -------------------------------------------------------------------------------------


def check_triplets(layer: Layer, k: int, largest: bool) -> None:
    op, dense = layer.operator(), layer.dense().detach()
    result = circulant_triplets(op, k, largest)
    true = torch.linalg.svdvals(dense)
    scale = float(true[0])
    ordered = true if largest else true.flip(0)
    assert (result.s - ordered[:k]).abs().max() <= 1e-13 * scale
    slack = 1e-15 * scale * max(dense.shape)
    assert (result.lower <= ordered[:k] + slack).all()
    assert (result.upper >= ordered[:k] - slack).all()
    assert (result.lower <= result.s).all()
    assert (result.s <= result.upper).all()
    assert (result.upper - result.lower).max() <= 1e-12 * scale
    if k < len(ordered):
        assert abs(result.others - float(ordered[k])) <= 1e-12 * scale
    else:
        assert result.others == (0.0 if largest else math.inf)
    assert result.u.dtype == result.v.dtype == torch.float64
    identity = torch.eye(k, dtype=torch.float64)
    assert (result.u @ result.u.T - identity).abs().max() <= 1e-10
    assert (result.v @ result.v.T - identity).abs().max() <= 1e-10
    forward = result.v @ dense.T - result.s[:, None] * result.u
    adjoint = result.u @ dense - result.s[:, None] * result.v
    assert forward.abs().max() <= 1e-12 * scale
    assert adjoint.abs().max() <= 1e-12 * scale
    assert result.converged


@pytest.mark.parametrize("largest", [True, False], ids=["largest", "smallest"])
@each_circular
def test_triplets_of_circular_layers(layer, largest):
    count = min(layer.operator().shape)
    for k in sorted({1, 2, min(3, count), count}):
        check_triplets(layer, min(k, count), largest)


@pytest.mark.parametrize("largest", [True, False], ids=["largest", "smallest"])
def test_triplets_of_repeated_values(largest):
    """The 4-fold symmetric kernel: up to eight frequencies share one value."""
    weight = torch.tensor([[0.5, 1, 0.5], [1, 3.0, 1], [0.5, 1, 0.5]]).double()[None, None]
    check_triplets(Layer(weight, (6, 6), {"padding_mode": "circular"}), 36, largest)
    identity = torch.eye(2, dtype=torch.float64)[:, :, None]
    for k in (1, 3, 10):
        check_triplets(Layer(identity, (5,), {"padding_mode": "circular"}), k, largest)


@given(st.data())
@settings(max_examples=60)
def test_triplets_of_any_circular_layer(data):
    ndim = data.draw(st.integers(1, 3))
    stride, pads, size, taps, dilation = [], [], [], [], []
    for _ in range(ndim):
        s = data.draw(st.integers(1, 2))
        outputs = data.draw(st.integers(1, {1: 9, 2: 4, 3: 2}[ndim]))
        k, d = data.draw(st.integers(1, 4)), data.draw(st.integers(1, 2))
        # s outputs - (s - 1) .. s outputs points hold the kernel's last reach.
        total = d * (k - 1) + 1 - s
        assume(0 <= total <= 2 * s * outputs)
        before = data.draw(st.integers(max(0, total - s * outputs), min(total, s * outputs)))
        stride.append(s)
        pads.append((before, total - before))
        size.append(s * outputs)
        taps.append(k)
        dilation.append(d)
    groups = data.draw(st.integers(1, 2))
    h, g = data.draw(st.integers(1, 3)), data.draw(st.integers(1, 3))
    weight = random(groups * h, g, *taps, seed=data.draw(st.integers(0, 999)))
    options = {"stride": tuple(stride), "padding": pads, "dilation": tuple(dilation)}
    layer = Layer(weight, tuple(size), {**options, "groups": groups, "padding_mode": "circular"})
    assert is_circulant(layer.operator())
    count = min(layer.operator().shape)
    check_triplets(layer, data.draw(st.integers(1, count)), data.draw(st.booleans()))
