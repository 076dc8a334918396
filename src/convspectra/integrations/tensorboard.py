"""A report of the regularizer in TensorBoard.

Nothing is imported: any writer with ``add_scalar`` will do. PyTorch's own needs
``pip install 'convspectra[tensorboard]'``.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from convspectra.integrations import _shared as shared

if TYPE_CHECKING:
    from convspectra.training import RegularizerReport


def write_report(
    writer: Any, report: RegularizerReport, step: int | None = None, per_layer: bool = False
) -> None:
    """Write the aggregates of a report, and every layer where asked for, as scalars.

    Parameters
    ----------
    writer : torch.utils.tensorboard.SummaryWriter
        Or anything with ``add_scalar(tag, value, step)``, such as that of tensorboardX.
    report : RegularizerReport
        From ``reg.report()``.
    step : int, optional
        The position on the axis; by default the report's own step.
    per_layer : bool
        Whether to add ``spectral/<layer>/<quantity>`` for every layer.

    Raises
    ------
    ValueError
        If the writer has no ``add_scalar``.

    Examples
    --------
    >>> import types
    >>> report = types.SimpleNamespace(step=7, aggregates=lambda: {"sigma_max/max": 2.0})
    >>> writer = types.SimpleNamespace(add_scalar=print)
    >>> write_report(writer, report)
    spectral/sigma_max/max 2.0 7
    """
    if not callable(getattr(writer, "add_scalar", None)):
        raise ValueError(
            f"expected a writer with add_scalar, got {type(writer).__name__}; "
            "torch.utils.tensorboard.SummaryWriter(folder) is one, after "
            "pip install 'convspectra[tensorboard]'"
        )
    at = report.step if step is None else step
    for tag, value in shared.scalars(report, per_layer).items():
        writer.add_scalar(tag, value, at)
