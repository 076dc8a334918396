"""Images for benchmarks and experiments: Fashion-MNIST, CIFAR-10, or any folder of images a class.

All are averaged to at most 16 x 16 pixels unless more are asked for: a run takes seconds, and a
network is as deep as before.
"""

from __future__ import annotations

from pathlib import Path

import numpy as np
import torch
from torch import Tensor
from torch.nn.functional import avg_pool2d

from convspectra.paper.images import SUFFIXES, ImageSet, load_mnist_format

LARGEST_SIDE = 16
"""Pixels a side after pooling. A choice: twice as many are four times the work of a step."""
WHAT_TO_GIVE = (
    "--data takes Fashion-MNIST in IDX files (Debian: apt install dataset-fashion-mnist, then "
    "--data /usr/share/datasets/fashion-mnist), CIFAR-10's binary version (data_batch_1.bin, ..., "
    "test_batch.bin), or a folder of images a class (train/airplane/0001.jpg, test/...)"
)
"""The advice of every error about a folder."""

_CIFAR_SIDE = 32
"""Pixels a side of CIFAR-10."""
_CIFAR_RECORD = 1 + 3 * _CIFAR_SIDE**2
"""Bytes of an image with its label in CIFAR-10's binary version."""
_CIFAR_CLASSES = 10
"""Classes of CIFAR-10: a larger label is another file's."""


def load(
    folder: Path,
    train_images: int | None = None,
    test_images: int | None = None,
    *,
    largest_side: int = LARGEST_SIDE,
) -> ImageSet:
    """The images of a folder in any of the three forms, standardized per channel.

    Parameters
    ----------
    folder : Path
    train_images, test_images : int, optional
        Take about this many, evenly over the classes and the first ones of each; all by default.
        Of a folder of images only these are decoded.
    largest_side : int
        Pixels a side; larger images are averaged.

    Raises
    ------
    ValueError
        If the folder holds none of the three, or a file in it is missing or broken.
    ImportError
        For a folder of images without Pillow.
    """
    if not folder.is_dir():
        raise ValueError(f"expected a folder of images, got {folder}; {WHAT_TO_GIVE}")
    if any(folder.glob("*-images-idx3-ubyte*")):
        found = load_mnist_format(folder)
        train = found.train_images, found.train_labels
        test = found.test_images, found.test_labels
    elif any(folder.glob("*_batch*.bin")):
        train = _read_cifar(_cifar_training_files(folder), largest_side)
        test = _read_cifar([folder / "test_batch.bin"], largest_side)
    elif (folder / "data_batch_1").exists() or (folder / "batches.meta").exists():
        raise ValueError(
            f"{folder} is the python version of CIFAR-10, which is pickled: take the binary version"
        )
    elif (folder / "train").is_dir():
        classes = _classes(folder / "train")
        if (folder / "test").is_dir() and _classes(folder / "test") != classes:
            raise ValueError(
                f"expected the classes of {folder / 'train'} in {folder / 'test'}, {classes}, got "
                f"{_classes(folder / 'test')}"
            )
        train = _read_folders(folder / "train", classes, train_images, largest_side)
        test = _read_folders(folder / "test", classes, test_images, largest_side)
    else:
        raise ValueError(f"expected images in {folder}, found none; {WHAT_TO_GIVE}")
    train_kept, train_labels = _even_subset(*train, train_images)
    test_kept, test_labels = _even_subset(*test, test_images)
    return _standardized(
        folder.name,
        _pooled(train_kept, largest_side),
        train_labels,
        _pooled(test_kept, largest_side),
        test_labels,
    )


def _standardized(
    name: str, train: Tensor, train_labels: Tensor, test: Tensor, test_labels: Tensor
) -> ImageSet:
    if train.shape[1:] != test.shape[1:]:
        raise ValueError(
            f"expected test images of the size of the training images, {tuple(train.shape[1:])}, "
            f"got {tuple(test.shape[1:])}"
        )
    mean = train.mean((0, 2, 3), keepdim=True)
    deviation = train.std((0, 2, 3), keepdim=True).clamp_min(1e-6)
    height, width = train.shape[-2:]
    return ImageSet(
        f"{name}, {height} x {width}",
        (train - mean) / deviation,
        train_labels,
        (test - mean) / deviation,
        test_labels,
    )


