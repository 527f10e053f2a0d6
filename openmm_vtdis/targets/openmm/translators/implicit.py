r"""Generalized Born solvents: computed values of every particle, and energies of these values.

A ``CustomGBForce`` computes, one after the other, values such as the Born radii::

    single particle      V_i = f(x_i, parameters_i, earlier values_i)
    particle pairs       V_i = sum_{j != i} f(r_ij, parameters_i, parameters_j)

and sums energies of single particles and of pairs i < j of them. ``GBSAOBCForce`` is the special
case of Onufriev, Bashford and Case (2004), and is translated as such.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import openmm
import torch
from torch import Tensor

from openmm_vtdis.core.derivatives import differentiation, elementwise
from openmm_vtdis.targets.openmm.lepton import Expression
from openmm_vtdis.targets.openmm.tabulated import tabulated_functions
from openmm_vtdis.targets.openmm.term_hessians import TermHessians
from openmm_vtdis.targets.openmm.terms import Columns, Term, Untranslatable, entries, translates
from openmm_vtdis.targets.openmm.translators.custom import (
    columns,
    compiled,
    global_parameters,
    parameter_names,
    refuse_clashes,
)
from openmm_vtdis.targets.openmm.translators.nonbonded import COULOMB

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
        self._ordered, self._pairs = (
            _Elements(p, ("1", "2"), parameters, shared, kept) for p in (ordered, pairs)
        )
        self._single = _Elements(torch.arange(m)[:, None], ("",), parameters, shared)
        self._number: Tensor
        self.register_buffer("_number", number[ordered[:, 0], ordered[:, 1]])

    def forward(self, coordinates: Tensor) -> Tensor:
        """(3, M, B) nm -> (B,) kJ/mol."""
        r = self._apart(coordinates).square().sum(dim=0).sqrt()
        r_ordered = r.index_select(0, self._number)
        found: dict[str, Tensor] = {}
        for name, expression, kind in self._values:
            elements, inputs = self._arguments(
                expression, kind, coordinates, found, self._ordered, r_ordered
            )
            value = elements(expression, inputs, r.shape[1], exclude=kind == _PAIR)
            found[name] = self._of_particles(value, kind)
        total = coordinates.new_zeros(r.shape[1])
        for expression, kind in self._energies:
            elements, inputs = self._arguments(expression, kind, coordinates, found, self._pairs, r)
            energy = elements(expression, inputs, r.shape[1], exclude=kind == _PAIR)
            total = total + energy.sum(dim=0)
        return total

    def add_derivatives(self, coordinates: Tensor, total: TermHessians) -> None:
        """Add derivatives by the chain rule; see :class:`_Chain`."""
        coordinates = coordinates.detach()
        apart = self._apart(coordinates)
        r = apart.square().sum(dim=0).sqrt()
        chain = _Chain(total, self._pairs.index, apart, r)
        r_ordered = r.index_select(0, self._number)
        found: dict[str, Tensor] = {}
        for name, expression, kind in self._values:
            elements, inputs = self._arguments(
                expression, kind, coordinates, found, self._ordered, r_ordered
            )
            numbers = self._number if elements is self._ordered else None
            step = _Step.of(elements, numbers, expression, inputs, r.shape[1], kind == _PAIR)
            found[name] = self._of_particles(step.value, kind)
            chain.add_value(name, step)
        for expression, kind in self._energies:
            elements, inputs = self._arguments(expression, kind, coordinates, found, self._pairs, r)
            step = _Step.of(elements, None, expression, inputs, r.shape[1], kind == _PAIR)
            chain.pull(step, torch.ones_like(step.value))
        chain.finish()

    def _apart(self, coordinates: Tensor) -> Tensor:
        """Vectors from the second particle of each pair to the first, (3, P, B)."""
        a, b = (coordinates.index_select(1, index) for index in self._pairs.index)
        return a - b

    def _of_particles(self, value: Tensor, kind: int) -> Tensor:
        """Values of particles (M, B), from those of particles or of ordered pairs."""
        m = len(self._single.index[0])
        return value if kind == _SINGLE else value.unflatten(0, (m, m - 1)).sum(dim=1)

    def _arguments(
        self,
        expression: Expression,
        kind: int,
        coordinates: Tensor,
        found: Mapping[str, Tensor],
        pairs: _Elements,
        r: Tensor,
    ) -> tuple[_Elements, dict[str, Tensor]]:
        """The elements that an expression is evaluated on, and its inputs there."""
        elements = self._single if kind == _SINGLE else pairs
        return elements, elements.inputs(expression, coordinates, r, found)


class _Elements(Columns):
    """The elements that an expression is evaluated on: all particles, or pairs of them.

    Attributes
    ----------
    index
        (1, M) or (2, E): the particles.
    sides
        Suffixes of names: nothing, or "1" and "2".
    geometry
        Inputs that are no computed values: the distance of pairs, the coordinates of particles.
    """

    def __init__(
        self,
        rows: Tensor,
        sides: Sequence[str],
        parameters: Mapping[str, Sequence[float]],
        shared: Mapping[str, float],
        kept: Tensor | None = None,
    ) -> None:
        of_sides = {
            f"{name}{side}": [values[i] for i in rows[:, k].tolist()]
            for name, values in parameters.items()
            for k, side in enumerate(sides)
        }
        super().__init__(
            {**of_sides, **{name: [value] * len(rows) for name, value in shared.items()}}
        )
        self.sides = tuple(sides)
        self.geometry = ("r",) if len(sides) == 2 else ("x", "y", "z")
        self.index: Tensor
        self.register_buffer("index", rows.mT.contiguous())
        self._kept: Tensor | None
        mask = None if kept is None else kept[tuple(rows.mT)][:, None]
        self.register_buffer("_kept", None if mask is None or bool(mask.all()) else mask)

    def inputs(
        self, expression: Expression, coordinates: Tensor, r: Tensor, found: Mapping[str, Tensor]
    ) -> dict[str, Tensor]:
        """Inputs of an expression for each element: name to (E, B)."""
        known = dict(zip(self.geometry, [r] if len(self.sides) == 2 else coordinates, strict=True))
        known = {name: value for name, value in known.items() if name in expression.variables}
        for name, value in found.items():
            for side, index in zip(self.sides, self.index, strict=True):
                if name + side in expression.variables:
                    known[name + side] = value.index_select(0, index)
        return known

    def source(self, name: str) -> tuple[str, Tensor]:
        """The computed value and the particles (E,) that an input is of."""
        if self.sides == ("",):
            return name, self.index[0]
        return name[:-1], self.index[self.sides.index(name[-1])]

    def forward(
        self, expression: Expression, inputs: Mapping[str, Tensor], n_samples: int, exclude: bool
    ) -> Tensor:
        """The expression for every element, (E, B); zero for excluded ones if asked."""
        value = expression({**self.values(), **inputs})
        value = value.expand(self.index.shape[1], n_samples)
        if exclude and self._kept is not None:
            value = torch.where(self._kept, value, 0.0)
        return value


@dataclass(frozen=True)
class _Step:
    """An expression with its derivatives in its own inputs, (E, B) each.

    ``numbers`` (E,) are the unordered pairs that ordered ones belong to.
    """

    elements: _Elements
    numbers: Tensor | None
    names: list[str]
    value: Tensor
    first: list[Tensor]
    second: list[list[Tensor]]

    @classmethod
    def of(
        cls,
        elements: _Elements,
        numbers: Tensor | None,
        expression: Expression,
        inputs: Mapping[str, Tensor],
        n_samples: int,
        exclude: bool,
    ) -> _Step:
        """Evaluate and differentiate."""
        leaves = {name: value.detach().requires_grad_(True) for name, value in inputs.items()}
        with differentiation():
            # not through __call__, whose hooks (of a counter, say) do not know this differentiation
            value = elements.forward(expression, leaves, n_samples, exclude)
            first, second = elementwise(value, list(leaves.values()))
        return cls(elements, numbers, list(leaves), value.detach(), first, second)


class _Chain:
    """The chain rule to second order, backwards through the computed values.

    With computed values V, expressions phi of them, lambda = dE / dphi, and J = dV / dx::

        Hessian = sum over phi of lambda (dinputs / dx)^T phi'' (dinputs / dx)
                + sum over pairs of dE / dr times the Hessian of r.

    Second derivatives between two distances or coordinates are those of one pair or particle;
    those with V are collected in C (between V and x) and Q (between two V), so that their part is
    J^T C + C^T J + J^T Q J.
    """

    def __init__(self, total: TermHessians, pairs: Tensor, apart: Tensor, r: Tensor) -> None:
        self._total, self._pairs, self._apart = total, pairs, apart
        self._direction = (apart / r).transpose(0, 1)  # (P, 3, B)
        self._first, self._second = torch.zeros_like(r), torch.zeros_like(r)
        self._steps: dict[str, _Step] = {}
        self._slopes: dict[str, Tensor] = {}
        self._jacobians: dict[str, Tensor] = {}
        self._mixed: dict[str, Tensor] = {}
        self._between: dict[tuple[str, str], Tensor] = {}

    def add_value(self, name: str, step: _Step) -> None:
        """Add a computed value, in order, with its Jacobian (M, M, 3, B)."""
        m, n_samples = self._total.n_particles, step.value.shape[1]
        owners = step.elements.index[0]
        jacobian = step.value.new_zeros(m, m, 3, n_samples)
        for slope, argument in zip(step.first, step.names, strict=True):
            if argument in step.elements.geometry:
                self._add_geometry(jacobian, owners, step, argument, slope)
            else:
                value, particles = step.elements.source(argument)
                weights = slope.new_zeros(m * m, n_samples)
                weights.index_add_(0, owners * m + particles, slope)
                jacobian += torch.einsum(
                    "ijb,jkxb->ikxb", weights.reshape(m, m, n_samples), self._jacobians[value]
                )
        self._steps[name], self._jacobians[name] = step, jacobian
        self._slopes[name] = step.value.new_zeros(m, n_samples)
        self._mixed[name] = torch.zeros_like(jacobian)

    def pull(self, step: _Step, weight: Tensor) -> None:
        """Add the derivatives of an expression whose elements count (E, B) in the energy."""
        m = self._total.n_particles
        for a, argument in enumerate(step.names):
            slope = weight * step.first[a]
            if argument not in step.elements.geometry:
                value, particles = step.elements.source(argument)
                self._slopes[value].index_add_(0, particles, slope)
            elif argument == "r":
                self._pair_sum(self._first, step, slope)
                self._pair_sum(self._second, step, weight * step.second[a][a])
            else:
                self._total.gradient[:, "xyz".index(argument)] += slope
            for b, other in enumerate(step.names):
                self._pull_second(step, argument, other, weight * step.second[a][b], m)

    def _pull_second(self, step: _Step, a: str, b: str, bend: Tensor, m: int) -> None:
        geometry = step.elements.geometry
        if a in geometry:
            if b in geometry and b != "r":
                blocks = self._total.hessian[:: m + 1]
                blocks[:, "xyz".index(a), "xyz".index(b)] += bend
        else:
            value, particles = step.elements.source(a)
            if b in geometry:
                self._add_geometry(self._mixed[value], particles, step, b, bend)
            else:
                other, others = step.elements.source(b)
                between = self._between.setdefault(
                    (value, other), bend.new_zeros(m * m, bend.shape[1])
                )
                between.index_add_(0, particles * m + others, bend)

    def finish(self) -> None:
        """Go back through the computed values, and add everything up."""
        for name in reversed(self._steps):
            step = self._steps[name]
            owners = step.elements.index[0]
            self.pull(step, self._slopes[name].index_select(0, owners))
        self._total.add_distances(self._pairs, self._apart, self._first, self._second)
        m = self._total.n_particles
        for (name, other), weights in self._between.items():
            half = 0.5 * weights.reshape(m, m, -1)
            self._mixed[name] += torch.einsum("ijb,jkxb->ikxb", half, self._jacobians[other])
        for name, jacobian in self._jacobians.items():
            self._total.add_outer(jacobian, self._mixed[name])

    def _pair_sum(self, total: Tensor, step: _Step, values: Tensor) -> None:
        """Add (E, B) to the pairs' (P, B)."""
        if step.numbers is None:
            total += values
        else:
            total.index_add_(0, step.numbers, values)

    def _add_geometry(
        self, total: Tensor, rows: Tensor, step: _Step, argument: str, slope: Tensor
    ) -> None:
        """Add slope (E, B) times the gradient of r, x, y or z to rows of total (M, M, 3, B)."""
        m = self._total.n_particles
        flat = total.view(m * m, 3, -1)
        if argument != "r":
            axis = "xyz".index(argument)
            flat[:, axis].index_add_(0, rows * m + step.elements.index[0], slope)
            return
        numbers = step.numbers
        e = self._direction if numbers is None else self._direction.index_select(0, numbers)
        i, j = self._pairs if numbers is None else self._pairs[:, numbers]
        push = slope[:, None] * e
        flat.index_add_(0, rows * m + i, push).index_add_(0, rows * m + j, -push)


@translates("GBSAOBCForce")
def gbsa_obc(force: openmm.GBSAOBCForce, system: openmm.System) -> Term:
    """Model II of Onufriev, Bashford and Case (2004), with the ACE surface energy."""
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
