"""The distance of a layer to the nearest isometric one, in closed form."""

from __future__ import annotations

import torch
from torch import Tensor

from convspectra.operator import (
    ConvOperator,
    check_gain,
    check_halves,
    check_type,
    isometric_taps,
    isometric_target,
    not_compiled,
    squared_frobenius_norm,
)


@not_compiled
def isometry(
    op: ConvOperator,
    *,
    gain: float = 1.0,
    mirrored_input: bool = False,
    mirrored_output: bool = False,
) -> Tensor:
    """Half the squared distance to the nearest isometric layer: ``1/2 ||M(K) - M(Q)||_F^2``.

    ``1/2 sum_t |Omega_t| ||K_t - Q_t||^2`` with Q = `gain` times the polar factor of the center tap
    there, and 0 in the other taps; with stride s of the s x s taps that tile the input.

    Parameters
    ----------
    op : ConvOperator
        Any layer. Where its padding admits no isometric layer, Q is the same at the taps that most
        outputs use: nearly isometric.
    gain : float
        All singular values of Q, positive: 1, or what the activation wants (sqrt 2 for ReLU).
    mirrored_input, mirrored_output : bool
        Whether the halves of input and output channels are to be of opposite sign, for ReLU; one
        group, an even number of channels.

    Returns
    -------
    Tensor
        0-dim, float64, with the gradient ``|Omega_t| (K_t - Q_t)``. There is none where the center
        tap is rank deficient.

    Raises
    ------
    ValueError
        For a gain that is not positive, or channels that cannot be halved.

    Notes
    -----
    Cost: an SVD of one matrix of h by g prod(stride) a group; no SVD of M. Source: the squared
    distance to a set has the gradient K - Q; docs/mathematics.md, "Isometric layers".

    Examples
    --------
    >>> import torch, convspectra as cs
    >>> kernel = torch.zeros(2, 2, 3)
    >>> kernel[:, :, 1] = 3 * torch.eye(2)
    >>> cs.penalties.isometry(cs.ConvOperator(kernel, 10)).item()  # 20 singular values of 3
    40.0
    """
    check_type("op", op, ConvOperator)
    check_gain(gain)
    if mirrored_input or mirrored_output:
        check_halves(op, mirrored_input, mirrored_output)
    direct = op.T if op.transposed else op
    if op.transposed:
        mirrored_input, mirrored_output = mirrored_output, mirrored_input
    weight = direct.weight.double()
    with torch.no_grad():
        target = isometric_target(
            weight[None],
            direct.groups,
            isometric_taps(direct.geometry).taps,
            gain,
            mirrored_input=mirrored_input,
            mirrored_output=mirrored_output,
        )[0]
    return 0.5 * squared_frobenius_norm(weight - target, direct.geometry)
