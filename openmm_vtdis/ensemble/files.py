"""Ensembles on disk: NetCDF that trajectory tools read too, and npz.

``.nc`` is a trajectory in the Amber convention (NetCDF-3, 64-bit offsets): float32 ``coordinates``
in angstrom, which mdtraj, cpptraj, MDAnalysis and VMD read, plus variables they ignore:

================  =====================  ==========================================
variable          dimensions             content
================  =====================  ==========================================
log_weight        frame                  log of the unnormalised weight, float64
reduced_energy    frame                  u(x) in kT, float64
positions         frame, atom, n_dims    x in nm, float64: what is read back
================  =====================  ==========================================

``.npz`` holds the same three arrays under the names of the attributes of a WeightedEnsemble.

``.nc`` and ``.npz`` carry one JSON document (temperature, topology, metadata, provenance) with a
CRC of it and of the three arrays. Nothing is ever unpickled, and files are written under a
temporary name first.
"""

from __future__ import annotations

import contextlib
import io
import json
import lzma
import os
import struct
import zipfile
import zlib
from collections.abc import Iterable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, TypedDict

import netCDF4
import numpy as np
from openmm import app
from scipy.io import netcdf_file

from openmm_vtdis._version import __version__
from openmm_vtdis.ensemble.provenance import Provenance
from openmm_vtdis.storage.atomic import replacing, write_atomically
from openmm_vtdis.storage.documents import check_version, parse_json
from openmm_vtdis.topology import topology_from_json, topology_to_json

FORMAT = "openmm-vtdis-ensemble"
FORMAT_VERSION = 2
_ATTRIBUTE = "openmm_vtdis"
_VARIABLES = {
    "positions": "positions",
    "log_weights": "log_weight",
    "reduced_energies": "reduced_energy",
}
"""Array of :class:`Contents` to NetCDF variable."""


class Contents(TypedDict):
    """Contents of an ensemble file: the fields of a WeightedEnsemble.

    ``positions`` (n, M, D) in nm, ``log_weights`` and ``reduced_energies`` (n,), all float64;
    ``temperature`` in K.
    """

    positions: np.ndarray
    log_weights: np.ndarray
    reduced_energies: np.ndarray
    temperature: float | None
    topology: app.Topology | None
    metadata: dict[str, Any]
    provenance: Provenance


def write_ensemble(path: str | os.PathLike[str], contents: Contents) -> Path:
    """Write an ensemble to ``path``, as NetCDF (.nc) or npz (.npz) by its suffix, atomically."""
    path = Path(path)
    pack = {".nc": _pack_netcdf, ".npz": _pack_npz}[_suffix(path)]
    arrays = _arrays(contents)
    return write_atomically(path, pack(path, arrays, _document(contents, [arrays])))


def join_ensembles(path: str | os.PathLike[str], parts: Sequence[Path]) -> Path:
    """Write one NetCDF file with the samples of many ensembles, of which one is read at a time.

    Raises
    ------
    ValueError
        If two differ in temperature, topology, metadata or shape.
    OSError
        If there is no room.
    """
    path, first = Path(path), read_ensemble(parts[0])
    provenances = [first["provenance"]]
    for part in parts[1:]:
        other = read_ensemble(part)
        provenances.append(other["provenance"])
        for what in ("temperature", "metadata"):
            if other[what] != first[what]:  # type: ignore[literal-required]
                raise ValueError(f"{part}: expected the {what} of {parts[0]}, got another")
        a, b = (c["topology"] and topology_to_json(c["topology"]) for c in (first, other))
        if a != b or other["positions"].shape[1:] != first["positions"].shape[1:]:
            raise ValueError(f"{part}: expected the particles of {parts[0]}, got others")
    first["provenance"] = Provenance.pooled(provenances)
    document = _document(first, _Parts(parts))
    with replacing(path) as temporary:
        shape = first["positions"].shape
        try:
            with contextlib.closing(_create_netcdf(path, shape, document, temporary)) as file:
                for part in parts:
                    _append(file, _arrays(read_ensemble(part)))
        except RuntimeError as error:  # of the NetCDF library, for a full disk too
            raise OSError(f"{path}: cannot be written: {error}") from error
    return path


def read_metadata(path: str | os.PathLike[str]) -> dict[str, Any]:
    """Metadata of an ensemble file; its arrays are not read, and the checksum is not tested."""
    path = Path(path)
    if _suffix(path) == ".nc":
        with netcdf_file(path) as file:
            text = getattr(file, _ATTRIBUTE, b"{}").decode()
    else:
        with np.load(path, allow_pickle=False) as archive:
            text = archive["document"].tobytes().decode() if "document" in archive else "{}"
    metadata: dict[str, Any] = parse_json(text).get("metadata", {})
    return metadata


