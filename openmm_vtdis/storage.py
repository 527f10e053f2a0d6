"""One-file archives: named tensors plus JSON metadata, in the safetensors format.

Nothing is ever unpickled, so that a file from a stranger can be opened. The metadata is one JSON
document under the key ``openmm_vtdis`` of the safetensors header:

    {"format": "openmm-vtdis", "version": 1, "kind": "generator" | "checkpoint", ...}

Beside it stands a CRC of the document and all tensors: a file that was altered is refused.

Writes go to a temporary file in the same directory, are flushed to disk and then renamed, so that
a file under its final name is always whole.
"""

from __future__ import annotations

import contextlib
import errno
import hashlib
import json
import os
import uuid
import zlib
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any
from xml.etree import ElementTree

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save as serialize
from torch import Tensor

FORMAT = "openmm-vtdis"
FORMAT_VERSION = 1
_KEY, _CHECKSUM = "openmm_vtdis", "crc32"
_NO_ROOM = (errno.ENOSPC, errno.EFBIG, errno.EDQUOT)
"""Errors of a write, which do not say of which file."""


@contextlib.contextmanager
def replacing(path: str | os.PathLike[str]) -> Iterator[Path]:
    """A temporary name beside ``path``; what was written there takes the place of ``path``.

    Flushed to disk first; nothing is replaced if an exception passes. A link stays one: what it
    points to is written.

    Raises
    ------
    ValueError
        If ``path`` is a folder or a device, or in a folder that does not exist.
    OSError
        If there is no room, with the file's name.
    """
    path = Path(os.path.realpath(path))
    free = path.is_file() or not os.path.lexists(path)  # no folder, device or loop of links
    if not free or not path.parent.is_dir():
        raise ValueError(f"{path}: expected the name of a file in a folder that exists")
    temporary = path.with_name(f".{path.name}.{uuid.uuid4().hex[:12]}.part")
    try:
        temporary.open("xb").close()  # with the permissions that the user's files have
    except OSError as error:
        raise OSError(error.errno, f"cannot write there: {error.strerror}", str(path)) from error
    try:
        yield temporary
        with temporary.open("rb") as file:
            os.fsync(file.fileno())
        os.replace(temporary, path)
    except BaseException as error:
        temporary.unlink(missing_ok=True)
        if isinstance(error, OSError) and error.errno in _NO_ROOM:
            error.filename = str(path)
        raise


def write_atomically(path: str | os.PathLike[str], content: bytes) -> Path:
    """Write ``content`` to ``path`` as :func:`replacing` does."""
    with replacing(path) as temporary:
        temporary.write_bytes(content)
    return Path(path)


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
        If the file is truncated, altered, foreign, of another kind, or of a newer format version.
    """
    path = Path(path)
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
            _check_header(path, metadata, kind)
            tensors = {name: archive.get_tensor(name) for name in archive.keys()}  # noqa: SIM118
            if header.get(_CHECKSUM) != _checksum(document, tensors):
                raise ValueError(f"{path}: expected a whole archive, got one that was altered")
    except (SafetensorError, json.JSONDecodeError, OSError) as error:
        raise ValueError(
            f"{path}: expected an {FORMAT} archive, got a truncated or foreign file ({error})"
        ) from error
    return tensors, metadata


def parse_json(text: str) -> Any:
    """The JSON document that a text holds.

    Raises
    ------
    json.JSONDecodeError
        If it holds none, or one that is nested too deeply for Python.
    """
    try:
        return json.loads(text)
    except RecursionError as error:
        raise json.JSONDecodeError("nested too deeply", text, 0) from error


def differences(there: Mapping[str, Any], here: Mapping[str, Any]) -> str:
    """Settings that differ, with both values; "" where none does."""
    names = sorted(there.keys() | here.keys())
    return ", ".join(
        f"{name} ({there.get(name, 'nothing')} there, {here.get(name, 'nothing')} here)"
        for name in names
        if (name in there) != (name in here) or there.get(name) != here.get(name)
    )


def digest(*parts: str | Tensor) -> str:
    """SHA-256 of texts and of the shapes and bytes of tensors."""
    found = hashlib.sha256()
    for part in parts:
        if isinstance(part, str):
            found.update(part.encode())
        else:
            found.update(str(tuple(part.shape)).encode())
            content = part.detach().cpu().contiguous().flatten().view(torch.uint8)
            found.update(content.numpy().tobytes())
    return found.hexdigest()


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
    if not isinstance(version, int) or version > FORMAT_VERSION:
        raise ValueError(
            f"{path}: expected archive format version <= {FORMAT_VERSION}, got {version!r}; "
            "a newer openmm-vtdis wrote it: upgrade to read it"
        )
    if metadata.get("kind") != kind:
        raise ValueError(f"{path}: expected a {kind} archive, got a {metadata.get('kind')!r} one")


def flatten_tensors(tree: Mapping[str, Any], prefix: str = "") -> dict[str, Tensor]:
    """Flatten nested dictionaries of tensors to dotted names, skipping nothing.

    Raises
    ------
    ValueError
        If a leaf is not a tensor.
    """
    flat: dict[str, Tensor] = {}
    for name, value in tree.items():
        if isinstance(value, Mapping):
            flat.update(flatten_tensors(value, f"{prefix}{name}."))
        elif isinstance(value, torch.Tensor):
            flat[prefix + name] = value
        else:
            raise ValueError(f"{prefix}{name}: expected a tensor, got {type(value).__name__}")
    return flat


def select_prefix(tensors: Mapping[str, Tensor], prefix: str) -> dict[str, Tensor]:
    """Return the tensors whose names start with ``prefix``, the prefix removed."""
    return {name[len(prefix) :]: t for name, t in tensors.items() if name.startswith(prefix)}


def mentions(xml: str, name: str) -> bool:
    """Whether a name occurs in an XML document, as it is written or once entities are resolved.

    Raises
    ------
    ValueError
        If the document cannot be parsed.
    """
    try:
        elements = list(ElementTree.fromstring(xml).iter())
    except ElementTree.ParseError as error:
        raise ValueError(f"text that is no XML ({error})") from error
    words = (word for e in elements for word in (e.tag, e.text or "", *e.attrib.values()))
    return name in xml or any(name in word for word in words)
