"""The numbers of an audit as plain values with a JSON form: no torch, no drawing."""

from __future__ import annotations

import dataclasses
import functools
import itertools
import math
import types
import typing
from dataclasses import dataclass
from typing import Any, TypeVar

T = TypeVar("T")
"""The record that is read."""

NAMES_SHOWN = 5
"""Layers that the line of a finding names. A choice: more of them fill a terminal's line."""

ADDED_LATER = {"added later": True}
"""The mark of a field that the first files do not have: its default is taken for them."""


@dataclass(frozen=True)
class Certified:
    """A number, and the interval that holds the true one.

    Attributes
    ----------
    value : float
    lower, upper : float
        0 and inf where no bound is known.
    method : str
        How it was computed.
    certificate : str
        What the enclosure rests on.
    converged : bool
        Whether the method reached its tolerance.
    """

    value: float
    lower: float
    upper: float
    method: str
    certificate: str
    converged: bool

    @property
    def enclosed(self) -> bool:
        """Whether both sides of the interval say something."""
        return self.converged and self.upper < math.inf and (self.lower > 0 or self.upper == 0)


@dataclass(frozen=True)
class Conditioning:
    """The numbers of one matrix.

    Attributes
    ----------
    frobenius_norm : float
    sigma_max, sigma_min : Certified
    condition : float
        sigma_max / sigma_min; inf where sigma_min is 0.
    condition_lower, condition_upper : float
        Enclosure of the condition number.
    rank : int, optional
        Singular values above `rank_tolerance`; None where they could not be counted.
    rank_tolerance : float
        max(rows, columns) eps sigma_max, as in ``numpy.linalg.matrix_rank``.
    log_growth : float, optional
        The mean of log s over all min(rows, columns) singular values; -inf where the matrix is
        singular to working precision, None where the mean is not known.
    log_growth_error : float
        Of that mean: 0 up to rounding, or a standard error.
    log_growth_method : str
        How it was computed, or why it is None.
    """

    frobenius_norm: float
    sigma_max: Certified
    sigma_min: Certified
    condition: float
    condition_lower: float
    condition_upper: float
    rank: int | None
    rank_tolerance: float
    log_growth: float | None
    log_growth_error: float
    log_growth_method: str

    @property
    def singular(self) -> bool:
        """Whether sigma_min is 0 to working precision."""
        return self.sigma_min.value <= self.rank_tolerance


@dataclass(frozen=True)
class Circular:
    """The numbers of the same weight with circular padding, as most tools compute it.

    Attributes
    ----------
    sigma_max, sigma_min : float, optional
    log_growth : float, optional
    note : str
        Why there are none.
    """

    sigma_max: float | None
    sigma_min: float | None
    log_growth: float | None
    note: str


@dataclass(frozen=True)
class Spectrum:
    """A histogram of all the singular values of a layer.

    Attributes
    ----------
    edges : tuple of float
        Of the bins, ascending; the first may be 0.
    fractions : tuple of float
        The part of the singular values in each bin; they add up to 1.
    errors : tuple of float
        One standard error of each fraction; 0 where it was counted.
    circular : tuple of float
        The same with circular padding; empty where there is none.
    method : str
        How it was computed, such as "exact".

    Raises
    ------
    ValueError
        If the numbers do not belong to each other, or one is negative or not finite.
    """

    edges: tuple[float, ...]
    fractions: tuple[float, ...]
    errors: tuple[float, ...]
    circular: tuple[float, ...]
    method: str

    def __post_init__(self) -> None:
        bins = max(len(self.edges) - 1, 0)
        if not (len(self.fractions) == len(self.errors) == bins):
            raise ValueError(
                f"expected a fraction and an error for each of {bins} bins, got "
                f"{len(self.fractions)} and {len(self.errors)}"
            )
        if len(self.circular) not in (0, bins):
            raise ValueError(
                f"expected {bins} circular fractions or none, got {len(self.circular)}"
            )
        if not all(a <= b for a, b in itertools.pairwise(self.edges)):
            raise ValueError("expected edges in ascending order")
        numbers = (*self.edges, *self.fractions, *self.errors, *self.circular)
        if not all(0 <= number < math.inf for number in numbers):
            raise ValueError("expected finite numbers of at least 0 in a spectrum")


@dataclass(frozen=True)
class Feed:
    """A way from the output of a layer to another, with no layer between.

    Attributes
    ----------
    place : int
        Of the other layer, see `LayerAudit.place`; -1 for the model's output.
    gain : float
        What a typical gradient is multiplied by on its way back along it.
    """

    place: int
    gain: float


