"""Topologies: lossless documents and trajectory checks."""

from __future__ import annotations

import copy
import json

import mdtraj as md
import pytest
from openmm import Vec3, app, unit
from openmmtools import testsystems

from openmm_vtdis.topology import (
    check_trajectory_topology,
    identical_labels,
    placeholder_topology,
    topology_from_json,
    topology_to_json,
)
from tests.molecules import molecule


@pytest.fixture(scope="module")
def dipeptide() -> app.Topology:
    return testsystems.AlanineDipeptideVacuum(constraints=None).topology


@pytest.fixture
def rich() -> app.Topology:
    """Two chains, insertion codes, a particle without an element, typed bonds, charges, a box."""
    topology = app.Topology()
    first = topology.addResidue("ACE", topology.addChain("A"), "7", "B")
    c = topology.addAtom("C", app.element.carbon, first, "c-1", formalCharge=-1)
    o = topology.addAtom("O", app.element.oxygen, first)
    second = topology.addChain("zz")
    topology.addResidue("EMPTY", second, "8")
    third = topology.addResidue("VIR", second, "9")
    v = topology.addAtom("M", None, third, "17")
    d = topology.addAtom("D", app.element.deuterium, third)
    topology.addBond(c, o, app.Double, 2)
    topology.addBond(v, c)
    topology.addBond(o, d, app.Amide)
    vectors = [Vec3(2.0, 0, 0), Vec3(0.1, 2.0, 0), Vec3(0.2, 0.3, 2.5)]
    topology.setPeriodicBoxVectors(vectors * unit.nanometer)
    return topology


# -- documents --------------------------------------------------------------------------------
def facts(topology: app.Topology) -> list[object]:
    """All that a Topology knows, gathered independently of topology_to_json."""
    return [
        [(c.index, c.id, len(c)) for c in topology.chains()],
        [(r.index, r.name, r.id, r.insertionCode, r.chain.index) for r in topology.residues()],
        [
            (a.index, a.name, a.element, a.id, a.formalCharge, a.residue.index)
            for a in topology.atoms()
        ],
        [(b[0].index, b[1].index, b.type, b.order) for b in topology.bonds()],
        topology.getPeriodicBoxVectors(),
    ]


def test_the_document_is_lossless(rich: app.Topology, dipeptide: app.Topology) -> None:
    for topology in (rich, dipeptide, placeholder_topology(4), app.Topology()):
        document = json.loads(json.dumps(topology_to_json(topology), allow_nan=False))
        again = topology_from_json(document)
        assert facts(again) == facts(topology)
        assert topology_to_json(again) == document


@pytest.mark.parametrize(
    ("path", "value", "message"),
    [
        (("chains",), None, "could not read the chains: TypeError"),
        (("chains", 0, "residues", 0, "atoms", 1, "element"), "Qq", "could not read atom 1"),
        (("chains", 0, "residues", 0, "atoms", 0), {"name": "C"}, "atom 0: KeyError: 'element'"),
        (("chains", 1, "residues", 0), {}, "could not read residue 1: KeyError"),
        (("bonds", 2), [0, 9, None, None], "bond 2: ValueError: it joins atoms 0 and 9 of 4"),
        (("bonds", 0), [-1, 1, None, None], "it joins atoms -1 and 1"),
        (("bonds", 0), [0, 1, "Quadruple", 4], "could not read bond 0: KeyError"),
        (("bonds", 0), [0, 1], "not enough values"),
        (("box_vectors",), [[1.0, 0.0, 0.0]], "expected three vectors"),
        (("box_vectors",), [[1, 1, 0], [0, 1, 0], [0, 0, 1]], "must be parallel to x"),
    ],
)
def test_a_malformed_document_is_refused(
    rich: app.Topology, path: tuple[str | int, ...], value: object, message: str
) -> None:
    document = copy.deepcopy(topology_to_json(rich))
    place: object = document
    for key in path[:-1]:
        place = place[key]  # type: ignore[index]
    place[path[-1]] = value  # type: ignore[index]
    with pytest.raises(ValueError, match="expected a document written by") as caught:
        topology_from_json(document)
    assert message in str(caught.value)


def test_a_document_of_another_kind_is_refused() -> None:
    with pytest.raises(ValueError, match="could not read the chains: KeyError"):
        topology_from_json({})
    with pytest.raises(ValueError, match="could not read the chains: TypeError"):
        topology_from_json([])  # type: ignore[arg-type]


def test_atoms_out_of_order_and_foreign_bond_types_are_refused() -> None:
    topology = app.Topology()
    first, second = topology.addChain(), topology.addChain()
    topology.addAtom("H", app.element.hydrogen, topology.addResidue("B", second))
    topology.addAtom("O", app.element.oxygen, topology.addResidue("A", first))
    with pytest.raises(ValueError, match=r"expected atoms numbered .* got atom 1 \(O\) in place 0"):
        topology_to_json(topology)
    bonded = molecule("CO", [])
    bonded.addBond(*bonded.atoms(), "triple-ish")
    with pytest.raises(ValueError, match=r"expected bonds of type None, Single, .* 'triple-ish'"):
        topology_to_json(bonded)
    with pytest.raises(ValueError, match=r"expected an openmm\.app\.Topology, got str"):
        topology_to_json("x")


def test_sizes_must_be_positive() -> None:
    for make in (identical_labels, placeholder_topology):
        with pytest.raises(ValueError, match="n_particles: expected an integer >= 1, got 0"):
            make(0)


# -- trajectories -----------------------------------------------------------------------------
def test_a_topology_matches_itself(rich: app.Topology, dipeptide: app.Topology) -> None:
    for topology in (rich, dipeptide, placeholder_topology(3)):
        check_trajectory_topology(topology, md.Topology.from_openmm(topology))


def test_mismatches_are_named(dipeptide: app.Topology) -> None:
    other = md.Topology.from_openmm(dipeptide)
    other.atom(5).name = "O1"
    with pytest.raises(ValueError, match=r"atom 5 \(O of ACE 0\) has name 'O1' instead of 'O'"):
        check_trajectory_topology(dipeptide, other)
    other = md.Topology.from_openmm(dipeptide)
    other.atom(6).element = md.element.phosphorus
    other.atom(9).name = "X"
    with pytest.raises(ValueError, match=r"atom 6 .* has element 'P' instead of 'N'"):
        check_trajectory_topology(dipeptide, other)
    other = md.Topology.from_openmm(dipeptide)
    other.residue(1).name = "GLY"
    with pytest.raises(ValueError, match=r"atom 6 .* has residue name 'GLY' instead of 'ALA'"):
        check_trajectory_topology(dipeptide, other)
    with pytest.raises(ValueError, match="expected 22 atoms as in the topology, got 3"):
        check_trajectory_topology(dipeptide, md.Topology.from_openmm(placeholder_topology(3)))
    together = app.Topology()
    residue = together.addResidue("AR", together.addChain())
    for _ in range(2):
        together.addAtom("AR", app.element.argon, residue)
    with pytest.raises(ValueError, match=r"atom 1 .* has residue index 0 instead of 1"):
        check_trajectory_topology(placeholder_topology(2), md.Topology.from_openmm(together))
