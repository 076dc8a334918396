"""Architectures of timm, transformers and diffusers with random weights, and how they are given.

The packages are imported only when a network is built.
"""

from __future__ import annotations

import functools
import importlib
import importlib.metadata
import tempfile
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from convspectra.models import NamedOperator, named_operators
from convspectra.models.files import load_operators


class ByKeyword(nn.Module):
    """A model whose input has a name, taking it by position."""

    def __init__(self, model: nn.Module, keyword: str) -> None:
        super().__init__()
        self.model, self.keyword = model, keyword

    def forward(self, x: Tensor) -> Any:
        """The first array of the answer."""
        answer = self.model(**{self.keyword: x})
        return answer if isinstance(answer, Tensor) else next(iter(answer.values()))


@dataclass(frozen=True)
class Architecture:
    """One network with random weights.

    Attributes
    ----------
    package : str
    build : callable
        Returns the module, in evaluation mode.
    input_shape : tuple of int
        Without the batch.
    door : str
        "module", "TorchScript", "torch.export", "ONNX" or "checkpoint": the form in which it is
        given to the audit.
    integers : bool
        Whether the input is one of indices.
    rest : tuple of Tensor
        More inputs, of the module only.
    """

    package: str
    build: Callable[[], nn.Module]
    input_shape: tuple[int, ...]
    door: str = "module"
    integers: bool = False
    rest: tuple[Tensor, ...] = field(default=())

    @property
    def version(self) -> str:
        """The version of the package that is installed; "" if it is not."""
        try:
            return importlib.metadata.version(self.package)
        except importlib.metadata.PackageNotFoundError:
            return ""

    def operators(self) -> list[NamedOperator]:
        """The layers, by the door."""
        torch.manual_seed(0)
        net = self.build().eval()
        x = torch.zeros(1, *self.input_shape, dtype=torch.long if self.integers else torch.float32)
        if self.door == "module":
            return named_operators(net, (x, *self.rest))
        with tempfile.TemporaryDirectory() as folder:
            path = Path(folder) / "net"
            if self.door == "TorchScript":
                torch.jit.trace(net, x, check_trace=False).save(str(path))  # type: ignore[no-untyped-call]
            elif self.door == "torch.export":
                path = path.with_suffix(".pt2")
                torch.export.save(torch.export.export(net, (x,)), path)
            elif self.door == "ONNX":
                path = path.with_suffix(".onnx")
                torch.onnx.export(net, (x,), str(path), dynamo=False)
            else:
                torch.save(net, path)
            allow = self.door == "checkpoint"
            return load_operators(path, [self.input_shape], allow_pickle=allow)[1]


def timm(name: str, shape: tuple[int, ...] = (3, 224, 224), door: str = "module") -> Architecture:
    """A network of timm."""

    def build() -> nn.Module:
        package: Any = importlib.import_module("timm")
        model: nn.Module = package.create_model(name, pretrained=False)
        return model

    return Architecture("timm", build, shape, door)


def transformers(
    model: str,
    config: str,
    shape: tuple[int, ...],
    keyword: str = "pixel_values",
    door: str = "module",
    options: Mapping[str, Any] | None = None,
) -> Architecture:
    """A network of transformers, of the default configuration unless options are given."""

    def build() -> nn.Module:
        package: Any = importlib.import_module("transformers")
        settings = getattr(package, config)(**(options or {}))
        kind = getattr(package, model, None)
        if kind is None:  # a part, which the package does not name at its door
            place, _, part = model.rpartition(".")
            kind = getattr(importlib.import_module(f"transformers.models.{place}"), part)
        return ByKeyword(kind(settings), keyword)

    return Architecture("transformers", build, shape, door, keyword == "input_ids")


