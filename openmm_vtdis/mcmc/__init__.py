"""Markov chains that leave exp(-u) invariant."""

from openmm_vtdis.mcmc.hmc import ConvergenceReport, ReferenceData, sample_hmc

__all__ = ["ConvergenceReport", "ReferenceData", "sample_hmc"]
