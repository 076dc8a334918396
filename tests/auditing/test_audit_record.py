"""The JSON form of an audit: a lossless round trip, and errors that name the place."""

import json
import math

import pytest
from helpers.made_up_audit import layer, small_audit
from hypothesis import given
from hypothesis import strategies as st

from convspectra.auditing._record import (
    Certified,
    Circumstances,
    Conditioning,
    LayerAudit,
    decode,
    encode,
)

FLOATS = st.floats(allow_nan=True, allow_infinity=True)


def through_json(value):
    return decode(type(value), json.loads(json.dumps(encode(value), allow_nan=False)))


@given(st.builds(LayerAudit))
def test_any_layer_survives_json(audit):
    assert repr(through_json(audit)) == repr(audit)  # repr: nan is not equal to itself


@given(
    st.builds(
        Conditioning,
        sigma_max=st.builds(Certified, value=FLOATS, lower=FLOATS, upper=FLOATS),
        condition=FLOATS,
        log_growth=st.none() | FLOATS,
    )
)
def test_numbers_that_are_not_finite_survive_json(numbers):
    assert repr(through_json(numbers)) == repr(numbers)


@pytest.mark.parametrize("number", [math.inf, -math.inf, math.nan, 0.0, -0.0, 5e-324])
def test_special_numbers_survive_json(number):
    audit = layer("a", seconds=number)
    assert repr(through_json(audit).seconds) == repr(number)


def test_a_whole_number_is_taken_for_a_float():
    data = {**encode(layer("a")), "seconds": 3}
    assert isinstance(decode(LayerAudit, data).seconds, float)


def broken(path, value):
    data = encode(small_audit()[0])
    *parents, last = path
    inner = data
    for name in parents:
        inner = inner[name]
    inner[last] = value
    return data


@pytest.mark.parametrize(
    ("path", "value", "message"),
    [
        (["name"], 3, r"LayerAudit\.name: expected str, got 3"),
        (["groups"], True, r"LayerAudit\.groups: expected int, got True"),
        (["seconds"], "fast", r"LayerAudit\.seconds: expected float, got 'fast'"),
        (["seconds"], False, r"LayerAudit\.seconds: expected float, got False"),
        (["kernel", 1], "3", r"LayerAudit\.kernel\[1\]: expected int, got '3'"),
        (["padding", 0], [1], r"LayerAudit\.padding\[0\]: expected 2 entries, got 1"),
        (["shape"], [1, 2, 3], r"LayerAudit\.shape: expected 2 entries, got 3"),
        (["applied", "rank"], 1.5, r"LayerAudit\.applied\.rank: expected int, got 1\.5"),
        (["applied"], [], r"LayerAudit\.applied: expected Conditioning, got \[\]"),
        (["applied", "sigma_min", "odd"], 1, r"LayerAudit\.applied\.sigma_min: .*\['odd'\]"),
        (["spectrum", "edges", 2], None, r"LayerAudit\.spectrum\.edges\[2\]: expected float"),
    ],
)
def test_errors_name_the_place(path, value, message):
    with pytest.raises(ValueError, match=message):
        decode(LayerAudit, broken(path, value))


def test_a_missing_field_is_named():
    data = encode(layer("a"))
    del data["circular"]
    with pytest.raises(ValueError, match=r"file\.json: .*these differ: \['circular'\]"):
        decode(LayerAudit, data, "file.json")


def test_what_was_added_later_may_be_missing():
    data = encode(layer("a", uses=5))
    assert decode(LayerAudit, data).uses == 5
    del data["uses"]
    assert decode(LayerAudit, data).uses == 1


def test_what_is_no_record_is_refused():
    with pytest.raises(ValueError, match="Circumstances: expected Circumstances, got 'text'"):
        decode(Circumstances, "text")


@pytest.mark.parametrize(
    ("lower", "upper", "converged", "enclosed"),
    [
        (1.0, 2.0, True, True),
        (0.0, 0.0, True, True),
        (0.0, 2.0, True, False),
        (1.0, math.inf, True, False),
        (1.0, 2.0, False, False),
    ],
)
def test_enclosed(lower, upper, converged, enclosed):
    assert Certified(1.5, lower, upper, "", "", converged).enclosed is enclosed


@pytest.mark.parametrize(
    ("path", "value", "message"),
    [
        (["edges", 0], "-inf", "finite numbers of at least 0"),
        (["edges", 1], 0.0, "ascending order"),
        (["edges"], [0.0, 1.0], "a fraction and an error for each of 1 bins"),
        (["fractions", 0], "nan", "finite numbers of at least 0"),
        (["errors", 0], "inf", "finite numbers of at least 0"),
        (["circular"], [1.0], "circular fractions or none, got 1"),
    ],
)
def test_a_spectrum_that_cannot_be_is_refused_with_its_place(path, value, message):
    with pytest.raises(ValueError, match=rf"LayerAudit\.spectrum: .*{message}"):
        decode(LayerAudit, broken(["spectrum", *path], value))


def test_an_integer_beyond_a_float_is_refused():
    with pytest.raises(ValueError, match=r"LayerAudit\.seconds: .* beyond its range"):
        decode(LayerAudit, {**encode(layer("a")), "seconds": 10**400})
