r"""The diffusion process: forward q and reverse p, both with Gaussian steps::

    forward     q(x_n | x_{n-1}) = N_x(x_{n-1}, (t_n^2 - t_{n-1}^2) I)                 (Eq. 18)
    prior       p(x_N)           = N_x(0, T^2 I)
    reverse     p(x_{n-1} | x_n) = N_x(mu_n, Sigma_n(x_n))                             (Eq. 19)
                mu_n = x_n + k_n (D(x_n, t_n) - x_n),   k_n = 1 - r_n unless tuned
                r_n  = t_{n-1}^2 / t_n^2,   v_n = t_{n-1}^2 (1 - r_n)                   (Eq. 20, 21)

Eq. 20 is printed with r inverted. Sigma_n is a
:class:`~openmm_vtdis.diffusion.covariance.Covariance` in units of v_n; Sigma_n = v_n I is the
reverse kernel of DDPM. At low noise D may be improved by the energy
(:mod:`~openmm_vtdis.diffusion.posteriors.laplace`). Everything is in model coordinates, in which
the data have unit variance per degree of freedom.
"""

from __future__ import annotations

import dataclasses
import itertools
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from openmm_vtdis.coordinates import Energy, as_energy
from openmm_vtdis.core import checks
from openmm_vtdis.core.space import Space
from openmm_vtdis.diffusion.covariance.base import COVARIANCES, Covariance, Fittable, ReverseStep
from openmm_vtdis.diffusion.covariance.constant import Isotropic
from openmm_vtdis.diffusion.denoiser import Denoiser, recorded
from openmm_vtdis.diffusion.posteriors.base import Estimator
from openmm_vtdis.diffusion.posteriors.laplace import LaplaceEstimator, LaplaceRange
from openmm_vtdis.diffusion.schedule import Schedule


