"""The entry point: a file, and what it holds."""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from os import PathLike
from pathlib import Path

from torch import nn

from convspectra.models._named_operators import NamedOperator
from convspectra.models.files._errors import LoadError, refusing
from convspectra.models.files._kinds import MAX_BYTES, model_kind
from convspectra.models.files._torch_files import (
    built,
    checkpoint_operators,
    exported_operators,
    factory_operators,
    filled_module,
    folder_operators,
    safetensors_operators,
    script_operators,
)
from convspectra.text import plain


def load_operators(
    path: str | PathLike[str] | None,
    input_shapes: Sequence[tuple[int, ...]],
    *,
    factory: str | None = None,
    allow_pickle: bool = False,
    max_bytes: int = MAX_BYTES,
) -> tuple[str, list[NamedOperator]]:
    """The name of a model in a file and its layers, ready to audit.

    Parameters
    ----------
    path : path, or None for the factory's model alone
        ONNX, TorchScript, ``torch.export.save``, safetensors or ``torch.save``; told apart by
        content. A folder with ``model.safetensors``, in one file or several, as Hugging Face has.
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
        return factory.rpartition(":")[2], factory_operators(factory, shapes)
    path = Path(path)
    return plain(path.stem), [
        _printable(named) for named in _operators(path, shapes, factory, allow_pickle, max_bytes)
    ]


def load_module(
    factory: str, weights: str | PathLike[str] | None = None, allow_pickle: bool = False
) -> nn.Module:
    """The model that a factory returns, with the weights of a file where there is one.

    Parameters
    ----------
    factory : str
        "package.module:function", called without arguments.
    weights : path, optional
        Safetensors, or what ``torch.save`` writes of a state dict.
    allow_pickle : bool
        As in `load_operators`.

    Raises
    ------
    LoadError
        For every problem with the factory or the file.
    """
    if weights is None:
        return built(factory)
    path = Path(weights)
    kind = model_kind(path, MAX_BYTES)
    if kind not in ("safetensors", "checkpoint"):
        raise LoadError(
            f"{path}: expected weights, safetensors or a torch.save checkpoint, got {kind}"
        )
    return filled_module(path, kind, factory, allow_pickle)


def _operators(
    path: Path,
    shapes: list[tuple[int, ...]],
    factory: str | None,
    allow_pickle: bool,
    max_bytes: int,
) -> list[NamedOperator]:
    with refusing(path, "cannot be read"):
        is_folder = path.is_dir()
    if is_folder:
        return folder_operators(path, shapes, factory, max_bytes)
    kind = model_kind(path, max_bytes)
    if kind == "onnx":
        return _onnx_operators(path, shapes, max_bytes)
    if kind == "torchscript":
        return script_operators(path, shapes)
    if kind == "export":
        return exported_operators(path, shapes, allow_pickle)
    if kind == "safetensors":
        return safetensors_operators(path, shapes, factory)
    return checkpoint_operators(path, shapes, factory, allow_pickle)


def _printable(named: NamedOperator) -> NamedOperator:
    """The named with texts that a terminal shows as they are, whatever the file says."""
    return dataclasses.replace(
        named,
        name=plain(named.name),
        type=plain(named.type),
        batch_norm=plain(named.batch_norm),
        skipped=plain(named.skipped),
        notes=tuple(map(plain, named.notes)),
    )


def _onnx_operators(
    path: Path, shapes: list[tuple[int, ...]], max_bytes: int
) -> list[NamedOperator]:
    try:
        from convspectra.models.files._onnx_layers import onnx_operators
    except ModuleNotFoundError as error:
        raise ImportError("pip install 'convspectra[onnx]' to read ONNX models") from error
    return onnx_operators(path, shapes, max_bytes)


def _checked_shape(shape: Sequence[int]) -> tuple[int, ...]:
    if any(isinstance(n, bool) or not isinstance(n, int) or n < 1 for n in shape):
        raise LoadError(f"expected an input shape of positive integers, got {tuple(shape)}")
    return tuple(shape)
