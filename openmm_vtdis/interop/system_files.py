"""Systems and Topologies from force-field and structure files.

===========================  ==============================================================
file                         what is read
===========================  ==============================================================
``.xml``                     OpenMM's XML of a System
``.prmtop``, ``.parm7``      AMBER, which has the topology too
``.psf``                     CHARMM, with the files of its parameters; the topology too
``.top``                     GROMACS (or AMBER, by its first line); the topology too
``.pdb``, ``.cif``, ...      a topology only
===========================  ==============================================================

Force-field files become Systems without a cutoff and without constraints, in vacuum or an implicit
solvent. The readers are OpenMM's; whatever they raise for a damaged or foreign file becomes a
ValueError of one line.
"""

from __future__ import annotations

import inspect
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, TypeVar

import openmm
from openmm import app

from openmm_vtdis.core import checks
from openmm_vtdis.storage.documents import mentions
from openmm_vtdis.targets.openmm.user_code import check_importable

T = TypeVar("T")

IMPLICIT_SOLVENTS = ("HCT", "OBC1", "OBC2", "GBn", "GBn2")
_MOST_MOLECULES = 100_000
"""Most molecules of a kind in a file: a System here is a molecule or a few."""
_CIF = (".cif", ".pdbx", ".mmcif")
_AMBER = (".prmtop", ".parm7", ".prm7")


def read_system(
    path: str,
    *,
    implicit_solvent: str | None = None,
    parameters: Sequence[str] = (),
    include_dir: str | None = None,
    allow_pickle: bool = False,
) -> openmm.System:
    """Read a System from XML, or build it from force-field files.

    Parameters
    ----------
    implicit_solvent
        One of :data:`IMPLICIT_SOLVENTS`, for files of a force field; None: vacuum.
    parameters
        CHARMM's files of parameters, for a psf.
    include_dir
        Where GROMACS's include files are.
    allow_pickle
        Whether XML may hold a PythonForce, whose pickle can run any code when it is read.

    Raises
    ------
    ValueError
        If the file is damaged or foreign, or lacks what stands in the other arguments.
    FileNotFoundError
        If there is none.
    """
    kind = _kind(path)
    if kind == "xml":
        if implicit_solvent or parameters or include_dir:
            raise ValueError(
                f"{path}: expected no options of a force field with the XML of a System, which has "
                "all of it"
            )
        return _read_xml(path, allow_pickle)
    options: dict[str, Any] = {"nonbondedMethod": app.NoCutoff, "constraints": None}
    options["rigidWater"] = False
    if implicit_solvent is not None:
        checks.choice("implicit_solvent", implicit_solvent, IMPLICIT_SOLVENTS)
        options["implicitSolvent"] = getattr(app, implicit_solvent)
    arguments: list[Any] = []
    if kind == "psf":
        if not parameters:
            raise ValueError(f"{path}: expected the files of CHARMM's parameters with it, got none")
        arguments = [_guarded(f"{parameters}", "parameters of CHARMM", _charmm, parameters)]
    made = _force_field_file(path, kind, include_dir)
    known = inspect.signature(made.createSystem).parameters
    if implicit_solvent is not None and "implicitSolvent" not in known:
        raise ValueError(
            f"{path}: expected no implicit solvent, which OpenMM has not for such files"
        )
    options = {name: value for name, value in options.items() if name in known}
    return _guarded(path, "a force field", made.createSystem, *arguments, **options)


def read_topology(path: str, include_dir: str | None = None) -> app.Topology:
    """Read a Topology from a PDB, PDBx/mmCIF, AMBER, CHARMM or GROMACS file.

    Raises
    ------
    ValueError
        If the file is damaged or foreign, or has no atoms.
    FileNotFoundError
        If there is none.
    """
    kind = _kind(path)
    if kind in ("amber", "psf", "gromacs"):
        topology = _force_field_file(path, kind, include_dir).topology
    else:
        read = app.PDBxFile if kind == "cif" else app.PDBFile
        topology = _guarded(
            path, "a PDB, mmCIF, prmtop, psf or top file", lambda: read(path).topology
        )
    if not topology.getNumAtoms():
        raise ValueError(f"{path}: expected a file with atoms, got one without")
    return topology


