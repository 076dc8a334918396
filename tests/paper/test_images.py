"""Image sets: the digits, and folders in the format of MNIST, whole and broken."""

import numpy as np
import pytest
import torch
from helpers.idx_files import write_idx

from convspectra.paper.images import load_digits, load_mnist_format


def write_set(folder, size, compress=False):
    rng = np.random.default_rng(0)
    arrays = {}
    suffix = ".gz" if compress else ""
    for prefix, count in (("train", 12), ("t10k", 5)):
        images = rng.integers(0, 256, (count, size, size))
        labels = rng.integers(0, 10, count)
        write_idx(folder / f"{prefix}-images-idx3-ubyte{suffix}", images, compress)
        write_idx(folder / f"{prefix}-labels-idx1-ubyte{suffix}", labels, compress)
        arrays[prefix] = images, labels
    return arrays


def test_digits_are_split_without_overlap_and_standardized():
    digits = load_digits(test_images=397)
    assert digits.train_images.shape == (1400, 1, 8, 8)
    assert digits.test_images.shape == (397, 1, 8, 8)
    assert abs(float(digits.train_images.mean())) < 1e-5
    assert abs(float(digits.train_images.std()) - 1) < 1e-5
    assert sorted(set(digits.train_labels.tolist())) == list(range(10))
    rows = torch.cat([digits.train_images, digits.test_images]).flatten(1)
    assert len(torch.unique(rows, dim=0)) == 1797


def test_the_split_follows_the_seed():
    again, other = load_digits(seed=0), load_digits(seed=1)
    assert torch.equal(load_digits(seed=0).test_labels, again.test_labels)
    assert not torch.equal(other.test_labels, again.test_labels)


@pytest.mark.parametrize("compress", [False, True])
def test_mnist_format(tmp_path, compress):
    arrays = write_set(tmp_path, 8, compress)
    loaded = load_mnist_format(tmp_path)
    images, labels = arrays["t10k"]
    train = arrays["train"][0].astype(np.float64)
    expected = (images - train.mean()) / train.std(ddof=1)
    np.testing.assert_allclose(loaded.test_images[:, 0].numpy(), expected, rtol=1e-4, atol=1e-5)
    assert loaded.test_labels.tolist() == labels.tolist()
    assert loaded.name == f"{tmp_path.name}, 8 x 8"


def test_large_images_are_averaged_over_blocks(tmp_path):
    arrays = write_set(tmp_path, 28)
    blocks = arrays["train"][0].reshape(12, 14, 2, 14, 2).mean(axis=(2, 4))
    expected = (blocks - blocks.mean()) / blocks.std(ddof=1)
    loaded = load_mnist_format(tmp_path)
    np.testing.assert_allclose(loaded.train_images[:, 0].numpy(), expected, rtol=1e-4, atol=1e-5)


def test_a_missing_file_is_named(tmp_path):
    with pytest.raises(ValueError, match=r"expected train-images-idx3-ubyte or .* got neither"):
        load_mnist_format(tmp_path)


def test_another_kind_of_file_is_refused(tmp_path):
    write_set(tmp_path, 8)
    (tmp_path / "train-images-idx3-ubyte").write_bytes(b"not an IDX file at all")
    with pytest.raises(ValueError, match="to begin with the bytes"):
        load_mnist_format(tmp_path)


def test_a_short_file_is_refused(tmp_path):
    write_set(tmp_path, 8)
    path = tmp_path / "t10k-images-idx3-ubyte"
    path.write_bytes(path.read_bytes()[:-1])
    with pytest.raises(ValueError, match="cut short"):
        load_mnist_format(tmp_path)


def test_labels_must_match_images(tmp_path):
    write_set(tmp_path, 8)
    write_idx(tmp_path / "train-labels-idx1-ubyte", np.zeros(3))
    with pytest.raises(ValueError, match="got 3 labels for 12 images"):
        load_mnist_format(tmp_path)
