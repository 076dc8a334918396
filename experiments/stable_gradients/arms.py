"""The arms of the comparison: how each run differs from the plain one."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from functools import partial

import torch
from torch import Tensor, nn

from common import peers

PeerPenalty = Callable[[nn.Conv2d, torch.Generator], Tensor]
"""From a convolution and a generator to a penalty."""

OUR_PENALTIES: dict[str, Mapping[str, float]] = {
    "frobenius": {},
    "sigma_min": {},
    "conditioning": {},
    "sigma_max": {},
    "band": {"lower": 0.5, "upper": 2.0},
    "cond": {},
    "stein": {},
    "orthogonality": {},
}
"""Names of `cs.SpectralRegularizer`'s penalties, with their options."""

PRECONDITION = "precondition"
"""The name of the arm that starts from preconditioned kernels."""
GAINS = {"relu": math.sqrt(2), "tanh": 1.0}
"""Of delta-orthogonal kernels: what keeps the size of a signal through each activation."""


@dataclass(frozen=True)
class Arm:
    """How a run differs from the plain one.

    Attributes
    ----------
    start : "default", "delta-orthogonal" or "precondition"
        What is done to the kernels before training.
    normalize : bool
        Batch normalization.
    weight_decay : bool
    spectral_norm : bool
        torch's parametrization on every convolution.
    project : bool
        Sedghi, Gupta and Long's projection every few steps.
    peer_penalty : callable, optional
        Added to the loss, summed over the convolutions.
    penalty : str, optional
        Of `cs.SpectralRegularizer`.
    penalty_options : mapping
    """

    start: str = "default"
    normalize: bool = False
    weight_decay: bool = False
    spectral_norm: bool = False
    project: bool = False
    peer_penalty: PeerPenalty | None = None
    penalty: str | None = None
    penalty_options: Mapping[str, float] = field(default_factory=dict)


def _on_weight(
    penalty: Callable[[Tensor], Tensor], conv: nn.Conv2d, generator: torch.Generator
) -> Tensor:
    return penalty(conv.weight)


def _srip(conv: nn.Conv2d, generator: torch.Generator) -> Tensor:
    return peers.srip(conv.weight, generator=generator)


def _ocnn(conv: nn.Conv2d, generator: torch.Generator) -> Tensor:
    return peers.convolutional_orthogonality(conv.weight, conv.stride[0])


PLAIN = "plain"
"""The name of the arm without anything."""
BATCH_NORMALIZATION = "batch normalization"
"""The name of the arm with batch normalization."""
PEERS: dict[str, Arm] = {
    PLAIN: Arm(),
    "weight decay": Arm(weight_decay=True),
    "delta-orthogonal": Arm(start="delta-orthogonal"),
    BATCH_NORMALIZATION: Arm(normalize=True),
    "soft orthogonality": Arm(peer_penalty=partial(_on_weight, peers.soft_orthogonality)),
    "SRIP": Arm(peer_penalty=_srip),
    "OCNN": Arm(peer_penalty=_ocnn),
    "spectral_norm": Arm(spectral_norm=True),
    "circular projection": Arm(project=True),
}
"""What people use, by name."""
OURS: dict[str, Arm] = {
    PRECONDITION: Arm(start=PRECONDITION),
    **{name: Arm(penalty=name, penalty_options=options) for name, options in OUR_PENALTIES.items()},
    **{
        f"{name} + {PRECONDITION}": Arm(start=PRECONDITION, penalty=name, penalty_options=options)
        for name, options in OUR_PENALTIES.items()
    },
}
"""What this package offers, by name."""
ARMS: dict[str, Arm] = {**PEERS, **OURS}
"""All arms by name."""


def arms_for(network: str) -> tuple[str, ...]:
    """Names of the arms that differ on this network: the residual one is normalized as it is."""
    if network == "plain":
        return tuple(ARMS)
    return tuple(name for name, arm in ARMS.items() if not arm.normalize)