@dataclass(frozen=True)
class LayerAudit:
    """One layer at one input size.

    Attributes
    ----------
    name, type : str
        As in the model or file.
    kernel, stride, dilation : tuple of int
    padding : tuple of (int, int)
        Before and after, along every axis.
    padding_mode : str
    groups : int
    transposed : bool
    input_shape, output_shape : tuple of int
        (channels, *spatial).
    shape : (int, int)
        Rows and columns of M.
    dtype : str
        Of the weight; everything is computed in float64.
    applied : Conditioning, optional
        Of M as the layer applies it; None if the layer was skipped.
    batch_norm : str
        Name of the batch normalization that follows; "" if there is none.
    folded : Conditioning, optional
        Of M with that normalization's scale folded in.
    circular : Circular, optional
    spectrum : Spectrum, optional
    seconds : float
        Wall time spent on the layer.
    skipped : str
        Why it was not audited; "" if it was.
    notes : tuple of str
        What else a reader should know.
    uses : int
        Calls at this input size in one forward pass; 0 if there was none.
    place : int
        In the forward pass, from 0; -1 where that is not known, as of an ONNX file.
    feeds : tuple of Feed
        Which layers read the output, with activations, normalizations and averages between.
    followed_by : tuple of str
        Activations and normalizations that act on the output before another layer does, except a
        batch normalization that is folded in.
    gradient : float, optional
        `FlowLayer.relative` of the first call, measured on images; None without any.
    """

    name: str
    type: str
    kernel: tuple[int, ...] = ()
    stride: tuple[int, ...] = ()
    dilation: tuple[int, ...] = ()
    padding: tuple[tuple[int, int], ...] = ()
    padding_mode: str = "zeros"
    groups: int = 1
    transposed: bool = False
    input_shape: tuple[int, ...] = ()
    output_shape: tuple[int, ...] = ()
    shape: tuple[int, int] = (0, 0)
    dtype: str = ""
    applied: Conditioning | None = None
    batch_norm: str = ""
    folded: Conditioning | None = None
    circular: Circular | None = None
    spectrum: Spectrum | None = None
    seconds: float = 0.0
    skipped: str = ""
    notes: tuple[str, ...] = ()
    uses: int = dataclasses.field(default=1, metadata=ADDED_LATER)
    place: int = dataclasses.field(default=-1, metadata=ADDED_LATER)
    feeds: tuple[Feed, ...] = dataclasses.field(default=(), metadata=ADDED_LATER)
    followed_by: tuple[str, ...] = dataclasses.field(default=(), metadata=ADDED_LATER)
    gradient: float | None = dataclasses.field(default=None, metadata=ADDED_LATER)

    @property
    def label(self) -> str:
        """The name, or the type of a layer without one."""
        return self.name or self.type

    @property
    def gain(self) -> float | None:
        """The typical gain ||M||_F / sqrt(rows), batch normalization folded in; None if skipped.

        It is the root mean square of ||M' g|| / ||g|| over gradients g at the output with
        independent entries: what a backward pass through the layer multiplies a gradient by, where
        it is in no special relation to M. A layer with more rows than columns has a gain below the
        root mean square of its singular values: most of g lies in the null space of M'.
        """
        numbers = self.folded or self.applied
        if numbers is None or self.shape[0] < 1:
            return None
        return numbers.frobenius_norm / math.sqrt(self.shape[0])


@dataclass(frozen=True)
class Finding:
    """One line about all the layers that share a trait.

    Attributes
    ----------
    kind : str
        "gradient flow" (measured), "gradient explodes", "gradient vanishes" (predicted),
        "exploding", "growing", "vanishing", "expanding",
        "singular", "ill-conditioned", "not square", "uncertain", "skipped" or "shape"
        (rank-deficient by shape).
    text : str
        What it is, with the range of the numbers and the number of layers.
    layers : tuple of str
        All the layers, the worst ones first.
    advice : str
        What to try; "" where nothing is known.
    alarm : bool
        Whether it calls for something to be done, for the purpose of the audit; a fact otherwise.
    """

    kind: str
    text: str
    layers: tuple[str, ...]
    advice: str
    alarm: bool

    @property
    def line(self) -> str:
        """The text with the first layers: the rest is counted, and stands in `layers`."""
        listed = ", ".join(self.layers[:NAMES_SHOWN])
        more = len(self.layers) - NAMES_SHOWN
        return f"{self.text}: {listed}" + (f" and {more} more" if more > 0 else "")


