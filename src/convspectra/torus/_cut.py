"""The torus of a block circulant cut open axis by axis: C^{-1} becomes M^{-1}.

A channel may have fewer points along an axis than others: all else of it is cut out, too.

Arrays are laid out (groups, axis 0, ..., axis d - 1, channels, vectors), the axes in the order in
which they are cut, last to first; each is in Fourier space until its cut, in points after it.
See Note [One axis at a time].
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import NamedTuple

import torch
from torch import Tensor

from convspectra.operator import ConvOperator
from convspectra.solvers import inverse_and_logabsdet, log_diagonal, logabsdet, lu_factor
from convspectra.torus._symbols import (
    angles,
    half_count,
    half_multiplicity,
    smallest_periods,
    symbols,
)


@dataclass(frozen=True)
class _Axis:
    """One axis of the torus: n interior points of `period`, and the twist phase.

    Of them every channel of a group has the first `lengths`.
    """

    place: int
    n: int
    period: int
    phase: float
    before: int
    lengths: Tensor

    def twist(self, count: int, like: Tensor) -> Tensor:
        """exp(2 pi i phase n / period) at the first points."""
        points = torch.arange(count, dtype=torch.float64, device=like.device)
        angle = points * (2 * math.pi * self.phase / self.period)
        return torch.polar(torch.ones_like(angle), angle)

    def waves(self, theta: Tensor) -> Tensor:
        """exp(-i theta point) at these frequencies and the points of the border."""
        angle = -theta[:, None] * torch.tensor(self.border, dtype=torch.float64, device="cpu")
        return torch.polar(torch.ones_like(angle), angle)

    def toeplitz(self, kernel: Tensor, rows: range, columns: range) -> Tensor:
        """Some rows and columns of the circulant of a kernel on this axis."""
        return block_toeplitz(kernel, rows, columns, changes_sign=self.phase != 0)

    @property
    def interior(self) -> range:
        return range(self.n)

    @property
    def border(self) -> range:
        """All points that some channel lacks."""
        return range(int(self.lengths.min()), self.period)


def block_toeplitz(
    kernel: Tensor, rows: range, columns: range, changes_sign: bool = False
) -> Tensor:
    """Block Toeplitz matrices (..., rows m, columns m) of a kernel (..., period, m, m).

    On going around the kernel may change its sign.
    """
    height, width, m = len(rows), len(columns), kernel.shape[-1]
    if height == 0 or width == 0:
        return kernel.new_zeros(*kernel.shape[:-3], height * m, width * m)

    def at(kernel: Tensor, steps: Tensor, dim: int) -> Tensor:
        blocks = kernel.index_select(dim, steps % kernel.shape[dim])
        if changes_sign:
            signs = torch.where(steps < 0, -1.0, 1.0)
            blocks = blocks * signs.reshape(-1, *(1,) * (-1 - dim))
        return blocks

    # All steps from a column to a row, in one copy: every block row is a window of them.
    if width == 1:
        steps = torch.arange(rows.start, rows.stop, device=kernel.device) - columns.start
        return at(kernel, steps, -3).flatten(-3, -2)
    first, last = rows.stop - 1 - columns.start, rows.start - columns.stop
    steps = torch.arange(first, last, -1, device=kernel.device)
    blocks = at(kernel.transpose(-3, -2), steps, -2)
    windows = [blocks.narrow(-2, height - 1 - i, width) for i in range(height)]
    matrices = torch.stack(windows, dim=-4) if height > 1 else blocks
    return matrices.reshape(*kernel.shape[:-3], height * m, width * m)


class CutTorus:
    """A square zero-padded stride-1 convolution in a torus with `extra` points more than needed.

    Parameters
    ----------
    op : ConvOperator
        Not transposed; gradients flow from `logabsdet` to its weight.
    extra : int
        Added to the smallest period of every axis.
    phase : float
        0, or 1/2 for a torus on which functions change sign as they go around an axis: no frequency
        is 0 then, and a circulant that is singular there (the Laplacian, say) becomes regular.
    lengths : Tensor, optional
        How many points, from the first, each channel of a group has along each axis, (axes,
        channels), if it is not all of them. M has the others' rows and columns left out.

    Attributes
    ----------
    condition : float
        Condition number of the circulant, in the Frobenius norm of its symbols; inf if it is
        singular.
    norm : float
        Largest Frobenius norm of a symbol.
    """

    def __init__(
        self, op: ConvOperator, extra: int, phase: float, lengths: Tensor | None = None
    ) -> None:
        g = op.geometry
        periods = [p + extra for p in smallest_periods(g)]
        sizes = all_lengths(op) if lengths is None else lengths
        order = order_of_cuts(periods, sizes)
        self._axes = [
            _Axis(i, g.input_size[i], periods[i], phase, g.padding[i][0], sizes[i]) for i in order
        ]
        self._kept = [
            None if lengths is None else self._places(cut).to(op.device) for cut in range(g.ndim)
        ]
        first = self._axes[0]
        frequencies = [
            angles(a.period, phase, half_count(a.period, phase) if a is first else None)
            for a in self._axes
        ]
        by_place = [frequencies[order.index(i)] for i in range(g.ndim)]
        symbol = symbols(op, by_place).permute(0, *(1 + i for i in order), -2, -1)
        # Inputs and outputs both begin at point 0 of the torus.
        shift = torch.zeros((), dtype=torch.float64, device="cpu")
        for axis, theta in zip(self._axes, frequencies, strict=True):
            shift = shift[..., None] - axis.before * theta
        shift = torch.polar(torch.ones_like(shift), shift).to(symbol.device)
        symbol = (symbol * shift[..., None, None]).contiguous()
        self._inverse, log_dets = inverse_and_logabsdet(symbol)
        self._half = half_multiplicity(first.period, phase).to(symbol.device)
        weights = self._half.reshape(-1, *(1,) * (g.ndim - 1))
        self._log_det = (log_dets * weights).sum()
        norms = [_frobenius_norms(x.detach()) for x in (symbol, self._inverse)]
        self.norm = float(norms[0].amax())
        self.condition = float((norms[0].amax(1) * norms[1].amax(1)).amax())
        if math.isnan(self.condition):
            self.condition = math.inf
        self._borders: list[Tensor] = []
        pairs = zip(self._axes, frequencies, strict=True)
        self._waves = [axis.waves(theta).to(symbol.device) for axis, theta in pairs]

    def factorize(self) -> None:
        """Cut every axis; the large matrix is that of the first axis, cut last."""
        blocks = self._inverse
        self._borders = []
        for cut in reversed(range(1, len(self._axes))):
            # One axis from its frequencies to its points: with the others still in Fourier space
            # the inverse so far is a block circulant along it, and `kernel` is its first column.
            axis, kept, dim = self._axes[cut], self._kept[cut], blocks.ndim - 3
            kernel = torch.fft.ifft(blocks, dim=dim)
            if axis.phase:
                kernel = kernel * axis.twist(axis.period, blocks)[:, None, None]
            # That inverse is [[A, B], [D, W]], interior first. Of W and of what meets it only the
            # points that this cut takes away are kept; channels may differ in them.
            border = _taken(axis.toeplitz(kernel, axis.border, axis.border), kept, kept)
            small, log_dets = inverse_and_logabsdet(border)
            to_interior = axis.toeplitz(kernel, axis.interior, axis.border)
            to_interior = _taken(to_interior, None, kept) @ small
            to_border = _taken(axis.toeplitz(kernel, axis.border, axis.interior), kept, None)
            # Every frequency of the first axis stands for one or two: det M gains det W each time.
            weights = self._half.reshape(-1, *(1,) * (log_dets.ndim - 2))
            self._log_det = self._log_det + (log_dets * weights).sum()
            self._borders.insert(0, small.detach())
            # A - B W^{-1} D is the inverse of what is left. Before the last cut only combinations
            # of it over the frequencies are wanted, and it is never formed: see below.
            if dim > 2:
                inside = axis.toeplitz(kernel, axis.interior, axis.interior)
                blocks = inside - to_interior @ to_border
        if len(self._axes) == 1:
            border = self._border_matrix(lambda waves: _real_sum(waves, blocks))
        else:
            # The last W needs sum_k waves[k] (A - B W^{-1} D)[k], real, for a few vectors of waves.
            # One product for all frequencies; what is its own mirror image has no imaginary part.
            twice = torch.nonzero(self._half == 2).flatten().tolist()
            pairs = slice(twice[0], twice[-1] + 1) if twice else slice(0, 0)
            right_real = to_border.real.flatten(1, 2)
            right_imaginary = to_border.imag[:, pairs].flatten(1, 2)

            def block(waves: Tensor) -> Tensor:
                left = (to_interior * waves[:, None, None]).transpose(1, 2)
                inside = axis.toeplitz(_real_sum(waves, kernel), axis.interior, axis.interior)
                inside.baddbmm_(left.real.flatten(2), right_real, alpha=-1)
                return inside.baddbmm_(left.imag[:, :, pairs].flatten(2), right_imaginary)

            border = self._border_matrix(block)
        self._factors = lu_factor(border.detach())
        self._border = border if border.requires_grad else None
        self._log_det_border = log_diagonal(self._factors[0]).sum()
        self._inverse = self._inverse.detach()

    def logabsdet(self) -> Tensor:
        """Log |det M|, with gradient."""
        if self._border is not None:
            return self._log_det + logabsdet(self._border, *self._factors).sum()
        return self._log_det + self._log_det_border

    def apply_inverse(self, y: Tensor, adjoint: bool) -> Tensor:
        """M^{-1} y, or M'^{-1} y, for a batch (b, channels, *points), without refinement."""
        groups, channels = self._inverse.shape[0], self._inverse.shape[-1]
        places = [axis.place for axis in self._axes]
        y = y.reshape(len(y), groups, channels, *y.shape[2:])
        y = y.permute(1, *(3 + i for i in places), 2, 0)
        x = self._inverse_after_cuts(0, y, adjoint)
        back = [1 + places.index(i) for i in range(len(places))]
        return x.permute(-1, 0, -2, *back).flatten(1, 2)

    def _inverse_after_cuts(self, cut: int, y: Tensor, adjoint: bool) -> Tensor:
        """The inverse once the axes from `cut` on are cut; those before are in Fourier space."""
        if cut == len(self._axes):
            return _product(self._inverse, y, adjoint)
        axis, dim = self._axes[cut], 1 + cut
        u = self._through_torus(cut, self._transformed(cut, y), adjoint)
        inside = u.narrow(dim, 0, axis.n)
        outside = u.narrow(dim, axis.border.start, len(axis.border))
        if outside.shape[dim] == 0:
            return inside
        right = all_right = outside.flatten(dim, -2)
        kept = self._kept[cut]
        if kept is not None:
            right = all_right.index_select(-2, kept)
        if cut == 0:
            w = torch.linalg.lu_solve(*self._factors, right, adjoint=adjoint)
        else:
            w = _product(self._borders[cut - 1], right, adjoint)
        if kept is not None:
            w = torch.zeros_like(all_right).index_copy(-2, kept, w)
        # A few points of the border: a product with their waves is faster than a transform.
        waves = self._waves[cut]
        at_border = waves @ w.reshape(outside.shape).flatten(dim + 1).to(waves.dtype)
        at_border = at_border.reshape(*y.shape[:dim], len(waves), *y.shape[dim + 1 :])
        return inside - self._through_torus(cut, at_border, adjoint).narrow(dim, 0, axis.n)

    def _transformed(self, cut: int, y: Tensor) -> Tensor:
        """From the interior points of an axis to its frequencies."""
        axis, dim = self._axes[cut], 1 + cut
        if cut == 0 and axis.phase == 0:
            return torch.fft.rfft(y, n=axis.period, dim=dim)
        if axis.phase:
            y = y * axis.twist(axis.n, y).conj().reshape(-1, *(1,) * (y.ndim - dim - 1))
        u = torch.fft.fft(y, n=axis.period, dim=dim)
        return u.narrow(dim, 0, len(self._half)) if cut == 0 else u

    def _through_torus(self, cut: int, u: Tensor, adjoint: bool) -> Tensor:
        """The inverse before `cut` was made: from frequencies of the axis to all its points."""
        axis, dim = self._axes[cut], 1 + cut
        u = self._inverse_after_cuts(cut + 1, u, adjoint)
        if cut == 0 and axis.phase == 0:
            return torch.fft.irfft(u, n=axis.period, dim=dim)
        tail = (1,) * (u.ndim - dim - 1)
        twist = axis.twist(axis.period, u).reshape(-1, *tail)
        if cut == 0:
            u = u * self._half.reshape(-1, *tail)
            return (torch.fft.ifft(u, n=axis.period, dim=dim) * twist).real
        u = torch.fft.ifft(u, dim=dim)
        return u * twist if axis.phase else u

    def _border_matrix(self, block: Callable[[Tensor], Tensor]) -> Tensor:
        """W, from a function of the weights with which the frequencies of the first axis enter."""
        axis, kept = self._axes[0], self._kept[0]
        theta = angles(axis.period, axis.phase, len(self._half)).to(self._half.device)
        width = len(axis.border)
        if width == 0:
            return self._half.new_zeros(self._inverse.shape[0], 0, 0)
        diagonals = {
            step: block(torch.polar(self._half / axis.period, step * theta))
            for step in range(1 - width, width)
        }
        if width == 1:
            return _taken(diagonals[0], kept, kept)
        rows = [torch.cat([diagonals[i - j] for j in range(width)], -1) for i in range(width)]
        return _taken(torch.cat(rows, -2), kept, kept)

    def _places(self, cut: int) -> Tensor:
        """The places that this cut takes out, among (border points, axes cut before, channels).

        The others are the interior's, or were cut out before.
        """
        axis = self._axes[cut]
        out = torch.tensor(axis.border, device="cpu")[:, None] >= axis.lengths
        for later in self._axes[cut + 1 :]:
            out = out.unsqueeze(-2) & (torch.arange(later.n, device="cpu")[:, None] < later.lengths)
        return torch.nonzero(out.flatten()).flatten()