def has_topology(path: str) -> bool:
    """Whether a file from which a System is read has its topology too."""
    return _kind(path) in ("amber", "psf", "gromacs")


def _kind(path: str) -> str:
    """The kind of a file, from its suffix."""
    if not Path(path).is_file():
        raise FileNotFoundError(f"{path}: no such file")
    suffix = Path(path).suffix.lower()
    if suffix == ".top":
        with Path(path).open("rb") as file:
            return "amber" if file.read(8) == b"%VERSION" else "gromacs"
    if suffix in _AMBER:
        return "amber"
    if suffix in _CIF:
        return "cif"
    return {".psf": "psf", ".pdb": "pdb", ".ent": "pdb"}.get(suffix, "xml")


def _force_field_file(path: str, kind: str, include_dir: str | None) -> Any:
    if kind == "amber":
        return _guarded(path, "an AMBER prmtop", app.AmberPrmtopFile, path)
    if kind == "psf":
        return _guarded(path, "a CHARMM psf", app.CharmmPsfFile, path)
    if kind == "gromacs":
        _guarded(path, "a GROMACS top", _check_numbers, path)
        folder = include_dir or str(Path(path).parent)
        return _guarded(path, "a GROMACS top", app.GromacsTopFile, path, includeDir=folder)
    raise ValueError(
        f"{path}: expected the XML of a System, or an AMBER, CHARMM or GROMACS file, got "
        f"{Path(path).suffix or 'none'}"
    )


def _check_numbers(path: str) -> None:
    """Refuse a top file of more molecules than anybody has, which OpenMM would make one by one."""
    section = ""
    for line in Path(path).read_text(encoding="utf-8").splitlines():
        words = line.split(";")[0].split()
        if words and words[0].startswith("["):
            section = "".join(words)
        elif section == "[molecules]" and len(words) == 2 and words[1].isdecimal():
            number = int(words[1]) if len(words[1]) < 20 else _MOST_MOLECULES + 1
            if number > _MOST_MOLECULES:
                raise ValueError(f"{words[1]} molecules of {words[0]}, of up to {_MOST_MOLECULES}")


def _charmm(parameters: Sequence[str]) -> app.CharmmParameterSet:
    missing = [file for file in parameters if not Path(file).is_file()]
    if missing:
        raise FileNotFoundError(f"{missing[0]}: no such file")
    return app.CharmmParameterSet(*parameters)


def _read_xml(path: str, allow_pickle: bool) -> openmm.System:
    def read() -> Any:
        xml = Path(path).read_text(encoding="utf-8")
        if not allow_pickle and mentions(xml, "PythonForce"):
            return None
        check_importable(xml)
        return openmm.XmlSerializer.deserialize(xml)

    system = _guarded(path, "the XML of a System", read)
    if system is None:
        raise ValueError(
            f"{path}: expected a System without PythonForce, whose XML is a pickle that can run "
            "any code; pass --allow-pickle (allow_pickle=True) only if you trust where it is from"
        )
    if not isinstance(system, openmm.System):
        raise ValueError(f"{path}: expected the XML of a System, got {type(system).__name__}")
    return system


def _guarded(path: str, what: str, read: Callable[..., T], *arguments: Any, **options: Any) -> T:
    """Call ``read(...)``; turn any exception into a ValueError of one line."""
    try:
        return read(*arguments, **options)
    except OSError as error:
        if isinstance(error, FileNotFoundError):
            raise
        raise ValueError(f"{path}: expected {what}, got {error}") from error
    except Exception as error:
        said = " ".join(str(error).split()) or "an unreadable file"
        if type(error) is not ValueError:
            said = f"a damaged or foreign file ({type(error).__name__}: {said})"
        raise ValueError(f"{path}: expected {what}, got {said}") from error
