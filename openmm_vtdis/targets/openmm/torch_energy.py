r"""An OpenMM System as batched torch: the energies of thousands of configurations in one call.

Every force of the System is translated to a *term*, a torch module that maps coordinates to
energies. Terms see the coordinates with the axes reversed, (3, M, B): a sum over pairs, triples or
quadruples p of particles then runs over contiguous rows of B samples,

    U_b = sum_terms sum_p E(x_{i(p) b}, x_{j(p) b}, ...; parameters_p),

and the samples never meet: a NaN in one is invisible to the others. All of it is float64.

A translator turns one OpenMM force into a term, and is registered under the force's class name:

    @translates("HarmonicBondForce")
    def harmonic_bond(force: openmm.HarmonicBondForce, system: openmm.System) -> Term: ...

It raises :class:`Untranslatable` for a feature it does not know. Adding a force is adding a
translator (:mod:`openmm_vtdis.targets.openmm.translators`); nothing else changes. Translations are
compared with a Context when a target is built (:mod:`openmm_vtdis.targets.openmm.validation`), so a
wrong one cannot be used.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import TypeVar, cast

import openmm
import torch
from torch import Tensor, nn

from openmm_vtdis.core.derivatives import differentiation, gradients, leaf_of
from openmm_vtdis.targets.openmm import translators
from openmm_vtdis.targets.openmm.term_hessians import TermHessians
from openmm_vtdis.targets.openmm.terms import Term, Untranslatable, translate

T = TypeVar("T")

__all__ = ["BatchedEnergy", "Untranslatable", "translators"]

_CHUNK_ELEMENTS = {"cpu": 32_768}
_CHUNK_ELEMENTS_ELSEWHERE = 4_194_304
"""Terms x samples evaluated at once. On the CPU temporaries stay in the cache (measured: 2 times
faster than large chunks); other devices want large batches, bounded by memory."""


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
        chunks = self._in_chunks(x, lambda chunk: self.energies(chunk).sum(dim=0))
        return torch.cat(chunks) if chunks else x.new_zeros(0, dtype=torch.float64)

    def energies(self, x: Tensor) -> Tensor:
        """Energies of the single forces: x (B, M, 3) nm -> (number of forces, B) kJ/mol."""
        self.to(x.device)
        coordinates = x.to(torch.float64).permute(2, 1, 0).contiguous()
        rows = [term(coordinates) for term in self.terms]
        return torch.stack(rows) if rows else coordinates.new_zeros(0, x.shape[0])

    def energy_and_force(self, x: Tensor) -> tuple[Tensor, Tensor]:
        """x (B, M, 3) nm -> energies (B,) kJ/mol and forces (B, M, 3) kJ/mol/nm, both detached."""

        def work(chunk: Tensor) -> tuple[Tensor, Tensor]:
            with differentiation():
                leaf = leaf_of(chunk)
                energy = self.energies(leaf).sum(dim=0)
                (gradient,) = gradients(energy, [leaf], again=False, keep=False)
            return energy.detach(), -gradient

        chunks = self._in_chunks(x.detach(), work)
        if not chunks:
            return x.new_zeros(0, dtype=torch.float64), x.detach().to(torch.float64)
        energies, forces = zip(*chunks, strict=True)
        return torch.cat(energies), torch.cat(forces)

    def derivatives(self, x: Tensor) -> tuple[Tensor, Tensor]:
        """x (B, M, 3) nm -> gradient (B, M, 3), kJ/mol/nm, and Hessian (B, M, 3, M, 3), per nm^2.

        Both detached; term by term (:mod:`openmm_vtdis.targets.openmm.term_hessians`).
        """

        def work(chunk: Tensor) -> tuple[Tensor, Tensor]:
            coordinates = chunk.permute(2, 1, 0).contiguous()
            total = TermHessians(coordinates)
            for term in self.terms:
                cast(Term, term).add_derivatives(coordinates, total)
            return total.matrices()

        with differentiation():
            chunks = self._in_chunks(leaf_of(x).detach(), work)
        if not chunks:
            m = x.shape[1]
            empty = x.new_zeros(0, m, 3, dtype=torch.float64)
            return empty, empty.new_zeros(0, m, 3, m, 3)
        slopes, hessians = zip(*chunks, strict=True)
        return torch.cat(slopes), torch.cat(hessians)

    def _in_chunks(self, x: Tensor, work: Callable[[Tensor], T]) -> list[T]:
        """Apply ``work`` to all of x in chunks, which shrink if a GPU's memory is not enough."""
        self.to(x.device)
        elements = _CHUNK_ELEMENTS.get(x.device.type, _CHUNK_ELEMENTS_ELSEWHERE)
        size, start = max(1, elements // self._n_terms), 0
        done: list[T] = []
        while start < len(x):
            try:
                done.append(work(x[start : start + size]))
                start += size
                continue
            except torch.cuda.OutOfMemoryError:
                if size == 1:
                    raise
            size = max(1, min(size, len(x)) // 2)
            torch.cuda.empty_cache()
        return done


def pad(x: Tensor) -> Tensor:
    """Positions in the plane to OpenMM's three dimensions, z = 0: (B, M, 2 or 3) -> (B, M, 3)."""
    return x if x.shape[-1] == 3 else torch.nn.functional.pad(x, (0, 3 - x.shape[-1]))
