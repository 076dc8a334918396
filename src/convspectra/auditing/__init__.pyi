from ._audit import audit, audit_operators
from ._comparison import CHANGE_IMPORTANCE, CHANGE_TEXTS, compare
from ._findings import BAND, PURPOSES, network_facts
from ._journal import journal_files, remove_journal
from ._layer_audit import AuditOptions
from ._numbers import ABSENT, flag, largest, smallest, smallest_flag
from ._progress import Listener, work_bar
from ._record import LayerAudit
from ._report import INCOMPLETE, AuditReport
from ._rules import Rule, parse_rule, violations
from ._table import COLUMN_IMPORTANCE, circular_line, fact_rows, table_row

__all__ = [
    "ABSENT",
    "BAND",
    "CHANGE_IMPORTANCE",
    "CHANGE_TEXTS",
    "COLUMN_IMPORTANCE",
    "INCOMPLETE",
    "PURPOSES",
    "AuditOptions",
    "AuditReport",
    "LayerAudit",
    "Listener",
    "Rule",
    "audit",
    "audit_operators",
    "circular_line",
    "compare",
    "fact_rows",
    "flag",
    "journal_files",
    "largest",
    "network_facts",
    "parse_rule",
    "remove_journal",
    "smallest",
    "smallest_flag",
    "table_row",
    "violations",
    "work_bar",
]
