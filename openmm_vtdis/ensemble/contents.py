"""Checks that the parts of an ensemble fit together."""

from __future__ import annotations

import json
from typing import Any, Protocol

import numpy as np
from openmm import app

from openmm_vtdis.core.ess import Array
from openmm_vtdis.ensemble.provenance import Provenance


class Samples(Protocol):
    """The parts of a :class:`~openmm_vtdis.ensemble.weighted.WeightedEnsemble`."""

    @property
    def positions(self) -> Array: ...

    @property
    def log_weights(self) -> Array: ...

    @property
    def reduced_energies(self) -> Array: ...

    @property
    def temperature(self) -> float | None: ...

    @property
    def topology(self) -> app.Topology | None: ...

    @property
    def provenance(self) -> Provenance: ...


def check_shape(x: Array) -> None:
    """Raise ValueError for positions that are not (n, M, D) with a sample."""
    if x.ndim != 3 or 0 in x.shape:
        raise ValueError(
            f"positions: expected shape (n, M, D) in nm with at least one sample, got {x.shape}"
        )


def check_arrays(x: Array, lw: Array, u: Array) -> None:
    """Check positions, log weights and reduced energies of n samples against each other.

    Raises
    ------
    ValueError
        If shapes differ, or a sample with weight has a position or an energy that is not finite.
    """
    for name, array in {"log_weights": lw, "reduced_energies": u}.items():
        if array.shape != (len(x),):
            raise ValueError(
                f"{name}: expected shape ({len(x)},), one per sample, got {array.shape}"
            )
    for name, finite in {
        "positions": np.isfinite(x).all(axis=(1, 2)),
        "reduced_energies": np.isfinite(u),
    }.items():
        bad = np.flatnonzero(~finite & np.isfinite(lw))
        if len(bad):
            raise ValueError(
                f"{name}: expected finite values wherever the log weight is, got NaN or "
                f"infinity in {len(bad)} of {len(x)} samples, the first at index {bad[0]}"
            )


def check_kinds(topology: object, provenance: object, n_particles: int) -> None:
    """Check a topology, which may be None, of so many atoms, and a provenance.

    Raises
    ------
    ValueError
        If either is something else.
    """
    if not isinstance(provenance, Provenance):
        raise ValueError(f"provenance: expected a Provenance, got {type(provenance).__name__}")
    if topology is None:
        return
    if not isinstance(topology, app.Topology):
        raise ValueError(
            f"topology: expected an openmm.app.Topology or None, got {type(topology).__name__}"
        )
    if topology.getNumAtoms() != n_particles:
        raise ValueError(
            f"topology: expected {n_particles} atoms as in the positions, got "
            f"{topology.getNumAtoms()}"
        )


def json_copy(metadata: object) -> dict[str, Any]:
    """A copy of the metadata that shares nothing with the original.

    Raises
    ------
    ValueError
        If they are no dictionary of JSON-able values.
    """
    if not isinstance(metadata, dict):
        raise ValueError(f"metadata: expected a dictionary, got {type(metadata).__name__}")
    try:
        copy: dict[str, Any] = json.loads(json.dumps(metadata, allow_nan=False))
    except (TypeError, ValueError) as error:
        raise ValueError(
            f"metadata: expected JSON-able values without NaN or infinity, got {error}"
        ) from error
    return copy


def frozen(array: Array) -> Array:
    """A read-only array; a copy unless it is one that nobody else can write to."""
    if array.flags.writeable or not array.flags.owndata:
        array = array.copy()
        array.flags.writeable = False
    return array
