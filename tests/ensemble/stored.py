"""Ensembles that are written to files."""

from __future__ import annotations

import numpy as np
from openmmtools import testsystems

from openmm_vtdis.ensemble import WeightedEnsemble


def some_molecules() -> WeightedEnsemble:
    """Alanine dipeptide, with a sample of zero weight that has no coordinates or energy."""
    topology = testsystems.AlanineDipeptideVacuum(constraints=None).topology
    rng = np.random.default_rng(0)
    x = rng.normal(size=(20, 22, 3))
    lw, u = 1e4 + rng.normal(size=20), rng.normal(size=20)
    x[3], lw[3], u[3] = np.nan, -np.inf, np.nan
    return WeightedEnsemble(x, lw, u, 300.0, topology, {"method": "test", "times": [0.1, 2 / 3]})


def some_particles() -> WeightedEnsemble:
    rng = np.random.default_rng(1)
    return WeightedEnsemble(rng.normal(size=(7, 4, 2)), rng.normal(size=7), rng.normal(size=7))
