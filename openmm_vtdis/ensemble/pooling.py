"""Whether ensembles may become one: of one system, and with no sample twice."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

import numpy as np
from openmm import app

from openmm_vtdis.ensemble.notes import both, says
from openmm_vtdis.topology import topology_to_json

if TYPE_CHECKING:
    from openmm_vtdis.ensemble.weighted import WeightedEnsemble


def check_poolable(ensembles: Sequence[WeightedEnsemble]) -> None:
    """Refuse ensembles of several systems, or with samples in common.

    Raises
    ------
    ValueError
        With what differs, or how many samples stand in which two.
    """
    if not ensembles:
        raise ValueError("concatenate: expected at least one ensemble, got none")
    first = ensembles[0]
    for k, other in enumerate(ensembles):
        if not isinstance(other, type(first)) or not hasattr(other, "reduced_energies"):
            raise ValueError(
                f"concatenate: expected WeightedEnsembles, got {type(other).__name__} in place {k}"
            )
        for what, a, b in (
            ("particles and dimensions", first.positions.shape[1:], other.positions.shape[1:]),
            ("temperature", first.temperature, other.temperature),
            ("topology", _document(first.topology), _document(other.topology)),
            ("Hamiltonian", *both("hamiltonian", first.metadata, other.metadata)),
            ("kind of weights", _says("unweighted", first), _says("unweighted", other)),
        ):
            if a != b:
                plain = what in ("particles and dimensions", "temperature")
                raise ValueError(
                    f"concatenate: expected one {what}, but ensemble {k} differs from the first"
                    + (f" ({b} instead of {a})" if plain else "")
                )
    if not all(_says("resampled_from", ensemble) for ensemble in ensembles):
        _check_independent(ensembles)


def _check_independent(ensembles: Sequence[WeightedEnsemble]) -> None:
    """Raise ValueError if a sample with weight stands in two ensembles."""
    seen: dict[bytes, int] = {}
    copies: dict[tuple[int, int], int] = {}
    for k, ensemble in enumerate(ensembles):
        alive = np.isfinite(ensemble.log_weights)
        for key in {frame.tobytes() for frame in ensemble.positions[alive]}:
            first = seen.setdefault(key, k)
            if first != k:
                copies[first, k] = copies.get((first, k), 0) + 1
    if copies:
        (i, j), n = next(iter(copies.items()))
        raise ValueError(
            f"concatenate: expected independent samples, got {n} that stand in ensembles {i} and "
            f"{j} both; were they drawn with one seed, or one of them from the other?"
        )


def _says(key: str, ensemble: WeightedEnsemble) -> bool:
    return bool(says(key, ensemble.metadata))


def _document(topology: app.Topology | None) -> dict[str, Any] | None:
    return None if topology is None else topology_to_json(topology)
