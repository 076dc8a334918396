"""Convolutions with a forward pass of their own: padding by hand, weights that it computes."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

import convspectra as cs


class Standardized(nn.Conv2d):
    """As timm's StdConv2d."""

    def forward(self, x: Tensor) -> Tensor:
        flat = self.weight.reshape(1, self.out_channels, -1)
        weight = F.batch_norm(flat, None, None, training=True, momentum=0.0, eps=1e-6)
        weight = weight.reshape_as(self.weight)
        return F.conv2d(x, weight, self.bias, self.stride, self.padding, self.dilation, self.groups)


class Same(nn.Conv2d):
    """As timm's Conv2dSame: as much padding as the input size needs."""

    def forward(self, x: Tensor) -> Tensor:
        total = [
            max((-(-n // s) - 1) * s + (k - 1) * d + 1 - n, 0)
            for n, k, s, d in zip(
                x.shape[2:], self.kernel_size, self.stride, self.dilation, strict=True
            )
        ]
        h, w = total
        x = F.pad(x, [w // 2, w - w // 2, h // 2, h - h // 2])
        return F.conv2d(
            x, self.weight, self.bias, self.stride, 0, dilation=self.dilation, groups=self.groups
        )


class Reflected(nn.Conv1d):
    """Pads by a module, and by itself."""

    def __init__(self, *args, **options) -> None:
        super().__init__(*args, **options)
        self.pad = nn.ReflectionPad1d((2, 0))

    def forward(self, x: Tensor) -> Tensor:
        return super().forward(self.pad(x))


class Doubled(nn.ConvTranspose2d):
    """A computed weight of a transposed layer."""

    def forward(self, x: Tensor) -> Tensor:
        return F.conv_transpose2d(
            x, 2 * self.weight, self.bias, self.stride, self.padding, self.output_padding
        )


class Tied(nn.Linear):
    def forward(self, x: Tensor) -> Tensor:
        return F.linear(x, self.weight + self.weight.mT, self.bias)


LAYERS = [
    (Standardized(3, 4, 3, stride=2, padding=1), (7, 6)),
    (Standardized(4, 4, 3, dilation=2, groups=2), (7, 6)),
    (Same(3, 4, 3, stride=2), (7, 6)),
    (Same(3, 4, (5, 2), stride=(3, 1), dilation=(1, 2)), (8, 8)),
    (Reflected(2, 3, 3), (6,)),
    (Doubled(2, 3, 3, stride=2, padding=1, output_padding=1), (4, 3)),
    (Tied(4, 4), ()),
    (nn.utils.parametrizations.weight_norm(Same(3, 4, 3)), (5, 5)),
]


@pytest.mark.parametrize(("layer", "size"), LAYERS, ids=lambda value: str(value)[:30])
def test_the_operator_is_what_the_forward_pass_applies(layer, size):
    op = cs.ConvOperator.from_module(layer, size)
    x = torch.randn(2, *op.input_shape)
    torch.testing.assert_close(op.matvec(x), layer(x) - layer(torch.zeros_like(x)))


def test_padding_that_depends_on_the_size():
    layer = Same(3, 4, 3, stride=2)
    padding = [cs.ConvOperator.from_module(layer, n).geometry.padding for n in (7, 8)]
    assert padding == [((1, 1), (1, 1)), ((0, 1), (0, 1))]


def test_gradients_reach_the_parameters():
    layer = Standardized(2, 3, 3, padding=1, dtype=torch.float64)
    value = cs.penalties.frobenius(cs.ConvOperator.from_module(layer, (4, 4)))
    (found,) = torch.autograd.grad(value, layer.weight)

    def naive(weight: Tensor) -> Tensor:
        flat = weight.reshape(1, 3, -1)
        mean, variance = flat.mean(2, keepdim=True), flat.var(2, correction=0, keepdim=True)
        flat = (flat - mean) / (variance + 1e-6).sqrt()
        return cs.penalties.frobenius(cs.ConvOperator(flat.reshape_as(weight), (4, 4), padding=1))

    weight = layer.weight.detach().requires_grad_()
    (expected,) = torch.autograd.grad(naive(weight), weight)
    torch.testing.assert_close(found, expected)


def test_the_weight_of_a_hook_is_that_of_now():
    with pytest.warns(FutureWarning):
        layer = nn.utils.weight_norm(Same(2, 2, 3))
    layer(torch.randn(1, 2, 5, 5))
    before = cs.ConvOperator.from_module(layer, (5, 5)).to_dense()
    with torch.no_grad():
        layer.weight_g.mul_(10)
    after = cs.ConvOperator.from_module(layer, (5, 5)).to_dense()
    torch.testing.assert_close(after, 10 * before)


def of(forward) -> nn.Module:
    class Own(nn.Conv2d):
        pass

    Own.forward = forward
    return Own(2, 2, 3)


@pytest.mark.parametrize(
    ("forward", "reason"),
    [
        (lambda self, x: nn.Conv2d.forward(self, x * 0.5), "changes its input before"),
        (lambda self, x: nn.Conv2d.forward(self, x.relu()), "is not that of the convolution"),
        (lambda self, x: nn.Conv2d.forward(self, x).relu(), "is not that of the convolution"),
        (lambda self, x: nn.Conv2d.forward(self, x)[:, :1], "is not that of the convolution"),
        (lambda self, x, style: nn.Conv2d.forward(self, x), "missing 1 required positional"),
        (lambda self, x: x, "calls no convolution"),
    ],
)
def test_what_cannot_be_followed_is_refused_by_name(forward, reason):
    with pytest.raises(ValueError, match=rf"got Own, whose own pass .*{reason}.* exclude the"):
        cs.ConvOperator.from_module(of(forward), (6, 6))
