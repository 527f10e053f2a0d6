"""Topologies: equivalent atoms, handedness, features, and storage.

======================  ===================================================================
module                  what it holds
======================  ===================================================================
``graph``               atoms and bonds as a graph, for networks too; the same in a trajectory?
``symmetry``            labels: equivalent atoms share one
``stereochemistry``     stereocentres, and folding mirror images
``particles``           all of these in one object
``json``                a Topology as JSON
``frames``              configurations from trajectories and arrays
======================  ===================================================================
"""

from openmm_vtdis.topology.graph import (
    bond_features,
    check_trajectory_topology,
    element_features,
    mdtraj_topology,
    placeholder_topology,
)
from openmm_vtdis.topology.json import (
    check_is_topology,
    check_storable,
    topology_from_json,
    topology_to_json,
)
from openmm_vtdis.topology.particles import Particles
from openmm_vtdis.topology.stereochemistry import Handedness, Stereocentre, stereocentres
from openmm_vtdis.topology.symmetry import (
    check_labels,
    exchangeable_pairs,
    identical_labels,
    symmetry_labels,
)

__all__ = [
    "Handedness",
    "Particles",
    "Stereocentre",
    "bond_features",
    "check_is_topology",
    "check_labels",
    "check_storable",
    "check_trajectory_topology",
    "element_features",
    "exchangeable_pairs",
    "identical_labels",
    "mdtraj_topology",
    "placeholder_topology",
    "stereocentres",
    "symmetry_labels",
    "topology_from_json",
    "topology_to_json",
]
