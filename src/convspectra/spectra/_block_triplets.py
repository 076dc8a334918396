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

import torch
from torch import Tensor

from convspectra.operator import Block, ConvOperator, Place, Product, independent_blocks, scatter
from convspectra.solvers import SingularTriplets, Stop, less, lobpcg
from convspectra.spectra._request import ZERO, Request
from convspectra.spectra._strategy import admits, answer

NULL_VECTOR_STEPS = 1000


@dataclass(frozen=True)
class _Value:
    """One singular value of the layer: the i-th of a block's triplets, at one of its places."""

    s: float
    block: int
    i: int
    place: int


@dataclass(frozen=True)
class _NullVectors:
    vectors: Tensor
    matvecs: int
    converged: bool


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
    possible = sum(len(block.places) * min(block.op.shape) for block in blocks)
    zeros = min(op.shape) - possible
    wanted = min(k, possible) if largest else max(k - zeros, 0)
    requests = [
        request(block.op, max(1, min(-(-wanted // len(block.places)), min(block.op.shape))))
        for block in blocks
    ]
    if method != "auto" and not all(admits(of_block, method) for of_block in requests):
        raise ValueError(
            f"expected {_FITTING[method]} for method={method!r}, got {op!r} and k={k}; "
            "use method='auto'"
        )
    results, ways = [], []
    for of_block in requests if wanted else []:
        triplets, way = answer(of_block, method)
        results.append(triplets)
        ways.append(way)
    name = "+".join(sorted(set(ways))) or "structure"
    if len(blocks) == 1 and wanted == k and _is_whole(blocks[0], op):
        return results[0], name
    values = [
        _Value(float(s), b, i, place)
        for b, (block, triplets) in enumerate(zip(blocks, results, strict=False))
        for i, s in enumerate(triplets.s)
        for place in range(len(block.places))
    ]
    values.sort(key=lambda value: -value.s if largest else value.s)
    chosen, rest = values[:wanted], values[wanted:]
    s = torch.tensor([v.s for v in chosen], dtype=torch.float64, device=op.device)
    lowers, uppers = (
        sorted((float(getattr(results[v.block], end)[v.i]) for v in values), reverse=largest)[
            :wanted
        ]
        for end in ("lower", "upper")
    )
    bounds = [t.others for t in results]
    far = "upper" if largest else "lower"
    bounds += [float(getattr(results[v.block], far)[v.i]) for v in rest]
    if largest:
        others = max(bounds, default=0.0) if k < min(op.shape) else 0.0
    else:
        others = min(bounds, default=0.0) if k >= zeros else 0.0
        others = math.inf if k == min(op.shape) else others
    sides = []
    for side, sizes in (("u", op.geometry.output_size), ("v", op.geometry.input_size)):
        rows = [
            _placed(getattr(results[v.block], side)[v.i], blocks[v.block], v.place, side, sizes)
            for v in chosen
        ]
        flat = torch.cat(rows).flatten(1) if rows else s.new_zeros(0, _length(op, side))
        sides.append(flat)
    u, v = sides
    missing = k - wanted
    exact = s.new_zeros(missing)
    matvecs = sum(t.matvecs for t in results)
    converged = all(t.converged for t in results)
    if missing:
        extra = u.new_zeros(missing, op.shape[0]), v.new_zeros(missing, op.shape[1])
        if vectors:
            scale = ZERO * float(torch.linalg.vector_norm(op.weight))
            zero = Counter((value.block, value.place) for value in chosen if value.s <= scale)
            left = _null_vectors(op.T, blocks, missing, u, zero, left=True, request=request)
            right = _null_vectors(op, blocks, missing, v, zero, left=False, request=request)
            extra = left.vectors, right.vectors
            matvecs += left.matvecs + right.matvecs
            converged = converged and left.converged and right.converged
        u, v = (
            torch.cat([side, null] if largest else [null, side])
            for side, null in zip((u, v), extra, strict=True)
        )
    joined = [
        torch.cat([x, exact] if largest else [exact, x])
        for x in (s, s.new_tensor(lowers), s.new_tensor(uppers))
    ]
    certificates = [t.certificate for t in results]
    logarithms = [
        None if t.logabsdet is None else len(block.places) * t.logabsdet
        for block, t in zip(blocks, results, strict=False)
    ]
    logabsdet = -math.inf if zeros else None
    if not zeros and None not in logarithms:
        logabsdet = sum(filter(None, logarithms))
    if missing:
        certificates.append(
            "zeros by the structure: inputs that no tap reads, or blocks of unlike shapes"
        )
    return (
        SingularTriplets(
            u=u,
            s=joined[0],
            v=v,
            lower=joined[1],
            upper=joined[2],
            others=others,
            converged=converged,
            matvecs=matvecs,
            certificate="; ".join(dict.fromkeys(certificates)),
            logabsdet=logabsdet,
        ),
        name,
    )


_FITTING = {
    "capacitance": "a square layer with zero padding and N = stride N_out on every axis",
    "augmented": "zero padding and at least as many channels on the longer side of M",
    "circulant": "a layer with circular padding all around",
    "davidson": "a layer with zero padding, or circular all around, and no separation",
}
"""What the methods that not every block admits need."""


def _length(op: ConvOperator, side: str) -> int:
    return op.shape[0] if side == "u" else op.shape[1]


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
) -> _NullVectors:
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
    found[torch.arange(len(free)), free] = 1
    for b, block in enumerate(blocks):
        rows, columns = block.op.shape
        spare = (rows - columns) if left else (columns - rows)
        for place in range(len(block.places)):
            wanted = min(count - len(found), spare)
            if wanted <= 0:
                continue
            inner = Product(block.op.T if left else block.op)
            options = request(block.op, wanted)
            null = lobpcg(
                inner.apply,
                inner.apply_adjoint,
                inner.op.shape,
                wanted + zero[b, place],
                stop=Stop(options.tol, NULL_VECTOR_STEPS),
                like=block.op.weight,
                generator=options.generator,
            )
            placed = less(_placed(null.v, block, place, side, shape[1:]).flatten(1), taken)
            _, _, directions = torch.linalg.svd(placed, full_matrices=False)
            found = torch.cat([found, directions[:wanted]])
            matvecs, converged = matvecs + null.matvecs, converged and null.converged
    return _NullVectors(found, matvecs, converged)