def all_lengths(op: ConvOperator) -> Tensor:
    """The points of a layer that every channel of a group has, (axes, channels)."""
    return torch.tensor(op.geometry.input_size, device="cpu")[:, None].expand(
        -1, op.weight.shape[1]
    )


def order_of_cuts(periods: Sequence[int], lengths: Tensor) -> list[int]:
    """The axes, the one that is cut last first: where the fewest points of all are cut out.

    Axes that need no cut come last.
    """
    points = lengths.prod(0)
    cut_out = [
        int(((period - along) * points.div(along, rounding_mode="floor")).sum())
        for period, along in zip(periods, lengths, strict=True)
    ]
    return sorted(range(len(cut_out)), key=lambda i: (cut_out[i] == 0, cut_out[i]))


class BorderCost(NamedTuple):
    """The cost of the border matrices of one group: flops for all, bytes for those of one cut."""

    flops: float
    bytes: int


def border_cost(periods: Sequence[int], lengths: Tensor) -> BorderCost:
    """About what `CutTorus.factorize` takes: a matrix for each frequency of the axes still closed.

    The bytes are those before channels that have points on the border are left out of it.
    """
    axes, flops, largest = order_of_cuts(periods, lengths), 0.0, 0
    for cut, axis in enumerate(axes):
        lines, points = periods[axis] - lengths[axis], lengths[axes[cut + 1 :]].prod(0)
        order = int((lines * points).sum())
        on_lines = len(lines) * int(lines.max()) * int(points.max())
        closed = [periods[i] for i in axes[:cut]]
        # All except the last of them are complex; half of the frequencies are enough.
        count = (closed[0] // 2 + 1) * math.prod(closed[1:]) if cut else 1
        flops += count * (4 if cut else 1) * 8 / 3 * float(order) ** 3
        largest = max(largest, count * (2 if cut else 1) * on_lines**2)
    return BorderCost(flops, 8 * largest)


def _taken(matrix: Tensor, rows: Tensor | None, columns: Tensor | None) -> Tensor:
    """Rows and columns by their numbers; all if None."""
    if rows is not None:
        matrix = matrix.index_select(-2, rows)
    return matrix if columns is None else matrix.index_select(-1, columns)


def _product(blocks: Tensor, y: Tensor, adjoint: bool) -> Tensor:
    """Blocks y, or blocks^H y, as rows times blocks: BLAS is faster with few vectors so."""
    if adjoint:
        return (y.mH.resolve_conj().contiguous() @ blocks).mH.resolve_conj()
    return (y.mT.contiguous() @ blocks.mT).mT


def _real_sum(waves: Tensor, blocks: Tensor) -> Tensor:
    """Re sum_k waves[k] blocks[:, k] for blocks (groups, frequencies, ...)."""
    total = torch.zeros_like(blocks[:, 0].real)
    for k, wave in enumerate(waves.tolist()):
        total = total.add(blocks[:, k].real, alpha=wave.real)
        if wave.imag:
            total = total.sub(blocks[:, k].imag, alpha=wave.imag)
    return total


def _frobenius_norms(blocks: Tensor) -> Tensor:
    """Frobenius norms of the blocks in the last two axes, (groups, frequencies)."""
    norms: Tensor = torch.linalg.vector_norm(torch.view_as_real(blocks).flatten(-3), dim=-1)
    return norms.flatten(1)
