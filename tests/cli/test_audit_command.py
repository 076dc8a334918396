"""``convspectra audit``, ``compare`` and ``show``: what they write, print, refuse and exit with."""

from __future__ import annotations

import os
import socket
import subprocess
import sys
import warnings
from pathlib import Path

import pytest
import torch
from torch import nn

import convspectra as cs
from convspectra.cli._main import main

INPUT = ["--input", "2x6x6"]


def saved(path: Path, scale: float = 1.0) -> str:
    """A TorchScript archive of two convolutions and a normalization."""
    torch.manual_seed(0)
    model = nn.Sequential(
        nn.Conv2d(2, 3, 3, padding=1), nn.BatchNorm2d(3), nn.ReLU(), nn.Conv2d(3, 3, 3, padding=1)
    ).eval()
    with torch.no_grad():
        model[3].weight *= scale
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", DeprecationWarning)
        torch.jit.script(model).save(str(path))
    return str(path)


def test_it_prints_and_writes_everything(tmp_path, capsys):
    outputs = [tmp_path / "new" / f"a.{kind}" for kind in ("json", "csv", "html")]
    options = [word for path in outputs for word in (f"--{path.suffix[1:]}", str(path))]
    assert main(["audit", saved(tmp_path / "m.pt"), *INPUT, *options]) == 0
    printed = capsys.readouterr().out
    assert all(path.stat().st_size > 0 and f"wrote {path}" in printed for path in outputs)
    report = cs.AuditReport.from_json(outputs[0])
    assert len(report.layers) == 2
    assert report.layers[0].folded is not None
    assert sorted(p.name for p in outputs[0].parent.iterdir()) == ["a.csv", "a.html", "a.json"]


def test_a_rule_decides_the_exit_status(tmp_path, capsys):
    model = saved(tmp_path / "m.pt", 100.0)
    assert main(["audit", model, *INPUT, "--fail-if", "sigma_max > 1e6"]) == 0
    assert main(["audit", model, *INPUT, "--fail-if", "sigma_max > 10"]) == 1
    assert '"sigma_max > 10" fails at' in capsys.readouterr().out
    with pytest.raises(SystemExit) as refused:
        main(["audit", model, *INPUT, "--fail-if", "size > 10"])
    assert refused.value.code == 2


def unaudited() -> nn.Module:
    """A layer with a weight that no operator takes, and that alone."""
    return nn.LSTM(6, 3)


def test_a_rule_that_no_layer_decides_fails(tmp_path, capsys):
    factory = ["--factory", f"{__name__}:unaudited", "--input", "6"]
    assert main(["audit", *factory, "--fail-if", "sigma_max > 10"]) == 1
    printed = capsys.readouterr().out
    assert '"sigma_max > 10" fails: it cannot be decided at any layer' in printed
    assert main(["audit", *factory]) == 0


@pytest.mark.parametrize("content", [b"", b"no model at all", b"PK\x03\x04 cut short"])
def test_a_broken_file_is_one_line_and_exit_status_2(tmp_path, capsys, content):
    path = tmp_path / "model.onnx"
    path.write_bytes(content)
    assert main(["audit", str(path), *INPUT]) == 2
    message = capsys.readouterr().err
    assert message.startswith("convspectra: ")
    assert message.count("\n") == 1
    assert main(["audit", str(tmp_path / "none.onnx"), *INPUT]) == 2


def test_resume_needs_a_place_to_resume_from(tmp_path, capsys):
    assert main(["audit", saved(tmp_path / "m.pt"), *INPUT, "--resume"]) == 2
    assert "with --resume, got none" in capsys.readouterr().err


def test_the_journal_is_kept_where_asked_and_taken_up(tmp_path, capsys):
    model, journal = saved(tmp_path / "m.pt"), tmp_path / "journal"
    options = [*INPUT, "--journal", str(journal), "--json", str(tmp_path / "a.json")]
    assert main(["audit", model, *options]) == 0
    first = cs.AuditReport.from_json(tmp_path / "a.json")
    assert main(["audit", model, *options, "--resume"]) == 0
    assert cs.AuditReport.from_json(tmp_path / "a.json").layers == first.layers
    assert main(["audit", model, *options]) == 0
    assert cs.AuditReport.from_json(tmp_path / "a.json").layers != first.layers  # other seconds


def test_other_files_beside_a_journal_stay(tmp_path, capsys):
    model = saved(tmp_path / "m.pt")
    others = [tmp_path / name for name in ("m.py", "m.json", "m.onnx")]
    for path in others:
        path.write_text("mine")
    assert main(["audit", model, *INPUT, "--journal", str(tmp_path / "m")]) == 0
    assert main(["audit", model, *INPUT, "--journal", str(tmp_path / "m")]) == 0
    assert all(path.read_text() == "mine" for path in others)
    assert sorted(path.name for path in tmp_path.iterdir()) == [
        "m",
        "m.json",
        "m.onnx",
        "m.pt",
        "m.py",
    ]


