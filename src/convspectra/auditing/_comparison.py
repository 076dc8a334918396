"""Two audits side by side: before and after training, pruning or quantization."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Sequence
from typing import TypeAlias

from convspectra.auditing import _numbers as words
from convspectra.auditing._record import Certified, Conditioning, LayerAudit
from convspectra.text import sizes

Key: TypeAlias = tuple[str, tuple[int, ...], int]
"""Name, input size, and how many layers before it share both."""

EXTREMES = ("sigma_min", "sigma_max")
"""The numbers of each side that have an enclosure, and so a verdict."""
SAME = "none"
"""Verdict on two numbers that agree in value and interval."""
BEYOND = "beyond the enclosures"
"""Verdict on two intervals without a common number: a change for certain."""
WITHIN = "within the enclosures"
"""Verdict on two intervals that share numbers: perhaps no change at all."""
UNKNOWN = "not known: no enclosure"
"""Verdict where one side has no interval that says anything."""
CHANGE_TEXTS = (*(f"{fold}{name} change" for fold in ("", "folded ") for name in EXTREMES), "note")
"""The columns of words, which may be wrapped."""
CHANGE_IMPORTANCE = (
    "name",
    *(f"{name} {what}" for what in ("A", "B", "change") for name in EXTREMES),
    "note",
    *(f"folded {name} {what}" for what in ("A", "B", "change") for name in EXTREMES),
    *(f"{name} {side}" for name in ("condition", "growth", "rank") for side in "AB"),
    "input size",
)
"""The columns in the order in which a narrow terminal is filled; the rest comes after."""


def compare(a: Sequence[LayerAudit], b: Sequence[LayerAudit]) -> list[dict[str, str]]:
    """Rows by name and input size: those of A in its order, then those only in B.

    A change is beyond the enclosures where the two intervals have no number in common, and within
    them where both hold the true value but share numbers: it may then be no change at all. Layers
    that share name and input size are matched in order of appearance.
    """
    before, after = _keyed(a), _keyed(b)
    return [_row(key, before.get(key), after.get(key)) for key in {**before, **after}]


def _keyed(layers: Sequence[LayerAudit]) -> dict[Key, LayerAudit]:
    seen: Counter[tuple[str, tuple[int, ...]]] = Counter()
    keyed: dict[Key, LayerAudit] = {}
    for layer in layers:
        key = (layer.label, layer.input_shape)
        keyed[(*key, seen[key])] = layer
        seen[key] += 1
    return keyed


def _row(key: Key, a: LayerAudit | None, b: LayerAudit | None) -> dict[str, str]:
    one = None if a is None else a.applied
    two = None if b is None else b.applied
    folded = (None if a is None else a.folded, None if b is None else b.folded)
    remarks = (_missing(a, b), _skipped("A", a), _skipped("B", b), _uses(a, b))
    return {
        "name": key[0],
        "input size": sizes(key[1]),
        **_values("sigma_max", one, two, words.largest),
        **_values("sigma_min", one, two, words.smallest),
        **_pair("condition", one, two, lambda numbers: words.number(numbers.condition)),
        **_values("sigma_max", *folded, words.largest, "folded "),
        **_values("sigma_min", *folded, words.smallest, "folded "),
        "rank A": words.ABSENT if a is None or one is None else words.rank(a, one),
        "rank B": words.ABSENT if b is None or two is None else words.rank(b, two),
        **_pair("growth", one, two, words.growth),
        "note": "; ".join(filter(None, remarks)),
    }


def _values(
    name: str,
    one: Conditioning | None,
    two: Conditioning | None,
    text: Callable[[Conditioning], str],
    prefix: str = "",
) -> dict[str, str]:
    a: Certified | None = getattr(one, name, None)
    b: Certified | None = getattr(two, name, None)
    return {
        **_pair(f"{prefix}{name}", one, two, text),
        f"{prefix}{name} B/A": words.ratio(b.value, a.value) if a and b else words.ABSENT,
        f"{prefix}{name} change": change(a, b) if a and b else words.ABSENT,
    }


def _pair(
    name: str,
    one: Conditioning | None,
    two: Conditioning | None,
    text: Callable[[Conditioning], str],
) -> dict[str, str]:
    return {
        f"{name} A": words.ABSENT if one is None else text(one),
        f"{name} B": words.ABSENT if two is None else text(two),
    }


def change(a: Certified, b: Certified) -> str:
    """Whether two numbers differ by more than what is known of them."""
    if (a.value, a.lower, a.upper) == (b.value, b.lower, b.upper):
        return SAME
    if not (a.converged and b.converged):
        return UNKNOWN
    if a.upper < b.lower or b.upper < a.lower:
        return BEYOND
    return WITHIN if a.enclosed and b.enclosed else UNKNOWN


def _missing(a: LayerAudit | None, b: LayerAudit | None) -> str:
    if a is None:
        return "only in B"
    return "only in A" if b is None else ""


def _skipped(side: str, layer: LayerAudit | None) -> str:
    return f"skipped in {side}: {layer.skipped}" if layer is not None and layer.skipped else ""


def _uses(a: LayerAudit | None, b: LayerAudit | None) -> str:
    if a is None or b is None or a.uses == b.uses:
        return ""
    return f"calls in A: {a.uses}, in B: {b.uses}"
