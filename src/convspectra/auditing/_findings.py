"""The numbers of an audit in sentences, and what they give together."""

from __future__ import annotations

import itertools
import math
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass, replace

from convspectra.auditing import _numbers as words
from convspectra.auditing._record import Conditioning, Finding, Flow, LayerAudit, Network
from convspectra.auditing._shape_rank import rank_by_shape

PURPOSES = ("training", "lipschitz", "invertible")
"""The purposes that a network can be judged for."""
LARGEST_NORM = 10.0
"""A layer whose sigma_max is above is said to explode in training. A choice: half or double of it
only moves what is listed."""
GAINS = (0.6, 1.7)
"""Typical gains that a layer may have in training. A choice: PyTorch's default initialization gives
at most 1 / sqrt(3) = 0.58, and 30 such layers take a gradient down by seven orders of magnitude; at
0.5 they would pass."""
LARGEST_CONDITION = 1e4
"""Condition numbers above are listed. A choice: solving with such a layer in single precision
leaves about three digits."""
BAND = (0.1, 10.0)
"""The limits between which the gain along the layers is meant to stay. A choice, `band` replaces
it."""
LARGEST_LOG = 700.0
"""The logarithm up to which a gain is a number in double precision."""
OUTPUT = -1
"""The place of the network's output among what layers feed."""
NOTHING = "not known: nothing was audited"
"""The text of every fact about a network without any audited layer."""
REGULARIZE = 'cs.SpectralRegularizer(model, example_input, penalty="conditioning")'
"""The call that several findings advise."""
PREPARE = "cs.prepare(model, images) before training"
"""The call that is advised for a network whose gradients vanish or explode."""
WITHIN_BAND = (
    "with what stands between the layers, gradients stay in bounds: nothing needs to be done"
)
"""The advice about gains of single layers that the network makes up for."""


@dataclass(frozen=True)
class _Kind:
    """The line about all layers with one trait.

    Attributes
    ----------
    name : str
    text : str
        With {range} for the numbers of the layers, the smallest to the largest.
    advice : dict
        From the purposes for which it is reported to what to try.
    alarms : tuple of str
        The purposes for which it calls for something to be done; a fact otherwise.
    worst : max or min
        Which end of the range is named first in the list of layers.
    """

    name: str
    text: str
    advice: dict[str, str]
    alarms: tuple[str, ...]
    worst: Callable[..., float] = max


_LOST_IN_TRAINING = (
    "matters in invertible and in plain deep networks: there cs.precondition(model, example_input) "
    "before training; with skips or normalization nothing needs to be done"
)
"""The advice about small values where training is the purpose."""
KINDS = (
    _Kind("gradient flow", "", {"training": ""}, ("training",)),
    _Kind(
        "gradient explodes",
        "gradients from the output grow {range} times on their way back",
        {"training": f"{PREPARE}; cs.gradient_flow(model, images) measures it"},
        ("training",),
    ),
    _Kind(
        "gradient vanishes",
        "gradients from the output shrink to {range} on their way back",
        {"training": f"{PREPARE}; cs.gradient_flow(model, images) measures it"},
        ("training",),
        min,
    ),
    _Kind(
        "exploding",
        "some gradients grow {range} times",
        {"training": f"scale these weights down, or train with {REGULARIZE}"},
        ("training",),
    ),
    _Kind(
        "growing",
        "typical gradients grow {range} times",
        {"training": "start from a smaller gain, or put a normalization after them"},
        ("training",),
    ),
    _Kind(
        "vanishing",
        "typical gradients shrink to {range}",
        {
            "training": "cs.precondition(model, example_input) before training, or a skip or a "
            "normalization around them"
        },
        ("training",),
        min,
    ),
    _Kind(
        "expanding",
        "sigma_max is above 1: {range}",
        {"lipschitz": f"divide each weight by its sigma_max, or train with {REGULARIZE}"},
        ("lipschitz",),
    ),
    _Kind(
        "singular",
        "sigma_min is 0 to working precision, though the shape would allow more",
        {
            "training": _LOST_IN_TRAINING,
            "invertible": "no inverse exists: cs.precondition(model, example_input) before "
            f"training, and {REGULARIZE} during it",
        },
        ("invertible",),
    ),
    _Kind(
        "ill-conditioned",
        "the condition number is {range}",
        {
            "training": _LOST_IN_TRAINING,
            "invertible": f"cs.precondition(model, example_input), or train with {REGULARIZE}",
        },
        ("invertible",),
    ),
    _Kind(
        "not square",
        "M is not square, and has no inverse",
        {"invertible": "as many outputs as inputs: equal channels, and stride 1"},
        ("invertible",),
    ),
    _Kind("uncertain", "", dict.fromkeys(PURPOSES, "more memory, --max-gib"), PURPOSES),
    _Kind("skipped", "", dict.fromkeys(PURPOSES, ""), ()),
    _Kind(
        "shape",
        "rank-deficient by shape: {range} of the directions are left, whatever the weight",
        {
            "training": "a fact of the architecture: nothing needs to be done",
            "invertible": "a stride of at most the kernel, so that no input is passed over",
        },
        ("invertible",),
        min,
    ),
)
"""All kinds of findings, the most urgent ones first."""


