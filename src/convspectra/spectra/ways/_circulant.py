"""The symbols of a circularly padded layer: every question, one small matrix a frequency."""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch
from torch import Tensor

from convspectra.operator import ConvOperator, is_circulant
from convspectra.solvers import SingularTriplets, inverse_and_logabsdet
from convspectra.spectra._request import Request
from convspectra.spectra.ways._pseudo_determinant import log_pseudo_determinant
from convspectra.spectra.ways._way import Cost, Question, Way
from convspectra.torus import (
    CirculantEmbedding,
    angles,
    half_frequencies,
    symbol_shape,
    symbols_at,
)

FLOPS = {"LM": 40.0, "SM": 40.0, "values": 16.0, "logabsdet": 16.0, "solve": 8 / 3}
"""Flops over m n min(m, n) of one symbol: four times those of a real matrix, and for the
determinant those of all frequencies instead of half of them."""


class Circulant(Way):
    """Dense matrices at half of the frequencies."""

    name = "circulant"
    needs = "a layer with circular padding all around"
    answers = ("LM", "SM", "values", "logabsdet", "solve")

    def admits(self, op: ConvOperator, question: Question) -> bool:
        """Circular padding, and as many outputs as the stride leaves."""
        return is_circulant(op)

    def cost(self, op: ConvOperator, question: Question) -> Cost:
        """A factorization of every symbol at half of the frequencies."""
        rows, columns = symbol_shape(op)
        symbols = op.groups * (math.prod(op.geometry.output_size) // 2 + 1)
        work = float(symbols * rows * columns * min(rows, columns))
        return Cost(FLOPS[question] * work, 16.0 * symbols * rows * columns)

    def run(self, request: Request) -> SingularTriplets:
        """The singular values of all symbols, and the vectors of at most k of them."""
        return circulant_triplets(request.op, request.k, request.largest)

    def matrices(self, op: ConvOperator, max_bytes: int) -> tuple[Tensor, Tensor]:
        """The symbols at half of the frequencies, once or twice each."""
        frequencies, copies = half_frequencies(op)
        return symbols_at(op, frequencies, max_bytes), copies.repeat(op.groups)

    def logabsdet(self, op: ConvOperator, max_bytes: int) -> Tensor:
        """The sum over all symbols."""
        return log_pseudo_determinant(CirculantEmbedding(op).symbols(half=False))

    def solve(self, op: ConvOperator, y: Tensor, adjoint: bool, max_bytes: int) -> Tensor:
        """Two Fourier transforms around the inverses of the symbols."""
        embedding = CirculantEmbedding(op)
        inverse, _ = inverse_and_logabsdet(embedding.symbols())
        if adjoint:
            on_torus = embedding.multiply(inverse.mH, embedding.embed_input(y))
            return embedding.restrict_output(on_torus)
        return embedding.restrict_input(embedding.multiply(inverse, embedding.embed_output(y)))


@dataclass(frozen=True)
class _Ranked:
    """All singular values of the symbols in order, each as often as it stands in M."""

    values: Tensor
    ranks: Tensor
    kept: Tensor
    copies: Tensor


def circulant_triplets(op: ConvOperator, k: int, largest: bool) -> SingularTriplets:
    """The k largest or smallest triplets of a layer that `is_circulant`, from its symbols.

    Every frequency that is not its own mirror image gives two real triplets: the real and the
    imaginary part of its wave. Cost: the singular values of half of the symbols.
    """
    embedding = CirculantEmbedding(op)
    kept, copies = half_frequencies(op)
    copies = copies.long()
    blocks = embedding.symbols(half=False)[:, kept]
    values = torch.linalg.svdvals(blocks)
    flat = values.flatten()
    ranks = torch.arange(flat.numel(), device=op.device)
    ranks = ranks.repeat_interleave(copies[:, None].expand(values.shape).flatten())
    ranks = ranks[torch.argsort(flat[ranks], descending=largest, stable=True)]
    error = (max(blocks.shape[2:]) + 32) * torch.finfo(flat.dtype).eps * float(flat.amax())
    others = 0.0 if largest else math.inf
    if len(ranks) > k:
        next_value = float(flat[ranks[k]])
        others = next_value + error if largest else max(next_value - error, 0.0)
    u, v = _waves(embedding, op.groups, blocks, _Ranked(values, ranks[:k], kept, copies))
    s = flat[ranks[:k]]
    regular = bool((values > error).all())
    return SingularTriplets(
        u=u,
        s=s,
        v=v,
        lower=(s - error).clamp_min(0),
        upper=s + error,
        others=others,
        converged=True,
        matvecs=0,
        certificate="backward error of dense SVDs of the symbols, (max(m, n) + 32) eps sigma_max",
        logabsdet=float(values.log().sum((0, 2)) @ copies.to(values.dtype))
        if regular
        else -math.inf,
    )


def _waves(
    embedding: CirculantEmbedding, groups: int, blocks: Tensor, found: _Ranked
) -> tuple[Tensor, Tensor]:
    """Left and right vectors of the ranks given, real, in rows."""
    periods, points = embedding.periods, math.prod(embedding.periods)
    u: list[Tensor] = []
    v: list[Tensor] = []
    for position, rank in enumerate(found.ranks.tolist()):
        rest, place = divmod(rank, found.values.shape[2])
        group, frequency = divmod(rest, len(found.kept))
        copies = int(found.copies[frequency])
        # The second of two equal ranks in a row is the imaginary part of the same wave.
        second = position > 0 and rank == int(found.ranks[position - 1])
        symbol = blocks[group, frequency]
        left, _, right = torch.linalg.svd(
            symbol.real if copies == 1 else symbol, full_matrices=False
        )
        wave = _wave(torch.unravel_index(found.kept[frequency], periods), periods)
        for amplitude, side, restrict in (
            (left[:, place], u, embedding.restrict_output),
            (right[place].conj(), v, embedding.restrict_input),
        ):
            mode = amplitude.reshape(-1, *(1,) * len(periods)) * wave
            real = (mode.imag if second else mode.real) * (copies / points) ** 0.5
            array = real.new_zeros(1, groups, *real.shape)
            array[0, group] = real
            side.append(restrict(array).flatten())
    return torch.stack(u), torch.stack(v)


def _wave(steps: tuple[Tensor, ...], periods: tuple[int, ...]) -> Tensor:
    """The plane wave of one frequency at every point of the torus."""
    wave = torch.ones((), dtype=torch.complex128, device=steps[0].device)
    for step, period in zip(steps, periods, strict=True):
        turns = angles(period).to(step.device) * step
        wave = wave[..., None] * torch.polar(torch.ones_like(turns), turns)
    return wave
