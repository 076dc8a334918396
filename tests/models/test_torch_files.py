"""TorchScript, exported programs, checkpoints, safetensors and pickled modules."""

from __future__ import annotations

import os
import pickle
import sys
import warnings
import zipfile

import pytest
import torch
from safetensors.torch import save_file
from torch import nn

from convspectra.models._named_operators import NamedOperator
from convspectra.models.files import LoadError, load_operators

SHAPES = [(3, 6, 6)]
FACTORY = f"{__name__}:network"


def network() -> nn.Module:
    with torch.random.fork_rng():
        torch.manual_seed(0)
        model = nn.Sequential(
            nn.Conv2d(3, 4, 3, stride=2, padding=1),
            nn.BatchNorm2d(4),
            nn.ReLU(),
            nn.ConvTranspose2d(4, 2, 2, stride=2),
            nn.Flatten(),
            nn.Linear(72, 5),
        )
    model[1].running_var.fill_(4.0)
    return model.eval()


def failing() -> nn.Module:
    raise SystemError("no network today")


def same_layers(operators: list[NamedOperator], normalized: bool = True) -> None:
    """The operators are the layers of `network`, found by applying them."""
    model = network()
    assert [t.type for t in operators] == ["Conv2d", "ConvTranspose2d", "Linear"]
    for named, layer in zip(operators, (model[0], model[3], model[5]), strict=True):
        torch.manual_seed(1)
        x = torch.randn(1, *named.operator.input_shape)
        if normalized or layer is not model[0]:
            expected = (layer(x) - layer(torch.zeros_like(x))).detach()
            torch.testing.assert_close(named.operator.matvec(x), expected, atol=1e-5, rtol=1e-4)
    if normalized:
        assert [t.name for t in operators] == ["0", "3", "5"]
        assert [t.batch_norm for t in operators] == ["1", "", ""]
        scale = torch.full((4,), (4 + 1e-5) ** -0.5, dtype=torch.float64)
        torch.testing.assert_close(operators[0].scale, scale)


@pytest.fixture
def example() -> torch.Tensor:
    return torch.zeros(1, *SHAPES[0])


def script(path, example) -> None:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        torch.jit.script(network()).save(str(path))


def trace(path, example) -> None:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        torch.jit.trace(network(), example).save(str(path))


def frozen(path, example) -> None:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        torch.jit.freeze(torch.jit.script(network())).save(str(path))


def exported(path, example) -> None:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        torch.export.save(torch.export.export(network(), (example,)), str(path))


def checkpoint(path, example) -> None:
    torch.save(network().state_dict(), path)


def legacy(path, example) -> None:
    torch.save(network().state_dict(), path, _use_new_zipfile_serialization=False)


def safetensors(path, example) -> None:
    save_file(network().state_dict(), path)


def pickled(path, example) -> None:
    torch.save(network(), path)


WRITERS = [script, trace, exported, checkpoint, legacy, safetensors, pickled]


@pytest.mark.parametrize("write", WRITERS, ids=lambda w: w.__name__)
def test_every_format_gives_the_layers_of_the_model(tmp_path, example, write):
    path = tmp_path / "net.bin"  # content decides, not the suffix
    write(path, example)
    name, operators = load_operators(path, SHAPES, factory=FACTORY, allow_pickle=True)
    assert name == "net"
    same_layers(operators)


def test_a_frozen_archive_has_its_normalization_folded(tmp_path, example):
    frozen(tmp_path / "net.pt", example)
    _, operators = load_operators(tmp_path / "net.pt", SHAPES)
    same_layers(operators, normalized=False)
    scale = (4 + 1e-5) ** -0.5
    expected = network()[0].weight.detach() * scale
    torch.testing.assert_close(operators[0].operator.weight, expected)


def test_a_factory_alone():
    name, operators = load_operators(None, SHAPES, factory=FACTORY)
    assert name == "network"
    same_layers(operators)


@pytest.mark.parametrize("key", ["state_dict", "model", "model_state_dict", "net"])
def test_nested_state_dicts_with_a_prefix(tmp_path, key):
    state = {f"module.{name}": value for name, value in network().state_dict().items()}
    torch.save({"epoch": 3, key: state}, tmp_path / "net.pth")
    same_layers(load_operators(tmp_path / "net.pth", SHAPES, factory=FACTORY)[1])


# --- what is refused ------------------------------------------------------------------------------


def refused(match: str, path, shapes=SHAPES, **options) -> None:
    with pytest.raises(LoadError, match=match) as caught:
        load_operators(path, shapes, **options)
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize("write", WRITERS, ids=lambda w: w.__name__)
def test_truncated_files(tmp_path, example, write):
    path = tmp_path / "net.pt"
    write(path, example)
    data = path.read_bytes()
    for tenth in (0.01, 0.1, 0.5, 0.9, 0.999):
        path.write_bytes(data[: int(tenth * len(data))])
        refused(r"net\.pt: ", path, factory=FACTORY, allow_pickle=True)


@pytest.mark.parametrize("write", [script, exported, checkpoint], ids=lambda w: w.__name__)
def test_a_damaged_member_is_noticed(tmp_path, example, write, capfd):
    path = tmp_path / "net.pt"
    write(path, example)
    weight = network()[3].weight.detach().numpy().tobytes()
    data = path.read_bytes()
    assert weight in data
    path.write_bytes(data.replace(weight, bytes(len(weight))))
    refused("a damaged archive.*copy the file again", path, factory=FACTORY)
    path.write_bytes(data[:-200])  # an inner archive may still be whole
    refused("a broken zip archive.*copy the file again", path, factory=FACTORY)
    assert capfd.readouterr() == ("", "")


