"""The integers of a convolution, against PyTorch's own padding and against naive loops."""

from __future__ import annotations

import itertools
import math

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from helpers.strategies import MODES, Layer, layers
from hypothesis import given, settings
from hypothesis import strategies as st

from convspectra.operator._geometry import (
    ConvGeometry,
    conv_geometry,
    resolve_padding,
    transposed_geometry,
)


@st.composite
def axes(draw: st.DrawFn, modes: tuple[str, ...] = MODES) -> tuple:
    """One axis: (n, k, stride, dilation, (before, after), mode)."""
    k, stride, dilation = (draw(st.integers(1, most)) for most in (6, 7, 4))
    pads = draw(st.integers(0, 6)), draw(st.integers(0, 6))
    mode = draw(st.sampled_from(modes))
    margin = {"circular": 0, "reflect": 1}
    least = max(1, dilation * (k - 1) + 1 - sum(pads))
    if mode in margin:
        least = max(least, max(pads) + margin[mode])
    return draw(st.integers(least, least + 9)), k, stride, dilation, pads, mode


def one_axis(axis: tuple) -> ConvGeometry:
    n, k, stride, dilation, pads, mode = axis
    return conv_geometry(
        (n,), (k,), stride=stride, dilation=dilation, padding=(pads,), padding_mode=mode
    )


def naive_sources(axis: tuple) -> list[list[int]]:
    """Pad the labels 1..n as PyTorch pads an image, then read them tap by tap; 0 is a zero."""
    n, k, stride, dilation, pads, mode = axis
    labels = torch.arange(1.0, n + 1).reshape(1, 1, n)
    padded = F.pad(labels, pads, mode="constant" if mode == "zeros" else mode).flatten().tolist()
    outputs = [r for r in range(0, len(padded), stride) if r + dilation * (k - 1) < len(padded)]
    return [[int(padded[r + p * dilation]) - 1 for r in outputs] for p in range(k)]


@given(axes())
def test_tap_sources_are_the_pixels_that_pytorch_reads(axis):
    geometry = one_axis(axis)
    expected = naive_sources(axis)
    assert geometry.output_size == (len(expected[0]),)
    assert geometry.tap_sources(0).tolist() == expected


@given(axes())
def test_padded_sources_are_pytorchs_padding(axis):
    n, _, _, _, pads, mode = axis
    labels = torch.arange(1.0, n + 1).reshape(1, 1, n)
    padded = F.pad(labels, pads, mode="constant" if mode == "zeros" else mode).flatten()
    assert one_axis(axis).padded_sources(0).tolist() == (padded.long() - 1).tolist()


@given(axes(modes=("zeros",)))
def test_tap_counts_follow_the_papers_formula(axis):
    n, k, stride, dilation, (before, _), _ = axis
    geometry = one_axis(axis)
    expected = [
        sum(0 <= r * stride + p * dilation - before < n for r in range(geometry.output_size[0]))
        for p in range(k)
    ]
    assert geometry.tap_counts().tolist() == expected
    assert geometry.tap_gram(0).tolist() == np.diag(expected).tolist()


@given(axes(modes=("circular", "reflect", "replicate")))
def test_every_tap_reads_a_pixel_for_every_output_unless_padding_is_zero(axis):
    geometry = one_axis(axis)
    assert (geometry.tap_counts() == geometry.output_size[0]).all()


@given(axes())
def test_tap_gram_counts_common_reads(axis):
    sources = naive_sources(axis)
    expected = [
        [sum(a == b >= 0 for a, b in zip(first, second, strict=True)) for second in sources]
        for first in sources
    ]
    assert one_axis(axis).tap_gram(0).tolist() == expected


def tap_matrices(axis: tuple) -> np.ndarray:
    """The 0/1 matrices S_p of one axis, (k, outputs, n), from PyTorch's padding."""
    n, sources = axis[0], naive_sources(axis)
    matrices = np.zeros((len(sources), len(sources[0]), n), dtype=np.int64)
    for p, row in enumerate(sources):
        for r, source in enumerate(row):
            if source >= 0:
                matrices[p, r, source] = 1
    return matrices


@given(axes())
def test_tap_product_gram_is_that_of_explicit_matrices(axis):
    taps = tap_matrices(axis)
    products = np.einsum("pra,qrb->pqab", taps, taps).reshape(len(taps) ** 2, -1)
    gram = one_axis(axis).tap_product_gram(0)
    assert gram.dtype == np.int64
    assert gram.tolist() == (products @ products.T).tolist()