@dataclass(frozen=True)
class DiffusionProcess:
    """A diffusion process: the denoiser, grid, covariance and mean coefficients of q and p.

    Attributes
    ----------
    denoiser
        D(x, t) on :attr:`space`.
    schedule
        Noise levels t_0..t_N.
    covariance
        Family of reverse covariances, fitted for this schedule (DDPM: ``Isotropic.ddpm``).
    mean_coefficients
        (N,) mean coefficients k_n, or None for 1 - r_n.
    energy
        Of the target in model coordinates, for covariances that use it.
    laplace
        Noise levels at which the Laplace approximation replaces the denoiser; None: nowhere.
    """

    denoiser: Denoiser
    schedule: Schedule
    covariance: Covariance
    mean_coefficients: Tensor | None = None
    energy: Energy | None = None
    laplace: LaplaceRange | None = None

    def __post_init__(self) -> None:
        if self.laplace is not None and self.energy is None:
            raise ValueError("laplace: expected a process that knows the energy, got one without")
        if self.mean_coefficients is not None and tuple(self.mean_coefficients.shape) != (
            self.schedule.n_steps,
        ):
            raise ValueError(
                f"mean_coefficients: expected shape ({self.schedule.n_steps},), got "
                f"{tuple(self.mean_coefficients.shape)}"
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
        cls,
        denoiser: Denoiser,
        schedule: Schedule,
        energy: Energy | Callable[[Tensor], Tensor] | None = None,
    ) -> DiffusionProcess:
        """The untuned process, Sigma_n = v_n I; an energy may be a function of torch operations."""
        found = None if energy is None else as_energy(energy)
        return cls(denoiser, schedule, Isotropic.ddpm(denoiser.space, schedule), energy=found)

    def describe(self) -> dict[str, Any]:
        """Describe the grid, covariance family and more as JSON, for :meth:`rebuild`."""
        return {
            "times": list(self.schedule.times),
            "covariance": self.covariance.kind,
            "labels": list(self.covariance.labels),
            "options": self.covariance.options,
            "laplace": None if self.laplace is None else dataclasses.asdict(self.laplace),
        }

    @classmethod
    def rebuild(
        cls,
        description: Mapping[str, Any],
        parameters: Tensor,
        mean_coefficients: Tensor | None,
        denoiser: Denoiser,
        energy: Energy,
    ) -> DiffusionProcess:
        """Rebuild a tuned process around a denoiser and an energy.

        Parameters
        ----------
        description
            The result of :meth:`describe`.
        parameters, mean_coefficients
            Parameters of the covariance, and mean coefficients (N,) if they were tuned.

        Raises
        ------
        KeyError, TypeError, ValueError
            If the description is not complete.
        """
        family = COVARIANCES[description["covariance"]](
            denoiser.space, description["labels"], parameters, **description["options"]
        )
        found = description.get("laplace")
        laplace = None if found is None else LaplaceRange.rebuild(found)
        schedule = Schedule(tuple(description["times"]))
        return cls(denoiser, schedule, family, mean_coefficients, energy, laplace)

    def with_covariance(self, covariance: Covariance) -> DiffusionProcess:
        """The same process with another covariance."""
        return dataclasses.replace(self, covariance=covariance)

    def with_mean_coefficients(self, mean_coefficients: Tensor) -> DiffusionProcess:
        """The same process with other mean coefficients k_n, shape (N,)."""
        return dataclasses.replace(self, mean_coefficients=mean_coefficients)

    def with_schedule(self, schedule: Schedule) -> DiffusionProcess:
        """The same process, not tuned yet, on another grid of any number of steps."""
        return DiffusionProcess.ddpm(self.denoiser, schedule, self.energy)

    def with_n_steps(self, n_steps: int) -> DiffusionProcess:
        """The same process on a grid of another number of steps, see :meth:`Schedule.with_n_steps`.

        Raises
        ------
        ValueError
            If the covariance was fitted step by step and does not transfer ("block", "full",
            "low-rank").
        """
        old = self.schedule
        if n_steps == old.n_steps:
            return self
        new = old.with_n_steps(n_steps, self.jumps)
        mean_coefficients = None
        if self.mean_coefficients is not None:
            mean_coefficients = (1.0 - new.ratios) * old.carried(
                self.mean_coefficients / (1.0 - old.ratios), new
            )
        covariance = self.covariance.carried(old, new)
        return dataclasses.replace(
            self, schedule=new, covariance=covariance, mean_coefficients=mean_coefficients
        )

    def with_laplace(self, found: LaplaceRange, jump: bool = True) -> DiffusionProcess:
        """The same process with the Laplace approximation, and the jump in its grid if asked."""
        if not jump:
            return dataclasses.replace(self, laplace=LaplaceRange(found.level))
        schedule = self.schedule.jumping(found.jump)
        if schedule is self.schedule:
            found = LaplaceRange(found.level)
        return dataclasses.replace(self, laplace=found, schedule=schedule)

    def recorded(self) -> DiffusionProcess:
        """The same process for one run: on a GPU its denoiser is a recorded one."""
        denoiser = recorded(self.denoiser)
        return self if denoiser is self.denoiser else dataclasses.replace(self, denoiser=denoiser)

    @property
    def jumps(self) -> bool:
        """Whether the first step is a jump by the Laplace approximation."""
        return self.laplace is not None and self.laplace.jump > 0.0

    def flow_schedule(self, n_steps: int | None = None) -> Schedule:
        """The grid for a flow, which cannot jump: the first step is divided like its neighbour."""
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
    def n_steps(self) -> int:
        """Steps of a whole path, N."""
        return self.schedule.n_steps

    @property
    def space(self) -> Space:
        """The space that x_n live in."""
        return self.denoiser.space

    @property
    def coefficients(self) -> Tensor:
        """The k_n in use, (N,) float64."""
        return (
            1.0 - self.schedule.ratios if self.mean_coefficients is None else self.mean_coefficients
        )

    def step(self, n: int, x: Tensor, family: Fittable | None = None) -> ReverseStep:
        """The reverse step from level n (1..N) at x = x_n, (B, M, D) float64.

        ``family``: estimate the posterior as this one needs it, not the process's own covariance.
        """
        (step,) = self.steps([n], [x], family)
        return step

    @torch.no_grad()
    def steps(
        self, levels: Sequence[int], path: Sequence[Tensor], family: Fittable | None = None
    ) -> list[ReverseStep]:
        """Reverse steps from several levels at once: ``path`` has x_n for each.

        On a path that is known, as the forward process gives it, no level waits for another.
        """
        steps: list[ReverseStep] = []
        points = zip(levels, path, strict=True)
        for by_energy, alike in itertools.groupby(points, lambda point: self._by_energy(point[0])):
            some, at = zip(*alike, strict=True)
            steps += self._estimated(self._estimator(by_energy, family), some, at)
        return steps

    def _estimated(
        self, estimator: Estimator, levels: Sequence[int], path: Sequence[Tensor]
    ) -> list[ReverseStep]:
        """Steps whose posteriors are estimated alike."""
        t = self.schedule.times
        level = torch.cat([y.new_full((len(y),), t[n]) for n, y in zip(levels, path, strict=True)])
        posterior = estimator(torch.cat(list(path)), level)
        alone = len(path) == 1
        posteriors = [posterior] if alone else posterior.split([len(y) for y in path])
        rows = zip(levels, path, posteriors, strict=True)
        return [ReverseStep(n, t[n], t[n - 1], x_n, found) for n, x_n, found in rows]

    def _estimator(self, by_energy: bool, family: Fittable | None) -> Estimator:
        if by_energy and self.energy is not None:
            return LaplaceEstimator(self.denoiser, self.energy)
        return (family or self.covariance).estimator(self.denoiser, self.energy)

    def _by_energy(self, n: int) -> bool:
        """Whether the Laplace approximation stands in for the denoiser at level n."""
        return self.laplace is not None and self.schedule.times[n] <= self.laplace.level

    def mean(self, step: ReverseStep) -> Tensor:
        """mu_n, (B, M, D)."""
        gain = float(self.coefficients[step.n - 1])
        return step.x + gain * (step.denoised - step.x)

    def sample_prior(self, n: int, rng: torch.Generator) -> Tensor:
        """Draw x_N ~ N_x(0, T^2 I): (n, M, D) float64."""
        return self.schedule.times[-1] * self.space.standard_normal(n, rng)

    def prior_log_prob(self, x: Tensor) -> Tensor:
        """log p(x_N), (B,) float64."""
        return self.space.isotropic_log_prob(x, self.schedule.times[-1] ** 2)

    def sample_forward(self, n: int, x: Tensor, rng: torch.Generator) -> Tensor:
        """Draw x_n ~ q(. | x_{n-1} = x)."""
        noise = self.space.standard_normal(x.shape[0], rng)
        return x + float(self.schedule.increments[n - 1]) ** 0.5 * noise

    def forward_log_prob(self, n: int, x_before: Tensor, x_after: Tensor) -> Tensor:
        """log q(x_n = x_after | x_{n-1} = x_before), (B,) float64."""
        variance = float(self.schedule.increments[n - 1])
        return self.space.isotropic_log_prob(x_after - x_before, variance)
