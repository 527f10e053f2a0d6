"""Targets: reduced energies u(x) = U(x) / kT, the unnormalised densities exp(-u) to sample.

A :class:`Target` is little more than a function from batches of configurations to energies. It
knows the space its configurations live in, and nothing about how they are sampled.
"""

from __future__ import annotations

import abc

import torch
from torch import Tensor

from openmm_vtdis.core.derivatives import differentiate_twice, differentiation, gradients, leaf_of
from openmm_vtdis.core.space import Space
from openmm_vtdis.targets.binding import warn_if_unbound


class Target(abc.ABC):
    """An unnormalised density exp(-u(x)) on a space of configurations.

    Attributes
    ----------
    space
        Where x lives: M particles in D dimensions, centred or not.
    temperature
        In kelvin, or None for a density without one.
    """

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
        """What tells its Hamiltonian from others, whatever the temperature; None: nothing does."""
        return None

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
        self._check_shape(x)
        return differentiate_twice(self.reduced_energy, x)

    def check_bound(self) -> None:
        """Warn if the energy does not hold a configuration together that is blown up."""
        warn_if_unbound(self.reduced_energy, self.space)

    def _check_shape(self, x: Tensor) -> None:
        expected = (self.space.n_particles, self.space.n_dims)
        if not isinstance(x, Tensor):
            raise TypeError(f"x: expected a torch tensor of positions, got {type(x).__name__}")
        if x.ndim != 3 or tuple(x.shape[1:]) != expected:
            raise ValueError(
                f"x: expected positions of shape (B, {expected[0]}, {expected[1]}) in nm, "
                f"got {tuple(x.shape)}"
            )


def check_is_target(target: object) -> None:
    """Raise ValueError for anything but a Target that knows its space; check that it is bound."""
    if not isinstance(target, Target) or not isinstance(getattr(target, "space", None), Space):
        what = "one without" if isinstance(target, Target) else type(target).__name__
        raise ValueError(
            "target: expected a Target with a space, such as a subclass that sets "
            f"self.space = Space(n_particles, n_dims), got {what}"
        )
    target.check_bound()


_SPREAD, _SINGLE = 1e-5, 3e-7


def same_energy(energies: Tensor, unit: float = 1.0) -> Tensor:
    """How much energies (..., n), in a unit of which kT has ``unit``, may differ and be the same.

    By how far they lie apart, not by their size, which may be that of all electrons: only what
    single precision resolves goes by that.
    """
    known = torch.where(torch.isfinite(energies), energies, torch.nan)
    middle = known.nanmedian(dim=-1, keepdim=True).values.nan_to_num()
    return _SPREAD * ((energies - middle).abs() + unit) + _SINGLE * energies.abs()
