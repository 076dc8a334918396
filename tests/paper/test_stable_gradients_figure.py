"""Figure and table of the stable-gradients experiment, from made-up results."""

import csv
import itertools
import sys

import pytest

from convspectra.paper.stable_gradients_figure import COLUMNS, draw, markdown, table, write


def run(name, ratio=0.5, accuracy=0.9, depth=20):
    return {
        "name": name,
        "depth": depth,
        "learning_rate": 0.001,
        "steps": [0, 8],
        "gradient_norms": [[1e-9, 1.0, 2.0], [ratio, 1.0, 1.0]],
        "accuracy": [0.1, accuracy],
        "extreme_singular_values": [[0.1, 0.5], [0.2, 0.6], [0.3, 0.7]],
    }


RESULTS = {
    "images": "noise, 5 x 4",
    "train_images": 20,
    "test_images": 7,
    "settings": {
        "depth": 20,
        "deep": 100,
        "channels": 2,
        "steps": 8,
        "batch_size": 4,
        "rate_budget": 3.0,
        "normalized_learning_rate": 0.001,
        "penalty_rate": 0.1,
        "penalty_steps": 4,
        "penalty_interval": 2,
        "seed": 0,
    },
    "runs": [
        run("default", accuracy=0.1),
        run("prepare", 0.25),
        run("default", accuracy=0.1, depth=100),
        run("prepare", 0.25, depth=100),
    ],
}


def test_table_has_the_numbers():
    rows = table(RESULTS)
    assert [list(row) for row in rows] == [list(COLUMNS)] * 4
    expected = ["prepare", "20", "90.0%", "5.0e-10", "2.5e-01", "2.0e-01", "0.6", "1.0e-03"]
    assert list(rows[1].values()) == expected


def test_a_vanished_gradient_is_said_and_not_divided_by():
    dead = run("default")
    dead["gradient_norms"][-1] = [0.0, 0.0, 0.0]
    assert table({**RESULTS, "runs": [dead]})[0][COLUMNS[4]] == "no gradient left"


def test_markdown_and_csv_hold_the_same_cells(tmp_path):
    write(RESULTS, tmp_path)
    text = (tmp_path / "stable_gradients.csv").read_text(encoding="utf-8")
    rows = list(csv.reader(text.splitlines()))
    lines = [line for line in markdown(RESULTS).splitlines() if line.startswith("| ")]
    assert [line.strip("| ").split(" | ") for line in lines] == rows


def test_markdown_says_what_was_trained():
    text = markdown(RESULTS)
    assert "20 and 100 layers of 2 channels" in text
    assert "20 training images (noise, 5 x 4)" in text


def test_figure(tmp_path):
    *_, png, svg = write(RESULTS, tmp_path)
    assert png.read_bytes().startswith(b"\x89PNG")
    assert svg.read_text().startswith("<?xml")
    assert "<svg" in svg.read_text()


def test_without_matplotlib_the_extra_is_named(monkeypatch):
    monkeypatch.setitem(sys.modules, "matplotlib.figure", None)
    with pytest.raises(ImportError, match=r"convspectra\[demo\]"):
        draw(RESULTS)


def test_labels_do_not_overlap_and_ticks_are_layers():
    figure = draw(RESULTS)
    accuracy, _, by_layer, _ = figure.axes
    heights = sorted(text.get_position()[1] for text in accuracy.texts)
    assert min(b - a for a, b in itertools.pairwise(heights)) >= 5.9
    assert {text.get_text() for text in accuracy.texts} == {"default", "prepare"}
    assert all(float(tick).is_integer() for tick in by_layer.get_xticks())