def check_purpose(purpose: str) -> None:
    """Raise a ValueError for a purpose that there is not."""
    if purpose not in PURPOSES:
        raise ValueError(f"expected purpose to be one of {', '.join(PURPOSES)}, got {purpose!r}")


def effective(layer: LayerAudit) -> Conditioning | None:
    """The numbers of the layer as the network uses it: with its batch normalization."""
    return layer.folded or layer.applied


def summary(layers: Sequence[LayerAudit], band: tuple[float, float] = BAND) -> Network:
    """The network as a whole.

    Raises
    ------
    ValueError
        For a band that holds nothing.
    """
    if not 0 < band[0] < band[1]:
        raise ValueError(f"expected a band of two positive numbers in order, got {band}")
    audited = [layer for layer in layers if layer.applied is not None]
    chain = not audited or any(layer.place < 0 for layer in audited)
    growth = _growth_in_series(audited) if chain else _growth_by_graph(layers, audited)
    # Not a number is in no band and out of none.
    outside = (
        layer.label
        for layer, total in reversed(list(zip(audited, growth, strict=True)))
        if total < math.log(band[0]) or total > math.log(band[1])
    )
    return Network(
        audited=len(audited),
        skipped=len(layers) - len(audited),
        log10_product=_log10_product((layer.uses, layer.applied) for layer in audited),
        log10_product_folded=_log10_product((layer.uses, effective(layer)) for layer in audited),
        growth=growth,
        band=band,
        leaves_band=next(outside, None),
        seconds=math.fsum(layer.seconds for layer in layers),
        folded=sum(layer.folded is not None for layer in audited),
        chain=chain,
    )


def findings(
    layers: Sequence[LayerAudit],
    purpose: str = "training",
    network: Network | None = None,
    flow: Flow | None = None,
) -> tuple[Finding, ...]:
    """One line for every kind of thing that a reader should know, alarms first.

    The gain of a single layer is an alarm only where the network does not make up for it, or where
    the operations between the layers are not known. Gradients that were measured on images replace
    those that are predicted.

    Raises
    ------
    ValueError
        For a purpose that there is not.
    """
    check_purpose(purpose)
    network = network or summary(layers)
    kinds = {kind.name: kind for kind in KINDS}
    groups: dict[tuple[str, str], list[_Trait]] = {}
    predicted = _gradient_traits(layers, network) if flow is None else ()
    for trait in (*predicted, *itertools.chain(*map(_traits, layers))):
        if purpose in kinds[trait.kind].advice:
            groups.setdefault((trait.kind, trait.text), []).append(trait)
    found = [_finding(kinds[name], purpose, traits) for (name, _), traits in groups.items()]
    if flow is not None and flow.verdict != "healthy" and purpose == "training":
        what, _, advice = flow.sentences
        found.append(Finding("gradient flow", what.rstrip("."), (flow.begins,), advice, True))
    well = not network.chain and network.leaves_band is None
    if well if flow is None else flow.verdict == "healthy":
        found = [_harmless(finding) for finding in found]
    order = [kind.name for kind in KINDS]
    return tuple(sorted(found, key=lambda f: (not f.alarm, order.index(f.kind), -len(f.layers))))


