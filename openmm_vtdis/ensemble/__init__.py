"""Weighted ensembles: effective sample sizes, estimates with errors, resampling, files.

Nothing here knows how the samples were made; any importance sampler can use it.
"""

from __future__ import annotations

from openmm_vtdis.core.ess import forward_ess, reverse_ess
from openmm_vtdis.ensemble.bar import FreeEnergy
from openmm_vtdis.ensemble.diagnostics import Diagnostics, Estimate, pareto_k
from openmm_vtdis.ensemble.frame_weights import FrameLogWeights
from openmm_vtdis.ensemble.mbar import PooledEnsemble, mbar
from openmm_vtdis.ensemble.weighted import WeightedEnsemble

__all__ = [
    "Diagnostics",
    "Estimate",
    "FrameLogWeights",
    "FreeEnergy",
    "PooledEnsemble",
    "WeightedEnsemble",
    "forward_ess",
    "mbar",
    "pareto_k",
    "reverse_ess",
]
