r"""Coordinates: a bijection between configurations x in nm and the coordinates z that a model
diffuses.

With p_z the density of z and det dx/dz the volume of x for a unit of that of z,

    p_x(x) = p_z(z(x)) / det dx/dz,

so that a trajectory that ends in z has the log weight

    log w = -u(x(z)) + log ratio(z, ...) + log det dx/dz.

Weights are those of densities in nm, whatever a model's coordinates are. The space of z may have
another dimension than that of x where some of the latter do not move.
"""

from __future__ import annotations

import abc
from dataclasses import dataclass
from typing import Any, ClassVar, Self

from torch import Tensor

from openmm_vtdis.core.derivatives import differentiate_twice
from openmm_vtdis.core.registry import Registry
from openmm_vtdis.core.rng import make_rng
from openmm_vtdis.core.space import Space
from openmm_vtdis.targets.base import Target
from openmm_vtdis.topology import Handedness


@dataclass(frozen=True)
class Configurations:
    """Configurations that model coordinates stand for.

    Attributes
    ----------
    x
        (B, M, D) in nm, float64.
    log_det
        (B,) log det dx/dz, float64; less log 2 where two z give one x.
    inside
        (B,) bool: whether x is in the domain of the target. Others have no weight.
    """

    x: Tensor
    log_det: Tensor
    inside: Tensor


class Coordinates(abc.ABC):
    """A bijection nm <-> model coordinates.

    Attributes
    ----------
    kind
        Name under which archives store the class.
    space
        Where model coordinates z live.
    handedness
        Handedness that configurations are restricted to; None: no restriction.
    """

    kind: ClassVar[str]
    space: Space
    handedness: Handedness | None

    @abc.abstractmethod
    def to_model(self, x: Tensor) -> tuple[Tensor, Tensor]:
        """Model coordinates (B, ...) of configurations (B, M, D) in nm, and log det dx/dz (B,)."""

    @abc.abstractmethod
    def to_configurations(self, z: Tensor) -> Configurations:
        """Configurations of model coordinates (B, ...); differentiable in z."""

    @abc.abstractmethod
    def pull_back(self, z: Tensor, gradient: Tensor) -> Tensor:
        """Gradient in z of u(x(z)) - log det dx/dz, from that of u in nm: both (B, ...)."""

    @abc.abstractmethod
    def push_forward(self, z: Tensor, gradient: Tensor) -> Tensor:
        """Gradient in nm of a log density of x, from that of the density of z: both (B, ...)."""

    @abc.abstractmethod
    def noise_level(self, sigma: float) -> float:
        """The noise level of the model that stands for Gaussian noise of ``sigma`` nm on x.

        Raises
        ------
        ValueError
            If there is none, since such noise is not Gaussian in z.
        """

    @abc.abstractmethod
    def restricted_to(self, handedness: Handedness | None) -> Self:
        """The same coordinates for one stereoisomer, or all of them."""

    @abc.abstractmethod
    def describe(self) -> dict[str, Any]:
        """Describe everything but the handedness as JSON, for :meth:`rebuild`."""

    @classmethod
    @abc.abstractmethod
    def rebuild(
        cls, description: dict[str, Any], space: Space, handedness: Handedness | None
    ) -> Coordinates:
        """Make the coordinates of configurations on a space from a description.

        Raises
        ------
        ValueError, KeyError, TypeError
            If the description is not complete.
        """

    def derivatives(self, target: Target, z: Tensor) -> tuple[Tensor, Tensor]:
        """Gradient and Hessian in z of u(x(z)) - log det dx/dz, detached: (B, M, D), (B, M, D, M,
        D).

        Raises
        ------
        ValueError
            If the target's energy cannot be differentiated twice.
        """

        def energy(z: Tensor) -> Tensor:
            found = self.to_configurations(z)
            return target.reduced_energy(found.x) - found.log_det

        return differentiate_twice(energy, z)


def check_coordinates_of(coordinates: object, space: Space) -> None:
    """Check that an object is coordinates of the configurations of a space.

    Raises
    ------
    ValueError
        If it is something else, or coordinates of other configurations.
    """
    if not isinstance(coordinates, Coordinates):
        raise ValueError(
            f"coordinates: expected an object such as Cartesian(space), got {coordinates!r}"
        )
    x = coordinates.to_configurations(coordinates.space.standard_normal(1, make_rng(0))).x
    if tuple(x.shape[1:]) != (space.n_particles, space.n_dims):
        raise ValueError(
            f"coordinates: expected those of {space.n_particles} particles in {space.n_dims} "
            f"dimensions, got some of {tuple(x.shape[1:])}"
        )


COORDINATES: Registry[Coordinates] = Registry("coordinates")
"""Coordinates by their kind; others register with it, or by an entry point."""
