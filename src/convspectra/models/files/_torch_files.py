"""PyTorch's own files: TorchScript, exported programs, checkpoints and pickled modules."""

from __future__ import annotations

import contextlib
import importlib
import inspect
import json
import pickle
import sys
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from convspectra.models._named_operators import NamedOperator, named_operators, traced_operators
from convspectra.models.files._errors import LoadError, refusing
from convspectra.models.files._exported_check import check_export
from convspectra.models.files._kinds import model_kind
from convspectra.text import sizes

_NESTED = ("state_dict", "model_state_dict", "model", "net", "params_ema", "params")
"""Keys under which checkpoints keep the state dict."""

_PREFIXES = ("module.", "_orig_mod.", "model.", "net.")
"""In front of every name after (Distributed)DataParallel, ``torch.compile``, and where a Lightning
module keeps the model under one of these names.
"""
_WHOLE = "model.safetensors"
"""The file of weights in a folder of Hugging Face's."""
_COUNTER = "num_batches_tracked"
"""A buffer of batch normalization that old checkpoints lack, and PyTorch does without."""

_SHOWN = 3
"""Names of keys in a message; a choice: enough to see a pattern."""

_UNGUARDED = {  # the guards of an exported program are Python in its file
    option: False
    for option in inspect.signature(torch.export.ExportedProgram.module).parameters
    if option == "check_guards"
}
"""Option against the guards of an exported program, which are Python in its file; where PyTorch
has it.
"""


def script_operators(path: Path, shapes: Sequence[tuple[int, ...]]) -> list[NamedOperator]:
    """The layers of a TorchScript archive, by one run on zeros.

    Loading and running a TorchScript archive executes the code in it.
    """
    with refusing(path, "not a whole TorchScript archive", "save it again with torch.jit.save"):
        model = torch.jit.load(str(path), map_location="cpu")
        model.eval()
    return _run(path, model, shapes, traced_operators)


def exported_operators(
    path: Path, shapes: Sequence[tuple[int, ...]], allow_pickle: bool
) -> list[NamedOperator]:
    """The layers of a ``torch.export.save`` archive, by one run on zeros.

    Without `allow_pickle` the archive is checked to run no code of its own, and not loaded if it
    does.
    """
    if not allow_pickle:
        check_export(path)
    with refusing(path, "not a whole torch.export archive", "save it again with torch.export.save"):
        model = torch.export.load(path).module(**_UNGUARDED)
    return _run(path, model, shapes, traced_operators)


def checkpoint_operators(
    path: Path, shapes: Sequence[tuple[int, ...]], factory: str | None, allow_pickle: bool
) -> list[NamedOperator]:
    """The layers of the factory's model with a checkpoint's weights, or of a pickled module."""
    content = _unpickled(path, allow_pickle)
    if isinstance(content, nn.Module):
        return _run(path, content, shapes, named_operators)
    return _filled_operators(path, content, shapes, factory)


def safetensors_operators(
    path: Path, shapes: Sequence[tuple[int, ...]], factory: str | None
) -> list[NamedOperator]:
    """The layers of the factory's model with the weights of a safetensors file."""
    return _filled_operators(path, _safetensors(path), shapes, factory)


def folder_operators(
    folder: Path, shapes: Sequence[tuple[int, ...]], factory: str | None, max_bytes: int
) -> list[NamedOperator]:
    """The layers of the factory's model with the safetensors of a folder, as Hugging Face has it.

    One file ``model.safetensors``, or several that ``model.safetensors.index.json`` lists.
    """
    state: dict[str, Tensor] = {}
    for path in _shards(folder):
        kind = model_kind(path, max_bytes)
        if kind != "safetensors":
            raise LoadError(f"{path}: expected safetensors, got {kind}; copy the file again")
        state |= _safetensors(path)
    return _filled_operators(folder, state, shapes, factory)


def _shards(folder: Path) -> list[Path]:
    index, whole = folder / f"{_WHOLE}.index.json", folder / _WHOLE
    if whole.is_file():
        return [whole]
    if not index.is_file():
        raise LoadError(
            f"{folder}: a folder without {_WHOLE} or {index.name}; give the model file itself"
        )
    with refusing(index, "not an index of safetensors files", "copy the folder again"):
        names = sorted(set(json.loads(index.read_text(encoding="utf-8"))["weight_map"].values()))
        for name in names:
            if Path(name).name != name:
                raise ValueError(f"{name!r} lies in another folder")
        return [folder / name for name in names]


def filled_module(path: Path, kind: str, factory: str, allow_pickle: bool) -> nn.Module:
    """The factory's model with the weights of a file that is a checkpoint or safetensors."""
    content = _safetensors(path) if kind == "safetensors" else _unpickled(path, allow_pickle)
    return _filled(path, content, factory)


def _safetensors(path: Path) -> dict[str, Tensor]:
    try:
        from safetensors.torch import load_file  # optional
    except ModuleNotFoundError as error:
        raise ImportError("pip install 'convspectra[safetensors]' to read safetensors") from error
    with refusing(path, "not a whole safetensors file", "copy the file again"):
        return load_file(path)


def factory_operators(factory: str, shapes: Sequence[tuple[int, ...]]) -> list[NamedOperator]:
    """The layers of the factory's model as it comes."""
    return _run(factory, built(factory), shapes, named_operators)


