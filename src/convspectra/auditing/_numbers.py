"""The values of an audit in words and digits, the same on a page and in a terminal."""

from __future__ import annotations

import decimal
import math
from collections.abc import Sequence

from convspectra.auditing._record import Certified, Conditioning, LayerAudit
from convspectra.text import sizes

DIGITS = 4
"""Significant digits of a number. A choice: with fewer, near layers look alike; with more, tables
grow."""
MOST_DIGITS = 17
"""Digits that tell any two doubles apart: more of them would say nothing."""
ABSENT = "-"
"""The text of a number that a layer cannot have."""
NOT_COMPUTED = "not computed"
"""The text of a number that was left out."""
NOT_KNOWN = "not known"
"""The text of a number that was tried in vain."""
SINGULAR = " (singular)"
"""The remark on a matrix whose sigma_min is 0 to working precision."""


def number(value: float | None, digits: int = DIGITS) -> str:
    """Significant digits; what is not a finite number is said in words.

    Examples
    --------
    >>> number(0.000123456), number(1234567.0), number(2.5), number(0.0), number(None)
    ('1.235e-4', '1.235e6', '2.500', '0', 'not computed')
    """
    return _rounded(value, digits, decimal.ROUND_HALF_EVEN)


def _rounded(value: float | None, digits: int, rounding: str) -> str:
    if value is None:
        return NOT_COMPUTED
    if math.isnan(value):
        return "not a number"
    if math.isinf(value):
        return "infinite" if value > 0 else "minus infinite"
    if value == 0:
        return "0"
    exact = decimal.Context(prec=digits, rounding=rounding).plus(decimal.Decimal(value))
    exponent = exact.adjusted()
    if -3 <= exponent < max(digits, 3):
        return f"{exact:.{max(digits - 1 - exponent, 0)}f}"
    mantissa = f"{exact.scaleb(-exponent):.{digits - 1}f}"
    return f"{mantissa}e{exponent}"


def interval(lower: float, upper: float) -> str:
    """Both ends, rounded outwards to digits that tell them apart: still an enclosure.

    Examples
    --------
    >>> interval(1.999999961, 2.000000033)
    '[1.99999996, 2.00000004]'
    """
    digits = _telling_digits(lower, upper)
    low = _rounded(lower, digits, decimal.ROUND_FLOOR)
    return f"[{low}, {_rounded(upper, digits, decimal.ROUND_CEILING)}]"


def value_within(value: float, lower: float, upper: float) -> str:
    """A number with as many digits as the ends of its interval."""
    return number(value, _telling_digits(lower, upper))


def _telling_digits(lower: float, upper: float) -> int:
    if not (0 < lower < upper < math.inf):
        return DIGITS
    agreeing = math.ceil(-math.log10((upper - lower) / upper))
    return min(max(agreeing + 1, DIGITS), MOST_DIGITS)


def flag(certified: Certified) -> str:
    """The flaw of a number: "not converged", "no enclosure", or ""."""
    if certified.enclosed:
        return ""
    return "no enclosure" if certified.converged else "not converged"


def smallest_flag(numbers: Conditioning) -> str:
    """The flaw of sigma_min; nothing where it is known to be 0 to working precision."""
    return "" if numbers.sigma_min.converged and numbers.singular else flag(numbers.sigma_min)


def smallest(numbers: Conditioning) -> str:
    """The smallest singular value; one that is 0 to working precision is said to be."""
    zero = numbers.singular or numbers.sigma_min.value == 0
    return number(numbers.sigma_min.value) + (SINGULAR if zero else "")


def largest(numbers: Conditioning) -> str:
    """The largest singular value."""
    value = numbers.sigma_max.value
    return number(value) + (" (the layer is zero)" if value == 0 else "")


def condition(numbers: Conditioning, digits: int = DIGITS) -> str:
    """A condition number; only what it is above where sigma_min has no lower bound."""
    zero = numbers.singular or numbers.condition == math.inf
    if unbounded(numbers):
        return f"over {_rounded(numbers.condition_lower, digits, decimal.ROUND_FLOOR)}"
    return number(numbers.condition, digits) + (SINGULAR if zero else "")


def unbounded(numbers: Conditioning) -> bool:
    """Whether nothing is known above a condition number, and sigma_min is not known to be 0."""
    known = numbers.singular or numbers.condition == math.inf
    return numbers.condition_upper == math.inf and not known


