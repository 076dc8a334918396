"""The table of projections: what it says of ours and of others."""

from __future__ import annotations

from pathlib import Path

from experiments.projections import __main__ as command


def test_the_table_tells_who_meets_the_bound(tmp_path: Path) -> None:
    rows = command.main(["--quick", "--out", str(tmp_path)], lambda text: None)
    assert len(rows) == len(command.WAYS) * len(command.PARTS)
    by_way = {way: [row for row in rows if row.way == way] for way in command.WAYS}
    ours, scaled, _, circular, *_ = by_way.values()
    assert all(-1e-3 < row.violation <= 1e-6 for row in ours)
    assert all(1 <= row.distance / row.least < 1.01 for row in ours)
    assert all(abs(row.violation) < 1e-6 for row in scaled)
    assert all(mine.distance < row.distance for mine, row in zip(ours, scaled, strict=True))
    assert all(row.violation > 0.01 for row in circular)
    text = (tmp_path / "projections.md").read_text()
    assert text.count("| 3 channels, 6 x 6 |") == len(rows)
