"""Checks that weights are of the kind that an estimate needs."""

from __future__ import annotations

import numpy as np

from openmm_vtdis.core import checks
from openmm_vtdis.ensemble.contents import Samples
from openmm_vtdis.ensemble.frame_weights import FrameLogWeights
from openmm_vtdis.ensemble.provenance import Provenance

_OF_ALL_DRAWS = ("log_z", "free_energy", "mbar", "analyze")
"""Estimates that need the samples without weight too."""


def check_weighted(name: str, provenance: Provenance) -> None:
    """Raise ValueError for samples without their weights, or without those that have none."""
    if provenance.unweighted:
        raise ValueError(f"{name}: expected samples with their weights, got unweighted ones")
    if name in _OF_ALL_DRAWS and provenance.selected_by_weight:
        raise ValueError(
            f"{name}: expected all samples, got those that have weight: the others count as "
            "draws; estimate before selecting"
        )


def check_as_drawn(name: str, provenance: Provenance) -> None:
    """Raise ValueError unless samples are as one proposal of the generator drew them."""
    check_weighted(name, provenance)
    if provenance.resampled_from is not None:
        raise ValueError(f"{name}: expected samples as drawn, got resampled ones")
    if provenance.reweighted:
        raise ValueError(
            f"{name}: expected samples weighted for the generator's own Hamiltonian and "
            "temperature, as log_weights() are, got reweighted ones; give those as drawn, and "
            "other states to mbar()"
        )
    if provenance.concatenated:
        raise ValueError(f"{name}: expected samples of one kernel, got several concatenated")


def check_same_proposal(name: str, ensemble: Samples, log_weights: object) -> None:
    """Check log weights of frames that are to be used together with samples.

    Raises
    ------
    ValueError
        If their provenance names another proposal, or if they are the samples' own.
    """
    values = checks.log_weights(log_weights)
    if np.ptp(values) > 0.0 and np.isin(values, ensemble.log_weights).all():
        raise ValueError(
            f"{name}: expected log weights of frames of MD, as log_weights() gives them, got "
            "those of the generated samples themselves"
        )
    if not isinstance(log_weights, FrameLogWeights):
        return
    theirs, ours = log_weights.provenance.proposal, ensemble.provenance.proposal
    if theirs is not None and ours is not None and theirs != ours:
        raise ValueError(
            f"{name}: expected log weights of frames against the proposal that drew the "
            "samples, got those against another; take log_weights() of the same generator, "
            "System, tuning and n_steps as sample(), or draw the samples again"
        )
