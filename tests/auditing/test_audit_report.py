"""Reports of other versions, and what is derived of them anew."""

import io
import json

import pytest
from helpers.made_up_audit import CIRCUMSTANCES, certified, conditioning, layer, small_audit
from rich.console import Console

from convspectra.auditing import compare
from convspectra.auditing._report import AuditReport, report_of
from convspectra.cli._printing import print_report


def test_an_older_minor_version_is_read():
    report = report_of(CIRCUMSTANCES, [*small_audit(), layer("")], (1e-3, 1e3))
    data = report.to_dict()
    assert (data["version"], data["minor"]) == (1, 3)
    del data["minor"], data["network"]["folded"], data["circumstances"]["purpose"]
    del data["network"]["chain"], data["flow"]
    data["findings"] = [{"layer": "a", "kind": "vanishing", "text": "as it was said then"}]
    data["network"]["leaves_band"] = ""
    for entry in data["layers"]:
        for later in ("uses", "place", "feeds", "followed_by", "gradient"):
            del entry[later]
    assert repr(AuditReport.from_dict(data)) == repr(report)  # repr: nan is not equal to itself


def test_the_version_before_the_graph_is_read():
    report = report_of(CIRCUMSTANCES, [*small_audit(), layer("")], (1e-3, 1e3))
    data = report.to_dict() | {"minor": 2}
    del data["network"]["chain"]
    data["network"]["growth"] = [0.0] * len(report.network.growth)
    for entry in data["layers"]:
        del entry["place"], entry["feeds"], entry["followed_by"]
    assert repr(AuditReport.from_dict(data)) == repr(report)


@pytest.mark.parametrize("minor", [4, -1, "1"])
def test_another_minor_version_is_refused(minor):
    data = report_of(CIRCUMSTANCES, small_audit()).to_dict()
    with pytest.raises(ValueError, match=rf"version 1\.3 of .* or an older one, got 1\.{minor}"):
        AuditReport.from_dict(data | {"minor": minor})


def test_calls_survive_json():
    report = report_of(CIRCUMSTANCES, [layer("a", uses=5)])
    assert AuditReport.from_dict(report.to_dict()) == report
    once = report_of(CIRCUMSTANCES, [layer("a")])
    assert report.network.log10_product == pytest.approx(5 * once.network.log10_product)


def numbers_in(value, path=()):
    """The places of all numbers in what JSON holds, spectra apart: these are checked as a whole."""
    if isinstance(value, dict | list):
        pairs = value.items() if isinstance(value, dict) else enumerate(value)
        for key, entry in pairs:
            if key != "spectrum":
                yield from numbers_in(entry, (*path, key))
    elif isinstance(value, float) or value in ("inf", "-inf", "nan"):
        yield path


@pytest.mark.parametrize("number", ["Infinity", "-Infinity", "NaN", "-1.0", "0", "1e308", "5e-324"])
def test_any_number_in_a_file_can_be_shown(number):
    whole = conditioning(certified(2.0), certified(0.5))
    entries = [layer("a", batch_norm="b", folded=whole, spectrum=None), layer("c", spectrum=None)]
    good = report_of(CIRCUMSTANCES, entries)
    places = list(numbers_in(good.to_dict()))
    assert ("layers", 0, "seconds") in places
    for path in places:
        data = good.to_dict()
        *parents, last = path
        inner = data
        for name in parents:
            inner = inner[name]
        inner[last] = json.loads(number)
        report = AuditReport.from_dict(data)
        assert "sigma_max" in str(report)
        assert report._page().endswith("</html>\n")
        print_report(report, Console(file=io.StringIO(), width=200))
        compare(good.layers, report.layers)
        report_of(report.circumstances, report.layers)


def test_an_audit_is_judged_for_another_purpose():
    report = report_of(CIRCUMSTANCES, small_audit())
    other = report.judged_for("invertible")
    assert (other.layers, other.network.band) == (report.layers, report.network.band)
    assert other.circumstances.purpose == "invertible"
    alarms = {finding.kind for finding in other.findings if finding.alarm}
    assert {"singular", "ill-conditioned", "not square"} <= alarms
    assert AuditReport.from_dict(other.to_dict()).findings == other.findings
    with pytest.raises(ValueError, match=r"expected purpose to be one of training, .* got 'x'"):
        report.judged_for("x")
    data = report.to_dict()
    data["circumstances"]["purpose"] = "x"
    with pytest.raises(ValueError, match="expected purpose to be one of training"):
        AuditReport.from_dict(data)


def test_rules_are_checked_in_python():
    report = report_of(CIRCUMSTANCES, small_audit()[:1])
    assert report.check("sigma_max > 10", "gain > 2") == ()
    (found,) = report.check("sigma_max > 1.5", "folded.sigma_max > 5")
    assert (found.layer, found.certain) == ("stem.conv", True)
    assert "sigma_max is 1.8" in found.text
    assert len(report.check("gain > 0.8", "gain > 0.9", "gain < 0.8")) == 1
    with pytest.raises(ValueError, match="expected a rule like"):
        report.check("size > 10")


def test_an_audit_is_drawn():
    figure = report_of(CIRCUMSTANCES, small_audit()).plot()
    above, below = figure.axes
    names = [label.get_text() for label in below.get_xticklabels()]
    assert names == [entry.name for entry in small_audit()[:-1]]
    drawn = {line.get_label(): list(line.get_ydata()) for line in above.lines}
    assert drawn[r"$\sigma_{\max}$"] == [1.8, 2.0, 2.0, 12.5, 1.8]
    assert len(drawn["0 to working precision"]) == 1
    figure.savefig(io.BytesIO(), format="png")


def test_an_audit_of_nothing_is_drawn():
    report_of(CIRCUMSTANCES, small_audit()[-1:]).plot().savefig(io.BytesIO(), format="png")
