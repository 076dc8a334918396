"""A convolution inside the block circulant of a torus, and what that circulant tells of it.

Its Gram matrices give rigorous upper bounds on the largest singular values and preconditioners; the
symbols of a circularly padded layer, which is the circulant, give everything. They say nothing of
the smallest singular values of other layers.
"""

from __future__ import annotations

from collections.abc import Callable

import torch
from scipy.fft import next_fast_len
from torch import Tensor

from convspectra.operator import ConvOperator, is_circulant, join_phases, pad, split_phases
from convspectra.torus._symbols import angles, half_count, smallest_periods, symbols


class CirculantEmbedding:
    """M as rows and columns of the circulant on the smallest torus.

    Parameters
    ----------
    op : ConvOperator
        Not transposed, float64 or float32, such that `has_embedding(op)`; or with any other padding
        mode, which is then taken for zero padding: for a preconditioner that is good enough.
    fast : bool
        On the smallest torus whose Fourier transforms are fast instead.

    Notes
    -----
    Cost: the symbols, ``16 h g / groups prod(P)`` bytes for stride 1 and half of the frequencies.
    """

    def __init__(self, op: ConvOperator, *, fast: bool = False) -> None:
        self._op = op
        self.is_exact = is_circulant(op)
        g = op.geometry
        periods = smallest_periods(g)
        if fast:
            # A Fourier transform of length 58 takes three times as long as one of length 60.
            periods = tuple(map(next_fast_len, periods))
        self.periods = g.output_size if self.is_exact else periods
        self._strides = g.stride
        self._before = tuple(before for before, _ in g.padding)

    def symbols(self, phase: float = 0.0, half: bool = True) -> Tensor:
        """(groups, frequencies, h / groups, g / groups * prod(stride)), complex.

        With `half`, the last axis has the frequencies that determine real arrays. The phase, 0 or
        1/2, twists the torus along every axis.
        """
        last = len(self.periods) - 1
        grid = [
            angles(period, phase, half_count(period, phase) if half and axis == last else None)
            for axis, period in enumerate(self.periods)
        ]
        return symbols(self._op, grid).flatten(1, len(self.periods))

    def embed_input(self, x: Tensor) -> Tensor:
        """(b, g, *input_size) -> (b, groups, g / groups * prod(stride), *periods)."""
        ndim = len(self.periods)
        if self.is_exact:
            x = x.roll(self._before, dims=tuple(range(2, 2 + ndim)))
        else:
            ends = zip(self._before, x.shape[2:], self.periods, self._strides, strict=True)
            x = pad([(before, period * s - before - n) for before, n, period, s in ends], x)
        return split_phases(x, self._strides).unflatten(1, (self._op.groups, -1))

    def restrict_input(self, x: Tensor) -> Tensor:
        """The adjoint of `embed_input`."""
        ndim, g = len(self.periods), self._op.geometry
        x = join_phases(x.flatten(1, 2), self._strides)
        if self.is_exact:
            return x.roll(tuple(-b for b in self._before), dims=tuple(range(2, 2 + ndim)))
        for axis, (before, n) in enumerate(zip(self._before, g.input_size, strict=True)):
            x = x.narrow(2 + axis, before, n)
        return x

    def embed_output(self, y: Tensor) -> Tensor:
        """(b, h, *output_size) -> (b, groups, h / groups, *periods)."""
        ends = zip(y.shape[2:], self.periods, strict=True)
        padded = pad([(0, period - n) for n, period in ends], y)
        return padded.reshape(y.shape[0], self._op.groups, -1, *self.periods)

    def restrict_output(self, y: Tensor) -> Tensor:
        """The adjoint of `embed_output`."""
        y = y.flatten(1, 2)
        for axis, n in enumerate(self._op.geometry.output_size):
            y = y.narrow(2 + axis, 0, n)
        return y

    def multiply(self, blocks: Tensor, x: Tensor) -> Tensor:
        """The circulant with these symbols on half of the frequencies, on real (b, groups, c, *P).

        Cost: two FFTs and a product with every symbol.
        """
        # BLAS is faster with few vectors on the left.
        return self.filtered(lambda rows: rows @ blocks.mT, x)

    def filtered(self, function: Callable[[Tensor], Tensor], x: Tensor) -> Tensor:
        """A map of Fourier coefficients (groups, frequencies, b, c), half of them, between FFTs."""
        axes = tuple(range(-len(self.periods), 0))
        coefficients = torch.fft.rfftn(x, dim=axes)
        grid = coefficients.shape[3:]
        rows = coefficients.flatten(3).permute(1, 3, 0, 2).contiguous()
        images = function(rows).permute(2, 0, 3, 1)
        result: Tensor = torch.fft.irfftn(
            images.reshape(*images.shape[:3], *grid), s=self.periods, dim=axes
        )
        return result
