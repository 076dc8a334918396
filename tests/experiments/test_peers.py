"""Peers of the stable-gradients experiment against dense matrices and closed forms."""

from __future__ import annotations

import pytest
import torch
from torch import nn

from common import peers
from convspectra.testing import naive_dense


def weight(*shape: int) -> torch.Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(0), dtype=torch.float64)


def layer(kernel: torch.Tensor, **options: object) -> nn.Conv2d:
    h, g, *taps = kernel.shape
    conv = nn.Conv2d(g, h, taps, bias=False, dtype=torch.float64, **options)
    with torch.no_grad():
        conv.weight.copy_(kernel)
    return conv


def singular_values(kernel: torch.Tensor, size: tuple[int, int], **options: object) -> torch.Tensor:
    matrix = naive_dense(layer(kernel, **options), (kernel.shape[1], *size))
    return torch.linalg.svdvals(matrix.detach())


@pytest.mark.parametrize("shape", [(4, 2, 3, 3), (7, 1, 2, 3)])
def test_soft_orthogonality_is_that_of_the_singular_values(shape: tuple[int, ...]) -> None:
    kernel = weight(*shape)
    values = torch.linalg.svdvals(kernel.flatten(1))
    expected = ((values**2 - 1) ** 2).sum()
    torch.testing.assert_close(peers.soft_orthogonality(kernel), expected)


def test_the_two_forms_of_soft_orthogonality_differ_by_a_constant() -> None:
    kernel = weight(7, 1, 2, 2)
    W = kernel.flatten(1)
    larger = (W @ W.T - torch.eye(7, dtype=W.dtype)).square().sum()
    torch.testing.assert_close(peers.soft_orthogonality(kernel), larger - 3)


@pytest.mark.parametrize("shape", [(4, 2, 3, 3), (7, 1, 2, 3)])
def test_srip_converges_to_the_spectral_norm_from_below(shape: tuple[int, ...]) -> None:
    kernel = weight(*shape)
    values = torch.linalg.svdvals(kernel.flatten(1))
    expected = (values**2 - 1).abs().max()
    generator = torch.Generator().manual_seed(1)
    two = peers.srip(kernel, generator=generator)
    assert 0.3 * expected < two < expected
    many = peers.srip(kernel, iterations=300, generator=generator)
    torch.testing.assert_close(many, expected)


def test_srip_by_two_products_is_the_papers_quotient() -> None:
    kernel = weight(3, 2, 2, 2)
    W = kernel.flatten(1)
    difference = W @ W.T - torch.eye(3, dtype=W.dtype)
    v = torch.randn(3, generator=torch.Generator().manual_seed(5), dtype=W.dtype)
    u = difference @ v
    expected = (difference @ u).norm() / u.norm()
    generator = torch.Generator().manual_seed(5)
    torch.testing.assert_close(peers.srip(kernel, generator=generator), expected)


def test_srip_of_an_orthogonal_weight_is_zero_with_a_finite_gradient() -> None:
    kernel = torch.eye(4, dtype=torch.float64).reshape(4, 1, 2, 2).requires_grad_()
    value = peers.srip(kernel)
    value.backward()
    assert value == 0
    assert kernel.grad is not None
    assert bool(kernel.grad.isfinite().all())


def test_srip_needs_an_iteration() -> None:
    with pytest.raises(ValueError, match="iterations to be a positive integer, got 0"):
        peers.srip(weight(2, 2, 3, 3), iterations=0)