def built(factory: str) -> nn.Module:
    """The model that a function "package.module:function" returns.

    Raises
    ------
    LoadError
        If there is no such function, it raises, or it returns something else.
    """
    module_name, colon, function_name = factory.partition(":")
    if not (module_name and colon and function_name):
        raise LoadError(f'{factory}: expected a factory as "package.module:function"')
    with _current_folder_seen():
        with refusing(factory, "the factory cannot be imported", "check the name and sys.path"):
            function = importlib.import_module(module_name)
            for part in function_name.split("."):
                function = getattr(function, part)
        with refusing(factory, "the factory failed", "it is called without arguments"):
            model: Any = function()  # type: ignore[operator]
    if not isinstance(model, nn.Module):
        raise LoadError(
            f"{factory}: expected the factory to return a torch.nn.Module, "
            f"got {type(model).__name__}"
        )
    return model


@contextlib.contextmanager
def _current_folder_seen() -> Iterator[None]:
    """Modules of the current folder can be imported, after all others; the path of before then."""
    folder = str(Path.cwd())
    added = folder not in sys.path
    sys.path += [folder] * added
    try:
        yield
    finally:
        if added and folder in sys.path:
            sys.path.remove(folder)


def _unpickled(path: Path, allow_pickle: bool) -> Any:
    advice = "save it again with torch.save"
    try:
        with refusing(path, "not a whole checkpoint", advice):
            return torch.load(path, map_location="cpu", weights_only=True)
    except LoadError as error:
        if not _needs_pickle(error.__cause__):
            raise
        if not allow_pickle:
            raise LoadError(
                f"{path}: a pickle of more than tensors, and unpickling it runs arbitrary code; "
                "give a state dict and a factory, or --allow-pickle (allow_pickle=True) if you "
                "trust the file"
            ) from error
    with refusing(path, "cannot be unpickled", advice):
        return torch.load(path, map_location="cpu", weights_only=False)


def _needs_pickle(error: BaseException | None) -> bool:
    return isinstance(error, pickle.UnpicklingError) and "Weights only load failed" in str(error)


def _filled_operators(
    path: Path, content: Any, shapes: Sequence[tuple[int, ...]], factory: str | None
) -> list[NamedOperator]:
    return _run(path, _filled(path, content, factory), shapes, named_operators)


def _filled(path: Path, content: Any, factory: str | None) -> nn.Module:
    """The factory's model with the weights of a checkpoint."""
    state = _state_dict(path, content)
    if factory is None:
        raise LoadError(
            f"{path}: weights without a model; give the function that builds it as a factory, "
            '"package.module:function"'
        )
    model = built(factory)
    expected = set(model.state_dict())
    state = _without_prefixes(state, expected)
    with refusing(path, f"the weights do not fit the model of {factory}"):
        try:  # PyTorch judges: it takes what was saved before some of its buffers were there
            model.load_state_dict(state, strict=True)
        except RuntimeError:
            _check_keys(path, factory, expected, set(state))
            raise
    return model


def _state_dict(path: Path, content: Any) -> dict[str, Tensor]:
    """The state dict in a checkpoint."""
    for key in _NESTED:
        if isinstance(content, Mapping) and isinstance(content.get(key), Mapping):
            content = content[key]
            break
    if not isinstance(content, Mapping) or not content:
        raise LoadError(f"{path}: expected a state dict, got {type(content).__name__}")
    if not all(isinstance(key, str) for key in content):
        raise LoadError(f"{path}: expected a state dict with names as keys")
    return dict(content)


def _without_prefixes(state: dict[str, Tensor], expected: set[str]) -> dict[str, Tensor]:
    """The same without what wrappers put in front of every name, unless the model has it too."""
    while not expected & set(state):
        prefix = next((p for p in _PREFIXES if all(key.startswith(p) for key in state)), None)
        if prefix is None:
            break
        state = {key.removeprefix(prefix): value for key, value in state.items()}
    return state


def _check_keys(path: Path, factory: str, expected: set[str], got: set[str]) -> None:
    missing = {key for key in expected - got if not key.endswith(_COUNTER)}
    parts = [
        f"{len(keys)} {what}: {', '.join(sorted(keys)[:_SHOWN])}{', ...' * (len(keys) > _SHOWN)}"
        for what, keys in (("missing", missing), ("unexpected", got - expected))
        if keys
    ]
    if parts:
        raise LoadError(
            f"{path}: the keys are not those of the model of {factory}: {'; '.join(parts)}"
        )


def _run(
    subject: object,
    model: nn.Module,
    shapes: Sequence[tuple[int, ...]],
    operators: Callable[[nn.Module, Any], list[NamedOperator]],
) -> list[NamedOperator]:
    floating = (p.dtype for p in model.parameters() if p.is_floating_point())
    dtype = next(floating, torch.float32)
    inputs = tuple(torch.zeros(1, *shape, dtype=dtype, device="cpu") for shape in shapes)
    written = ", ".join(sizes((1, *shape)) for shape in shapes)
    with refusing(
        subject,
        f"the model does not run on zeros of {written or 'no shape'}",
        "check the input shapes, --input",
    ):
        try:
            return operators(model, inputs)
        except Exception:
            with torch.no_grad():
                model(*inputs)  # TorchScript loses the cause of an error under a recorder
            raise
