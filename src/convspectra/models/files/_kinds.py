"""The kind of model that a file holds, by its content."""

from __future__ import annotations

import struct
import zipfile
from pathlib import Path

from convspectra.models.files._errors import LoadError, refusing

MAX_BYTES = 8 * 2**30
"""Largest file, and largest tensor in it; a choice: 8 GiB, above the audits that a workstation's
memory allows.
"""

_LARGEST_RATIO = 200
"""Most that an archive may say it unpacks to, over its size. PyTorch stores without compression,
ratio 1; deflate reaches 1000, so that half or double of this refuses bombs as well.
"""

_CHUNK = 2**20
"""Bytes that are read at once; a choice."""

_KNOWN = (
    "expected ONNX, TorchScript, a torch.export archive, safetensors or a torch.save checkpoint"
)
"""End of messages about files of other kinds."""

_KERAS = (
    "a Keras or other HDF5 file, which is not read here; export the model to ONNX, with "
    "model.export('model.onnx', format='onnx') of Keras 3 or with tf2onnx, and give that file"
)
"""Message for .keras and .h5 files."""


def model_kind(path: Path, max_bytes: int) -> str:
    """One of "onnx", "torchscript", "export", "safetensors", "checkpoint".

    Raises
    ------
    LoadError
        For a file that is missing, no file, empty, larger than `max_bytes` (compressed or not),
        damaged or of no known kind.
    """
    _check_size(path, max_bytes)
    with refusing(path, "cannot be read"), path.open("rb") as file:
        head = file.read(16)
    if head.startswith(b"PK\x03\x04"):
        return _archive_kind(path, max_bytes)
    if head.startswith(b"\x89HDF"):
        raise LoadError(f"{path}: {_KERAS}")
    length = struct.unpack("<Q", head[:8])[0] if head[8:9] == b"{" else None
    fits = length is not None and length <= path.stat().st_size - 8
    if head.startswith(b"\x80") and not fits:  # a header may have this many bytes, too
        return "checkpoint"
    if length is not None:
        if not fits:
            raise LoadError(
                f"{path}: a safetensors file cut short, its header of {length} bytes does not "
                "fit; copy the file again"
            )
        return "safetensors"
    if head.startswith(b"\x08") or path.suffix == ".onnx":
        return "onnx"
    raise LoadError(f"{path}: not a model file; {_KNOWN}")


def _check_size(path: Path, max_bytes: int) -> None:
    with refusing(path, "cannot be read"):
        exists, is_file = path.exists(), path.is_file()
    if not exists:
        raise LoadError(f"{path}: no such file; check the path")
    if not is_file:
        raise LoadError(f"{path}: not a file; give the model file itself")
    with refusing(path, "cannot be read"):
        size = path.stat().st_size
    if size == 0:
        raise LoadError(f"{path}: the file is empty; copy it again")
    if size > max_bytes:
        raise LoadError(
            f"{path}: {size} bytes are more than the limit of {max_bytes} for a model file"
        )


def _archive_kind(path: Path, max_bytes: int) -> str:
    advice = "copy the file again"
    with refusing(path, "a broken zip archive", advice), zipfile.ZipFile(path) as archive:
        members = archive.infolist()
        if min((member.header_offset for member in members), default=0) > 0:
            raise zipfile.BadZipFile("its beginning or its end is missing")
    size = sum(member.file_size for member in members)
    packed = path.stat().st_size
    if size > max_bytes or size > _LARGEST_RATIO * packed + 2**20:
        raise LoadError(
            f"{path}: the archive of {packed} bytes says it unpacks to {size}; "
            "refused as a zip bomb"
        )
    with refusing(path, "a damaged archive", advice), zipfile.ZipFile(path) as archive:
        for member in members:
            _check_sum(archive, member)
    names = {member.filename.partition("/")[2] or member.filename for member in members}
    if any(name.startswith("models/") or "exported_program" in name for name in names):
        return "export"
    if "constants.pkl" in names or any(name.startswith("code/") for name in names):
        return "torchscript"
    if "model.weights.h5" in names:
        raise LoadError(f"{path}: {_KERAS}")
    if "data.pkl" in names:
        return "checkpoint"
    raise LoadError(f"{path}: a zip archive that holds no model; {_KNOWN}")


def _check_sum(archive: zipfile.ZipFile, member: zipfile.ZipInfo) -> None:
    if member.CRC == 0:  # PyTorch can be told to compute none
        return
    with archive.open(member) as file:
        while file.read(_CHUNK):
            pass
