"""The command line: what it writes, prints and refuses."""

import json

import pytest

import convspectra
from convspectra.cli._main import main

SMALL = ["--depth", "2", "--deep", "3", "--channels", "2", "--steps", "2", "--penalty-steps", "1"]


def test_version(capsys):
    with pytest.raises(SystemExit) as exit_:
        main(["--version"])
    assert exit_.value.code == 0
    assert capsys.readouterr().out.strip() == convspectra.__version__


def test_a_command_is_required(capsys):
    with pytest.raises(SystemExit):
        main([])
    assert "COMMAND" in capsys.readouterr().err


def test_demo_writes_and_prints_where(tmp_path, capsys):
    assert main(["demo", *SMALL, "--batch-size", "700", "--out", str(tmp_path / "out")]) == 0
    printed = capsys.readouterr().out
    names = [f"stable_gradients.{kind}" for kind in ("png", "svg", "md", "csv", "json")]
    for name in names:
        assert (tmp_path / "out" / name).stat().st_size > 0
        assert f"wrote {tmp_path / 'out' / name}" in printed
    results = json.loads((tmp_path / "out" / "stable_gradients.json").read_text())
    assert results["settings"]["depth"] == 2
    assert results["images"].startswith("scikit-learn digits")


def test_demo_refuses_a_folder_without_images(tmp_path, capsys):
    assert main(["demo", "--data", str(tmp_path), "--out", str(tmp_path)]) == 2
    assert "expected train-images-idx3-ubyte" in capsys.readouterr().err


def test_reproduce_writes_and_prints_where(tmp_path, capsys):
    arguments = ["--input-size", "4", "--max-iter", "2", "--further-max-iter", "1"]
    assert main(["reproduce", *arguments, "--sizes", "1x2", "--out", str(tmp_path)]) == 0
    printed = capsys.readouterr().out
    written = sorted(path for path in tmp_path.iterdir())
    assert {path.suffix for path in written} >= {".png", ".svg", ".csv"}
    assert all(f"wrote {path}" in printed for path in written)


def test_reproduce_refuses_sizes_that_are_none(capsys):
    with pytest.raises(SystemExit):
        main(["reproduce", "--sizes", "3by1"])
    assert "expected two numbers of channels as in 2x3, got 3by1" in capsys.readouterr().err


def test_reproduce_refuses_an_input_that_is_too_small(tmp_path, capsys):
    assert main(["reproduce", "--input-size", "1", "--out", str(tmp_path)]) == 2
    assert "expected an input_size of at least 2" in capsys.readouterr().err


def test_what_is_nested_too_deeply_is_one_line(tmp_path, capsys):
    path = tmp_path / "deep.json"
    path.write_text("[" * 100_000)
    assert main(["show", str(path)]) == 2
    assert capsys.readouterr().err.count("\n") == 1


def test_a_failure_is_shown_as_it_is_written(tmp_path, capsys):
    assert main(["show", str(tmp_path / ":boom:\x1b[31m.json")]) == 2
    assert r":boom:\x1b[31m.json" in capsys.readouterr().err
