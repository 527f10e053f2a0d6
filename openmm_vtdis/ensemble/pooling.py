"""Checks that ensembles may be pooled: of one system, and with no sample twice."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np
from openmm import app
from scipy.spatial import cKDTree

from openmm_vtdis.ensemble.contents import Samples
from openmm_vtdis.ensemble.provenance import Stream, both
from openmm_vtdis.topology import topology_to_json

_ROUNDING = 1e-3
"""Difference of copies, over the root-mean-square coordinate: networks may run in bfloat16."""
_TRIED = 2_000


def check_poolable(ensembles: Sequence[Samples]) -> None:
    """Refuse ensembles of several systems, or with samples in common.

    Raises
    ------
    ValueError
        If systems differ, or two ensembles share samples; the message says which.
    """
    if not ensembles:
        raise ValueError("concatenate: expected at least one ensemble, got none")
    first = ensembles[0]
    hamiltonian = None
    for k, other in enumerate(ensembles):
        if not isinstance(other, type(first)) or not hasattr(other, "reduced_energies"):
            raise ValueError(
                f"concatenate: expected WeightedEnsembles, got {type(other).__name__} in place {k}"
            )
        for what, a, b in (
            ("particles and dimensions", first.positions.shape[1:], other.positions.shape[1:]),
            ("temperature", first.temperature, other.temperature),
            ("topology", _document(first.topology), _document(other.topology)),
            ("Hamiltonian", *both(hamiltonian, other.provenance.hamiltonian)),
            ("Hamiltonian", _unknown(first), _unknown(other)),
            ("kind of weights", first.provenance.unweighted, other.provenance.unweighted),
        ):
            if a != b:
                plain = what in ("particles and dimensions", "temperature")
                raise ValueError(
                    f"concatenate: expected one {what}, but ensemble {k} differs from the first"
                    + (f" ({b} instead of {a})" if plain else "")
                )
        hamiltonian = hamiltonian or other.provenance.hamiltonian
    if any(ensemble.provenance.resampled_from is None for ensemble in ensembles):
        _check_independent(ensembles)
        _check_streams(ensembles)


def _unknown(ensemble: Samples) -> bool:
    """Whether samples were reweighted to a Hamiltonian of which nothing is known."""
    return ensemble.provenance.reweighted and ensemble.provenance.hamiltonian is None


def _check_streams(ensembles: Sequence[Samples]) -> None:
    """Raise ValueError if one stream of random numbers made samples of two ensembles.

    That happens in two runs with one seed, or in one that was repeated on another machine, whose
    samples are nearly alike. Slices of one run share a stream, but no samples.
    """
    seen: dict[str, list[tuple[int, Stream]]] = {}
    for k, ensemble in enumerate(ensembles):
        for stream in ensemble.provenance.streams:
            for earlier, other in seen.setdefault(stream.numbers, []):
                alike = other == stream and not _nearly_alike(ensembles[earlier], ensemble)
                if earlier != k and not alike:
                    raise ValueError(
                        f"concatenate: expected independent samples, got ensembles {earlier} and "
                        f"{k} that were drawn with one seed; give each run a seed of its own"
                    )
            seen[stream.numbers].append((k, stream))


def _nearly_alike(one: Samples, other: Samples) -> bool:
    """Whether samples of two ensembles are copies but for rounding."""
    a, b = (
        e.positions[np.isfinite(e.log_weights)].reshape(-1, e.positions[0].size)
        for e in (one, other)
    )
    if not len(a) or not len(b):
        return False
    size = _ROUNDING * float(np.sqrt(np.square(a).mean()))
    directions = np.random.default_rng(0).normal(size=(a.shape[1], 3)) / np.sqrt(a.shape[1])
    near = cKDTree(b @ directions).query_ball_point(a[:_TRIED] @ directions, 3.0 * size)
    found = sum(
        bool((np.abs(b[k] - x).max(axis=1) < size).any())
        for x, k in zip(a[:_TRIED], near, strict=True)
        if k
    )
    return found > 0.01 * min(len(a), _TRIED)


def _check_independent(ensembles: Sequence[Samples]) -> None:
    """Raise ValueError if a sample with weight stands in two ensembles."""
    seen: dict[int, int] = {}
    copies: dict[tuple[int, int], int] = {}
    for k, ensemble in enumerate(ensembles):
        alive = np.isfinite(ensemble.log_weights)
        for key in {hash(frame.tobytes()) for frame in ensemble.positions[alive]}:
            first = seen.setdefault(key, k)
            if first != k:
                copies[first, k] = copies.get((first, k), 0) + 1
    if copies:
        (i, j), n = next(iter(copies.items()))
        raise ValueError(
            f"concatenate: expected independent samples, got {n} that stand in ensembles {i} and "
            f"{j} both; were they drawn with one seed, or one of them from the other?"
        )


def pooled_metadata(notes: Sequence[dict[str, Any]]) -> dict[str, Any]:
    """Metadata of pooled ensembles: as they are if all are the same."""
    if all(other == notes[0] for other in notes):
        return notes[0]
    return {"concatenated": list(notes)}


def _document(topology: app.Topology | None) -> dict[str, Any] | None:
    return None if topology is None else topology_to_json(topology)
