"""One-file archives: named tensors plus JSON metadata, in the safetensors format.

Nothing is ever unpickled, so that a file from a stranger can be opened. The metadata is one JSON
document under the key ``openmm_vtdis`` of the safetensors header:

    {"format": "openmm-vtdis", "version": 2, "kind": "generator" | "checkpoint", ...}

Beside it stands a CRC of the document and all tensors: a file that was altered is refused.
"""

from __future__ import annotations

import json
import os
import zlib
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save as serialize
from torch import Tensor

from openmm_vtdis.storage.atomic import write_atomically
from openmm_vtdis.storage.documents import check_version, parse_json

FORMAT = "openmm-vtdis"
FORMAT_VERSION = 2
_CONVERT = (
    "from the root of a checkout of the sources, python -m recipes.convert {path} NEW.vtdis "
    "converts it"
)
_KEY, _CHECKSUM = "openmm_vtdis", "crc32"


def write_archive(
    path: str | os.PathLike[str],
    kind: str,
    tensors: Mapping[str, Tensor],
    metadata: Mapping[str, Any],
) -> Path:
    """Write tensors and JSON-able metadata to one file, atomically.

    Parameters
    ----------
    path
        Destination; an existing file is replaced only once the new one is complete.
    kind
        What the archive holds, checked again by :func:`read_archive`.
    tensors
        Name to tensor, any device; stored from the CPU.
    metadata
        JSON-able document; NaN and infinity are refused.
    """
    header = {"format": FORMAT, "version": FORMAT_VERSION, "kind": kind, **metadata}
    document = json.dumps(header, allow_nan=False)
    packed = {name: tensor.detach().cpu().contiguous().clone() for name, tensor in tensors.items()}
    metadata = {_KEY: document, _CHECKSUM: _checksum(document, packed)}
    return write_atomically(path, serialize(packed, metadata=metadata))


def read_archive(
    path: str | os.PathLike[str], kind: str
) -> tuple[dict[str, Tensor], dict[str, Any]]:
    """Read an archive written by :func:`write_archive`; returns ``(tensors, metadata)``.

    Raises
    ------
    FileNotFoundError
        If there is no such file.
    ValueError
        If the file is truncated, altered, foreign, of another kind, or of another format version.
    """
    return _read(Path(path), lambda metadata: _check_header(Path(path), metadata, kind))


def read_any_version(path: str | os.PathLike[str]) -> tuple[dict[str, Tensor], dict[str, Any]]:
    """Read an archive of any kind and version, as :func:`read_archive` does."""
    return _read(Path(path), lambda metadata: None)


def _read(path: Path, check: Callable[[Any], None]) -> tuple[dict[str, Tensor], dict[str, Any]]:
    """Read a file whose metadata is checked before its tensors."""
    if path.is_dir():
        raise ValueError(f"{path}: expected an {FORMAT} archive, got a folder")
    if not path.is_file():
        raise FileNotFoundError(f"{path}: no such archive")
    try:
        with safe_open(path, framework="pt", device="cpu") as archive:
            header = archive.metadata() or {}
            document = header.get(_KEY)
            if document is None:
                raise ValueError(
                    f"{path}: expected an {FORMAT} archive, got a foreign safetensors file"
                )
            metadata = parse_json(document)
            check(metadata)
            tensors = {name: archive.get_tensor(name) for name in archive.keys()}  # noqa: SIM118
            if header.get(_CHECKSUM) != _checksum(document, tensors):
                raise ValueError(f"{path}: expected a whole archive, got one that was altered")
    except (SafetensorError, json.JSONDecodeError, OSError) as error:
        raise ValueError(
            f"{path}: expected an {FORMAT} archive, got a truncated or foreign file ({error})"
        ) from error
    return tensors, metadata


def _checksum(document: str, tensors: Mapping[str, Tensor]) -> str:
    crc = zlib.crc32(document.encode())
    for name in sorted(tensors):
        tensor = tensors[name].contiguous()
        crc = zlib.crc32(f"{name} {tensor.dtype} {tuple(tensor.shape)}".encode(), crc)
        crc = zlib.crc32(tensor.flatten().view(torch.uint8).numpy().data, crc)
    return str(crc)


def _check_header(path: Path, metadata: Any, kind: str) -> None:
    if not isinstance(metadata, dict) or metadata.get("format") != FORMAT:
        raise ValueError(f"{path}: expected an {FORMAT} archive, got a foreign header")
    version = metadata.get("version")
    check_version(path, "archive", version, FORMAT_VERSION, _CONVERT.format(path=path))
    if metadata.get("kind") != kind:
        raise ValueError(f"{path}: expected a {kind} archive, got a {metadata.get('kind')!r} one")


def select_prefix(tensors: Mapping[str, Tensor], prefix: str) -> dict[str, Tensor]:
    """Return the tensors whose names start with ``prefix``, the prefix removed."""
    return {name[len(prefix) :]: t for name, t in tensors.items() if name.startswith(prefix)}
