"""A Topology as JSON, and back.

Elements of the user's own (beads) are described in full, since no other process knows them.
"""

from __future__ import annotations

import json
import math
import numbers
from collections.abc import Mapping
from typing import Any

import numpy as np
import openmm
from openmm import app, unit

from openmm_vtdis.topology.graph import mass_of, ordered_atoms

_BOND_TYPES = {
    str(kind): kind for kind in (app.Single, app.Double, app.Triple, app.Aromatic, app.Amide)
}


_STANDARD = {e.symbol: e for e in vars(app.element).values() if isinstance(e, app.Element)}


def check_is_topology(topology: object) -> None:
    """Raise ValueError for anything but OpenMM's Topology, or None."""
    if topology is None or isinstance(topology, app.Topology):
        return
    hint = "; use its to_openmm()" if hasattr(topology, "to_openmm") else ""
    got = type(topology)
    raise ValueError(
        f"topology: expected an openmm.app.Topology, got {got.__module__}.{got.__name__}{hint}"
    )


def check_storable(topology: app.Topology) -> None:
    """Raise ValueError for a topology that no file can hold; call it before the work."""
    topology_from_json(json.loads(json.dumps(topology_to_json(topology), allow_nan=False)))


def topology_to_json(topology: app.Topology) -> dict[str, Any]:
    """Describe a Topology completely by JSON-able values; lengths in nm.

    Raises
    ------
    ValueError
        If the atoms are not numbered in the order of their residues, a bond has a type that OpenMM
        does not define, or a name or an identifier is neither text nor a number.
    """
    ordered_atoms(topology)
    box = topology.getPeriodicBoxVectors()
    return {
        "chains": [
            {
                "id": _plain(chain.id),
                "residues": [
                    {
                        "name": _plain(residue.name),
                        "id": _plain(residue.id),
                        "insertion_code": _plain(residue.insertionCode),
                        "atoms": [
                            {
                                "name": _plain(atom.name),
                                "element": _described(atom.element),
                                "id": _plain(atom.id),
                                "formal_charge": _plain(vars(atom).get("formalCharge")),
                            }
                            for atom in residue.atoms()
                        ],
                    }
                    for residue in chain.residues()
                ],
            }
            for chain in topology.chains()
        ],
        "bonds": [
            [bond[0].index, bond[1].index, _bond_type_name(bond.type), _plain(bond.order)]
            for bond in topology.bonds()
        ],
        "box_vectors": None
        if box is None
        else [[float(x) for x in row] for row in box.value_in_unit(unit.nanometer)],
    }


def topology_from_json(document: Mapping[str, Any]) -> app.Topology:
    """Make the Topology that :func:`topology_to_json` described.

    Raises
    ------
    ValueError
        If the document is malformed; the message says where.
    """
    topology = app.Topology()
    atoms: list[app.topology.Atom] = []
    where = "the chains"
    try:
        for c, chain_document in enumerate(document["chains"]):
            where = f"chain {c}"
            chain = topology.addChain(chain_document["id"])
            for residue_document in chain_document["residues"]:
                where = f"residue {topology.getNumResidues()}"
                residue = topology.addResidue(
                    residue_document["name"],
                    chain,
                    residue_document["id"],
                    residue_document["insertion_code"],
                )
                for atom in residue_document["atoms"]:
                    where = f"atom {len(atoms)}"
                    element = _element(atom["element"])
                    atoms.append(
                        topology.addAtom(
                            atom["name"], element, residue, atom["id"], atom["formal_charge"]
                        )
                    )
        where = "the bonds"
        for b, (i, j, kind, order) in enumerate(document["bonds"]):
            where = f"bond {b}"
            if not (0 <= i < len(atoms) and 0 <= j < len(atoms)):
                raise ValueError(f"it joins atoms {i} and {j} of {len(atoms)}")
            bond_type = None if kind is None else _BOND_TYPES[kind]
            topology.addBond(atoms[i], atoms[j], bond_type, order)
        where = "the box vectors"
        if document["box_vectors"] is not None:
            box = np.asarray(document["box_vectors"], dtype=np.float64)
            if box.shape != (3, 3):
                raise ValueError(f"expected three vectors of three numbers, got {box.shape}")
            vectors = [openmm.Vec3(*row) for row in box.tolist()]
            topology.setPeriodicBoxVectors(vectors * unit.nanometer)
    except (KeyError, TypeError, ValueError, AttributeError) as error:
        raise ValueError(
            "topology: expected a document written by topology_to_json, but could not read "
            f"{where}: {type(error).__name__}: {error}"
        ) from error
    return topology


def _bond_type_name(kind: object) -> str | None:
    if kind is None:
        return None
    name = str(kind).capitalize()
    if name not in _BOND_TYPES:
        listed = ", ".join(_BOND_TYPES)
        raise ValueError(f"topology: expected bonds of type None, {listed}, got {kind!r}")
    return name


def _plain(value: Any) -> str | int | float | None:
    """Convert text or a number, also of numpy's types, for JSON."""
    if value is None:
        return None
    if isinstance(value, str):
        return str(value)
    if isinstance(value, numbers.Integral):
        return int(value)
    if isinstance(value, numbers.Real) and math.isfinite(value):
        return float(value)
    raise ValueError(
        f"topology: expected names and identifiers that are text or numbers, got {value!r}"
    )


def _described(element: app.Element | None) -> str | dict[str, Any] | None:
    """Describe an element by its symbol, or in full if OpenMM does not define it."""
    if element is None:
        return None
    standard = _STANDARD.get(element.symbol)
    if standard is element or (standard is not None and mass_of(standard) == mass_of(element)):
        return str(element.symbol)
    return {
        "number": _plain(element.atomic_number),
        "name": _plain(element.name),
        "symbol": _plain(element.symbol),
        "mass": mass_of(element),
    }


def _element(described: Any) -> app.Element | None:
    """Find the element of a description, or make it if this process does not know it yet."""
    if described is None:
        return None
    if not isinstance(described, dict):
        return app.Element.getBySymbol(described)
    number, name, symbol, mass = (described[k] for k in ("number", "name", "symbol", "mass"))
    try:
        known = app.Element.getBySymbol(symbol)
    except KeyError:
        return app.Element(number, name, symbol, mass * unit.dalton)
    if mass_of(known) != mass:
        raise ValueError(
            f"expected the element {symbol!r} to have {mass} Da, got one of {mass_of(known)} Da in "
            "this process"
        )
    return known
