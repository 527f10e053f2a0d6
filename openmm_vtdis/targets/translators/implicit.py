r"""Generalized Born solvents: values computed for every particle, then energies of these values.

A ``CustomGBForce`` computes, one after the other, values such as the Born radii::

    single particle      V_i = f(x_i, parameters_i, earlier values_i)
    particle pairs       V_i = sum_{j != i} f(r_ij, parameters_i, parameters_j)

and sums energies of single particles and of pairs i < j of them. ``GBSAOBCForce`` is the special
case of Onufriev, Bashford and Case (2004), and is translated as such.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import openmm
import torch
from torch import Tensor

from openmm_vtdis.targets.lepton import Expression
from openmm_vtdis.targets.tabulated import tabulated_functions
from openmm_vtdis.targets.terms import Columns, Term, Untranslatable, entries, translates
from openmm_vtdis.targets.translators.custom import (
    columns,
    compiled,
    global_parameters,
    parameter_names,
    refuse_clashes,
)
from openmm_vtdis.targets.translators.nonbonded import COULOMB

_SINGLE = openmm.CustomGBForce.SingleParticle
_PAIR = openmm.CustomGBForce.ParticlePair


@translates("CustomGBForce")
def custom_gb(force: openmm.CustomGBForce, system: openmm.System) -> Term:
    """Any CustomGBForce without a cutoff."""
    if force.getNonbondedMethod() != openmm.CustomGBForce.NoCutoff:
        raise Untranslatable("CustomGBForce", "a cutoff")
    functions = tabulated_functions(force)
    names = parameter_names(force, "Particle")
    rows = entries(force, "Particle")
    shared = list(global_parameters(force))
    known = list(names)

    def compile_one(source: str, kind: int) -> Expression:
        variables = [*shared, *("x", "y", "z"), *known]
        if kind != _SINGLE:
            variables = [*shared, "r", *(f"{name}{side}" for name in known for side in (1, 2))]
        refuse_clashes(force, variables)
        return compiled(force, source, variables, functions)

    values = []
    for k in range(force.getNumComputedValues()):
        name, source, kind = force.getComputedValueParameters(k)
        values.append((name, compile_one(source, kind), kind))
        known.append(name)
    energies = []
    for k in range(force.getNumEnergyTerms()):
        source, kind = force.getEnergyTermParameters(k)
        energies.append((compile_one(source, kind), kind))
    excluded = [force.getExclusionParticles(k) for k in range(force.getNumExclusions())]
    return GeneralizedBorn(
        columns(names, rows), global_parameters(force), values, energies, excluded, len(rows)
    )


class GeneralizedBorn(Term):
    """Computed values and energy terms of a CustomGBForce.

    Parameters
    ----------
    parameters
        Per-particle parameters, name to M values.
    shared
        Global parameters.
    values
        Name, expression and type (single particle, pairs, pairs without exclusions), in order.
    energies
        Expression and type.
    excluded
        Pairs that the type "pairs" leaves out.
    """

    def __init__(
        self,
        parameters: Mapping[str, Sequence[float]],
        shared: Mapping[str, float],
        values: Sequence[tuple[str, Expression, int]],
        energies: Sequence[tuple[Expression, int]],
        excluded: Sequence[Sequence[int]],
        n_particles: int,
    ) -> None:
        super().__init__()
        m = n_particles
        self.n_terms = max(m * (m - 1), 1)
        self._values, self._energies = list(values), list(energies)
        pairs = torch.combinations(torch.arange(m)).reshape(-1, 2)
        every = [[i, j] for i in range(m) for j in range(m) if i != j]
        ordered = torch.tensor(every, dtype=torch.int64).reshape(-1, 2)
        number = torch.zeros(m, m, dtype=torch.int64)
        number[pairs[:, 0], pairs[:, 1]] = number[pairs[:, 1], pairs[:, 0]] = torch.arange(
            len(pairs)
        )
        kept = torch.ones(m, m, dtype=torch.bool)
        for i, j in excluded:
            kept[i, j] = kept[j, i] = False
        self._ordered, self._pairs = (_Sides(p, kept, parameters, shared) for p in (ordered, pairs))
        self._single = Columns({**parameters, **{k: [v] * m for k, v in shared.items()}})
        self._number: Tensor
        self.register_buffer("_number", number[ordered[:, 0], ordered[:, 1]])

    def forward(self, coordinates: Tensor) -> Tensor:
        """(3, M, B) nm -> (B,) kJ/mol."""
        _, m, n_samples = coordinates.shape
        r = self._pairs.distances(coordinates)
        r_ordered = r.index_select(0, self._number)
        found: dict[str, Tensor] = {}
        for name, expression, kind in self._values:
            if kind == _SINGLE:
                value = self._of_particles(expression, coordinates, found)
            else:
                pairwise = self._ordered(expression, r_ordered, found, kind == _PAIR)
                value = pairwise.reshape(m, m - 1, n_samples).sum(dim=1)
            found[name] = value
        total = coordinates.new_zeros(n_samples)
        for expression, kind in self._energies:
            if kind == _SINGLE:
                energy = self._of_particles(expression, coordinates, found)
            else:
                energy = self._pairs(expression, r, found, kind == _PAIR)
            total = total + energy.sum(dim=0)
        return total

    def _of_particles(
        self, expression: Expression, coordinates: Tensor, found: Mapping[str, Tensor]
    ) -> Tensor:
        x, y, z = coordinates
        value = expression({**self._single.values(), **found, "x": x, "y": y, "z": z})
        return value.expand(coordinates.shape[1:])


class _Sides(Columns):
    """Pairs of particles, and what an expression of a pair knows about either side."""

    def __init__(
        self,
        pairs: Tensor,
        kept: Tensor,
        parameters: Mapping[str, Sequence[float]],
        shared: Mapping[str, float],
    ) -> None:
        sides = {
            f"{name}{side + 1}": [values[i] for i in pairs[:, side].tolist()]
            for name, values in parameters.items()
            for side in (0, 1)
        }
        super().__init__(
            {**sides, **{name: [value] * len(pairs) for name, value in shared.items()}}
        )
        self._index: Tensor
        self._kept: Tensor
        self.register_buffer("_index", pairs.mT.contiguous())
        self.register_buffer("_kept", kept[pairs[:, 0], pairs[:, 1]][:, None])

    def distances(self, coordinates: Tensor) -> Tensor:
        """(3, M, B) -> (P, B)."""
        a, b = (coordinates.index_select(1, index) for index in self._index)
        return (a - b).square().sum(dim=0).sqrt()

    def forward(
        self, expression: Expression, r: Tensor, found: Mapping[str, Tensor], exclude: bool
    ) -> Tensor:
        """The expression for every pair, (P, B); zero for excluded ones if asked."""
        known = {**self.values(), "r": r}
        for name, value in found.items():
            for side in (0, 1):
                if f"{name}{side + 1}" in expression.variables:
                    known[f"{name}{side + 1}"] = value.index_select(0, self._index[side])
        value = expression(known).expand(r.shape)
        if exclude and not bool(self._kept.all()):
            value = torch.where(self._kept, value, 0.0)
        return value


@translates("GBSAOBCForce")
def gbsa_obc(force: openmm.GBSAOBCForce, system: openmm.System) -> Term:
    """Onufriev, Bashford and Case (2004), model II, with the ACE surface energy."""
    if force.getNonbondedMethod() != openmm.GBSAOBCForce.NoCutoff:
        raise Untranslatable("GBSAOBCForce", "a cutoff")
    custom = openmm.CustomGBForce()
    for name in ("q", "radius", "scale"):
        custom.addPerParticleParameter(name)
    for q, radius, scale in entries(force, "Particle"):
        custom.addParticle([q._value, radius._value, scale])
    screening = 1.0 / force.getSoluteDielectric() - 1.0 / force.getSolventDielectric()
    custom.addGlobalParameter("screening", COULOMB * screening)
    custom.addGlobalParameter("tension", force.getSurfaceAreaEnergy()._value)
    custom.addComputedValue("I", _HCT, openmm.CustomGBForce.ParticlePairNoExclusions)
    custom.addComputedValue(
        "B",
        "1/(1/offset-tanh(psi-0.8*psi^2+4.85*psi^3)/radius); psi=I*offset; offset=radius-0.009",
        _SINGLE,
    )
    custom.addEnergyTerm(
        f"{4.0 * torch.pi!r}*tension*(radius+0.14)^2*(radius/B)^6-0.5*screening*q^2/B", _SINGLE
    )
    custom.addEnergyTerm(
        "-screening*q1*q2/sqrt(r^2+B1*B2*exp(-r^2/(4*B1*B2)))",
        openmm.CustomGBForce.ParticlePairNoExclusions,
    )
    return custom_gb(custom, system)


_HCT = (
    "select(step(r+s2-o1),"
    "0.5*(1/L-1/U+0.25*(r-s2^2/r)*(1/U^2-1/L^2)+0.5*log(L/U)/r+2*step(s2-r-o1)*(1/o1-1/L)),0);"
    "U=r+s2; L=max(o1,abs(r-s2)); s2=scale2*(radius2-0.009); o1=radius1-0.009"
)
"""Hawkins, Cramer and Truhlar's integral over the sphere of particle 2, seen from particle 1."""
