"""Fourier symbols of a stride-1, zero-padded convolution embedded in a torus.

On a torus of enough points per axis no tap wraps around, and M is the submatrix of a block
circulant C with output points for rows and input points for columns. C is block diagonal in
Fourier space, one h x g matrix (the symbol) per frequency.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch
from torch import Tensor

from convspectra.geometry import ConvGeometry
from convspectra.operator import ConvOperator


@dataclass(frozen=True)
class Torus:
    """A discrete torus of prod(periods) points, with its real Fourier transform.

    Parameters
    ----------
    periods : tuple of int
        Number of points per axis.
    twisted : bool
        If True, arrays change sign when they go once around any axis: the frequencies are shifted
        by half a step, so that none of them is 0. A circulant that is singular at frequency 0 (the
        Laplacian, say) becomes regular so.
    """

    periods: tuple[int, ...]
    twisted: bool = False

    @property
    def points(self) -> int:
        """Number of points."""
        return math.prod(self.periods)

    def angles(self, axis: int, device: torch.device) -> Tensor:
        """Frequencies kept on one axis in radians per point, float64.

        An untwisted torus keeps the half of the last axis that determines a real array.
        """
        period = self.periods[axis]
        half = not self.twisted and axis == len(self.periods) - 1
        kept = period // 2 + 1 if half else period
        steps = torch.arange(kept, dtype=torch.float64, device=device)
        return (steps + 0.5 * self.twisted) * (2 * math.pi / period)

    def multiplicity(self, device: torch.device) -> Tensor:
        """How many frequencies of the torus each kept frequency stands for, (frequencies,)."""
        kept = [len(self.angles(axis, device)) for axis in range(len(self.periods))]
        count = torch.ones(kept, dtype=torch.float64, device=device)
        if not self.twisted:
            count[..., 1 : (self.periods[-1] + 1) // 2] = 2
        return count.flatten()

    def transform(self, x: Tensor) -> Tensor:
        """Fourier coefficients of real arrays, (..., *periods) -> (..., frequencies)."""
        axes = tuple(range(-len(self.periods), 0))
        if self.twisted:
            coefficients: Tensor = torch.fft.fftn(x * self._untwist(x.device).conj(), dim=axes)
        else:
            coefficients = torch.fft.rfftn(x, dim=axes)
        return coefficients.flatten(-len(self.periods))

    def inverse_transform(self, coefficients: Tensor) -> Tensor:
        """Real arrays from their Fourier coefficients, (..., frequencies) -> (..., *periods)."""
        axes = tuple(range(-len(self.periods), 0))
        device = coefficients.device
        kept = [len(self.angles(axis, device)) for axis in range(len(self.periods))]
        grid = coefficients.reshape(*coefficients.shape[:-1], *kept)
        if self.twisted:
            array: Tensor = (torch.fft.ifftn(grid, dim=axes) * self._untwist(device)).real
        else:
            array = torch.fft.irfftn(grid, s=self.periods, dim=axes)
        return array

    def _untwist(self, device: torch.device) -> Tensor:
        """exp(i pi n / P) over the points: it makes a periodic array change sign going around."""
        phase = torch.zeros((), dtype=torch.float64, device=device)
        for period in self.periods:
            steps = torch.arange(period, dtype=torch.float64, device=device)
            phase = phase[..., None] + steps * (math.pi / period)
        return torch.polar(torch.ones_like(phase), phase)


def weight_blocks(op: ConvOperator) -> Tensor:
    """The weight of the underlying convolution by group, (groups, h / groups, g / groups, *k)."""
    return op.weight.reshape(op.groups, -1, *op.weight.shape[1:])


def smallest_periods(geometry: ConvGeometry) -> tuple[int, ...]:
    """Fewest points per axis on which no tap wraps: max(N + max(padding), N_out, reach)."""
    return tuple(
        max(n + max(pads), out, reach)
        for n, pads, out, reach in zip(
            geometry.input_size,
            geometry.padding,
            geometry.output_size,
            geometry.reach,
            strict=True,
        )
    )


def symbols(blocks: Tensor, geometry: ConvGeometry, torus: Torus) -> Tensor:
    """Symbol at every kept frequency, (..., h, g, *k) -> (..., frequencies, h, g), complex.

    ``sum_p blocks[..., p] exp(i theta (dilation p - padding_before))``. Differentiable. Cost:
    about ``h g`` times the frequencies times the first kernel size, in complex operations.
    """
    result = torch.complex(blocks, torch.zeros_like(blocks))
    for axis in reversed(range(geometry.ndim)):
        angles = torus.angles(axis, blocks.device)
        taps = torch.arange(geometry.kernel_size[axis], device=blocks.device)
        offsets = taps * geometry.dilation[axis] - geometry.padding[axis][0]
        phase = offsets[:, None] * angles
        waves = torch.polar(torch.ones_like(phase), phase)
        # Taps of the last axis left are contracted; their frequencies go in front of those done.
        done = geometry.ndim - 1 - axis
        result = torch.tensordot(result, waves, dims=([result.ndim - 1 - done], [0]))
        result = result.movedim(-1, result.ndim - 1 - done)
    return result.flatten(-geometry.ndim).movedim(-1, -3)
