"""Layers whose operator norm is held at a bound while they are trained.

Note [Held norms]. In training the norm is that of a vector that follows the largest singular vector
by a few steps of Lanczos at every forward pass: a lower bound on the norm, near it where weights
move slowly. In evaluation it is the upper end of an enclosure, so that nothing is left to luck. The
gradient is that of ``W / <u, M(W) v>`` with u and v held, as in torch's ``spectral_norm``.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, cast

import torch
from torch import Tensor, nn
from torch.nn.utils import parametrize

from convspectra.operator import (
    ConvOperator,
    check_choice,
    check_positive_number,
    derived_operator,
    is_wide,
    not_compiled,
    weight_rounding,
)
from convspectra.solvers import warm_lanczos, working_dtype
from convspectra.spectra import norm_bound, svds

SCALES = ("always", "above")
"""When a weight is scaled: at every step, or only where its norm is above the bound."""
NORM_TOLERANCE = 1e-6
"""Relative error of the residual at which the exact norm is found: as `sigma_max`, a choice.

The enclosure is as wide at 1e-3, and takes a quarter less time; its lower end is far nearer.
"""
STEPS = 8
"""Steps of Lanczos at a forward pass in training.

Three convolutions of a critic, 200 steps of Adam at 1e-4, 1e-3 and 1e-2: with 4, 8 and 16 steps the
norm was above the bound by 1.1%, 0.7% and 0.2% at worst, on average over the nine runs; at 1e-4 and
with 8 steps by 0.3%, and by 0.08% in the end. Half as many cost half as much.
"""
KEPT = 3
"""Vectors that are kept from one pass to the next: with one the 0.7% of `STEPS` are 1.3%."""
NUMBERS = 4 * torch.finfo(torch.float64).eps
"""Allowance for the rounding of the few operations between an enclosure and a scaled one."""


@dataclass(frozen=True)
class NormCertificate:
    """An enclosure of the norm of a layer whose norm is held.

    Attributes
    ----------
    lower, upper : float
        The norm of M, as the layer applies it now, is between them.
    bound : float
        The bound that was asked for.
    certificate : str
        What the enclosure rests on: as `SVDResult.certificate`.

    Examples
    --------
    >>> NormCertificate(0.5, 1.0, 1.0, "exact").holds
    True
    """

    lower: float
    upper: float
    bound: float
    certificate: str

    @property
    def holds(self) -> bool:
        """Whether the norm is at most the bound, for certain."""
        return self.upper <= self.bound


@dataclass(frozen=True)
class _Exact:
    """The norm of the layer of a weight, exactly: an enclosure, and the vector that has it."""

    weight: Tensor
    lower: float
    upper: float
    vector: Tensor
    certificate: str

    def is_of(self, weight: Tensor) -> bool:
        """Whether the weight has not changed since."""
        mine = self.weight
        same = (mine.dtype, mine.device) == (weight.dtype, weight.device)
        return same and torch.equal(mine, weight)


class SpectralNorm(nn.Module):
    """The parametrization that `spectral_norm` registers: a weight, scaled to a norm of `bound`.

    It stands in ``layer.parametrizations.weight``; its buffer, three vectors of the layer's smaller
    side, follows the largest singular vectors.

    Examples
    --------
    >>> import torch, convspectra as cs
    >>> layer = cs.parametrizations.spectral_norm(torch.nn.Conv2d(3, 8, 3, padding=1), (16, 16))
    >>> layer.eval().parametrizations.weight[0].certificate().holds
    True
    """

    vectors: Tensor

    def __init__(
        self, layer: nn.Module, input_size: int | Sequence[int], bound: float, scale: str
    ) -> None:
        super().__init__()
        op = ConvOperator.from_module(layer, input_size)
        self.bound, self.scale = float(bound), scale
        self.input_size = op.input_shape[1:]
        self._geometry, self._groups, self._transposed = op.geometry, op.groups, op.transposed
        self._owner = (layer,)  # in a tuple, so that it is no submodule of its own parametrization
        self._known = self._exactly(op.weight)
        if scale == "always" and self._known.upper == 0.0:
            raise ValueError(
                f"expected a layer with a norm above 0 for scale='always', got {op!r} with a norm "
                "of 0; initialize its weight, or take scale='above'"
            )
        first = self._known.vector.to(working_dtype(op.dtype))
        start = first.new_zeros(min(KEPT, len(first)), len(first))
        start[0] = first
        self.register_buffer("vectors", start)

    def forward(self, weight: Tensor) -> Tensor:
        """The scaled weight: with the norm that is followed in training, exactly in evaluation."""
        with torch.autocast(weight.device.type, enabled=False):
            factor = self._followed(weight) if self.training else self._certain(weight)
            return weight * factor.to(weight.dtype)

    def right_inverse(self, weight: Tensor) -> Tensor:
        """The weight itself: what is assigned to the layer is scaled when it is read."""
        return weight

    def extra_repr(self) -> str:
        """Options, for ``print(layer)``."""
        return f"input_size={self.input_size}, bound={self.bound}, scale={self.scale!r}"

    @not_compiled
    def certificate(self) -> NormCertificate:
        """An enclosure of the norm of M for the weight that this parametrization gives now.

        In evaluation mode ``upper`` is at most `bound`, rounding of the weight included; in
        training mode it tells how far the vector that is followed lags behind.

        Raises
        ------
        ValueError
            If the layer is parametrized no more, or if its norm cannot be bounded.

        Notes
        -----
        Cost: one `svds` of the largest value, unless the weight is the one of the last evaluation.
        """
        with torch.inference_mode(False), torch.no_grad():
            weight = self._given()
            known = self._exactly(weight)
            with torch.autocast(weight.device.type, enabled=False):
                if self.training:
                    factor = float(self._scaling(self._norm_along(weight, self.vectors[0])))
                else:
                    factor = self._certain_factor(known, weight)
                spread = 0.0 if factor == 1.0 else self._rounding(weight, known.upper)
        return NormCertificate(
            lower=max(0.0, factor * (known.lower - spread) * (1 - NUMBERS)),
            upper=factor * (known.upper + spread) * (1 + NUMBERS),
            bound=self.bound,
            certificate=known.certificate,
        )

    # --- the factor ------------------------------------------------------------------------------

    def _scaling(self, norm: Tensor) -> Tensor:
        """The factor for a norm, 0-dim; finite also where the norm is 0."""
        factor = self.bound / norm.clamp_min(torch.finfo(norm.dtype).tiny)
        return factor.clamp_max(1.0) if self.scale == "above" else factor

    def _followed(self, weight: Tensor) -> Tensor:
        """The factor after one step of the vector that follows the largest singular one."""
        with torch.no_grad():
            op = self._tall(weight)
            # Steps of a weight that is not finite are not taken; the norm itself says so, by NaN.
            finite = op.weight.isfinite().all()
            op = op.with_weight(torch.where(finite, op.weight, 0.0), check=False)
            _, vectors = warm_lanczos(
                lambda x: op.apply(x.reshape(-1, *op.input_shape)).flatten(1),
                lambda y: op.apply_adjoint(y.reshape(-1, *op.output_shape)).flatten(1),
                self.vectors,
                min(STEPS, len(self.vectors[0]) - 1),
            )
            self.vectors.copy_(torch.where(finite & vectors[0].any(), vectors, self.vectors))
        return self._scaling(self._norm_along(weight, self.vectors[0]))

    def _norm_along(self, weight: Tensor, vector: Tensor) -> Tensor:
        """<u, M v> for a unit v and u = M v / ||M v||, both held: ||M v||, with gradient."""
        op = self._tall(weight)
        v = vector.detach().clone().reshape(1, *op.input_shape)
        image = op.apply(v)
        u = image.detach()
        u = u / torch.linalg.vector_norm(u).clamp_min(torch.finfo(u.dtype).tiny)
        return (u * image).sum()

    @not_compiled
    def _certain(self, weight: Tensor) -> Tensor:
        """The factor by the upper end of the norm, kept until the weight changes; with gradient."""
        detached = weight.detach()
        if not self._known.is_of(detached):
            self._known = self._exactly(detached)
        known = self._known
        factor = weight.new_tensor(
            self._certain_factor(known, detached), dtype=working_dtype(weight.dtype)
        )
        if torch.is_grad_enabled() and weight.requires_grad and float(factor) != 1.0:
            norm = self._norm_along(weight, known.vector.to(factor.dtype))
            factor = factor * (norm.detach() / norm)
        return factor

    def _certain_factor(self, known: _Exact, weight: Tensor) -> float:
        """The factor for which the norm is at most the bound, rounding of the weight included."""
        if known.upper <= self.bound and (self.scale == "above" or known.upper == 0.0):
            return 1.0
        norm = known.upper + self._rounding(weight, known.upper)
        return self.bound / (norm * (1 + 4 * NUMBERS))

    def _rounding(self, weight: Tensor, norm: float) -> float:
        """A bound on the norm of what rounding adds to the weight before it is scaled."""
        return weight_rounding(self._operator(weight), weight.dtype, self.bound / norm)

    # --- the norm, exactly -----------------------------------------------------------------------

    def _exactly(self, weight: Tensor) -> _Exact:
        """The norm of a weight; a ValueError if nothing bounds it."""
        with torch.inference_mode(False), torch.no_grad():
            kept = weight.detach().clone()
            op = self._operator(kept)
            try:
                found = svds(op, 1, "LM", tol=NORM_TOLERANCE)
                upper, certificate = float(found.upper[0]), found.certificate
                if not found.converged:
                    upper, certificate = min(upper, norm_bound(op)), f"{certificate}; norm_bound"
            except ValueError as error:
                raise ValueError(
                    f"expected a layer whose norm can be bounded, got {op!r}: {error}"
                ) from error
            vectors = found.u if is_wide(op) else found.v
        assert vectors is not None
        lower = float(found.lower[0])
        return _Exact(kept, lower, upper, vectors.flatten().detach(), certificate)

    # --- the layer -------------------------------------------------------------------------------

    def _operator(self, weight: Tensor) -> ConvOperator:
        return derived_operator(weight, self._geometry, self._groups, self._transposed)

    def _tall(self, weight: Tensor) -> ConvOperator:
        """M or M', whichever has at least as many rows as columns, in the type of the vectors."""
        op = self._operator(weight.to(working_dtype(weight.dtype)))
        return op.T if is_wide(op) else op

    def _given(self) -> Tensor:
        """The weight that this parametrization is given now."""
        layer = self._owner[0]
        if _held(layer) is not self:
            raise ValueError(
                "expected a parametrization that stands in its layer, got one that was removed; "
                "ask cs.svds for the norm of the layer"
            )
        chain = cast("nn.ModuleList", layer.parametrizations["weight"])  # type: ignore[index]
        given = list(chain.parameters(recurse=False))  # several after torch's weight_norm
        for one in chain:
            if one is self:
                break
            given = [one(*given)]
        (weight,) = given
        return weight.detach()


