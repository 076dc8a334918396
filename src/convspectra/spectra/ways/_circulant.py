"""All singular triplets of a circularly padded layer, from its symbols."""

from __future__ import annotations

import math

import torch
from torch import Tensor

from convspectra.operator import ConvOperator
from convspectra.solvers import SingularTriplets
from convspectra.torus import CirculantEmbedding, angles


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
