"""Model -> `AuditReport`: which layers, by whom, and what is kept of an audit that is cut short."""

from __future__ import annotations

import datetime
import hashlib
import shlex
import sys
from collections.abc import Sequence
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from convspectra.auditing._environment import processor, versions
from convspectra.auditing._findings import BAND, check_purpose
from convspectra.auditing._journal import append_to_journal, journal_files, read_journal
from convspectra.auditing._layer_audit import AuditOptions, audit_layer, cost, described
from convspectra.auditing._progress import Listener, listener
from convspectra.auditing._record import Circumstances, Flow, LayerAudit
from convspectra.auditing._report import AuditReport, report_of
from convspectra.auditing._workers import answers
from convspectra.models import (
    DEFAULT_GROUP,
    NamedOperator,
    RankDivision,
    divide_among_ranks,
    example_arguments,
    named_operators,
)
from convspectra.network import GradientFlow, gradient_flow
from convspectra.operator import DEFAULT_MAX_BYTES, check_positive_integer, not_compiled


@not_compiled
def audit(
    model: nn.Module,
    example_input: Any,
    *,
    spectrum: bool = False,
    fold: bool = True,
    band: tuple[float, float] = BAND,
    purpose: str = "training",
    workers: int = 1,
    devices: Sequence[str | torch.device] = (),
    journal: str | Path | None = None,
    progress: Listener | bool | None = None,
    max_bytes: int = DEFAULT_MAX_BYTES,
    process_group: Any = DEFAULT_GROUP,
    images: Any = None,
) -> AuditReport:
    """The conditioning of every convolution and linear layer of a model.

    Parameters
    ----------
    model : nn.Module
        Run once, in evaluation mode and without gradients; left as it was.
    example_input : Tensor, tuple of positional arguments, or mapping of keyword arguments
        Decides the input size of every layer.
    spectrum : bool
        The whole distribution of singular values of every layer too.
    fold : bool
        Every layer with the batch normalization that follows it too.
    band : (float, float)
        What the product of the layers' typical gains is meant to stay between.
    purpose : "training", "lipschitz" or "invertible"
        What the layers are judged for. In training gradients should neither grow nor shrink, and a
        small sigma_min is a fact, not an alarm; a Lipschitz bound of 1 takes sigma_max of at most
        1; an invertible network takes square and well-conditioned layers. The numbers are the same.
    workers : int
        Processes that the layers are spread over; more than 1 needs a script that can be imported
        (``if __name__ == "__main__":``).
    devices : sequence of str or torch.device
        Such as ("cuda:0", "cuda:1"): one process for each, instead of `workers`, computes there.
        By default a layer is computed where its weight is.
    journal : path, optional
        A file that every finished layer is added to. Layers found in it are not computed again,
        unless their weight, their options or those of the audit have changed.
    progress : bool or callable, optional
        True shows a bar, in a terminal or a notebook (there with the package ipywidgets). Else
        called as ``progress(layer, part)`` with every finished layer and the part of the work done.
    max_bytes : int
        Limit on any matrix that is formed; a layer that would need more is taken another way, or
        skipped with the reason.
    process_group : ProcessGroup, "default" or None
        The layers are divided among its ranks, all of which return the same report; "default" is
        the group that ``torch.distributed`` was started with, if it was. With a journal each rank
        keeps its own, with its number at the end of the name, and reads those of all.
    images : optional
        A batch for `gradient_flow`: `report.flow` and `layer.gradient` then hold what signals and
        gradients do, beside what the weights predict, and the findings rest on it.

    Returns
    -------
    AuditReport
        With one entry a layer in order of execution, those that were skipped too, with the reason.
        Interrupted by Ctrl-C it holds the layers finished so far, and is marked as not complete.

    Raises
    ------
    ValueError
        For a model without any layer, or on the meta device; for an argument that cannot be, such
        as a device that is not there or a journal that is another file.

    Notes
    -----
    Cost: that of `svds` for the largest and the smallest value of each layer, twice where a batch
    normalization is folded in, and some tenths of it for the rest. Layers with the same weight at
    the same size are computed once.

    Examples
    --------
    >>> import torch, convspectra as cs
    >>> model = torch.nn.Sequential(torch.nn.Conv2d(3, 8, 3), torch.nn.ReLU(), torch.nn.Flatten())
    >>> report = cs.audit(model, torch.zeros(1, 3, 8, 8))
    >>> [(layer.name, layer.shape, layer.applied.rank) for layer in report.layers]
    [('0', (288, 192), 192)]
    """
    measured = None if images is None else gradient_flow(model, images)
    report = audit_operators(
        named_operators(model, example_input),
        type(model).__name__,
        str(example_arguments(example_input)),
        options=AuditOptions(spectrum, fold, max_bytes),
        band=band,
        purpose=purpose,
        workers=workers,
        devices=devices,
        journal=journal,
        progress=progress,
        process_group=process_group,
    )
    return report if measured is None else _with_flow(report, measured)


def _with_flow(report: AuditReport, measured: GradientFlow) -> AuditReport:
    """The same layers with their gradients, and the words about these."""
    gradients = {layer.name: layer.relative for layer in reversed(measured.layers)}
    layers = [replace(layer, gradient=gradients.get(layer.name)) for layer in report.layers]
    flow = Flow(measured.verdict, measured.begins, measured.sentences)
    return report_of(report.circumstances, layers, report.network.band, flow)


