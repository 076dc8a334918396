"""An audit as a table: short texts for a terminal, full records for CSV and pandas."""

from __future__ import annotations

import dataclasses
import math
import types
import typing
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

from convspectra.auditing import _numbers as words
from convspectra.auditing._record import Certified, Conditioning, LayerAudit
from convspectra.text import sizes


@dataclass(frozen=True)
class Column:
    """One column of the table.

    Attributes
    ----------
    name : str
    text : callable
        From a layer to its short text.
    key : callable, optional
        From a layer to what the column is sorted by: None sorts last. Without, by the text.
    flag : callable
        From a layer to what is wrong with the number: "" for nothing.
    folded : bool
        Of the layer with its batch normalization folded in, and empty for the others.
    measured : bool
        Measured on images, and empty without any.
    """

    name: str
    text: Callable[[LayerAudit], str]
    key: Callable[[LayerAudit], float | None] | None = None
    flag: Callable[[LayerAudit], str] = lambda layer: ""
    folded: bool = False
    measured: bool = False


def columns_for(layers: Sequence[LayerAudit]) -> tuple[Column, ...]:
    """All columns, those of folded and of measured numbers only if there are any."""
    folded = any(layer.folded is not None for layer in layers)
    measured = any(layer.gradient is not None for layer in layers)
    return tuple(c for c in COLUMNS if (folded or not c.folded) and (measured or not c.measured))


def table_row(layer: LayerAudit) -> dict[str, str]:
    """Short texts of one layer; a tilde stands before a number without enclosure."""
    return {
        column.name: ("~" if column.flag(layer) else "") + column.text(layer) for column in COLUMNS
    }


def fact_rows(layer: LayerAudit) -> list[dict[str, str]]:
    """One row a number of a single layer: its value, interval and method.

    Examples
    --------
    >>> import torch, convspectra as cs
    >>> report = cs.audit(torch.nn.Conv2d(1, 1, 3, padding=1), torch.zeros(1, 1, 8, 8))
    >>> [row["number"] for row in fact_rows(report.layers[0])]
    ['sigma_max', 'sigma_min', 'condition', 'rank', 'gain']
    """
    numbers = layer.applied
    if numbers is None:
        return [_fact("layer", _note(layer))]
    low, high = numbers.sigma_min, numbers.sigma_max
    within = words.interval(numbers.condition_lower, numbers.condition_upper)
    return [
        _fact("sigma_max", words.largest(numbers), _interval(high), high.method),
        _fact("sigma_min", words.smallest(numbers), _interval(low), low.method),
        _fact("condition", words.condition(numbers), within),
        _fact("rank", words.rank(layer, numbers)),
        _fact("gain", words.gain(layer, numbers)),
    ]


def _fact(name: str, value: str, interval: str = "", method: str = "") -> dict[str, str]:
    return {"number": name, "value": value, "interval": interval, "method": method}


def _interval(certified: Certified) -> str:
    return words.interval(certified.lower, certified.upper)


def circular_line(layer: LayerAudit) -> str:
    """A sentence about sigma_min with circular padding where it differs; "" where it does not.

    Examples
    --------
    >>> import torch, convspectra as cs
    >>> report = cs.audit(torch.nn.Conv2d(1, 1, 3, padding=1), torch.zeros(1, 1, 8, 8))
    >>> circular_line(report.layers[0]).split(",")[0].rpartition(" ")[0]
    'circular padding would give sigma_min'
    """
    value, numbers = _circular_minimum(layer), layer.applied
    if value is None or numbers is None:
        return ""
    times = words.ratio(value, numbers.sigma_min.value)
    if times == words.number(1.0):
        return ""
    return f"circular padding would give sigma_min {words.number(value)}, {times} times as large"


def records(layers: Sequence[LayerAudit]) -> list[dict[str, object]]:
    """Every number of every layer in full precision, the same keys for all.

    Nested values have dotted names such as ``applied.sigma_min.lower``; sizes are texts such as
    "3x3", padding before and after is "0+1x0+1". The histogram and
    the graph of the layers are left out.
    """
    return [_record(LayerAudit, layer, "") for layer in layers]


def _record(kind: Any, value: Any, prefix: str) -> dict[str, object]:
    """The fields of a dataclass, flat; all None where there is no value."""
    flat: dict[str, object] = {}
    for name, hint in typing.get_type_hints(kind).items():
        inner = _without_none(hint)
        entry = None if value is None else getattr(value, name)
        if name in ("spectrum", "feeds"):
            continue
        if dataclasses.is_dataclass(inner):
            flat |= _record(inner, entry, f"{prefix}{name}.")
        elif name in ("notes", "followed_by"):
            flat[prefix + name] = "; ".join(entry or ())
        else:
            flat[prefix + name] = _sizes(entry) if isinstance(entry, tuple) else entry
    return flat


def _without_none(hint: Any) -> Any:
    if isinstance(hint, types.UnionType):
        (hint,) = (part for part in typing.get_args(hint) if part is not type(None))
    return hint


