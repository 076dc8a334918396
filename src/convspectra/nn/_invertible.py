"""A convolution with zero padding that is undone exactly, and tells its determinant."""

from __future__ import annotations

import math
from collections.abc import Sequence
from numbers import Integral
from typing import Any

import torch
from torch import Tensor, nn

from convspectra.nn._factors import Factors, Inverse, LogAbsDet
from convspectra.operator import (
    ConvOperator,
    check_choice,
    check_positive_integer,
    not_compiled,
)
from convspectra.spectra import svds

ORDERS = (None, "forward", "backward")
"""Which pixels an output may read: all, or those up to it in reading order, or from it on."""
SPREAD = 0.1
"""Standard deviation of the taps beside the center at the start, over the root of their number in a
row of W: a perturbation of about that norm of an orthogonal layer. A choice."""


class InvertibleConv2d(nn.Module):
    """A square convolution with zero padding, its inverse and its log-determinant.

    Parameters
    ----------
    channels : int
        Of inputs and outputs alike.
    kernel_size : int or (int, int)
        Odd.
    input_size : int or (int, int)
        Height and width of the images: another size is another matrix, and refused.
    bias : bool
    order : {None, "forward", "backward"}
        None for all taps. "forward" and "backward" mask the taps that read pixels after, or before,
        the output's own in reading order: the determinant is that of the center tap then, and the
        inverse a substitution (emerging convolutions: Hoogeboom, van den Berg and Welling, ICML
        2019, arXiv:1901.11137, mask channels as well).
    device, dtype
        Of the parameters.

    Attributes
    ----------
    weight : Parameter
        (channels, channels, *kernel_size): orthogonal at the center, and small beside it.
    bias : Parameter or None

    Raises
    ------
    ValueError
        For an even kernel, or images of another size or number of channels.
    ArithmeticError
        If the layer is singular to working precision, in `inverse` and `logabsdet`: the message
        gives sigma_min.

    Notes
    -----
    Cost: `forward` is a convolution. `logabsdet` and `inverse` share one factorization for each
    weight: LU of M of up to 512 rows, else the capacitance method, 8/3 (channels N)^3 flops on N x
    N pixels; in training the gradient takes twice that again. With an `order`, LU of the center
    tap. All in float64, outside of autocast. A single image of 16 channels on 32 x 32 pixels has a
    factor of 512 x 512. Not twice differentiable.

    Examples
    --------
    >>> import torch, convspectra as cs
    >>> _ = torch.manual_seed(0)
    >>> layer = cs.nn.InvertibleConv2d(3, 3, (8, 8))
    >>> x = torch.randn(5, 3, 8, 8)
    >>> bool((layer.inverse(layer(x)) - x).abs().max() < 1e-5)
    True
    >>> layer.logabsdet().shape, layer.logabsdet().requires_grad
    (torch.Size([]), True)
    """

    mask: Tensor
    bias: nn.Parameter | None

    def __init__(
        self,
        channels: int,
        kernel_size: int | Sequence[int],
        input_size: int | Sequence[int],
        *,
        bias: bool = True,
        order: str | None = None,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        super().__init__()
        check_positive_integer("channels", channels)
        check_choice("order", order, ORDERS)  # type: ignore[arg-type]
        kernel, size = _pair("kernel_size", kernel_size), _pair("input_size", input_size)
        if any(k % 2 == 0 for k in kernel):
            raise ValueError(f"expected an odd kernel_size, got {kernel_size!r}")
        self.channels, self.kernel_size, self.input_size = channels, kernel, size
        self.order = order
        shape = (channels, channels, *kernel)
        self.weight = nn.Parameter(torch.empty(shape, device=device, dtype=dtype))
        zeros = torch.zeros(channels, device=device, dtype=dtype)
        self.bias = nn.Parameter(zeros) if bias else None
        mask = torch.ones(kernel, dtype=torch.bool, device=device).flatten()
        center = len(mask) // 2
        if order is not None:
            (mask[center + 1 :] if order == "forward" else mask[:center]).fill_(False)
        self.register_buffer("mask", mask.reshape(kernel), persistent=False)
        self._factors: Factors | None = None
        self.reset_parameters()
        self._check_regular()

    def reset_parameters(self) -> None:
        """An orthogonal matrix at the center, and small random taps beside it."""
        with torch.no_grad():
            deviation = SPREAD / math.sqrt(self.channels * max(1, self.weight[0, 0].numel() - 1))
            nn.init.normal_(self.weight, std=deviation)
            center = torch.empty(
                self.channels, self.channels, dtype=torch.float32, device=self.weight.device
            )
            i, j = self._center
            self.weight[:, :, i, j] = nn.init.orthogonal_(center).to(self.weight.dtype)

    def forward(self, x: Tensor) -> Tensor:
        """The convolution of (b, channels, *input_size), or of one image."""
        self._check_images("x", x)
        return nn.functional.conv2d(x, self._masked(), self.bias, padding=self._center)

    @not_compiled
    def inverse(self, y: Tensor) -> Tensor:
        """The x with ``layer(x) == y``, with gradient for y and the parameters."""
        self._check_images("y", y)
        factors = self._factored()
        with torch.autocast(y.device.type, enabled=False):
            right = y if self.bias is None else y - self.bias[:, None, None].to(y.dtype)
            batch = right.reshape(-1, self.channels, *self.input_size)
            weight = self._masked()
            x: Tensor = Inverse.apply(batch, weight, self._operator(weight.detach()), factors)  # type: ignore[no-untyped-call]
        return x.reshape(y.shape)

    @not_compiled
    def logabsdet(self) -> Tensor:
        """Log |det M|, 0-dim, float64, with gradient: the same for every image."""
        found: Tensor = LogAbsDet.apply(self._masked(), self._factored())  # type: ignore[no-untyped-call]
        return found

    def __getstate__(self) -> dict[str, Any]:
        """Everything except the factors, which belong to a graph: for copies and files."""
        return self.__dict__ | {"_factors": None}

    def extra_repr(self) -> str:
        """Options, for ``print(layer)``."""
        order = "" if self.order is None else f", order={self.order!r}"
        return (
            f"{self.channels}, kernel_size={self.kernel_size}, input_size={self.input_size}, "
            f"bias={self.bias is not None}{order}"
        )

    @property
    def _center(self) -> tuple[int, int]:
        return self.kernel_size[0] // 2, self.kernel_size[1] // 2

    def _masked(self) -> Tensor:
        return self.weight if self.order is None else self.weight * self.mask

    def _operator(self, weight: Tensor) -> ConvOperator:
        return ConvOperator(weight.double(), self.input_size)

    def _factored(self) -> Factors:
        """The factors for the weight of now."""
        weight = self._masked().detach().double()
        known = self._factors
        if known is None or known.weight.device != weight.device or not known.equals(weight):
            self._factors = None
            center = None if self.order is None else self._center
            with torch.inference_mode(False):
                try:
                    self._factors = Factors(self._operator(weight.clone()), center)
                except ArithmeticError as error:
                    raise ArithmeticError(self._singular()) from error
        assert self._factors is not None
        return self._factors

    def _check_regular(self) -> None:
        """Refuse a layer that is singular from the start."""
        if self.weight.device.type != "meta":
            self._factored()

    def _singular(self) -> str:
        least = float(svds(self._operator(self._masked()), 1, "SM", tol=1e-3).s[0])
        return (
            f"expected a layer that is not singular, got {self!r} with sigma_min = {least:.3g}: "
            "lower the learning rate, or subtract its logabsdet() from the loss"
        )

    def _check_images(self, name: str, x: Tensor) -> None:
        shape = (self.channels, *self.input_size)
        if not isinstance(x, Tensor) or tuple(x.shape[-3:]) != shape or x.ndim not in (3, 4):
            got = tuple(x.shape) if isinstance(x, Tensor) else type(x).__name__
            raise ValueError(
                f"expected {name} of shape {shape} or (b, {', '.join(map(str, shape))}), as given "
                f"at construction, got {got}"
            )


def _pair(name: str, value: int | Sequence[int]) -> tuple[int, int]:
    """Two positive integers."""
    both = (value, value) if not isinstance(value, Sequence) else tuple(value)
    good = len(both) == 2 and all(
        isinstance(n, Integral) and not isinstance(n, bool) and n > 0 for n in both
    )
    if not good:
        raise ValueError(f"expected {name} to be a positive integer or two of them, got {value!r}")
    return int(both[0]), int(both[1])