def audit_operators(
    operators: Sequence[NamedOperator],
    model: str,
    input_shape: str,
    *,
    options: AuditOptions | None = None,
    band: tuple[float, float] = BAND,
    purpose: str = "training",
    workers: int = 1,
    devices: Sequence[str | torch.device] = (),
    journal: str | Path | None = None,
    progress: Listener | bool | None = None,
    process_group: Any = DEFAULT_GROUP,
) -> AuditReport:
    """The audit of layers at hand, such as those of a file; arguments as of `audit`."""
    check_positive_integer("workers", workers)
    check_purpose(purpose)
    options = options or AuditOptions()
    check_positive_integer("max_bytes", options.max_bytes)
    for device in devices:
        _check_device(device)
    if not operators:
        raise ValueError(f"expected {model} to have layers with weights, got none")
    keys = [_key(named, options) for named in operators]
    division = divide_among_ranks([cost(named) for named in operators], process_group)
    kept = _Kept(None if journal is None else Path(journal), division, keys)
    complete = True
    try:
        with listener(progress) as heard:
            _run(operators, keys, division, kept, options, devices or [None] * workers, heard)
    except KeyboardInterrupt:
        complete = False
    found = division.gathered(kept.found)
    layers = [_named(found[key], named) for key, named in zip(keys, operators, strict=True)
              if key in found]  # fmt: skip
    complete = complete and len(layers) == len(operators)
    return report_of(_circumstances(model, input_shape, complete, purpose), layers, band)


class _Kept:
    """Finished layers by key, in memory and in the journal."""

    def __init__(self, journal: Path | None, division: RankDivision, keys: Sequence[str]) -> None:
        self._path = journal
        self.found: dict[str, LayerAudit] = {}
        if journal is None:
            return
        if division.size > 1:
            self._path = journal.with_name(f"{journal.name}.{division.rank}")
        wanted = set(keys)
        for path in journal_files(journal):
            known = read_journal(path)
            self.found |= {key: layer for key, layer in known.items() if key in wanted}

    def add(self, key: str, layer: LayerAudit) -> None:
        self.found[key] = layer
        if self._path is not None:
            append_to_journal(self._path, key, layer)


def _run(
    operators: Sequence[NamedOperator],
    keys: Sequence[str],
    division: RankDivision,
    kept: _Kept,
    options: AuditOptions,
    devices: Sequence[str | torch.device | None],
    progress: Listener | None,
) -> None:
    costs = {keys[i]: cost(operators[i]) for i in division.own}
    whole = sum(costs.values()) or 1.0
    todo = {keys[i]: operators[i] for i in division.own if keys[i] not in kept.found}
    left = sum(costs[key] for key in todo)
    for key in costs:
        if progress is not None and key in kept.found:
            progress(kept.found[key], 1 - left / whole)
    # The dearest first, so that no process is left alone with one at the end.
    order = sorted(todo, key=lambda key: -costs[key])
    job = partial(audit_layer, options=options)
    for i, layer in answers(job, [_sendable(todo[key]) for key in order], devices):
        kept.add(order[i], layer)
        left -= costs[order[i]]
        if progress is not None:
            progress(layer, max(0.0, 1 - left / whole))


def _sendable(named: NamedOperator) -> NamedOperator:
    """The named without a graph behind its weight."""
    if named.operator is None:
        return named
    return NamedOperator(
        **vars(named)
        | {"operator": named.operator.with_weight(named.operator.weight.detach(), check=False)}
    )


def _named(layer: LayerAudit, named: NamedOperator) -> LayerAudit:
    """The entry under the named's own name: a shared weight was computed once."""
    own = described(named)
    names = ("name", "type", "batch_norm", "notes", "uses", "place", "feeds", "followed_by")
    return LayerAudit(**vars(layer) | {name: getattr(own, name) for name in names})


def _key(named: NamedOperator, options: AuditOptions) -> str:
    """The hash of all that decides the numbers of a layer."""
    digest = hashlib.sha256(repr(options).encode())
    op = named.operator
    if op is None:
        digest.update(repr((named.name, named.skipped)).encode())
        return digest.hexdigest()
    facts = (op.geometry, op.groups, op.transposed, op.dtype, tuple(op.weight.shape))
    digest.update(repr(facts).encode())
    for tensor in (op.weight, named.scale):
        if tensor is not None:
            digest.update(_bytes(tensor))
    return digest.hexdigest()


def _bytes(tensor: Tensor) -> bytes:
    # Widened exactly: NumPy has no bfloat16.
    wide = tensor.detach().cpu().contiguous()
    return (wide if wide.dtype == torch.float64 else wide.float()).numpy().tobytes()


def _check_device(device: str | torch.device) -> None:
    try:
        there = not torch.empty(0, device=device).is_meta
    except (RuntimeError, AssertionError):  # PyTorch raises either
        there = False
    if not there:
        raise ValueError(
            f"expected devices that can compute here, such as cpu or cuda:0, got {str(device)!r}"
        )


def _circumstances(model: str, input_shape: str, complete: bool, purpose: str) -> Circumstances:
    command = shlex.join([Path(sys.argv[0]).name, *sys.argv[1:]]) if sys.argv[0] else ""
    return Circumstances(
        model=model,
        input_shape=input_shape,
        created=datetime.datetime.now(datetime.timezone.utc).isoformat(timespec="seconds"),
        machine=processor(),
        versions=versions("convspectra", "torch"),
        command=command,
        complete=complete,
        purpose=purpose,
    )