def diffusers(
    model: str, shape: tuple[int, ...], options: Mapping[str, Any] | None = None, steps: int = 0
) -> Architecture:
    """A network of diffusers; one that denoises takes a number of steps, too."""

    def build() -> nn.Module:
        package: Any = importlib.import_module("diffusers")
        built: nn.Module = getattr(package, model)(**(options or {}))
        return built

    rest = (torch.tensor(steps),) if steps else ()
    return Architecture("diffusers", build, shape, rest=rest)


_image = functools.partial(transformers, shape=(3, 224, 224))

_TIMM = """
    vgg16 densenet121 resnext50_32x4d inception_v3 ghostnet_100 hrnet_w18 regnety_004 dla34
    repvgg_a0 cspdarknet53 resnetv2_50x1_bit dm_nfnet_f0 tresnet_m vit_tiny_patch16_224
    swin_tiny_patch4_window7_224 beit_base_patch16_224 mixer_b16_224 coatnet_0_224
    maxvit_tiny_tf_224 mobilevit_s levit_128 xcit_tiny_12_p16_224 convnextv2_atto fastvit_t8
    sequencer2d_s
"""
"""Networks of timm that are given as a module, at 3 x 224 x 224."""

ARCHITECTURES: dict[str, Architecture] = {
    **{name: timm(name) for name in _TIMM.split()},
    "resnet50": timm("resnet50", door="ONNX"),
    "tf_efficientnet_b0": timm("tf_efficientnet_b0", door="TorchScript"),
    "mobilenetv3_small_100": timm("mobilenetv3_small_100", door="torch.export"),
    "convnext_tiny": timm("convnext_tiny", door="torch.export"),
    "poolformer_s12": timm("poolformer_s12", door="checkpoint"),
    "MobileNetV2": _image("MobileNetV2ForImageClassification", "MobileNetV2Config", door="ONNX"),
    "DINOv2": _image("Dinov2Model", "Dinov2Config"),
    "SegFormer": transformers(
        "SegformerForSemanticSegmentation", "SegformerConfig", (3, 512, 512), door="TorchScript"
    ),
    "UPerNet": transformers("UperNetForSemanticSegmentation", "UperNetConfig", (3, 512, 512)),
    "YOLOS": transformers(
        "YolosForObjectDetection", "YolosConfig", (3, 512, 864), options={"num_hidden_layers": 4}
    ),
    "SuperPoint": transformers("SuperPointForKeypointDetection", "SuperPointConfig", (3, 480, 640)),
    "Swin2SR": transformers("Swin2SRForImageSuperResolution", "Swin2SRConfig", (3, 64, 64)),
    "wav2vec 2.0 (30 s)": transformers(
        "Wav2Vec2Model", "Wav2Vec2Config", (480_000,), "input_values"
    ),
    "Whisper's encoder (30 s)": transformers(
        "whisper.modeling_whisper.WhisperEncoder", "WhisperConfig", (80, 3000), "input_features"
    ),
    "AST (10 s)": transformers("ASTModel", "ASTConfig", (1024, 128), "input_values"),
    "EnCodec (10 s)": transformers("EncodecModel", "EncodecConfig", (1, 240_000), "input_values"),
    "BERT": transformers("BertModel", "BertConfig", (128,), "input_ids"),
    "GPT-2": transformers("GPT2Model", "GPT2Config", (128,), "input_ids"),
    "UNet2DModel": diffusers("UNet2DModel", (3, 64, 64), {"sample_size": 64}, steps=1),
    "AutoencoderTiny": diffusers("AutoencoderTiny", (3, 512, 512)),
    "AutoencoderKL": diffusers(
        "AutoencoderKL",
        (3, 256, 256),
        {
            "block_out_channels": (128, 256, 512, 512),
            "down_block_types": ("DownEncoderBlock2D",) * 4,
            "up_block_types": ("UpDecoderBlock2D",) * 4,
            "layers_per_block": 2,
        },
    ),
    "AutoencoderOobleck (10 s)": diffusers("AutoencoderOobleck", (2, 441_000)),
}
"""Architectures by the names of their packages or papers."""
