"""The target as a model sees it: minus the log density of model coordinates."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Protocol, runtime_checkable

from torch import Tensor

from openmm_vtdis.coordinates.base import Coordinates
from openmm_vtdis.core.derivatives import differentiate_twice, gradients_at
from openmm_vtdis.targets.base import Target


@runtime_checkable
class Energy(Protocol):
    """Minus the log density up to a constant, in model coordinates, with its derivatives."""

    def __call__(self, z: Tensor) -> Tensor:
        """(B, M, D) -> (B,) float64."""
        ...

    def gradient(self, z: Tensor) -> Tensor:
        """(B, M, D), detached."""
        ...

    def derivatives(self, z: Tensor) -> tuple[Tensor, Tensor]:
        """Gradient (B, M, D) and Hessian (B, M, D, M, D), detached."""
        ...


@dataclass(frozen=True)
class ModelEnergy:
    """u(x(z)) - log det dx/dz: minus the log density of model coordinates z, up to log Z.

    Attributes
    ----------
    target
        The target, in nm and kT.
    coordinates
        The map between nm and z.
    """

    target: Target
    coordinates: Coordinates

    def __call__(self, z: Tensor) -> Tensor:
        """(B, M, D) -> (B,), on z's device."""
        found = self.coordinates.to_configurations(z)
        return self.target.reduced_energy(found.x) - found.log_det

    def gradient(self, z: Tensor) -> Tensor:
        """(B, M, D), on z's device, detached."""
        x = self.coordinates.to_configurations(z).x
        return self.coordinates.pull_back(z, -self.target.reduced_energy_and_force(x)[1])

    def derivatives(self, z: Tensor) -> tuple[Tensor, Tensor]:
        """Gradient (B, M, D) and Hessian (B, M, D, M, D), on z's device, detached."""
        return self.coordinates.derivatives(self.target, z)


@dataclass(frozen=True)
class TorchEnergy:
    """An energy that is a function of torch operations, differentiated by torch.

    Attributes
    ----------
    function
        (B, M, D) -> (B,).
    """

    function: Callable[[Tensor], Tensor]

    def __call__(self, z: Tensor) -> Tensor:
        """(B, M, D) -> (B,)."""
        return self.function(z)

    def gradient(self, z: Tensor) -> Tensor:
        """(B, M, D)."""
        return gradients_at(self.function, z)

    def derivatives(self, z: Tensor) -> tuple[Tensor, Tensor]:
        """Gradient (B, M, D) and Hessian (B, M, D, M, D)."""
        return differentiate_twice(self.function, z)


def as_energy(energy: Energy | Callable[[Tensor], Tensor]) -> Energy:
    """Return an energy as it is; wrap a function (B, M, D) -> (B,)."""
    return energy if isinstance(energy, Energy) else TorchEnergy(energy)
