"""Penalties of others on the reshaped weight: another matrix than that of the layer.

W is the weight as h rows of its g / groups times taps entries. M, the layer as it is applied, has a
row for every output point, and these overlap: sigma_max(M) can be the root of the number of taps
times sigma_max(W), and an orthogonal W makes no orthogonal M. They are here to be compared with.
"""

from __future__ import annotations

import torch
from torch import Tensor

from convspectra.operator import ConvOperator, check_positive_integer, check_type, not_compiled


@not_compiled
def soft_orthogonality(op: ConvOperator) -> Tensor:
    """||W W' - I||_F^2 of the reshaped weight, or of W' W where that Gram matrix is the smaller.

    Parameters
    ----------
    op : ConvOperator
        Any layer; its input size, stride and padding play no part. Groups are not told apart, and
        the rows of a transposed layer's weight are its input channels.

    Returns
    -------
    Tensor
        0-dim, float64, with gradient. The two forms differ by a constant. It says nothing for
        certain of the singular values of the layer: `orthogonality` is the same for M.

    Notes
    -----
    Cost: one product of W with its transpose. Source: "SO" of Bansal, Chen and Wang, "Can We Gain
    More from Orthogonality Regularizations in Training Deep CNNs?", NeurIPS 2018, arXiv:1810.09102.

    Examples
    --------
    >>> import torch, convspectra as cs
    >>> op = cs.ConvOperator(torch.tensor([[[0.6, 0.0, 0.8]]]), 50)
    >>> round(cs.penalties.soft_orthogonality(op).item(), 6), round(cs.sigma_max(op), 3)
    (0.0, 1.397)
    """
    gram = _smaller_gram(op)
    return (gram - _identity_like(gram)).square().sum()


@not_compiled
def srip(op: ConvOperator, iterations: int = 2, generator: torch.Generator | None = None) -> Tensor:
    """||W W' - I|| of the reshaped weight, or of the smaller Gram matrix, by power iterations.

    Parameters
    ----------
    op : ConvOperator
        As for `soft_orthogonality`.
    iterations : int
        Products with the Gram matrix, from a random vector; two in the paper.
    generator : torch.Generator, optional
        Draws the starting vector; without it torch's own does, so that values differ from call to
        call.

    Returns
    -------
    Tensor
        0-dim, float64, with gradient: a lower bound on that norm. 0 for an orthogonal W.

    Raises
    ------
    ValueError
        For fewer iterations than one.

    Notes
    -----
    Cost: that of `soft_orthogonality`, and some products with its matrix. Source: "SRIP" (spectral
    restricted isometry property) of Bansal, Chen and Wang, NeurIPS 2018, arXiv:1810.09102.

    Examples
    --------
    >>> import torch, convspectra as cs
    >>> op = cs.ConvOperator(torch.tensor([[[1.0, 0.0, 1.0]]]), 50)
    >>> cs.penalties.srip(op).item()
    1.0
    """
    check_positive_integer("iterations", iterations)
    gram = _smaller_gram(op)
    difference = gram - _identity_like(gram)
    vector = torch.randn(len(gram), generator=generator, dtype=op.dtype, device=op.device).to(
        gram.dtype
    )
    tiny = torch.finfo(gram.dtype).tiny
    for _ in range(iterations - 1):
        image = difference @ vector
        vector = image / torch.linalg.vector_norm(image).clamp_min(tiny)
    norm = torch.linalg.vector_norm(vector).clamp_min(tiny)
    return torch.linalg.vector_norm(difference @ vector) / norm


@not_compiled
def reshaped_norm(op: ConvOperator) -> Tensor:
    """1/2 ||W||^2, half the squared largest singular value of the reshaped weight.

    Parameters
    ----------
    op : ConvOperator
        As for `soft_orthogonality`.

    Returns
    -------
    Tensor
        0-dim, float64, with gradient where the largest value is simple. `sigma_max` is the same for
        M, without the square.

    Notes
    -----
    Cost: an SVD of W. Source: the spectral norm regularization of Yoshida and Miyato, "Spectral
    Norm Regularization for Improving the Generalizability of Deep Learning", arXiv:1705.10941
    (2017), who follow the value by a power iteration a step.

    Examples
    --------
    >>> import torch, convspectra as cs
    >>> op = cs.ConvOperator(torch.tensor([[[3.0, 0.0, 4.0]]]), 50)
    >>> round(cs.penalties.reshaped_norm(op).item(), 6)
    12.5
    """
    return 0.5 * torch.linalg.matrix_norm(_reshaped(op), 2).square()


def _reshaped(op: ConvOperator) -> Tensor:
    check_type("op", op, ConvOperator)
    return op.weight.double().flatten(1)


def _smaller_gram(op: ConvOperator) -> Tensor:
    W = _reshaped(op)
    with torch.autocast(W.device.type, enabled=False):
        return W @ W.T if W.shape[0] <= W.shape[1] else W.T @ W


def _identity_like(square: Tensor) -> Tensor:
    return torch.eye(len(square), dtype=square.dtype, device=square.device)
