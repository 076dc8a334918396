"""The Jacobian of a network at an input, as an operator: two products, no matrix.

Note [Two ways forward]. ``J t`` comes from forward-mode differentiation. Where an operation has
none, ``y' J`` is a linear function of y, and differentiating that once more in y gives ``J t``: the
model's operations must then be differentiable twice. Either way the products are held against
``J' y`` of reverse mode at a random pair before anything else is computed with them.
"""

from __future__ import annotations

import contextlib
import math
from collections.abc import Callable
from typing import Any

import torch
from scipy.sparse.linalg import LinearOperator
from torch import Tensor, nn

from convspectra.models import Arguments, example_arguments
from convspectra.network._frozen import quiet, readable_errors, undisturbed
from convspectra.network._segment import Segment, Selector
from convspectra.operator import (
    DEFAULT_MAX_BYTES,
    check_array,
    check_bytes,
    check_choice,
    scipy_operator,
    with_gradients,
)

METHODS = ("auto", "forward", "double backward")
"""The names that `JacobianOperator(method=...)` takes."""
AT_ONCE = 16
"""Arrays in one batched product. A choice: it bounds the memory to so many times that of one pass,
and changes no answer."""
AGREEMENT = 0.5
"""Both products of a pair agree to this power of eps, relative to the sizes of the factors, or they
are not those of one matrix. Through 1,000 tanh layers they differ by 2e-15 in double precision,
with a straight-through gradient by about 1. A choice in between: nothing breaks at half or
double."""


