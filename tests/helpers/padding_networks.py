"""Small networks in which padding stands everywhere, each from a function without arguments."""

from __future__ import annotations

from collections.abc import Callable

import torch
import torch.nn.functional as F
from torch import Tensor, nn


class Network(nn.Module):
    """Layers, and a forward pass given as a function of them and the input."""

    def __init__(self, forward: Callable[..., Tensor], **layers: nn.Module) -> None:
        super().__init__()
        for name, layer in layers.items():
            self.add_module(name, layer)
        self.function = forward

    def forward(self, x: Tensor) -> Tensor:
        return self.function(self, x)


def as_tensorflow() -> nn.Module:
    """As timm's Conv2dSame pads: the odd pixel after."""

    def same(x: Tensor, layer: nn.Conv2d) -> Tensor:
        total = [
            max(((n + s - 1) // s - 1) * s + k - n, 0)
            for n, k, s in zip(x.shape[2:], layer.kernel_size, layer.stride, strict=True)
        ]
        h, w = total
        return layer(F.pad(x, [w // 2, w - w // 2, h // 2, h - h // 2]))

    def forward(net: nn.Module, x: Tensor) -> Tensor:
        return same(F.silu(same(x, net.a)), net.b)

    return Network(forward, a=nn.Conv2d(3, 4, 3, 2), b=nn.Conv2d(4, 4, 5, 2, groups=4))


def causal() -> nn.Module:
    """Gated dilated layers with a skip, as WaveNet."""

    def forward(net: nn.Module, x: Tensor) -> Tensor:
        for layer, back in zip(net.gates, net.back, strict=True):
            a, b = layer(F.pad(x, (layer.dilation[0], 0))).chunk(2, 1)
            x = x + back(torch.tanh(a) * torch.sigmoid(b))
        return x

    gates = nn.ModuleList(nn.Conv1d(2, 4, 2, dilation=d) for d in (1, 2, 4))
    return Network(forward, gates=gates, back=nn.ModuleList(nn.Conv1d(2, 2, 1) for _ in gates))


def around() -> nn.Module:
    """Circular padding spelt as slices and concatenations."""

    def forward(net: nn.Module, x: Tensor) -> Tensor:
        for layer, p in ((net.a, 1), (net.b, 2)):
            x = torch.cat([x[:, :, -p:], x, x[:, :, :p]], 2)
            x = torch.relu(layer(torch.cat([x[..., -p:], x, x[..., :p]], 3)))
        return x

    return Network(forward, a=nn.Conv2d(2, 3, 3), b=nn.Conv2d(3, 2, 5))


def unet() -> nn.Module:
    """A skip over half the size, and pads that depend on sizes."""

    def forward(net: nn.Module, x: Tensor) -> Tensor:
        a = torch.relu(net.a(x))
        y = net.up(F.gelu(net.middle(net.down(a))))
        y = F.pad(y, (0, a.shape[3] - y.shape[3], 0, a.shape[2] - y.shape[2]))
        return net.last(F.pad(torch.cat([a, y], 1), (1, 0, 0, 1)))

    return Network(
        forward,
        a=nn.Conv2d(1, 3, 3, padding=1, padding_mode="reflect"),
        down=nn.Conv2d(3, 4, 2, 2),
        middle=nn.Conv2d(4, 4, 3, padding=2, dilation=2),
        up=nn.ConvTranspose2d(4, 3, 3, 2, padding=1, output_padding=1),
        last=nn.Conv2d(6, 2, 3, padding=1),
    )


def cropped() -> nn.Module:
    """Layers without padding, and a skip that is cropped, as the first U-Net."""

    def forward(net: nn.Module, x: Tensor) -> Tensor:
        a = torch.relu(net.a(x))
        return net.c(torch.cat([a[:, :, 1:-1, 1:-1], torch.relu(net.b(a))], 1))

    return Network(forward, a=nn.Conv2d(1, 2, 3), b=nn.Conv2d(2, 2, 3), c=nn.Conv2d(4, 2, 3))


def decoder() -> nn.Module:
    """Reflected before, and cropped behind the transposed layer, as audio codecs."""

    def forward(net: nn.Module, x: Tensor) -> Tensor:
        x = net.up(F.elu(net.before(F.pad(x, (2, 0), mode="reflect"))))[..., :-2]
        return net.last(F.pad(F.elu(x), (2, 0), mode="reflect"))

    return Network(
        forward,
        before=nn.Conv1d(3, 4, 3),
        up=nn.ConvTranspose1d(4, 2, 4, 2),
        last=nn.Conv1d(2, 1, 3),
    )


def panorama() -> nn.Module:
    """Around along the width, zeros along the height: no layer's own padding does this."""

    def forward(net: nn.Module, x: Tensor) -> Tensor:
        x = F.pad(F.pad(x, (1, 1, 0, 0), mode="circular"), (0, 0, 1, 1))
        return net.b(F.pad(torch.relu(net.a(x)), (1, 1, 0, 0), mode="circular"))

    return Network(forward, a=nn.Conv2d(2, 3, 3), b=nn.Conv2d(3, 2, 3, padding=(1, 0)))


def separable() -> nn.Module:
    """Modules that pad, activations behind them, groups."""
    return nn.Sequential(
        nn.ReflectionPad2d(1),
        nn.Conv2d(4, 4, 3, groups=4),
        nn.ReLU6(),
        nn.Conv2d(4, 6, 1),
        nn.ReplicationPad2d((0, 1, 0, 1)),
        nn.Hardswish(),
        nn.Conv2d(6, 6, 3, 2, groups=3),
        nn.ZeroPad2d((1, 0, 2, 0)),
        nn.ReLU(),
        nn.Conv2d(6, 4, 2),
        nn.AdaptiveAvgPool2d(1),
        nn.Flatten(),
        nn.Linear(4, 5),
    )


def masked() -> nn.Module:
    """Masks and sums of what is padded: functions of each entry."""

    def forward(net: nn.Module, x: Tensor) -> Tensor:
        x = F.pad(x, (1, 1, 1, 1))
        x = net.a(torch.where(x > 0, x, torch.zeros_like(x)))
        x = F.pad(x, (1, 1, 1, 1), mode="replicate")
        x = net.b(x + x)
        return net.c(F.pad(x, (2, 0, 0, 2)) * torch.linspace(0.5, 1, x.shape[3] + 2))

    return Network(forward, a=nn.Conv2d(2, 3, 3), b=nn.Conv2d(3, 3, 3), c=nn.Conv2d(3, 2, 3))


def volume() -> nn.Module:
    """Three axes."""

    def forward(net: nn.Module, x: Tensor) -> Tensor:
        return net.b(torch.relu(net.a(F.pad(x, (1, 1, 1, 1, 2, 0)))))

    b = nn.Conv3d(2, 2, (1, 3, 3), padding=(0, 1, 1), padding_mode="replicate")
    return Network(forward, a=nn.Conv3d(1, 2, 3), b=b)


def shuffled() -> nn.Module:
    """Channels turned into space and back, with padding between."""

    def forward(net: nn.Module, x: Tensor) -> Tensor:
        x = F.pixel_shuffle(F.leaky_relu(net.a(x), 0.2), 2)
        x = net.b(F.pad(x, (1, 1, 1, 1), mode="replicate"))
        return net.c(F.pixel_unshuffle(x, 2))

    return Network(
        forward, a=nn.Conv2d(3, 8, 3, padding=1), b=nn.Conv2d(2, 4, 3), c=nn.Conv2d(16, 4, 1)
    )


def enlarged() -> nn.Module:
    """Nearest neighbors, then padding: the layer reads the larger array."""

    def forward(net: nn.Module, x: Tensor) -> Tensor:
        x = F.interpolate(net.a(x), scale_factor=2, mode="nearest")
        return torch.tanh(net.b(F.pad(x, (1, 1, 1, 1), mode="reflect")))

    return Network(forward, a=nn.Conv2d(3, 4, 3, padding=1), b=nn.Conv2d(4, 3, 3))


def pooled() -> nn.Module:
    """A padded array read by a layer, and by a pooling that pads it again, as in Inception."""

    def forward(net: nn.Module, x: Tensor) -> Tensor:
        x = F.pad(x, (0, 1, 0, 1))
        a = torch.relu(net.a(x))
        p = F.max_pool2d(F.pad(x, (1, 0, 1, 0), value=-1e9), 3, 1)[..., : a.shape[3]]
        return torch.cat([net.b(a), net.c(a), net.d(p)[:, :, : a.shape[2]]], 1)

    return Network(
        forward,
        a=nn.Conv2d(2, 3, 3),
        b=nn.Conv2d(3, 3, (1, 3), padding=(0, 1)),
        c=nn.Conv2d(3, 3, (3, 1), padding=(1, 0)),
        d=nn.Conv2d(2, 2, 1),
    )


def transposed() -> nn.Module:
    """Padding before transposed layers, which none of them can do."""

    def forward(net: nn.Module, x: Tensor) -> Tensor:
        x = torch.relu(net.a(F.pad(x, (1, 1, 1, 1), mode="reflect")))
        return net.b(F.pad(x, (1, 0, 0, 0)))

    return Network(forward, a=nn.ConvTranspose2d(2, 3, 3), b=nn.ConvTranspose2d(3, 2, 3, 2))


def written() -> nn.Module:
    """Copied into zeros; a border that is set to zero."""

    def forward(net: nn.Module, x: Tensor) -> Tensor:
        y = x.new_zeros(1, 2, x.shape[2] + 2, x.shape[3] + 2)
        y[:, :, 1:-1, 1:-1] = x
        y = F.pad(torch.relu(net.a(y)), (1, 1, 1, 1), mode="replicate")
        y[:, :, torch.tensor([0, -1])] = 0.0
        y[..., 0] = 0.0
        y[..., -1] = 0.0
        return net.b(y)

    return Network(forward, a=nn.Conv2d(2, 3, 3), b=nn.Conv2d(3, 2, 3))


def attention() -> nn.Module:
    """Patches, positions, a normalization and attention."""

    def forward(net: nn.Module, x: Tensor) -> Tensor:
        x = net.patches(x).flatten(2).transpose(1, 2)
        y = net.norm(x)
        x = x + net.attention(y, y, y)[0]
        return x + net.down(F.gelu(net.up(x)))

    return Network(
        forward,
        patches=nn.Conv2d(1, 4, 2, 2),
        norm=nn.LayerNorm(4),
        attention=nn.MultiheadAttention(4, 2, batch_first=True),
        up=nn.Linear(4, 8),
        down=nn.Linear(8, 4),
    )


def own_padding(mode: str) -> nn.Module:
    """Layers with a padding mode, of odd and of even size, one of them strided."""
    return nn.Sequential(
        nn.Conv2d(2, 3, 3, padding=(1, 2), padding_mode=mode),
        nn.ReLU(),
        nn.Conv2d(3, 3, 4, 2, padding=1, padding_mode=mode),
        nn.Conv2d(3, 2, 4, padding="same", padding_mode=mode),
    )


NETWORKS: dict[str, tuple[Callable[[], nn.Module], tuple[int, ...]]] = {
    "as TensorFlow pads": (as_tensorflow, (3, 9, 8)),
    "causal": (causal, (2, 12)),
    "around": (around, (2, 6, 5)),
    "U-Net": (unet, (1, 10, 9)),
    "cropped": (cropped, (1, 9, 8)),
    "decoder": (decoder, (3, 8)),
    "panorama": (panorama, (2, 6, 5)),
    "separable": (separable, (4, 7, 6)),
    "masked": (masked, (2, 6, 5)),
    "volume": (volume, (1, 4, 4, 3)),
    "shuffled": (shuffled, (3, 4, 4)),
    "enlarged": (enlarged, (3, 4, 4)),
    "pooled": (pooled, (2, 6, 6)),
    "transposed": (transposed, (2, 4, 4)),
    "written": (written, (2, 6, 5)),
    "attention": (attention, (1, 6, 6)),
    "circular": (lambda: own_padding("circular"), (2, 8, 7)),
    "reflect": (lambda: own_padding("reflect"), (2, 8, 7)),
    "replicate": (lambda: own_padding("replicate"), (2, 8, 7)),
    "zeros": (lambda: own_padding("zeros"), (2, 8, 7)),
}
"""Each network by name: the function that builds it, and the size of its input."""


def built(name: str) -> nn.Module:
    """The network with the same weights every time, ready to run."""
    torch.manual_seed(0)
    return NETWORKS[name][0]().eval()
