"""Weighted samples by the reverse diffusion, with exact trajectory weights (paper, Eq. 16, 17)."""

from __future__ import annotations

import dataclasses
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from openmm_vtdis.coordinates import Coordinates
from openmm_vtdis.diffusion.paths import forward_paths, reverse_paths
from openmm_vtdis.diffusion.process import DiffusionProcess
from openmm_vtdis.sampling.base import Drawn, Sampler
from openmm_vtdis.targets import Target


@dataclass(frozen=True)
class PathSampler(Sampler):
    """Sampler of whole paths: the reverse process draws, and both processes weigh each step.

    Attributes
    ----------
    process
        A tuned diffusion process.
    target, coordinates
        See :class:`~openmm_vtdis.sampling.base.Sampler`.
    """

    process: DiffusionProcess
    target: Target
    coordinates: Coordinates

    @property
    def n_steps(self) -> int:
        return self.process.n_steps

    @property
    def device(self) -> torch.device:
        """Device of the network; the CPU for a denoiser without weights."""
        denoiser = self.process.denoiser
        weights = denoiser.parameters() if isinstance(denoiser, torch.nn.Module) else iter(())
        first = next(weights, None)
        return torch.device("cpu") if first is None else first.device

    def with_n_steps(self, n_steps: int) -> PathSampler:
        """The same sampler with another number of steps.

        See :meth:`~openmm_vtdis.diffusion.process.DiffusionProcess.with_n_steps`.
        """
        return dataclasses.replace(self, process=self.process.with_n_steps(n_steps))

    def draw(self, n: int, rng: torch.Generator, batch_size: int, progress: bool) -> Drawn:
        paths = reverse_paths(self.process, n, rng, batch_size, progress)
        return Drawn(paths.x, paths.log_ratio)

    def log_ratios(
        self, z: Tensor, rng: torch.Generator, batch_size: int, progress: bool
    ) -> Tensor:
        return forward_paths(self.process, z, rng, None, batch_size, progress).log_ratio

    def describe(self) -> dict[str, Any]:
        return {"method": "reverse SDE", **self.process.describe()}

    def _identity(self) -> Any:
        process = self.process
        fitted = (process.covariance.parameters, process.coefficients)
        return self.describe(), process.denoiser, fitted
