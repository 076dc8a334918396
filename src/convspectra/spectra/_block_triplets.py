"""Singular triplets of a layer from those of its independent blocks.

M is, up to permutations, block diagonal with the blocks at all their places and zero rows and
columns besides. Its min(rows, columns) singular values are those of the blocks and as many zeros as
the shorter sides of the blocks leave open.
"""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Callable
from dataclasses import dataclass
from functools import cached_property

import torch
from torch import Tensor

from convspectra.operator import Block, ConvOperator, Place, Product, independent_blocks, scatter
from convspectra.solvers import SingularTriplets, Stop, less, lobpcg
from convspectra.spectra._auto import SMALL_WORK, admitted, answer
from convspectra.spectra._request import ZERO, Request
from convspectra.spectra.ways import WAYS, dense_work

NULL_VECTOR_STEPS = 1000
"""Most steps to null vectors of a block too large to be dense: a choice. One that needs more ends
not converged."""


@dataclass(frozen=True)
class _Value:
    """One singular value of the layer: the i-th of a block's triplets, at one of its places."""

    s: float
    block: int
    i: int
    place: int


@dataclass(frozen=True)
class _OneSide:
    vectors: Tensor
    matvecs: int
    converged: bool


@dataclass(frozen=True)
class _NullVectors:
    left: Tensor
    right: Tensor
    matvecs: int
    converged: bool

    @classmethod
    def none(cls, count: int, op: ConvOperator) -> _NullVectors:
        """Zeros instead of vectors that nobody asked for."""
        left, right = (op.weight.new_zeros(count, n) for n in op.shape)
        return cls(left, right, 0, True)


