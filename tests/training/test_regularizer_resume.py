"""The state of a SpectralRegularizer: what it holds, and that a killed run goes on bit for bit."""

from __future__ import annotations

import io
import signal
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from helpers.training import OPTIONS, SIZE, each_penalty, near_delta, seeded
from torch import Tensor, nn

from convspectra import Schedule, SpectralRegularizer

STEPS = 9
STOP = 4
"""The step after which a run is killed."""


class Net(nn.Module):
    """Two layers of one kind, one of them used at two input sizes, and a third of its own."""

    def __init__(self) -> None:
        super().__init__()
        self.a = nn.Conv2d(2, 2, 3, padding=1)
        self.b = nn.Conv2d(2, 2, 3, padding=1)
        self.c = nn.Conv2d(2, 3, 3, padding=1)
        for conv in (self.a, self.b, self.c):
            near_delta(conv, 0.2)

    def forward(self, x: Tensor) -> Tensor:
        x = self.b(self.a(x).relu())
        return self.c(self.b(nn.functional.max_pool2d(x, 2))).mean((2, 3))


KEYS = ["a@5x6", "b@5x6", "b@2x3", "c@2x3"]


def net(seed: int = 0) -> nn.Module:
    return seeded(Net, seed)


def regularizer(model: nn.Module, name: str, **options) -> SpectralRegularizer:
    """With intervals so short that every kind of step occurs in a few."""
    given = {
        "weight": 0.3,
        "penalty_options": OPTIONS.get(name),
        "schedule": Schedule(warmup=3, half_life=4),
        "improve_interval": 2,
        "refresh_interval": 5,
    }
    return SpectralRegularizer(model, torch.zeros(1, 2, *SIZE), penalty=name, **given | options)


def batch(step: int) -> Tensor:
    return torch.randn(3, 2, *SIZE, generator=torch.Generator().manual_seed(step))


def train(model: nn.Module, optimizer, reg: SpectralRegularizer, step: int) -> float:
    optimizer.zero_grad()
    penalty = reg()
    (model(batch(step)).square().mean() + penalty).backward()
    optimizer.step()
    return float(penalty.detach())


def adam(model: nn.Module, fused: bool) -> torch.optim.Optimizer:
    return torch.optim.Adam(model.parameters(), lr=1e-2, fused=fused)


def through_a_file(state: dict) -> dict:
    """What torch.load reads when it trusts nothing but tensors and plain containers."""
    file = io.BytesIO()
    torch.save(state, file)
    file.seek(0)
    return torch.load(file, weights_only=True)


def plain(value: object) -> bool:
    if isinstance(value, dict):
        return all(type(key) is str and plain(item) for key, item in value.items())
    if isinstance(value, list):
        return all(plain(item) for item in value)
    return value is None or type(value) in (int, float, str, bool, Tensor)


def equal(one: object, other: object) -> bool:
    """Bit for bit."""
    if isinstance(one, Tensor):
        return one.dtype == other.dtype and torch.equal(one, other)
    if isinstance(one, dict):
        return one.keys() == other.keys() and all(equal(one[key], other[key]) for key in one)
    if isinstance(one, list):
        return len(one) == len(other) and all(map(equal, one, other))
    return type(one) is type(other) and one == other


# --- what it holds --------------------------------------------------------------------------------


@each_penalty
def test_the_state_is_plain_and_no_part_of_the_model(name):
    model = net()
    keys = list(model.state_dict())
    reg = regularizer(model, name)
    optimizer = adam(model, False)
    for step in range(3):
        train(model, optimizer, reg, step)
    state = reg.state_dict()
    assert plain(state)
    assert state["step"] == 2
    assert list(state["layers"]) == KEYS
    assert list(model.state_dict()) == keys
    assert equal(through_a_file(state), state)


