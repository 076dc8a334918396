"""The numerical rank of layers that are taken for too large to be dense."""

from __future__ import annotations

import pytest
import torch
from helpers.strategies import random

import convspectra as cs
from convspectra import ConvOperator
from convspectra.spectra import _rank as rank
from convspectra.spectra import numerical_rank

SOBEL = torch.tensor([[1.0, 0, -1], [2, 0, -2], [1, 0, -1]], dtype=torch.float64)


@pytest.mark.parametrize(
    ("op", "lost"),
    [
        # A derivative along an axis of odd length lacks a direction for every line and channel.
        (ConvOperator(random(4, 4)[:, :, None, None] * SOBEL, (13, 13)), 4 * 13),
        (ConvOperator(random(6, 3, 3, 3), (10, 10)), 0),
        (ConvOperator(random(4, 6, 3, 3), (13, 13), stride=2, padding=1), 0),
    ],
)
def test_many_lost_directions_are_counted(
    monkeypatch: pytest.MonkeyPatch, op: ConvOperator, lost: int
) -> None:
    monkeypatch.setattr(rank, "EXACT_WORK", 0)  # stands for a layer of minutes of dense work
    order, norm = min(op.shape), cs.sigma_max(op)
    tolerance = max(op.shape) * torch.finfo(torch.float64).eps * norm
    values = torch.linalg.svdvals(op.to_dense())
    assert int((values > tolerance).sum()) == order - lost
    unknown = cs.svds(op, 1, "SM", method="davidson", maxiter=1)
    assert numerical_rank(op, tolerance, unknown, max_bytes=2**30) == order - lost
