"""Figures of the paper, from ensembles and log weights.

========================  ================================================  ========
function                  shows                                             paper
========================  ================================================  ========
energy_histogram          raw, reweighted and reference energies            Fig. 3
ess_curve                 ESS over the number of network evaluations        Fig. 1, 2
eta_profile               tuned variance over the noise level               Fig. 5
ess_versus_samples        whether ESS is stable in the number of samples    Fig. 6
weight_distribution       the weights themselves
ramachandran              free energy over two dihedrals, weighted          Fig. 4
free_energy_profile       free energy along a coordinate, with its error
pareto_tail               the largest weights, and the tail fitted to them
step_cost                 where in the noise levels steps are lost
overlap_matrix            how far the states of a pool overlap
========================  ================================================  ========

Each function draws into ``ax``, or into a new figure if there is none, and returns the Axes, so
that figures compose and titles, limits and files stay with the caller. Colours are those of Okabe
and Ito, which stay distinct for colour-blind readers; lines also differ in style.

This module needs matplotlib (``pip install openmm-vtdis[plot]``); the package does not import it.
"""

from openmm_vtdis.plotting.observables import energy_histogram, free_energy_profile, ramachandran
from openmm_vtdis.plotting.style import BLUE, GREEN, ORANGE, PALETTE, RED
from openmm_vtdis.plotting.tuning import eta_profile, step_cost
from openmm_vtdis.plotting.weights import (
    ess_curve,
    ess_versus_samples,
    overlap_matrix,
    pareto_tail,
    weight_distribution,
)

__all__ = [
    "BLUE",
    "GREEN",
    "ORANGE",
    "PALETTE",
    "RED",
    "energy_histogram",
    "ess_curve",
    "ess_versus_samples",
    "eta_profile",
    "free_energy_profile",
    "overlap_matrix",
    "pareto_tail",
    "ramachandran",
    "step_cost",
    "weight_distribution",
]
