"""Tests of `convspectra.matlab` against printed MATLAB values and a floating-point reference."""

from __future__ import annotations

import math
from itertools import islice

import numpy as np
import pytest
from hypothesis import example, given, settings
from hypothesis import strategies as st

from convspectra.matlab import _masked, rand

# What MATLAB prints in format long after rand('state', 0), and in format short after
# rand('state', 1).
# fmt: off
STATE_0 = [
    0.95012928514718, 0.23113851357429, 0.60684258354179, 0.48598246870930, 0.89129896614890,
    0.76209683302739, 0.45646766516834, 0.01850364324822, 0.82140716429525, 0.44470336435319,
    0.61543234810009, 0.79193703742704, 0.92181297074480, 0.73820724581067, 0.17626614449462,
    0.40570621306210, 0.93546969910761, 0.91690443991341, 0.41027020699095, 0.89364953091353,
]
STATE_1 = [0.9528, 0.7041, 0.9539, 0.5982, 0.8407, 0.4428, 0.8368, 0.5187, 0.0222, 0.3759]
# fmt: on

STATES = st.integers(0, 2**32 - 1)


def _shift(j):
    j ^= (j * 2**13) % 2**32
    j ^= j // 2**17
    j ^= (j * 2**5) % 2**32
    return j


def _mask_mantissa(x, mask):
    fraction, exponent = math.frexp(x)
    return float(int(fraction * 2.0**53) ^ mask) * 2.0**-53 * 2.0**exponent


def _reference(state):
    """Yield the stream with a state of floats: the definition, written out naively."""
    seed = state if state != 0 else 2**31
    z = []
    j = seed
    for _ in range(32):
        x = 0.0
        for digit in range(1, 54):
            j = _shift(j)
            if j & 2**19:
                x += 2.0**-digit
        z.append(x)
    # Queue order: z[0] is the value to be replaced next.
    j = seed
    borrow = 0.0
    while True:
        x = z[20] - z[5] - borrow
        borrow = 0.0
        if x < 0.0:
            x += 1.0
            borrow = 2.0**-53
        z = [*z[1:], x]
        previous, j = j, _shift(j)
        yield _mask_mantissa(x, (j % 2**20) * 2**32 + previous)


def test_state_0_matches_matlab_to_14_decimals():
    assert [round(x, 14) for x in rand(len(STATE_0), state=0).tolist()] == STATE_0


def test_state_1_matches_matlab_to_4_decimals():
    assert [round(x, 4) for x in rand(len(STATE_1), state=1).tolist()] == STATE_1


def test_state_defaults_to_0_which_is_2_to_the_31():
    expected = rand(100, state=0)
    np.testing.assert_array_equal(rand(100), expected)
    np.testing.assert_array_equal(rand(100, state=2**31), expected)


@settings(max_examples=10, deadline=None)
@given(state=STATES)
@example(state=0)
@example(state=1)
@example(state=2**31)
@example(state=2**32 - 1)
def test_bitwise_equal_to_floating_point_reference(state):
    expected = np.fromiter(islice(_reference(state), 3000), dtype=np.float64)
    actual = rand(3000, state=state)
    np.testing.assert_array_equal(actual.view(np.uint64), expected.view(np.uint64))


@given(x=st.integers(0, 2**53 - 1), mask=st.integers(1, 2**52 - 1))
@example(x=0, mask=1)
@example(x=0, mask=2**52 - 1)
@example(x=1, mask=2**52 - 1)
@example(x=2**53 - 1, mask=1)
def test_mask_acts_on_normalized_mantissa(x, mask):
    value = _masked(x, mask)
    assert value == _mask_mantissa(math.ldexp(x, -53), mask)
    assert 0.0 < value < 1.0


@given(state=STATES)
@settings(max_examples=20, deadline=None)
def test_values_are_in_the_open_unit_interval(state):
    values = rand(500, state=state)
    assert values.min() > 0.0
    assert values.max() < 1.0


def test_moments_are_those_of_the_uniform_distribution():
    values = rand(100_000, state=3)
    # Five standard errors: sqrt(1/12/n) for the mean, sqrt(1/180/n) for the variance.
    assert abs(values.mean() - 1 / 2) < 5 * math.sqrt(1 / 12 / values.size)
    assert abs(values.var() - 1 / 12) < 5 * math.sqrt(1 / 180 / values.size)


@pytest.mark.parametrize("shape", [(3, 4), (3, 3, 2, 5), (7, 1), (1, 7), (2, 3, 4)])
def test_filled_in_column_major_order(shape):
    values = rand(shape, state=1)
    stream = rand(math.prod(shape), state=1)
    strides = [math.prod(shape[:axis]) for axis in range(len(shape))]
    for index in np.ndindex(*shape):
        assert values[index] == stream[sum(i * s for i, s in zip(index, strides, strict=True))]
    assert values.shape == shape
    assert values.dtype == np.float64
    assert values.flags.f_contiguous
    assert values.flags.writeable


def test_first_page_of_kernel_array_has_printed_values():
    page = rand((3, 3, 2, 2), state=1)[:, :, 0, 0]
    np.testing.assert_array_equal(page.round(4).T, np.reshape(STATE_1[:9], (3, 3)))


@given(state=STATES, short=st.integers(0, 100), more=st.integers(0, 100))
@settings(max_examples=20, deadline=None)
def test_shorter_request_is_prefix_of_longer(state, short, more):
    longer = rand(short + more, state=state)
    np.testing.assert_array_equal(longer[:short], rand(short, state=state))


def test_neighbouring_states_give_different_streams():
    streams = np.stack([rand(50, state=state) for state in range(20)])
    assert len(np.unique(streams)) == streams.size


@pytest.mark.parametrize(
    ("shape", "expected"),
    [
        (4, (4,)),
        (np.int64(4), (4,)),
        (np.array(4), (4,)),
        ([2, 3], (2, 3)),
        (np.array([2, 3]), (2, 3)),
        (iter((2, 3)), (2, 3)),
        ((), ()),
        (0, (0,)),
        ((3, 0, 2), (3, 0, 2)),
    ],
)
def test_accepted_shapes(shape, expected):
    values = rand(shape, state=np.uint32(5))
    assert values.shape == expected
    np.testing.assert_array_equal(
        values.ravel(order="F"), rand(math.prod(expected), state=5), strict=True
    )


@pytest.mark.parametrize(
    "shape",
    [-1, (3, -2), 2.0, (2, 3.0), True, (2, False), np.True_, np.array(2.0), "3", None, ((2, 3),)],
)
def test_invalid_shape_is_refused(shape):
    with pytest.raises(ValueError, match=r"shape must be .*, got .*; pass each size as an int"):
        rand(shape)


@pytest.mark.parametrize("state", [-1, 2**32, 1.0, "1", None, True, np.False_, (1,)])
def test_invalid_state_is_refused(state):
    message = r"state must be an integer in \[0, 2\*\*32\), got .*; pass the number"
    with pytest.raises(ValueError, match=message):
        rand(2, state=state)
