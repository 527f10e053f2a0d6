r"""Cartesian coordinates in units of a length, with mirror images folded onto each other.

A model works in units of ``length`` nm, in which its training data have unit variance per degree
of freedom: x = length z and log det dx/dz = d log(length).

Mirror images. A network that treats z and -z alike gives both the same density. With a handedness,
x(z) is that of the two which has it, so that p_x(x) is the sum of two equal terms: log 2 goes off
the log-determinant. The energy that the model sees is that of x(z), the same for both.
"""

from __future__ import annotations

import dataclasses
import math
from dataclasses import dataclass
from typing import Any, ClassVar

import torch
from torch import Tensor

from openmm_vtdis.coordinates.base import COORDINATES, Configurations, Coordinates
from openmm_vtdis.core import checks
from openmm_vtdis.core.space import Space
from openmm_vtdis.targets.base import Target
from openmm_vtdis.topology import Handedness


@COORDINATES.register
@dataclass(frozen=True)
class Cartesian(Coordinates):
    """x = length z, or its mirror image.

    Attributes
    ----------
    space
        The space of the configurations, and of z.
    length
        Unit in nm, positive.
    handedness
        Handedness that mirror images are folded onto; None: nothing is folded.
    """

    kind: ClassVar[str] = "cartesian"

    space: Space
    length: float = 1.0
    handedness: Handedness | None = None

    def __post_init__(self) -> None:
        object.__setattr__(self, "length", checks.positive_number("length", self.length))

    @classmethod
    def of(cls, space: Space, x: Tensor, handedness: Handedness | None = None) -> Cartesian:
        """Make coordinates with unit variance per degree of freedom over frames (n, M, D) in nm.

        Raises
        ------
        ValueError
            If they do not spread.
        """
        square = float(x.square().sum(dim=(1, 2)).mean()) / space.dim
        length = float(f"{math.sqrt(square):.6g}")  # the same whatever order a sum is taken in
        if length == 0.0:
            raise ValueError("train: expected frames that spread, got particles in one point")
        return cls(space, length, handedness)

    @property
    def log_det(self) -> float:
        """log det dx/dz, the same for all configurations."""
        folded = 0.0 if self.handedness is None else math.log(2.0)
        return self.space.dim * math.log(self.length) - folded

    def to_model(self, x: Tensor) -> tuple[Tensor, Tensor]:
        """x / length, without a fold: x has the handedness."""
        return x / self.length, x.new_full((len(x),), self.log_det)

    def to_configurations(self, z: Tensor) -> Configurations:
        x = z * self.length
        log_det = z.new_full((len(z),), self.log_det)
        if self.handedness is None:
            return Configurations(x, log_det, torch.ones_like(log_det, dtype=torch.bool))
        inside = self.handedness.agreement(x) != 0
        return Configurations(self.handedness.canonical(x), log_det, inside)

    def pull_back(self, z: Tensor, gradient: Tensor) -> Tensor:
        return self.length * self._turned(z, gradient)

    def push_forward(self, z: Tensor, gradient: Tensor) -> Tensor:
        return self._turned(z, gradient) / self.length

    def noise_level(self, sigma: float) -> float:
        return sigma / self.length

    def derivatives(self, target: Target, z: Tensor) -> tuple[Tensor, Tensor]:
        """Derivatives in z from those of the target; the Hessian is even under z -> -z."""
        gradient, hessian = target.derivatives(self.to_configurations(z).x)
        return self.pull_back(z, gradient), self.length**2 * hessian

    def restricted_to(self, handedness: Handedness | None) -> Cartesian:
        return dataclasses.replace(self, handedness=handedness)

    def describe(self) -> dict[str, Any]:
        return {"length": self.length}

    @classmethod
    def rebuild(
        cls, description: dict[str, Any], space: Space, handedness: Handedness | None
    ) -> Cartesian:
        return cls(space, description["length"], handedness)

    def _turned(self, z: Tensor, gradient: Tensor) -> Tensor:
        """Gradients with their sign flipped where x(z) is a mirror image."""
        if self.handedness is None:
            return gradient
        mirrored = (self.handedness.canonical(z) * z).sum(dim=(1, 2)) < 0.0
        return torch.where(mirrored[:, None, None], -gradient, gradient)
