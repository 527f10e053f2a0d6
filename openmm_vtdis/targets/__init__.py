"""Targets: a System and a temperature become reduced energies u(x), for batches of configurations.

=====================  ==================================================================
module                 what it holds
=====================  ==================================================================
``base``               the ``Target`` interface
``openmm``             the density of a System: translated to torch, or by Contexts
``callable``           a batched torch energy of the user's
``evaluation``         energies of any target, as weights need them
``binding``            whether Z is finite
``frame_checks``       whether frames can be of this density
``benchmark_systems``  DW-4, LJ-n, ALDP
``mixture``            Gaussian mixtures
=====================  ==================================================================
"""

from openmm_vtdis.targets.base import (
    TARGETS,
    Description,
    Rebuilding,
    Target,
    check_is_target,
)
from openmm_vtdis.targets.benchmark_systems import (
    BenchmarkSystem,
    alanine_dipeptide,
    double_well,
    lennard_jones,
)
from openmm_vtdis.targets.callable import CallableTarget
from openmm_vtdis.targets.evaluation import energies_of
from openmm_vtdis.targets.mixture import GaussianMixture, gaussian_mixture
from openmm_vtdis.targets.openmm.target import OpenMMTarget

__all__ = [
    "TARGETS",
    "BenchmarkSystem",
    "CallableTarget",
    "Description",
    "GaussianMixture",
    "OpenMMTarget",
    "Rebuilding",
    "Target",
    "alanine_dipeptide",
    "check_is_target",
    "double_well",
    "energies_of",
    "gaussian_mixture",
    "lennard_jones",
]