OUTPUTS = ["--json", "--csv", "--html", "--journal"]


@pytest.mark.parametrize("option", OUTPUTS)
@pytest.mark.parametrize("path", ["m.pt", "link", "folder", "m.pt/a", "closed/a"])
def test_outputs_that_cannot_be_written(tmp_path, capsys, monkeypatch, option, path):
    monkeypatch.chdir(tmp_path)
    model = Path(saved(Path("m.pt"))).read_bytes()
    Path("link").symlink_to("m.pt")
    Path("folder").mkdir()
    Path("closed").mkdir(mode=0o555)
    allowed = os.access
    monkeypatch.setattr(os, "access", lambda p, m: Path(p).name != "closed" and allowed(p, m))
    assert main(["audit", "m.pt", *INPUT, option, path]) == 2
    message = capsys.readouterr().err
    assert message.startswith("convspectra: expected a file ")
    assert f"for {option}, got {path}" in message
    assert message.count("\n") == 1
    assert Path("m.pt").read_bytes() == model


@pytest.mark.parametrize("option", OUTPUTS)
@pytest.mark.parametrize("path", ["loop", "loop/a"])
def test_a_link_that_leads_to_itself(tmp_path, capsys, monkeypatch, option, path):
    monkeypatch.chdir(tmp_path)
    Path("loop").symlink_to("loop")
    assert main(["audit", saved(Path("m.pt")), *INPUT, option, path]) == 2
    assert f"for {option}, got {path}, a link that leads to itself" in capsys.readouterr().err
    assert main(["audit", path, *INPUT]) == 2
    assert main(["show", path]) == 2
    assert capsys.readouterr().err.count("\n") == 2


def run_command(*arguments, before="", reader="cat"):
    """What a shell gets of the command: its exit status, the output behind a pipe, its errors."""
    code = f"import sys\n{before}\nfrom convspectra.cli import main\nsys.exit(main(sys.argv[1:]))"
    command = [sys.executable, "-c", code, *arguments]
    script = f'"$@" | {reader}; exit ${{PIPESTATUS[0]}}'
    return subprocess.run(
        ["bash", "-c", script, "audit", *command], capture_output=True, text=True, check=False
    )


@pytest.mark.parametrize(("rule", "status"), [("sigma_max > 1e9", 0), ("sigma_max > 0", 1)])
def test_a_reader_that_leaves_changes_nothing(tmp_path, rule, status):
    model, report = saved(tmp_path / "m.pt"), tmp_path / "a.json"
    options = ["--json", str(report), "--fail-if", rule]
    # It reads nothing at all: the first line finds nobody there.
    done = run_command("audit", model, *INPUT, *options, reader="true")
    assert (done.returncode, done.stderr) == (status, "")
    assert len(cs.AuditReport.from_json(report).layers) == 2


def test_a_full_disk_leaves_no_half_file(tmp_path):
    model, page = saved(tmp_path / "m.pt"), tmp_path / "out" / "a.html"
    page.parent.mkdir()
    page.write_text("before")
    # No file may grow beyond 16 KiB: that is what a full disk looks like to the writer.
    limit = "import resource; resource.setrlimit(resource.RLIMIT_FSIZE, (16384, 16384))"
    done = run_command("audit", model, *INPUT, "--html", str(page), before=limit)
    assert done.returncode == 2
    assert done.stderr.count("\n") == 1
    assert str(page) in done.stderr
    assert page.read_text() == "before"
    assert sorted(path.name for path in page.parent.iterdir()) == ["a.html", "a.html.journal"]


@pytest.mark.parametrize("options", [[], ["--resume"]])
def test_a_journal_that_is_another_file(tmp_path, capsys, options):
    other = tmp_path / "other"
    other.write_text("mine")
    model = saved(tmp_path / "m.pt")
    assert main(["audit", model, *INPUT, "--journal", str(other), *options]) == 2
    assert "other, which is neither" in capsys.readouterr().err
    assert other.read_text() == "mine"


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (["--max-gib", "inf"], "expected --max-gib to be positive and finite, got inf"),
        (["--max-gib", "-1"], "expected --max-gib to be positive and finite, got -1.0"),
        (["--max-gib", "1e300"], "expected --max-gib to be below 2**33"),
        (["--max-gib", "nan"], "expected --max-gib to be positive and finite, got nan"),
        (["--devices", "foo"], "expected devices that can compute here"),
        (["--devices", "cpu", "meta"], "expected devices that can compute here"),
        (["--devices", "cuda:99"], "expected devices that can compute here"),
        (["--workers", "0"], "expected workers to be a positive integer"),
        (["--json", "a", "--csv", "a"], "for --csv, got a, that of --json"),
    ],
)
def test_options_that_cannot_be(tmp_path, capsys, monkeypatch, options, message):
    monkeypatch.chdir(tmp_path)
    assert main(["audit", saved(Path("m.pt")), *INPUT, *options]) == 2
    printed = capsys.readouterr().err
    assert message in printed
    assert printed.count("\n") == 1


