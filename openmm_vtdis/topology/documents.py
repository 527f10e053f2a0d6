"""A Topology as JSON, and back."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import numpy as np
import openmm
from openmm import app, unit

from openmm_vtdis.topology.atoms import ordered_atoms

_BOND_TYPES = {
    str(kind): kind for kind in (app.Single, app.Double, app.Triple, app.Aromatic, app.Amide)
}


def topology_to_json(topology: app.Topology) -> dict[str, Any]:
    """Describe a Topology completely by JSON-able values; lengths in nm.

    Raises
    ------
    ValueError
        If the atoms are not numbered in the order of their residues, or a bond has a type that
        OpenMM does not define.
    """
    ordered_atoms(topology)
    box = topology.getPeriodicBoxVectors()
    return {
        "chains": [
            {
                "id": chain.id,
                "residues": [
                    {
                        "name": residue.name,
                        "id": residue.id,
                        "insertion_code": residue.insertionCode,
                        "atoms": [
                            {
                                "name": atom.name,
                                "element": None if atom.element is None else atom.element.symbol,
                                "id": atom.id,
                                "formal_charge": atom.formalCharge,
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
            [bond[0].index, bond[1].index, _bond_type_name(bond.type), bond.order]
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
                    symbol = atom["element"]
                    element = None if symbol is None else app.Element.getBySymbol(symbol)
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
    name = str(kind)
    if name not in _BOND_TYPES:
        listed = ", ".join(_BOND_TYPES)
        raise ValueError(f"topology: expected bonds of type None, {listed}, got {kind!r}")
    return name
