"""Whether penalties help, hurt or do nothing in a residual network with batch normalization.

``python -m experiments.stable_gradients.residual --data FOLDER`` appends a row a run to
residual.csv, and goes on where it stopped when it is called again.
"""

from __future__ import annotations

from collections.abc import Sequence

from experiments.stable_gradients import command, table


def main(argv: Sequence[str] | None = None) -> list[table.Row]:
    """Run what residual.csv lacks; returns the new rows."""
    return command.main("residual", __doc__ or "", argv)


if __name__ == "__main__":
    main()
