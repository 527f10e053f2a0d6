r"""Forward and reverse Gaussian kernels of the diffusion::

    forward     q(x_n | x_{n-1}) = N_x(x_{n-1}, (t_n^2 - t_{n-1}^2) I)                 (Eq. 18)
    prior       p(x_N)           = N_x(0, T^2 I)
    reverse     p(x_{n-1} | x_n) = N_x(mu_n, Sigma_n(x_n))                             (Eq. 19)
                mu_n = x_n + k_n (D(x_n, t_n) - x_n),   k_n = 1 - r_n unless tuned
                r_n  = t_{n-1}^2 / t_n^2,   v_n = t_{n-1}^2 (1 - r_n)                   (Eq. 20, 21)

Eq. 20 is printed with r inverted. Sigma_n is a
:class:`~openmm_vtdis.diffusion.covariance.Covariance` in units of v_n; Sigma_n = v_n I is the DDPM
kernel. At low noise D may be improved by the energy
(:mod:`~openmm_vtdis.diffusion.posteriors.laplace`). All in model units, where the data have unit
variance per degree of freedom.
"""

from __future__ import annotations

import dataclasses
import itertools
from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from openmm_vtdis.core import checks
from openmm_vtdis.core.space import Space
from openmm_vtdis.diffusion.covariance import Covariance, Energy, Isotropic, Posterior, ReverseStep
from openmm_vtdis.diffusion.denoiser import Denoiser
from openmm_vtdis.diffusion.posteriors.laplace import LaplaceRange, laplace_posterior
from openmm_vtdis.diffusion.recording import recorded
from openmm_vtdis.diffusion.schedule import Schedule


