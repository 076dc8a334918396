"""Rules such as "sigma_max > 10" that an audit may be held to."""

from __future__ import annotations

import math
import operator
import re
from collections.abc import Callable, Sequence
from dataclasses import dataclass

from convspectra.auditing._record import Certified, Conditioning, LayerAudit

OPERATORS: dict[str, Callable[[float, float], bool]] = {
    ">": operator.gt,
    ">=": operator.ge,
    "<": operator.lt,
    "<=": operator.le,
}
"""The comparisons that a rule may make."""
QUANTITIES: dict[str, Callable[[Conditioning, int], Certified | float | None]] = {
    "sigma_max": lambda c, rows: c.sigma_max,
    "sigma_min": lambda c, rows: c.sigma_min,
    "condition": lambda c, rows: Certified(
        c.condition, c.condition_lower, c.condition_upper, "", "", c.sigma_min.converged
    ),
    "frobenius_norm": lambda c, rows: c.frobenius_norm,
    "rank": lambda c, rows: c.rank,
    "log_growth": lambda c, rows: c.log_growth,
    "gain": lambda c, rows: c.frobenius_norm / math.sqrt(rows),
}
"""The quantities of rules: from the numbers of a matrix and its rows to a value, None if not
known."""
_RULE = re.compile(r"\s*(folded\.)?([a-z_]+)\s*(>=|<=|>|<)\s*(\S+)\s*")
"""The form of a rule: NAME COMPARISON NUMBER."""


@dataclass(frozen=True)
class Rule:
    """A comparison that no layer may satisfy.

    Attributes
    ----------
    text : str
        As it was given.
    folded : bool
        Of the layer with its batch normalization, where it has one.
    quantity, comparison : str
    threshold : float
    """

    text: str
    folded: bool
    quantity: str
    comparison: str
    threshold: float


@dataclass(frozen=True)
class Violation:
    """A layer that a rule speaks of.

    Attributes
    ----------
    rule, layer : str
    certain : bool
        False where only the enclosure reaches across the threshold, or there is no value.
    text : str
    """

    rule: str
    layer: str
    certain: bool
    text: str


def parse_rule(text: str) -> Rule:
    """A rule from its text.

    Raises
    ------
    ValueError
        For anything else than NAME COMPARISON NUMBER.

    Examples
    --------
    >>> parse_rule("folded.sigma_max >= 1e1").threshold
    10.0
    """
    match = _RULE.fullmatch(text)
    names = ", ".join(QUANTITIES)
    expected = f'expected a rule like "sigma_max > 10" of {names}, or folded.NAME, got {text!r}'
    if match is None or match[2] not in QUANTITIES:
        raise ValueError(expected)
    try:
        threshold = float(match[4])
    except ValueError as error:
        raise ValueError(expected) from error
    if math.isnan(threshold):
        raise ValueError(expected)
    return Rule(text.strip(), match[1] is not None, match[2], match[3], threshold)


def violations(rules: Sequence[Rule], layers: Sequence[LayerAudit]) -> list[Violation]:
    """Every layer that satisfies a rule, or of which that cannot be excluded."""
    found = [_violation(rule, layer) for rule in rules for layer in layers]
    return [violation for violation in found if violation is not None]


def _violation(rule: Rule, layer: LayerAudit) -> Violation | None:
    numbers = (layer.folded or layer.applied) if rule.folded else layer.applied
    value = None if numbers is None else QUANTITIES[rule.quantity](numbers, layer.shape[0])
    if value is None:
        why = layer.skipped or "it could not be computed"
        return Violation(rule.text, layer.label, False, f"{rule.quantity} is not known: {why}")
    if not isinstance(value, Certified):
        value = Certified(value, value, value, "", "", True)
    compare = OPERATORS[rule.comparison]
    if compare(value.value, rule.threshold):
        return Violation(rule.text, layer.label, True, f"{rule.quantity} is {value.value:.6g}")
    if compare(value.lower, rule.threshold) or compare(value.upper, rule.threshold):
        text = (
            f"{rule.quantity} is {value.value:.6g}, but only known to be in "
            f"[{value.lower:.6g}, {value.upper:.6g}]"
        )
        return Violation(rule.text, layer.label, False, text)
    return None
