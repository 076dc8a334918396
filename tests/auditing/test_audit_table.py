"""The table of an audit: its words in a terminal, and its records."""

import csv
import io
import math
from fractions import Fraction

import pytest
from helpers.made_up_audit import certified, conditioning, layer, small_audit
from hypothesis import given
from hypothesis import strategies as st

from convspectra.auditing import _numbers as words
from convspectra.auditing._record import Certified, LayerAudit
from convspectra.auditing._table import COLUMN_IMPORTANCE, COLUMNS, columns_for, records, table_row
from convspectra.text import comma_separated, text_table

ROWS = {audit.name: table_row(audit) for audit in small_audit()}


def test_columns_are_those_of_the_rows():
    assert all(list(cells) == [column.name for column in COLUMNS] for cells in ROWS.values())


def test_an_ordinary_layer():
    assert ROWS["stem.conv"] == {
        "name": "stem.conv",
        "type": "Conv2d",
        "kernel": "3x3",
        "stride / padding": "1 / 1",
        "input size": "16x16x16",
        "size of M": "4096x4096",
        "sigma_max": "1.800",
        "sigma_min": "0.02130",
        "folded sigma_max": "2.400",
        "folded sigma_min": "0.03000",
        "circular sigma_min": "0.3100",
        "condition": "84.51",
        "gain": "1.125",
        "gradient": "-",
        "rank": "4096",
        "growth": "-0.4321",
        "seconds": "0.42",
        "note": "",
    }


@pytest.mark.parametrize(
    ("name", "column", "text"),
    [
        ("stage1.down", "stride / padding", "2 / 0+1x1"),
        ("stage1.down", "sigma_min", "0 (singular)"),
        ("stage1.down", "condition", "infinite"),
        ("stage1.down", "rank", "1000 of 1024"),
        ("stage1.down", "growth", "minus infinite"),
        ("stage1.conv", "sigma_min", "~3.200e-9"),
        ("stage1.conv", "condition", "over 4.999e8"),
        ("stage1.conv", "rank", "not counted"),
        ("stage1.conv", "growth", "-0.4321 ± 0.012"),
        ("stage1.conv", "note", "sigma_min: no enclosure; the weight is shared with stage2.conv"),
        ("stage2.conv", "kernel", "3x3, dilation 2, 4 groups"),
        ("stage2.conv", "stride / padding", "1 / 1 reflect"),
        ("stage2.conv", "sigma_max", "~12.50"),
        ("stage2.conv", "growth", "not known"),
        ("stage2.conv", "circular sigma_min", "-"),
        ("stage2.conv", "note", "sigma_max: not converged"),
        ("head.pool", "sigma_min", "-"),
        ("head.pool", "seconds", "-"),
        ("head.pool", "note", "not computed: not a convolution"),
    ],
)
def test_what_is_out_of_the_ordinary_is_said(name, column, text):
    assert ROWS[name][column] == text


def test_zero_to_working_precision_is_singular_and_enclosed():
    smallest = Certified(1e-18, 0.0, 1e-17, "", "", True)
    cells = table_row(layer("a", applied=conditioning(certified(1.0), smallest)))
    assert cells["sigma_min"] == "1.000e-18 (singular)"
    assert cells["note"] == ""


def test_a_layer_of_zeros_is_said_to_be_one():
    zero = Certified(0.0, 0.0, 0.0, "", "", True)
    cells = table_row(layer("a", applied=conditioning(zero, zero, condition=math.nan)))
    assert cells["sigma_max"] == "0 (the layer is zero)"
    assert cells["condition"] == "not a number"


def test_numbers_with_batch_normalization_have_columns_where_there_are_any():
    assert ROWS["stage1.down"]["folded sigma_max"] == "-"
    names = [column.name for column in columns_for(small_audit())]
    assert names == [column.name for column in COLUMNS if not column.measured]
    assert not any("folded" in column.name for column in columns_for([layer("a")]))
    open_below = certified(0.5, lower=0.0)
    cells = table_row(layer("a", folded=conditioning(certified(2.0), open_below)))
    assert cells["folded sigma_min"] == "~0.5000"
    assert cells["note"] == "folded sigma_min: no enclosure"


