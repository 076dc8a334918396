"""A convolution inside the block circulant of a torus, and what that circulant tells of it.

Its Gram matrices give rigorous upper bounds on the largest singular values and preconditioners; the
symbols of a circularly padded layer, which is the circulant, give everything. They say nothing of
the smallest singular values of other layers.
"""

from __future__ import annotations

import math
from collections.abc import Callable

import torch
from scipy.fft import next_fast_len
from torch import Tensor

from convspectra.convolution import pad
from convspectra.operator import ConvOperator
from convspectra.solvers.result import SingularTriplets
from convspectra.symbol import (
    angles,
    half_count,
    smallest_periods,
    symbols,
)


def is_circulant(op: ConvOperator) -> bool:
    """Whether M is the circulant: circular padding, and as many outputs as the stride leaves."""
    g = op.geometry
    return (
        g.ndim > 0
        and g.padding_mode == "circular"
        and all(
            n == s * out for n, s, out in zip(g.input_size, g.stride, g.output_size, strict=True)
        )
    )


def has_embedding(op: ConvOperator) -> bool:
    """Whether M is a submatrix of a circulant: zero padding, or circular all around."""
    g = op.geometry
    return g.ndim > 0 and (g.padding_mode == "zeros" or is_circulant(op))


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
        split = [n for pair in zip(self.periods, self._strides, strict=True) for n in pair]
        x = x.reshape(*x.shape[:2], *split)
        points, phases = range(2, 2 + 2 * ndim, 2), range(3, 3 + 2 * ndim, 2)
        x = x.permute(0, 1, *phases, *points)
        return x.reshape(x.shape[0], self._op.groups, -1, *self.periods)

    def restrict_input(self, x: Tensor) -> Tensor:
        """The adjoint of `embed_input`."""
        ndim, g = len(self.periods), self._op.geometry
        channels = self._op.weight.shape[1] * self._op.groups
        x = x.reshape(x.shape[0], channels, *self._strides, *self.periods)
        order = [i for axis in range(2, 2 + ndim) for i in (axis + ndim, axis)]
        x = x.permute(0, 1, *order)
        x = x.reshape(
            *x.shape[:2], *(p * s for p, s in zip(self.periods, self._strides, strict=True))
        )
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


def circulant_triplets(op: ConvOperator, k: int, largest: bool) -> SingularTriplets:
    """The k largest or smallest triplets of a layer that `is_circulant`, from its symbols.

    Every frequency that is not its own mirror image gives two real triplets. Cost: the singular
    values of half of the symbols, and the vectors of at most k of them.
    """
    embedding = CirculantEmbedding(op)
    periods, device = embedding.periods, op.device
    points = math.prod(periods)
    index = torch.arange(points, device=device).reshape(periods)
    mirror = index
    for axis in range(len(periods)):
        mirror = mirror.roll(-1, axis).flip(axis)
    mirror = mirror.flatten()
    kept = torch.nonzero(index.flatten() <= mirror).flatten()
    blocks = embedding.symbols(half=False)[:, kept]
    values = torch.linalg.svdvals(blocks)
    copies = 2 - (mirror[kept] == kept).long()
    flat = values.flatten()
    ranks = torch.arange(flat.numel(), device=device)
    ranks = ranks.repeat_interleave(copies[:, None].expand(values.shape).flatten())
    ranks = ranks[torch.argsort(flat[ranks], descending=largest, stable=True)]
    chosen = ranks[:k]
    error = (max(blocks.shape[2:]) + 32) * torch.finfo(flat.dtype).eps * float(flat.amax())
    others = 0.0 if largest else math.inf
    if len(ranks) > k:
        next_value = float(flat[ranks[k]])
        others = next_value + error if largest else max(next_value - error, 0.0)
    u: list[Tensor] = []
    v: list[Tensor] = []
    for position, rank in enumerate(chosen.tolist()):
        rest, place = divmod(rank, values.shape[2])
        group, frequency = divmod(rest, len(kept))
        symbol = blocks[group, frequency]
        second = position > 0 and rank == int(chosen[position - 1])
        if int(copies[frequency]) == 1:
            symbol = symbol.real
        left, _, right = torch.linalg.svd(symbol, full_matrices=False)
        for amplitude, side, restrict in (
            (left[:, place], u, embedding.restrict_output),
            (right[place].conj(), v, embedding.restrict_input),
        ):
            wave = torch.ones((), dtype=torch.complex128, device=device)
            steps = torch.unravel_index(kept[frequency], periods)
            for step, period in zip(steps, periods, strict=True):
                turns = angles(period).to(device) * step
                wave = wave[..., None] * torch.polar(torch.ones_like(turns), turns)
            mode = amplitude.reshape(-1, *(1,) * len(periods)) * wave
            real = mode.imag if second else mode.real
            real = real * (int(copies[frequency]) / points) ** 0.5
            array = real.new_zeros(1, op.groups, *real.shape)
            array[0, group] = real
            side.append(restrict(array).flatten())
    s = flat[chosen]
    return SingularTriplets(
        u=torch.stack(u),
        s=s,
        v=torch.stack(v),
        lower=(s - error).clamp_min(0),
        upper=s + error,
        others=others,
        converged=True,
        matvecs=0,
        certificate="backward error of dense SVDs of the symbols, (max(m, n) + 32) eps sigma_max",
        logabsdet=float(values.log().sum((0, 2)) @ copies.to(values.dtype))
        if bool((values > error).all())
        else -math.inf,
    )
