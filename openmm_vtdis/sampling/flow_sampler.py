"""Weighted samples by the probability-flow ODE: the costly baseline."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from openmm_vtdis.coordinates import Coordinates
from openmm_vtdis.core import checks
from openmm_vtdis.diffusion.denoiser import Denoiser
from openmm_vtdis.diffusion.flow import DIVERGENCES, SOLVERS, ode_paths
from openmm_vtdis.diffusion.schedule import Schedule
from openmm_vtdis.sampling.base import Drawn, Sampler
from openmm_vtdis.targets import Target


@dataclass(frozen=True)
class FlowSampler(Sampler):
    """Sampler of the flow. Its weights are off by the solver's error, which no diagnostic sees.

    Attributes
    ----------
    denoiser, schedule
        The denoiser that defines the flow, and the noise levels of the fixed-step solver.
    target, coordinates
        See :class:`~openmm_vtdis.sampling.base.Sampler`.
    divergence
        "exact" (d products with the Jacobian a step) or "hutchinson" (one; biased weights).
    solver
        "heun" or "rk4".
    """

    denoiser: Denoiser
    schedule: Schedule
    target: Target
    coordinates: Coordinates
    divergence: str = "exact"
    solver: str = "heun"

    def __post_init__(self) -> None:
        checks.choice("divergence", self.divergence, DIVERGENCES)
        checks.choice("solver", self.solver, SOLVERS)

    @property
    def n_steps(self) -> int:
        return self.schedule.n_steps

    def draw(self, n: int, rng: torch.Generator, batch_size: int, progress: bool) -> Drawn:
        z, log_p = ode_paths(
            self.denoiser, self.schedule, rng, n=n, divergence=self.divergence,
            solver=self.solver, batch_size=batch_size, progress=progress,
        )  # fmt: skip
        return Drawn(z, -log_p)

    def log_ratios(
        self, z: Tensor, rng: torch.Generator, batch_size: int, progress: bool
    ) -> Tensor:
        _, log_p = ode_paths(
            self.denoiser, self.schedule, rng, x_0=z, divergence=self.divergence,
            solver=self.solver, batch_size=batch_size, progress=progress,
        )  # fmt: skip
        return -log_p

    def describe(self) -> dict[str, Any]:
        return {
            "method": "probability-flow ODE",
            "times": list(self.schedule.times),
            "divergence": self.divergence,
            "solver": self.solver,
        }

    def _identity(self) -> Any:
        """The density depends on the ends of the grid, and not on the solver but for its error."""
        ends = (self.schedule.times[0], self.schedule.times[-1])
        return "probability-flow ODE", ends, self.denoiser
