"""Particles of a System: everything that its topology says of them, in one object."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from openmm import app
from torch import Tensor

from openmm_vtdis.core.space import Space
from openmm_vtdis.topology.graph import bond_features, bonded_graph, element_features
from openmm_vtdis.topology.stereochemistry import Handedness, Stereocentre, stereocentres
from openmm_vtdis.topology.symmetry import check_labels, exchangeable_pairs, symmetry_labels


@dataclass(frozen=True)
class Particles:
    """Labels, handedness and features of M particles.

    Attributes
    ----------
    labels
        (M,) integers 0..K-1: particles of one label are alike.
    stereocentres
        Atoms with a handedness, none in two dimensions.
    pairs
        Pairs whose exchange must leave the energy as it is.
    bonds
        Pairs of bonded particles.
    features
        Constants that a network is given, ``node_features`` (M, F) and ``edge_features``
        (M, M, E); empty without bonds.
    """

    labels: list[int]
    stereocentres: tuple[Stereocentre, ...]
    pairs: tuple[tuple[int, int], ...]
    bonds: tuple[tuple[int, int], ...]
    features: dict[str, list]

    def handedness(self, name: str, x: Tensor) -> Handedness | None:
        """Handedness of all configurations (n, M, 3); None without centres.

        Messages call the configurations ``name``.

        Raises
        ------
        ValueError
            If they do not agree.
        """
        if not self.stereocentres:
            return None
        reference = Handedness.of(self.stereocentres, x[0])
        reference.check(name, x)
        return reference

    @classmethod
    def of(
        cls,
        topology: app.Topology | None,
        space: Space,
        labels: Sequence[int] | None = None,
        alike: bool = True,
    ) -> Particles:
        """Read a topology.

        Parameters
        ----------
        labels
            Labels to use instead of those that the bonded graph gives.
        alike
            Whether particles without a topology and labels are identical, or all different.
        """
        if labels is not None:
            numbers = [int(label) for label in check_labels(labels, space.n_particles)]
        elif topology is not None:
            numbers = [int(label) for label in symmetry_labels(topology)]
        else:
            numbers = [0] * space.n_particles if alike else list(range(space.n_particles))
        if topology is None:
            return cls(numbers, (), (), (), {})
        features = {}
        if topology.getNumBonds():
            features["node_features"] = element_features(topology).tolist()
            features["edge_features"] = bond_features(topology).tolist()
        centres = stereocentres(topology, numbers) if space.n_dims == 3 else []
        pairs = exchangeable_pairs(topology, numbers)
        bonds = tuple(bonded_graph(topology).edges)
        return cls(numbers, tuple(centres), tuple(pairs), bonds, features)
