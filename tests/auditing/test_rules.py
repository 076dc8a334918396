"""Rules that an audit may be held to."""

from __future__ import annotations

from dataclasses import replace

import pytest
from helpers.short_audit import conditioning, layer

from convspectra.auditing._record import Certified
from convspectra.auditing._rules import parse_rule, violations


def broken(rule: str, *layers: object) -> list[tuple[str, bool]]:
    found = violations([parse_rule(rule)], layers)  # type: ignore[arg-type]
    return [(violation.layer, violation.certain) for violation in found]


@pytest.mark.parametrize(
    ("rule", "expected"),
    [
        ("sigma_max > 10", []),
        ("sigma_max > 1", [("a", True)]),
        ("sigma_max >= 2", [("a", True)]),
        (" sigma_min<0.6 ", [("a", True)]),
        ("sigma_min <= 0.1", []),
        ("condition > 3", [("a", True)]),
        ("rank < 100", []),
        ("rank <= 100", [("a", True)]),
        ("log_growth < -1", []),
        ("frobenius_norm > 2.5", [("a", True)]),
    ],
)
def test_rules_compare(rule: str, expected: list[tuple[str, bool]]) -> None:
    assert broken(rule, layer("a", conditioning())) == expected


def test_an_enclosure_across_the_threshold_is_told_but_not_certain() -> None:
    entry = layer("a", conditioning())
    wide = Certified(2.0, 1.5, 12.0, "lanczos", "", True)
    entry = replace(entry, applied=replace(entry.applied, sigma_max=wide))
    assert broken("sigma_max > 10", entry) == [("a", False)]
    (found,) = violations([parse_rule("sigma_max > 10")], [entry])
    assert "[1.5, 12]" in found.text


def test_what_is_not_known_cannot_be_decided() -> None:
    assert broken("sigma_max > 10", layer("a", skipped="too large")) == [("a", False)]
    assert broken("rank < 3", layer("a", conditioning(rank=None))) == [("a", False)]


def test_folded_reads_the_batch_normalization_where_there_is_one() -> None:
    entry = layer("a", conditioning(), folded=conditioning(sigma_max=20.0))
    assert broken("sigma_max > 10", entry) == []
    assert broken("folded.sigma_max > 10", entry, layer("b", conditioning(30.0))) == [
        ("a", True),
        ("b", True),
    ]


@pytest.mark.parametrize(
    "text", ["", "sigma > 3", "sigma_max == 3", "sigma_max > x", "3 > 2 > 1", "sigma_max > nan"]
)
def test_other_texts_are_no_rules(text: str) -> None:
    with pytest.raises(ValueError, match='expected a rule like "sigma_max > 10"'):
        parse_rule(text)
