"""The entry point: a file, and what it holds."""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from os import PathLike
from pathlib import Path

from convspectra.models._linear_layers import Target
from convspectra.models.files._errors import LoadError
from convspectra.models.files._kinds import MAX_BYTES, model_kind
from convspectra.models.files._torch_files import (
    checkpoint_targets,
    exported_targets,
    factory_targets,
    safetensors_targets,
    script_targets,
)
from convspectra.text import plain


def load_targets(
    path: str | PathLike[str] | None,
    input_shapes: Sequence[tuple[int, ...]],
    *,
    factory: str | None = None,
    allow_pickle: bool = False,
    max_bytes: int = MAX_BYTES,
) -> tuple[str, list[Target]]:
    """The name of a model in a file and its layers, ready to audit.

    Parameters
    ----------
    path : path, or None for the factory's model alone
        ONNX, TorchScript, ``torch.export.save``, safetensors or ``torch.save``; told apart by
        content.
    input_shapes : sequence of tuple of int
        One for each input, without the batch, such as ``[(3, 224, 224)]``. A batch of 1 is put in
        front. ONNX inputs that are not given keep the sizes that the file declares.
    factory : str, optional
        "package.module:function", called without arguments, returns the ``nn.Module`` that a
        checkpoint or safetensors file fills.
    allow_pickle : bool
        Whether a pickle of more than tensors may be loaded, or a ``torch.export`` archive with
        anything besides tensors and operators. It runs code of the file.
    max_bytes : int
        Largest file to read, and largest tensor in it.

    Raises
    ------
    LoadError
        A ValueError of one line, for every problem with the file, factory or input shapes.
    ImportError
        If an optional package (``convspectra[onnx]``, ``convspectra[safetensors]``) is missing.

    Notes
    -----
    TorchScript archives execute their own code when they are loaded and run; so does the factory.
    ONNX files are only read. Weights of ONNX external data must lie in the folder of the model.
    What cannot be printed in a name is escaped.
    """
    shapes = [_checked_shape(shape) for shape in input_shapes]
    if path is None:
        if factory is None:
            raise LoadError("expected a model file, a factory or both, got neither")
        return factory.rpartition(":")[2], factory_targets(factory, shapes)
    path = Path(path)
    return plain(path.stem), [
        _printable(target) for target in _targets(path, shapes, factory, allow_pickle, max_bytes)
    ]


def _targets(
    path: Path,
    shapes: list[tuple[int, ...]],
    factory: str | None,
    allow_pickle: bool,
    max_bytes: int,
) -> list[Target]:
    kind = model_kind(path, max_bytes)
    if kind == "onnx":
        return _onnx_targets(path, shapes, max_bytes)
    if kind == "torchscript":
        return script_targets(path, shapes)
    if kind == "export":
        return exported_targets(path, shapes, allow_pickle)
    if kind == "safetensors":
        return safetensors_targets(path, shapes, factory)
    return checkpoint_targets(path, shapes, factory, allow_pickle)


def _printable(target: Target) -> Target:
    """The target with texts that a terminal shows as they are, whatever the file says."""
    return dataclasses.replace(
        target,
        name=plain(target.name),
        type=plain(target.type),
        batch_norm=plain(target.batch_norm),
        skipped=plain(target.skipped),
        notes=tuple(map(plain, target.notes)),
    )


def _onnx_targets(path: Path, shapes: list[tuple[int, ...]], max_bytes: int) -> list[Target]:
    try:
        from convspectra.models.files._onnx_targets import onnx_targets
    except ModuleNotFoundError as error:
        raise ImportError("pip install 'convspectra[onnx]' to read ONNX models") from error
    return onnx_targets(path, shapes, max_bytes)


def _checked_shape(shape: Sequence[int]) -> tuple[int, ...]:
    if any(isinstance(n, bool) or not isinstance(n, int) or n < 1 for n in shape):
        raise LoadError(f"expected an input shape of positive integers, got {tuple(shape)}")
    return tuple(shape)