class _Parts:
    """Arrays of the ensembles in files, read one by one, as often as asked."""

    def __init__(self, paths: Sequence[Path]) -> None:
        self.paths = paths

    def __iter__(self) -> Iterator[dict[str, np.ndarray]]:
        return (_arrays(read_ensemble(path)) for path in self.paths)


def _document(contents: Contents, parts: Iterable[Mapping[str, np.ndarray]]) -> str:
    """Everything of an ensemble but its arrays as JSON, with a checksum of both."""
    topology = contents["topology"]
    document = {
        "format": FORMAT,
        "version": FORMAT_VERSION,
        "temperature": contents["temperature"],
        "topology": None if topology is None else topology_to_json(topology),
        "metadata": contents["metadata"],
        "provenance": contents["provenance"].to_json(),
    }
    document["crc32"] = _checksum(document, parts)
    return json.dumps(document, allow_nan=False)


def read_ensemble(path: str | os.PathLike[str]) -> Contents:
    """Read an ensemble written by :func:`write_ensemble`.

    Raises
    ------
    FileNotFoundError
        If there is no such file.
    ValueError
        If the file is truncated, altered, foreign, or of a newer format version.
    """
    path = Path(path)
    unpack = {".nc": _unpack_netcdf, ".npz": _unpack_npz}[_suffix(path)]
    if not path.is_file():
        raise FileNotFoundError(f"{path}: no such ensemble")
    arrays, text = unpack(path)
    try:
        document = parse_json(text)
    except ValueError as error:
        raise _foreign(path, f"an unreadable document ({error})") from error
    if not isinstance(document, dict) or document.get("format") != FORMAT:
        raise _foreign(path, "a foreign document")
    check_version(path, "ensemble", document.get("version"), FORMAT_VERSION, "draw them again")
    missing = {"temperature", "topology", "metadata", "provenance", "crc32"} - set(document)
    if missing:
        raise _foreign(path, f"a document without {', '.join(sorted(missing))}")
    if _checksum(document, [arrays]) != document["crc32"]:
        raise _foreign(path, "content that does not match its checksum: truncated or altered")
    topology = document["topology"]
    return Contents(
        positions=arrays["positions"],
        log_weights=arrays["log_weights"],
        reduced_energies=arrays["reduced_energies"],
        temperature=document["temperature"],
        topology=None if topology is None else topology_from_json(topology),
        metadata=document["metadata"],
        provenance=Provenance.from_json(document["provenance"]),
    )


def _suffix(path: Path) -> str:
    suffix = path.suffix.lower()
    if suffix not in (".nc", ".npz"):
        raise ValueError(f"{path}: expected a file name that ends in .nc or .npz, got {suffix!r}")
    return suffix


def _foreign(path: Path, got: str) -> ValueError:
    got = " ".join(got.split())  # of which a damaged file may have any separators
    return ValueError(f"{path}: expected an ensemble written by openmm-vtdis, got {got}")


def _arrays(contents: Mapping[str, Any]) -> dict[str, np.ndarray]:
    return {name: np.ascontiguousarray(contents[name], dtype="<f8") for name in _VARIABLES}


def _checksum(document: Mapping[str, Any], parts: Iterable[Mapping[str, np.ndarray]]) -> int:
    """CRC of a document and of arrays in parts, which are gone through for each array."""
    shapes = [{name: arrays[name].shape for name in _VARIABLES} for arrays in parts]
    rest = {key: value for key, value in document.items() if key != "crc32"}
    crc = zlib.crc32(json.dumps(rest, sort_keys=True).encode())
    for name in _VARIABLES:
        shape = (sum(part[name][0] for part in shapes), *shapes[0][name][1:])
        crc = zlib.crc32(repr(shape).encode(), crc)
        for arrays in parts:
            crc = zlib.crc32(arrays[name].data.cast("B"), crc)
    return crc


# -- NetCDF -----------------------------------------------------------------------------------
def _pack_netcdf(path: Path, arrays: Mapping[str, np.ndarray], document: str) -> bytes:
    file = _create_netcdf(path, arrays["positions"].shape, document)
    _append(file, arrays)
    return bytes(file.close())


