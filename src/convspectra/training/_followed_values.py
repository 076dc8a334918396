"""Singular values at the ends of several layers of one kind, followed while their weights move.

Note [Tracking]. Between exact computations the singular vectors are improved by one step of LOBPCG
after every few changes of the weights, in a subspace that also has the direction in which M has
changed the most since the last exact computation. Steps of training add up to a change of low rank:
soon the largest value is the one that it made, and the old vectors, of a cluster, do not see it
come. How often a layer is improved depends on how much its last improvement changed.
Only large values can be followed: a step of training moves M by dM, and no value moves by more than
||dM|| (Weyl). Values well above ||dM|| are followed closely. The vectors of values below it turn by
any angle within one step.
Zero-padded layers straight from a random initialization are of the second kind; those that
`precondition` left are of the first. In both the value given is ||M v|| for a unit vector v, up to
rounding a lower bound on sigma_max and an upper bound on sigma_min; the other sides are those of
the last exact computation, moved by a bound on ||dM||.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, fields, replace
from typing import Any

import torch
from torch import Tensor

from convspectra.models import Layer
from convspectra.operator import (
    ConvOperator,
    block_diagonal,
    convolution_options,
    rounding_of,
    squared_frobenius_norm_now,
)
from convspectra.solvers import (
    Ends,
    LinearMap,
    improved,
    random_directions,
    towards_norm,
    working_dtype,
)
from convspectra.spectra import glimpsed_ends, svds, tap_norm_bound
from convspectra.training._extreme_values import ExtremePenalty, weighted
from convspectra.training._gradients import Evaluation, SpectralGradient
from convspectra.training._report import LayerReport, is_frozen, unknown

FOLLOWED_TO = (0.05, 0.01)
"""Relative errors of smallest and of largest values that are allowed for."""
MUCH, LITTLE = 0.5, 0.12
"""Parts of these that an improvement changes, above which the next comes in half the time, and up
to which it comes in twice the time.
"""
LONGEST = 6
"""The longest time between two improvements, in least ones."""
CHANGE_EVERY = 2
"""Every so many improvements the direction of the change is followed, too."""


@dataclass
class LastExact:
    """The last exact computation of a layer, and what happened since.

    Attributes
    ----------
    weight : Tensor
        The weight at that time.
    lower, upper : list of float
        Enclosures of sigma_min and sigma_max at that time.
    step : int
        When it was.
    tried : int
        When the last one was tried, this one or one that failed.
    failures : int
        Exact computations that did not converge; the vectors at hand were kept.
    interval, due : int
        Steps from the last improvement of the vectors to the next, and when that is.
    improvements : int
        How many there were.
    """

    weight: Tensor
    lower: list[float]
    upper: list[float]
    step: int
    tried: int
    failures: int
    interval: int
    due: int
    improvements: int = 0

    @property
    def follows_change(self) -> bool:
        """Whether the next improvement follows the direction of the change, too."""
        return self.improvements % CHANGE_EVERY == 0

    def moved(self, drift: float) -> tuple[list[float], list[float]]:
        """Lower and upper bounds on sigma_min and sigma_max of a matrix that near, in 2-norm."""
        lower = [max(0.0, bound - drift) for bound in self.lower]
        return lower, [bound + drift for bound in self.upper]

    def take_turn(self, step: int, smallest: float, largest: float, least: int) -> None:
        """Note an improvement that moved smallest and largest values by these parts of them.

        The next one comes after `least` steps or more: what has not changed much is left longer.
        """
        self.improvements += 1
        moved = max(smallest / FOLLOWED_TO[0], largest / FOLLOWED_TO[1])
        if moved > MUCH:
            self.interval = max(least, self.interval // 2)
        elif moved <= LITTLE:
            self.interval = min(LONGEST * least, 2 * self.interval)
        self.due = step + self.interval


REFRESH_TOLERANCE = 1e-3
"""Relative residual of the vectors of an exact computation; values are good to its square."""
YOUNG, MORE_STEPS_WHEN_YOUNG = 4, 2
"""The change of a layer turns quickly while it is small: up to this age an improvement takes more
steps of the power method towards it than one."""
REPORT_STEPS, SETTLED = 16, 1e-5
"""Steps of tracking until a report's values settle: at most so many, until one of them changes no
value by more than this part of it, nor is a residual above the root of this."""
GLIMPSE_STEPS = 64
"""Steps of Lanczos from a random vector that a report takes beside."""
LOST = 0.1
"""Relative residual ||M'M v - s^2 v|| / s^2 from which on a vector counts as lost."""
ENDS = tuple(field.name for field in fields(Ends))
"""The names of the tensors that are followed."""