def test_a_checkpoint_without_checksums(tmp_path):
    torch.serialization.set_crc32_options(False)
    try:
        checkpoint(tmp_path / "net.pt", None)
    finally:
        torch.serialization.set_crc32_options(True)
    same_layers(load_operators(tmp_path / "net.pt", SHAPES, factory=FACTORY)[1])


def test_what_pytorch_logs_stays_silent(tmp_path, capfd):
    path = tmp_path / "net.pt"
    with zipfile.ZipFile(path, "w") as archive:
        archive.writestr("net/models/model.json", "{}")
    refused("not a whole torch.export archive", path)
    assert capfd.readouterr() == ("", "")


@pytest.mark.parametrize("write", [script, trace], ids=lambda w: w.__name__)
def test_torchscript_says_why_it_does_not_run(tmp_path, example, write):
    write(tmp_path / "net.pt", example)
    refused("expected input.* to have 3 channels, but got 2", tmp_path / "net.pt", [(2, 6, 6)])


@pytest.mark.parametrize("write", WRITERS, ids=lambda w: w.__name__)
def test_input_shapes_that_do_not_fit(tmp_path, example, write):
    path = tmp_path / "net.pt"
    write(path, example)
    options = {"factory": FACTORY, "allow_pickle": True}
    refused("does not run on zeros of 1x2x6x6", path, [(2, 6, 6)], **options)
    refused("positive integers", path, [(3, 0, 6)], **options)


@pytest.mark.parametrize(
    "head", [b"", b"\x80", b"\x08", b"PK\x03\x04", b"12345678{", b"\x80\x02}q"]
)
def test_random_bytes(tmp_path, head):
    generator = torch.Generator().manual_seed(0)
    for length in (0, 1, 100, 5000):
        data = torch.randint(256, (length,), generator=generator, dtype=torch.uint8)
        path = tmp_path / "net.pt"
        path.write_bytes(head + bytes(data.tolist()))
        refused(r"net\.pt: ", path, factory=FACTORY)


def test_files_that_are_none(tmp_path):
    refused("no such file", tmp_path / "none.pt")
    refused("a folder without model", tmp_path)
    refused("more than the limit of 10", _written(tmp_path / "big.pt", b"x" * 11), max_bytes=10)
    refused("neither", None)


def _written(path, data: bytes):
    path.write_bytes(data)
    return path


def test_zip_archives_that_are_no_models(tmp_path):
    path = tmp_path / "net.pt"
    with zipfile.ZipFile(path, "w") as archive:
        archive.writestr("readme", "text")
    refused("holds no model", path)
    with zipfile.ZipFile(path, "w", zipfile.ZIP_DEFLATED) as archive:
        archive.writestr("net/data.pkl", bytes(2**24))
    refused("zip bomb", path)


class Hostile:
    def __init__(self, named) -> None:
        self.named = named

    def __reduce__(self):
        return os.system, (f"touch {self.named}",)


@pytest.mark.parametrize("write", [torch.save, lambda o, p: p.write_bytes(pickle.dumps(o))])
def test_a_hostile_pickle_does_not_run(tmp_path, write):
    write({"w": Hostile(tmp_path / "touched")}, tmp_path / "net.pt")
    refused("runs arbitrary code.*--allow-pickle", tmp_path / "net.pt", factory=FACTORY)
    assert not (tmp_path / "touched").exists()


def test_a_pickled_module_needs_the_flag(tmp_path, example):
    pickled(tmp_path / "net.pt", example)
    refused("--allow-pickle", tmp_path / "net.pt")


def test_weights_that_are_not_those_of_the_factory(tmp_path):
    path = tmp_path / "net.pth"
    state = network().state_dict()
    state["extra"] = state.pop("0.weight")
    torch.save(state, path)
    refused(r"1 missing: 0\.weight; 1 unexpected: extra", path, factory=FACTORY)
    state["0.weight"] = torch.zeros(1)
    del state["extra"]
    torch.save(state, path)
    refused(r"do not fit.*size mismatch for 0\.weight", path, factory=FACTORY)
    refused("give the function that builds it", path)
    torch.save([1, 2], path)
    refused("expected a state dict, got list", path, factory=FACTORY)


FACTORIES = [
    ("network", 'as "package.module:function"'),
    ("no_such_module:f", "cannot be imported"),
    (f"{__name__}:nothing", "cannot be imported"),
    (f"{__name__}:failing", "no network today"),
    ("os:getcwd", "return a torch.nn.Module, got str"),
]


@pytest.mark.parametrize(("factory", "reason"), FACTORIES)
def test_factories_that_are_none(factory, reason):
    refused(reason, None, factory=factory)


@pytest.mark.parametrize("kind", ["onnx", "safetensors"])
def test_optional_packages(tmp_path, monkeypatch, kind):
    head = {"onnx": b"\x08\x09", "safetensors": b"\x02\0\0\0\0\0\0\0{}"}[kind]
    for module in ("safetensors.torch", "onnx", "convspectra.models.files._onnx_layers"):
        monkeypatch.setitem(sys.modules, module, None)
    with pytest.raises(ImportError, match=rf"pip install 'convspectra\[{kind}\]'"):
        load_operators(_written(tmp_path / "net", head), SHAPES, factory=FACTORY)
