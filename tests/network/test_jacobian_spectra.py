"""Singular values of Jacobians through the doors that layers go through, against dense SVDs."""

from __future__ import annotations

import copy

import pytest
import torch
from helpers.networks import NETWORKS, conv, network
from torch import Tensor, nn
from torch.nn.attention import SDPBackend, sdpa_kernel

import convspectra as cs


def true_values(model: nn.Module, x: Tensor) -> Tensor:
    frozen = copy.deepcopy(model).double().eval()
    with sdpa_kernel(SDPBackend.MATH):
        jacobian = torch.func.jacrev(frozen)(x.double())
    return torch.linalg.svdvals(jacobian.detach().reshape(-1, x.numel()))


def deep(layers: int, gain: float, seed: int = 0) -> tuple[nn.Module, Tensor]:
    """Tanh layers of 4 channels on 8 x 8 points, of the gain given."""
    parts: list[nn.Module] = [nn.Conv2d(1, 4, 3, padding=1)]
    for _ in range(layers):
        parts += [nn.Tanh(), nn.Conv2d(4, 4, 3, padding=1)]
    model = nn.Sequential(*parts)
    generator = torch.Generator().manual_seed(seed)
    for module in model.modules():
        if isinstance(module, nn.Conv2d):
            fan_in = module.weight[0].numel()
            nn.init.normal_(module.weight, 0, gain / fan_in**0.5, generator=generator)
            nn.init.zeros_(module.bias)
    return model, torch.randn(1, 1, 8, 8, generator=generator)


@pytest.mark.parametrize(("name", "seed"), NETWORKS)
@pytest.mark.parametrize("method", ["dense", "lanczos"])
def test_largest_values_lie_in_their_enclosures(name: str, seed: int, method: str) -> None:
    model, x = network(name, seed)
    truth = true_values(model, x)
    k = min(2, len(truth))
    found = cs.svds(cs.JacobianOperator(model, x), k, method=method)
    assert found.converged
    assert found.method == method
    assert bool((found.lower <= truth[:k]).all() and (truth[:k] <= found.upper).all())
    assert torch.allclose(found.s, truth[:k], rtol=1e-7)
    assert bool((found.residuals <= 1e-7 * truth[0]).all())
    if len(truth) > k:
        assert truth[k] <= found.others * (1 + 1e-12)


@pytest.mark.parametrize(("name", "seed"), NETWORKS)
def test_smallest_values_lie_in_their_enclosures(name: str, seed: int) -> None:
    model, x = network(name, seed)
    truth = true_values(model, x).flip(0)
    found = cs.svds(cs.JacobianOperator(model, x), 1, "SM")
    assert found.converged
    assert found.lower[0] <= truth[0] + 1e-14 * truth[-1]
    assert truth[0] <= found.upper[0] + 1e-14 * truth[-1]


@pytest.mark.parametrize(("layers", "gain"), [(3, 1.0), (20, 0.5), (20, 3.0), (100, 1.0)])
@pytest.mark.parametrize("which", ["LM", "SM"])
def test_networks_that_vanish_or_explode_lose_no_digits(
    layers: int, gain: float, which: str
) -> None:
    model, x = deep(layers, gain)
    truth = true_values(model, x)
    truth = truth[:2] if which == "LM" else truth.flip(0)[:2]
    found = cs.svds(cs.JacobianOperator(model, x), 2, which, method="dense")
    assert bool((found.lower <= truth).all() and (truth <= found.upper).all())


def test_lanczos_says_where_it_lost_the_smallest() -> None:
    model, x = deep(100, 1.0)
    found = cs.svds(cs.JacobianOperator(model, x), 1, "SM", method="lanczos", maxiter=300)
    assert not found.converged
    assert found.lower[0] == 0.0
    with pytest.raises(cs.ConvergenceError, match="the smallest singular value did not converge"):
        cs.sigma_min(cs.JacobianOperator(model, x), method="lanczos", maxiter=300)


def test_the_other_doors_take_jacobians() -> None:
    model, x = network("tanh", 0)
    J, truth = cs.JacobianOperator(model, x), true_values(model, x)
    assert cs.sigma_max(J) == pytest.approx(float(truth[0]), rel=1e-6)
    assert cs.sigma_min(J) == pytest.approx(float(truth[-1]), rel=1e-6)
    assert cs.cond(J) == pytest.approx(float(truth[0] / truth[-1]), rel=1e-5)
    assert torch.allclose(cs.svdvals(J), truth, rtol=1e-12)
    assert torch.allclose(cs.svdvals(J.T), truth, rtol=1e-12)


def test_the_density_counts_or_estimates() -> None:
    model, x = network("deep skips", 1)
    J, truth = cs.JacobianOperator(model, x), true_values(model, x)
    edges = [0.0, 0.5, 1.0, 2.0, 100.0]
    exact = cs.spectral_density(J, edges=edges)
    counts = torch.histogram(truth, torch.tensor(edges, dtype=torch.float64)).hist / len(truth)
    assert exact.method == "exact"
    assert torch.allclose(torch.tensor(exact.fractions).double(), counts)
    assert exact.mean_log == pytest.approx(float(truth.log().mean()))
    estimate = cs.spectral_density(J, edges=edges, method="quadrature")
    assert estimate.method == "quadrature"
    pairs = zip(estimate.fractions, exact.fractions, estimate.errors, strict=True)
    assert all(abs(a - b) <= 3 * bar + 1e-9 for a, b, bar in pairs)


def test_a_jacobian_that_is_zero() -> None:
    dead = nn.Sequential(conv(), nn.ReLU())
    nn.init.constant_(dead[0].bias, -100.0)
    J = cs.JacobianOperator(dead, torch.ones(1, 2, 6, 6))
    found = cs.svds(J, 2)
    assert found.method == "zero"
    assert found.s.tolist() == found.upper.tolist() == [0.0, 0.0]
    assert cs.spectral_density(J, edges=[0.0, 1.0]).fractions == (1.0,)


def test_what_the_doors_refuse() -> None:
    J = cs.JacobianOperator(conv(), torch.ones(1, 2, 6, 6))
    with pytest.raises(ValueError, match=r"given by its products to be one of \('auto', 'dense'"):
        cs.svds(J, method="capacitance")
    with pytest.raises(ValueError, match="expected a ConvOperator for certify"):
        cs.svds(J, certify="count")
    with pytest.raises(ValueError, match="expected a ConvOperator for method='count'"):
        cs.spectral_density(J, method="count")
    with pytest.raises(ValueError, match="expected a ConvOperator for method='circular'"):
        cs.spectral_density(J, method="circular")
    with pytest.raises(ValueError, match="expected op to be a ConvOperator, a JacobianOperator"):
        cs.svds(torch.eye(3))
    coarse = cs.JacobianOperator(conv(), torch.ones(1, 2, 6, 6), dtype=torch.float32)
    with pytest.raises(ValueError, match=r"expected an operator in float64, got torch\.float32"):
        cs.svds(coarse)
    with pytest.raises(ValueError, match="expected the dense matrix to take at most"):
        cs.svds(J, method="dense", max_bytes=1000)
