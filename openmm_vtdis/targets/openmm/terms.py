"""Terms of a batched energy: one torch module for each force, and the translators that make them.

See :mod:`openmm_vtdis.targets.openmm.torch_energy` for what a term is given, and
:mod:`openmm_vtdis.targets.openmm.translators` for the translators.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any

import openmm
import torch
from torch import Tensor, nn

from openmm_vtdis.core.derivatives import differentiation, elementwise, gradients
from openmm_vtdis.targets.openmm.term_geometry import distance
from openmm_vtdis.targets.openmm.term_hessians import TermHessians


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

    def add_derivatives(self, coordinates: Tensor, total: TermHessians) -> None:
        """Add gradient and Hessian at coordinates (3, M, B), detached.

        This default takes a pass for each coordinate; a term that knows better overrides it.
        """
        m = coordinates.shape[1]
        with differentiation():
            leaf = coordinates.detach().requires_grad_(True)
            (slope,) = gradients(self.forward(leaf), [leaf])
            rows = [gradients(row, [leaf], again=False)[0] for row in slope.flatten(0, 1)]
        total.gradient += slope.detach().transpose(0, 1)
        blocks = torch.stack(rows).unflatten(0, (3, m))  # (3, M, 3, M, B)
        total.hessian += blocks.permute(1, 3, 0, 2, 4).flatten(0, 1)


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
        If there is no translator, or the force uses a feature that it does not know, or is
        periodic.
    """
    name = type(force).__name__
    if name not in _TRANSLATORS:
        raise Untranslatable(name, "no batched translation of this class")
    if force.usesPeriodicBoundaryConditions():
        raise Untranslatable(name, "periodic boundary conditions")
    return _TRANSLATORS[name](force, system)


class NoTerm(Term):
    """A force that does not contribute to the potential energy."""

    def forward(self, coordinates: Tensor) -> Tensor:
        """(3, M, B) -> zeros (B,)."""
        return coordinates.new_zeros(coordinates.shape[2])


class Sum(Term):
    """Sum over P tuples of k particles of a function of their positions.

    Parameters
    ----------
    particles
        P tuples of k particle indices.
    function
        ``function(points, parameters) -> (P, B) kJ/mol``, or something that broadcasts to it.
        ``points`` are k tensors (3, P, B) in nm; each parameter is (P, 1), or a scalar where all
        tuples share the value.
    parameters
        Name to P values.
    """

    def __init__(
        self,
        particles: Sequence[Sequence[int]],
        function: Callable[[Sequence[Tensor], dict[str, Tensor]], Tensor],
        parameters: Mapping[str, Sequence[float]],
    ) -> None:
        super().__init__()
        self.n_terms = len(particles)
        self._function = function
        self._particles: Tensor
        rows = torch.tensor([list(row) for row in particles], dtype=torch.int64)
        self.register_buffer("_particles", rows.mT.contiguous() if len(rows) else rows)
        self._columns = Columns(parameters)

    def forward(self, coordinates: Tensor) -> Tensor:
        """(3, M, B) nm -> (B,) kJ/mol."""
        n_samples = coordinates.shape[2]
        if self.n_terms == 0:
            return coordinates.new_zeros(n_samples)
        return self._values(self._points(coordinates)).sum(dim=0)

    def add_derivatives(self, coordinates: Tensor, total: TermHessians) -> None:
        """Add derivatives in one pass for each coordinate of a tuple."""
        if self.n_terms == 0:
            return
        with differentiation():
            leaf = torch.stack(self._points(coordinates)).detach().requires_grad_(True)
            (first,) = gradients(self._values(leaf.unbind()), [leaf])
            rows = [gradients(row, [leaf], again=False)[0] for row in first.flatten(0, 1)]
        second = torch.stack(rows).unflatten(0, first.shape[:2])
        total.add_points(self._particles, first.detach(), second)

    def _points(self, coordinates: Tensor) -> list[Tensor]:
        """k tensors (3, P, B)."""
        return [coordinates.index_select(1, index) for index in self._particles]

    def _values(self, points: Sequence[Tensor]) -> Tensor:
        """(P, B) kJ/mol."""
        values = self._function(points, self._columns.values())
        return values.expand(self.n_terms, points[0].shape[2])


class PairSum(Sum):
    """Sum over P pairs of particles of a function of their distance.

    Parameters
    ----------
    particles
        P pairs of particle indices.
    function
        ``function(r, parameters) -> (P, B) kJ/mol``, with r (P, B) in nm.
    parameters
        Name to P values.
    """

    def __init__(
        self,
        particles: Sequence[Sequence[int]],
        function: Callable[[Tensor, dict[str, Tensor]], Tensor],
        parameters: Mapping[str, Sequence[float]],
    ) -> None:
        super().__init__(particles, lambda points, p: function(distance(*points), p), parameters)
        self._of_distance = function

    def add_derivatives(self, coordinates: Tensor, total: TermHessians) -> None:
        """Add derivatives in a single pass."""
        if self.n_terms == 0:
            return
        a, b = self._points(coordinates.detach())
        with differentiation():
            r = distance(a, b).requires_grad_(True)
            values = self._of_distance(r, self._columns.values()).expand(r.shape)
            (first,), ((second,),) = elementwise(values, [r])
        total.add_distances(self._particles, a - b, first, second)


class Columns(nn.Module):
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
        """Name to (P, 1) or scalar."""
        return {name: self.get_buffer(f"_column_{i}") for i, name in enumerate(self._column_names)}


def entries(force: Any, what: str) -> list[Any]:
    """OpenMM's tuples of parameters, of every "Bond", "Angle", "Torsion" or "Particle"."""
    count = getattr(force, f"getNum{what}s")()
    return [getattr(force, f"get{what}Parameters")(k) for k in range(count)]