def test_the_state_of_a_layer_that_is_followed_holds_its_vectors():
    reg = regularizer(net(), "conditioning")
    assert list(reg.state_dict()["layers"].values()) == [None] * 4, "nothing is computed yet"
    reg()
    state = reg.state_dict()["layers"]["a@5x6"]
    assert state["vectors"].shape == state["directions"].shape == (2, 60)
    for name in ("vectors", "change"):
        norms = torch.linalg.vector_norm(state[name], dim=1)
        assert torch.allclose(norms, torch.ones_like(norms))
    assert (state["step"], state["failures"]) == (0, 0)


def test_the_state_is_a_copy():
    model = net()
    reg = regularizer(model, "conditioning", improve_interval=1)
    reg()
    state = reg.state_dict()
    before = through_a_file(state)
    optimizer = adam(model, False)
    for step in range(6):
        train(model, optimizer, reg, step)
    assert equal(state, before)
    assert not equal(reg.state_dict()["layers"], before["layers"])


# --- resumed in the same process ------------------------------------------------------------------


def snapshot(model: nn.Module, optimizer, reg: SpectralRegularizer) -> dict:
    state = {"model": model.state_dict(), "optimizer": optimizer.state_dict()}
    return through_a_file(state | {"reg": reg.state_dict()})


def run_on(model: nn.Module, optimizer, reg: SpectralRegularizer, first: int) -> list:
    """Everything that can be seen of the rest of a run."""
    seen = [str(reg.report()), reg.report().records()]
    for step in range(first, STEPS):
        seen.append(train(model, optimizer, reg, step))
        seen.append([parameter.grad.clone() for parameter in model.parameters()])
        seen.append([str(reg.report()), reg.report().records()])
    return [*seen, [p.detach().clone() for p in model.parameters()], reg.state_dict()]


@each_penalty
@pytest.mark.parametrize("fused", [False, True])
@pytest.mark.parametrize("stop", [0, 1, 4, 5])
def test_a_run_goes_on_bit_for_bit(name, fused, stop):
    """Also where the state was taken before the first step."""
    model = net()
    optimizer, reg = adam(model, fused), regularizer(model, name)
    for step in range(stop):
        train(model, optimizer, reg, step)
    state = snapshot(model, optimizer, reg)
    expected = run_on(model, optimizer, reg, stop)
    other = net(seed=1)
    again, second = adam(other, fused), regularizer(other, name)
    other.load_state_dict(state["model"])
    again.load_state_dict(state["optimizer"])
    second.load_state_dict(state["reg"])
    assert equal(run_on(other, again, second, stop), expected)
    assert second.step_count == STEPS - 1


@pytest.mark.parametrize("stop", [0, 3])
def test_a_regularizer_goes_back_to_its_own_past(stop):
    model = net()
    optimizer, reg = adam(model, False), regularizer(model, "conditioning")
    for step in range(stop):
        train(model, optimizer, reg, step)
    state = snapshot(model, optimizer, reg)
    expected = run_on(model, optimizer, reg, stop)
    model.load_state_dict(state["model"])
    optimizer.load_state_dict(state["optimizer"])
    reg.load_state_dict(state["reg"])
    assert equal(run_on(model, optimizer, reg, stop), expected)


def test_the_vectors_are_what_makes_a_run_go_on():
    """Without them the exact computation comes again, and differs from what was followed."""
    model = net()
    optimizer, reg = adam(model, False), regularizer(model, "conditioning")
    for step in range(4):
        train(model, optimizer, reg, step)
    state = reg.state_dict()
    state["layers"] = dict.fromkeys(state["layers"])
    fresh = regularizer(model, "conditioning")
    fresh.load_state_dict(state)
    expected, got = reg(), fresh()
    assert torch.allclose(got, expected, rtol=0.2)
    assert not torch.equal(got, expected)
    assert [layer.age for layer in fresh.report().layers] == [0] * 4


