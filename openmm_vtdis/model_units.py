r"""A target in the units of a model: where the Jacobian, and the folding of mirror images, stand.

A model works in units of ``length`` nm, in which its training data have unit variance per degree
of freedom. With x in nm and y = x / length, a trajectory that ends in y has

    log w = -u(x) + log ratio(y, ...) + d log(length)      [- log 2 if mirror images are folded],

so that weights are those of densities in nm, whatever the model's unit.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from openmm_vtdis.core.space import Space
from openmm_vtdis.diffusion.schedule import default_range
from openmm_vtdis.ensemble import FrameLogWeights, WeightedEnsemble
from openmm_vtdis.targets import Target, energies_of
from openmm_vtdis.topology import Handedness


@dataclass(frozen=True)
class ModelUnits:
    """A target as a model sees it.

    Attributes
    ----------
    target
        In nm and kT.
    length
        The model's length unit in nm.
    handedness
        Of the stereoisomer that the target is restricted to; None: no restriction.
    """

    target: Target
    length: float
    handedness: Handedness | None = None

    @property
    def log_jacobian(self) -> float:
        """What turns log densities in model units into those in nm, folded if need be."""
        folded = 0.0 if self.handedness is None else math.log(2.0)
        return self.target.space.dim * math.log(self.length) - folded

    @property
    def energy(self) -> ModelEnergy:
        """Minus the log density in model units, a function with derivatives."""
        return ModelEnergy(self)

    def default_range(
        self, y: Tensor, t_min: float | None = None, t_max: float | None = None
    ) -> tuple[float, float]:
        """Ends of a grid for frames y (n, M, D), from the forces on them; a given one stays."""
        space = self.target.space
        some = y[:: max(1, len(y) // 512)] * self.length
        force = self.target.reduced_energy_and_force(some)[1] * self.length
        moments = space.reduce(force).pow(4).mean(dim=0)
        if space.centred:  # averaged over rotations
            gram = torch.einsum("bia,bja->ij", y, y) / (len(y) * space.n_dims)
            spread, mean_square = space.n_dims * float(gram.square().sum()), 0.0
        else:
            around = (y - y.mean(dim=0)).flatten(1)
            spread = float((around.mT @ around / len(y)).square().sum())
            noise = float(y.var(dim=0).sum()) / len(y)
            mean_square = max(float(y.mean(dim=0).square().sum()) - noise, 0.0)
        low, high = default_range(spread, moments, mean_square)
        return low if t_min is None else t_min, high if t_max is None else t_max

    def log_weights(self, energies: Tensor, log_ratio: Tensor) -> Tensor:
        """log w from u(x) (n,) and the log ratio (n,); -inf where an energy is NaN or infinite."""
        log_w = -energies + log_ratio + self.log_jacobian
        return torch.where(torch.isfinite(energies) & torch.isfinite(log_w), log_w, -math.inf)

    def frame_log_weights(self, x: Tensor, log_ratio: Tensor, proposal: str) -> FrameLogWeights:
        """Those of target configurations x (n, M, D) in nm, against a proposal."""
        log_w = self.log_weights(energies_of(self.target, x).cpu(), log_ratio.cpu())
        return FrameLogWeights(log_w.numpy(), proposal)

    def ensemble(
        self, y: Tensor, log_ratio: Tensor, topology: Any, metadata: dict[str, Any]
    ) -> WeightedEnsemble:
        """Generated configurations y (n, M, D), folded and weighed.

        Where the log ratio is not finite, the network has failed: there is no configuration then.
        """
        x = torch.where(torch.isfinite(log_ratio)[:, None, None], y * self.length, math.nan)
        inside = torch.ones(len(x), dtype=torch.bool, device=x.device)
        if self.handedness is not None:
            x, inside = self.handedness.fold(x)
        energies = energies_of(self.target, x)
        log_w = torch.where(inside, self.log_weights(energies, log_ratio), -math.inf)
        return WeightedEnsemble(
            x.cpu().numpy(),
            log_w.cpu().numpy(),
            energies.cpu().numpy(),
            temperature=self.target.temperature,
            topology=topology,
            metadata=metadata,
        )


@dataclass(frozen=True)
class ModelEnergy:
    """Minus the log density in model units, up to log Z.

    With a handedness, that of the configuration or its mirror image, whichever has it: a kernel
    that uses this energy treats both alike, as the folding of samples needs.

    Attributes
    ----------
    units
        Whose it is.
    """

    units: ModelUnits

    def __call__(self, y: Tensor) -> Tensor:
        """(B, M, D) -> (B,), on y's device."""
        return self.units.target.reduced_energy(self._folded(y)) - self.units.log_jacobian

    def derivatives(self, y: Tensor) -> tuple[Tensor, Tensor]:
        """Gradient (B, M, D) and Hessian (B, M, D, M, D), on y's device, detached."""
        x, length = self._folded(y), self.units.length
        gradient, hessian = self.units.target.derivatives(x)
        if self.units.handedness is not None:  # mirrored by x -> -x, which has an even Hessian
            mirrored = (x * y).sum(dim=(1, 2)) < 0.0
            gradient = torch.where(mirrored[:, None, None], -gradient, gradient)
        return length * gradient, length**2 * hessian

    def _folded(self, y: Tensor) -> Tensor:
        """In nm, with the handedness."""
        x = y * self.units.length
        handedness = self.units.handedness
        return x if handedness is None else handedness.canonical(x)


def data_length(space: Space, x: Tensor) -> float:
    """The length in nm in whose unit frames (n, M, D) have unit variance per degree of freedom."""
    square = float(x.square().sum(dim=(1, 2)).mean()) / space.dim
    length = float(f"{math.sqrt(square):.6g}")  # the same whatever order a sum is taken in
    if length == 0.0:
        raise ValueError("train: expected frames that spread, got particles in one point")
    return length