def _create_netcdf(
    path: Path, shape: tuple[int, ...], document: str, place: Path | None = None
) -> netCDF4.Dataset:
    """Create a trajectory without frames, in memory or in the file ``place``."""
    _, n_particles, n_dims = shape
    if n_dims > 3:
        raise ValueError(
            f"{path}: expected at most 3 dimensions in a NetCDF trajectory, got {n_dims}; save to "
            "a file that ends in .npz"
        )
    memory: dict[str, Any] = {"memory": 1024} if place is None else {}
    file = netCDF4.Dataset(place or path.name, mode="w", format="NETCDF3_64BIT_OFFSET", **memory)
    file.Conventions = "AMBER"
    file.ConventionVersion = "1.0"
    file.application = "OpenMM"
    file.program = "openmm-vtdis"
    file.programVersion = __version__
    file.setncattr(_ATTRIBUTE, document)
    for name, size in {"frame": None, "atom": n_particles, "spatial": 3, "n_dims": n_dims}.items():
        file.createDimension(name, size)
    file.createVariable("spatial", "S1", ("spatial",))[:] = np.array(["x", "y", "z"], dtype="S1")
    file.createVariable("coordinates", "f4", ("frame", "atom", "spatial")).units = "angstrom"
    log_weight = file.createVariable("log_weight", "f8", ("frame",))
    log_weight.long_name = "log of the unnormalised importance weight"
    file.createVariable("reduced_energy", "f8", ("frame",)).units = "kT"
    file.createVariable("positions", "f8", ("frame", "atom", "n_dims")).units = "nanometer"
    return file


def _append(file: netCDF4.Dataset, arrays: Mapping[str, np.ndarray]) -> None:
    """Append frames."""
    positions = arrays["positions"]
    start = len(file.dimensions["frame"])
    frames = slice(start, start + len(positions))
    padding = [(0, 0), (0, 0), (0, 3 - positions.shape[2])]
    with np.errstate(over="ignore"):  # a sample that exploded: of weight zero, infinite here
        file["coordinates"][frames] = np.pad(10.0 * positions, padding).astype(np.float32)
    for name, variable in _VARIABLES.items():
        file[variable][frames] = arrays[name]


def _unpack_netcdf(path: Path) -> tuple[dict[str, np.ndarray], str]:
    # scipy's reader is Python all through; the NetCDF library crashes on some damaged headers
    try:
        with netcdf_file(path, mmap=False) as file:
            found = {name: file.variables.get(v) for name, v in _VARIABLES.items()}
            document = getattr(file, _ATTRIBUTE, None)
            if document is not None and None not in found.values():
                arrays = {name: np.array(v[:], np.float64) for name, v in found.items()}
                return arrays, document.decode()
            missing = [_VARIABLES[name] for name, v in found.items() if v is None]
            there = ", ".join(file.variables) or "none"
    except Exception as error:  # whatever a damaged header leads to
        raise _foreign(path, f"a truncated or foreign file ({error})") from error
    raise _foreign(
        path,
        f"a NetCDF file without {', '.join(missing) or 'its document'} (variables: {there})",
    )


# -- npz --------------------------------------------------------------------------------------
_UNREADABLE = (
    zipfile.BadZipFile, zlib.error, lzma.LZMAError, struct.error, EOFError, OSError, ValueError,
    RuntimeError, MemoryError,
)  # fmt: skip
"""Exceptions that zipfile and numpy raise, whichever bytes are damaged."""


def _pack_npz(path: Path, arrays: Mapping[str, np.ndarray], document: str) -> bytes:
    buffer = io.BytesIO()
    text = np.frombuffer(document.encode(), dtype=np.uint8)
    np.savez(buffer, document=text, **arrays)  # type: ignore[arg-type]
    return buffer.getvalue()


def _unpack_npz(path: Path) -> tuple[dict[str, np.ndarray], str]:
    if not zipfile.is_zipfile(path):
        raise _foreign(path, "a truncated or foreign file (not a zip archive)")
    try:
        # before any array is made: a damaged header could ask for any amount of memory
        with zipfile.ZipFile(path) as archive:
            if archive.testzip() is not None:
                raise zipfile.BadZipFile("an array that does not match its checksum")
        with np.load(path, allow_pickle=False) as file:
            names = list(file.files)
            missing = {"document", *_VARIABLES} - set(names)
            if not missing:
                arrays = {name: np.array(file[name], dtype=np.float64) for name in _VARIABLES}
                return arrays, file["document"].astype(np.uint8).tobytes().decode()
    except _UNREADABLE as error:
        raise _foreign(path, f"a truncated or foreign file ({error})") from error
    raise _foreign(path, f"an npz file without {', '.join(sorted(missing))} (arrays: {names})")
