r"""Grids of noise levels t_0 < t_1 < ... < t_N.

N steps are N network evaluations and N + 1 levels; t_0 = eps is the data end and t_N = T the prior
end. Levels are in units of the model's length scale, in which data have unit variance per degree
of freedom::

    geometric   t_n = t_0 (t_N / t_0)^{n/N}
    Karras      t_n = (t_0^{1/rho} + (n/N) (t_N^{1/rho} - t_0^{1/rho}))^rho

the second tending to the first as rho grows (paper, Sec. 4.5, where the printed formula swaps the
ends and divides by N - 1).
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from openmm_vtdis.core import checks


@dataclass(frozen=True)
class Schedule:
    """An increasing grid of positive noise levels.

    Attributes
    ----------
    times
        (N + 1,) floats, t_0 to t_N.
    """

    times: tuple[float, ...]

    def __post_init__(self) -> None:
        times = np.asarray(self.times, dtype=np.float64)
        if times.ndim != 1 or len(times) < 3:
            raise ValueError(
                f"schedule: expected n_steps >= 2 (3 or more noise levels), got {times.size} levels"
            )
        if not (np.isfinite(times).all() and times[0] > 0.0 and (np.diff(times) > 0.0).all()):
            raise ValueError(
                "schedule: expected finite, positive, strictly increasing noise levels, "
                f"got {self.times!r}"
            )
        object.__setattr__(self, "times", tuple(float(t) for t in times))

    @classmethod
    def geometric(cls, n_steps: int, t_min: float, t_max: float) -> Schedule:
        """N + 1 levels with a constant ratio between neighbours.

        >>> [round(t, 6) for t in Schedule.geometric(3, 0.01, 10.0).times]
        [0.01, 0.1, 1.0, 10.0]
        """
        n_steps, t_min, t_max = _check_range(n_steps, t_min, t_max)
        return cls(tuple(np.geomspace(t_min, t_max, n_steps + 1)))

    @classmethod
    def karras(cls, n_steps: int, t_min: float, t_max: float, rho: float = 7.0) -> Schedule:
        """N + 1 levels evenly spaced in t^(1/rho) (Karras et al. 2022, Eq. 5)."""
        n_steps, t_min, t_max = _check_range(n_steps, t_min, t_max)
        rho = checks.positive_number("rho", rho)
        levels = np.linspace(t_min ** (1.0 / rho), t_max ** (1.0 / rho), n_steps + 1) ** rho
        levels[0], levels[-1] = t_min, t_max
        return cls(tuple(levels))

    @classmethod
    def of_shares(cls, n_steps: int, levels: Sequence[float], shares: Sequence[float]) -> Schedule:
        """N + 1 levels between the first and the last of ``levels`` (L,), increasing.

        ``shares`` (L - 1,) of the steps go between neighbours, evenly over log t there.
        """
        n_steps = checks.positive_integer("n_steps", n_steps, minimum=2)
        reached = np.concatenate([[0.0], np.cumsum(shares) / np.sum(shares)])
        times = np.exp(np.interp(np.linspace(0.0, 1.0, n_steps + 1), reached, np.log(levels)))
        times[0], times[-1] = levels[0], levels[-1]
        return cls(tuple(times))

    def with_n_steps(self, n_steps: int, keep_first: bool = False) -> Schedule:
        """The same ends and density of levels over log t, with another number of steps.

        ``keep_first``: the first step counts among them and stays as it is.
        """
        if keep_first:
            rest = Schedule(self.times[1:]).with_n_steps(
                checks.positive_integer("n_steps", n_steps, minimum=3) - 1
            )
            return Schedule((self.times[0], *rest.times))
        return Schedule.of_shares(n_steps, self.times, [1.0] * self.n_steps)

    def jumping(self, level: float) -> Schedule:
        """The same ends and number of steps, with a first step between t_0 and ``level``.

        The others have the density over log t that this grid has there. A level that leaves no room
        for two of them changes nothing.
        """
        above = [t for t in self.times if t > level]
        if self.n_steps < 3 or len(above) < 2 or level <= self.times[1]:
            return self
        below = self.n_steps - len(above)
        part = math.log(self.times[below + 1] / level) / math.log(
            self.times[below + 1] / self.times[below]
        )
        shares = [part, *([1.0] * (len(above) - 1))]
        rest = Schedule.of_shares(self.n_steps - 1, [level, *above], shares)
        return Schedule((self.times[0], *rest.times))

    @property
    def n_steps(self) -> int:
        """N, the number of network evaluations per trajectory."""
        return len(self.times) - 1

    @property
    def tensor(self) -> Tensor:
        """The levels as a float64 tensor, shape (N + 1,)."""
        return torch.tensor(self.times, dtype=torch.float64)

    @property
    def pairs(self) -> Tensor:
        """(t_{n-1}, t_n) for n = 1..N, shape (N, 2)."""
        t = self.tensor
        return torch.stack([t[:-1], t[1:]], dim=1)

    @property
    def ratios(self) -> Tensor:
        """r_n = t_{n-1}^2 / t_n^2 for n = 1..N, shape (N,)."""
        t = self.tensor
        return (t[:-1] / t[1:]).square()

    @property
    def variances(self) -> Tensor:
        """DDPM variances v_n = t_{n-1}^2 (t_n^2 - t_{n-1}^2) / t_n^2, shape (N,) (Eq. 21)."""
        return self.tensor[:-1].square() * (1.0 - self.ratios)

    @property
    def widening(self) -> Tensor:
        """(1 - r_n) / r_n for n = 1..N, shape (N,): see :func:`widening`."""
        return widening(self.pairs)

    def interpolated(self, values: Tensor, levels: Tensor) -> Tensor:
        """Interpolate values (N, ...) at t_1..t_N to other levels (L,): (L, ...).

        Linear in log t between the levels of this grid, constant outside.
        """
        there, here = (t.log().numpy() for t in (self.tensor[1:], levels))
        columns = values.reshape(len(values), -1).numpy().T
        found = np.stack([np.interp(here, there, column) for column in columns], axis=1)
        return torch.tensor(found).reshape(len(levels), *values.shape[1:])

    def carried(self, values: Tensor, other: Schedule) -> Tensor:
        """Interpolate values (N, ...) at t_1..t_N to the steps of another grid: (N', ...)."""
        return self.interpolated(values, other.tensor[1:])

    @property
    def increments(self) -> Tensor:
        """Forward variances t_n^2 - t_{n-1}^2, shape (N,)."""
        t = self.tensor
        return t[1:].square() - t[:-1].square()


def widening(levels: Tensor) -> Tensor:
    """(1 - r) / r at levels (N, 2) = (t_{n-1}, t_n): (N,).

    A step from t_n to t_{n-1} is wider than v_n by this multiple of the posterior's variance over
    t_n^2, in units of v_n.
    """
    r = (levels[:, 0] / levels[:, 1]).square()
    return (1.0 - r) / r


def make_schedule(
    schedule: str | Schedule | Sequence[float],
    n_steps: int | None,
    t_min: float | None = None,
    t_max: float | None = None,
    rho: float = 7.0,
) -> Schedule:
    """Return a :class:`Schedule` from a name ("geometric", "karras"), levels, or a schedule.

    "adaptive" gives the geometric grid that :func:`~openmm_vtdis.tuning.adaptive_schedule.adapt`
    begins with.

    ``n_steps`` None: 100, or what the levels say.

    Raises
    ------
    ValueError
        For another name, ``n_steps`` < 2, a name without both ends, or levels whose number is not
        ``n_steps`` + 1.
    """
    if isinstance(schedule, str):
        n_steps = 100 if n_steps is None else n_steps
        checks.choice("schedule", schedule, ("adaptive", "geometric", "karras"))
        low, high = checks.positive_number("t_min", t_min), checks.positive_number("t_max", t_max)
        if schedule == "karras":
            return Schedule.karras(n_steps, low, high, rho)
        return Schedule.geometric(n_steps, low, high)
    if isinstance(schedule, Schedule):
        grid = schedule
    else:
        grid = Schedule(tuple(checks.real_array("schedule", schedule).ravel().tolist()))
    if n_steps is not None and grid.n_steps != n_steps:
        raise ValueError(
            f"schedule: expected {n_steps + 1} noise levels for n_steps={n_steps}, "
            f"got {grid.n_steps + 1}"
        )
    return grid


def default_range(
    spread: float, force_fourth_moments: Tensor | None = None, mean_square: float = 0.0
) -> tuple[float, float]:
    r"""Ends (t_min, t_max) of a grid at which the two end errors are negligible.

    *Prior end.* Replacing the true marginal, of variances s_i + T^2, by N(0, T^2 I) costs about
    sum_i s_i^2 / (4 T^4) nats, and a mean m of the data ``|m|^2 / (2 T^2)`` more.

    *Data end.* The first reverse kernel takes the density to be smooth below t_0. For a Gaussian
    mode of width l that costs (t_0/l)^4 / 4 nats per degree of freedom, and the force g there has
    E[g^4] = 3 / l^4. Summing over degrees of freedom, t_0^4 sum_i E[g_i^4] / 12 nats.

    Each is set to 10^-3 nats.

    Parameters
    ----------
    spread
        sum_i s_i^2 over the eigenvalues of the data's covariance in model coordinates: d where
        they are equal, up to d^2 where one holds everything.
    force_fourth_moments
        (d,) or any shape: E[g_i^4] of the reduced force, in model coordinates; None if not known,
        which gives t_min = 0.01.
    mean_square
        ``|m|^2``; zero on the zero-CoM subspace, where rotations average it away.
    """
    budget = 1e-3
    # The root 1 / T^2 of spread / 4 y^2 + mean_square / 2 y = budget
    half = 0.5 * mean_square
    t_max = ((half + math.sqrt(half**2 + spread * budget)) / (2.0 * budget)) ** 0.5
    if force_fourth_moments is None:
        return 0.01, max(t_max, 5.0)
    total = float(force_fourth_moments.to(torch.float64).sum())
    if not (math.isfinite(total) and total > 0.0):
        raise ValueError(f"force_fourth_moments: expected a positive finite sum, got {total}")
    t_min = (12.0 * budget / total) ** 0.25
    return min(t_min, 0.05), max(t_max, 5.0)


def _check_range(n_steps: int, t_min: float, t_max: float) -> tuple[int, float, float]:
    n_steps = checks.positive_integer("n_steps", n_steps, minimum=2)
    t_min = checks.positive_number("t_min", t_min)
    t_max = checks.positive_number("t_max", t_max)
    if t_max <= t_min:
        raise ValueError(f"t_min, t_max: expected t_min < t_max, got {t_min} and {t_max}")
    return n_steps, t_min, t_max