def spectral_norm(
    conv: nn.Module,
    input_size: int | Sequence[int] = (),
    bound: float = 1.0,
    scale: str = "always",
) -> nn.Module:
    """Hold the norm of a layer, as it is applied, at a bound: a drop-in for torch's function.

    The layer's weight becomes ``weight * bound / ||M||``, with M the matrix of the convolution on
    inputs of `input_size`, padding, stride, dilation and groups included. torch's divides by the
    norm of the reshaped weight, which is another number: ||M|| can be larger by up to the square
    root of the number of taps, or smaller.

    Parameters
    ----------
    conv : nn.Module
        An ``nn.ConvNd``, ``nn.ConvTransposeNd`` or ``nn.Linear``; changed in place.
    input_size : int or sequence of int
        Spatial size of the layer's inputs; nothing for ``nn.Linear``.
    bound : float
        Above 0.
    scale : {"always", "above"}
        Whether the norm is made equal to the bound at all times, or only where it would be larger.

    Returns
    -------
    nn.Module
        The same layer. ``layer.parametrizations.weight[0]`` is the `SpectralNorm`, with
        ``.certificate()``; ``torch.nn.utils.parametrize.remove_parametrizations(layer, "weight")``
        leaves a plain layer, with the scaled weight (call ``layer.eval()`` first).

    Raises
    ------
    ValueError
        For a bound that is not positive, a layer that is no convolution or whose norm cannot be
        bounded, one whose norm is held already, and a norm of 0 with ``scale="always"``. In use:
        for inputs of another size, whose matrix is another one.

    Notes
    -----
    Cost: one `svds` here; in training 11 products with M and 8 with its transpose on one array a
    forward pass, and a weight gradient for one array; in evaluation one `svds` whenever the weight
    has changed. Memory: three arrays of the smaller side of M, in the ``state_dict``.

    In training the norm is that of a vector that follows the largest singular vector by eight steps
    of Lanczos at every forward pass: a lower bound that lags behind the weights, so that ||M|| may
    be above the bound by up to 0.1% where a step moves M by 2%, more where it moves it farther.
    In evaluation mode it is the upper end of an enclosure, and the bound holds, rounding included;
    ||M|| is below it by the width of the enclosure, 0.1 to 1%. The gradient holds the singular
    vectors fixed. Everything is computed outside of autocast, in float32 or float64, and may be
    compiled: in training without a break of the graph. Source: Miyato, Kataoka, Koyama and Yoshida,
    "Spectral Normalization for Generative Adversarial Networks", ICLR 2018, arXiv:1802.05957, for
    the reshaped weight.

    Examples
    --------
    >>> import torch, convspectra as cs
    >>> _ = torch.manual_seed(0)
    >>> layer = cs.parametrizations.spectral_norm(torch.nn.Conv2d(3, 8, 3, padding=1), (16, 16))
    >>> round(cs.sigma_max(cs.ConvOperator.from_module(layer, (16, 16))), 3)
    1.0
    """
    check_positive_number("bound", bound)
    check_choice("scale", scale, SCALES)
    if _held(conv) is not None:
        raise ValueError(
            f"expected a layer whose norm is not held yet, got {conv!r}; remove that first, with "
            'torch.nn.utils.parametrize.remove_parametrizations(layer, "weight")'
        )
    norm = SpectralNorm(conv, input_size, bound, scale).train(conv.training)
    parametrize.register_parametrization(conv, "weight", norm)
    conv.register_forward_pre_hook(_check_size, with_kwargs=True)
    return conv


def _held(layer: nn.Module) -> SpectralNorm | None:
    """The parametrization of a layer whose norm is held."""
    if not parametrize.is_parametrized(layer, "weight"):
        return None
    chain = layer.parametrizations["weight"]  # type: ignore[index]
    return next((one for one in chain if isinstance(one, SpectralNorm)), None)


def _check_size(layer: nn.Module, args: tuple[Any, ...], kwargs: Mapping[str, Any]) -> None:
    """Refuse an input of another size before a forward pass; leave a layer that is plain again."""
    held = _held(layer)
    if held is None:
        for key, hook in list(layer._forward_pre_hooks.items()):
            if hook is _check_size:
                del layer._forward_pre_hooks[key]
                layer._forward_pre_hooks_with_kwargs.pop(key, None)
        return
    x = args[0] if args else kwargs.get("input")
    ndim = len(held.input_size)
    if isinstance(x, Tensor) and ndim and tuple(x.shape[-ndim:]) != held.input_size:
        raise ValueError(
            f"expected inputs of size {held.input_size}, for which spectral_norm holds the norm of "
            f"this layer, got an input of shape {tuple(x.shape)}; parametrize it for that size"
        )
