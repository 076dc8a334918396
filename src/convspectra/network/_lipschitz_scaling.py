"""Factors for the channels between layers that lower a product of norms.

Note [Scaled channels]. The slopes S of an activation are a diagonal matrix and commute with every
diagonal D. So ``||W_2 S W_1|| = ||W_2 D^{-1} S D W_1|| <= ||W_2 D^{-1}|| ||D W_1||`` for every
D > 0, whatever the activation is. The logarithm of the right-hand side is convex in log D. It is
least where each channel has the same share in the leading left singular vector of ``D W_1`` and in
the leading right one of ``W_2 D^{-1}``. Where leading values come together there is no gradient, so
a soft maximum of a few is followed, by one step of a block power iteration for each step downhill.
The bound that is reported is computed anew with the factors that come out: they need not be best.
"""

from __future__ import annotations

import math

import torch
from torch import Tensor

from convspectra.network._lipschitz_maps import LinearMap
from convspectra.network._lipschitz_parts import Part, parts, sources
from convspectra.network._lipschitz_rules import Bounded, Slopes
from convspectra.network._lipschitz_trace import Node

BLOCK = 8
"""Singular vectors that are followed in each map. A choice: with 16 the bound of a perceptron of
four layers changes by less than 1 %."""
SHARPNESS = 64.0
"""Power in the soft maximum of squared singular values. In 40 steps the bound of a perceptron of
four layers falls to 0.77 of the product, with 32 to 0.78 and with 16 to 0.80."""
RATE = 0.03
"""First step of Adam in the logarithms of the factors; it falls to 0. With 0.05 that bound falls to
0.785 instead of 0.778, and that of three convolutions not at all."""
TINY = 1e-300
"""In the place of 0 in a logarithm."""


def channel_factors(start: Node, end: Node, like: Tensor, steps: int) -> dict[Node, Tensor]:
    """Positive factors for the channels of activations, which lower the product of norms.

    Parameters
    ----------
    start, end : Node
    like : Tensor
        Of the dtype and device of the arrays.
    steps : int
        Downhill; each takes one product with each linear part of the network, and one with its
        transpose, for a block of vectors.

    Returns
    -------
    dict of Node to Tensor
        Of each activation's input, in a shape that broadcasts with it.
    """
    linear = parts(end)
    leaders = _leaders(linear, end)
    own = {
        node: like.new_zeros(node.shape[1]).requires_grad_()
        for node in dict.fromkeys(leaders.values())
    }
    logs = {node: own[leader] for node, leader in leaders.items()}
    if not logs or steps == 0:
        return {}
    generator = torch.Generator(device=like.device).manual_seed(0)
    blocks = {
        part: [
            _Block(LinearMap(source, part.targets, frozenset(), like), part, generator)
            for source in sources(part.targets)
        ]
        for part in linear
    }
    climber = torch.optim.Adam(list(own.values()), lr=RATE)
    schedule = torch.optim.lr_scheduler.CosineAnnealingLR(climber, steps)
    for _ in range(steps):
        climber.zero_grad()
        with torch.enable_grad():
            _log_bound(blocks, start, logs, like).backward()
        climber.step()
        schedule.step()
    return {node: _shaped(log.detach().exp(), node.shape) for node, log in logs.items()}


def _leaders(linear: list[Part], end: Node) -> dict[Node, Node]:
    """Each node whose channels can be scaled, with the first of those that share its factors.

    Max pooling right behind an activation reads what it gives: scaled alike, nothing is lost. The
    output of the network is never scaled.
    """
    leaders: dict[Node, Node] = {}
    for part in linear:
        reader = part.reader
        if reader is None or reader is end or len(part.targets) != 1 or len(reader.shape) < 2:
            continue
        rule, (target,) = reader.rule, part.targets
        able = isinstance(rule, Slopes) or (isinstance(rule, Bounded) and rule.by_channel)
        if able and target.shape[:2] == reader.shape[:2] and reader.shape[1] > 1:
            leaders[reader] = leaders.get(target, reader)
    return leaders


def _log_bound(
    blocks: dict[Part, list[_Block]], start: Node, logs: dict[Node, Tensor], like: Tensor
) -> Tensor:
    """The logarithm of the plain bound, to first order in the logarithms of the factors."""
    behind = {start: like.new_zeros(())}
    bound = behind[start]
    for part, own in blocks.items():
        terms = [block.log_norm(logs) + behind[block.map.source] for block in own]
        bound = torch.stack(terms).logsumexp(0)
        if part.reader is not None:
            bound = bound + math.log(max(part.constant, TINY))
            behind[part.reader] = bound
    return bound


class _Block:
    """A linear map with some of its leading singular vectors, which are followed."""

    def __init__(self, linear: LinearMap, part: Part, generator: torch.Generator) -> None:
        self.map, self._reader = linear, part.reader
        count = min(BLOCK, *linear.shape)
        self._right = torch.randn(
            count,
            linear.shape[1],
            dtype=linear.dtype,
            device=linear.device,
            generator=generator,
        )

    def log_norm(self, logs: dict[Node, Tensor]) -> Tensor:
        """The logarithm of the norm with the factors as they are now, with its gradient."""
        m, source, reader = self.map, self.map.source, self._reader
        first, last = logs.get(source), None if reader is None else logs.get(reader)
        before = None if first is None else _shaped((-first).exp().detach(), m.input_shape)
        behind = None if last is None else _shaped(last.exp().detach(), m.output_shape)
        right = torch.linalg.qr(self._right.mT)[0].mT
        x = right.reshape(-1, *m.input_shape)
        y = m.apply(x if before is None else x * before)
        y = y if behind is None else y * behind
        u, s, mixed = torch.linalg.svd(y.reshape(len(y), -1).mT, full_matrices=False)
        back = m.apply_adjoint(y if behind is None else y * behind)
        self._right = (back if before is None else back * before).reshape(len(y), -1)
        logs_of_s = 2 * SHARPNESS * s.clamp_min(TINY).log()
        weights = logs_of_s.softmax(0)
        value = logs_of_s[0] / (2 * SHARPNESS)
        if last is not None:
            shares = _shares(u.mT.reshape(-1, *m.output_shape), weights)
            value = value + (shares * (last - last.detach())).sum()
        if first is not None:
            shares = _shares((mixed @ right).reshape(-1, *m.input_shape), weights)
            value = value - (shares * (first - first.detach())).sum()
        return value


def _shares(vectors: Tensor, weights: Tensor) -> Tensor:
    """The share of each channel in unit vectors, (b, 1, channels, ...), averaged by weights."""
    squares = vectors.square().flatten(3).sum(3) if vectors.ndim > 3 else vectors.square()
    return weights @ squares[:, 0]


def _shaped(factors: Tensor, shape: tuple[int, ...]) -> Tensor:
    """One factor for each channel, in a shape that broadcasts with an array (1, channels, ...)."""
    return factors.reshape(1, -1, *(1,) * (len(shape) - 2))