@dataclass(frozen=True)
class DiffusionKernel:
    """Everything that defines q and p: denoiser, grid, covariance and mean coefficients.

    Attributes
    ----------
    denoiser
        D(x, t) on :attr:`space`.
    schedule
        Noise levels t_0..t_N.
    covariance
        Family of reverse covariances, fitted for this schedule (DDPM: ``Isotropic.ddpm``).
    gains
        (N,) mean coefficients k_n, or None for 1 - r_n.
    energy
        Of the target in model units, for covariances that use it.
    laplace
        Where the Laplace approximation of the posterior stands in for the denoiser; None: nowhere.
    """

    denoiser: Denoiser
    schedule: Schedule
    covariance: Covariance
    gains: Tensor | None = None
    energy: Energy | None = None
    laplace: LaplaceRange | None = None

    def __post_init__(self) -> None:
        if self.laplace is not None and self.energy is None:
            raise ValueError("laplace: expected a kernel that knows the energy, got one without")
        if self.gains is not None and tuple(self.gains.shape) != (self.schedule.n_steps,):
            raise ValueError(
                f"gains: expected shape ({self.schedule.n_steps},), got {tuple(self.gains.shape)}"
            )
        if self.covariance.space != self.denoiser.space:
            raise ValueError(
                f"covariance: expected one on the denoiser's space, {self.denoiser.space}, got one "
                f"on {self.covariance.space}"
            )
        self.covariance.check_schedule(self.schedule)

    def __repr__(self) -> str:
        return f"{type(self).__name__}({self.covariance.kind!r}, {self.schedule.n_steps} steps)"

    @classmethod
    def ddpm(
        cls, denoiser: Denoiser, schedule: Schedule, energy: Energy | None = None
    ) -> DiffusionKernel:
        """The untuned kernel, Sigma_n = v_n I."""
        return cls(denoiser, schedule, Isotropic.ddpm(denoiser.space, schedule), energy=energy)

    def with_covariance(self, covariance: Covariance) -> DiffusionKernel:
        """The same kernel with another covariance."""
        return dataclasses.replace(self, covariance=covariance)

    def with_gains(self, gains: Tensor) -> DiffusionKernel:
        """The same kernel with other mean coefficients k_n, shape (N,)."""
        return dataclasses.replace(self, gains=gains)

    def with_schedule(self, schedule: Schedule) -> DiffusionKernel:
        """The same kernel, not tuned yet, on another grid of any number of steps."""
        return DiffusionKernel.ddpm(self.denoiser, schedule, self.energy)

    def resampled(self, n_steps: int) -> DiffusionKernel:
        """The same kernel on a grid of another number of steps, see :meth:`Schedule.resampled`.

        Raises
        ------
        ValueError
            If the covariance was fitted step by step and does not transfer ("block", "full",
            "low-rank").
        """
        old = self.schedule
        if n_steps == old.n_steps:
            return self
        new = old.resampled(n_steps, self.jumps)
        gains = None
        if self.gains is not None:
            gains = (1.0 - new.ratios) * old.carried(self.gains / (1.0 - old.ratios), new)
        covariance = self.covariance.resampled(old, new)
        return dataclasses.replace(self, schedule=new, covariance=covariance, gains=gains)

    def with_laplace(self, found: LaplaceRange, jump: bool = True) -> DiffusionKernel:
        """The same kernel with the Laplace approximation, and the jump in its grid if asked."""
        if not jump:
            return dataclasses.replace(self, laplace=LaplaceRange(found.level))
        schedule = self.schedule.jumping(found.jump)
        if schedule is self.schedule:
            found = LaplaceRange(found.level)
        return dataclasses.replace(self, laplace=found, schedule=schedule)

    def recorded(self) -> DiffusionKernel:
        """The same kernel for one run: on a GPU its denoiser is a recorded one."""
        return dataclasses.replace(self, denoiser=recorded(self.denoiser))

    @property
    def jumps(self) -> bool:
        """Whether the first step is a jump by the Laplace approximation."""
        return self.laplace is not None and self.laplace.jump > 0.0

    def flow_schedule(self, n_steps: int | None = None) -> Schedule:
        """The grid for a flow, which cannot jump: the first step is cut up like its neighbour."""
        schedule = self.schedule
        if n_steps is not None:
            checks.positive_integer("n_steps", n_steps, minimum=2)
        shares = [1.0] * schedule.n_steps
        if self.jumps:
            first, second = schedule.tensor[:3].log().diff().tolist()
            shares[0] = first / second
        elif n_steps is None:
            return schedule
        return Schedule.of_shares(n_steps or schedule.n_steps, schedule.times, shares)

    @property
    def space(self) -> Space:
        """The space that x_n live in."""
        return self.denoiser.space

    @property
    def mean_gains(self) -> Tensor:
        """The k_n in use, (N,) float64."""
        return 1.0 - self.schedule.ratios if self.gains is None else self.gains

    def step(self, n: int, x: Tensor, pairs: bool = False) -> ReverseStep:
        """Evaluate the denoiser at level n (1..N): x is x_n, (B, M, D) float64.

        ``pairs``: with pair coefficients, even if this kernel's own covariance has no use for them.
        """
        (step,) = self.steps([n], [x], pairs)
        return step

    @torch.no_grad()
    def steps(
        self, levels: Sequence[int], path: Sequence[Tensor], pairs: bool = False
    ) -> list[ReverseStep]:
        """The same for several levels at once: ``path`` has x_n for each.

        On a path that is known, as the forward process gives it, no level waits for another.
        """
        steps: list[ReverseStep] = []
        points = zip(levels, path, strict=True)
        for _, alike in itertools.groupby(points, lambda point: self._by_energy(point[0])):
            some, at = zip(*alike, strict=True)
            steps += self._evaluated(some, at, pairs)
        return steps

    def _evaluated(
        self, levels: Sequence[int], path: Sequence[Tensor], pairs: bool
    ) -> list[ReverseStep]:
        """Steps of which all go by the energy or none does."""
        t, by_energy = self.schedule.times, self._by_energy(levels[0])
        x, sizes = torch.cat(list(path)), [len(y) for y in path]
        level = torch.cat([y.new_full((len(y),), t[n]) for n, y in zip(levels, path, strict=True)])
        coefficients: Sequence[Tensor | None] = [None] * len(levels)
        posteriors: Sequence[Posterior | None] = [None] * len(levels)
        if pairs or (self.covariance.uses_pairs and not by_energy):
            denoised, found = self.denoiser.with_pairs(x, level)  # type: ignore[attr-defined]
            coefficients = found.split(sizes)
        else:
            denoised = self.denoiser(x, level)
        denoised = self.space.project(denoised)
        if by_energy:
            posterior = laplace_posterior(self.energy, self.space, x, denoised, level)  # type: ignore[arg-type]
            posteriors, denoised = posterior.split(sizes), posterior.mean
        rows = zip(levels, path, denoised.split(sizes), coefficients, posteriors, strict=True)
        return [
            ReverseStep(n, t[n], t[n - 1], x_n, d, self.denoiser, self.energy, c, p)
            for n, x_n, d, c, p in rows
        ]

    def _by_energy(self, n: int) -> bool:
        """Whether the Laplace approximation stands in for the denoiser at level n."""
        return self.laplace is not None and self.schedule.times[n] <= self.laplace.level

    def mean(self, step: ReverseStep) -> Tensor:
        """mu_n, (B, M, D)."""
        gain = float(self.mean_gains[step.n - 1])
        return step.x + gain * (step.denoised - step.x)

    def sample_prior(self, n: int, generator: torch.Generator) -> Tensor:
        """Draw x_N ~ N_x(0, T^2 I): (n, M, D) float64."""
        return self.schedule.times[-1] * self.space.standard_normal(n, generator)

    def prior_log_prob(self, x: Tensor) -> Tensor:
        """log p(x_N), (B,) float64."""
        return self.space.isotropic_log_prob(x, self.schedule.times[-1] ** 2)

    def sample_forward(self, n: int, x: Tensor, generator: torch.Generator) -> Tensor:
        """Draw x_n ~ q(. | x_{n-1} = x)."""
        noise = self.space.standard_normal(x.shape[0], generator)
        return x + float(self.schedule.increments[n - 1]) ** 0.5 * noise

    def forward_log_prob(self, n: int, x_before: Tensor, x_after: Tensor) -> Tensor:
        """log q(x_n = x_after | x_{n-1} = x_before), (B,) float64."""
        variance = float(self.schedule.increments[n - 1])
        return self.space.isotropic_log_prob(x_after - x_before, variance)
