"""The lower end of a Lipschitz constant: the norm of a Jacobian, at the best input found.

Note [Pairs of points]. The Jacobian of a ReLU network is constant in pieces, and its norm has no
gradient in the input. The quotient ||f(x + d) - f(x - d)|| / (2 ||d||) has one, and is at most the
norm of the Jacobian somewhere between the two points. So pairs are moved uphill, and Jacobians are
taken where they stand.
"""

from __future__ import annotations

import torch
from torch import Tensor, nn

from convspectra.models import Arguments
from convspectra.network._frozen import undisturbed
from convspectra.network._jacobian import JacobianOperator
from convspectra.network._segment import Segment, Selector
from convspectra.spectra import svds

APART = 1.0
"""Distance of the two points of a pair at the start, over the norm of the input. On seven random
ReLU networks of 3 to 5 layers, 30 steps from 0.1 find a lower norm on five of them: the pair sees
fewer kinks. At half of it the norms are about the same."""
RATE = 0.2
"""Step of Adam, over the root mean square of the input: with 0.05 the norm is lower on six of those
networks, and with 0.5 about the same."""
LOOKS = 5
"""Jacobians whose norms are taken on the way up, after equal numbers of steps. A choice."""
STEP = 1e-6
"""Length of the step along the leading singular vector, over the norm of the input, that holds the
Jacobian against the function: rounding changes the quotient by 1e-9 or so, and curvature by about
this. A choice."""
KINK = 1e-3
"""Relative difference of the two from which on the input is at a kink. A choice between these
errors and the jumps of slopes."""
OFF = 1e-2
"""How far an input is moved off a kink, over its root mean square. A choice."""
MOVES = 3
"""Tries, before the quotient itself, with the allowance above, is the answer. A choice."""
TOLERANCE = 1e-3
"""Relative accuracy of the norm of a Jacobian; its lower end is used."""


def sharpest(
    model: nn.Module, samples: list[Arguments], select: Selector | None, steps: int
) -> tuple[float, Tensor]:
    """The lower end of the largest norm of a Jacobian that is found, and the input where.

    Parameters
    ----------
    model : nn.Module
    samples : list of Arguments
        Arguments of one sample each, the first the input.
    select : callable, optional
    steps : int
        From the best of these uphill.
    """
    looks = [_Look(model, sample, select) for sample in samples]
    best = max(looks, key=lambda look: look.lower)
    if steps == 0:
        return best.lower, best.at.first.detach().clone()
    sample = best.at
    segment = Segment(model, sample, None, None, select, torch.float64)
    size = float(segment.inputs.first.square().mean().sqrt()) or 1.0
    x = segment.inputs.first.clone().requires_grad_()
    d = best.direction.reshape(x.shape).to(x)
    d = (APART / 2 * size * x.numel() ** 0.5 * d).requires_grad_()
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
                point = point.detach().to(sample.first.dtype)
                found = _Look(model, sample.with_first(point), select)
                best = max(best, found, key=lambda look: look.lower)
    return best.lower, best.at.first.detach().clone()


class _Look:
    """The norm of the Jacobian at one input.

    At a kink the gradients of PyTorch need not be those of any point nearby. There the function
    itself, a little way along the leading singular vector, says so: the input is moved off it.
    """

    def __init__(self, model: nn.Module, at: Arguments, select: Selector | None) -> None:
        generator = torch.Generator(device=at.first.device).manual_seed(0)
        self.at, self.lower = at, 0.0
        for _ in range(MOVES):
            J = JacobianOperator(model, self.at, select=select)
            result = svds(J, 1, "LM", tol=TOLERANCE)
            assert result.v is not None
            self.direction = result.v[0]
            value = max(float(result.lower[0]), 0.0)
            quotient = self._quotient(model, select)
            if quotient >= (1 - KINK) * value:
                self.lower = value
                return
            self.lower = max(self.lower, quotient * (1 - KINK))
            x = at.first
            size = float(x.double().square().mean().sqrt()) or 1.0
            noise = torch.randn(x.shape, dtype=x.dtype, device=x.device, generator=generator)
            self.at = at.with_first(x + OFF * size * noise)

    def _quotient(self, model: nn.Module, select: Selector | None) -> float:
        """The difference of the function along the direction, over how far it goes."""
        segment = Segment(model, self.at, None, None, select, torch.float64)
        x = segment.inputs.first
        length = STEP * (float(x.square().mean().sqrt()) or 1.0) * x.numel() ** 0.5
        d = length * self.direction.reshape(x.shape).to(x)
        with undisturbed(x.device), torch.no_grad():
            apart = torch.linalg.vector_norm(segment(x + d) - segment(x))
        return float(apart) / length