@given(layers())
def test_tap_product_gram_gives_the_norm_of_the_naive_gram_matrix(layer: Layer):
    """||M'M||_F^2, or ||M M'||_F^2 for a transposed layer, as a form in the products of taps."""
    geometry = layer.operator().geometry
    k = geometry.kernel_size
    gram = np.ones((1, 1))
    for axis in range(geometry.ndim):
        gram = np.kron(gram, geometry.tap_product_gram(axis))
    # (p_1, q_1, p_2, q_2, ...) from (p_1, p_2, ..., q_1, q_2, ...).
    order = [i + part * len(k) for i in range(len(k)) for part in (0, 1)]
    taps = layer.weight.reshape(*layer.weight.shape[:2], -1).numpy()
    expected = 0.0
    dense = layer.dense().detach()
    dense = dense.T if layer.options.get("transposed") else dense
    for group in np.split(taps, layer.options.get("groups", 1)):
        products = np.einsum("oap,obq->abpq", group, group)
        products = products.reshape(*products.shape[:2], *k, *k)
        products = products.transpose(0, 1, *(2 + i for i in order)).reshape(-1, len(gram))
        expected += np.einsum("xp,pq,xq->", products, gram, products)
    assert float((dense.T @ dense).square().sum()) == pytest.approx(expected, rel=1e-11)


def test_tap_product_gram_where_nothing_is_read():
    geometry = conv_geometry((1,), (2,), padding=2, dilation=3)
    assert geometry.tap_product_gram(0).tolist() == np.zeros((4, 4)).tolist()


@given(axes())
def test_index_set_of_one_axis(axis):
    geometry = one_axis(axis)
    for p, sources in enumerate(naive_sources(axis)):
        rows, columns = geometry.index_set((p,))
        assert list(zip(rows.tolist(), columns.tolist(), strict=True)) == [
            (r, source) for r, source in enumerate(sources) if source >= 0
        ]


@given(st.tuples(axes(), axes()) | st.tuples(axes(), axes(), axes()))
@settings(max_examples=60)
def test_several_axes_are_the_product_of_their_axes(several):
    sizes, kernel, stride, dilation, pads, _ = zip(*several, strict=True)
    mode = "replicate" if any(a[5] != "zeros" for a in several) else "zeros"
    geometry = conv_geometry(
        sizes, kernel, stride=stride, dilation=dilation, padding=pads, padding_mode=mode
    )
    sources = [naive_sources((*axis[:5], mode)) for axis in several]
    counts = geometry.tap_counts()
    assert counts.shape == kernel
    for tap in itertools.islice(itertools.product(*map(range, kernel)), 12):
        expected = set()
        outputs = [range(n) for n in geometry.output_size]
        for number, output in enumerate(itertools.product(*outputs)):
            pixel = [s[p][r] for s, p, r in zip(sources, tap, output, strict=True)]
            if min(pixel) >= 0:
                expected.add((number, int(np.ravel_multi_index(pixel, sizes))))
        rows, columns = geometry.index_set(tap)
        assert rows.tolist() == sorted(rows)
        assert set(zip(rows.tolist(), columns.tolist(), strict=True)) == expected
        assert len(rows) == counts[tap] == len(expected)


@given(layers())
def test_tap_gram_gives_the_frobenius_norm_of_the_naive_matrix(layer: Layer):
    geometry = layer.operator().geometry
    gram = np.ones((1, 1))
    for axis in range(geometry.ndim):
        gram = np.kron(gram, geometry.tap_gram(axis))
    taps = layer.weight.flatten(2).numpy() if geometry.ndim else layer.weight[..., None].numpy()
    expected = float(layer.dense().detach().square().sum())
    assert np.einsum("oip,pq,oiq->", taps, gram, taps) == pytest.approx(expected, rel=1e-12)
    if geometry.padding_mode == "zeros":
        energy = np.square(taps).sum((0, 1)).reshape(geometry.kernel_size)
        assert (geometry.tap_counts() * energy).sum() == pytest.approx(expected, rel=1e-12)


