"""Terms of a batched energy: one torch module for each force, and the translators that make them.

See :mod:`openmm_vtdis.targets.batched` for what a term is given, and
:mod:`openmm_vtdis.targets.translators` for the translators.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any

import openmm
import torch
from torch import Tensor, nn


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
        points = [coordinates.index_select(1, index) for index in self._particles]
        values = self._function(points, self._columns.values())
        return values.expand(self.n_terms, n_samples).sum(dim=0)


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
        return {name: getattr(self, f"_column_{i}") for i, name in enumerate(self._column_names)}


def entries(force: Any, what: str) -> list[Any]:
    """OpenMM's tuples of parameters, of every "Bond", "Angle", "Torsion" or "Particle"."""
    count = getattr(force, f"getNum{what}s")()
    return [getattr(force, f"get{what}Parameters")(k) for k in range(count)]
