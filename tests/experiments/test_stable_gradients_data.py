"""Images of the stable-gradients experiment: the three forms, subsets, and what is broken."""

from __future__ import annotations

import re
from pathlib import Path

import numpy as np
import pytest
import torch
from helpers.idx_files import write_random_set
from PIL import Image

from common import images as data

RNG = np.random.default_rng(0)


def write_cifar(folder: Path, files: int = 2, count: int = 20) -> dict[str, np.ndarray]:
    pixels = {}
    for name in [*(f"data_batch_{i + 1}" for i in range(files)), "test_batch"]:
        records = RNG.integers(0, 256, (count, 3073)).astype(np.uint8)
        records[:, 0] = np.arange(count) % 10
        (folder / f"{name}.bin").write_bytes(records.tobytes())
        pixels[name] = records[:, 1:].reshape(count, 3, 32, 32)
    return pixels


def write_folders(folder: Path, count: int = 3, side: int = 8) -> None:
    for part in ("train", "test"):
        for name in ("cat", "airplane"):
            (folder / part / name).mkdir(parents=True)
            for i in range(count):
                pixels = np.full((side, side, 3), 40 * i + (10 if name == "cat" else 0), np.uint8)
                Image.fromarray(pixels).save(folder / part / name / f"{i:04d}.png")


def test_idx_is_read_and_subsets_are_even(tmp_path: Path) -> None:
    write_random_set(tmp_path)
    whole, part = data.load(tmp_path), data.load(tmp_path, 10, 4)
    assert whole.train_images.shape == (40, 1, 8, 8)
    assert part.train_labels.bincount().tolist() == [3, 3, 2, 2]
    assert part.test_labels.tolist() == [0, 1, 2, 3]
    # The first of each class, in the order in which they came.
    assert part.train_labels.tolist() == [0, 1, 2, 3, 0, 1, 2, 3, 0, 1]


def test_cifar_binary_is_averaged_and_standardized_per_channel(tmp_path: Path) -> None:
    pixels = write_cifar(tmp_path)
    found = data.load(tmp_path)
    train = np.concatenate([pixels["data_batch_1"], pixels["data_batch_2"]]).astype(np.float64)
    blocks = train.reshape(40, 3, 16, 2, 16, 2).mean(axis=(3, 5))
    mean = blocks.mean(axis=(0, 2, 3), keepdims=True)
    deviation = blocks.std(axis=(0, 2, 3), ddof=1, keepdims=True)
    np.testing.assert_allclose(found.train_images, (blocks - mean) / deviation, atol=1e-4)
    test = pixels["test_batch"].astype(np.float64).reshape(20, 3, 16, 2, 16, 2).mean(axis=(3, 5))
    np.testing.assert_allclose(found.test_images, (test - mean) / deviation, atol=1e-4)
    assert found.train_labels.tolist() == [*range(10)] * 4


def test_pickled_cifar_is_refused(tmp_path: Path) -> None:
    (tmp_path / "data_batch_1").write_bytes(b"\x80\x02}q\x01.")
    with pytest.raises(ValueError, match=r"is pickled: take the binary version$"):
        data.load(tmp_path)


@pytest.mark.parametrize("name", ["data_batch_2.bin", "test_batch.bin"])
def test_a_short_cifar_file_is_refused(tmp_path: Path, name: str) -> None:
    write_cifar(tmp_path)
    path = tmp_path / name
    path.write_bytes(path.read_bytes()[:-1])
    with pytest.raises(ValueError, match=rf"3073 bytes in .*{name}, got 61459 bytes"):
        data.load(tmp_path)


def test_a_missing_cifar_file_is_named(tmp_path: Path) -> None:
    write_cifar(tmp_path)
    (tmp_path / "test_batch.bin").unlink()
    with pytest.raises(ValueError, match=r"expected test_batch\.bin in"):
        data.load(tmp_path)
    write_cifar(tmp_path, files=0)
    for path in tmp_path.glob("data_batch*"):
        path.unlink()
    with pytest.raises(ValueError, match=r"expected data_batch_1\.bin and so on"):
        data.load(tmp_path)