def test_skipped_steps_and_failures_are_kept():
    model = net()
    reg = regularizer(model, "conditioning", nonfinite="skip")
    reg()
    good = model.c.weight.detach().clone()
    with torch.no_grad():
        model.c.weight.fill_(torch.nan)
        reg.report()
    reg()
    with torch.no_grad():
        model.c.weight.copy_(good)
    state = reg.state_dict()
    assert state["skipped"] == dict(zip(KEYS, (0, 0, 0, 1), strict=True))
    state["layers"]["a@5x6"]["failures"] = 2
    fresh = regularizer(model, "conditioning", nonfinite="skip")
    fresh.load_state_dict(through_a_file(state))
    layers = fresh.report().layers
    assert [layer.skipped for layer in layers] == [0, 0, 0, 1]
    assert [layer.failures for layer in layers] == [2, 0, 0, 0]


# --- what is refused ------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"include": ["a", "b"]}, r"expected the state of the layers \['a@5x6', .* got .*'c@2x3'"),
        ({"exclude": "a"}, r"expected the state of the layers \['b@5x6', .* got .*'a@5x6'"),
    ],
)
def test_the_state_of_other_layers_is_refused(options, message):
    state = regularizer(net(), "conditioning").state_dict()
    with pytest.raises(ValueError, match=message):
        regularizer(net(), "conditioning", **options).load_state_dict(state)


def test_the_state_of_other_input_sizes_is_refused():
    state = regularizer(net(), "conditioning").state_dict()
    other = SpectralRegularizer(net(), torch.zeros(1, 2, 6, 6), penalty="conditioning")
    with pytest.raises(ValueError, match=r"layers \['a@6x6', .* got that of \['a@5x6'"):
        other.load_state_dict(state)


@pytest.mark.parametrize(
    ("saved", "loaded"),
    [("conditioning", "band"), ("frobenius", "band"), ("band", "stein"), ("stein", "cond")],
)
def test_the_state_of_another_penalty_is_refused(saved, loaded):
    state = regularizer(net(), saved).state_dict()
    message = f"^expected the state of the penalty '{loaded}', got that of '{saved}'; make"
    with pytest.raises(ValueError, match=message):
        regularizer(net(), loaded).load_state_dict(state)


def test_the_state_of_a_penalty_that_follows_more_values_is_refused():
    reg = regularizer(net(), "band")
    reg()
    message = "^layer 'a': expected a state with 6 singular vectors, got 4; it is that of another"
    with pytest.raises(ValueError, match=message):
        regularizer(net(), "band", penalty_options={"k": 3}).load_state_dict(reg.state_dict())


@pytest.mark.parametrize("key", ["step", "started", "penalty_name", "penalty", "layers", "skipped"])
def test_a_state_that_lacks_something_is_refused(key):
    reg = regularizer(net(), "cond")
    state = reg.state_dict()
    del state[key]
    with pytest.raises(ValueError, match=f"^expected a state with .*, got none of \\['{key}'\\]"):
        reg.load_state_dict(state)


def test_the_state_of_a_layer_that_lacks_something_is_refused():
    reg = regularizer(net(), "cond")
    reg()
    state = reg.state_dict()
    del next(iter(state["layers"].values()))["vectors"]
    with pytest.raises(ValueError, match=r"^layer 'a': expected a state with .*'vectors'.*, got"):
        reg.load_state_dict(state)


# --- devices --------------------------------------------------------------------------------------


def check_move(model: nn.Module, reg: SpectralRegularizer, device: str) -> None:
    before = reg().detach()
    records = reg.report().records()
    model.to(device)
    assert reg.to(device) is reg
    assert torch.allclose(reg().detach().cpu(), before, rtol=1e-5)
    assert reg.step_count <= 1
    layers = reg.state_dict()["layers"]
    tensors = [value for value in layers["a@5x6"].values() if isinstance(value, Tensor)]
    assert len(tensors) == 6
    assert all(tensor.device.type == device for tensor in tensors)
    for one, other in zip(reg.report().records(), records, strict=True):
        assert one["sigma_min"] == pytest.approx(other["sigma_min"], rel=1e-5)
    reg().backward()
    assert model.a.weight.grad.any()


