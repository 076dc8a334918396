"""Do deep plain CNNs train, and do their gradients stay stable: every arm, by depth.

``python -m experiments.stable_gradients.plain --data FOLDER`` appends a row a run to plain.csv, and
goes on where it stopped when it is called again.
"""

from __future__ import annotations

from collections.abc import Sequence

from experiments.stable_gradients import command, table


def main(argv: Sequence[str] | None = None) -> list[table.Row]:
    """Run what plain.csv lacks; returns the new rows."""
    return command.main("plain", __doc__ or "", argv)


if __name__ == "__main__":
    main()
