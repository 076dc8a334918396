"""Images and labels in the IDX files of MNIST."""

from __future__ import annotations

import gzip
import struct
from pathlib import Path

import numpy as np


def write_idx(path: Path, array: np.ndarray, compress: bool = False) -> None:
    """One file of bytes: the sizes of the array, then its entries."""
    header = bytes([0, 0, 8, array.ndim]) + struct.pack(f">{array.ndim}I", *array.shape)
    data = header + array.astype(np.uint8).tobytes()
    path.write_bytes(gzip.compress(data) if compress else data)


def write_random_set(folder: Path, counts: tuple[int, int] = (40, 20), side: int = 8) -> None:
    """So many training and test images at random, of four classes in turn."""
    rng = np.random.default_rng(0)
    for prefix, count in zip(("train", "t10k"), counts, strict=True):
        write_idx(folder / f"{prefix}-images-idx3-ubyte", rng.integers(0, 256, (count, side, side)))
        write_idx(folder / f"{prefix}-labels-idx1-ubyte", np.arange(count) % 4)
