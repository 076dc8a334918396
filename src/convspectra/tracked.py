"""Singular values at the ends of several layers of one kind, followed while their weights move.

Note [Tracking]. Between exact computations the singular vectors are improved by one step of LOBPCG
after every few changes of the weights. What that can follow is a matter of size: a step of training
moves M by dM, and no value moves by more than ||dM|| (Weyl), so that values well above ||dM|| are
followed closely, while the vectors of values below it turn by any angle within one step.
Zero-padded layers straight from a random initialisation are of the second kind; those that
`precondition` left are of the first. In both the value given is ||M v|| for a unit vector v, up to
rounding a lower bound on sigma_max and an upper bound on sigma_min; the other sides are those of
the last exact computation, moved by a bound on ||dM||.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any

import torch
from torch import Tensor

from convspectra.bounds import tap_norm_bound
from convspectra.gradients import Gradient
from convspectra.layers import Layer
from convspectra.matrices import frobenius_form
from convspectra.modules import convolution_options
from convspectra.objectives import Objective
from convspectra.operator import ConvOperator, block_diagonal
from convspectra.regularizer_report import LayerReport, is_frozen, unknown
from convspectra.solvers.tracking import Ends, improved
from convspectra.spectra import svds

GUARDS = 1
"""Vectors followed besides those asked for at the lower end, where values are close together."""
REFRESH_TOLERANCE = 1e-3
"""Relative residual of the vectors of an exact computation; values are good to its square."""
LOST = 0.1
"""Relative residual ||M'M v - s^2 v|| / s^2 from which on a vector counts as lost."""


@dataclass
class Reference:
    """What the last exact computation of a layer found, and what happened since.

    Attributes
    ----------
    weight : Tensor
        The weight at that time.
    lower, upper : list of float
        Enclosures of sigma_min and sigma_max at that time.
    step : int
        When it was.
    failures : int
        Exact computations that did not converge; the vectors at hand were kept.
    """

    weight: Tensor
    lower: list[float]
    upper: list[float]
    step: int
    failures: int = 0


@dataclass(frozen=True)
class Evaluation:
    """The weighted sum of the penalties of the layers of a stack, and its gradients.

    Attributes
    ----------
    value : Tensor
        0-dim, float64.
    gradients : list of Gradient
        One a layer; none if they were not asked for.
    """

    value: Tensor
    gradients: list[Gradient]