def test_a_layer_that_is_called_several_times_says_so():
    assert table_row(layer("a", uses=5, notes=("shared",)))["note"] == "used 5 times; shared"
    assert records([layer("a", uses=5)])[0]["uses"] == 5


def test_a_layer_without_a_name_has_that_of_its_type():
    assert table_row(layer(""))["name"] == "Conv2d"


def test_a_growth_that_is_not_known_is_empty_in_csv():
    (record,) = records([small_audit()[3]])
    (line,) = csv.DictReader(io.StringIO(comma_separated(list(record), [record])))
    assert line["applied.log_growth"] == ""
    assert line["applied.log_growth_method"] == "too large"


def test_every_column_has_its_importance():
    assert sorted(COLUMN_IMPORTANCE) == sorted([column.name for column in COLUMNS])


def test_what_cannot_be_printed_is_escaped():
    text = text_table(["name", "b"], [{"name": "a\x1b[2J\n", "b": "1"}, {"name": "c", "b": "2"}])
    assert text == "name        b\na\\x1b[2J\\n  1\nc           2"


def test_records_are_flat_and_full():
    flat = records(small_audit())
    assert len({tuple(record) for record in flat}) == 1
    assert flat[0]["applied.sigma_min.lower"] == 0.0213 * (1 - 1e-10)
    assert flat[0]["folded.sigma_max.value"] == 2.4
    assert flat[1]["folded.sigma_max.value"] is None
    assert flat[1]["padding"] == "0+1x1+1"
    assert flat[1]["shape"] == "1024x4096"
    assert flat[1]["applied.condition"] == math.inf
    assert flat[2]["notes"] == "the weight is shared with stage2.conv"
    assert flat[5]["applied.sigma_min.lower"] is None
    assert flat[5]["skipped"] == "not a convolution"
    assert not any(isinstance(value, tuple | list | dict) for r in flat for value in r.values())


def test_records_go_through_csv():
    flat = records(small_audit())
    read = list(csv.DictReader(io.StringIO(comma_separated(list(flat[0]), flat))))
    assert float(read[2]["applied.sigma_min.value"]) == 3.2e-9
    assert read[5]["applied.sigma_min.value"] == ""


def test_no_layers_no_records():
    assert records([]) == []


POSITIVE = st.floats(min_value=5e-324, allow_nan=False, allow_infinity=False)


@given(POSITIVE, POSITIVE)
def test_a_printed_interval_encloses_the_true_one(a, b):
    lower, upper = sorted((a, b))
    low, high = words.interval(lower, upper)[1:-1].split(", ")
    assert Fraction(low) <= Fraction(lower)
    assert Fraction(upper) <= Fraction(high)


@given(POSITIVE)
def test_four_digits_are_close(value):
    assert abs(Fraction(words.number(value)) / Fraction(value) - 1) <= Fraction(1, 1999)


@given(POSITIVE, st.floats(1e-15, 1e-2))
def test_a_printed_value_is_in_its_printed_interval(value, radius):
    lower, upper = value * (1 - radius), value * (1 + radius)
    if not 0 < lower < value < upper < math.inf:
        return
    low, high = words.interval(lower, upper)[1:-1].split(", ")
    shown = words.value_within(value, lower, upper)
    assert Fraction(low) <= Fraction(shown) <= Fraction(high)


def test_kernels_and_paddings_of_a_layer_without_any():
    bare = LayerAudit("a", "b")
    assert (words.kernel(bare), words.padding(bare)) == ("-", "")


def test_a_condition_number_without_an_upper_end_is_only_said_to_be_above_one() -> None:
    """An iteration that did not converge has seen 3.3e-4; the value may be 0."""
    unknown = certified(3.3e-4, lower=0.0, upper=3.4e-4, converged=False)
    numbers = conditioning(certified(1.85), unknown, condition_upper=math.inf)
    assert words.condition(numbers).startswith("over 5")
    assert words.condition_flag(numbers) == ""
    assert words.smallest_flag(numbers) == "not converged"
    sure = conditioning(certified(1.85), certified(1e-3))
    assert not words.condition(sure).startswith("over")