def test_other_labels_than_cifars_are_refused(tmp_path: Path) -> None:
    write_cifar(tmp_path)
    (tmp_path / "data_batch_1.bin").write_bytes(bytes([10]) + bytes(3072))
    with pytest.raises(ValueError, match=r"labels below 10 in .*, got 10; it is not CIFAR-10"):
        data.load(tmp_path)


def test_folders_are_classes_in_alphabetical_order(tmp_path: Path) -> None:
    write_folders(tmp_path)
    found = data.load(tmp_path)
    assert found.train_labels.tolist() == [0, 1] * 3
    levels = found.train_images[:, 0, 0, 0]
    raw = torch.tensor([0.0, 10, 40, 50, 80, 90])
    spread = raw.repeat_interleave(64).std()
    torch.testing.assert_close(levels, (raw - raw.mean()) / spread)


def test_only_the_images_asked_for_are_decoded(tmp_path: Path) -> None:
    write_folders(tmp_path)
    for part in ("train", "test"):
        for name in ("cat", "airplane"):
            (tmp_path / part / name / "0002.png").write_bytes(b"broken")
    assert len(data.load(tmp_path, 4, 4).train_images) == 4
    with pytest.raises(ValueError, match=r"cannot read the image .*0002\.png"):
        data.load(tmp_path, 5, 4)


def test_a_truncated_jpeg_is_refused(tmp_path: Path) -> None:
    write_folders(tmp_path)
    path = tmp_path / "test" / "cat" / "0003.jpg"
    Image.fromarray(RNG.integers(0, 256, (8, 8, 3)).astype(np.uint8)).save(path)
    data.load(tmp_path)
    path.write_bytes(path.read_bytes()[:-40])
    with pytest.raises(ValueError, match=r"cannot read the image .*0003\.jpg: .*truncated"):
        data.load(tmp_path)


def test_images_of_two_sizes_are_refused(tmp_path: Path) -> None:
    write_folders(tmp_path)
    Image.new("RGB", (8, 6)).save(tmp_path / "train" / "cat" / "0009.png")
    with pytest.raises(ValueError, match="images of one size"):
        data.load(tmp_path)


def test_large_images_are_halved_until_16_and_others_refused(tmp_path: Path) -> None:
    write_folders(tmp_path, side=64)
    assert data.load(tmp_path).train_images.shape[1:] == (3, 16, 16)
    for path in tmp_path.rglob("*.png"):
        Image.new("RGB", (34, 34)).save(path)
    with pytest.raises(ValueError, match=r"can be halved to that, got \(17, 17\)"):
        data.load(tmp_path)


@pytest.mark.parametrize(
    ("missing", "match"),
    [("test", "expected a folder for each class in"), ("test/cat", "the classes of")],
)
def test_missing_folders_are_named(tmp_path: Path, missing: str, match: str) -> None:
    write_folders(tmp_path)
    for path in sorted((tmp_path / missing).rglob("*"), reverse=True):
        path.rmdir() if path.is_dir() else path.unlink()
    (tmp_path / missing).rmdir()
    with pytest.raises(ValueError, match=match):
        data.load(tmp_path)


def test_a_class_without_images_is_named(tmp_path: Path) -> None:
    write_folders(tmp_path)
    for path in (tmp_path / "train" / "cat").iterdir():
        path.unlink()
    with pytest.raises(ValueError, match=rf"expected images .* in {re.escape(str(tmp_path))}.*cat"):
        data.load(tmp_path)


def test_what_is_no_set_of_images_says_what_to_give(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=r"found none; .*dataset-fashion-mnist"):
        data.load(tmp_path)
    with pytest.raises(ValueError, match=r"expected a folder of images, got .*absent"):
        data.load(tmp_path / "absent")


def test_a_limit_below_the_classes_is_refused(tmp_path: Path) -> None:
    write_folders(tmp_path)
    with pytest.raises(ValueError, match="at least one image a class, 2, got 1"):
        data.load(tmp_path, 1, 4)
