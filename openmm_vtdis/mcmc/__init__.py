"""Markov chains that leave exp(-u) invariant: proposals, and one step that accepts them."""

from openmm_vtdis.mcmc.hmc import sample_hmc
from openmm_vtdis.mcmc.metropolis import accepted
from openmm_vtdis.mcmc.reference import ConvergenceReport, ReferenceData
from openmm_vtdis.mcmc.renoising import IndependentProposals, Proposal

__all__ = [
    "ConvergenceReport",
    "IndependentProposals",
    "Proposal",
    "ReferenceData",
    "accepted",
    "sample_hmc",
]
