"""Pure torch networks: x (B, M, D) and log noise level (B,) to a displacement (B, M, D).

A network carries its constructor arguments in ``config``, from which :func:`build_network` makes
it again; no system's name appears here.
"""

from openmm_vtdis.networks.base import NETWORKS, Network
from openmm_vtdis.networks.egnn import EGNN, EGNNLayer
from openmm_vtdis.networks.mlp import MLP
from openmm_vtdis.networks.registry import (
    build_network,
    can_describe,
    describe_network,
    network_for,
    network_of_size,
    parse_size,
)

__all__ = [
    "EGNN",
    "MLP",
    "NETWORKS",
    "EGNNLayer",
    "Network",
    "build_network",
    "can_describe",
    "describe_network",
    "network_for",
    "network_of_size",
    "parse_size",
]
