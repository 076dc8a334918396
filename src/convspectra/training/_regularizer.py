"""A penalty on every convolution of a model, for a training loop."""

from __future__ import annotations

import contextlib
import math
import warnings
from collections import Counter
from collections.abc import Callable, Iterable, Mapping, Sequence
from numbers import Real
from typing import Any, TypeAlias

import torch
import torch.distributed as dist
from torch import Tensor, nn

from convspectra.models import (
    DEFAULT_GROUP,
    Layer,
    Selection,
    divide_among_ranks,
    find_layers,
    is_convolution,
    piece_of,
    refuse_flat_shards,
    reshard,
    signal_flow,
    unwrapped,
    whole_weights,
)
from convspectra.operator import (
    ConvOperator,
    check_positive_integer,
    convolution_options,
    not_compiled,
    with_gradients,
)
from convspectra.training._exact_penalties import Penalty
from convspectra.training._fingerprint import Fingerprint, fingerprint
from convspectra.training._gradients import Evaluation, Gradient, KnownGradient, give_gradient
from convspectra.training._isometry_penalties import IsometryPenalties
from convspectra.training._layer_penalties import SteppedPenalties, layer_penalties
from convspectra.training._report import RegularizerReport

LayerWeights: TypeAlias = Mapping[str, float] | Callable[[str, nn.Module], float]


def checked_factor(name: str, value: object) -> float:
    """The value, or a ValueError unless it is a finite number of at least 0."""
    if isinstance(value, Tensor) and value.ndim == 0:
        value = value.item()
    if isinstance(value, bool) or not isinstance(value, Real):
        raise ValueError(f"expected {name} to be a number, got {value!r}")
    if not 0 <= float(value) < math.inf:
        raise ValueError(f"expected {name} to be finite and at least 0, got {value!r}")
    return float(value)


def layer_factors(layers: Sequence[Layer], given: LayerWeights | None) -> list[float]:
    """The factor of each layer, by name or by a function of it."""
    if given is None:
        return [1.0] * len(layers)
    if not isinstance(given, Mapping):
        if not callable(given):
            raise ValueError(
                "expected layer_weights to be a mapping of names to factors or a function of "
                f"(name, module), got {given!r}"
            )
        found = [given(layer.name, layer.module) for layer in layers]
    else:
        unknown = sorted(set(given) - {layer.name for layer in layers})
        if unknown:
            raise ValueError(
                f"expected layer_weights of the layers {[layer.name for layer in layers]}, got "
                f"some for {unknown}"
            )
        found = [given.get(layer.name, 1.0) for layer in layers]
    return [
        checked_factor(f"the weight of layer {layer.name!r}", factor)
        for layer, factor in zip(layers, found, strict=True)
    ]


def current_weight(model: nn.Module, layer: Layer, shape: torch.Size) -> Tensor:
    """The weight of a layer, or a ValueError where the model no longer has that layer.

    A module that was replaced would be penalized in silence, and its successor would not be.
    """
    module: nn.Module | None = model
    for part in filter(None, layer.name.split(".")):
        module = None if module is None else unwrapped(module)._modules.get(part)
    if module is None or unwrapped(module) is not layer.module:
        raise ValueError(
            f"layer {layer.name!r}: expected the module that was there when the regularizer was "
            "made, got another one or none; make a new SpectralRegularizer"
        )
    weight = convolution_options(layer.module)[0]
    if weight.shape != shape:
        raise ValueError(
            f"layer {layer.name!r}: expected a weight of shape {tuple(shape)}, as when the "
            f"regularizer was made, got {tuple(weight.shape)}; make a new SpectralRegularizer"
        )
    return weight


def check_group(group: object) -> None:
    """Raise a ValueError for anything that is no process group and stands for none."""
    known = group is None or isinstance(group, str)
    if not known and not (dist.is_available() and isinstance(group, dist.ProcessGroup)):
        raise ValueError(
            f"expected process_group to be {DEFAULT_GROUP!r}, None or a process group, got "
            f"{group!r}"
        )


STATE_KEYS = ("step", "started", "penalty_name", "penalty", "scale", "layers", "skipped")
"""The entries of `SpectralRegularizer.state_dict`: a choice, each is needed to go on."""


