r"""An OpenMM System as batched torch: the energies of thousands of configurations in one call.

Every force of the System is translated to a *term*, a torch module that maps coordinates to
energies. Terms see the coordinates with the axes reversed, (3, M, B): a sum over pairs then runs
over contiguous rows of B samples,

    U_b = sum_terms sum_p E(r_pb; parameters_p),      r_pb = | x_{i(p) b} - x_{j(p) b} |,

and the samples never meet: a NaN in one is invisible to the others. All of it is float64.

A translator turns one OpenMM force into a term, and is registered under the force's class name:

    @translates("HarmonicBondForce")
    def _harmonic_bond(force: openmm.HarmonicBondForce, system: openmm.System) -> Term: ...

It raises :class:`Untranslatable` for a feature it does not know. Adding a force is adding a
translator; nothing else changes. Translations are compared with a Context when a target is built
(:mod:`openmm_vtdis.targets.validation`), so a wrong one cannot be used.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any

import openmm
import torch
from torch import Tensor, nn

from openmm_vtdis.targets.lepton import Expression

_CHUNK_ELEMENTS = {"cpu": 32_768}
_CHUNK_ELEMENTS_ELSEWHERE = 4_194_304
"""Terms x samples evaluated at once. On the CPU temporaries stay in the cache (measured: 2 times
faster than large chunks); other devices want large batches, bounded by memory."""


class Untranslatable(Exception):
    """A force, or a feature of one, that has no torch translation."""

    def __init__(self, force: str, reason: str) -> None:
        super().__init__(f"{force}: {reason}")
        self.force = force
        self.reason = reason


class Term(nn.Module):
    """One force: ``forward(coordinates (3, M, B) nm) -> (B,) kJ/mol``."""

    n_terms: int = 0
    """Number of summands per sample, for sizing the chunks."""


Translator = Callable[[Any, openmm.System], Term]
_TRANSLATORS: dict[str, Translator] = {}


def translates(*class_names: str) -> Callable[[Translator], Translator]:
    """Register the decorated function as the translator of the named OpenMM force classes."""

    def register(translator: Translator) -> Translator:
        for class_name in class_names:
            _TRANSLATORS[class_name] = translator
        return translator

    return register


def translate(force: openmm.Force, system: openmm.System) -> Term:
    """Return the term for one force of ``system``.

    Raises
    ------
    Untranslatable
        If there is no translator, or the force uses a feature that it does not know.
    """
    name = type(force).__name__
    if name not in _TRANSLATORS:
        raise Untranslatable(name, "no batched translation of this class")
    return _TRANSLATORS[name](force, system)


class BatchedEnergy(nn.Module):
    """The potential energy of an OpenMM System for batches of configurations.

    Parameters
    ----------
    system
        Every force must be translatable; the System is read once and not kept.

    Raises
    ------
    Untranslatable
        If a force is not.
    """

    def __init__(self, system: openmm.System) -> None:
        super().__init__()
        terms = [translate(force, system) for force in system.getForces()]
        self.terms = nn.ModuleList(terms)
        self._n_terms = max([1, *(term.n_terms for term in terms)])

    def energy(self, x: Tensor) -> Tensor:
        """Energies: x (B, M, 3) nm -> (B,) kJ/mol, float64 on x's device, differentiable."""
        chunks = [self._evaluate(chunk) for chunk in self._chunks(x)]
        return torch.cat(chunks) if chunks else x.new_zeros(0, dtype=torch.float64)

    def energy_and_force(self, x: Tensor) -> tuple[Tensor, Tensor]:
        """x (B, M, 3) nm -> energies (B,) kJ/mol and forces (B, M, 3) kJ/mol/nm, both detached."""
        energies, forces = [], []
        for chunk in self._chunks(x.detach()):
            with torch.enable_grad():
                chunk = chunk.to(torch.float64).requires_grad_(True)
                energy = self._evaluate(chunk)
            if energy.requires_grad:
                (gradient,) = torch.autograd.grad(energy.sum(), chunk, materialize_grads=True)
            else:
                gradient = torch.zeros_like(chunk)
            energies.append(energy.detach())
            forces.append(-gradient)
        if not energies:
            return x.new_zeros(0, dtype=torch.float64), x.detach().to(torch.float64)
        return torch.cat(energies), torch.cat(forces)

    def _chunks(self, x: Tensor) -> Iterator[Tensor]:
        self.to(x.device)
        elements = _CHUNK_ELEMENTS.get(x.device.type, _CHUNK_ELEMENTS_ELSEWHERE)
        size = max(1, elements // self._n_terms)
        for start in range(0, x.shape[0], size):
            yield x[start : start + size]

    def _evaluate(self, x: Tensor) -> Tensor:
        coordinates = x.to(torch.float64).permute(2, 1, 0).contiguous()
        energy = torch.zeros(x.shape[0], dtype=torch.float64, device=x.device)
        for term in self.terms:
            energy = energy + term(coordinates)
        return energy


# ---------------------------------------------------------------------------------------------
# Building blocks of translators


class ZeroTerm(Term):
    """A force that does not contribute to the potential energy."""

    def forward(self, coordinates: Tensor) -> Tensor:
        """(3, M, B) -> zeros (B,)."""
        return coordinates.new_zeros(coordinates.shape[2])


class PairTerm(Term):
    """Sum over pairs of a function of their distance.

    Parameters
    ----------
    pairs
        P pairs of particle indices.
    function
        ``function(r (P, B) nm, parameters) -> (P, B) kJ/mol``, or something that broadcasts to it;
        each parameter is (P, 1), or a scalar where all pairs share the value.
    parameters
        Name to P values.
    """

    def __init__(
        self,
        pairs: Sequence[tuple[int, int]],
        function: Callable[[Tensor, dict[str, Tensor]], Tensor],
        parameters: Mapping[str, Sequence[float]],
    ) -> None:
        super().__init__()
        self.n_terms = len(pairs)
        indices = torch.tensor(list(pairs), dtype=torch.int64).reshape(-1, 2)
        self._function = function
        self._first: Tensor
        self._second: Tensor
        self.register_buffer("_first", indices[:, 0].contiguous())
        self.register_buffer("_second", indices[:, 1].contiguous())
        self._columns = _Parameters(parameters)

    def forward(self, coordinates: Tensor) -> Tensor:
        """(3, M, B) nm -> (B,) kJ/mol."""
        n_samples = coordinates.shape[2]
        if self.n_terms == 0:
            return coordinates.new_zeros(n_samples)
        first = coordinates.index_select(1, self._first)
        delta = first - coordinates.index_select(1, self._second)
        r = delta.square().sum(dim=0).sqrt()
        values = self._function(r, self._columns.values())
        return values.expand(self.n_terms, n_samples).sum(dim=0)


class ParticleTerm(Term):
    """Sum over particles of a function of their coordinates.

    ``function(x, y, z, parameters)`` takes (P, B) coordinates in nm; see :class:`PairTerm`.
    """

    def __init__(
        self,
        particles: Sequence[int],
        function: Callable[[Tensor, Tensor, Tensor, dict[str, Tensor]], Tensor],
        parameters: Mapping[str, Sequence[float]],
    ) -> None:
        super().__init__()
        self.n_terms = len(particles)
        self._function = function
        self._particles: Tensor
        self.register_buffer("_particles", torch.tensor(list(particles), dtype=torch.int64))
        self._columns = _Parameters(parameters)

    def forward(self, coordinates: Tensor) -> Tensor:
        """(3, M, B) nm -> (B,) kJ/mol."""
        n_samples = coordinates.shape[2]
        if self.n_terms == 0:
            return coordinates.new_zeros(n_samples)
        x, y, z = coordinates.index_select(1, self._particles)
        values = self._function(x, y, z, self._columns.values())
        return values.expand(self.n_terms, n_samples).sum(dim=0)


class _Parameters(nn.Module):
    """Named columns (P, 1) of per-term parameters; a scalar where all values are the same."""

    def __init__(self, columns: Mapping[str, Sequence[float]]) -> None:
        super().__init__()
        self._column_names = list(columns)
        for index, values in enumerate(columns.values()):
            column = torch.tensor(list(values), dtype=torch.float64).reshape(-1, 1)
            if len(column) and bool((column == column[0]).all()):
                column = column[0, 0]
            self.register_buffer(f"_column_{index}", column)

    def values(self) -> dict[str, Tensor]:
        return {name: getattr(self, f"_column_{i}") for i, name in enumerate(self._column_names)}


def _compiled(force: openmm.Force, source: str, variables: Sequence[str]) -> Expression:
    """Compile an energy function; a syntax OpenMM takes and we do not is Untranslatable."""
    try:
        return Expression(source, variables)
    except ValueError as error:
        raise Untranslatable(type(force).__name__, str(error)) from error


def _global_parameters(force: Any, n_terms: int) -> dict[str, Sequence[float]]:
    """Global parameters at their defaults, repeated for every term."""
    return {
        force.getGlobalParameterName(i): [force.getGlobalParameterDefaultValue(i)] * n_terms
        for i in range(force.getNumGlobalParameters())
    }


def _columns(names: Sequence[str], rows: Sequence[Sequence[float]]) -> dict[str, Sequence[float]]:
    """Rows of parameters (one per term) as named columns."""
    return {name: [row[k] for row in rows] for k, name in enumerate(names)}


# ---------------------------------------------------------------------------------------------
# Translators


@translates("CMMotionRemover", "AndersenThermostat")
def _no_energy(force: openmm.Force, system: openmm.System) -> Term:
    return ZeroTerm()


@translates("HarmonicBondForce")
def _harmonic_bond(force: openmm.HarmonicBondForce, system: openmm.System) -> Term:
    bonds = [force.getBondParameters(i) for i in range(force.getNumBonds())]
    parameters = {
        "length": [length._value for _, _, length, _ in bonds],
        "k": [k._value for _, _, _, k in bonds],
    }
    return PairTerm([(i, j) for i, j, _, _ in bonds], _harmonic, parameters)


def _harmonic(r: Tensor, p: dict[str, Tensor]) -> Tensor:
    return 0.5 * p["k"] * (r - p["length"]).square()


@translates("CustomBondForce")
def _custom_bond(force: openmm.CustomBondForce, system: openmm.System) -> Term:
    names = [force.getPerBondParameterName(k) for k in range(force.getNumPerBondParameters())]
    bonds = [force.getBondParameters(i) for i in range(force.getNumBonds())]
    parameters = _columns(names, [row for _, _, row in bonds])
    parameters |= _global_parameters(force, len(bonds))
    expression = _compiled(force, force.getEnergyFunction(), ["r", *parameters])
    return PairTerm([(i, j) for i, j, _ in bonds], _of_distance(expression), parameters)


@translates("CustomNonbondedForce")
def _custom_nonbonded(force: openmm.CustomNonbondedForce, system: openmm.System) -> Term:
    name = type(force).__name__
    if force.getNonbondedMethod() != openmm.CustomNonbondedForce.NoCutoff:
        raise Untranslatable(name, "a cutoff")
    for feature, count in (
        ("interaction groups", force.getNumInteractionGroups()),
        ("tabulated functions", force.getNumTabulatedFunctions()),
        ("computed values", force.getNumComputedValues()),
    ):
        if count:
            raise Untranslatable(name, feature)
    excluded = {frozenset(force.getExclusionParticles(i)) for i in range(force.getNumExclusions())}
    n = force.getNumParticles()
    pairs = [(i, j) for i in range(n) for j in range(i + 1, n) if frozenset((i, j)) not in excluded]
    rows = [force.getParticleParameters(i) for i in range(n)]
    names = [
        force.getPerParticleParameterName(k) for k in range(force.getNumPerParticleParameters())
    ]
    parameters = _columns([f"{name}1" for name in names], [rows[i] for i, _ in pairs])
    parameters |= _columns([f"{name}2" for name in names], [rows[j] for _, j in pairs])
    parameters |= _global_parameters(force, len(pairs))
    expression = _compiled(force, force.getEnergyFunction(), ["r", *parameters])
    return PairTerm(pairs, _of_distance(expression), parameters)


@translates("CustomExternalForce")
def _custom_external(force: openmm.CustomExternalForce, system: openmm.System) -> Term:
    names = [
        force.getPerParticleParameterName(k) for k in range(force.getNumPerParticleParameters())
    ]
    particles = [force.getParticleParameters(i) for i in range(force.getNumParticles())]
    parameters = _columns(names, [row for _, row in particles])
    parameters |= _global_parameters(force, len(particles))
    expression = _compiled(force, force.getEnergyFunction(), ["x", "y", "z", *parameters])

    def energy(x: Tensor, y: Tensor, z: Tensor, p: dict[str, Tensor]) -> Tensor:
        return expression({**p, "x": x, "y": y, "z": z})

    return ParticleTerm([i for i, _ in particles], energy, parameters)


def _of_distance(expression: Expression) -> Callable[[Tensor, dict[str, Tensor]], Tensor]:
    def energy(r: Tensor, p: dict[str, Tensor]) -> Tensor:
        return expression({**p, "r": r})

    return energy