def network_facts(network: Network, flow: Flow | None = None) -> list[tuple[str, str]]:
    """The network as labels and texts."""
    which = "audited layers" if network.skipped else "layers"
    product = f"product of all sigma_max{' of the audited layers' if network.skipped else ''}"
    found = [
        ("layers", f"{network.audited} audited, {network.skipped} skipped"),
        (product, _product(network, network.log10_product)),
    ]
    way = f"back along the {which} alone" if network.chain else "from the output back to each layer"
    folded = ""
    if network.folded:
        folded = ", with batch normalization folded in"
        text = _product(network, network.log10_product_folded)
        found.append(("the same with batch normalization folded in", text))
    return [
        *found,
        (f"typical gain of a gradient {way}{folded}", _growth(network)),
        *([("gradient flow on images", flow.verdict)] if flow else []),
        ("time", f"{network.seconds:.1f} s"),
    ]


def _growth_in_series(layers: Sequence[LayerAudit]) -> tuple[float, ...]:
    gains = (layer.uses * _log_gain(layer) for layer in reversed(layers))
    return tuple(itertools.accumulate(gains))[::-1]


def _growth_by_graph(
    layers: Sequence[LayerAudit], audited: Sequence[LayerAudit]
) -> tuple[float, ...]:
    """Gradients from the output back to the input of each layer, along all ways."""
    at_input = {OUTPUT: 0.0}
    for layer in sorted(layers, key=lambda layer: -layer.place):
        if layer.place < 0:
            continue
        ways = [
            2 * (at_input.get(feed.place, math.nan) + math.log(feed.gain))
            for feed in layer.feeds
            if feed.gain > 0
        ]
        passed = layer.uses * _log_gain(layer) if layer.applied is not None else 0.0
        at_input[layer.place] = _log_sum(ways) / 2 + passed
    return tuple(at_input[layer.place] for layer in audited)


def _log_sum(logs: Sequence[float]) -> float:
    """Logarithm of the sum of exp; not a number without any."""
    most = max(logs, default=math.nan)
    if not math.isfinite(most):
        return math.nan if any(map(math.isnan, logs)) else most
    return most + math.log(math.fsum(math.exp(x - most) for x in logs))


def _log_gain(layer: LayerAudit) -> float:
    gain = layer.gain
    if gain is None or math.isnan(gain):
        return math.nan
    return math.log(gain) if gain > 0 else -math.inf


def _log10_product(factors: Iterable[tuple[int, Conditioning | None]]) -> float:
    values = [(uses, numbers.sigma_max.value) for uses, numbers in factors if numbers is not None]
    return math.fsum(uses * math.log10(v) if v > 0 else -math.inf for uses, v in values)


def _growth(network: Network) -> str:
    low, high = network.band
    if not network.audited:
        return NOTHING
    if network.leaves_band is not None:
        return f"leaves {low:g} to {high:g} at {network.leaves_band}"
    unknown = sum(map(math.isnan, network.growth))
    if unknown:
        return f"not known for {unknown} of {len(network.growth)} layers"
    return f"stays within {low:g} to {high:g}"


def _product(network: Network, log10: float) -> str:
    return _power(log10) if network.audited else NOTHING


def _power(log10: float) -> str:
    if not math.isfinite(log10):
        return "0" if log10 < 0 else str(log10)
    exponent = math.floor(log10)
    return f"{10 ** (log10 - exponent):.2f}e{exponent:+03d}"


@dataclass(frozen=True)
class _Trait:
    """A trait of one layer: its kind, what the line says if the kind does not, and a number."""

    layer: LayerAudit
    kind: str
    text: str = ""
    value: float = 0.0


def _gradient_traits(layers: Sequence[LayerAudit], network: Network) -> Iterator[_Trait]:
    """The layers whose gradients are out of the band, where what stands between is known."""
    if network.chain:
        return
    audited = (layer for layer in layers if layer.applied is not None)
    for layer, growth in zip(audited, network.growth, strict=True):
        low, high = map(math.log, network.band)
        if growth < low or growth > high:
            kind = "gradient vanishes" if growth < low else "gradient explodes"
            yield _Trait(layer, kind, value=math.exp(min(growth, LARGEST_LOG)))