def test_to_the_device_where_it_is_changes_nothing():
    model = net()
    reg = regularizer(model, "conditioning")
    reg()
    before = reg.state_dict()
    check_move(model, reg, "cpu")
    assert reg.step_count == 0
    assert equal(reg.state_dict(), before)


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
@pytest.mark.gpu
@pytest.mark.parametrize("told", [False, True])
def test_the_state_goes_to_a_gpu_and_back(told):
    model = net()
    reg = regularizer(model, "conditioning", refresh_interval=100)
    reg()
    check_move(model, reg, "cuda")
    state = reg.state_dict()
    fresh = regularizer(net(), "conditioning")
    fresh.load_state_dict(state)
    assert fresh.state_dict()["layers"]["a@5x6"]["vectors"].device.type == "cpu"
    if told:
        check_move(model, reg, "cpu")
    else:
        model.to("cpu")
        assert reg().device.type == "cpu"


def test_a_state_from_a_file_is_read_without_its_device():
    reg = regularizer(net(), "conditioning")
    reg()
    file = io.BytesIO()
    torch.save(reg.state_dict(), file)
    file.seek(0)
    state = torch.load(file, weights_only=True, map_location="cpu")
    assert equal(state, reg.state_dict())


# --- killed ---------------------------------------------------------------------------------------


def program(folder: Path, name: str, fused: bool, kill: bool) -> None:
    """A training run that goes on from its last checkpoint; killed once in the middle of a step."""
    torch.set_num_threads(1)  # as in this process: sums may depend on it
    model = net()
    optimizer, reg = adam(model, fused), regularizer(model, name)
    checkpoint = folder / "checkpoint.pt"
    values, first = [], 0
    if checkpoint.exists():
        state = torch.load(checkpoint, weights_only=True)
        model.load_state_dict(state["model"])
        optimizer.load_state_dict(state["optimizer"])
        reg.load_state_dict(state["reg"])
        values, first = state["values"], state["step"] + 1
    for step in range(first, STEPS):
        values.append(train(model, optimizer, reg, step))
        if kill and step == STOP + 1:
            signal.raise_signal(signal.SIGKILL)
        state = {"model": model.state_dict(), "optimizer": optimizer.state_dict()}
        state |= {"reg": reg.state_dict(), "values": values, "step": step}
        torch.save(state, folder / "new.pt")
        (folder / "new.pt").replace(checkpoint)
    report = {"text": str(reg.report()), "records": reg.report().records()}
    torch.save(state | {"report": report}, folder / "end.pt")


def start_and_kill(folder: Path, name: str, fused: bool) -> subprocess.CompletedProcess:
    code = (
        "import pathlib, sys\n"
        f"sys.path[:0] = [{str(Path(__file__).parent)!r}, {str(Path(__file__).parents[1])!r}]\n"
        "import test_regularizer_resume as tests\n"
        f"tests.program(pathlib.Path({str(folder)!r}), {name!r}, {fused}, True)\n"
    )
    return subprocess.run(
        [sys.executable, "-c", code], check=False, timeout=120, capture_output=True, text=True
    )


@pytest.mark.parametrize("fused", [False, True])
def test_a_run_that_was_killed_goes_on_bit_for_bit(tmp_path, fused):
    """In another process than the one that was killed, as always."""
    killed, whole = tmp_path / "killed", tmp_path / "whole"
    for folder in (killed, whole):
        folder.mkdir()
    process = start_and_kill(killed, "conditioning", fused)
    assert process.returncode == -signal.SIGKILL, process.stderr
    reached = torch.load(killed / "checkpoint.pt", weights_only=True)
    assert reached["step"] == STOP
    assert not (killed / "end.pt").exists()
    for folder in (killed, whole):
        program(folder, "conditioning", fused, False)
    got, expected = (torch.load(folder / "end.pt", weights_only=True) for folder in (killed, whole))
    assert len(set(expected["values"])) == STEPS, "every step does something"
    assert equal(got, expected)
