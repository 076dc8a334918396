"""Archives of torch.export: benign ones load, and hostile ones are refused before they run code."""

from __future__ import annotations

import io
import json
import pickle
import warnings
import zipfile

import pytest
import torch
from torch import nn

from convspectra.models.files import LoadError, load_operators

SHAPE = (3, 8, 8)
PROGRAM, INPUTS = "models/model.json", "data/sample_inputs/model.pt"
WEIGHTS, CONSTANTS = (f"data/{kind}/model_{kind}_config.json" for kind in ("weights", "constants"))


class Network(nn.Module):
    """With a buffer, a constant, a named output and sizes that are computed."""

    def __init__(self) -> None:
        super().__init__()
        self.conv = nn.Conv2d(3, 4, 3)
        self.register_buffer("mixing", torch.eye(4))
        self.scale = torch.full((4, 1, 1), 2.0)

    def forward(self, x):
        y = self.conv(x) * self.scale
        y = nn.functional.pad(y, (1, 1, 1, 1), mode="reflect")
        y = torch.einsum("bchw,cd->bdhw", y, self.mixing)[..., ::2]
        return {"y": y.softmax(1).flatten(1), "size": x.shape[2] // 2 + 1}


@pytest.fixture(scope="module", params=[False, True], ids=["as it is", "decomposed"])
def archive(tmp_path_factory, request):
    path = tmp_path_factory.mktemp("exported") / "net.pt2"
    sizes = {"x": {2: torch.export.Dim("size", min=8, max=64)}}
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        program = torch.export.export(Network(), (torch.zeros(1, *SHAPE),), dynamic_shapes=sizes)
        torch.export.save(program.run_decompositions() if request.param else program, path)
    return path


class Hostile:
    def __init__(self, path) -> None:
        self.path = path

    def __reduce__(self):
        return open, (str(self.path), "w")


def saved(value) -> bytes:
    stream = io.BytesIO()
    torch.save(value, stream)
    return stream.getvalue()


def changed(archive, folder, changes):
    """The archive with members changed by functions of their bytes, or added."""
    path = folder / "net.pt2"
    with zipfile.ZipFile(archive) as source, zipfile.ZipFile(path, "w") as target:
        names = source.namelist()
        root = names[0].partition("/")[0]
        for name in names:
            data = source.read(name)
            change = changes.get(name.partition("/")[2])
            target.writestr(name, data if change is None else change(data))
        for name, change in changes.items():
            if f"{root}/{name}" not in names:
                target.writestr(f"{root}/{name}", change(b""))
    return path


def refused(path, folder, match: str) -> None:
    with pytest.raises(LoadError, match=rf"{match}.*--allow-pickle \(allow_pickle=True\)"):
        load_operators(path, [SHAPE])
    assert not (folder / "touched").exists()


def test_a_benign_archive_loads(archive):
    names = [target.name for target in load_operators(archive, [SHAPE])[1]]
    assert names[0] == "conv"


@pytest.mark.parametrize("write", [saved, pickle.dumps], ids=["saved", "pickled"])
@pytest.mark.parametrize("member", [INPUTS, "data/weights/model.pt", "data/constants/model.pt"])
def test_a_hostile_member_does_not_run(archive, tmp_path, member, write):
    hostile = write((Hostile(tmp_path / "touched"),))
    path = changed(archive, tmp_path, {member: lambda _: hostile})
    refused(path, tmp_path, f"{member}' is a pickle of more than tensors")


@pytest.mark.parametrize(("config", "file"), [(WEIGHTS, "weight_0"), (CONSTANTS, "tensor_0")])
def test_a_hostile_tensor_does_not_run(archive, tmp_path, config, file):
    def pickled(data: bytes) -> bytes:
        content = json.loads(data)
        for payload in content["config"].values():
            payload["use_pickle"] = payload["path_name"] == file
        return json.dumps(content).encode()

    member = f"{config.rpartition('/')[0]}/{file}"
    hostile = saved(Hostile(tmp_path / "touched"))
    path = changed(archive, tmp_path, {config: pickled, member: lambda _: hostile})
    refused(path, tmp_path, f"{file}' is a pickle of more than tensors")


@pytest.mark.parametrize("file", ["opaque_obj_0", "custom_obj_0"])
def test_custom_objects_are_refused(archive, tmp_path, file):
    def custom(data: bytes) -> bytes:
        content = json.loads(data)
        next(iter(content["config"].values()))["path_name"] = file
        return json.dumps(content).encode()

    hostile = pickle.dumps(Hostile(tmp_path / "touched"))
    changes = {CONSTANTS: custom, f"data/constants/{file}": lambda _: hostile}
    refused(changed(archive, tmp_path, changes), tmp_path, "'scale' is a custom object")


def test_compiled_libraries_are_refused(archive, tmp_path):
    path = changed(archive, tmp_path, {"data/aotinductor/model/model.so": lambda _: b"code"})
    refused(path, tmp_path, "is a compiled library")


def test_members_that_are_there_twice_are_refused(archive, tmp_path):
    path = changed(archive, tmp_path, {})
    with zipfile.ZipFile(path, "a") as target, warnings.catch_warnings():
        warnings.simplefilter("ignore")
        target.writestr(target.namelist()[-1], b"")
    refused(path, tmp_path, "is in it 2 times")


def test_the_layout_of_older_archives_is_checked_too(tmp_path):
    path, hostile = tmp_path / "net.pt2", saved((Hostile(tmp_path / "touched"),))
    parts = ("state_dict.json", "constants.json", "example_inputs.pt")
    for part in parts:
        with zipfile.ZipFile(path, "w") as target:
            target.writestr("version", "8.1")
            target.writestr("serialized_exported_program.json", "{}")
            for name in parts:
                target.writestr(f"serialized_{name}", hostile if name == part else saved({}))
        refused(path, tmp_path, f"serialized_{part}' is a pickle of more than tensors")


def code(folder) -> str:
    return f"open('{folder / 'touched'}', 'w')"


def operator(content, folder) -> None:
    content["graph_module"]["graph"]["nodes"][0]["target"] = "torch.os.getcwd"


def library(content, folder) -> None:
    content["graph_module"]["graph"]["nodes"][0]["target"] = "torch.ops.load_library"


def size(content, folder) -> None:
    expression = {"as_expr": {"expr_str": code(folder), "hint": None}}
    content["graph_module"]["graph"]["sym_int_values"]["s0"] = expression


def argument(content, folder) -> None:
    signature = content["graph_module"]["module_call_graph"][0]["signature"]
    signature["forward_arg_names"] = [f"x={code(folder)}"]


def name(content, folder) -> None:
    content["graph_module"]["graph"]["inputs"][-1]["as_tensor"]["name"] = f"x={code(folder)}"


def tree(content, folder) -> None:
    signature = content["graph_module"]["module_call_graph"][0]["signature"]
    signature["in_spec"] = '[1, {"type": "builtins.dict", "context": "{\\"__enum__\\": 1}"}]'


@pytest.mark.parametrize("change", [operator, library, size, argument, name, tree])
def test_programs_that_are_evaluated_do_not_run(archive, tmp_path, change):
    def program(data: bytes) -> bytes:
        content = json.loads(data)
        change(content, tmp_path)
        return json.dumps(content).encode()

    path = changed(archive, tmp_path, {PROGRAM: program})
    refused(path, tmp_path, "its program has a ")


def test_guards_are_not_evaluated(archive, tmp_path):
    def guarded(data: bytes) -> bytes:
        return json.dumps(json.loads(data) | {"guards_code": [code(tmp_path)]}).encode()

    load_operators(changed(archive, tmp_path, {PROGRAM: guarded}), [SHAPE])
    assert not (tmp_path / "touched").exists()


def test_the_flag_loads_it(archive, tmp_path):
    touched = tmp_path / "touched"
    hostile = saved(((torch.zeros(1, *SHAPE), Hostile(touched)), {}))
    path = changed(archive, tmp_path, {INPUTS: lambda _: hostile})
    load_operators(path, [SHAPE], allow_pickle=True)
    assert touched.exists()