@pytest.mark.parametrize("k", range(1, 8))
def test_same_padding_is_the_papers_for_odd_and_even_kernels(k):
    m = math.ceil(k / 2)
    assert resolve_padding("same", (k,), (1,), (1,)) == ((m - 1, k - m),)
    assert conv_geometry((9,), (k,), padding="same").output_size == (9,)


@pytest.mark.parametrize(
    ("padding", "expected"),
    [
        (2, ((2, 2), (2, 2))),
        ((1, 0), ((1, 1), (0, 0))),
        ([1, 0], ((1, 1), (0, 0))),
        ("valid", ((0, 0), (0, 0))),
        ("same", ((3, 3), (1, 2))),
        ([(1, 2), (0, 3)], ((1, 2), (0, 3))),
        (([1, 2], (0, 3)), ((1, 2), (0, 3))),
        (np.int64(2), ((2, 2), (2, 2))),
    ],
)
def test_forms_of_padding(padding, expected):
    assert resolve_padding(padding, (3, 4), (1, 1), (3, 1)) == expected


def test_geometry_is_a_value():
    geometry = conv_geometry([5, 6], [3, 2], padding=1)
    assert geometry == conv_geometry((5, 6), (3, 2), padding=((1, 1), (1, 1)))
    assert hash(geometry) == hash(conv_geometry((5, 6), (3, 2), padding=(1, 1)))
    assert geometry.ndim == 2
    assert conv_geometry((9,), (3,), dilation=4).reach == (9,)
    with pytest.raises(AttributeError, match="cannot assign"):
        geometry.stride = (2, 2)


def test_tables_are_integers_without_torch():
    geometry = conv_geometry((5, 4), (3, 2), stride=2, padding=1)
    for table in (
        geometry.padded_sources(0),
        geometry.tap_sources(1),
        geometry.tap_gram(0),
        geometry.tap_counts(),
        *geometry.index_set((0, 1)),
    ):
        assert table.dtype == np.int64


@given(st.data())
def test_transposed_geometry_has_pytorchs_output_size(data):
    draw = data.draw
    k, stride, dilation, n = (draw(st.integers(1, most)) for most in (5, 4, 5, 6))
    padding = draw(st.integers(0, 4))
    extra = draw(st.integers(0, max(stride, dilation) - 1))
    conv = torch.nn.ConvTranspose1d(1, 1, k, stride, padding, extra, 1, False, dilation)
    expected = (n - 1) * stride - 2 * padding + dilation * (k - 1) + extra + 1
    options = {"stride": stride, "padding": padding, "dilation": dilation, "output_padding": extra}
    if expected < 1:
        with pytest.raises(ValueError, match="empty output on axis 0"):
            transposed_geometry((n,), (k,), **options)
        return
    geometry = transposed_geometry((n,), (k,), **options)
    assert geometry.input_size == (expected,)
    assert geometry.input_size == tuple(conv(torch.zeros(1, 1, n)).shape[2:])
    assert geometry.output_size == (n,)