class JacobianOperator:
    """The Jacobian J of a network at an input, of shape (prod(output_shape), prod(input_shape)).

    Parameters
    ----------
    model : nn.Module
        Copied, in evaluation mode and in `dtype`: nothing of it changes, neither modes nor buffers,
        hooks, gradients or the random state. Its hooks run, on the copy.
    x : Tensor, tuple of positional arguments, or mapping of keyword arguments
        One sample with its batch axis, (1, ...). J is that with respect to the first one.
    start : str, optional
        Name of a module, as in ``model.named_modules()``: J is with respect to its input. Signals
        that go around it, through skips, are held fixed.
    end : str, optional
        Name of a module: J is that of its output.
    select : callable, optional
        The tensor that is meant, from the output at the end; needed where there are several.
    dtype : torch.dtype
        Of all that is computed.
    method : {"auto", "forward", "double backward"}
        How ``J t`` is computed: by forward-mode differentiation, or where an operation has none by
        differentiating the reverse-mode product in its cotangent. "auto" takes the first that
        works.

    Attributes
    ----------
    method : str
        "forward" or "double backward".

    Raises
    ------
    ValueError
        For an input that is not floating, not finite or no single sample, an unknown `start` or
        `end` or one that is called more than once, an output of several tensors without `select`, a
        model that casts to another precision, that is random in evaluation mode, whose output does
        not depend on the input differentiably, or whose forward and reverse products disagree; the
        module is named where one can be.

    Notes
    -----
    Cost: five passes at construction; then a product ``J t`` takes about three forward passes
    ("double backward": three backward passes) and ``J' y`` one backward pass. Memory: the copied
    model, and one pass with its activations, kept for the reverse products. At a kink, such as
    that of ReLU at 0, J is the one that PyTorch's rules give.

    See docs/network.md. Forward mode: Griewank and Walther, Evaluating Derivatives, SIAM 2008,
    section 3.1; double backward: section 3.2.

    Examples
    --------
    >>> import torch, convspectra as cs
    >>> model = torch.nn.Sequential(torch.nn.Conv2d(1, 2, 3, padding=1), torch.nn.Tanh())
    >>> J = cs.JacobianOperator(model, torch.zeros(1, 1, 8, 8))
    >>> J.shape, J.input_shape, J.output_shape, J.method
    ((128, 64), (1, 8, 8), (2, 8, 8), 'forward')
    >>> J.apply(torch.ones(3, 1, 8, 8, dtype=torch.float64)).shape
    torch.Size([3, 2, 8, 8])
    """

    @with_gradients
    def __init__(
        self,
        model: nn.Module,
        x: Any,
        start: str | None = None,
        end: str | None = None,
        *,
        select: Selector | None = None,
        dtype: torch.dtype = torch.float64,
        method: str = "auto",
    ) -> None:
        check_choice("method", method, METHODS)
        if dtype not in (torch.float64, torch.float32):
            raise ValueError(f"expected dtype to be torch.float64 or torch.float32, got {dtype!r}")
        inputs = example_arguments(x)
        _check_sample(inputs)
        segment = Segment(model, inputs, start, end, select, dtype)
        device = inputs.first.device
        with undisturbed(device):
            self._products = _Products(segment, dtype, device, method)
        self._transposed = False

    @property
    def method(self) -> str:
        """How products with J are computed: "forward" or "double backward"."""
        return self._products.method

    @property
    def dtype(self) -> torch.dtype:
        """Type of the arrays that the operator takes and gives."""
        return self._products.z.dtype

    @property
    def device(self) -> torch.device:
        """Device of the input."""
        return self._products.z.device

    @property
    def input_shape(self) -> tuple[int, ...]:
        """Shape of the input at the start, without the batch axis of one sample."""
        z, y = self._products.z, self._products.y
        return _without_batch(y if self._transposed else z)

    @property
    def output_shape(self) -> tuple[int, ...]:
        """Shape of the output at the end, without the batch axis of one sample."""
        z, y = self._products.z, self._products.y
        return _without_batch(z if self._transposed else y)

    @property
    def shape(self) -> tuple[int, int]:
        """(rows, columns) of J."""
        return math.prod(self.output_shape), math.prod(self.input_shape)

    @property
    def value(self) -> Tensor:
        """The output of the network at the input, with its batch axis."""
        return self._products.y.detach()

    @property
    def T(self) -> JacobianOperator:
        """The operator of J', sharing everything."""
        other: JacobianOperator = object.__new__(JacobianOperator)
        other._products, other._transposed = self._products, not self._transposed
        return other

    def apply(self, x: Tensor) -> Tensor:
        """J x for a batch, (b, *input_shape) to (b, *output_shape), without the checks."""
        return self._map(x, self._transposed, self.output_shape)

    def apply_adjoint(self, y: Tensor) -> Tensor:
        """J' y for a batch, (b, *output_shape) to (b, *input_shape), without the checks."""
        return self._map(y, not self._transposed, self.input_shape)

    def matvec(self, x: Tensor) -> Tensor:
        """J x for one array or a batch.

        Parameters
        ----------
        x : Tensor
            (*input_shape) or (b, *input_shape), of the operator's dtype and device, finite.

        Returns
        -------
        Tensor
            (*output_shape) or (b, *output_shape).

        Raises
        ------
        ValueError
            For another shape, dtype or device, an empty batch, NaN or Inf.

        Examples
        --------
        >>> J = JacobianOperator(nn.Tanh(), torch.zeros(1, 3))
        >>> J.matvec(torch.ones(3, dtype=torch.float64))
        tensor([1., 1., 1.], dtype=torch.float64)
        """
        return self._checked("x", x, self.input_shape, self.apply)

    def rmatvec(self, y: Tensor) -> Tensor:
        """J' y for one array or a batch: as `matvec`, from output_shape to input_shape."""
        return self._checked("y", y, self.output_shape, self.apply_adjoint)

    def to_dense(self, max_bytes: int = DEFAULT_MAX_BYTES) -> Tensor:
        """J as a dense tensor of shape `shape`, by as many products as its smaller side.

        Raises
        ------
        ValueError
            If J takes more than `max_bytes` (2 GiB unless said otherwise).
        """
        rows, columns = self.shape
        needed = rows * columns * self.dtype.itemsize
        check_bytes("the dense Jacobian", needed, max_bytes)
        wide = rows < columns
        side, shape = (rows, self.output_shape) if wide else (columns, self.input_shape)
        product = self.apply_adjoint if wide else self.apply
        blocks = []
        for first in range(0, side, AT_ONCE):
            unit = torch.zeros(min(AT_ONCE, side - first), side, dtype=self.dtype, device="cpu")
            unit[:, first:].fill_diagonal_(1)
            units = unit.to(self.device).reshape(-1, *shape)
            blocks.append(product(units).reshape(len(units), -1))
        matrix = torch.cat(blocks)
        return matrix if wide else matrix.T

    def to_scipy(self) -> LinearOperator:
        """J as a `scipy.sparse.linalg.LinearOperator`, on NumPy arrays of the operator's dtype."""
        return scipy_operator(
            self.apply, self.apply_adjoint, self.input_shape, self.output_shape, self._products.z
        )

    def __repr__(self) -> str:
        return (
            f"JacobianOperator({self.input_shape} -> {self.output_shape}, method={self.method!r}, "
            f"dtype={self.dtype}, device={self.device})"
        )

    def _map(self, x: Tensor, adjoint: bool, shape: tuple[int, ...]) -> Tensor:
        product = self._products.reverse if adjoint else self._products.forward
        with undisturbed(self.device):
            parts = [product(part) for part in x.split(AT_ONCE)]
        return torch.cat(parts).reshape(-1, *shape)

    def _checked(
        self, name: str, x: Tensor, shape: tuple[int, ...], product: Callable[[Tensor], Tensor]
    ) -> Tensor:
        check_array(name, x, shape, like=self._products.z)
        return product(x) if x.ndim > len(shape) else product(x[None])[0]


