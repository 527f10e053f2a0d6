"""Labels: orbits against brute force, graphs that colours do not tell apart, and bad labels."""

from __future__ import annotations

import itertools

import networkx as nx
import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from openmm import app
from openmmtools import testsystems

from openmm_vtdis.topology import (
    check_labels,
    identical_labels,
    placeholder_topology,
    symmetry_labels,
)
from openmm_vtdis.topology.symmetry import _refine
from tests.molecules import molecule


def carbons(graph: nx.Graph) -> app.Topology:
    return molecule("C" * len(graph), graph.edges)


@pytest.fixture(scope="module")
def dipeptide() -> app.Topology:
    return testsystems.AlanineDipeptideVacuum(constraints=None).topology


# -- symmetry ---------------------------------------------------------------------------------
def brute_force(elements: str, bonds: set[frozenset[int]]) -> list[int]:
    """Orbits by trying every permutation of the atoms."""
    n = len(elements)
    orbit = list(range(n))
    for p in itertools.permutations(range(n)):
        if all(elements[i] == elements[p[i]] for i in range(n)) and bonds == {
            frozenset(p[i] for i in bond) for bond in bonds
        }:
            orbit = [min(orbit[i], p[i]) for i in range(n)]
    return orbit


@given(
    st.text("CH", min_size=1, max_size=6).flatmap(
        lambda elements: st.tuples(
            st.just(elements),
            st.sets(
                st.sampled_from(
                    [frozenset(pair) for pair in itertools.combinations(range(len(elements)), 2)]
                    or [frozenset()]
                )
            ),
        )
    )
)
def test_labels_are_the_orbits_of_the_automorphism_group(
    case: tuple[str, set[frozenset[int]]],
) -> None:
    elements, edges = case
    bonds = {edge for edge in edges if edge}
    labels = symmetry_labels(molecule(elements, [tuple(sorted(bond)) for bond in bonds]))
    np.testing.assert_array_equal(labels, check_labels(brute_force(elements, bonds), len(elements)))


def test_alanine_dipeptide_has_three_distinct_methyls(dipeptide: app.Topology) -> None:
    labels = symmetry_labels(dipeptide)
    names = [f"{a.residue.name}-{a.name}" for a in dipeptide.atoms()]
    classes = [{names[i] for i in np.flatnonzero(labels == k)} for k in range(labels.max() + 1)]
    assert [c for c in classes if len(c) > 1] == [
        {"ACE-H1", "ACE-H2", "ACE-H3"},
        {"ALA-HB1", "ALA-HB2", "ALA-HB3"},
        {"NME-H1", "NME-H2", "NME-H3"},
    ]
    assert len(classes) == 22 - 6
    assert labels[0] == 0


def test_exchangeable_methyls_share_a_class() -> None:
    ethane = molecule(
        "CCHHHHHH", [(0, 1), *[(0, i) for i in (2, 3, 4)], *[(1, i) for i in (5, 6, 7)]]
    )
    np.testing.assert_array_equal(symmetry_labels(ethane), [0, 0, *[1] * 6])


def test_particles_without_bonds_are_classed_by_element() -> None:
    np.testing.assert_array_equal(symmetry_labels(placeholder_topology(13)), identical_labels(13))
    np.testing.assert_array_equal(symmetry_labels(molecule("OCCOH", [])), [0, 1, 1, 0, 2])
    np.testing.assert_array_equal(symmetry_labels(molecule("CCC", [(0, 2)])), [0, 1, 0])


def test_atoms_of_identical_molecules_correspond() -> None:
    waters = molecule("OHHHOH", [(0, 1), (0, 2), (4, 3), (4, 5)])
    np.testing.assert_array_equal(symmetry_labels(waters), [0, 1, 1, 1, 0, 1])


def two_rings_of_five() -> nx.Graph:
    rings = nx.disjoint_union(nx.cycle_graph(5), nx.cycle_graph(5))
    rings.add_edge(0, 5)
    return rings


def two_rings_of_six() -> nx.Graph:
    ring = nx.cycle_graph(10)
    ring.add_edge(0, 5)
    return ring


def shrikhande() -> nx.Graph:
    """Strongly regular (16, 6, 2, 2), like the rook's graph, and not isomorphic to it."""
    graph = nx.Graph()
    for i, j in itertools.product(range(4), repeat=2):
        graph.add_edges_from(
            (4 * i + j, 4 * ((i + a) % 4) + (j + b) % 4) for a, b in ((1, 0), (0, 1), (1, 1))
        )
    return graph


def rook() -> nx.Graph:
    return nx.cartesian_product(nx.complete_graph(4), nx.complete_graph(4))


@pytest.mark.parametrize(
    ("graph", "n_refined", "n_orbits"),
    [
        (nx.frucht_graph(), 1, 12),  # cubic, without any symmetry
        (nx.disjoint_union(nx.cycle_graph(6), nx.cycle_graph(3)), 1, 2),
        (nx.disjoint_union(two_rings_of_five(), two_rings_of_six()), 3, 6),
        (nx.disjoint_union(shrikhande(), rook()), 1, 2),  # merged even with one node marked
        (nx.petersen_graph(), 1, 1),
        (nx.complete_graph(9), 1, 1),
        (nx.dodecahedral_graph(), 1, 1),
    ],
    ids=[
        "Frucht",
        "rings",
        "decalin and bicyclopentyl",
        "strongly regular",
        "Petersen",
        "complete",
        "dodecahedron",
    ],
)
def test_what_colour_refinement_merges_is_caught(
    graph: nx.Graph, n_refined: int, n_orbits: int
) -> None:
    assert len(set(_refine(graph, dict.fromkeys(graph, "C")).values())) == n_refined
    assert len(set(symmetry_labels(carbons(graph)))) == n_orbits


def test_labels_follow_a_renumbering_of_the_atoms(dipeptide: app.Topology) -> None:
    elements = [a.element.symbol for a in dipeptide.atoms()]
    bonds = [(a.index, b.index) for a, b in dipeptide.bonds()]
    p = np.random.default_rng(3).permutation(len(elements))
    place = np.argsort(p)
    shuffled = molecule(
        "".join(elements[i] for i in p), [(int(place[a]), int(place[b])) for a, b in bonds]
    )
    np.testing.assert_array_equal(
        symmetry_labels(shuffled), check_labels(symmetry_labels(dipeptide)[p], len(p))
    )


# -- labels -----------------------------------------------------------------------------------
def test_labels_are_renumbered_by_first_appearance() -> None:
    np.testing.assert_array_equal(check_labels([7, -2, 7, 0], 4), [0, 1, 0, 2])
    assert check_labels(np.array([3], dtype=np.uint8), 1).dtype == np.int64
    np.testing.assert_array_equal(identical_labels(3), [0, 0, 0])


@pytest.mark.parametrize("labels", [[0, 1], [0.0, 1.0, 2.0], [True, False, True], [[0, 1, 2]], []])
def test_bad_labels_are_refused(labels: list[object]) -> None:
    with pytest.raises(ValueError, match="labels: expected 3 integers, one per particle, got"):
        check_labels(labels, 3)  # type: ignore[arg-type]