def layer_triplets(
    op: ConvOperator,
    k: int,
    largest: bool,
    vectors: bool,
    method: str,
    request: Callable[[ConvOperator, int], Request],
) -> tuple[SingularTriplets, str]:
    """The k largest or smallest triplets of a layer that is not transposed, and the ways taken.

    Raises
    ------
    ValueError
        If a forced method does not fit some block.
    """
    blocks = independent_blocks(op)
    # How many of the k values the blocks have to give, and how many zeros the structure adds.
    possible = sum(len(block.places) * min(block.op.shape) for block in blocks)
    zeros = min(op.shape) - possible
    wanted = min(k, possible) if largest else max(k - zeros, 0)
    requests = [
        request(block.op, max(1, min(-(-wanted // len(block.places)), min(block.op.shape))))
        for block in blocks
    ]
    if method != "auto" and not all(admitted(WAYS[method], of_block) for of_block in requests):
        raise ValueError(
            f"expected {WAYS[method].needs} for method={method!r}, got {op!r} and k={k}; "
            "use method='auto'"
        )
    answers = [answer(of_block, method) for of_block in requests] if wanted else []
    results = [triplets for triplets, _ in answers]
    name = "+".join(sorted({way for _, way in answers})) or "structure"
    if len(blocks) == 1 and wanted == k and _is_whole(blocks[0], op):
        return results[0], name
    joined = _Joined(op, blocks, results, k, largest, wanted, zeros)
    return joined.triplets(vectors, request), name


@dataclass(frozen=True)
class _Joined:
    """The triplets of all blocks, to be merged into those of the layer."""

    op: ConvOperator
    blocks: list[Block]
    results: list[SingularTriplets]
    k: int
    largest: bool
    wanted: int
    zeros: int

    def triplets(
        self, vectors: bool, request: Callable[[ConvOperator, int], Request]
    ) -> SingularTriplets:
        """The `wanted` values of the blocks, and zeros by the structure for the rest of the k."""
        like, missing = self.op.weight, self.k - self.wanted
        s, lower, upper = (
            self._with_zeros(like.new_tensor(values))
            for values in (
                [v.s for v in self._chosen],
                self._bounds_in_order("lower"),
                self._bounds_in_order("upper"),
            )
        )
        u, v = self._side("u"), self._side("v")
        null = _NullVectors.none(missing, self.op)
        if missing and vectors:
            null = self._null(u, v, request)
        certificates = [t.certificate for t in self.results]
        if missing:
            certificates.append(
                "zeros by the structure: inputs that no tap reads, or blocks of unlike shapes"
            )
        return SingularTriplets(
            u=self._with_rows(u, null.left),
            s=s,
            v=self._with_rows(v, null.right),
            lower=lower,
            upper=upper,
            others=self._others(),
            converged=null.converged and all(t.converged for t in self.results),
            matvecs=null.matvecs + sum(t.matvecs for t in self.results),
            certificate="; ".join(dict.fromkeys(certificates)),
            logabsdet=self._logabsdet(),
        )

    @cached_property
    def _values(self) -> list[_Value]:
        """The values of all blocks at all their places, best first."""
        values = [
            _Value(float(s), b, i, place)
            for b, (block, triplets) in enumerate(zip(self.blocks, self.results, strict=False))
            for i, s in enumerate(triplets.s)
            for place in range(len(block.places))
        ]
        return sorted(values, key=lambda value: -value.s if self.largest else value.s)

    @property
    def _chosen(self) -> list[_Value]:
        return self._values[: self.wanted]

    def _bounds_in_order(self, end: str) -> list[float]:
        """Lower or upper ends in order: the i-th best bounds the i-th best value."""
        ends = [float(getattr(self.results[v.block], end)[v.i]) for v in self._values]
        return sorted(ends, reverse=self.largest)[: self.wanted]

    def _others(self) -> float:
        """The bound on the values not given, from those of the blocks and those left over."""
        far = "upper" if self.largest else "lower"
        bounds = [t.others for t in self.results]
        bounds += [
            float(getattr(self.results[v.block], far)[v.i]) for v in self._values[self.wanted :]
        ]
        everything = self.k == min(self.op.shape)
        if self.largest:
            return 0.0 if everything else max(bounds, default=0.0)
        if everything:
            return math.inf
        return min(bounds, default=0.0) if self.k >= self.zeros else 0.0

    def _side(self, side: str) -> Tensor:
        """The vectors of the chosen values as rows of the layer."""
        g = self.op.geometry
        sizes = g.output_size if side == "u" else g.input_size
        results, blocks = self.results, self.blocks
        rows = [
            _placed(getattr(results[v.block], side)[v.i], blocks[v.block], v.place, side, sizes)
            for v in self._chosen
        ]
        length = self.op.shape[0 if side == "u" else 1]
        return torch.cat(rows).flatten(1) if rows else self.op.weight.new_zeros(0, length)

    def _null(
        self, u: Tensor, v: Tensor, request: Callable[[ConvOperator, int], Request]
    ) -> _NullVectors:
        """Null vectors on both sides, orthogonal to those at hand."""
        scale = ZERO * float(torch.linalg.vector_norm(self.op.weight))
        zero = Counter((value.block, value.place) for value in self._chosen if value.s <= scale)
        count = self.k - self.wanted
        left, right = (
            _null_vectors(op, self.blocks, count, rows, zero, left=is_left, request=request)
            for op, rows, is_left in ((self.op.T, u, True), (self.op, v, False))
        )
        return _NullVectors(
            left.vectors,
            right.vectors,
            left.matvecs + right.matvecs,
            left.converged and right.converged,
        )

    def _with_zeros(self, values: Tensor) -> Tensor:
        return self._with_rows(values, values.new_zeros(self.k - self.wanted))

    def _with_rows(self, found: Tensor, null: Tensor) -> Tensor:
        """Zeros come last among the largest and first among the smallest."""
        return torch.cat([found, null] if self.largest else [null, found])

    def _logabsdet(self) -> float | None:
        """The sum over all places of all blocks, where every way gave its own along."""
        if self.zeros:
            return -math.inf
        total = 0.0
        for block, triplets in zip(self.blocks, self.results, strict=False):
            if triplets.logabsdet is None:
                return None
            total += len(block.places) * triplets.logabsdet
        return total


def _is_whole(block: Block, op: ConvOperator) -> bool:
    return len(block.places) == 1 and block.op.shape == op.shape


def _points(place: Place, side: str) -> tuple[range, ...]:
    return place.outputs if side == "u" else place.inputs


def _placed(rows: Tensor, block: Block, place: int, side: str, sizes: tuple[int, ...]) -> Tensor:
    """A block's vectors as vectors of the layer, (b, channels, *sizes)."""
    shape = block.op.output_shape if side == "u" else block.op.input_shape
    return scatter(rows.reshape(-1, *shape), _points(block.places[place], side), sizes)


def _null_vectors(
    op: ConvOperator,
    blocks: list[Block],
    count: int,
    taken: Tensor,
    zero: Counter[tuple[int, int]],
    *,
    left: bool,
    request: Callable[[ConvOperator, int], Request],
) -> _OneSide:
    """Orthonormal null vectors of M (right) or M' (left) that the structure tells of, (count, n).

    First unit vectors at points that belong to no block, then null vectors of blocks with more
    columns than rows (right) or more rows than columns (left): orthogonal to the rows `taken`, of
    which `zero` says how many are null vectors of the block at this place.
    """
    side = "u" if left else "v"
    shape = op.input_shape
    covered = torch.zeros(1, *shape, dtype=torch.float64, device=op.device)
    for block in blocks:
        ones = covered.new_ones(1, *(block.op.output_shape if left else block.op.input_shape))
        for where in block.places:
            covered = covered + scatter(ones, _points(where, side), shape[1:])
    free = torch.nonzero(covered.flatten() == 0).flatten()[:count]
    matvecs, converged = 0, True
    found = covered.new_zeros(len(free), covered.numel())
    found[torch.arange(len(free), device="cpu"), free] = 1
    for b, block in enumerate(blocks):
        rows, columns = block.op.shape
        spare = (rows - columns) if left else (columns - rows)
        for place in range(len(block.places)):
            wanted = min(count - len(found), spare)
            if wanted <= 0:
                continue
            inner = block.op.T if left else block.op
            null = _block_null_vectors(inner, wanted + zero[b, place], request(block.op, wanted))
            placed = less(_placed(null.vectors, block, place, side, shape[1:]).flatten(1), taken)
            _, _, directions = torch.linalg.svd(placed, full_matrices=False)
            found = torch.cat([found, directions[:wanted]])
            matvecs, converged = matvecs + null.matvecs, converged and null.converged
    return _OneSide(found, matvecs, converged)


def _block_null_vectors(op: ConvOperator, count: int, options: Request) -> _OneSide:
    """The right vectors of the `count` smallest singular values of a wide block: zeros."""
    if dense_work(op) <= SMALL_WORK:
        _, _, right = torch.linalg.svd(op.to_dense(options.max_bytes))
        return _OneSide(right[-count:].flip(0), 0, True)
    product = Product(op)
    null = lobpcg(
        product.apply,
        product.apply_adjoint,
        op.shape,
        count,
        stop=Stop(options.tol, NULL_VECTOR_STEPS),
        like=op.weight,
        generator=options.generator,
    )
    return _OneSide(null.v, null.matvecs, null.converged)