class _Products:
    """Both products at one input, with the graph of one pass kept for those of reverse mode."""

    @with_gradients
    def __init__(
        self, segment: Segment, dtype: torch.dtype, device: torch.device, method: str
    ) -> None:
        self._segment = segment
        with readable_errors("forward pass"):
            with torch.no_grad():
                z = segment.input()
                first, second = segment(z), segment(z)
            if first.dtype != dtype:
                raise ValueError(
                    f"expected an output of {dtype}, got {first.dtype}: the model casts; ask for "
                    f"dtype={first.dtype} or take the cast out"
                )
            if first.numel() == 0 or not bool(torch.isfinite(first).all()):
                raise ValueError(
                    f"expected a finite output, got the shape {tuple(first.shape)}"
                    + (", which is empty" if first.numel() == 0 else " with NaN or Inf in it")
                )
            if not torch.equal(first, second):
                _name_the_random_module(segment, z)
        self.z = z.detach().clone().requires_grad_()
        with torch.enable_grad(), readable_errors("forward pass with gradients"):
            self.y = segment(self.z)
        if not self.y.requires_grad:
            raise ValueError(
                "expected an output that depends on the input differentiably, got one that does "
                "not: rounding, an index, detach() or no_grad() lies between them"
            )
        self._batched = {"forward": True, "reverse": True, "double backward": True}
        self._linear: tuple[Tensor, Tensor] | None = None
        self.method = self._working(method)

    @with_gradients
    def forward(self, t: Tensor) -> Tensor:
        """J t for a batch."""
        name = self.method
        return self._batch(t, name, self._jvp if name == "forward" else self._double_backward)

    @with_gradients
    def reverse(self, y: Tensor) -> Tensor:
        """J' y for a batch."""
        return self._batch(y, "reverse", self._vjp)

    def _batch(self, x: Tensor, name: str, product: Callable[[Tensor, bool], Tensor]) -> Tensor:
        """One batched product, or where an operation of the model cannot be, one after another."""
        x = x.to(self.z)
        if len(x) > 1 and self._batched[name]:
            with contextlib.suppress(RuntimeError):  # NotImplementedError is one of them
                return product(x, True)
            self._batched[name] = False
        return torch.stack([product(row, False) for row in x])

    def _jvp(self, t: Tensor, batched: bool) -> Tensor:
        z = self.z.detach()

        def along(direction: Tensor) -> Tensor:
            return torch.func.jvp(self._segment, (z,), (direction,))[1]

        with torch.no_grad(), quiet():
            if not batched:
                return along(t.reshape(z.shape))
            directions = t.reshape(-1, *z.shape)
            return torch.func.vmap(along)(directions)

    def _vjp(self, y: Tensor, batched: bool) -> Tensor:
        return _derivative(self.y, self.z, y, batched)

    def _double_backward(self, t: Tensor, batched: bool) -> Tensor:
        if self._linear is None:
            dummy = torch.zeros_like(self.y, requires_grad=True)
            with torch.enable_grad():
                (pulled,) = torch.autograd.grad(self.y, self.z, dummy, create_graph=True)
            self._linear = pulled, dummy
        pulled, dummy = self._linear
        return _derivative(pulled, dummy, t, batched)

    def _working(self, method: str) -> str:
        """The way to J t that can be taken and agrees with J' y."""
        generator = torch.Generator(device=self.z.device).manual_seed(0)
        t, y = (
            torch.randn(like.shape, dtype=like.dtype, device=like.device, generator=generator)
            for like in (self.z, self.y)
        )
        with readable_errors("backward pass"):
            back = self._vjp(y, False)
        _check_finite(self._segment, self.z, back)
        failures = []
        for name in METHODS[1:] if method == "auto" else (method,):
            product = self._jvp if name == "forward" else self._double_backward
            try:
                along = product(t, False)
            except (RuntimeError, TypeError) as error:
                failures.append(f"{name}: {' '.join(str(error).split())[:200]}")
                continue
            _check_finite(self._segment, self.z, along)
            left, right = float((along * y).sum()), float((t * back).sum())
            norm = torch.linalg.vector_norm
            scale = float(norm(along) * norm(y) + norm(t) * norm(back))
            if not abs(left - right) <= torch.finfo(self.z.dtype).eps ** AGREEMENT * scale:
                raise ValueError(
                    f"expected forward and reverse products of one matrix, got <J t, y> = "
                    f"{left:.6e} and <t, J' y> = {right:.6e} for a random pair ({name}): an "
                    "operation of the model has a gradient that is not its derivative, such as a "
                    "straight-through estimator"
                )
            return name
        raise ValueError(
            "expected a model whose products with J can be computed, got errors in every way: "
            + "; ".join(failures)
        )


