"""The commands of the stable-gradients experiment: tables, resuming, figures."""

from __future__ import annotations

import csv
import re
import subprocess
import sys
from dataclasses import asdict, replace
from pathlib import Path

import pytest
from helpers.idx_files import write_random_set

from experiments.stable_gradients import command, figures, page, plain, residual, table
from experiments.stable_gradients.arms import arms_for
from experiments.stable_gradients.command import FULL, QUICK, runs
from experiments.stable_gradients.table import Row
from experiments.stable_gradients.training import Record, Run, Settings, train

ARMS = ["plain", "SRIP", "circular projection", "stein"]


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("images", numbered=False)
    write_random_set(path)
    return path


@pytest.fixture(scope="module")
def out(folder: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Tables of both kinds of network."""
    path = tmp_path_factory.mktemp("out")
    plain.main(arguments(folder, path))
    residual.main(arguments(folder, path, "--activations", "tanh"))
    return path


def arguments(folder: Path, out: Path, *more: str) -> list[str]:
    return ["--quick", "--data", str(folder), "--out", str(out), "--arms", *ARMS, *more]


def row(run: Run, status: str = "finished", note: str = "", accuracy: float = 0.5) -> Row:
    lists = [1.0] * run.depth
    record = Record(
        status, note, 4, 1.5, [0, 4], [2.0, 1.0], [0.1, accuracy], [1e-3, 0.5],
        lists, lists, lists, lists,
    )  # fmt: skip
    return Row(run, "noise, 8 x 8", Settings(), "a machine", "a command", record)


def test_a_table_has_a_row_for_each_run(folder: Path, out: Path) -> None:
    rows = table.read(out / "plain.csv")
    assert [(r.run.arm, r.run.depth, r.run.activation) for r in rows] == [
        (arm, 4, "relu") for arm in ARMS
    ]
    assert {(r.run.network, r.run.activation) for r in table.read(out / "residual.csv")} == {
        ("residual", "tanh")
    }
    assert {r.settings for r in rows} == {QUICK.settings}
    name = "python -m experiments.stable_gradients.plain"
    assert {r.command for r in rows} == {f"{name} --data {folder.name} --quick"}
    assert {len(r.record.gradients_end) for r in rows} == {4}


def test_rows_are_those_of_a_run_by_hand(folder: Path, out: Path) -> None:
    images = command.data.load(folder, QUICK.settings.train_images, QUICK.settings.test_images)
    record = train(Run("plain", "SRIP", 4, "relu", 0), images, QUICK.settings)
    found = next(r for r in table.read(out / "plain.csv") if r.run.arm == "SRIP").record
    for name in ("losses", "accuracies", "ratios", "gradients_end", "sigma_max", "sigma_min"):
        expected = pytest.approx(getattr(record, name), rel=1e-5, nan_ok=True)
        assert getattr(found, name) == expected


def test_a_second_command_runs_nothing(folder: Path, out: Path) -> None:
    before = (out / "plain.csv").read_bytes()
    assert plain.main(arguments(folder, out)) == []
    assert (out / "plain.csv").read_bytes() == before


def test_a_killed_command_goes_on_where_it_stopped(folder: Path, out: Path, tmp_path: Path) -> None:
    """Killed in the middle of writing the third row."""
    lines = (out / "plain.csv").read_bytes().splitlines(keepends=True)
    path = tmp_path / "plain.csv"
    path.write_bytes(b"".join(lines[:3]) + lines[3][:100])
    added = plain.main(arguments(folder, tmp_path))
    assert [r.run.arm for r in added] == ARMS[2:]
    timeless = [
        [replace(r, command="", record=replace(r.record, seconds=0.0)) for r in table.read(p)]
        for p in (path, out / "plain.csv")
    ]
    assert repr(timeless[0]) == repr(timeless[1])


@pytest.mark.parametrize("more", [["--learning-rate", "0.01"], ["--seeds", "1"]])
def test_other_settings_are_other_runs(
    folder: Path, out: Path, tmp_path: Path, more: list[str]
) -> None:
    (tmp_path / "plain.csv").write_bytes((out / "plain.csv").read_bytes())
    added = plain.main([*arguments(folder, tmp_path, *more)])
    assert [r.run.arm for r in added] == ARMS
    assert {r.command.split("--quick ")[1] for r in added} == {" ".join(more)}


def test_workers_give_the_same_rows(folder: Path, out: Path, tmp_path: Path) -> None:
    plain.main(arguments(folder, tmp_path, "--workers", "2"))
    alone, together = (
        {r.run.arm: repr(replace(r.record, seconds=0.0)) for r in table.read(p / "plain.csv")}
        for p in (out, tmp_path)
    )
    assert alone == together


def test_a_diverged_run_is_a_row_and_the_command_goes_on(folder: Path, tmp_path: Path) -> None:
    rows = plain.main(arguments(folder, tmp_path, "--learning-rate", "1e37"))
    assert [r.run.arm for r in rows] == ARMS
    read = table.read(tmp_path / "plain.csv")
    assert read[0].record.status == "diverged"
    figures.main(["--out", str(tmp_path)])
    assert "1 diverged, 1 of 3 seeds" in (tmp_path / "stable_gradients.md").read_text()


def test_runs_are_balanced_however_far_they_got() -> None:
    planned = runs("plain", ("a", "b"), FULL)
    assert len(planned) == len(set(planned)) == 3 * 4 * 2 * 2
    assert [run.seed for run in planned] == sorted(run.seed for run in planned)
    first_seed = [run.depth for run in planned if run.seed == 0]
    assert first_seed == sorted(first_seed)
    assert [run.arm for run in planned[:4]] == ["a", "b", "a", "b"]


@pytest.mark.parametrize(
    ("given", "match"),
    [
        ([], "expected --data: .*dataset-fashion-mnist"),
        (["--data", "absent"], "expected a folder of images, got absent"),
        (["--arms", "dropout"], "invalid choice: 'dropout'"),
        (["--data", ".", "--steps", "0"], "expected steps to be at least 1, got 0"),
    ],
)
def test_what_cannot_run_is_one_line(
    given: list[str], match: str, capsys: pytest.CaptureFixture[str]
) -> None:
    with pytest.raises(SystemExit, match="2"):
        plain.main(["--quick", *given])
    error = capsys.readouterr().err.splitlines()[-1]
    assert re.search(match, error)


def test_a_table_of_other_columns_is_refused(tmp_path: Path) -> None:
    (tmp_path / "plain.csv").write_text("arm,accuracy\nplain,0.5\n")
    with pytest.raises(ValueError, match="of another version: give another --out, or move it"):
        table.read(tmp_path / "plain.csv")


def test_a_broken_cell_is_refused_with_its_line(out: Path, tmp_path: Path) -> None:
    path = tmp_path / "plain.csv"
    path.write_text((out / "plain.csv").read_text().replace("finished,,4,", "finished,,four,", 1))
    with pytest.raises(ValueError, match=r"plain\.csv, line 2: "):
        table.read(path)


def test_rows_come_back_as_written(tmp_path: Path) -> None:
    written = [
        row(Run("plain", "SRIP", 2, "relu", 0)),
        row(Run("plain", "OCNN", 3, "tanh", 1), "stopped", 'two\nlines, "and" a comma'),
    ]
    path = tmp_path / "deep" / "plain.csv"
    for one in written:
        table.append(path, [one])
    read = table.read(path)
    assert read[0] == written[0]
    assert read[1].record.note == 'two lines, "and" a comma'
    assert len(path.read_text().splitlines()) == 3
    with path.open(newline="") as file:
        assert len(list(csv.DictReader(file))) == 2


def test_figures_and_page_are_written_from_the_tables(out: Path) -> None:
    files = figures.main(["--out", str(out)])
    assert len(files) == 2 * (3 * 2 + 1) + 1
    assert all(path.stat().st_size > 0 for path in files)
    text = (out / "stable_gradients.md").read_text()
    assert "## Plain networks, images, 8 x 8" in text
    assert "## Residual networks with batch normalization, images, 8 x 8" in text
    assert "- machine: " in text
    assert "steps 4" in text
    for name in text.split("![")[1:]:
        assert (out / name.split("]")[0]).is_file()
    accuracy = table.read(out / "plain.csv")[0].record.accuracies[-1]
    expected = f"| plain | {100 * accuracy:.1f}%, 1 of 3 seeds |"
    assert expected in text
    assert "| weight decay | not run | not run |" in text
    (summary,) = [path for path in files if path.name == "plain_images_summary.csv"]
    assert f"[{summary.name}]({summary.name})" in text
    lines = list(csv.DictReader(summary.read_text().splitlines()))
    assert len(lines) == 2 * len(page.QUANTITIES) * len(arms_for("plain"))
    assert {line["quantity"] for line in lines} == set(page.QUANTITIES)


def test_the_page_shows_mean_and_range_over_seeds() -> None:
    rows = [
        row(Run("plain", "SRIP", 10, "relu", seed), accuracy=accuracy)
        for seed, accuracy in enumerate((0.2, 0.4, 0.9))
    ]
    rows.append(row(Run("plain", "OCNN", 10, "relu", 0), "diverged"))
    rows.append(row(Run("plain", "OCNN", 10, "relu", 1)))
    (group,) = page.groups(rows)
    lines = page.markdown(group, [], "summary.csv").splitlines()
    (accuracy, *_), (ocnn, *_) = (
        [line for line in lines if line.startswith(f"| {arm} |")] for arm in ("SRIP", "OCNN")
    )
    assert accuracy == "| SRIP | 50.0% | not run | not run | not run |"
    assert "relu,SRIP,Test accuracy at the end,50.0% (20.0 to 90.0),not run" in page.summary_csv(
        group
    )
    assert ocnn.startswith("| OCNN | 50.0%, 1 diverged, 2 of 3 seeds | not run")


def test_rows_that_may_not_be_compared_are_in_different_groups() -> None:
    one = row(Run("plain", "SRIP", 10, "relu", 0), accuracy=0.1)
    again = row(Run("plain", "SRIP", 10, "relu", 0), accuracy=0.2)
    other = replace(one, settings=Settings(steps=7))
    found = page.groups([one, again, other])
    assert [group.slug for group in found] == ["plain_noise", "plain_noise-2"]
    assert found[0].rows == (again,)


def test_geometric_mean() -> None:
    assert page.geometric_mean([1e-4, 1.0, 1e-2]) == pytest.approx(1e-2)
    assert page.geometric_mean([0.0, 1.0]) == 0


def test_figures_without_a_table_say_what_to_run(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    with pytest.raises(SystemExit, match="2"):
        figures.main(["--out", str(tmp_path)])
    assert "run python -m experiments.stable_gradients.plain first" in capsys.readouterr().err


def test_commands_are_modules() -> None:
    asked = [sys.executable, "-m", "experiments.stable_gradients.plain", "--help"]
    answer = subprocess.run(asked, capture_output=True, text=True, check=True, timeout=60)
    assert "--penalty-weight" in answer.stdout
    assert set(asdict(Settings())) <= {
        word.removeprefix("--").replace("-", "_") for word in answer.stdout.split()
    }