@dataclass
class Stack:
    """Layers of one kind, whose weights become the groups of one layer.

    Parameters
    ----------
    layers : sequence of Layer
    smallest, largest : int
        How many singular values to follow at each end.
    """

    layers: Sequence[Layer]
    smallest: int
    largest: int
    ends: Ends | None = None
    references: list[Reference | None] = field(default_factory=list)

    def __post_init__(self) -> None:
        self.template = self.layers[0].operator()
        count = min(self.template.shape)
        for asked in (self.smallest, self.largest):
            if asked > count:
                raise ValueError(
                    f"layer {self.layers[0].name!r}: expected k in 1 to {count} = min(op.shape), "
                    f"got {asked}"
                )
        self.asked = self.smallest
        if self.smallest:
            self.smallest = min(self.smallest + GUARDS, count)
        self.count = count
        self.references = [None] * len(self.layers)

    # --- exact computation -----------------------------------------------------------------------

    def refresh(self, index: int, step: int) -> None:
        """Compute the ends of one layer exactly, or count the failure and keep what is known.

        Where nothing was known before, whatever the solver ended with is taken.

        Raises
        ------
        ArithmeticError, LinAlgError, ValueError
            If nothing was known before and nothing was found.
        """
        layer, reference = self.layers[index], self.references[index]
        op = layer.operator()
        lower, upper = [0.0, 0.0], [math.inf, math.inf]
        tall = op.shape[0] >= op.shape[1]
        found = []
        failed = False
        for end, (count, which) in enumerate(((self.asked, "SM"), (self.largest, "LM"))):
            if count == 0:
                continue
            try:
                result = svds(op, count, which, tol=REFRESH_TOLERANCE)
            except (ArithmeticError, torch.linalg.LinAlgError):  # type: ignore[attr-defined]
                if reference is None:
                    raise
                failed = True
                break
            failed = failed or not result.converged
            vectors = result.v if tall else result.u
            assert vectors is not None
            found.append(vectors.flatten(1))
            if which == "SM":  # guards come out of the steps that follow
                found.append(
                    vectors.flatten(1).new_zeros(self.smallest - self.asked, found[0].shape[1])
                )
            lower[end], upper[end] = float(result.lower[0]), float(result.upper[0])
        if failed and reference is not None:
            reference.failures += 1
            return
        weight = op.weight.detach().clone()
        self.references[index] = Reference(weight, lower, upper, step, int(failed))
        if found:
            self._store(index, torch.cat(found))

    def _store(self, index: int, vectors: Tensor) -> None:
        dtype = working_dtype(self.template.dtype)
        if self.ends is None:
            shape = (len(self.layers), *vectors.shape)
            zeros = torch.zeros(shape, dtype=dtype, device=vectors.device)
            self.ends = Ends(zeros, zeros.clone(), zeros[:, :, 0] + math.inf)
        self.ends.vectors[index] = vectors.to(dtype)
        self.ends.directions[index] = 0
        self.ends.residuals[index] = 0

    # --- at every step ---------------------------------------------------------------------------

    def mean_square(self, weight: Tensor) -> tuple[Tensor, Tensor]:
        """``||M||_F^2 / n`` of one layer, 0-dim, and half its gradient by the weight."""
        weight = weight.detach().to(working_dtype(weight.dtype))
        weighted = frobenius_form(weight, self.template.geometry, divisor=self.count)
        return torch.dot(weight.flatten(), weighted.flatten()), weighted

    def evaluate(
        self,
        objective: Objective,
        weights: Sequence[Tensor],
        squares: Mapping[int, tuple[Tensor, Tensor]],
        factors: Sequence[float],
        *,
        moving: bool,
        improving: bool,
    ) -> Evaluation:
        """The weighted penalties of some layers, after a step towards their vectors if asked for.

        Parameters
        ----------
        weights : sequence of Tensor
            Of all the layers.
        squares : mapping
            What `mean_square` gave for the layers to evaluate, by position; used up.
        factors : sequence of float
            Of the same layers.
        """
        active = list(squares)
        mean_square = torch.stack([square for square, _ in squares.values()])
        scale = mean_square.new_tensor(factors)
        if self.ends is None:
            value, (slope,) = _weighted(objective, scale, mean_square)
            assert slope is not None
            forms = [form for _, form in squares.values()] if moving else []
            factors_of_forms = zip(forms, 2 * slope, strict=False)
            return Evaluation(value, [Gradient(form, factor) for form, factor in factors_of_forms])
        if self.ends.vectors.device != weights[0].device:
            self.to(weights[0].device)
        op = self._stacked([weights[i] for i in active])
        tall = _tall(op)
        if improving:
            self._improve(tall, active)
        # The vectors that the penalty reads, without guards and without those for the report.
        low, high = objective.smallest, objective.largest
        columns = [*range(low), *range(self.smallest, self.smallest + high)]
        vectors = self.ends.vectors[active][:, columns]
        variable = op.weight.requires_grad_()
        with torch.set_grad_enabled(moving):
            layer = tall.with_weight(variable, check=False)
            images = _apply(layer.apply, layer.input_shape, vectors)
        fixed = images.detach()
        sigma = torch.linalg.vector_norm(fixed, dim=2)
        value, slopes = _weighted(objective, scale, mean_square, sigma[:, :low], sigma[:, low:])
        if not moving:
            return Evaluation(value, [])
        by_sigma = torch.zeros_like(sigma)
        for part, slope in ((by_sigma[:, :low], slopes[1]), (by_sigma[:, low:], slopes[2])):
            if slope is not None:
                part.copy_(slope)
        by_sigma /= sigma.clamp_min(torch.finfo(sigma.dtype).tiny)
        (gradient,) = torch.autograd.grad(images, variable, by_sigma[:, :, None] * fixed)
        parts = list(gradient.chunk(len(active)))
        if slopes[0] is not None:
            forms = [form for _, form in squares.values()]
            for part, form, factor in zip(parts, forms, 2 * slopes[0], strict=True):
                part.addcmul_(form, factor)
        return Evaluation(value, [Gradient(part) for part in parts])

    def report(self, index: int, step: int, skipped: int) -> LayerReport:
        """What is known of one layer now: its values are computed from its vectors in float64."""
        layer, reference, ends = self.layers[index], self.references[index], self.ends
        if reference is None or ends is None:
            return unknown(layer, skipped)
        if not convolution_options(layer.module)[0].isfinite().all():
            return replace(unknown(layer, skipped), failures=reference.failures)
        op = layer.operator()
        op = op.with_weight(op.weight.detach().double())
        tall = _tall(op)
        vectors = ends.vectors[index].double()
        images = tall.apply(vectors.reshape(-1, *tall.input_shape)).flatten(1)
        sigma = torch.linalg.vector_norm(images, dim=1) / torch.linalg.vector_norm(vectors, dim=1)
        smallest, largest = (float(sigma[column]) for column in (0, self.smallest))
        asked = [*range(self.asked), *range(self.smallest, len(sigma))]
        change = op.weight - reference.weight.double()
        drift = tap_norm_bound(op.with_weight(change)) if bool(change.any()) else 0.0
        rounding = 64 * torch.finfo(torch.float64).eps * largest
        lower = [max(0.0, bound - drift) for bound in reference.lower]
        upper = [bound + drift for bound in reference.upper]
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
            age=step - reference.step,
            lost=bool(ends.residuals[index, asked].amax() > LOST),
            failures=reference.failures,
            skipped=skipped,
            frozen=is_frozen(layer),
        )

    def _stacked(self, weights: Sequence[Tensor]) -> ConvOperator:
        dtype = working_dtype(weights[0].dtype)
        ops = [
            self.template.with_weight(weight.detach().to(dtype), check=False) for weight in weights
        ]
        return ops[0] if len(ops) == 1 else block_diagonal(ops)

    def _improve(self, tall: ConvOperator, active: Sequence[int]) -> None:
        assert self.ends is not None
        chosen = list(active)
        ends = self.ends
        part = Ends(ends.vectors[chosen], ends.directions[chosen], ends.residuals[chosen])
        with torch.no_grad():
            part = improved(
                lambda x: _apply(tall.apply, tall.input_shape, x),
                lambda y: _apply(tall.apply_adjoint, tall.output_shape, y),
                part,
                self.smallest,
            )
        ends.vectors[chosen] = part.vectors
        ends.directions[chosen] = part.directions
        ends.residuals[chosen] = part.residuals

    # --- state -----------------------------------------------------------------------------------

    def state(self, index: int) -> dict[str, Any] | None:
        """Everything known of one layer, as tensors and plain numbers."""
        reference = self.references[index]
        if reference is None:
            return None
        state: dict[str, Any] = dict(vars(reference))
        if self.ends is not None:
            state |= {name: value[index].clone() for name, value in vars(self.ends).items()}
        return state

    def load(self, index: int, state: dict[str, Any] | None) -> None:
        """Take up what `state` gave; a ValueError if it follows other singular values."""
        if state is None:
            self.references[index] = None
            return
        state = dict(state)
        weight = self.template.weight
        tensors = {name: state.pop(name, None) for name in ("vectors", "directions", "residuals")}
        vectors = tensors["vectors"]
        rows = 0 if vectors is None else len(vectors)
        if rows != self.smallest + self.largest:
            raise ValueError(
                f"expected a state with {self.smallest + self.largest} singular vectors, got "
                f"{rows}; it is that of another penalty"
            )
        self.references[index] = Reference(**state | {"weight": state["weight"].to(weight.device)})
        if vectors is not None:
            self._store(index, vectors.to(weight.device))
            assert self.ends is not None
            for name, value in tensors.items():
                getattr(self.ends, name)[index] = value.to(weight.device)

    def to(self, device: torch.device) -> None:
        """Move the vectors and the weights of the last exact computations."""
        self.template = self.layers[0].operator()
        if self.ends is not None:
            self.ends = Ends(*(value.to(device) for value in vars(self.ends).values()))
        for reference in self.references:
            if reference is not None:
                reference.weight = reference.weight.to(device)