def test_the_input_shape_is_that_of_the_api(tmp_path):
    report = tmp_path / "a.json"
    assert main(["audit", saved(tmp_path / "m.pt"), *INPUT, "--json", str(report)]) == 0
    by_api = cs.audit(torch.nn.Conv2d(2, 3, 3), torch.zeros(1, 2, 6, 6))
    found = cs.AuditReport.from_json(report).circumstances.input_shape
    assert found == by_api.circumstances.input_shape == "1x2x6x6"


def test_a_name_is_no_emoji(tmp_path, capsys):
    path = saved(tmp_path / ":boom:.pt")
    assert main(["audit", path, *INPUT, "--json", str(tmp_path / ":boom:.json")]) == 0
    assert "/:boom:.json" in capsys.readouterr().out


def test_two_audits_side_by_side(tmp_path, capsys):
    for name, scale in (("a", 1.0), ("b", 3.0)):
        model = saved(tmp_path / f"{name}.pt", scale)
        assert main(["audit", model, *INPUT, "--json", str(tmp_path / f"{name}.json")]) == 0
    capsys.readouterr()
    assert main(["compare", str(tmp_path / "a.json"), str(tmp_path / "b.json")]) == 0
    assert capsys.readouterr().out.startswith("A: ")
    assert main(["compare", str(tmp_path / "a.json"), str(tmp_path / "a.pt")]) == 2


def test_a_written_audit_is_shown_again(tmp_path, capsys):
    report = tmp_path / "a.json"
    assert main(["audit", saved(tmp_path / "m.pt"), *INPUT, "--json", str(report)]) == 0
    assert main(["show", str(report), "--html", str(tmp_path / "a.html")]) == 0
    assert "product of all sigma_max" in capsys.readouterr().out
    assert (tmp_path / "a.html").stat().st_size > 0


def test_ranks_share_the_layers_and_the_first_reports(tmp_path):
    report = tmp_path / "a.json"
    launcher = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node=2"]
    command = ["-m", "convspectra.cli", "audit", saved(tmp_path / "m.pt"), *INPUT]
    done = subprocess.run(
        [*launcher, *command, "--json", str(report)], capture_output=True, text=True, check=False
    )
    assert done.returncode == 0, done.stderr
    alone = tmp_path / "b.json"
    assert main(["audit", str(tmp_path / "m.pt"), *INPUT, "--json", str(alone)]) == 0
    layers = [cs.AuditReport.from_json(path).layers for path in (report, alone)]
    assert [vars(a) | {"seconds": 0} for a in layers[0]] == [
        vars(b) | {"seconds": 0} for b in layers[1]
    ]
    assert done.stdout.count("product of all sigma_max") == 1


@pytest.mark.parametrize(
    ("arguments", "absent", "text"),
    [
        (["audit", "--help"], {"torch", "jinja2", "numpy"}, "--fail-if"),
        (["--help"], {"torch", "jinja2", "numpy", "rich", "importlib.metadata"}, "commands:"),
    ],
)
def test_help_loads_nothing_heavy(arguments, absent, text):
    code = (
        "import sys\nbefore = set(sys.modules)\nfrom convspectra.cli import main\n"
        f"try:\n    main({arguments})\nexcept SystemExit:\n    pass\n"
        f"loaded = {absent} & (set(sys.modules) - before)\nassert not loaded, loaded\n"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    assert text in done.stdout


@pytest.mark.slow
def test_two_machines_meet_and_go_on_from_the_journals(tmp_path):
    report, model = tmp_path / "a.json", saved(tmp_path / "m.pt")
    with socket.socket() as free:
        free.bind(("localhost", 0))
        port = free.getsockname()[1]
    launcher = [
        sys.executable, "-m", "torch.distributed.run", "--nnodes=2", "--nproc-per-node=2",
        "--rdzv-backend=c10d", f"--rdzv-endpoint=localhost:{port}", "--local-addr=localhost",
    ]  # fmt: skip
    command = ["-m", "convspectra.cli", "audit", model, *INPUT, "--resume"]
    kept = ["--journal", str(tmp_path / "journal"), "--json", str(report)]
    machines = [subprocess.Popen([*launcher, *command, *kept]) for _ in range(2)]
    assert [machine.wait(timeout=240) for machine in machines] == [0, 0]
    first = cs.AuditReport.from_json(report).layers
    assert len(first) == 2
    assert list(tmp_path.glob("journal.*"))
    assert main(["audit", model, *INPUT, "--resume", *kept]) == 0  # from the journals of all ranks
    assert cs.AuditReport.from_json(report).layers == first
