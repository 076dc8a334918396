"""The lower end of a Lipschitz constant: the norm of a Jacobian, at the best input found.

Note [Pairs of points]. The Jacobian of a ReLU network is constant in pieces, and its norm has no
gradient in the input. The quotient ||f(x + d) - f(x - d)|| / (2 ||d||) has one, and is at most the
norm of the Jacobian somewhere between the two points. So pairs are moved uphill, and Jacobians are
taken where they stand.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

from convspectra.network._frozen import undisturbed
from convspectra.network._jacobian import JacobianOperator
from convspectra.network._segment import Segment, Selector
from convspectra.spectra import svds

APART = 1.0
"""Distance of the two points of a pair at the start, over the norm of the input. On seven random
ReLU networks of 3 to 5 layers 30 steps raise the norm by 1.1 to 1.9 times; from 0.1 the pair sees
fewer kinks, and rises less on five of them. At half of it the result is about the same."""
RATE = 0.2
"""Step of Adam, over the root mean square of the input: 0.05 rises less on four of those networks,
and 0.5 about as much."""
LOOKS = 5
"""Jacobians whose norms are taken on the way up, after equal numbers of steps. A choice."""
TOLERANCE = 1e-3
"""Relative accuracy of the norm of a Jacobian; its lower end is used."""


def sharpest(
    model: nn.Module, samples: list[tuple[Any, ...]], select: Selector | None, steps: int
) -> tuple[float, Tensor]:
    """The lower end of the largest norm of a Jacobian that is found, and the input where.

    Parameters
    ----------
    model : nn.Module
    samples : list of tuple
        Arguments of one sample each, the first the input.
    select : callable, optional
    steps : int
        From the best of these uphill.
    """
    best, at, direction = -1.0, samples[0], torch.empty(0)
    for sample in samples:
        value, v = _norm(model, sample, select)
        if value > best:
            best, at, direction = value, sample, v
    if steps == 0:
        return best, at[0].detach().clone()
    segment = Segment(model, at, None, None, select, torch.float64)
    found = at[0].detach().clone()
    size = float(segment.inputs[0].square().mean().sqrt()) or 1.0
    x = segment.inputs[0].clone().requires_grad_()
    d = (APART / 2 * size * x.numel() ** 0.5 * direction.reshape(x.shape)).requires_grad_()
    climber = torch.optim.Adam([x, d], lr=RATE * size)
    every = -(-steps // LOOKS)
    for step in range(1, steps + 1):
        with undisturbed(x.device), torch.enable_grad():
            norm = torch.linalg.vector_norm
            quotient = norm(segment(x + d) - segment(x - d)).log() - norm(d).log()
            x.grad, d.grad = torch.autograd.grad(-quotient, (x, d))
        if not bool(x.grad.isfinite().all() and d.grad.isfinite().all()):
            break
        climber.step()
        if step % every == 0 or step == steps:
            for point in (x, x + d, x - d):
                point = point.detach().to(at[0].dtype)
                value, _ = _norm(model, (point, *at[1:]), select)
                if value > best:
                    best, found = value, point.clone()
    return best, found


def _norm(
    model: nn.Module, sample: tuple[Any, ...], select: Selector | None
) -> tuple[float, Tensor]:
    """The lower end of the norm of a Jacobian, and its right singular vector."""
    result = svds(JacobianOperator(model, sample, select=select), 1, "LM", tol=TOLERANCE)
    assert result.v is not None
    return max(float(result.lower[0]), 0.0), result.v[0]