def _sizes(entries: tuple[Any, ...]) -> str:
    return "x".join("+".join(map(str, e)) if isinstance(e, tuple) else str(e) for e in entries)


def _of(
    field: str, text: Callable[[Conditioning], Any], absent: Any
) -> Callable[[LayerAudit], Any]:
    def found(layer: LayerAudit) -> Any:
        numbers = getattr(layer, field)
        return absent if numbers is None else text(numbers)

    return found


def _number(
    name: str,
    text: Callable[[Conditioning], str],
    key: Callable[[Conditioning], float | None],
    flag: Callable[[Conditioning], str] = lambda numbers: "",
    field: str = "applied",
) -> Column:
    return Column(
        name,
        _of(field, text, words.ABSENT),
        _of(field, key, None),
        _of(field, flag, ""),
        folded=field == "folded",
    )


def _extremes(field: str) -> tuple[Column, Column]:
    """sigma_max and sigma_min of the layer as applied, or as folded."""
    prefix = "folded " if field == "folded" else ""
    return (
        _number(
            f"{prefix}sigma_max",
            words.largest,
            lambda numbers: numbers.sigma_max.value,
            lambda numbers: words.flag(numbers.sigma_max),
            field,
        ),
        _number(
            f"{prefix}sigma_min",
            words.smallest,
            lambda numbers: numbers.sigma_min.value,
            words.smallest_flag,
            field,
        ),
    )


def _stride_padding(layer: LayerAudit) -> str:
    parts = (words.shortened(layer.stride) if layer.stride else "", words.padding(layer))
    return " / ".join(part for part in parts if part) if layer.padding else parts[0]


def _rank(layer: LayerAudit) -> str:
    return words.ABSENT if layer.applied is None else words.rank(layer, layer.applied)


def _condition(numbers: Conditioning) -> str:
    return words.condition(numbers).removesuffix(words.SINGULAR)  # sigma_min says it


def _growth(numbers: Conditioning) -> str:
    return words.growth(numbers).removesuffix(words.SINGULAR)


def _circular_minimum(layer: LayerAudit) -> float | None:
    return None if layer.circular is None else layer.circular.sigma_min


def _circular_text(layer: LayerAudit) -> str:
    value = _circular_minimum(layer)
    return words.ABSENT if value is None else words.number(value)


def _note(layer: LayerAudit) -> str:
    if layer.skipped or layer.applied is None:
        return f"{words.NOT_COMPUTED}: {layer.skipped or 'no reason given'}"
    found = ((column.name, column.flag(layer)) for column in EXTREMES)
    flags = [f"{name}: {text}" for name, text in found if text]
    return "; ".join(filter(None, [*flags, words.times(layer), *layer.notes]))


EXTREMES = (*_extremes("applied"), *_extremes("folded"))
"""The columns whose numbers may lack an enclosure."""
COLUMNS = (
    Column("name", lambda layer: layer.label),
    Column("type", lambda layer: layer.type),
    Column("kernel", words.kernel, lambda layer: float(math.prod(layer.kernel))),
    Column("stride / padding", _stride_padding),
    Column(
        "input size",
        lambda layer: sizes(layer.input_shape) or words.ABSENT,
        lambda layer: float(math.prod(layer.input_shape)) if layer.input_shape else None,
    ),
    Column(
        "size of M",
        lambda layer: sizes(layer.shape) if any(layer.shape) else words.ABSENT,
        lambda layer: float(math.prod(layer.shape)) if any(layer.shape) else None,
    ),
    *EXTREMES,
    Column("circular sigma_min", _circular_text, _circular_minimum),
    _number("condition", _condition, lambda numbers: numbers.condition, words.condition_flag),
    Column(
        "gain",
        lambda layer: words.ABSENT if layer.gain is None else words.number(layer.gain),
        lambda layer: layer.gain,
    ),
    Column(
        "gradient",
        lambda layer: words.ABSENT if layer.gradient is None else words.number(layer.gradient),
        lambda layer: layer.gradient,
        measured=True,
    ),
    Column("rank", _rank, _of("applied", lambda numbers: numbers.rank, None)),
    _number("growth", _growth, lambda numbers: numbers.log_growth),
    Column(
        "seconds",
        lambda layer: words.seconds(layer.seconds) if layer.seconds > 0 else words.ABSENT,
        lambda layer: layer.seconds if layer.seconds > 0 else None,
    ),
    Column("note", _note),
)
"""All columns, in the order in which they stand."""
COLUMN_IMPORTANCE = (
    "name",
    "sigma_max",
    "sigma_min",
    "condition",
    "folded sigma_max",
    "folded sigma_min",
    "gain",
    "gradient",
    "circular sigma_min",
    "type",
    "note",
    "growth",
    "rank",
    "kernel",
    "stride / padding",
    "input size",
    "size of M",
    "seconds",
)
"""The columns in the order in which a narrow terminal is filled."""
