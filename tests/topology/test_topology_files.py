"""What files can hold of a Topology, and what other programs know of it; the rest is refused."""

from __future__ import annotations

import json
from collections.abc import Callable

import numpy as np
import openmm
import pytest
from openmm import app, unit

from openmm_vtdis.targets import OpenMMTarget
from openmm_vtdis.topology import (
    check_storable,
    check_trajectory_topology,
    mdtraj_topology,
    topology_from_json,
    topology_to_json,
)
from openmm_vtdis.topology.graph import mass_of
from tests.molecules import molecule

NUMBERS = {"QQ": 1002, "QP": 1003}


def ethanol() -> app.Topology:
    bonds = [(0, 1), (1, 2), (0, 3), (0, 4), (0, 5), (1, 6), (1, 7), (2, 8)]
    return molecule("CCOHHHHHH", bonds)


def bead(symbol: str, mass: object) -> app.Element:
    try:
        return app.Element.getBySymbol(symbol)
    except KeyError:
        return app.Element(NUMBERS[symbol], symbol.lower(), symbol, mass)


def forget(symbol: str) -> None:
    del app.Element._elements_by_symbol[symbol]
    del app.Element._elements_by_atomic_number[NUMBERS[symbol]]


@pytest.mark.parametrize("mass", [72.0 * unit.dalton, 72.0])
def test_elements_of_the_users_own(mass: object) -> None:
    symbol = f"Q{'Q' if unit.is_quantity(mass) else 'P'}"
    topology = app.Topology()
    residue = topology.addResidue("CG", topology.addChain())
    for k, element in enumerate((bead(symbol, mass), app.element.carbon, None)):
        topology.addAtom(f"B{k}", element, residue)
    document = json.loads(json.dumps(topology_to_json(topology)))
    assert document["chains"][0]["residues"][0]["atoms"][0]["element"] == {
        "number": NUMBERS[symbol], "name": symbol.lower(), "symbol": symbol, "mass": 72.0,
    }  # fmt: skip
    forget(symbol)  # as in another process
    made = [atom.element for atom in topology_from_json(document).atoms()]
    assert (made[0].symbol, mass_of(made[0])) == (symbol, 72.0)
    assert made[1] is app.element.carbon
    assert made[2] is None
    again = topology_from_json(document)  # known by now
    assert next(again.atoms()).element is made[0]
    document["chains"][0]["residues"][0]["atoms"][0]["element"]["mass"] = 71.0
    with pytest.raises(ValueError, match=f"expected the element '{symbol}' to have 71.0 Da, got o"):
        topology_from_json(document)
    for_mdtraj = mdtraj_topology(again)
    assert [atom.element.symbol for atom in for_mdtraj.atoms] == ["VS", "C", "VS"]
    assert next(again.atoms()).element is made[0]  # the topology itself is as it was
    check_trajectory_topology(again, for_mdtraj)
    forget(symbol)


@pytest.mark.parametrize(
    "change",
    [
        lambda t: setattr(next(t.residues()), "id", np.int64(7)),
        lambda t: setattr(next(t.chains()), "id", np.str_("A")),
        lambda t: setattr(next(t.atoms()), "formalCharge", np.int8(-1)),
        lambda t: delattr(next(t.atoms()), "formalCharge"),
        lambda t: setattr(next(t.atoms()), "id", np.float32(1.5)),
    ],
)
def test_numbers_of_numpy_and_atoms_of_older_versions(
    change: Callable[[app.Topology], None],
) -> None:
    topology = ethanol()
    change(topology)
    check_storable(topology)
    document = json.loads(json.dumps(topology_to_json(topology)))
    assert topology_to_json(topology_from_json(document)) == document


@pytest.mark.parametrize("kind", ["single", "Single", app.Single, "AROMATIC", None])
def test_kinds_of_bonds_by_name(kind: object) -> None:
    topology = ethanol()
    atoms = list(topology.atoms())
    topology.addBond(atoms[0], atoms[5], kind, np.int64(1))
    document = json.loads(json.dumps(topology_to_json(topology)))
    *_, name, order = document["bonds"][-1]
    assert name == (None if kind is None else str(kind).capitalize())
    assert order == 1


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda t: setattr(next(t.residues()), "id", object()), "text or numbers, got <object"),
        (lambda t: setattr(next(t.atoms()), "name", float("nan")), "text or numbers, got nan"),
        (lambda t: setattr(next(t.atoms()), "id", b"1"), "text or numbers, got b'1'"),
    ],
)
def test_what_no_file_can_hold_is_said_at_construction(
    change: Callable[[app.Topology], None], message: str
) -> None:
    topology = ethanol()
    change(topology)
    with pytest.raises(ValueError, match=message):
        check_storable(topology)
    system = openmm.System()
    for _ in topology.atoms():
        system.addParticle(1.0)
    with pytest.raises(ValueError, match=message):
        OpenMMTarget(system, topology)
