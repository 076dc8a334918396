"""A few images forward and back: numbers of every layer, a verdict, and words for it."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from itertools import pairwise
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils._pytree import tree_leaves

from convspectra.models import example_arguments, unwrapped
from convspectra.network._flow_pass import (
    NORMALIZATION_TYPES,
    Gains,
    Gradients,
    Pieces,
    flow_through_cuts,
    predicted,
    random_loss,
    remove_biases,
    saturation,
)
from convspectra.network._flow_report import COLLAPSED, FlowLayer, GradientFlow
from convspectra.network._frozen import (
    converted,
    floating_leaves,
    frozen_copy,
    readable_errors,
    undisturbed,
)
from convspectra.network._step_size import suggested_rate
from convspectra.operator import not_compiled, with_gradients

BAND = (0.1, 10.0)
"""Flow of gradients through a cut over that through the last one that counts as healthy: a choice,
as in `prepare`."""
SATURATED = 0.25
"""Share of saturated entries from which a layer counts as saturated. A choice: a Gaussian of
variance 1 is beyond 1.8 with probability 0.07, one of variance 6, as in tanh layers of gain 3, with
0.46."""
WIDE_BAND = (1e-3, 1e3)
"""As `BAND`, where layers are normalized: their gradients are in inverse proportion to the scale of
their weights, and learning rates with them; and where directions alone are to blame: training
aligns gradients with large singular vectors. A choice between ResNet-50 with random weights, which
has 210 and trains, plain networks of 20 trained layers, which have 42 and 180 and classify 91 and
97% of the digits right, and plain networks of 60 and 100 batch-normalized layers, which have 9e3
and 2e7; of these the latter do not train (docs/measurements.md)."""
NORMALIZED = 0.25
"""Normalizations for one layer from which a network counts as normalized: transformers have one for
three layers. A choice below it; a network with fewer is in between, and gets the narrow band."""
DEAD = 0.9
"""Share of dead units from which a layer counts as dead. A choice: half of them are off in a deep
ReLU network whose biases outweigh its signal, and that is not its disease."""
REPEATED = 1e-9
"""Largest difference of two outputs for the same images, relative to them, that is not called
random. Both passes do the same arithmetic in double precision; a choice far above its rounding."""

Loss = Callable[..., Tensor]


@not_compiled
@with_gradients
def gradient_flow(model: nn.Module, images: Any, loss: Loss | None = None) -> GradientFlow:
    """Whether signals vanish, explode, collapse or saturate, where, why, and what to do.

    Parameters
    ----------
    model : nn.Module
        Copied in double precision: nothing of it changes. Dropout and its like are off; batch
        normalizations that are in training mode take the statistics of `images`, as in training.
    images : Tensor, batch, dict, or tuple of positional arguments
        At least two, (b, ...). A batch is ``(images, labels)`` with one integer an image, as data
        loaders give it; a dict is passed by keywords, ``labels`` excepted.
    loss : callable, optional
        From the model's output, and the labels if there are any, to a number. A random linear
        function of the output without it, and labels are then not looked at.

    Returns
    -------
    GradientFlow
        ``str()`` of it is a table and three sentences.

    Raises
    ------
    ValueError
        For fewer than two images or images that are all the same, integers where the model has no
        embedding, values that are not finite, fewer than two layers, an output of several tensors
        without a loss, a model that is random in evaluation mode or that cannot be differentiated;
        the layer is named where one can be.

    Notes
    -----
    Cost: three forward passes, one backward pass and a short one for each layer, in double
    precision. Memory: the model twice, and two passes with their activations. The rms gain of a
    kernel, ``||M||_F / sqrt(rows)``, is known exactly. See docs/network.md.

    Examples
    --------
    >>> import torch, convspectra as cs
    >>> model = torch.nn.Sequential(torch.nn.Linear(8, 8), torch.nn.Tanh(), torch.nn.Linear(8, 8))
    >>> for layer in (model[0], model[2]):
    ...     _ = torch.nn.init.orthogonal_(layer.weight)
    >>> cs.gradient_flow(model, torch.randn(8, 8)).verdict
    'healthy'
    """
    args, kwargs, labels = _arguments(images)
    frozen = frozen_copy(model, torch.float64)
    device = _check_images(frozen, args, kwargs)
    for original, copied in zip(unwrapped(model).modules(), frozen.modules(), strict=True):
        if isinstance(original, NORMALIZATION_TYPES):
            copied.training = original.training
    args, kwargs = converted((args, kwargs), torch.float64)

    def call(network: nn.Module) -> Any:
        return network(*args, **kwargs)

    with undisturbed(device):
        passed = _pass(frozen, call)
        layers = [i for i, piece in enumerate(passed.all) if piece.is_layer]
        if len(layers) < 2:
            raise ValueError(
                f"expected a model with at least two layers, got {[p.name for p in passed.all]}: "
                "gradient flow is what happens between them"
            )
        with readable_errors("backward pass"):
            gradients = passed.gradients(_loss(loss, passed.answer, labels))
            gains = passed.gains()
            found = _Found(passed, layers, gradients, gains, *_unbiased(frozen, call, passed))
            found.check()
        return found.report()


def _arguments(images: Any) -> tuple[tuple[Any, ...], dict[str, Any], Any]:
    """Positional arguments, those by keyword, and labels."""
    if isinstance(images, Mapping):
        return (), {k: v for k, v in images.items() if k != "labels"}, images.get("labels")
    if isinstance(images, (tuple, list)):
        if len(images) == 2 and all(isinstance(part, Tensor) for part in images):
            first, second = images
            whole = not (second.is_floating_point() or second.is_complex())
            if whole and second.ndim == 1 and first.ndim > 0 and len(second) == len(first):
                return (first,), {}, second
        images = tuple(images)
    call = example_arguments(images)
    return call.args, call.kwargs, None


def _check_images(model: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> torch.device:
    tensors = [t for t in tree_leaves((args, kwargs)) if isinstance(t, Tensor)]
    if not tensors:
        kind = type(args[0]).__name__ if args else "a dict without any"
        raise ValueError(
            f"expected images to be a tensor, (images, labels), or a dict of tensors, got {kind}"
        )
    first = tensors[0]
    if first.ndim == 0 or len(first) < 2:
        raise ValueError(
            f"expected at least two images, (b, ...), got the shape {tuple(first.shape)}: whether "
            "images become the same takes two"
        )
    if any(t.is_complex() for t in tensors):
        raise ValueError("expected real images, got complex ones")
    if not any(t.is_floating_point() for t in tensors) and not any(
        isinstance(module, nn.Embedding) for module in model.modules()
    ):
        raise ValueError(
            f"expected floating images, got {first.dtype}: convert them, as in images.float() / 255"
        )
    if not all(bool(t.isfinite().all()) for t in tensors if t.is_floating_point()):
        raise ValueError("expected finite images, got NaN or Inf in them")
    if all(bool((t == t[:1]).all()) for t in tensors if t.ndim and len(t) == len(first)):
        raise ValueError("expected images that differ, got the same one each time")
    return first.device


def _pass(model: nn.Module, call: Callable[[nn.Module], Any]) -> Pieces:
    """The pass in pieces, held against one without: they agree unless the model is random."""
    with readable_errors("forward pass"):
        with torch.no_grad():
            plain = floating_leaves(call(model))
        passed = Pieces(model, call)
    for first, second in zip(plain, floating_leaves(passed.answer), strict=True):
        if not bool(first.isfinite().all()):
            broken = [p.name for p in passed.all if not bool(p.output.isfinite().all())]
            raise ValueError(
                "expected finite signals, got NaN or Inf in the output"
                + (f", from {broken[0]!r} on" if broken else "")
            )
        if not torch.allclose(
            first, second, rtol=REPEATED, atol=REPEATED * float(first.abs().max())
        ):
            again = Pieces(model, call).all
            names = [
                one.name
                for one, other in zip(passed.all, again, strict=False)
                if not torch.equal(one.output, other.output)
            ]
            raise ValueError(
                "expected a model without randomness in evaluation mode, got two outputs for the "
                f"same images, from {repr(names[0]) if names else 'the last operations'} on; take "
                "its dropout or noise out of evaluation"
            )
    return passed


def _loss(loss: Loss | None, answer: Any, labels: Any) -> Tensor:
    if loss is None:
        value = random_loss(answer)
    else:
        value = loss(answer) if labels is None else loss(answer, labels)
    if not isinstance(value, Tensor) or value.numel() != 1:
        shape = tuple(value.shape) if isinstance(value, Tensor) else type(value).__name__
        raise ValueError(f"expected loss to return one number, got {shape}; take its mean")
    if not bool(value.isfinite()):
        raise ValueError(f"expected a finite loss, got {value.item()}")
    return value.sum()


def _unbiased(
    model: nn.Module, call: Callable[[nn.Module], Any], passed: Pieces
) -> tuple[Gains | None, list[float]]:
    """Gains and image shares without the biases of layers; none where there are no biases."""
    if not remove_biases(model):
        return None, []
    again = Pieces(model, call)
    if [piece.name for piece in again.all] != [piece.name for piece in passed.all]:
        return None, []
    count = _batch(passed)
    shares = [_statistics(piece.output.detach(), count)[1] for piece in again.all]
    return again.gains(), shares


def _batch(passed: Pieces) -> int:
    """Number of images: the axis that all outputs are made of."""
    return min(len(piece.output) for piece in passed.all)


@dataclass
class _Found:
    """All numbers of a pass, by piece; `unbiased` are those without biases."""

    passed: Pieces
    layers: list[int]
    gradients: Gradients
    gains: Gains
    unbiased: Gains | None
    unbiased_shares: list[float]

    def __post_init__(self) -> None:
        self.count = len(self.passed.all)
        self.batch = _batch(self.passed)
        self.names = [piece.name for piece in self.passed.all]
        self.flow = flow_through_cuts(self.gradients.ways, self.count)
        self.expected, self.expected_flow = predicted(self.gradients, self.gains)
        self.readers: dict[int, list[int]] = {}
        self.sources: dict[int, list[int]] = {}
        for source, place in self.gains.between:
            self.readers.setdefault(source, []).append(place)
            self.sources.setdefault(place, []).append(source)
        self.first, self.last = self.behind(self.layers[0]), self.behind(self.layers[-2])
        normalizations = self.count - len(self.layers)
        self.normalized = normalizations >= NORMALIZED * len(self.layers)
        self.band = WIDE_BAND if self.normalized else BAND

    def check(self) -> None:
        """Raise for gradients that are not finite, or that there are none of."""
        for i in reversed(range(self.count)):
            if not math.isfinite(self.gradients.outputs[i]):
                raise ValueError(
                    f"expected a model that is differentiable at the images, got a gradient with "
                    f"NaN or Inf at the output of {self.names[i]!r}"
                )
        if not self.gradients.ways:
            raise ValueError(
                "expected an output that depends on a layer differentiably, got one that does "
                "not: rounding, an index, detach() or no_grad() lies between them"
            )

    def report(self) -> GradientFlow:
        """Rows, verdict and sentences."""
        rows = tuple(self._row(i) for i in self.layers)
        causes = self._causes()
        if _directions_alone(causes):
            self.band = WIDE_BAND
        verdict = _verdict(rows, self)
        words = _sentences(rows, verdict, causes, self)
        return GradientFlow(rows, verdict.kind, verdict.begins, causes, words, self.band)

    def _row(self, i: int) -> FlowLayer:
        piece = self.passed.all[i]
        moment, share, cosine = _statistics(piece.output.detach(), self.batch)
        behind = self.behind(i)
        ways = [(behind, place) for place in self.readers.get(behind, [])]
        dead, saturated = self._flat(ways)
        slopes = [self.gains.between[way] for way in ways]
        measured = _ratio(self.gradients.inputs[i], self.gradients.outputs[i])
        return FlowLayer(
            name=piece.name,
            second_moment=moment,
            image_share=share,
            cosine=cosine,
            bias=_ratio(piece.bias, moment),
            gradient=self.gradients.outputs[i],
            weight_gradient=self.gradients.weights[i],
            relative=_ratio(self.gradients.outputs[behind], self.flow[self.last]),
            predicted=_ratio(self.expected[behind], self.expected_flow[self.last]),
            kernel=self.gains.pieces[i],
            measured=measured,
            alignment=_ratio(measured, self.gains.pieces[i]),
            normalization=1.0 if behind == i else self.gains.pieces[behind],
            slope=math.sqrt(sum(s * s for s in slopes) / len(slopes)) if slopes else math.nan,
            dead=dead,
            saturated=saturated,
        )

    def behind(self, i: int) -> int:
        """The normalization that alone reads a layer, or the layer itself."""
        readers = self.readers.get(i, [])
        alone = len(readers) == 1 and not self.passed.all[readers[0]].is_layer
        # What is added to something else on the way is no longer the layer's own.
        return readers[0] if alone and self.sources[readers[0]] == [i] else i

    def layer_before(self, place: int) -> str:
        """Name of the last layer that one reads, through normalizations or not."""
        sources = self.sources.get(place)
        while sources and not self.passed.all[max(sources)].is_layer:
            sources = self.sources.get(max(sources))
        return self.names[max(sources)] if sources else self.names[place]

    def _flat(self, ways: Sequence[tuple[int, int]]) -> tuple[float, float]:
        """Shares of dead channels and of saturated entries behind a piece, over all its readers."""
        if not ways:
            return 0.0, 0.0
        piece = self.passed.all[ways[0][0]]
        dead, saturated = saturation(piece, self.gains.slopes[ways[0][0]])
        # The nearest reader stands for all: there are as many as blocks along a skip.
        if saturated and not self.passed.acts_on_numbers_alone(ways[0]):
            saturated = 0.0
        return dead, saturated

    def _causes(self) -> dict[str, float]:
        """Powers of ten between the first layer and the last one, cause by cause."""
        plain = self.unbiased or self.gains
        known = [
            self._change(plain, lambda i: False, False),
            self._change(plain, lambda i: not self.passed.all[i].is_layer, False),
            self._change(plain, lambda i: not self.passed.all[i].is_layer, True),
            self._change(self.gains, lambda i: not self.passed.all[i].is_layer, True),
            self._change(self.gains, lambda i: True, True),
            _log10(_ratio(self.flow[self.first], self.flow[self.last])),
        ]
        names = ("branches", "normalization", "activations", "biases", "kernels", "alignment")
        parts = [known[0], *(b - a for a, b in pairwise(known))]
        return dict(zip(names, parts, strict=True))

    def _change(self, gains: Gains, pieces: Callable[[int], bool], between: bool) -> float:
        _, flow = predicted(self.gradients, gains, pieces, between)
        return _log10(_ratio(flow[self.first], flow[self.last]))


@dataclass(frozen=True)
class _Verdict:
    """The disease, the module where it begins, what of it is to blame, and whether it alone is."""

    kind: str
    begins: str = ""
    blamed: str = ""
    alone: bool = False


def _directions_alone(causes: Mapping[str, float]) -> bool:
    """Whether gradients change by more than ten times, and most of that by alignment."""
    total = sum(causes.values())
    return abs(total) > 1 and 2 * abs(causes["alignment"] - total) < abs(total)


def _verdict(rows: Sequence[FlowLayer], found: _Found) -> _Verdict:
    """The disease, and where it begins: see docs/network.md for the order."""
    for i, row in enumerate(rows[:-1]):
        if row.dead >= DEAD:
            return _Verdict("saturated", row.name, "dead")
        # Features that the head alone reads are saturated in every trained classifier with tanh.
        if row.saturated >= SATURATED and i < max(1, len(rows) - 2):
            return _Verdict("saturated", row.name, "flat")
    if not found.flow[found.last]:
        return _Verdict("vanishing", rows[-1].name, "kernel")
    return _gradient_verdict(found) or _collapse_verdict(found) or _Verdict("healthy")


def _gradient_verdict(found: _Found) -> _Verdict | None:
    # A cut between a layer and its normalization would show the scale of the weights alone.
    places = [t for t in range(found.first, found.last + 1) if found.behind(t) == t]
    levels = [_log10(_ratio(found.flow[t], found.flow[found.last])) for t in places]
    low, high = (math.log10(end) for end in found.band)
    outside = [not low <= level <= high for level in levels]
    if not any(outside):
        return None
    exit_ = max(k for k, out in enumerate(outside) if out)
    sign = 1 if levels[exit_] > 0 else -1
    steps = [sign * (levels[k] - levels[k + 1]) for k in range(len(levels) - 1)]
    largest = max(range(len(steps)), key=lambda k: steps[k])
    alone = 2 * steps[largest] >= max(sign * level for level in levels)
    # The step between two cuts is that of the pieces between them.
    step = largest if alone else exit_
    between = range(places[step] + 1, places[step + 1] + 1)
    gains = {
        place: sign * _log10(_ratio(found.gradients.inputs[place], found.gradients.outputs[place]))
        for place in between
    }
    kind = "exploding" if sign > 0 else "vanishing"
    if 2 * sum(gains.values()) >= steps[step]:
        place = max(gains, key=gains.__getitem__)
        blamed = "kernel" if found.passed.all[place].is_layer else "normalization"
        return _Verdict(kind, found.names[place], blamed, alone)
    return _Verdict(kind, found.layer_before(between[0]), "activation", alone)


def _collapse_verdict(found: _Found) -> _Verdict | None:
    """Images that are the same from a layer on to the head; what a layer reads is looked at.

    The sum of a branch and its skip counts, not a branch alone, which may begin at zero.
    """
    begins = ""
    for place in reversed(found.layers[1:]):
        arriving = found.passed.all[place].arriving.detach()
        if _statistics(arriving, found.batch)[1] >= COLLAPSED:
            break
        begins = found.layer_before(place)
    else:
        begins = found.names[found.layers[0]]
    if not begins or begins == found.layer_before(found.layers[-1]):
        return None
    return _Verdict("collapsing", begins)


def _sentences(
    rows: Sequence[FlowLayer], verdict: _Verdict, causes: Mapping[str, float], found: _Found
) -> tuple[str, str, str]:
    first, last = rows[0].name, rows[-2].name
    fan_ins = sum(
        module.weight[0].numel()
        for module in {found.passed.all[i].module for i in found.layers[:-1]}
        if isinstance(module.weight, Tensor)
    )
    rate = f"train with Adam at a learning rate of {suggested_rate(fan_ins):.1e}"
    if verdict.kind == "healthy":
        flow = _ratio(found.flow[found.first], found.flow[found.last])
        return (
            f"Healthy: the gradient at {first!r} is {flow:.2g} times that at {last!r}.",
            f"Images differ by {rows[-2].image_share:.2g} of the signal at {last!r}.",
            "Nothing needs to be done."
            if found.normalized
            else f"Nothing needs to be done; {rate}.",
        )
    return (
        _what(rows, verdict, found),
        _why(rows, verdict, causes, found),
        f"{_remedy(rows, verdict, causes, found)}; then {rate}.",
    )


def _what(rows: Sequence[FlowLayer], verdict: _Verdict, found: _Found) -> str:
    if verdict.kind in ("vanishing", "exploding"):
        flow = _ratio(found.flow[found.first], found.flow[found.last])
        return (
            f"{verdict.kind.capitalize()}: the gradient at {rows[0].name!r} is {flow:.2g} times "
            f"that at {rows[-2].name!r}; it begins at {verdict.begins!r}."
        )
    row = next(row for row in rows if row.name == verdict.begins)
    if verdict.kind == "collapsing":
        return (
            f"Collapsing: from {verdict.begins!r} on images are nearly the same; they differ by "
            f"{row.image_share:.2g} of the signal there, with a mean cosine of {row.cosine:.4f}."
        )
    if verdict.blamed == "dead":
        return f"Saturated: {row.dead:.0%} of the units behind {verdict.begins!r} are dead."
    return (
        f"Saturated: {row.saturated:.0%} of the activations behind {verdict.begins!r} are on a "
        "flat part."
    )


def _why(
    rows: Sequence[FlowLayer], verdict: _Verdict, causes: Mapping[str, float], found: _Found
) -> str:
    row = next((row for row in rows if row.name == verdict.begins), None)
    parts = []
    if verdict.kind == "collapsing" and row is not None:
        place = next(i for i in found.layers if found.names[i] == row.name)
        if row.bias:
            parts.append(f"biases are {row.bias:.0%} of the signal at {row.name!r}")
        if found.unbiased_shares:
            share = found.unbiased_shares[place]
            parts.append(f"without any bias images would differ by {share:.2g} of it")
        parts.append(f"the cosine between images was {rows[0].cosine:.2g} at {rows[0].name!r}")
    elif row is not None and verdict.blamed in ("dead", "flat"):
        parts.append(
            f"the signal there has the root mean square {row.second_moment**0.5:.2g} and biases "
            f"are {row.bias:.0%} of it"
        )
    elif row is not None and verdict.blamed == "kernel":
        parts.append(f"the kernel there has gain {row.kernel:.2g}")
    elif row is not None and verdict.blamed == "activation":
        parts.append(f"what lies behind it has the slope {row.slope:.2g}")
    elif verdict.blamed == "normalization":
        gain = found.gains.pieces[found.names.index(verdict.begins)]
        parts.append(f"the normalization there has gain {gain:.2g}")
    changes = [
        f"{name} 10^{power:+.1f}"
        for name, power in sorted(causes.items(), key=lambda item: -abs(item[1]))
        if abs(power) >= 0.05
    ]
    text = "; ".join(parts)
    ways = f"from {rows[-2].name!r} back to {rows[0].name!r} gradients change by "
    whole = ". ".join(part for part in (text, ways + ", ".join(changes) if changes else "") if part)
    return ". ".join(part[:1].upper() + part[1:] for part in whole.split(". ")) + "."


def _remedy(
    rows: Sequence[FlowLayer], verdict: _Verdict, causes: Mapping[str, float], found: _Found
) -> str:
    prepare = "Call cs.prepare(model, images)"
    row = next((row for row in rows if row.name == verdict.begins), None)
    if verdict.alone and verdict.blamed == "kernel" and row is not None and row.kernel > 0:
        others = sorted(other.kernel for other in rows[:-1] if other is not row)
        factor = others[len(others) // 2] / row.kernel if others else 1.0
        if not 0.5 < factor < 2:
            return (
                f"Scale this layer alone, its gain to the others' median: model.get_submodule("
                f"{row.name!r}).weight.data.mul_({factor:.3g}), or before training "
                "cs.prepare(model, images)"
            )
    if verdict.kind in ("vanishing", "exploding") and _directions_alone(causes):
        return (
            "Gains are in order, directions are not: put shortcuts around blocks, or take ReLU and "
            "even numbers of channels and call cs.prepare(model, images), whose mirrored kernels "
            "keep them"
        )
    normalized = any(not piece.is_layer for piece in found.passed.all)
    if normalized and verdict.kind != "saturated":
        return (
            "Put shortcuts around the blocks, or take the normalizations out and call "
            "cs.prepare(model, images), which leaves layers beside one as they are"
        )
    if verdict.kind == "collapsing":
        return f"{prepare}: it sets biases to 0, and its mirrored kernels keep images apart"
    if verdict.kind == "saturated":
        return f"{prepare}: it sets biases to 0 and gains to those of the activations"
    return f"{prepare} before training"


def _statistics(output: Tensor, count: int) -> tuple[float, float, float]:
    """Mean square, the part of it that depends on the image, and the mean cosine of two images."""
    rows = output.reshape(count, -1) if len(output) % count == 0 else output.flatten(1)
    moment = float(rows.square().mean())
    share = _ratio(float((rows - rows.mean(0)).square().mean()), moment)
    units = rows / torch.linalg.vector_norm(rows, dim=1, keepdim=True).clamp_min(1e-300)
    number = len(rows)
    pairs = number * (number - 1)
    cosine = float((units.sum(0).square().sum() - units.square().sum()) / pairs)
    return moment, share, cosine


def _ratio(numerator: float, denominator: float) -> float:
    return numerator / denominator if denominator > 0 else (0.0 if numerator == 0 else math.inf)


def _log10(value: float) -> float:
    return math.log10(min(max(value, 1e-300), 1e300))