@dataclass(frozen=True)
class Network:
    """The layers together.

    A layer that is called several times counts as often, all at the place of its first call.

    Attributes
    ----------
    audited, skipped : int
        Numbers of layers.
    log10_product : float
        log10 of the product of all sigma_max: what the layers alone can amplify a gradient by.
    log10_product_folded : float
        The same with every batch normalization folded in.
    growth : tuple of float
        Logarithm of what a typical gradient at the output of the network is multiplied by on its
        way back to the input of each audited layer. It is made of `LayerAudit.gain` and of the
        typical gains of activations, normalizations and averages between; where branches meet,
        squares add up. nan where the way is not known. An estimate: singular vectors of neighboring
        layers are taken as unrelated.
    band : (float, float)
        What exp of that is meant to stay between.
    leaves_band : str, optional
        The layer nearest to the output of which it does not; None if there is none.
    seconds : float
        Sum over the layers.
    folded : int
        Number of audited layers with a batch normalization folded in.
    chain : bool
        Whether the growth is that of the layers alone, in series, since what stands between them is
        not known.
    """

    audited: int
    skipped: int
    log10_product: float
    log10_product_folded: float
    growth: tuple[float, ...]
    band: tuple[float, float]
    leaves_band: str | None
    seconds: float
    folded: int = dataclasses.field(default=0, metadata=ADDED_LATER)
    chain: bool = dataclasses.field(default=True, metadata=ADDED_LATER)


@dataclass(frozen=True)
class Flow:
    """The words of `gradient_flow` on images.

    Attributes
    ----------
    verdict : {"healthy", "vanishing", "exploding", "collapsing", "saturated"}
    begins : str
        Name of the module where it begins; "" for a healthy network.
    sentences : tuple of str
        What it is, why, and what to do.
    """

    verdict: str
    begins: str
    sentences: tuple[str, ...]


@dataclass(frozen=True)
class Circumstances:
    """The model, the time, the machine and the command of an audit.

    Attributes
    ----------
    model : str
        Class of the module, or name of the file.
    input_shape : str
        Of the example input, as in "1x3x224x224".
    created : str
        Time in UTC, ISO 8601.
    machine, versions, command : str
    complete : bool
        False for an audit that was interrupted: layers are missing.
    purpose : "training", "lipschitz" or "invertible"
        What the layers are judged for.
    """

    model: str
    input_shape: str
    created: str
    machine: str
    versions: str
    command: str
    complete: bool
    purpose: str = dataclasses.field(default="training", metadata=ADDED_LATER)


def encode(value: Any) -> Any:
    """A dataclass as what JSON can hold; numbers that are not finite become strings."""
    if dataclasses.is_dataclass(value):
        return {f.name: encode(getattr(value, f.name)) for f in dataclasses.fields(value)}
    if isinstance(value, tuple | list):
        return [encode(entry) for entry in value]
    if isinstance(value, float) and not math.isfinite(value):
        return str(value)
    return value


def decode(kind: type[T], value: Any, where: str = "") -> T:
    """The inverse of `encode`.

    Raises
    ------
    ValueError
        For a missing or unknown field, or a value of another type; the path to it is named.
    """
    return typing.cast(T, _decode(kind, value, where or kind.__name__))


@functools.cache
def _hints(kind: Any) -> dict[str, Any]:
    return typing.get_type_hints(kind)


def _decode(kind: Any, value: Any, where: str) -> Any:
    origin, parts = typing.get_origin(kind), typing.get_args(kind)
    if origin in (types.UnionType, typing.Union):
        if value is None and type(None) in parts:
            return None
        (kind,) = (part for part in parts if part is not type(None))
        return _decode(kind, value, where)
    if origin is tuple and isinstance(value, list):
        if parts[-1] is not ... and len(parts) != len(value):
            raise ValueError(f"{where}: expected {len(parts)} entries, got {len(value)}")
        kinds = parts[:1] * len(value) if parts[-1] is ... else parts
        pairs = enumerate(zip(kinds, value, strict=True))
        return tuple(_decode(part, entry, f"{where}[{i}]") for i, (part, entry) in pairs)
    if dataclasses.is_dataclass(kind) and isinstance(value, dict):
        return _decode_record(kind, value, where)
    if kind is float and isinstance(value, str) and value in ("inf", "-inf", "nan"):
        return float(value)
    if kind is float and isinstance(value, int) and not isinstance(value, bool):
        try:
            return float(value)
        except OverflowError as error:
            raise ValueError(f"{where}: expected float, got an integer beyond its range") from error
    if isinstance(kind, type) and type(value) is kind:
        return value
    raise ValueError(f"{where}: expected {getattr(kind, '__name__', kind)}, got {value!r}")


def _decode_record(kind: Any, value: dict[str, Any], where: str) -> Any:
    hints = _hints(kind)
    later = {f.name for f in dataclasses.fields(kind) if f.metadata == ADDED_LATER}
    odd = sorted((set(value) ^ set(hints)) - (later - set(value)))
    if odd:
        raise ValueError(f"{where}: expected the fields {sorted(hints)}, these differ: {odd}")
    fields = {name: _decode(hints[name], value[name], f"{where}.{name}") for name in value}
    try:
        return kind(**fields)
    except ValueError as error:
        raise ValueError(f"{where}: {error}") from error
