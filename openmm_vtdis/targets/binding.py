r"""Checks that a System holds its particles together: bonds with a term, parts without one.

A Boltzmann density can be normalised only if its energy holds all particles together. Two molecules
that attract each other weakly, with nothing else between them, have

    Z  ~  integral of R^(D-1) exp(-u(R)) dR  =  infinity

over their distance R; any finite log Z that is estimated is then a statement about the length of
the MD. Parts that no bond joins are therefore pulled apart when a target is built. The integral
converges only if u rises faster than D log R, which is what is asked of two decades of distance,
far out, where attractions have died away.

Bonds of the topology are another matter: one without a term, beside others that have one, is what
remains where constraints were deleted from a System.
"""

from __future__ import annotations

import itertools
import logging
import math
from collections.abc import Callable, Iterable, Iterator

import networkx as nx
import openmm
import torch
from openmm import app
from torch import Tensor

from openmm_vtdis.core.rng import make_rng
from openmm_vtdis.core.space import Space
from openmm_vtdis.targets.openmm.user_code import all_forces, user_forces
from openmm_vtdis.topology.graph import bonded_graph, name_of

logger = logging.getLogger(__name__)

_BINDERS = {"CustomManyParticleForce", "GayBerneForce"}
_DISTANCES = (1e3, 1e4, 1e5)
_DISTANCES_OF_USER_CODE = (1e1, 1e2, 1e3)
"""Distances, over the size of a configuration, between parts that are pulled apart. Energies of the
user's may be in single precision, in which a bond far away has no length any more."""
_DIRECTIONS = 3
_FEW_PARTS = 32
"""Most parts whose pairs, and groups that feel each other, are pulled away from the rest too."""
_FELT, _ROUNDING = 0.1, 1e-12
"""Least coupling that counts: in kT, and as a share of the energies that it is a difference of."""
_NAMED = 5
_LARGEST_TERM = 4
"""Most particles of a term, of a valence force field say, that may stand for a bond."""
_SEED = 20_261_201


def check_bonds(system: openmm.System, topology: app.Topology) -> None:
    """Refuse a topology whose bonds are not those of the System.

    That is one with bonds that have no term beside bonds that have one. None at all is no
    contradiction: a machine-learned potential binds without terms, and where a force runs code of
    the user's nothing is said of missing bonds. Warn of a topology without any bond for a System
    with harmonic ones.

    Raises
    ------
    ValueError
        If bonds are missing; the message names the first of them.
    """
    graph, pairs = bonded_graph(topology), list(bonded_pairs(system))
    bonded = {frozenset(pair) for pair in pairs}
    harmonic = (f for f in system.getForces() if isinstance(f, openmm.HarmonicBondForce))
    if not graph.edges and any(force.getNumBonds() for force in harmonic):
        logger.warning(
            "topology: has no bonds, where the System has %d bonded pairs; which atoms are alike, "
            "their handedness, and what the network knows of them come from bonds: read a file "
            "that has them (PDB with CONECT), or call topology.createStandardBonds()",
            len(bonded),
        )
    larger = [set(term) for term in _terms(system) if 2 < len(term) <= _LARGEST_TERM]
    missing = [
        pair
        for pair in graph.edges
        if frozenset(pair) not in bonded and not any(set(pair) <= term for term in larger)
    ]
    if not missing or _binds_unseen(system):
        return
    _refuse_another_order(graph, pairs, bonded, missing)
    if len(missing) == len(graph.edges):
        return
    atoms = list(topology.atoms())
    names = _listed(f"{name_of(atoms[i])} - {name_of(atoms[j])}" for i, j in missing)
    raise ValueError(
        f"system: expected a term for each of {len(graph.edges)} bonds of the topology, got "
        f"{len(missing)} bonds that nothing holds: {names}; build the System with "
        "constraints=None and rigidWater=False (deleting constraints leaves their bonds without "
        "a term), and give the topology that it was built from"
    )


def _refuse_another_order(
    graph: nx.Graph,
    pairs: list[tuple[int, int]],
    bonded: set[frozenset[int]],
    missing: list[tuple[int, int]],
) -> None:
    """Raise if the System also binds pairs that the topology does not: another molecule, or order.

    Pairs over two bonds are no sign of it: Urey-Bradley terms.
    """

    def over_two_bonds(i: int, j: int) -> bool:
        between = set(graph.adj[i]) & set(graph.adj[j])
        return any({frozenset((i, k)), frozenset((k, j))} <= bonded for k in between)

    strange = [(i, j) for i, j in pairs if j not in graph.adj[i] and not over_two_bonds(i, j)]
    if strange:
        raise ValueError(
            f"topology: expected the bonds of the System, got {len(missing)} that it has not, the "
            f"first between atoms {missing[0][0]} and {missing[0][1]}, and {len(strange)} of its "
            f"own that are missing, the first between {strange[0][0]} and {strange[0][1]}; give "
            "the topology that the System was built from, with the atoms in the same order"
        )