def condition_within(numbers: Conditioning) -> str:
    """A condition number with as many digits as the ends of its interval."""
    lower, upper = numbers.condition_lower, numbers.condition_upper
    return condition(numbers, _telling_digits(lower, upper))


def condition_flag(numbers: Conditioning) -> str:
    """The flaw of a condition number: that of its parts, or ""."""
    if unbounded(numbers):  # the text is a bound, which holds
        return flag(numbers.sigma_max)
    return smallest_flag(numbers) or flag(numbers.sigma_max)


def rank(layer: LayerAudit, numbers: Conditioning) -> str:
    """The numerical rank, beside the full one where it is lower."""
    if numbers.rank is None:
        return "not counted"
    full = min(layer.shape)
    return f"{numbers.rank}" if numbers.rank == full else f"{numbers.rank} of {full}"


def gain(layer: LayerAudit, numbers: Conditioning) -> str:
    """The typical gain ||M||_F / sqrt(rows) of the layer as applied, or as folded."""
    return number(numbers.frobenius_norm / math.sqrt(layer.shape[0]) if layer.shape[0] else None)


def growth(numbers: Conditioning) -> str:
    """The mean of log s with its standard error; minus infinite where the matrix is singular."""
    value = numbers.log_growth
    if value is None:
        return NOT_KNOWN
    if value == -math.inf:
        return number(value) + SINGULAR
    spread = numbers.log_growth_error
    return number(value) + (f" ± {number(spread, 2)}" if spread > 0 else "")


def growth_method(numbers: Conditioning) -> str:
    """How the mean of log s was computed, or why it is not known."""
    return numbers.log_growth_method.removeprefix(f"{NOT_KNOWN}: ")


def geometric_mean(numbers: Conditioning) -> str:
    """The exponential of the mean of log s."""
    if numbers.log_growth is None:
        return NOT_KNOWN
    try:
        return number(math.exp(numbers.log_growth))
    except OverflowError:
        return number(math.inf)


def times(layer: LayerAudit) -> str:
    """How often a layer is called, if not once.

    Examples
    --------
    >>> times(LayerAudit("c", "Conv2d", uses=5)), times(LayerAudit("c", "Conv2d"))
    ('used 5 times', '')
    """
    return f"used {layer.uses} times" if layer.uses > 1 else ""


def ratio(approximate: float | None, true: float | None) -> str:
    """One number over another; a zero below is said in words.

    Examples
    --------
    >>> ratio(0.5, 0.25), ratio(0.5, 0.0), ratio(0.0, 0.0), ratio(None, 1.0)
    ('2.000', 'infinite', 'both 0', 'not computed')
    """
    if approximate is None or true is None:
        return NOT_COMPUTED
    if true == 0:
        return "both 0" if approximate == 0 else "infinite"
    return number(approximate / true)


def shortened(entries: Sequence[int]) -> str:
    """Sizes along the axes, once if they agree."""
    return str(entries[0]) if len(set(entries)) == 1 else sizes(entries)


def padding(layer: LayerAudit) -> str:
    """Padding along the axes; before+after where they differ; the mode unless it is zeros.

    Examples
    --------
    >>> padding(LayerAudit("c", "Conv2d", padding=((1, 1), (0, 2)), padding_mode="reflect"))
    '1x0+2 reflect'
    """
    parts = [f"{a}" if a == b else f"{a}+{b}" for a, b in layer.padding]
    text = parts[0] if len(set(parts)) == 1 else "x".join(parts)
    return text if layer.padding_mode == "zeros" else f"{text} {layer.padding_mode}".strip()


def kernel(layer: LayerAudit) -> str:
    """Sizes of the kernel, with dilation and groups where they are not 1."""
    parts = [sizes(layer.kernel)]
    if set(layer.dilation) - {1}:
        parts.append(f"dilation {shortened(layer.dilation)}")
    if layer.groups != 1:
        parts.append(f"{layer.groups} groups")
    return ", ".join(part for part in parts if part) or ABSENT


def seconds(value: float) -> str:
    """A wall time.

    Examples
    --------
    >>> seconds(0.0), seconds(0.0123), seconds(7.26), seconds(600.0)
    ('0', '0.012', '7.3', '600')
    """
    if not math.isfinite(value):
        return number(value)
    return "0" if value <= 0 else f"{value:.{max(0, 1 - math.floor(math.log10(value)))}f}"