SAME = "with padding='same'"
BAD_CONV = [
    ({"input_size": (5,)}, "expected 2 integers for input_size.*got"),
    ({"input_size": (5, 0)}, r"integers >= 1 for input_size, got \(5, 0\)"),
    ({"input_size": (5, -1)}, "integers >= 1 for input_size"),
    ({"input_size": (5, 5.0)}, "integers >= 1 for input_size"),
    ({"input_size": (5, True)}, "integers >= 1 for input_size"),
    ({"input_size": "55"}, "integers for input_size"),
    ({"kernel_size": (3, 0)}, "integers >= 1 for kernel_size"),
    ({"stride": 0}, "integers >= 1 for stride, got 0"),
    ({"stride": (1, 2, 3)}, "expected 2 integers for stride"),
    ({"stride": True}, "integers >= 1 for stride, got True"),
    ({"stride": 1.0}, "integers >= 1 for stride, got 1.0"),
    ({"stride": None}, "integers >= 1 for stride, got None"),
    ({"stride": "2"}, "integers for stride"),
    ({"dilation": 0}, "integers >= 1 for dilation"),
    ({"dilation": -2}, "integers >= 1 for dilation, got -2"),
    ({"padding": -1}, "integers >= 0 for padding, got -1"),
    ({"padding": 0.5}, "integers >= 0 for padding, got 0.5"),
    ({"padding": True}, "integers >= 0 for padding"),
    ({"padding": None}, "integers >= 0 for padding"),
    ({"padding": (1,)}, "expected 2 integers for padding"),
    ({"padding": ()}, "expected 2 integers for padding"),
    ({"padding": (1, 2, 3, 4)}, "expected 2 integers for padding"),
    ({"padding": [(1, 2)]}, r"expected 2 \(before, after\) pairs"),
    ({"padding": [(1, 2), 3]}, r"expected 2 \(before, after\) pairs"),
    ({"padding": [(1, 2), (3, 4, 5)]}, r"expected 2 \(before, after\) pairs"),
    ({"padding": [(1, 2), (3, -1)]}, "integers >= 0 for padding"),
    ({"padding": ("sa", "me")}, "for padding"),
    ({"padding": np.array([1, 1])}, "integers >= 0 for padding"),
    ({"padding": "smae"}, "'same', 'valid'.*got 'smae'"),
    ({"padding": "SAME"}, "'same', 'valid'.*got 'SAME'"),
    ({"padding": "same", "stride": 2}, "expected stride 1 " + SAME),
    ({"padding": "same", "stride": (1, 2)}, "expected stride 1 " + SAME),
    ({"padding_mode": "zero"}, "expected padding_mode in .*got 'zero'"),
    ({"padding_mode": "constant"}, "expected padding_mode in"),
    ({"padding_mode": None}, "expected padding_mode in .*got None"),
    ({"kernel_size": (3, 9), "padding": 1}, r"on axis 1: expected .* <= 8 \(input 6.*got 9"),
    ({"dilation": 3, "padding": 0}, "reaches past the padded input on axis 0.* <= 5 .*got 7"),
    ({"padding": 5, "padding_mode": "reflect"}, "reflect padding of at most 4 on axis 0 of size 5"),
    ({"padding": 6, "padding_mode": "circular"}, "circular padding of at most 5 on axis 0"),
    ({"padding": ((0, 0), (0, 6)), "padding_mode": "reflect"}, "at most 5 on axis 1 of size 6"),
    ({"padding": ((0, 0), (7, 0)), "padding_mode": "circular"}, "at most 6 on axis 1 of size 6"),
]


@pytest.mark.parametrize(("change", "message"), BAD_CONV)
def test_bad_convolutions_are_refused(change, message):
    options = {"input_size": (5, 6), "kernel_size": (3, 3), **change}
    with pytest.raises(ValueError, match=message):
        conv_geometry(**options)


@pytest.mark.parametrize("mode", ["circular", "reflect"])
@pytest.mark.parametrize("pads", [(0, 5), (5, 0), (4, 4), (5, 5), (6, 0), (0, 6)])
def test_wide_padding_is_refused_exactly_where_pytorch_refuses_it(mode, pads):
    try:
        F.pad(torch.zeros(1, 1, 5), pads, mode=mode)
    except RuntimeError:
        with pytest.raises(ValueError, match=f"expected {mode} padding of at most"):
            conv_geometry((5,), (2,), padding=(pads,), padding_mode=mode)
    else:
        conv_geometry((5,), (2,), padding=(pads,), padding_mode=mode)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"padding_mode": "circular"}, "expected padding_mode='zeros' for a transposed"),
        ({"output_padding": 1}, r"output_padding < max\(stride, dilation\) = 1 on axis 0, got 1"),
        ({"output_padding": (2, 3), "stride": 3}, r"= 3 on axis 1, got 3"),
        ({"output_padding": -1}, "integers >= 0 for output_padding, got -1"),
        ({"output_padding": 0.0}, "integers >= 0 for output_padding"),
        ({"output_padding": (0,)}, "expected 2 integers for output_padding"),
        ({"padding": 4}, r"empty output on axis 0: expected .* > 8 \(its padding\), got 7"),
        ({"padding": ((0, 0), (9, 9))}, "empty output on axis 1"),
        ({"stride": 0}, "integers >= 1 for stride"),
        ({"input_size": (0, 5)}, "integers >= 1 for input_size"),
        ({"padding": "same", "stride": 2}, "expected stride 1 " + SAME),
        ({"padding": "sane"}, "got 'sane'"),
    ],
)
def test_bad_transposed_convolutions_are_refused(change, message):
    options = {"input_size": (5, 6), "kernel_size": (3, 3), **change}
    with pytest.raises(ValueError, match=message):
        transposed_geometry(**options)