def bonded_pairs(system: openmm.System) -> Iterator[tuple[int, int]]:
    """Pairs of particles that have a term of their own, also inside of collective variables."""
    for group in _terms(system):
        if len(group) == 2:
            yield group[0], group[1]


def _terms(system: openmm.System) -> Iterator[list[int]]:
    """Particles of each bond, compound bond and bond of centroids."""
    for force in all_forces(system):
        if isinstance(force, openmm.HarmonicBondForce | openmm.CustomBondForce):
            for k in range(force.getNumBonds()):
                yield list(force.getBondParameters(k)[:2])
        elif isinstance(force, openmm.CustomCompoundBondForce):
            for k in range(force.getNumBonds()):
                yield list(force.getBondParameters(k)[0])
        elif isinstance(force, openmm.CustomCentroidBondForce):
            for k in range(force.getNumBonds()):
                groups = [force.getGroupParameters(g)[0] for g in force.getBondParameters(k)[0]]
                yield list(itertools.chain(*groups))


def _binds_unseen(system: openmm.System) -> bool:
    """Whether there are forces that may bind without bonds: the user's code, many-body ones."""
    names = {type(force).__name__ for force in all_forces(system)}
    return bool(user_forces(system)) or bool(names & _BINDERS)


# -- parts -------------------------------------------------------------------------------------
def parts_of(system: openmm.System, topology: app.Topology | None) -> list[list[int]]:
    """Particles that bonds of the topology join, part by part; one each without a topology.

    A bond counts if it has a term, or if there are forces that may bind without one.
    """
    graph = nx.Graph()
    graph.add_nodes_from(range(system.getNumParticles()))
    if topology is not None:
        bonds = bonded_graph(topology).edges
        terms = {frozenset(pair) for pair in bonded_pairs(system)}
        unseen = _binds_unseen(system)
        graph.add_edges_from(b for b in bonds if unseen or frozenset(b) in terms)
    return [sorted(part) for part in nx.connected_components(graph)]


def check_bound(
    reduced_energy: Callable[[Tensor], Tensor],
    x: Tensor,
    system: openmm.System,
    topology: app.Topology | None,
) -> None:
    """Refuse a System of parts that can fly apart, so that its Z is infinite.

    Parameters
    ----------
    reduced_energy
        (B, M, D) nm -> (B,) kT; NaN where it is not known.
    x
        Configurations (S, M, D), nm, in which the parts begin.

    Raises
    ------
    ValueError
        If parts can fly apart; the message names one, and a restraint that would hold it.
    """
    parts = parts_of(system, topology)
    if len(parts) < 2:
        return
    distances = _DISTANCES_OF_USER_CODE if user_forces(system) else _DISTANCES
    coupled = _coupled(reduced_energy, x[0], parts, distances)
    for moved in _groups(parts, system, coupled):
        rise = slowest_rise(reduced_energy, x, moved, distances)
        if rise is None:
            continue
        n, n_dims = x.shape[1:]
        moved = moved if 2 * len(moved) <= n else sorted(set(range(n)) - set(moved))
        rest = sorted(set(range(n)) - set(moved))
        atoms = None if topology is None else list(topology.atoms())
        named = _listed(str(k) if atoms is None else f"{k} ({name_of(atoms[k])})" for k in moved)
        unbonded = " (if bonds hold them, give the topology these)" if user_forces(system) else ""
        joined = [] if topology is None else list(bonded_graph(topology).edges)
        cut = [(i, j) for i, j in joined if (i in moved) != (j in moved)]
        if cut and atoms is not None:
            bonds = _listed(f"{name_of(atoms[i])} - {name_of(atoms[j])}" for i, j in cut)
            raise ValueError(
                f"system: expected an energy that holds all particles together, got bonds without "
                f"a term: {bonds}; build the System with constraints=None and rigidWater=False"
            )
        by = "does not rise" if rise < 0.01 else f"rises by {rise:.3g} kT"
        raise ValueError(
            f"system: expected an energy that holds all particles together, but nothing holds "
            f"particles {named}: pulled away from the rest{unbonded} it {by} over a decade of "
            f"distance, where less than {n_dims * math.log(10.0):.3g} kT leave Z infinite; add a "
            "restraint that defines a standard state, such as a CustomCentroidBondForce(2, "
            '"0.5*k*distance(g1,g2)^2") between groups '
            f"{_brief(moved)} and {_brief(rest)} (docs/molecules.md has it in full, and its cost)"
        )