def _tall(op: ConvOperator) -> ConvOperator:
    """M or M', whichever has at least as many rows as columns."""
    return op if op.shape[0] >= op.shape[1] else op.T


def working_dtype(dtype: torch.dtype) -> torch.dtype:
    """The type in which a layer is followed: its own, or float32 for a narrower one."""
    return torch.promote_types(dtype, torch.float32)


def _apply(function: Any, shape: tuple[int, ...], x: Tensor) -> Tensor:
    """A layer of `count` groups on (count, k, n): one batch of k."""
    count, k = x.shape[:2]
    batch = x.transpose(0, 1).reshape(k, *shape)
    y: Tensor = function(batch)
    return y.reshape(k, count, -1).transpose(0, 1)


def _weighted(
    objective: Objective, scale: Tensor, mean_square: Tensor, *sigma: Tensor
) -> tuple[Tensor, tuple[Tensor | None, ...]]:
    """The weighted sum of penalties, and its derivatives by ||M||_F^2 / n and the values."""
    variables = [x.detach().double().requires_grad_() for x in (mean_square, *sigma)]
    with torch.enable_grad():
        empty = variables[0].new_zeros(len(mean_square), 0)
        low, high = variables[1:] if sigma else (empty, empty)
        value = (scale * objective.function(low, high, variables[0])).sum()
        slopes = torch.autograd.grad(value, variables, allow_unused=True)
    narrow = (None if slope is None else slope.to(mean_square.dtype) for slope in slopes)
    return value.detach(), tuple(narrow)
