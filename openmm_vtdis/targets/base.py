"""Targets: reduced energies u(x) = U(x) / kT, the unnormalised densities exp(-u) to sample.

A :class:`Target` is little more than a function from batches of configurations to energies. It
knows the space its configurations live in, and nothing about how they are sampled.
"""

from __future__ import annotations

import abc
from dataclasses import dataclass, field
from typing import Any, ClassVar, Self

import torch
from openmm import app
from torch import Tensor

from openmm_vtdis.core import checks
from openmm_vtdis.core.derivatives import differentiate_twice, differentiation, gradients, leaf_of
from openmm_vtdis.core.registry import Registry
from openmm_vtdis.core.space import Space
from openmm_vtdis.targets.binding import warn_if_unbound

_SPREAD, _SINGLE = 1e-5, 3e-7
_SAME_CODE = 1e-4
"""Difference in kT between machines, beyond rounding: models may run in single precision."""


@dataclass(frozen=True)
class Description:
    """Description of a target, as an archive stores it.

    Attributes
    ----------
    settings
        JSON-able settings.
    tensors
        Tensors by name; an archive adds a prefix to the names.
    """

    settings: dict[str, Any]
    tensors: dict[str, Tensor] = field(default_factory=dict)


@dataclass(frozen=True)
class Rebuilding:
    """Options for rebuilding a target from an archive.

    Attributes
    ----------
    allow_pickle
        Whether the file is trusted: to be unpickled, or to name code that is run.
    backend, n_threads
        Evaluation of the energies of a System.
    """

    allow_pickle: bool = False
    backend: str = "auto"
    n_threads: int | None = None


class Target(abc.ABC):
    """An unnormalised density exp(-u(x)) on a space of configurations.

    Attributes
    ----------
    space
        Space of x: M particles in D dimensions, centred or not.
    temperature
        Temperature in kelvin, or None for a density without one.
    """

    kind: ClassVar[str | None] = None
    """Name under which archives store the class; None: they cannot."""
    runs_user_code: bool = False
    """Whether its energies come from code that an archive does not hold."""

    alike: ClassVar[bool] = False
    """Whether particles without a topology are identical, which the target has checked."""

    space: Space
    temperature: float | None = None

    @abc.abstractmethod
    def reduced_energy(self, x: Tensor) -> Tensor:
        """Energies in kT: x (B, M, D) in nm -> (B,), float64, on x's device.

        A configuration with NaN or infinite coordinates has energy NaN, and does not disturb the
        others.
        """

    @property
    def fingerprint(self) -> str | None:
        """Fingerprint of the Hamiltonian, whatever the temperature; None: it has none."""
        return None

    @property
    def topology(self) -> app.Topology | None:
        """Topology of the particles; None: they are all alike, or there is none."""
        return None

    @property
    def probes(self) -> Tensor | None:
        """Configurations (S, M, D), nm, whose energies show whether the user's code has changed."""
        return None

    def describe(self) -> Description:
        """Describe the target for an archive, from which :meth:`rebuild` makes it again.

        Raises
        ------
        ValueError
            If it cannot be described.
        """
        raise ValueError(f"save: expected describe() of {type(self).__name__}, got none")

    @classmethod
    def rebuild(cls, description: Description, how: Rebuilding) -> Self:
        """Make the target of a description.

        Raises
        ------
        ValueError
            If it is not trusted and would run code, or its energies are others now.
        KeyError, TypeError
            If it is not complete.
        """
        raise ValueError(f"expected a target that archives know, got {cls.__name__}")

    @property
    def twice_differentiable(self) -> bool:
        """Whether :meth:`reduced_energy` has second derivatives, as torch operations do."""
        return True

    def reduced_energy_and_force(self, x: Tensor) -> tuple[Tensor, Tensor]:
        """Energies (B,) in kT and forces -du/dx (B, M, D) in kT/nm; both float64 and detached.

        This default differentiates :meth:`reduced_energy`, which must be made of torch operations.
        """
        with differentiation():
            leaf = leaf_of(x.clone())  # which a target of the user's may write to
            energy = self.reduced_energy(leaf)
            if not isinstance(energy, Tensor) or not energy.requires_grad:
                raise ValueError(
                    f"reduced_energy: expected a torch tensor that can be differentiated, got "
                    f"{'a detached one' if isinstance(energy, Tensor) else type(energy).__name__}"
                    " from " + type(self).__name__ + "; make it of torch operations, or override "
                    "reduced_energy_and_force"
                )
            (gradient,) = gradients(energy, [leaf], again=False, keep=False)
        return energy.detach(), -gradient

    def derivatives(self, x: Tensor) -> tuple[Tensor, Tensor]:
        """Gradient (B, M, D) in kT/nm and Hessian (B, M, D, M, D) in kT/nm^2 of the energy at x.

        Both float64, detached and on x's device. This default differentiates
        :meth:`reduced_energy` once for every coordinate.

        Raises
        ------
        ValueError
            If the energy cannot be differentiated twice.
        """
        checks.shape(x, self.space.n_particles, self.space.n_dims)
        return differentiate_twice(self.reduced_energy, x)

    def check_bound(self) -> None:
        """Warn if the energy does not hold an enlarged configuration together."""
        warn_if_unbound(self.reduced_energy, self.space)


TARGETS: Registry[Target] = Registry("targets")
"""Targets by their kind; others register with it, or by an entry point."""


def check_is_target(target: object) -> None:
    """Raise ValueError for anything but a Target that knows its space; check that it is bound."""
    if not isinstance(target, Target) or not isinstance(getattr(target, "space", None), Space):
        what = "one without" if isinstance(target, Target) else type(target).__name__
        raise ValueError(
            "target: expected a Target with a space, such as a subclass that sets "
            f"self.space = Space(n_particles, n_dims), got {what}"
        )
    target.check_bound()


def same_energy(energies: Tensor, unit: float = 1.0) -> Tensor:
    """Tolerance within which energies (..., n) count as the same; ``unit`` is kT in their unit.

    It follows from how far the energies lie apart, not from their size, which may be that of all
    electrons: only the resolution of single precision goes by that.
    """
    known = torch.where(torch.isfinite(energies), energies, torch.nan)
    middle = known.nanmedian(dim=-1, keepdim=True).values.nan_to_num()
    return _SPREAD * ((energies - middle).abs() + unit) + _SINGLE * energies.abs()


def check_same_code(what: str, energies: Tensor, now: Tensor) -> None:
    """Check that energies (S,) of probes in kT are what they were when a target was stored.

    Raises
    ------
    ValueError
        If they are others now: the code called ``what`` has changed.
    """
    known = torch.isfinite(energies) & torch.isfinite(now)
    change = torch.where(known, now - energies, 0.0).abs()
    if bool((change > _SAME_CODE + 10.0 * same_energy(energies)).any()):
        raise ValueError(
            f"expected the energies that {what} had when it was stored, got some that differ by up "
            f"to {float(change.max()):.3g} kT; the code that computes them has changed"
        )