def slowest_rise(
    reduced_energy: Callable[[Tensor], Tensor],
    x: Tensor,
    moved: list[int],
    distances: tuple[float, ...] = _DISTANCES,
) -> float | None:
    """Rise of u over the last decade as some particles are pulled away; None if it is enough.

    Enough is more than D log 10, and not less than half of what it rose by in the decade before, as
    a charge does at low temperatures. Where an energy is NaN, nothing is said.
    """
    n_dims, size = x.shape[2], max(float(x.square().mean().sqrt()), 0.1)
    directions = torch.randn(_DIRECTIONS, n_dims, generator=make_rng(_SEED), dtype=torch.float64)
    directions = directions / directions.norm(dim=1, keepdim=True)
    steps = torch.tensor(distances, dtype=torch.float64) * size
    shift = torch.zeros(_DIRECTIONS, len(distances), *x.shape[1:], dtype=torch.float64)
    shift[:, :, moved] = (directions[:, None] * steps[:, None])[:, :, None]
    found = []
    for frame in x:
        u = reduced_energy((frame + shift).flatten(0, 1)).reshape(_DIRECTIONS, len(distances))
        before, last = (u[:, 1] - u[:, 0]).tolist(), (u[:, 2] - u[:, 1]).tolist()
        for a, b in zip(before, last, strict=True):
            if math.isfinite(b) and (b <= n_dims * math.log(10.0) or b < 0.5 * a):
                found.append(b)
    return min(found) if found else None


def warn_if_unbound(reduced_energy: Callable[[Tensor], Tensor], space: Space) -> None:
    """Log a warning if u rises by no more than d log 10 while a configuration grows tenfold.

    Parameters
    ----------
    reduced_energy
        (B, M, D) nm -> (B,) kT, of any target. If it raises an exception that far out, nothing is
        said.
    space
        Space of the configurations, of dimension d.
    """
    x = space.standard_normal(_DIRECTIONS, make_rng(_SEED))
    try:
        with torch.no_grad():
            u = [
                torch.as_tensor(reduced_energy(scale * x)).detach().cpu().clone()
                for scale in _DISTANCES[1:]
            ]
        rises = ((u[1] - u[0]).double() - space.dim * math.log(10.0)).flatten().tolist()
    except Exception as error:  # of the user's code, which need not be defined there
        logger.debug("unbound or not: %s", error)
        return
    if any(math.isfinite(rise) and rise <= 0.0 for rise in rises):
        logger.warning(
            "target: its energy does not rise where a configuration is blown up a thousandfold, so "
            "that Z is infinite, and log Z means nothing; confine it if you need that"
        )


def _coupled(
    reduced_energy: Callable[[Tensor], Tensor],
    x: Tensor,
    parts: list[list[int]],
    distances: tuple[float, ...],
) -> list[list[int]]:
    """Groups of particles (of all parts) that still feel each other when all parts are far apart.

    Two parts a and b do if u(a, b) - u(a', b) - u(a, b') + u(a', b') is not zero, where a prime is
    a displacement as large as the distance: what either has with a third part drops out.
    """
    n = len(parts)
    if not 3 < n <= _FEW_PARTS:
        return []
    rng = make_rng(_SEED)
    far = torch.randn(n, 3, x.shape[1], generator=rng, dtype=torch.float64)
    far *= distances[-1] * max(float(x.square().mean().sqrt()), 0.1)
    frames, pairs = [], list(itertools.combinations(range(n), 2))
    for a, b in pairs:
        for moved in ((), (a,), (b,), (a, b)):
            frame = x.clone()
            for k, part in enumerate(parts):
                frame[part] += far[k, 0] + (far[k, 1] if k in moved else 0.0)
            frames.append(frame)
    u = reduced_energy(torch.stack(frames)).cpu().reshape(-1, 4)
    second = (u[:, 0] - u[:, 1] - u[:, 2] + u[:, 3]).abs()
    felt = ~(second <= _FELT + _ROUNDING * u.abs().amax(dim=1))  # not known counts too
    graph = nx.Graph()
    graph.add_nodes_from(range(n))
    graph.add_edges_from(pair for pair, yes in zip(pairs, felt.tolist(), strict=True) if yes)
    joined = nx.connected_components(graph)
    return [sorted(i for k in group for i in parts[k]) for group in joined]


def _groups(
    parts: list[list[int]], system: openmm.System, coupled: list[list[int]]
) -> Iterator[list[int]]:
    """Particles to be pulled from all others: what terms or forces join, each part, pairs."""
    graph = nx.Graph()
    graph.add_nodes_from(range(sum(map(len, parts))))
    for part in parts:
        nx.add_path(graph, part)
    for group in _terms(system):
        nx.add_path(graph, group)
    joined = [sorted(group) for group in nx.connected_components(graph)]
    pairs = itertools.combinations(parts, 2) if 3 < len(parts) <= _FEW_PARTS else ()
    yield from joined if len(joined) > 1 else ()
    yield from coupled if len(coupled) > 1 else ()
    yield from parts
    yield from (sorted(a + b) for a, b in pairs)


def _listed(names: Iterable[str]) -> str:
    """List the first few names."""
    every = list(names)
    more = f" and {len(every) - _NAMED} more" if len(every) > _NAMED else ""
    return ", ".join(every[:_NAMED]) + more


def _brief(indices: list[int]) -> str:
    """A list of indices, as a range where it is one."""
    if len(indices) > 2 and indices[-1] - indices[0] == len(indices) - 1:
        return f"range({indices[0]}, {indices[-1] + 1})"
    return str(indices) if len(indices) <= 2 * _NAMED else f"[{_listed(map(str, indices))}]"
