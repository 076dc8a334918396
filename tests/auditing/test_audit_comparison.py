"""Two audits side by side."""

import dataclasses
import math

import pytest
from helpers.made_up_audit import certified, conditioning, layer, small_audit

from convspectra.auditing._comparison import (
    BEYOND,
    CHANGE_IMPORTANCE,
    CHANGE_TEXTS,
    SAME,
    UNKNOWN,
    WITHIN,
    change,
    compare,
)
from convspectra.auditing._record import LayerAudit


def test_an_audit_and_itself():
    rows = compare(small_audit(), small_audit())
    assert [line["name"] for line in rows] == [audit.name for audit in small_audit()]
    assert rows[0] == {
        "name": "stem.conv",
        "input size": "16x16x16",
        "sigma_max A": "1.800",
        "sigma_max B": "1.800",
        "sigma_max B/A": "1.000",
        "sigma_max change": SAME,
        "sigma_min A": "0.02130",
        "sigma_min B": "0.02130",
        "sigma_min B/A": "1.000",
        "sigma_min change": SAME,
        "condition A": "84.51",
        "condition B": "84.51",
        "folded sigma_max A": "2.400",
        "folded sigma_max B": "2.400",
        "folded sigma_max B/A": "1.000",
        "folded sigma_max change": SAME,
        "folded sigma_min A": "0.03000",
        "folded sigma_min B": "0.03000",
        "folded sigma_min B/A": "1.000",
        "folded sigma_min change": SAME,
        "rank A": "4096",
        "rank B": "4096",
        "growth A": "-0.4321",
        "growth B": "-0.4321",
        "note": "",
    }
    assert set(rows[0]) >= {*CHANGE_IMPORTANCE, *CHANGE_TEXTS}
    assert (rows[1]["rank A"], rows[1]["growth A"]) == ("1000 of 1024", "minus infinite (singular)")
    assert rows[3]["growth B"] == "not known"
    assert rows[1]["folded sigma_max B/A"] == "-"
    assert rows[1]["sigma_min B/A"] == "both 0"
    assert rows[5]["sigma_max B/A"] == "-"
    assert rows[5]["note"] == "skipped in A: not a convolution; skipped in B: not a convolution"


def test_changes_are_told_from_the_enclosures():
    wide = layer("a", applied=conditioning(certified(2.0, 0.1), certified(1.0, 0.1)))
    moved = layer("a", applied=conditioning(certified(2.1, 0.1), certified(0.5, 0.1)))
    (line,) = compare([wide], [moved])
    assert line["sigma_max change"] == WITHIN
    assert line["sigma_min change"] == BEYOND
    assert line["sigma_min B/A"] == "0.5000"


@pytest.mark.parametrize(
    ("changes", "expected"),
    [
        ({"lower": 0.0, "upper": 3.0}, UNKNOWN),
        ({"upper": math.inf}, UNKNOWN),
        ({"lower": 0.0, "upper": 1e-9, "value": 1e-10}, BEYOND),
        ({"lower": 5.0, "upper": math.inf, "value": 6.0}, BEYOND),
        ({"lower": 5.0, "upper": 7.0, "value": 6.0, "converged": False}, UNKNOWN),
    ],
)
def test_without_enclosure_only_disjoint_bounds_tell(changes, expected):
    a = certified(1.0, 0.1)
    b = dataclasses.replace(certified(1.01, 0.1), **changes)
    assert change(a, b) == change(b, a) == expected


def test_layers_in_one_audit_only():
    rows = compare([layer("a"), layer("b")], [layer("c"), layer("b")])
    assert [(line["name"], line["note"]) for line in rows] == [
        ("a", "only in A"),
        ("b", ""),
        ("c", "only in B"),
    ]
    assert (rows[0]["sigma_max A"], rows[0]["sigma_max B"]) == ("1.800", "-")
    assert (rows[2]["condition A"], rows[2]["condition B"]) == ("-", "84.51")


def test_the_same_name_at_two_sizes_is_two_rows():
    small = layer("a", input_shape=(16, 8, 8))
    rows = compare([layer("a"), small], [small])
    assert [(line["input size"], line["note"]) for line in rows] == [
        ("16x16x16", "only in A"),
        ("16x8x8", ""),
    ]


def test_a_layer_that_runs_twice_is_matched_in_order():
    rows = compare([layer("a"), layer("a")], [layer("a")])
    assert [line["note"] for line in rows] == ["", "only in A"]


def test_a_layer_skipped_on_one_side():
    skipped = LayerAudit("a", "Conv2d", input_shape=(16, 16, 16), skipped="too large")
    (line,) = compare([layer("a")], [skipped])
    assert line["note"] == "skipped in B: too large"
    assert line["sigma_min change"] == "-"


def test_another_number_of_calls_is_told():
    (line,) = compare([layer("a", uses=5)], [layer("a", uses=3)])
    assert line["note"] == "calls in A: 5, in B: 3"


def test_nothing_to_compare():
    assert compare([], []) == []