def _quotas(classes: int, limit: int | None) -> list[int | None]:
    """How many images of each class make `limit` in all."""
    if limit is None:
        return [None] * classes
    if limit < classes:
        raise ValueError(f"expected a limit of at least one image a class, {classes}, got {limit}")
    return [limit // classes + (i < limit % classes) for i in range(classes)]


def _even_subset(images: Tensor, labels: Tensor, limit: int | None) -> tuple[Tensor, Tensor]:
    """The first images of every class, in the order in which they came."""
    classes = int(labels.max()) + 1
    kept = [
        torch.nonzero(labels == label).flatten()[:quota]
        for label, quota in enumerate(_quotas(classes, limit))
    ]
    order = torch.cat(kept).sort().values
    return images[order], labels[order]


def _pooled(images: Tensor, largest_side: int) -> Tensor:
    while max(images.shape[-2:]) > largest_side:
        if images.shape[-2] % 2 or images.shape[-1] % 2:
            raise ValueError(
                f"expected images of at most {largest_side} pixels a side, or of sides that can be "
                f"halved to that, got {tuple(images.shape[-2:])}"
            )
        images = avg_pool2d(images, 2)
    return images


def _cifar_training_files(folder: Path) -> list[Path]:
    files = sorted(folder.glob("data_batch_*.bin"))
    if not files:
        raise ValueError(f"expected data_batch_1.bin and so on in {folder}, got none")
    return files


def _read_cifar(files: list[Path], largest_side: int) -> tuple[Tensor, Tensor]:
    records = []
    for path in files:
        if not path.is_file():
            raise ValueError(f"expected {path.name} in {path.parent}, got none")
        data = np.fromfile(path, dtype=np.uint8)
        if data.size == 0 or data.size % _CIFAR_RECORD:
            raise ValueError(
                f"expected records of {_CIFAR_RECORD} bytes in {path}, got {data.size} bytes; the "
                "file is cut short, or is not CIFAR-10"
            )
        records.append(data.reshape(-1, _CIFAR_RECORD))
        if records[-1][:, 0].max() >= _CIFAR_CLASSES:
            raise ValueError(
                f"expected labels below {_CIFAR_CLASSES} in {path}, got "
                f"{records[-1][:, 0].max()}; it is not CIFAR-10"
            )
    together = torch.from_numpy(np.concatenate(records))
    # Pooled at once: whole, 50,000 images take 600 MB in float32.
    images = [
        _pooled(part.reshape(-1, 3, _CIFAR_SIDE, _CIFAR_SIDE).float(), largest_side)
        for part in together[:, 1:].split(5000)
    ]
    return torch.cat(images), together[:, 0].long()


def _classes(folder: Path) -> list[str]:
    return sorted(path.name for path in folder.iterdir() if path.is_dir())


def _read_folders(
    folder: Path, classes: list[str], limit: int | None, largest_side: int
) -> tuple[Tensor, Tensor]:
    """Images of the folders of the classes, interleaved: one of each class after the other."""
    if not folder.is_dir() or not classes:
        raise ValueError(f"expected a folder for each class in {folder}, got none")
    chosen = []
    for label, (name, quota) in enumerate(zip(classes, _quotas(len(classes), limit), strict=True)):
        files = sorted(p for p in (folder / name).iterdir() if p.suffix.lower() in SUFFIXES)
        if not files:
            raise ValueError(f"expected images ({', '.join(SUFFIXES)}) in {folder / name}, none")
        chosen += [(position, label, path) for position, path in enumerate(files[:quota])]
    chosen.sort()
    images = [_read_image(path, largest_side) for _, _, path in chosen]
    shapes = {tuple(image.shape) for image in images}
    if len(shapes) > 1:
        raise ValueError(f"expected images of one size in {folder}, got {sorted(shapes)}")
    return torch.stack(images), torch.tensor([label for _, label, _ in chosen])


def _read_image(path: Path, largest_side: int) -> Tensor:
    try:
        from PIL import Image
    except ImportError as error:
        raise ImportError("folders of images are read with Pillow: pip install pillow") from error
    try:
        with Image.open(path) as image:
            pixels = np.asarray(image.convert("RGB"), dtype=np.float32)
    except OSError as error:
        raise ValueError(f"cannot read the image {path}: {error}") from error
    return _pooled(torch.from_numpy(pixels.transpose(2, 0, 1).copy())[None], largest_side)[0]