def _harmless(finding: Finding) -> Finding:
    """The gain of single layers as a fact, in a network that makes up for it."""
    if finding.kind not in ("growing", "vanishing"):
        return finding
    return replace(finding, alarm=False, advice=WITHIN_BAND)


def _traits(layer: LayerAudit) -> Iterator[_Trait]:
    if layer.skipped:
        yield _Trait(layer, "skipped", layer.skipped)
    numbers, gain = effective(layer), layer.gain
    if numbers is None or gain is None:
        return
    largest, smallest = numbers.sigma_max, numbers.sigma_min
    if largest.value > LARGEST_NORM:
        yield _Trait(layer, "exploding", value=largest.value)
    if gain > GAINS[1]:
        yield _Trait(layer, "growing", value=gain)
    if gain < GAINS[0]:
        yield _Trait(layer, "vanishing", value=gain)
    if largest.upper > 1:
        yield _Trait(layer, "expanding", value=largest.value)
    if layer.shape[0] != layer.shape[1]:
        yield _Trait(layer, "not square")
    full, possible = min(layer.shape), rank_by_shape(layer)
    if possible < full:
        yield _Trait(layer, "shape", value=possible / full)
    if numbers.singular and not (possible < full and numbers.rank in (possible, None)):
        yield _Trait(layer, "singular", value=float(possible - (numbers.rank or 0)))
    elif not numbers.singular and numbers.condition > LARGEST_CONDITION:
        yield _Trait(layer, "ill-conditioned", value=numbers.condition)
    for name, value in (("sigma_max", largest), ("sigma_min", smallest)):
        if not value.enclosed and value.value > numbers.rank_tolerance:
            reason = "has no lower bound" if value.converged else "did not converge"
            yield _Trait(layer, "uncertain", f"{name} {reason}", value.value)


def _finding(kind: _Kind, purpose: str, traits: Sequence[_Trait]) -> Finding:
    """The line of a kind: what, in how many layers, and which, the worst ones first."""
    values = [trait.value for trait in traits]
    text = traits[0].text or kind.text.format(range=_range(min(values), max(values)))
    if kind.name == "singular":
        text += _lost(traits)
    if kind.name == "ill-conditioned":
        text += _circular_remark(traits)
    if any(trait.layer.folded for trait in traits) and kind.name not in ("shape", "not square"):
        text += ", with batch normalization folded in"
    sign = -1 if kind.worst is max else 1
    ordered = sorted(traits, key=lambda trait: sign * trait.value)
    names = tuple(dict.fromkeys(trait.layer.label for trait in ordered))
    count = f"{len(names)} layer{'' if len(names) == 1 else 's'}"
    return Finding(
        kind=kind.name,
        text=f"{text}, in {count}",
        layers=names,
        advice=kind.advice[purpose],
        alarm=purpose in kind.alarms,
    )


def _range(low: float, high: float) -> str:
    ends = [words.number(value, 3) for value in (low, high)]
    return ends[0] if ends[0] == ends[1] else " to ".join(ends)


def _lost(traits: Sequence[_Trait]) -> str:
    """How many directions are lost, in a clause; "at least" where a rank was not counted."""
    lost = [
        rank_by_shape(trait.layer) - numbers.rank
        for trait in traits
        if (numbers := effective(trait.layer)) and numbers.rank is not None
    ]
    if not lost:
        return "; how many directions are lost was not counted"
    few, many = min(lost), max(lost)
    count = f"{few}" if few == many else f"{few} to {many}"
    return f": {count} direction{'' if count == '1' else 's'} lost in each"


def _circular_remark(traits: Sequence[_Trait]) -> str:
    """By how much circular padding would hide the smallest value."""
    ratios = [
        circular.sigma_min / numbers.sigma_min.value
        for trait in traits
        if (circular := trait.layer.circular)
        and circular.sigma_min
        and not trait.layer.folded
        and (numbers := trait.layer.applied)
        and numbers.sigma_min.value > 0
    ]
    most = max(ratios, default=0.0)
    if most <= 10:
        return ""
    return f"; circular padding would show a sigma_min up to {words.number(most, 3)} times as large"
