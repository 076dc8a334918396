"""Real images for the experiments: scikit-learn's digits, or a folder in the format of MNIST."""

from __future__ import annotations

import gzip
import struct
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

POOLED_SIZE = 14
"""Side of the images that the networks see. A choice: half of MNIST's 28."""


@dataclass(frozen=True, eq=False)
class ImageSet:
    """Images (count, 1, height, width), float32 of mean 0 and deviation 1, and their labels."""

    name: str
    train_images: Tensor
    train_labels: Tensor
    test_images: Tensor
    test_labels: Tensor


def load_digits(test_images: int = 397, seed: int = 0) -> ImageSet:
    """The 1,797 handwritten digits of 8 x 8 pixels that scikit-learn ships, split at random.

    Raises
    ------
    ImportError
        Without scikit-learn: install ``convspectra[demo]``.
    """
    try:
        from sklearn.datasets import load_digits as load_sklearn_digits
    except ImportError as error:
        raise ImportError(
            "the default images come with scikit-learn: pip install 'convspectra[demo]', or give "
            "a folder in the format of MNIST with --data"
        ) from error
    pixels, labels = load_sklearn_digits(return_X_y=True)
    images = torch.tensor(pixels, dtype=torch.float32).reshape(-1, 1, 8, 8)
    targets = torch.tensor(labels, dtype=torch.int64)
    order = torch.randperm(len(images), generator=torch.Generator().manual_seed(seed))
    held, kept = order[:test_images], order[test_images:]
    return _standardized(
        "scikit-learn digits, 8 x 8", images[kept], targets[kept], images[held], targets[held]
    )


def load_mnist_format(folder: Path) -> ImageSet:
    """A set of four IDX files, gzipped or not, as MNIST and Fashion-MNIST come.

    Images of 28 x 28 pixels are averaged over 2 x 2 blocks to 14 x 14.

    Raises
    ------
    ValueError
        If a file is missing or is not an IDX file of the right kind.
    """
    parts = []
    for prefix in ("train", "t10k"):
        images = _read_idx(_find(folder, f"{prefix}-images-idx3-ubyte"), axes=3)
        labels = _read_idx(_find(folder, f"{prefix}-labels-idx1-ubyte"), axes=1)
        if len(images) != len(labels):
            raise ValueError(
                f"expected as many {prefix} labels as images in {folder}, got {len(labels)} "
                f"labels for {len(images)} images"
            )
        pixels = torch.tensor(images, dtype=torch.float32)[:, None]
        if pixels.shape[-1] == 2 * POOLED_SIZE:
            pixels = torch.nn.functional.avg_pool2d(pixels, 2)
        parts += [pixels, torch.tensor(labels, dtype=torch.int64)]
    height, width = parts[0].shape[-2:]
    return _standardized(f"{folder.name}, {height} x {width}", *parts)


def _standardized(
    name: str, train: Tensor, train_labels: Tensor, test: Tensor, test_labels: Tensor
) -> ImageSet:
    mean, deviation = train.mean(), train.std()
    train, test = (train - mean) / deviation, (test - mean) / deviation
    return ImageSet(name, train, train_labels, test, test_labels)


def _find(folder: Path, name: str) -> Path:
    for candidate in (folder / name, folder / f"{name}.gz"):
        if candidate.is_file():
            return candidate
    raise ValueError(
        f"expected {name} or {name}.gz in {folder}, got neither; a set in the format of MNIST has "
        "train- and t10k- files of images-idx3-ubyte and labels-idx1-ubyte"
    )


def _read_idx(path: Path, axes: int) -> npt.NDArray[np.uint8]:
    data = path.read_bytes()
    if path.suffix == ".gz":
        data = gzip.decompress(data)
    expected = (0, 0, 8, axes)
    header = 4 + 4 * axes
    if tuple(data[:4]) != expected or len(data) < header:
        raise ValueError(
            f"expected {path} to begin with the bytes {expected}, an IDX file of unsigned bytes "
            f"with {axes} axes, got {tuple(data[:4])}"
        )
    shape = struct.unpack(f">{axes}I", data[4:header])
    values = np.frombuffer(data, dtype=np.uint8, offset=header)
    if values.size != np.prod(shape):
        raise ValueError(
            f"expected {np.prod(shape)} values in {path} for its shape {shape}, got {values.size}; "
            "the file is cut short"
        )
    return values.reshape(shape)