@dataclass
class Stack:
    """Layers of one kind, whose weights become the groups of one layer.

    Parameters
    ----------
    layers : sequence of Layer
    smallest, largest : int
        How many singular values to follow at each end.
    interval : int
        Least steps between two improvements of a layer's vectors.
    """

    layers: Sequence[Layer]
    smallest: int
    largest: int
    interval: int
    ends: Ends | None = None
    last_exact: list[LastExact | None] = field(default_factory=list)

    def __post_init__(self) -> None:
        self.template = self.layers[0].operator()
        self.count = min(self.template.shape)
        for asked in (self.smallest, self.largest):
            if asked > self.count:
                raise ValueError(
                    f"layer {self.layers[0].name!r}: expected k in 1 to {self.count} = "
                    f"min(op.shape), got {asked}"
                )
        self.last_exact = [None] * len(self.layers)

    # --- exact computation -----------------------------------------------------------------------

    def refresh(self, index: int, step: int) -> None:
        """Compute the ends of one layer exactly, or count the failure and keep what is known.

        Where nothing was known before, whatever the solver ended with is taken.

        Raises
        ------
        ArithmeticError, LinAlgError, ValueError
            If nothing was known before and nothing was found.
        """
        layer, last = self.layers[index], self.last_exact[index]
        op = layer.operator()
        lower, upper = [0.0, 0.0], [math.inf, math.inf]
        tall = op.shape[0] >= op.shape[1]
        found = []
        failed = False
        for end, (count, which) in enumerate(((self.smallest, "SM"), (self.largest, "LM"))):
            try:
                result = svds(op, count, which, tol=REFRESH_TOLERANCE)
            except (ArithmeticError, torch.linalg.LinAlgError):  # type: ignore[attr-defined]
                if last is None:
                    raise
                failed = True
                break
            failed = failed or not result.converged
            vectors = result.v if tall else result.u
            assert vectors is not None
            found.append(vectors.flatten(1))
            lower[end], upper[end] = float(result.lower[0]), float(result.upper[0])
        if failed and last is not None:
            last.failures, last.tried = last.failures + 1, step
            return
        weight = op.weight.detach().clone()
        self.last_exact[index] = LastExact(
            weight, lower, upper, step, step, int(failed), self.interval, due=step + self.interval
        )
        self._store(index, torch.cat(found))

    def _store(self, index: int, vectors: Tensor) -> None:
        dtype = working_dtype(self.template.dtype)
        if self.ends is None:
            shape = (len(self.layers), *vectors.shape)
            zeros = torch.zeros(shape, dtype=dtype, device=vectors.device)
            sizes = zeros[:, :, 0]
            self.ends = Ends(
                zeros, zeros.clone(), zeros[:, :1].clone(), sizes.clone(), sizes.clone()
            )
        # One seed: a layer starts alike whatever is in its stack, and whatever was before.
        generator = torch.Generator(device=vectors.device).manual_seed(0)
        self.ends.vectors[index] = vectors.to(dtype)
        self.ends.directions[index] = 0
        self.ends.change[index] = random_directions(1, vectors.shape[1], vectors, generator)
        self.ends.values[index] = 0
        self.ends.residuals[index] = 0

    # --- at every step ---------------------------------------------------------------------------

    def mean_square(self, weight: Tensor) -> Tensor:
        """``||M||_F^2 / n`` of one layer, 0-dim."""
        weight = weight.detach().to(working_dtype(weight.dtype))
        return squared_frobenius_norm_now(weight, self.template.geometry, self.count)

    def gradient_of_square(self, weight: Tensor, slope: float) -> SpectralGradient:
        """The gradient of slope times `mean_square`."""
        none = weight.new_zeros(0, dtype=working_dtype(weight.dtype))
        return SpectralGradient(self.template, right=none, left=none, square_slope=slope)

    def evaluate(
        self,
        penalty: ExtremePenalty,
        weights: Sequence[Tensor],
        squares: Mapping[int, Tensor],
        factors: Sequence[float],
        *,
        moving: bool,
        step: int | None,
    ) -> Evaluation:
        """The weighted penalties of some layers, after improvements of their vectors that are due.

        Parameters
        ----------
        weights : sequence of Tensor
            Of all the layers.
        squares : mapping
            What `mean_square` gave for the layers to evaluate, by position.
        factors : sequence of float
            Of the same layers.
        step : int, optional
            None if no vectors are to be improved.
        """
        active = list(squares)
        mean_square = torch.stack(list(squares.values()))
        scale = mean_square.new_tensor(factors)
        assert self.ends is not None
        like = self.ends.vectors
        if (like.device, like.dtype) != (weights[0].device, working_dtype(weights[0].dtype)):
            self.to(weights[0].device)
        tall = _tall(self.template)
        # The vectors that the penalty reads, without those for the report.
        low, high = penalty.smallest, penalty.largest
        columns = [*range(low), *range(self.smallest, self.smallest + high)]
        images = self._images(weights, active, columns, step)
        vectors = self.ends.vectors[active][:, columns]
        sigma = torch.linalg.vector_norm(images, dim=2)
        value, slopes = weighted(penalty, scale, mean_square, sigma[:, :low], sigma[:, low:])
        if not moving:
            return Evaluation(value, {})
        by_sigma = torch.zeros_like(sigma)
        for part, slope in ((by_sigma[:, :low], slopes[1]), (by_sigma[:, low:], slopes[2])):
            if slope is not None:
                part.copy_(slope)
        by_sigma /= sigma.clamp_min(torch.finfo(sigma.dtype).tiny)
        left = by_sigma[:, :, None] * images
        return Evaluation(
            value,
            {
                position: SpectralGradient(
                    tall,
                    v.reshape(len(v), *tall.input_shape),
                    u.reshape(len(u), *tall.output_shape),
                    None if slopes[0] is None else slopes[0][i],
                )
                for i, (position, v, u) in enumerate(zip(active, vectors, left, strict=True))
            },
        )

    def report(self, index: int, step: int, skipped: int, settle: bool) -> LayerReport:
        """The knowledge of one layer now.

        Its values are those of its vectors, or of these after steps in float64 that are not kept
        and what Lanczos sees from a random vector, if that is farther out.
        """
        layer, last, ends = self.layers[index], self.last_exact[index], self.ends
        if last is None or ends is None:
            return unknown(layer, skipped)
        if not convolution_options(layer.module)[0].isfinite().all():
            return replace(unknown(layer, skipped), failures=last.failures)
        op = layer.operator()
        op = op.with_weight(op.weight.detach().double())
        change = op.weight - last.weight.double()
        part = Ends(*(value[index : index + 1].double() for value in vars(ends).values()))
        tall, moved = _tall(op), _tall(op.with_weight(change))
        sigma = torch.zeros_like(part.residuals)
        for _ in range(REPORT_STEPS if settle else 0):
            before = sigma
            part = replace(part, change=towards_norm(*_products(moved), part.change, 1))
            part, images = improved(*_products(tall), part, self.smallest)
            sigma = torch.linalg.vector_norm(images, dim=2)
            still = (sigma - before).abs() <= SETTLED * sigma
            if bool((still & (part.residuals**2 <= SETTLED)).all()):
                break
        vectors = part.vectors[0]  # The bound is that of a product with them, not of a combination.
        images = _apply(tall.apply, tall.input_shape, vectors[None])[0]
        sigma = torch.linalg.vector_norm(images, dim=1) / torch.linalg.vector_norm(vectors, dim=1)
        smallest, largest = (float(sigma[column]) for column in (0, self.smallest))
        if settle:  # Vectors may settle on others than the extreme ones.
            least, most = glimpsed_ends(op, GLIMPSE_STEPS)
            smallest, largest = min(smallest, least or smallest), max(largest, most)
        changed = bool(change.any())
        drift = tap_norm_bound(op.with_weight(change)) if changed else 0.0
        rounding = 5 * rounding_of(op) * largest  # of squares that are a hundredth of the largest
        lower, upper = last.moved(drift)
        return LayerReport(
            name=layer.name,
            input_size=layer.input_size,
            sigma_min=smallest,
            sigma_min_lower=lower[0],
            sigma_min_upper=min(upper[0], smallest + rounding),
            sigma_max=largest,
            sigma_max_lower=max(lower[1], largest - rounding),
            sigma_max_upper=upper[1],
            condition=largest / smallest if smallest > 0 else math.inf,
            age=step - last.step,
            lost=changed and bool(part.residuals.amax() > LOST),
            failures=last.failures,
            skipped=skipped,
            frozen=is_frozen(layer),
        )

    def _stacked(self, weights: Sequence[Tensor]) -> ConvOperator:
        dtype = working_dtype(weights[0].dtype)
        ops = [self.template.with_weight(w.detach().to(dtype), check=False) for w in weights]
        return ops[0] if len(ops) == 1 else block_diagonal(ops)

    @torch.no_grad()
    def _images(
        self, weights: Sequence[Tensor], active: Sequence[int], columns: list[int], step: int | None
    ) -> Tensor:
        """M on these vectors of each active layer, after the improvements that are due."""
        ends = self.ends
        assert ends is not None
        found: dict[int, Tensor] = {}
        kinds: dict[tuple[bool, bool], list[int]] = {}
        for i in active:
            last = self._last_exact_of(i)
            due = step is not None and last.due <= step
            kinds.setdefault((due, due and last.follows_change), []).append(i)
        for (due, with_change), part in kinds.items():
            stacked = _tall(self._stacked([weights[i] for i in part]))
            if due and step is not None:
                changed = [weights[i] for i in part] if with_change else []
                images = self._improve(stacked, changed, part, step)[:, columns]
            else:
                vectors = ends.vectors[part][:, columns]
                images = _apply(stacked.apply, stacked.input_shape, vectors)
            found |= dict(zip(part, images, strict=True))
        return torch.stack([found[i] for i in active])

    def _improve(
        self, tall: ConvOperator, weights: Sequence[Tensor], chosen: list[int], step: int
    ) -> Tensor:
        """A step of tracking; M on the vectors after it, (chosen, smallest + largest, m).

        With the weights, in the direction of their change, too.
        """
        ends = self.ends
        assert ends is not None
        part = Ends(*(value[chosen] for value in vars(ends).values()))
        if weights:
            part = replace(part, change=self._change(weights, chosen, part.change, step))
        part, images = improved(*_products(tall), part, self.smallest, with_change=bool(weights))
        for name, value in vars(part).items():
            getattr(ends, name)[chosen] = value
        ratios = torch.linalg.vector_norm(images, dim=2) / part.values
        low, high = (ratios - 1).abs().nan_to_num().split([self.smallest, self.largest], dim=1)
        moved = torch.stack([low.amax(1), high.amax(1)], 1).tolist()
        for i, (smallest, largest) in zip(chosen, moved, strict=True):
            self._last_exact_of(i).take_turn(step, smallest, largest, self.interval)
        return images

    def _change(
        self, weights: Sequence[Tensor], chosen: list[int], direction: Tensor, step: int
    ) -> Tensor:
        """The direction in which each layer has changed the most, followed by a step or more."""
        lasts = [self._last_exact_of(i) for i in chosen]
        young = [step - last.step <= YOUNG for last in lasts]
        dtype = working_dtype(self.template.dtype)
        pairs = zip(weights, lasts, strict=True)
        changes = [w.detach().to(dtype) - last.weight.to(dtype) for w, last in pairs]
        change = _products(_tall(self._stacked(changes)))
        direction = towards_norm(*change, direction, 1)
        if any(young):  # one by one: what a layer does must not depend on others in its stack
            more = towards_norm(*change, direction, MORE_STEPS_WHEN_YOUNG)
            mask = torch.tensor(young, device=more.device)[:, None, None]
            direction = torch.where(mask, more, direction)
        return direction

    def _last_exact_of(self, index: int) -> LastExact:
        last = self.last_exact[index]
        assert last is not None
        return last

    # --- state -----------------------------------------------------------------------------------

    def state(self, index: int) -> dict[str, Any] | None:
        """Everything known of one layer, as tensors and plain numbers."""
        last = self.last_exact[index]
        if last is None:
            return None
        assert self.ends is not None
        ends = {name: value[index].clone() for name, value in vars(self.ends).items()}
        return dict(vars(last)) | ends

    def load(self, index: int, state: dict[str, Any] | None) -> None:
        """Take up what `state` gave; a ValueError if it is that of another penalty or layer."""
        if state is None:
            self.last_exact[index] = None
            return
        expected = {*ENDS, *(field.name for field in fields(LastExact))}
        if set(state) != expected:
            raise ValueError(
                f"expected a state with {sorted(expected)}, got one with {sorted(state)}"
            )
        state = dict(state)
        weight = self.template.weight
        if state["weight"].shape != weight.shape:
            raise ValueError(
                f"expected the state of a weight of shape {tuple(weight.shape)}, got one of "
                f"{tuple(state['weight'].shape)}; it is that of another model"
            )
        tensors = {name: state.pop(name).to(weight.device) for name in ENDS}
        vectors = tensors["vectors"]
        if len(vectors) != self.smallest + self.largest:
            raise ValueError(
                f"expected a state with {self.smallest + self.largest} singular vectors, got "
                f"{len(vectors)}; it is that of another penalty"
            )
        self.last_exact[index] = LastExact(**state | {"weight": state["weight"].to(weight.device)})
        self._store(index, vectors)
        assert self.ends is not None
        for name, value in tensors.items():
            getattr(self.ends, name)[index] = value

    def to(self, device: torch.device) -> None:
        """Move the vectors and the weights of the last exact computations, in the dtype of now."""
        self.template = self.layers[0].operator()
        if self.ends is not None:
            dtype = working_dtype(self.template.dtype)
            self.ends = Ends(*(value.to(device, dtype) for value in vars(self.ends).values()))
        for last in self.last_exact:
            if last is not None:
                last.weight = last.weight.to(device)


def _tall(op: ConvOperator) -> ConvOperator:
    """M or M', whichever has at least as many rows as columns."""
    return op if op.shape[0] >= op.shape[1] else op.T


def _products(op: ConvOperator) -> tuple[LinearMap, LinearMap]:
    return (
        lambda x: _apply(op.apply, op.input_shape, x),
        lambda y: _apply(op.apply_adjoint, op.output_shape, y),
    )


def _apply(function: Any, shape: tuple[int, ...], x: Tensor) -> Tensor:
    """A layer of `count` groups on (count, k, n): one batch of k."""
    count, k = x.shape[:2]
    batch = x.transpose(0, 1).reshape(k, *shape)
    y: Tensor = function(batch)
    return y.reshape(k, count, -1).transpose(0, 1)
