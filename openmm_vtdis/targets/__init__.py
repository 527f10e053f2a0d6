"""Targets: a System and a temperature become reduced energies u(x), for batches of configurations.

=========================  ==================================================================
module                     what it holds
=========================  ==================================================================
``target``                 the ``Target`` interface; ``OpenMMTarget``: validation and fallback
``contexts``               a pool of OpenMM Contexts: the truth
``batched``, ``lepton``    the same System as batched torch: speed, checked against a Context
``validation``, ``binding``  what a System must satisfy
``user_code``              forces that run code of the user's
``evaluation``             energies of any target, as weights need them
``terms``, ``translators`` one term and one translator for each kind of force
``systems``, ``mixture``   benchmark systems: DW-4, LJ-n, ALDP; Gaussian mixtures
``hmc``                    reference samples
=========================  ==================================================================
"""

from openmm_vtdis.targets.evaluation import energies_of
from openmm_vtdis.targets.hmc import ConvergenceReport, ReferenceData, sample_hmc
from openmm_vtdis.targets.mixture import GaussianMixture, gaussian_mixture
from openmm_vtdis.targets.systems import (
    BenchmarkSystem,
    alanine_dipeptide,
    double_well,
    lennard_jones,
)
from openmm_vtdis.targets.target import OpenMMTarget, Target, check_is_target

__all__ = [
    "BenchmarkSystem",
    "ConvergenceReport",
    "GaussianMixture",
    "OpenMMTarget",
    "ReferenceData",
    "Target",
    "alanine_dipeptide",
    "check_is_target",
    "double_well",
    "energies_of",
    "gaussian_mixture",
    "lennard_jones",
    "sample_hmc",
]
