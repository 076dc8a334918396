"""Reports of other versions, and what is derived of them anew."""

import pytest
from helpers.made_up_audit import CIRCUMSTANCES, layer, small_audit

from convspectra.auditing._report import AuditReport, report_of


def test_an_older_minor_version_is_read():
    report = report_of(CIRCUMSTANCES, [*small_audit(), layer("")], (1e-3, 1e3))
    data = report.to_dict()
    assert (data["version"], data["minor"]) == (1, 1)
    del data["minor"], data["network"]["folded"]
    data["network"]["leaves_band"] = ""
    for entry in data["layers"]:
        del entry["uses"]
    assert repr(AuditReport.from_dict(data)) == repr(report)  # repr: nan is not equal to itself


@pytest.mark.parametrize("minor", [2, -1, "1"])
def test_another_minor_version_is_refused(minor):
    data = report_of(CIRCUMSTANCES, small_audit()).to_dict()
    with pytest.raises(ValueError, match=rf"version 1\.1 of .* or an older one, got 1\.{minor}"):
        AuditReport.from_dict(data | {"minor": minor})


def test_calls_survive_json():
    report = report_of(CIRCUMSTANCES, [layer("a", uses=5)])
    assert AuditReport.from_dict(report.to_dict()) == report
    once = report_of(CIRCUMSTANCES, [layer("a")])
    assert report.network.log10_product == pytest.approx(5 * once.network.log10_product)
