"""Weights in the folders, under the keys and with the names that other programs give them."""

from __future__ import annotations

import json
import sys
import zipfile

import pytest
import torch
from safetensors.torch import save_file
from torch import nn

from convspectra.models.files import LoadError, load_operators

SHAPES = [(3, 6, 6)]
FACTORY = f"{__name__}:network"


def network() -> nn.Module:
    with torch.random.fork_rng():
        torch.manual_seed(0)
        return nn.Sequential(nn.Conv2d(3, 4, 3), nn.BatchNorm2d(4), nn.Conv2d(4, 2, 3)).eval()


def trained() -> dict[str, torch.Tensor]:
    return {
        name: 2 * value if name.endswith("weight") else value
        for name, value in network().state_dict().items()
    }


def weights(path) -> list[torch.Tensor]:
    return [named.operator.weight for named in load_operators(path, SHAPES, factory=FACTORY)[1]]


def is_trained(path) -> None:
    for weight, name in zip(weights(path), ("0.weight", "2.weight"), strict=True):
        assert torch.equal(weight, trained()[name])


def test_a_folder_with_one_file(tmp_path):
    (tmp_path / "config.json").write_text("{}")
    save_file(trained(), tmp_path / "model.safetensors")
    is_trained(tmp_path)


def sharded(folder, names=("model-1-of-2.safetensors", "model-2-of-2.safetensors")):
    state = trained()
    halves = [{k: v for k, v in state.items() if (k[0] == "2") == last} for last in (False, True)]
    listed = {key: name for half, name in zip(halves, names, strict=True) for key in half}
    for half, name in zip(halves, names, strict=True):
        save_file(half, folder / name)
    (folder / "model.safetensors.index.json").write_text(json.dumps({"weight_map": listed}))


def test_a_folder_with_several_files(tmp_path):
    sharded(tmp_path)
    is_trained(tmp_path)
    (tmp_path / "model-2-of-2.safetensors").unlink()
    with pytest.raises(LoadError, match=r"model-2-of-2\.safetensors: no such file"):
        weights(tmp_path)


def test_folders_that_are_refused(tmp_path):
    with pytest.raises(LoadError, match=r"a folder without model\.safetensors or"):
        weights(tmp_path)
    index = tmp_path / "model.safetensors.index.json"
    for text, message in (
        ("[", "not an index of safetensors"),
        ('{"weight_map": {"0.weight": "../x.safetensors"}}', "lies in another folder"),
    ):
        index.write_text(text)
        with pytest.raises(LoadError, match=message):
            weights(tmp_path)


@pytest.mark.parametrize("prefix", ["", "module.", "model.", "model.module.", "_orig_mod."])
@pytest.mark.parametrize("key", ["", "state_dict", "model", "net", "params_ema"])
def test_checkpoints_under_keys_and_with_names_in_front(tmp_path, key, prefix):
    state = {f"{prefix}{name}": value for name, value in trained().items()}
    torch.save({key: state, "epoch": 3} if key else state, tmp_path / "net.ckpt")
    is_trained(tmp_path / "net.ckpt")


def test_a_checkpoint_from_before_batches_were_counted(tmp_path):
    state = trained()
    del state["1.num_batches_tracked"]
    torch.save(state, tmp_path / "old.pth")
    is_trained(tmp_path / "old.pth")
    del state["1.running_mean"]
    torch.save(state, tmp_path / "broken.pth")
    with pytest.raises(LoadError, match=r"1 missing: 1\.running_mean$"):
        weights(tmp_path / "broken.pth")


def test_keras_is_told_the_way(tmp_path):
    (tmp_path / "net.h5").write_bytes(b"\x89HDF\r\n\x1a\n" + bytes(64))
    with zipfile.ZipFile(tmp_path / "net.keras", "w") as archive:
        archive.writestr("config.json", "{}")
        archive.writestr("model.weights.h5", b"\x89HDF\r\n\x1a\n")
    for name in ("net.h5", "net.keras"):
        with pytest.raises(LoadError, match=f"{name}: a Keras or other HDF5 file.*to ONNX"):
            weights(tmp_path / name)


def test_a_factory_in_the_current_folder(tmp_path, monkeypatch):
    source = "from torch import nn\ndef build():\n    return nn.Conv2d(1, 2, 3)\n"
    (tmp_path / "a_network_of_my_own.py").write_text(source)
    before = list(sys.path)
    with pytest.raises(LoadError, match="cannot be imported"):
        load_operators(None, [(1, 5, 5)], factory="a_network_of_my_own:build")
    monkeypatch.chdir(tmp_path)
    name, operators = load_operators(None, [(1, 5, 5)], factory="a_network_of_my_own:build")
    assert (name, operators[0].operator.shape) == ("build", (18, 25))
    assert sys.path == before


@pytest.mark.parametrize("first", [0x80, 0x08, 0x50])
def test_safetensors_with_any_length_of_the_header(tmp_path, first):
    path = tmp_path / "net.safetensors"
    for padding in range(256):
        save_file(trained(), path, {"note": "n" * padding})
        if path.read_bytes()[0] == first:
            break
    assert path.read_bytes()[0] == first
    is_trained(path)