@pytest.mark.parametrize(("k", "stride"), [(3, 1), (3, 2), (2, 1), (1, 1), (4, 2), (5, 3)])
def test_ocnn_is_the_distance_of_a_torus_s_rows_from_orthonormal(k: int, stride: int) -> None:
    kernel = weight(3, 2, k, k)
    # No border on a torus: every output point has the same overlaps. Wide enough that no
    # overlap is met twice.
    side = 4 * stride
    while side < 2 * k - 1 + stride:
        side += stride
    conv = layer(kernel, stride=stride, padding=0)
    padded = nn.Sequential(nn.CircularPad2d((0, k - 1, 0, k - 1)), conv)
    points = (side // stride) ** 2

    def on_torus(x: torch.Tensor) -> torch.Tensor:
        return padded(x)[:, :, : side // stride, : side // stride]

    basis = torch.eye(2 * side**2, dtype=torch.float64).reshape(-1, 2, side, side)
    M = on_torus(basis).flatten(1).T.detach()
    assert len(M) == 3 * points
    expected = (M @ M.T - torch.eye(len(M), dtype=M.dtype)).square().sum() / points
    torch.testing.assert_close(peers.convolutional_orthogonality(kernel, stride), expected)


@pytest.mark.parametrize("penalty", [peers.soft_orthogonality, peers.convolutional_orthogonality])
def test_penalties_have_the_gradient_of_finite_differences(penalty: object) -> None:
    kernel = weight(3, 2, 3, 3).requires_grad_()
    assert torch.autograd.gradcheck(penalty, (kernel,))


def test_delta_orthogonal_kernels_have_no_ocnn_and_no_soft_orthogonality() -> None:
    kernel = peers.delta_orthogonal_(weight(4, 4, 3, 3))
    assert peers.convolutional_orthogonality(kernel) < 1e-20
    assert peers.soft_orthogonality(kernel) < 1e-20


@pytest.mark.parametrize(("h", "g"), [(4, 4), (5, 3)])
def test_delta_orthogonal_layers_have_one_singular_value(h: int, g: int) -> None:
    kernel = peers.delta_orthogonal_(weight(h, g, 3, 3), gain=1.5)
    values = singular_values(kernel, (5, 4), padding=1)
    torch.testing.assert_close(values, torch.full_like(values, 1.5))


def test_delta_orthogonal_follows_its_generator() -> None:
    one, two, three = (
        peers.delta_orthogonal_(weight(4, 4, 3, 3), generator=torch.Generator().manual_seed(seed))
        for seed in (0, 0, 1)
    )
    assert torch.equal(one, two)
    assert not torch.equal(one, three)


def test_delta_orthogonal_refuses_an_even_kernel() -> None:
    with pytest.raises(ValueError, match=r"odd kernel.*got \(2, 3\)"):
        peers.delta_orthogonal_(weight(2, 2, 2, 3))


def test_projection_leaves_a_kernel_below_the_limit_alone() -> None:
    kernel = weight(3, 2, 3, 3)
    torch.testing.assert_close(peers.project_circular(kernel, (5, 6), limit=1e3), kernel)


@pytest.mark.parametrize("channels", [(3, 2), (2, 3)])
def test_projection_of_a_kernel_as_large_as_its_input_clips_every_value(
    channels: tuple[int, int],
) -> None:
    kernel = weight(*channels, 3, 5)
    options = {"padding": (1, 2), "padding_mode": "circular"}
    before = singular_values(kernel, (3, 5), **options)
    limit = float(before.median())
    projected = peers.project_circular(kernel, (3, 5), limit)
    after = singular_values(projected, (3, 5), **options)
    torch.testing.assert_close(after, before.clamp(max=limit))


def test_projection_crops_the_clipped_matrix_to_the_taps() -> None:
    kernel = weight(2, 2, 3, 3)
    options = {"padding": 1, "padding_mode": "circular"}
    M = naive_dense(layer(kernel, **options), (2, 6, 6)).detach()
    U, s, Vh = torch.linalg.svd(M)
    clipped = ((U * s.clamp(max=1.0)) @ Vh).reshape(2, 6, 6, 2, 6, 6)
    # What output point (2, 2) reads of its 3 x 3 neighbors.
    expected = clipped[:, 2, 2, :, 1:4, 1:4]
    torch.testing.assert_close(peers.project_circular(kernel, (6, 6)), expected)


def test_projection_refuses_a_kernel_longer_than_its_input() -> None:
    with pytest.raises(ValueError, match=r"at least the kernel's \(3, 3\), got \(2, 6\)"):
        peers.project_circular(weight(2, 2, 3, 3), (2, 6))


def test_spectral_norm_is_on_every_convolution_and_follows_its_seed() -> None:
    def normalized(seed: int) -> nn.Sequential:
        conv, strided = layer(weight(4, 2, 3, 3)), layer(weight(3, 4, 2, 2), stride=2)
        network = nn.Sequential(conv, nn.ReLU(), nn.Sequential(strided))
        before = torch.get_rng_state()
        peers.normalize_spectrally(network, seed)
        assert torch.equal(torch.get_rng_state(), before)
        return network.eval()

    network, again, other = normalized(0), normalized(0), normalized(1)
    assert torch.equal(network[0].weight, again[0].weight)
    assert not torch.equal(network[0].weight, other[0].weight)
    for conv in (network[0], network[2][0]):
        norm = torch.linalg.svdvals(conv.weight.detach().flatten(1))[0]
        assert norm == pytest.approx(1.0, rel=0.05)
