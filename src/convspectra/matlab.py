"""Random numbers of historical MATLAB scripts, reproduced bit for bit."""

from __future__ import annotations

import math
import operator
from collections.abc import Iterable, Iterator
from itertools import islice
from typing import SupportsIndex

import numpy as np
from numpy.typing import NDArray

__all__ = ["rand"]

_BITS = 53  # binary digits of a double; every state value is a multiple of 2**-53
"""Binary digits of a double; every state value is a multiple of 2**-53."""
_LAG_LONG, _LAG_SHORT, _LENGTH = 20, 5, 32
"""Lags and length of the subtract-with-borrow generator, as in MATLAB."""
_WORD = 0xFFFF_FFFF
"""A 32-bit word with all bits set: the register's size."""


def rand(
    shape: SupportsIndex | Iterable[SupportsIndex], state: SupportsIndex = 0
) -> NDArray[np.float64]:
    """Uniform random numbers of MATLAB's legacy ``rand('state', state)`` generator.

    This is the default generator of MATLAB 5 to 7. The result equals that of calling MATLAB's
    ``rand('state', state)`` followed by ``rand(shape)``, to the last bit.

    Parameters
    ----------
    shape : int or iterable of int
        Shape of the result in the NumPy convention: ``rand(n)`` has shape ``(n,)``, whereas
        MATLAB's ``rand(n)`` is ``rand((n, n))`` here. ``()`` gives a zero-dimensional array.
    state : int, default 0
        Seed in ``[0, 2**32)``. States 0 and ``2**31`` select the same stream.

    Returns
    -------
    numpy.ndarray
        Array of dtype ``float64`` and the given shape, with values strictly between 0 and 1. It
        is filled, and laid out in memory, in column-major (Fortran) order as in MATLAB.

    Raises
    ------
    ValueError
        If `shape` is not made of non-negative integers, or `state` is not an integer in
        ``[0, 2**32)``. Booleans and floats, even integral ones, are refused.

    Notes
    -----
    Two generators are combined. A subtract-with-borrow generator [1]_ with lags 20 and 5 on 32
    values produces multiples of ``2**-53`` in ``[0, 1)``; a 32-bit xorshift register [2]_ with
    shifts 13, 17 and 5 then masks the lower 52 of the 53 bits of their normalized mantissa [3]_,
    [4]_. That register also fills the initial 32 values, bit by bit. All arithmetic is exact:
    on integers, up to a conversion to floating point that does not round.

    Every call starts the stream anew, and a shorter request is a prefix of a longer one: to
    mimic consecutive MATLAB calls, draw one flat array and reshape its pieces with
    ``order="F"``. Time is linear in the number of values, about a microsecond each plus about a
    millisecond per call. For new work prefer `numpy.random.default_rng`.

    References
    ----------
    .. [1] G. Marsaglia and A. Zaman, "A new class of random number generators", Annals of
       Applied Probability 1(3), 462-480, 1991.
    .. [2] G. Marsaglia, "Xorshift RNGs", Journal of Statistical Software 8(14), 2003.
    .. [3] C. Moler, "Random thoughts: 10^435 years is a very long time", MATLAB News & Notes,
       Fall 1995.
    .. [4] C. Moler, "Numerical Computing with MATLAB", SIAM, 2004, chapter 9.

    Examples
    --------
    >>> print(rand((2, 2), state=0))
    [[0.95012929 0.60684258]
     [0.23113851 0.48598247]]
    """
    sizes = _as_shape(shape)
    seed = _as_index(state)
    if seed is None or not 0 <= seed <= _WORD:
        raise ValueError(
            f"state must be an integer in [0, 2**32), got {state!r}; "
            "pass the number that the MATLAB script gave to rand('state', ...)"
        )
    count = math.prod(sizes)
    flat = np.fromiter(islice(_uniforms(seed), count), dtype=np.float64, count=count)
    return flat.reshape(sizes, order="F")


def _uniforms(seed: int) -> Iterator[float]:
    """Yield the endless stream of one seed."""
    register = seed or 1 << 31  # zero is the fixed point of the shift register
    # The filling works on a copy of the register: the draws start from the seed again.
    z, filler = [0] * _LENGTH, register
    for k in range(_LENGTH):
        for _ in range(_BITS):
            filler = _xorshift(filler)
            z[k] = z[k] << 1 | (filler >> 19 & 1)

    borrow, i = 0, 0
    while True:
        x = z[(i + _LAG_LONG) % _LENGTH] - z[(i + _LAG_SHORT) % _LENGTH] - borrow
        borrow = int(x < 0)
        x += borrow << _BITS
        z[i] = x
        i = (i + 1) % _LENGTH

        low, register = register, _xorshift(register)
        yield _masked(x, (register & 0xF_FFFF) << 32 | low)


def _masked(x: int, mask: int) -> float:
    """Exclusive-or of a 52-bit mask with the mantissa of ``x * 2**-53``, leading bit apart."""
    # A zero has no leading bit to normalize and keeps exponent 0, as in MATLAB's log2(0).
    shift = _BITS - x.bit_length() if x else 0
    return math.ldexp(x << shift ^ mask, -_BITS - shift)


def _xorshift(word: int) -> int:
    """Advance the 32-bit shift register by one step."""
    word ^= word << 13 & _WORD
    word ^= word >> 17
    return word ^ (word << 5 & _WORD)


def _as_shape(shape: SupportsIndex | Iterable[SupportsIndex]) -> tuple[int, ...]:
    """Return `shape` as a tuple of non-negative ints, or raise ValueError."""
    try:
        entries: list[object] = list(shape)  # type: ignore[arg-type]
    except TypeError:  # not iterable
        entries = [shape]
    sizes = [_as_index(entry) for entry in entries]
    valid = tuple(size for size in sizes if size is not None and size >= 0)
    if len(valid) != len(sizes):
        raise ValueError(
            f"shape must be a non-negative integer or a tuple of them, got {shape!r}; "
            "pass each size as an int, and 0 where a MATLAB script passed a negative one"
        )
    return valid


def _as_index(value: object) -> int | None:
    """Return `value` as an int, or None if it is not an integer (a bool is not)."""
    if isinstance(value, (bool, np.bool_)):
        return None
    try:
        return operator.index(value)  # type: ignore[arg-type]
    except TypeError:
        return None
