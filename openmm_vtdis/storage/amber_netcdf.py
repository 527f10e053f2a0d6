"""Trajectories in the Amber convention (NetCDF-3), read in Python alone.

The NetCDF library waits for ever, or writes where it must not, on some damaged headers. Files of
weighted samples (:mod:`~openmm_vtdis.ensemble.files`) are trajectories of this kind too.
"""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

import numpy as np
from scipy.io import netcdf_file

from openmm_vtdis.storage.documents import parse_json

_PER_NANOMETER = 10.0
"""Angstrom, the convention's unit of coordinates, in a nanometre."""


@dataclass(frozen=True)
class AmberTrajectory:
    """Contents of a trajectory file.

    Attributes
    ----------
    xyz
        (n, M, 3) float32 in nm.
    log_weights, unweighted, temperature
        (n,), JSON and kelvin of weighted samples; None of any other trajectory.
    """

    xyz: np.ndarray
    log_weights: np.ndarray | None
    unweighted: bool = False
    temperature: float | None = None


def read_amber_netcdf(path: Path) -> AmberTrajectory | None:
    """Read a file; None if it is not NetCDF-3.

    Raises
    ------
    ValueError
        If it has no coordinates, or is damaged.
    """
    with path.open("rb") as start:
        if start.read(3) != b"CDF":
            return None
    try:
        with netcdf_file(path, mmap=False) as file:
            coordinates = file.variables.get("coordinates")
            if coordinates is None:
                there = ", ".join(map(str, file.variables)) or "none"
                raise ValueError(f"a NetCDF file without coordinates (variables: {there})")
            scale = float(getattr(coordinates, "scale_factor", 1.0)) / _PER_NANOMETER
            xyz = np.asarray(coordinates[:], dtype=np.float32) * np.float32(scale)
            text = getattr(file, "openmm_vtdis", None)
            weights = file.variables.get("log_weight")
            if text is None or weights is None:
                return AmberTrajectory(_checked(xyz), None)
            log_weights = np.array(weights[:], np.float64)
            document = parse_json(text.decode())
            unweighted = bool(document.get("provenance", {}).get("unweighted"))
            temperature = document.get("temperature")
            return AmberTrajectory(_checked(xyz), log_weights, unweighted, temperature)
    except Exception as error:  # whatever a damaged header leads to
        said = " ".join(str(error).split()) or type(error).__name__
        raise ValueError(said) from error


def _checked(xyz: np.ndarray) -> np.ndarray:
    if xyz.ndim != 3 or xyz.shape[2] != 3:
        raise ValueError(f"coordinates of shape {xyz.shape}")
    return xyz
