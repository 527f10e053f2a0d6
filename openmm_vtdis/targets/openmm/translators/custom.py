"""Forces whose energy is a Lepton expression of one, two or more particles."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import openmm
import torch
from torch import Tensor

from openmm_vtdis.targets.openmm.lepton import Expression, Function
from openmm_vtdis.targets.openmm.tabulated import tabulated_functions
from openmm_vtdis.targets.openmm.term_geometry import angle, dihedral, distance
from openmm_vtdis.targets.openmm.terms import (
    PairSum,
    Sum,
    Term,
    Untranslatable,
    entries,
    translates,
)


def compiled(
    force: openmm.Force,
    source: str,
    variables: Sequence[str],
    functions: Mapping[str, Function] | None = None,
) -> Expression:
    """Compile an energy function; a syntax OpenMM takes and we do not is Untranslatable."""
    try:
        return Expression(source, variables, functions)
    except ValueError as error:
        raise Untranslatable(type(force).__name__, str(error)) from error


def global_parameters(force: Any) -> dict[str, float]:
    """Global parameters at their defaults."""
    return {
        force.getGlobalParameterName(i): force.getGlobalParameterDefaultValue(i)
        for i in range(force.getNumGlobalParameters())
    }


def refuse_clashes(force: openmm.Force, names: Sequence[str]) -> None:
    """Raise Untranslatable if two variables of an expression have one name."""
    twice = sorted(name for name, count in Counter(names).items() if count > 1)
    if twice:
        raise Untranslatable(type(force).__name__, f"two variables named {twice[0]!r}")


def parameter_names(force: Any, what: str) -> list[str]:
    """Names of the parameters of every "Bond", "Angle", "Torsion" or "Particle"."""
    count = getattr(force, f"getNumPer{what}Parameters")()
    return [getattr(force, f"getPer{what}ParameterName")(k) for k in range(count)]


def columns(names: Sequence[str], rows: Sequence[Sequence[float]]) -> dict[str, list[float]]:
    """Rows of parameters (one per term) as named columns."""
    return {name: [row[k] for row in rows] for k, name in enumerate(names)}


def _sum(
    force: Any,
    particles: Sequence[Sequence[int]],
    parameters: Mapping[str, Sequence[float]],
    coordinates: Callable[[Any], dict[str, Tensor]],
    names: Sequence[str],
    functions: Mapping[str, Function] | None = None,
    kind: type[Sum] = Sum,
) -> Term:
    """A sum whose expression takes ``names``, which ``coordinates`` computes from the points.

    With ``kind=PairSum`` it computes them from the distance.
    """
    n_terms = len(particles)
    shared = {name: [value] * n_terms for name, value in global_parameters(force).items()}
    refuse_clashes(force, [*parameters, *shared, *names])
    table = {**parameters, **shared}
    expression = compiled(force, force.getEnergyFunction(), [*names, *table], functions)

    def energy(points: Any, p: dict[str, Tensor]) -> Tensor:
        return expression({**p, **coordinates(points)})

    return kind(particles, energy, table)


@translates("CustomExternalForce")
def custom_external(force: openmm.CustomExternalForce, system: openmm.System) -> Term:
    """Energy of x, y, z of single particles."""
    rows = entries(force, "Particle")
    names = parameter_names(force, "Particle")
    axes = ("x", "y", "z")
    return _sum(
        force,
        [(i,) for i, _ in rows],
        columns(names, [row for _, row in rows]),
        lambda points: dict(zip(axes, points[0], strict=True)),
        axes,
    )


@translates("CustomBondForce")
def custom_bond(force: openmm.CustomBondForce, system: openmm.System) -> Term:
    """Energy of the distance r."""
    names = parameter_names(force, "Bond")
    rows = entries(force, "Bond")
    parameters = columns(names, [row for *_, row in rows])
    pairs = [row[:2] for row in rows]
    return _sum(force, pairs, parameters, _as_r, ["r"], kind=PairSum)


@translates("CustomAngleForce")
def custom_angle(force: openmm.CustomAngleForce, system: openmm.System) -> Term:
    """Energy of the angle theta."""
    names = parameter_names(force, "Angle")
    rows = entries(force, "Angle")
    parameters = columns(names, [row for *_, row in rows])
    return _sum(force, [row[:3] for row in rows], parameters, _named("theta", angle), ["theta"])


@translates("CustomTorsionForce")
def custom_torsion(force: openmm.CustomTorsionForce, system: openmm.System) -> Term:
    """Energy of the dihedral theta."""
    names = parameter_names(force, "Torsion")
    rows = entries(force, "Torsion")
    parameters = columns(names, [row for *_, row in rows])
    return _sum(force, [row[:4] for row in rows], parameters, _named("theta", dihedral), ["theta"])


def _as_r(r: Tensor) -> dict[str, Tensor]:
    return {"r": r}


def _named(name: str, coordinate: Callable[..., Tensor]) -> Callable[..., dict[str, Tensor]]:
    return lambda points: {name: coordinate(*points)}


@translates("CustomCompoundBondForce")
def custom_compound_bond(force: openmm.CustomCompoundBondForce, system: openmm.System) -> Term:
    """Energy of the positions, distances, angles and dihedrals of k particles."""
    names = parameter_names(force, "Bond")
    rows = entries(force, "Bond")
    particles = [f"p{i + 1}" for i in range(force.getNumParticlesPerBond())]
    axes = [(axis, f"{axis}{i + 1}") for i in range(len(particles)) for axis in "xyz"]

    def coordinates(points: Sequence[Tensor]) -> dict[str, Tensor]:
        flat = [component for point in points for component in point]
        named = {name: value for (_, name), value in zip(axes, flat, strict=True)}
        return named | dict(zip(particles, points, strict=True))

    return _sum(
        force,
        [list(indices) for indices, _ in rows],
        columns(names, [row for _, row in rows]),
        coordinates,
        [*particles, *(name for _, name in axes)],
        {**_OF_PARTICLES, **tabulated_functions(force, _OF_PARTICLES)},
    )


def _of_points(coordinate: Callable[..., Tensor], n_points: int) -> Function:
    """A function of n points as one of their 3 n coordinates."""

    def evaluate(*components: Tensor) -> Tensor:
        device = max(components, key=lambda c: c.ndim).device  # literals are on the CPU
        numbers = torch.stack(torch.broadcast_tensors(*(c.to(device) for c in components)))
        flat = numbers.reshape(n_points, 3, *numbers.shape[1:])
        while flat.ndim < 4:
            flat = flat[..., None]
        return coordinate(*flat)

    return 3 * n_points, evaluate


_OF_PARTICLES: dict[str, Function] = {
    "distance": (2, distance),
    "angle": (3, angle),
    "dihedral": (4, dihedral),
    "pointdistance": _of_points(distance, 2),
    "pointangle": _of_points(angle, 3),
    "pointdihedral": _of_points(dihedral, 4),
}
"""Functions whose arguments p1, p2, ... are points (3, P, B)."""


@translates("CustomNonbondedForce")
def custom_nonbonded(force: openmm.CustomNonbondedForce, system: openmm.System) -> Term:
    """Energy of the distance of all pairs that are not excluded, or of those of the groups."""
    name = type(force).__name__
    if force.getNonbondedMethod() != openmm.CustomNonbondedForce.NoCutoff:
        raise Untranslatable(name, "a cutoff")
    functions = tabulated_functions(force)
    names, rows = _particle_parameters(force, functions)
    pairs = _interacting(force)
    parameters = columns([f"{name}1" for name in names], [rows[i] for i, _ in pairs])
    parameters |= columns([f"{name}2" for name in names], [rows[j] for _, j in pairs])
    return _sum(force, pairs, parameters, _as_r, ["r"], functions, kind=PairSum)


def _particle_parameters(
    force: openmm.CustomNonbondedForce, functions: Mapping[str, Function]
) -> tuple[list[str], list[list[float]]]:
    """Names and rows of per-particle parameters, computed values included."""
    names = parameter_names(force, "Particle")
    rows = [list(row) for row in entries(force, "Particle")]
    shared = global_parameters(force)
    given = list(names)
    for k in range(force.getNumComputedValues()):
        name, source = force.getComputedValueParameters(k)
        expression = compiled(force, source, [*given, *shared], functions)
        for row in rows:
            values = {**shared, **dict(zip(given, row[: len(given)], strict=True))}
            row.append(float(expression(values)))
        names.append(name)
    return names, rows


def _interacting(force: openmm.CustomNonbondedForce) -> list[tuple[int, int]]:
    """Pairs that interact; with overlapping groups, once for each group."""
    excluded = {frozenset(force.getExclusionParticles(i)) for i in range(force.getNumExclusions())}
    n = force.getNumParticles()
    if force.getNumInteractionGroups() == 0:
        every = ((i, j) for i in range(n) for j in range(i + 1, n))
        return [pair for pair in every if frozenset(pair) not in excluded]
    pairs = []
    for k in range(force.getNumInteractionGroups()):
        left, right = (sorted(group) for group in force.getInteractionGroupParameters(k))
        seen = set()
        for i in left:
            for j in right:
                both = frozenset((i, j))
                if i != j and both not in excluded and both not in seen:
                    seen.add(both)
                    pairs.append((i, j))
    return pairs