def _derivative(output: Tensor, input_: Tensor, y: Tensor, batched: bool) -> Tensor:
    """The reverse-mode product, one or a batch, of a graph that is kept."""
    shape = (-1, *output.shape) if batched else output.shape
    with quiet():
        (result,) = torch.autograd.grad(
            output,
            input_,
            y.reshape(shape),
            retain_graph=True,
            is_grads_batched=batched,
            materialize_grads=True,
        )
    return result.detach()


def _check_sample(inputs: Arguments) -> None:
    if not isinstance(inputs.first, Tensor):
        raise ValueError(
            "expected x to be a tensor, or a tuple or mapping of arguments with a tensor first, "
            f"got {type(inputs.first).__name__}"
        )
    shape = tuple(inputs.first.shape)
    if not shape or shape[0] != 1:
        raise ValueError(
            f"expected x to be one sample with its batch axis, (1, ...), got the shape {shape}; "
            "give x[:1] or x[None]"
        )


def _without_batch(array: Tensor) -> tuple[int, ...]:
    shape = tuple(array.shape)
    return shape[1:] if shape[:1] == (1,) else shape


def _name_the_random_module(segment: Segment, z: Tensor) -> None:
    """Raise a ValueError with the first module that gives two answers to one input."""
    with torch.no_grad():
        runs = zip(segment.outputs(z), segment.outputs(z), strict=False)
    names = [name for (name, first), (_, second) in runs if not torch.equal(first, second)]
    raise ValueError(
        f"expected a model without randomness in evaluation mode, got two outputs for one input, "
        f"from module {names[0] if names else ''!r} on; take its dropout or noise out of evaluation"
    )


def _check_finite(segment: Segment, z: Tensor, product: Tensor) -> None:
    """Raise a ValueError that names the module up to which gradients are not finite."""
    if bool(torch.isfinite(product).all()):
        return
    with torch.enable_grad():
        passed = [(name, t) for name, t in segment.outputs(z) if t.requires_grad]
        end = segment(z)
    place = "the end"
    if passed:
        outputs = [t for _, t in passed]
        gradients = torch.autograd.grad(
            outputs[-1].sum(), outputs, allow_unused=True, materialize_grads=True
        )
        # The last gradient on the way back that is finite: ReLU may hide those before it.
        broken = [i for i, part in enumerate(gradients) if not bool(part.isfinite().all())]
        culprit = min(max(broken, default=-1) + 1, len(passed) - 1)
        place = f"the output of module {passed[culprit][0]!r}"
    raise ValueError(
        f"expected a model that is differentiable at x, got NaN or Inf in its Jacobian of shape "
        f"{(end.numel(), z.numel())}, on the way up to {place}; move x away from there"
    )
