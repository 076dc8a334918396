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

SUFFIXES = (".jpg", ".jpeg", ".png")
"""Endings of the image files that are read."""
MODES = {1: "L", 3: "RGB"}
"""Names that Pillow has for images by their channels."""


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
    images = torch.tensor(pixels, dtype=torch.float32, device="cpu").reshape(-1, 1, 8, 8)
    targets = torch.tensor(labels, dtype=torch.int64, device="cpu")
    order = torch.randperm(len(images), generator=torch.Generator().manual_seed(seed), device="cpu")
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
        pixels = torch.tensor(images, dtype=torch.float32, device="cpu")[:, None]
        if pixels.shape[-1] == 2 * POOLED_SIZE:
            pixels = torch.nn.functional.avg_pool2d(pixels, 2)
        parts += [pixels, torch.tensor(labels, dtype=torch.int64, device="cpu")]
    height, width = parts[0].shape[-2:]
    return _standardized(f"{folder.name}, {height} x {width}", *parts)


def load_some(source: str | Path, count: int, shape: tuple[int, ...] | None = None) -> Tensor:
    """A few images as a network sees them: (count, channels, height, width), float32.

    Parameters
    ----------
    source : str or path
        "digits" for those of scikit-learn, or a folder with .png and .jpg files in it or in folders
        of it; they are taken evenly from the sorted list.
    count : int
        At most so many.
    shape : (channels, height, width), optional
        What they are made to, with 1 or 3 channels; as they are in their files by default.

    Returns
    -------
    Tensor
        Of mean 0 and deviation 1, digits together and files channel by channel.

    Raises
    ------
    ValueError
        For a folder without images, images of several sizes without a shape, an image that cannot
        be read, or a shape that images cannot have.
    ImportError
        Without scikit-learn for the digits, Pillow for files: install ``convspectra[demo]``.
    """
    if str(source) == "digits":
        digits = load_digits().train_images[:count]
        if shape is not None and shape != tuple(digits.shape[1:]):
            raise ValueError(f"expected 1x8x8 for digits, got {'x'.join(map(str, shape))}")
        return digits
    if shape is not None and (len(shape) != 3 or shape[0] not in MODES):
        raise ValueError(
            f"expected images of 1 or 3 channels, as in 3x224x224, got {'x'.join(map(str, shape))}"
        )
    folder = Path(source)
    files = sorted(path for path in folder.rglob("*") if path.suffix.lower() in SUFFIXES)
    if len(files) < 2:
        raise ValueError(
            f"expected at least two images ({', '.join(SUFFIXES)}) in the folder {folder}, or "
            f"digits, got {len(files)}"
        )
    number = min(count, len(files))
    chosen = [files[i * len(files) // number] for i in range(number)]
    images = [_read_file(path, shape) for path in chosen]
    sizes = sorted({tuple(image.shape) for image in images})
    if len(sizes) > 1:
        raise ValueError(
            f"expected images of one size in {folder}, got {sizes[0]} and {sizes[-1]}; say which, "
            "as in --input 3x224x224"
        )
    pixels = torch.stack(images)
    deviation, mean = torch.std_mean(pixels, (0, 2, 3), keepdim=True)
    return (pixels - mean) / deviation.clamp_min(1e-6)


def _read_file(path: Path, shape: tuple[int, ...] | None) -> Tensor:
    try:
        from PIL import Image
    except ImportError as error:
        raise ImportError(
            "folders of images are read with Pillow: pip install 'convspectra[demo]'"
        ) from error
    try:
        with Image.open(path) as image:
            gray = image.mode in ("1", "L", "I;16") if shape is None else shape[0] == 1
            pixels = image.convert(MODES[1 if gray else 3])
            if shape is not None:
                pixels = pixels.resize((shape[2], shape[1]), Image.Resampling.BILINEAR)
            values = np.array(pixels, dtype=np.float32)
    except OSError as error:
        raise ValueError(f"cannot read the image {path}: {error}") from error
    return torch.from_numpy(values.reshape(*values.shape[:2], -1).transpose(2, 0, 1).copy())


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