class SpectralRegularizer:
    """The weighted sum of a penalty over the layers of a model: ``loss = loss + reg()``.

    Parameters
    ----------
    model : nn.Module
        Left as it is: no parametrization, no hook, nothing in its state dict. It may be compiled,
        wrapped by DistributedDataParallel, or sharded by ``fully_shard`` (FSDP2): each call then
        gathers the weights of its layers, and writes to the pieces.
    example_input : Tensor, tuple of positional arguments, or mapping of keyword arguments
        One forward pass of it finds the input size of each layer; its values do not matter.
    penalty : str or callable
        "frobenius", "sigma_min", "sigma_max", "conditioning", "cond" or "band": singular vectors
        are followed from step to step (Note [Tracking] in `training/_followed_values.py`). "stein",
        "circular_stein" or "orthogonality", or a function that takes a `ConvOperator` and returns
        a 0-dim tensor: computed anew at every call, which the functions of `convspectra.penalties`
        do for the first ones too. "isometry": the distance to the nearest isometric layers, for
        which `step` is a contraction; it needs no singular values.
    weight : float
        Of the whole sum. Each layer's penalty is per singular value, so that layers of different
        sizes count alike.
    include, exclude : str, iterable of str, or callable (name, module) -> bool
        Which layers, by patterns like "layer1.*" or by a function; by default every convolution. A
        layer used at several input sizes counts once for each.
    layer_weights : mapping of names to float, or callable (name, module) -> float, optional
        Factors of single layers; 1 where a mapping says nothing.
    schedule : callable (step) -> float, optional
        Factor of the weight at a step, such as `Schedule`; where it is 0 nothing is computed.
    penalty_options : mapping, optional
        Keyword arguments of the penalty: ``lower``, ``upper`` and ``k`` of "band", ``k`` of
        "sigma_min" and "sigma_max". Of "isometry": ``gain``, by default what the activation behind
        each layer wants (sqrt 2 for ReLU, 1 where mirrored, 1 + 1 / sqrt(depth) for tanh);
        ``mirrored``, False for no mirrored kernels [H, -H; -H, H] before ReLUs, which are the
        default wherever channels can be halved; ``bias_decay``, the part of each bias that a step
        takes away, by default as much as of the kernels.
    improve_interval : int
        Least number of steps after which the vectors of a layer are improved by one step of
        tracking; up to six times as many where that changes little.
    refresh_interval : int
        Steps in which every layer is computed exactly once, in turns.
    nonfinite : {"raise", "skip"}
        What to do with a layer whose weight is no longer finite: name it in an error, or leave it
        out of that step and count it in the report.
    process_group : "default", None, or a torch.distributed process group
        The layers are divided among its ranks; "default" takes the group that is initialized, if
        any. Every rank must then make the same calls.

    Raises
    ------
    ValueError
        If a layer cannot be handled: it is named, with the reason. Also for an unknown penalty, a
        weight that is negative or not finite, a model without layers to include, and one that FSDP1
        wraps.

    Notes
    -----
    The first call computes every layer exactly, as `svds` does. After it a step costs, per layer
    that is followed, one product with M and one weight gradient for each singular value that the
    penalty reads, some ten products at an improvement, all in the dtype of the weights (at least
    float32), and 1 / refresh_interval of an exact computation. Memory: a copy of the weights and
    ``2 (smallest + largest) + 1`` arrays of the smaller side of each layer. On CUDA
    products of float32 are what ``torch.backends.cudnn.allow_tf32`` makes of them. The paper (arXiv
    2102.04294) adds such terms to the loss of training.

    Examples
    --------
    >>> import torch, convspectra as cs
    >>> model = torch.nn.Sequential(torch.nn.Conv2d(1, 8, 3, padding=1), torch.nn.ReLU())
    >>> reg = cs.SpectralRegularizer(model, torch.zeros(1, 1, 8, 8), penalty="frobenius")
    >>> loss = model(torch.ones(1, 1, 8, 8)).mean() + reg()
    >>> loss.backward()
    """

    @not_compiled
    def __init__(
        self,
        model: nn.Module,
        example_input: Any,
        *,
        penalty: str | Penalty = "stein",
        weight: float = 1e-2,
        include: Selection = is_convolution,
        exclude: Selection = (),
        layer_weights: LayerWeights | None = None,
        schedule: Callable[[int], float] | None = None,
        penalty_options: Mapping[str, Any] | None = None,
        improve_interval: int = 1,
        refresh_interval: int = 4000,
        nonfinite: str = "raise",
        process_group: Any = DEFAULT_GROUP,
    ) -> None:
        self.weight = checked_factor("weight", weight)
        check_positive_integer("improve_interval", improve_interval)
        check_positive_integer("refresh_interval", refresh_interval)
        if nonfinite not in ("raise", "skip"):
            raise ValueError(f"expected nonfinite to be 'raise' or 'skip', got {nonfinite!r}")
        if schedule is not None and not callable(schedule):
            raise ValueError(f"expected schedule to be a function of the step, got {schedule!r}")
        if not isinstance(model, nn.Module):
            raise ValueError(f"expected model to be a torch.nn.Module, got {type(model).__name__}")
        check_group(process_group)
        self._model = model = unwrapped(model)
        refuse_flat_shards(model)
        reshard(model)
        self._layers = find_layers(model, example_input, include, exclude)
        flows = signal_flow(model, example_input) if penalty == "isometry" else {}
        self._factors = layer_factors(self._layers, layer_weights)
        self._schedule = schedule
        self._nonfinite = nonfinite
        self._division = divide_among_ranks(
            [_cost(layer.operator()) for layer in self._layers], process_group
        )
        with self._whole():
            self._penalties = layer_penalties(
                penalty,
                penalty_options,
                self._layers,
                self._division.own,
                improve_interval,
                refresh_interval,
                flows,
            )
        self._penalty_name = penalty if isinstance(penalty, str) else "a function"
        self._shapes = [layer.operator().weight.shape for layer in self._layers]
        self._warned_of_frozen = self._warned_of_rate = False
        self._step = 0
        self._scale = 0.0  # the weight at the last call
        self._seen: Fingerprint | None = None
        self._skipped = dict.fromkeys(range(len(self._layers)), 0)
        self._last: float | None = None
        self._last_scale = 0.0  # the last weight that was not 0

    @property
    def layers(self) -> tuple[Layer, ...]:
        """The layers that are penalized, with their input sizes."""
        return tuple(self._layers)

    @property
    def step_count(self) -> int:
        """How many times the weights had changed when the penalty was asked for."""
        return self._step

    @not_compiled
    def __call__(self) -> Tensor:
        """The weighted sum over the layers as they stand now, a 0-dim tensor with gradient.

        Its dtype is that of the weights, but at least float32. Call it once for every optimizer
        step, or in every part of an accumulated batch: the singular vectors move on only when the
        weights have changed. Without gradients nothing moves on. Call ``backward`` before the
        optimizer moves the weights. Under a process group the gradient of the whole sum is the mean
        over the ranks, as DistributedDataParallel takes it.

        Raises
        ------
        ValueError, ArithmeticError, ConvergenceError
            What the penalty raises, with the name of the layer in front; ArithmeticError where the
            sum is not finite, as `cond` of a rank-deficient layer.
        """
        with self._whole() as pieces:
            value, weights, found = self._evaluate(torch.is_grad_enabled())
            if pieces:
                parts = self._in_pieces(self._everywhere(weights, found), pieces)
                return give_gradient(value, *zip(*parts, strict=True)) if parts else value
        gradients = [found.get(i) for i in weights]  # none is one of 0
        return give_gradient(
            value,
            list(weights.values()),
            [gradient and gradient.scaled(self._division.size) for gradient in gradients],
        )

    @not_compiled
    @with_gradients
    def add_gradient(self, scale: float = 1.0) -> float:
        """Add ``scale`` times the gradient to each ``.grad``; the weighted sum.

        For frameworks whose callbacks cannot change the loss. Under a process group every rank gets
        the gradient of the whole sum: call it after the gradients of the loss were reduced.
        """
        with self._whole() as pieces:
            value, weights, found = self._evaluate(True)
            parts = self._everywhere(weights, found)
            if pieces:
                parts = self._in_pieces(parts, pieces)
        for weight, gradient in parts:
            torch.autograd.backward(
                [weight], [gradient.scaled(scale).product(weight, weight.dtype)]
            )
        return float(value)

    @not_compiled
    @with_gradients
    def step(self, learning_rate: float) -> None:
        """Move the weights against the gradient, apart from the optimizer.

        ``weight -= learning_rate * gradient``, after ``optimizer.step()``: as decoupled weight
        decay does (Loshchilov and Hutter, ICLR 2019), the penalty then stays clear of Adam's
        moments. The weighted sum is in `report`. A step that could overflow, by what is known of
        the layer's largest singular value and of how often its taps are used, is shortened for that
        layer, which a warning tells once (Note [Step length]); not so where the penalty is a
        function, of which nothing is known.

        With "isometry" the argument is the rate tau of a contraction, at most 1, and the step is
        ``K <- (1 - tau) K + tau Q(K)``, Q the nearest isometric layer: it cannot overflow, and
        `weight` plays no part in it. Biases shrink by the factor ``1 - bias_decay``. Under a
        process group every rank moves its own copy of all layers, alike.

        Raises
        ------
        ValueError
            For a layer whose weight is computed, by a parametrization, from others; a tau above 1.
        """
        learning_rate = checked_factor("learning_rate", learning_rate)
        with self._whole(writes=True):
            if isinstance(self._penalties, IsometryPenalties):
                self._contract(self._penalties, learning_rate)
            else:
                self._descend(self._penalties, learning_rate)

    def _descend(self, penalties: SteppedPenalties, learning_rate: float) -> None:
        """The step against the gradient, on every rank."""
        _, weights, found = self._evaluate(True, valued=False)
        self._refuse_computed(i for i, weight in weights.items() if not weight.is_leaf)
        moves = self._moves(penalties, weights, found, learning_rate)
        by_weight: dict[int, list[tuple[Tensor, Gradient]]] = {}
        for weight, move in self._everywhere(weights, moves):
            by_weight.setdefault(id(weight), []).append((weight, move))
        with torch.no_grad():
            for pairs in by_weight.values():
                weight, gradient = pairs[0]
                # A weight may be that of several layers: all their gradients are of where it is.
                others = [other.product(weight, weight.dtype) for _, other in pairs[1:]]
                gradient.descend(weight)
                for other in others:
                    weight.sub_(other)

    def _refuse_computed(self, places: Iterable[int]) -> None:
        names = sorted({self._layers[i].name for i in places})
        if names:
            raise ValueError(
                f"expected weights that are parameters, got layers {names}, whose weights a "
                "parametrization or forward pass computes; use the additive form, loss + reg(), "
                "or exclude them"
            )

    def _contract(self, penalties: IsometryPenalties, tau: float) -> None:
        """The step of "isometry" for all layers, on every rank."""
        if tau > 1:
            raise ValueError(f"expected a tau between 0 and 1 for 'isometry', got {tau!r}")
        weights = self._weights()
        self._refuse_computed(
            i for i, weight in enumerate(weights) if not isinstance(weight, nn.Parameter)
        )
        # Every call is a step: what else changes the weights need not be looked at.
        self._step += self._seen is not None
        self._seen = ([], [])
        factor = self._schedule_factor()
        if not factor:
            return
        rates = {
            i: min(1.0, tau * factor * self._factors[i])
            for i, weight in enumerate(weights)
            if weight.requires_grad
        }
        sizes = penalties.sizes(weights, list(rates), valued=False)
        found = torch.stack(list(sizes.values())).tolist() if rates else []
        for i, size in zip(list(rates), found, strict=True):
            if not math.isfinite(size):
                self._leave_out(i, True)
                del rates[i]
        with torch.no_grad(), self._without_autocast():
            penalties.contract(weights, rates)
        self._last, self._last_scale = None, self.weight * factor or self._last_scale

    @not_compiled
    @with_gradients
    def refresh(self) -> None:
        """Compute every layer exactly now. Cost: that of `svds` at both ends of each."""
        with self._whole(), self._without_autocast():
            self._weights()
            for i in self._division.own:
                self._penalties.refresh(i, self._step)

    @not_compiled
    @with_gradients
    def report(self, *, settle: bool = True) -> RegularizerReport:
        """The knowledge of each layer, with its age and its enclosure; collective.

        A layer that is followed is not computed anew; its values are those of its vectors after
        more steps of tracking, up to 16, until they settle, which are not kept, or what Lanczos
        sees from a random vector if that is farther out. Without `settle` they are the values that
        the penalty reads, at the cost of one product for each. With a penalty that follows nothing
        ("frobenius" is one) the values are None until `refresh` was called; a report then starts
        from what that found.
        """
        with self._whole():
            self._weights()
            with self._without_autocast():
                own = {
                    i: self._penalties.report(i, self._step, self._skipped[i], settle)
                    for i in self._division.own
                }
            layers = self._division.gathered(own)
            if self._last is None and self._last_scale:
                with torch.no_grad():
                    self._evaluate(False, scale=self._last_scale)
        return RegularizerReport(
            step=self._step,
            penalty=self._last,
            layers=tuple(layers[i] for i in range(len(self._layers))),
        )

    def state_dict(self) -> dict[str, Any]:
        """Step, vectors and last exact computations, as tensors and plain numbers; collective."""
        own = {i: self._penalties.state(i) for i in self._division.own}
        skipped = {i: self._skipped[i] for i in self._division.own}
        layers, skips = self._division.gathered(own), self._division.gathered(skipped)
        return {
            "step": self._step,
            "started": self._seen is not None,
            "penalty_name": self._penalty_name,
            "penalty": self._last,
            "scale": self._last_scale,
            "layers": {layer.key: layers[i] for i, layer in enumerate(self._layers)},
            "skipped": {layer.key: skips[i] for i, layer in enumerate(self._layers)},
        }

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Go on where `state_dict` was taken, bit for bit.

        Raises
        ------
        ValueError
            If the state lacks something, or is that of other layers or of another penalty.
        """
        missing = [key for key in STATE_KEYS if key not in state]
        if missing:
            raise ValueError(
                f"expected a state with {list(STATE_KEYS)}, as state_dict gives it, got none of "
                f"{missing} in it"
            )
        if state["penalty_name"] != self._penalty_name:
            raise ValueError(
                f"expected the state of the penalty {self._penalty_name!r}, got that of "
                f"{state['penalty_name']!r}; make the regularizer with that one, or start anew"
            )
        keys = [layer.key for layer in self._layers]
        for part in ("layers", "skipped"):
            if sorted(state[part]) != sorted(keys):
                raise ValueError(
                    f"expected the state of the layers {keys}, got that of {list(state[part])}"
                )
        for i in self._division.own:
            self._penalties.load(i, state["layers"][keys[i]])
            self._skipped[i] = state["skipped"][keys[i]]
        self._step = state["step"]
        # Like no weights at all: the next call counts as a step, unless it is the first.
        self._seen = ([], []) if state["started"] else None
        self._last, self._last_scale = state["penalty"], state["scale"]

    def to(self, device: torch.device | str) -> SpectralRegularizer:
        """Move the state to where the model is moved; a call does so by itself."""
        self._penalties.to(torch.device(device))
        return self

    def __setstate__(self, state: dict[str, Any]) -> None:
        """Go on from a pickle, whose tensors lie elsewhere: as from `load_state_dict`."""
        vars(self).update(state)
        if self._seen is not None:
            self._seen = ([], [])

    def _weights(self) -> list[Tensor]:
        """The weights of the layers as they stand, or a ValueError (see `current_weight`)."""
        with torch.enable_grad():  # else weights from a parametrization look frozen
            return [
                current_weight(self._model, layer, shape)
                for layer, shape in zip(self._layers, self._shapes, strict=True)
            ]

    def _whole(
        self, *, writes: bool = False
    ) -> contextlib.AbstractContextManager[Mapping[int, Tensor]]:
        """A context in which no weight is in pieces on several ranks (see `whole_weights`)."""
        return whole_weights(self._model, [x.module for x in self._layers], writes=writes)

    def _in_pieces(
        self, parts: Sequence[tuple[Tensor, Gradient]], pieces: Mapping[int, Tensor]
    ) -> list[tuple[Tensor, Gradient]]:
        """Parameters in pieces with their parts of whole gradients, which every rank has."""
        return [
            (pieces[id(w)], KnownGradient(piece_of(gradient.product(w, w.dtype), pieces[id(w)])))
            for w, gradient in parts
        ]

    def _without_autocast(self) -> contextlib.AbstractContextManager[None]:
        """A context in which all is computed as accurately as it says, whatever surrounds it."""
        return torch.autocast(self._layers[0].operator().device.type, enabled=False)

    # --- one evaluation --------------------------------------------------------------------------

    @with_gradients
    def _evaluate(
        self, moving: bool, *, valued: bool = True, scale: float | None = None
    ) -> tuple[Tensor, dict[int, Tensor], Mapping[int, Gradient]]:
        """The sum over all ranks, if `valued`, the weights, and the gradients of this rank.

        The weights are those that take a gradient, some of which may be 0 and not among them.
        """
        valued = valued or self._penalties.gradient_needs_value
        weights = self._weights()
        failure: Exception | None = None
        value = weights[0].new_full((), math.nan, dtype=torch.float64)
        own = Evaluation(value, {})
        try:
            with torch.autocast(weights[0].device.type, enabled=False):
                own = self._evaluate_own(weights, moving, valued, scale)
        except Exception as error:
            if self._division.group is None:
                raise
            failure = error  # The other ranks wait for a value: NaN tells them.
        value = self._division.total(own.value)
        if failure is not None:
            raise failure
        if not math.isfinite(value):
            raise ArithmeticError(
                f"the penalty is not finite at step {self._step}: {float(value)}; a layer is rank "
                "deficient, or another rank raised an error"
            )
        if self._scale:
            self._last = float(value) if valued else None
            self._last_scale = self._scale
        dtype = torch.promote_types(torch.float32, weights[0].dtype)
        variables = {i: w for i, w in enumerate(weights) if moving and w.requires_grad}
        return value.to(dtype), variables, own.gradients

    def _evaluate_own(
        self, weights: list[Tensor], moving: bool, valued: bool, scale: float | None
    ) -> Evaluation:
        """The sum over the layers of this rank, and their gradients."""
        if moving:
            self._count_step(weights)
        if scale is None:
            scale = self.weight * self._schedule_factor()
        self._scale = scale
        if not self._warned_of_frozen and not any(weight.requires_grad for weight in weights):
            self._warned_of_frozen = True
            warnings.warn(
                "all layers of the regularizer are frozen: the penalty is 0 and has no gradient; "
                "requires_grad of their weights is False",
                stacklevel=4,
            )
        own = [i for i in self._division.own if weights[i].requires_grad]
        factors = {i: scale * self._factors[i] for i in own if scale * self._factors[i]}
        active = list(factors)
        sizes = self._penalties.sizes(weights, active, valued=valued)
        found = torch.stack(list(sizes.values())).tolist() if active else []
        for i, size in zip(active, found, strict=True):
            if not math.isfinite(size):
                self._leave_out(i, moving)
                del factors[i]
        return self._penalties.evaluate(
            weights, sizes, factors, self._step, moving=moving, valued=valued
        )

    def _schedule_factor(self) -> float:
        """The factor of the schedule at this step."""
        if self._schedule is None:
            return 1.0
        return checked_factor(f"the schedule at step {self._step}", self._schedule(self._step))

    def _leave_out(self, index: int, moving: bool) -> None:
        if self._nonfinite == "raise":
            raise ValueError(
                f"layer {self._layers[index].name!r}: expected a finite weight, got NaN or Inf in "
                f"it, or a norm that overflows, at step {self._step}"
            )
        self._skipped[index] += moving

    def _count_step(self, weights: list[Tensor]) -> None:
        """One step more if the weights have changed since the last call."""
        seen = fingerprint(self._layers, weights)
        if self._seen is not None and seen != self._seen:
            self._step += 1
        self._seen = seen

    def _moves(
        self,
        penalties: SteppedPenalties,
        weights: Mapping[int, Tensor],
        found: Mapping[int, Gradient],
        learning_rate: float,
    ) -> dict[int, Gradient]:
        """The steps to subtract; a warning tells once of steps that are shortened."""
        uses = Counter(id(weight) for weight in weights.values())
        factors = {i: self._scale * self._factors[i] * uses[id(weights[i])] for i in found}
        with self._without_autocast():
            moves = penalties.moves(weights, found, factors, learning_rate)
        i, rate = min(
            ((i, rate) for i, (_, rate) in moves.items()),
            key=lambda one: one[1],
            default=(0, learning_rate),
        )
        if rate < learning_rate and not self._warned_of_rate:
            self._warned_of_rate = True
            warnings.warn(
                f"step({learning_rate:g}) is shortened to {rate:.3g} for layer "
                f"{self._layers[i].name!r}, the longest that cannot overflow; others may be too, "
                "now and later, without a further warning",
                stacklevel=3,
            )
        return {i: move for i, (move, _) in moves.items()}

    def _everywhere(
        self, weights: Mapping[int, Tensor], found: Mapping[int, Gradient]
    ) -> list[tuple[Tensor, Gradient]]:
        """Weights and gradients of all ranks on each of them; collective."""
        if self._division.group is None:
            return [(weights[i], gradient) for i, gradient in found.items()]
        everywhere: list[tuple[Tensor, Gradient]] = []
        for i, weight in weights.items() if self._scale else ():
            dtype = torch.promote_types(torch.float32, weight.dtype)
            own = torch.zeros_like(weight, dtype=dtype)
            if i in found:
                own = found[i].product(weight, dtype)
            everywhere.append((weight, KnownGradient(self._division.total(own))))
        return everywhere


def _cost(op: ConvOperator) -> float:
    """Multiplications of one product with M."""
    return float(op.weight.numel() * math.prod(op.geometry.output_size))
