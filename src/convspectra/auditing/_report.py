"""An audit as a value: read and written as JSON, shown as a table, a data frame or a page."""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

from convspectra.auditing import _findings as findings
from convspectra.auditing import _table as audit_table
from convspectra.auditing._findings import check_purpose
from convspectra.auditing._record import (
    ADDED_LATER,
    Circumstances,
    Finding,
    Flow,
    LayerAudit,
    Network,
    decode,
    encode,
)
from convspectra.auditing._rules import Violation, parse_rule, violations
from convspectra.text import comma_separated, data_frame, plain, text_table, write_whole

SCHEMA = "convspectra.audit"
"""The name by which a file is known to be an audit."""
SCHEMA_VERSION, SCHEMA_MINOR = 1, 3
"""Another version cannot be read; a minor one has more fields than those before it."""
FINDINGS_BY_KIND = 2
"""The minor version from which on a finding speaks of all layers of a kind."""
INCOMPLETE = "incomplete: the audit was interrupted, and layers are missing"
"""The remark on an audit that was cut short."""


@dataclass(frozen=True)
class AuditReport:
    """The answer of `audit`.

    Attributes
    ----------
    circumstances : Circumstances
    layers : tuple of LayerAudit
        In order of execution, skipped ones too.
    network : Network
    findings : tuple of Finding
        What to look at first, in words.
    flow : Flow, optional
        The gradient flow on the images that were given.

    Examples
    --------
    >>> import torch, convspectra as cs
    >>> report = cs.audit(torch.nn.Conv2d(1, 1, 3, padding=1), torch.zeros(1, 1, 8, 8))
    >>> report.layers[0].shape
    (64, 64)
    >>> cs.AuditReport.from_dict(report.to_dict()) == report
    True
    """

    circumstances: Circumstances
    layers: tuple[LayerAudit, ...]
    network: Network
    findings: tuple[Finding, ...]
    flow: Flow | None = field(default=None, metadata=ADDED_LATER)

    def judged_for(self, purpose: str) -> AuditReport:
        """The same numbers with the findings for another purpose; nothing is computed again.

        Parameters
        ----------
        purpose : "training", "lipschitz" or "invertible"
        """
        circumstances = replace(self.circumstances, purpose=purpose)
        return report_of(circumstances, self.layers, self.network.band, self.flow)

    def check(self, *rules: str) -> tuple[Violation, ...]:
        """The layers that satisfy a rule, or of which that cannot be excluded.

        Parameters
        ----------
        *rules : str
            Such as "sigma_max > 10", "folded.condition >= 1e4" or "gain < 0.3".

        Returns
        -------
        tuple of Violation
            With `rule`, `layer`, `certain` and `text` each; empty where all is well.

        Raises
        ------
        ValueError
            For a text that is no rule.

        Examples
        --------
        >>> import torch, convspectra as cs
        >>> report = cs.audit(torch.nn.Conv2d(1, 1, 3), torch.zeros(1, 1, 8, 8))
        >>> report.check("sigma_max > 1000")
        ()
        """
        return tuple(violations([parse_rule(rule) for rule in rules], self.layers))

    def plot(self) -> Any:
        """A Matplotlib figure: singular values by layer, and the gain along the layers.

        Returns
        -------
        matplotlib.figure.Figure
            Outside pyplot's global state: ``report.plot().savefig("audit.png")``.

        Raises
        ------
        ImportError
            Without Matplotlib: install ``convspectra[demo]``.
        """
        from convspectra.auditing._figure import draw

        return draw(self.layers, self.network)

    def records(self) -> list[dict[str, object]]:
        """One flat record a layer, such as for a table of numbers."""
        return audit_table.records(self.layers)

    def to_dict(self) -> dict[str, Any]:
        """The whole report as what JSON can hold."""
        numbers = {"version": SCHEMA_VERSION, "minor": SCHEMA_MINOR}
        return {"schema": SCHEMA, **numbers, **encode(self)}

    @classmethod
    def from_dict(cls, data: Any) -> AuditReport:
        """The inverse of `to_dict`.

        What an older minor version says of the network and the findings is derived anew from its
        layers.

        Raises
        ------
        ValueError
            For anything else than a report of this version; the field is named.
        """
        if not isinstance(data, dict) or data.get("schema") != SCHEMA:
            found = data.get("schema") if isinstance(data, dict) else type(data).__name__
            raise ValueError(
                f"expected an audit report with schema {SCHEMA!r}, got {found!r}; "
                "convspectra audit --json writes one"
            )
        if data.get("version") != SCHEMA_VERSION:
            raise ValueError(
                f"expected version {SCHEMA_VERSION} of {SCHEMA}, got {data.get('version')!r}"
            )
        minor = data.get("minor", 0)
        if minor not in range(SCHEMA_MINOR + 1):
            raise ValueError(
                f"expected version {SCHEMA_VERSION}.{SCHEMA_MINOR} of {SCHEMA} or an older one, "
                f"got {SCHEMA_VERSION}.{minor}"
            )
        fields = {name: data[name] for name in data if name not in ("schema", "version", "minor")}
        if minor >= FINDINGS_BY_KIND:
            report = decode(cls, fields, "report")
            check_purpose(report.circumstances.purpose)
            if minor == SCHEMA_MINOR:
                return report
            return report_of(report.circumstances, report.layers, report.network.band, report.flow)
        older = decode(_Older, fields, "report")
        return report_of(older.circumstances, older.layers, older.network.band)

    def to_json(self, path: str | Path) -> None:
        """Write the report; `from_json` reads it again without loss."""
        text = json.dumps(self.to_dict(), indent=1, ensure_ascii=False, allow_nan=False)
        write_whole(path, text + "\n")

    @classmethod
    def from_json(cls, path: str | Path) -> AuditReport:
        """Read what `to_json` wrote.

        Raises
        ------
        ValueError
            If the file is no such report.
        OSError
            If it cannot be read.
        """
        try:
            data = json.loads(Path(path).read_text(encoding="utf-8"))
        except ValueError as error:  # no JSON, or no text at all
            raise ValueError(
                f"expected an audit report, as convspectra audit --json writes it, got {path}, "
                f"which is not JSON: {error}"
            ) from error
        try:
            return cls.from_dict(data)
        except ValueError as error:
            raise ValueError(f"{path}: {error}") from error

    def to_csv(self, path: str | Path) -> None:
        """Write one line a layer, every number in full."""
        records = self.records()
        columns = list(records[0]) if records else []
        write_whole(path, comma_separated(columns, records))

    def to_html(self, path: str | Path) -> None:
        """Write one page that needs nothing else."""
        write_whole(path, self._page())

    def to_dataframe(self) -> Any:
        """A pandas data frame, one row a layer.

        Raises
        ------
        ImportError
            Without pandas.
        """
        return data_frame(self.records())

    def _page(self) -> str:
        # Here and not above: jinja2 takes longer to import than all the rest.
        from convspectra.auditing.html._page import page

        facts = findings.network_facts(self.network, self.flow)
        sentences = self.flow.sentences if self.flow else ()
        return page(self.layers, facts, self.findings, self.circumstances, sentences)

    def _repr_html_(self) -> str:
        from convspectra.auditing.html._page import fragment

        facts = findings.network_facts(self.network, self.flow)
        sentences = self.flow.sentences if self.flow else ()
        return fragment(self.layers, facts, self.findings, self.circumstances, sentences)

    def __str__(self) -> str:
        rows = [audit_table.table_row(layer) for layer in self.layers]
        columns = [column.name for column in audit_table.columns_for(self.layers)]
        incomplete = [] if self.circumstances.complete else [INCOMPLETE]
        network = findings.network_facts(self.network, self.flow)
        facts = [f"{label}: {text}" for label, text in network]
        found = [f"{f.kind}: {f.line}" for f in self.findings]
        measured = ["", *self.flow.sentences] if self.flow else []
        lines = [*incomplete, *facts, *measured, "", *found]
        return "\n".join([text_table(columns, rows), "", *map(plain, lines)])


@dataclass(frozen=True)
class _OlderFinding:
    layer: str
    kind: str
    text: str


@dataclass(frozen=True)
class _Older:
    """A report of the minor versions 0 and 1, whose findings spoke of one layer each."""

    circumstances: Circumstances
    layers: tuple[LayerAudit, ...]
    network: Network
    findings: tuple[_OlderFinding, ...]


def report_of(
    circumstances: Circumstances,
    layers: Sequence[LayerAudit],
    band: tuple[float, float] = findings.BAND,
    flow: Flow | None = None,
) -> AuditReport:
    """The report of these layers."""
    network = findings.summary(layers, band)
    return AuditReport(
        circumstances,
        tuple(layers),
        network,
        findings.findings(layers, circumstances.purpose, network, flow),
        flow,
    )
