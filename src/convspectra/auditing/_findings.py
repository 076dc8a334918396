"""What an audit's numbers say in words, and what they give together."""

from __future__ import annotations

import itertools
import math
from collections.abc import Iterable, Iterator, Sequence

from convspectra.auditing import _numbers as words
from convspectra.auditing._record import Conditioning, Finding, LayerAudit, Network

KINDS = ("singular", "exploding", "vanishing", "ill-conditioned", "uncertain", "skipped")
"""Kinds of findings, the most urgent ones first."""
LARGEST_NORM = 10.0
"""A layer that amplifies by more is said to explode."""
LEAST_GROWTH = 0.5
"""A layer whose geometric mean singular value is below is said to vanish."""
LARGEST_CONDITION = 1e4
BAND = (0.1, 10.0)
NOTHING = "not known: nothing was audited"


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
    growth = _running_growth(audited)
    # Not a number is in no band and out of none.
    outside = (
        layer.label
        for layer, total in zip(audited, growth, strict=True)
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
    )


def findings(layers: Sequence[LayerAudit]) -> tuple[Finding, ...]:
    """One sentence for everything that a reader should look at, the most urgent first."""
    found = [pair for layer in layers for pair in _of_layer(layer)]
    found.sort(key=lambda pair: (KINDS.index(pair[1].kind), -pair[0]))
    return tuple(finding for _, finding in found)


def network_facts(network: Network) -> list[tuple[str, str]]:
    """The network as labels and texts."""
    which = "audited layers" if network.skipped else "layers"
    product = f"product of all sigma_max{' of the audited layers' if network.skipped else ''}"
    found = [
        ("layers", f"{network.audited} audited, {network.skipped} skipped"),
        (product, _product(network, network.log10_product)),
    ]
    folded = ""
    if network.folded:
        folded = ", with batch normalization folded in"
        text = _product(network, network.log10_product_folded)
        found.append(("the same with batch normalization folded in", text))
    return [
        *found,
        (f"mean growth along the {which}{folded}", _growth(network)),
        ("time", f"{network.seconds:.1f} s"),
    ]


def _running_growth(layers: Sequence[LayerAudit]) -> tuple[float, ...]:
    known = [(layer.uses, numbers.log_growth) for layer in layers if (numbers := effective(layer))]
    return tuple(
        itertools.accumulate(math.nan if value is None else uses * value for uses, value in known)
    )


def _log10_product(factors: Iterable[tuple[int, Conditioning | None]]) -> float:
    values = [(uses, numbers.sigma_max.value) for uses, numbers in factors if numbers is not None]
    return math.fsum(uses * math.log10(v) if v > 0 else -math.inf for uses, v in values)


def _growth(network: Network) -> str:
    low, high = network.band
    if not network.audited:
        return NOTHING
    if network.leaves_band is not None:
        return f"leaves {low:g} to {high:g} after {network.leaves_band}"
    if any(map(math.isnan, network.growth)):
        return "not known for all layers"
    return f"stays within {low:g} to {high:g}"


def _product(network: Network, log10: float) -> str:
    return _power(log10) if network.audited else NOTHING


def _power(log10: float) -> str:
    if not math.isfinite(log10):
        return "0" if log10 < 0 else str(log10)
    exponent = math.floor(log10)
    return f"{10 ** (log10 - exponent):.2f}e{exponent:+03d}"


def _of_layer(layer: LayerAudit) -> Iterator[tuple[float, Finding]]:
    def finding(urgency: float, kind: str, text: str) -> tuple[float, Finding]:
        return urgency, Finding(layer.label, kind, text)

    if layer.skipped:
        yield finding(0.0, "skipped", layer.skipped)
    numbers = effective(layer)
    if numbers is None:
        return
    folded = " with its batch normalization" if layer.folded else ""
    largest, smallest = numbers.sigma_max, numbers.sigma_min
    if numbers.singular:
        lost = _lost(min(layer.shape), numbers.rank)
        yield finding(1.0, "singular", f"sigma_min is 0 to working precision{folded}: {lost}")
    elif numbers.condition > LARGEST_CONDITION:
        circular = ""
        if not layer.folded and layer.circular and layer.circular.sigma_min and smallest.value > 0:
            ratio = layer.circular.sigma_min / smallest.value
            if ratio > 10:
                circular = f"; circular padding would show a sigma_min {ratio:,.0f} times as large"
        yield finding(
            numbers.condition,
            "ill-conditioned",
            f"condition number {numbers.condition:.2e}{folded}: gradients along some directions "
            f"shrink by {smallest.value:.2e} while others grow by {largest.value:.3g}{circular}",
        )
    if largest.value > LARGEST_NORM:
        yield finding(
            largest.value,
            "exploding",
            f"sigma_max is {largest.value:.4g}{folded}: some gradients grow by that in this layer",
        )
    growth = numbers.log_growth
    if growth is None and largest.converged and smallest.converged:
        reason = words.growth_method(numbers)
        yield finding(0.0, "uncertain", f"mean growth{folded} is not known: {reason}")
    elif growth is not None and -math.inf < growth < math.log(LEAST_GROWTH):
        yield finding(
            -growth,
            "vanishing",
            f"the geometric mean of the singular values is {math.exp(growth):.3g}{folded}: typical "
            "gradients shrink by that",
        )
    for name, value in (("sigma_max", largest), ("sigma_min", smallest)):
        if not value.enclosed and value.value > numbers.rank_tolerance:
            reason = "did not converge" if not value.converged else "has no lower bound"
            yield finding(
                0.0, "uncertain", f"{name}{folded} {reason}: {value.value:.4g} by {value.method}"
            )


def _lost(full: int, rank: int | None) -> str:
    """Along how many directions no gradient comes back, in a clause."""
    if rank is None:
        return f"at least one direction of {full} is lost, and no gradient comes back along it"
    if rank == full - 1:
        return f"1 direction of {full} is lost, and no gradient comes back along it"
    return f"{full - rank} directions of {full} are lost, and no gradient comes back along them"
