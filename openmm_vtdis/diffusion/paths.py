r"""Trajectories in both directions between any two noise levels, with their log densities.

*Noising* draws x_1, ..., x_m from x_0 with q; *denoising* draws x_{m-1}, ..., x_0 from x_m with p.
Either gives the sums over its steps

    log q = sum_{n<=m} log q(x_n | x_{n-1}),        log p = sum_{n<=m} log p(x_{n-1} | x_n).

Whole paths are the case m = N. With the prior they give the log ratio of the two path densities,

    log ratio = log q - log p(x_N) - log p,

and the log weight of the trajectory is log w = -u(x_0) + log ratio (paper, Eq. 16, 17). Positions
and all log densities are float64, whatever precision the network runs in; whole paths are made in
batches, and only their ends and the sums survive a batch.

All draws come from the caller's rng, one batch after the other: the same seed and batch size give
the same result. Where a batch does not fit into a GPU's memory, all begins again from the same
state of the rng with batches of half the size.
"""

from __future__ import annotations

import logging
from collections.abc import Callable
from dataclasses import dataclass
from typing import TypeVar

import torch
from torch import Tensor

from openmm_vtdis.core import checks
from openmm_vtdis.diffusion.covariance.base import Fittable
from openmm_vtdis.diffusion.process import DiffusionProcess
from openmm_vtdis.runtime.progress import Bar, NoBar, progress_bar

logger = logging.getLogger(__name__)

T = TypeVar("T")


@dataclass(frozen=True)
class Path:
    """Ends of trajectories in model coordinates, with their log densities.

    Attributes
    ----------
    end
        (B, M, D) float64: x_m of a noised trajectory, x_0 of a denoised one.
    log_q, log_p
        (B,) float64, of all forward and of all reverse steps between the two levels.
    statistics
        (B, m, F) sufficient statistics of the family that was asked for; None if none was.
    """

    end: Tensor
    log_q: Tensor
    log_p: Tensor
    statistics: Tensor | None = None


@torch.no_grad()
def denoise(
    process: DiffusionProcess,
    x: Tensor,
    rng: torch.Generator,
    from_: int | None = None,
    bar: Bar | None = None,
) -> Path:
    """Draw x_0 from x = x_m, (B, M, D) in model coordinates, by the reverse process.

    Parameters
    ----------
    from_
        The level m, 0..N; None: N.
    bar
        Progress bar, advanced for each configuration and step.

    Raises
    ------
    ValueError, TypeError
        If x or the level is not of the process, or ``rng`` no torch.Generator.
    """
    m = _level("from_", process, from_, x, rng)
    return _denoised(process, x, rng, m, bar or NoBar())


def _denoised(process: DiffusionProcess, x: Tensor, rng: torch.Generator, m: int, bar: Bar) -> Path:
    """Draw x_0 from x = x_m."""
    log_q = torch.zeros(len(x), dtype=torch.float64, device=x.device)
    log_p = torch.zeros_like(log_q)
    for n in range(m, 0, -1):
        step = process.step(n, x)
        scatter = process.covariance.at(step)
        residual = scatter.sample(len(x), rng)
        before = process.mean(step) + residual
        log_q += process.forward_log_prob(n, before, x)
        log_p += scatter.log_prob(residual)
        x = before
        bar.update(len(x))
    return Path(x, log_q, log_p)


@torch.no_grad()
def noise(
    process: DiffusionProcess,
    x: Tensor,
    rng: torch.Generator,
    to: int | None = None,
    family: Fittable | None = None,
    at_once: int = 1,
    bar: Bar | None = None,
) -> Path:
    """Draw x_m from x = x_0, (B, M, D) in model coordinates, by the forward process.

    A path down again, ``denoise(process, up.end, rng, from_=to)``, proposes another x_0: the
    logarithm of the Metropolis ratio is u(x_0) - u(x_0') + up.log_p - up.log_q + down.log_q -
    down.log_p, with u the energy in model coordinates (``gen.model_energy``).

    Parameters
    ----------
    to
        The level m, 0..N; None: N.
    family
        If given, its sufficient statistics are collected.
    at_once
        Levels that are evaluated together.
    bar
        Progress bar, advanced for each configuration and step.

    Raises
    ------
    ValueError, TypeError
        If x or the level is not of the process, or ``rng`` no torch.Generator.
    """
    m = _level("to", process, to, x, rng)
    return _noised(process, x, rng, m, family, at_once, bar or NoBar())


def _noised(
    process: DiffusionProcess,
    x: Tensor,
    rng: torch.Generator,
    m: int,
    family: Fittable | None,
    at_once: int,
    bar: Bar,
) -> Path:
    """Draw x_m from x = x_0."""
    log_q = torch.zeros(len(x), dtype=torch.float64, device=x.device)
    log_p = torch.zeros_like(log_q)
    rows = []
    for levels in torch.arange(1, m + 1, device="cpu").split(max(at_once, 1)):
        path = [x]
        for n in levels.tolist():
            path.append(process.sample_forward(n, path[-1], rng))
        steps = process.steps(levels.tolist(), path[1:], family)
        for step, before in zip(steps, path[:-1], strict=True):
            residual = before - process.mean(step)
            log_q += process.forward_log_prob(step.n, before, step.x)
            log_p += process.covariance.at(step).log_prob(residual)
            if family is not None:
                rows.append(family.statistics(step, residual))
        x = path[-1]
        bar.update(len(x) * len(levels))
    return Path(x, log_q, log_p, torch.stack(rows, dim=1) if rows else None)


def _level(name: str, process: object, m: int | None, x: object, rng: object) -> int:
    """Check the arguments of a path; its level, 0..N."""
    if not isinstance(process, DiffusionProcess):
        raise TypeError(f"process: expected a DiffusionProcess, got {type(process).__name__}")
    checks.torch_generator("rng", rng)
    checks.shape(x, process.space.n_particles, process.space.n_dims)
    last = process.n_steps
    found = last if m is None else checks.positive_integer(name, m, minimum=0)
    if found > last:
        raise ValueError(f"{name}: expected a level from 0 to {last}, got {m}")
    return found


@dataclass(frozen=True)
class ReversePaths:
    """End points of generated trajectories, in model coordinates.

    Attributes
    ----------
    x
        x_0, (n, M, D) float64, on the device of the rng.
    log_ratio
        (n,) float64, log q - log p(x_N) - log p.
    """

    x: Tensor
    log_ratio: Tensor


@dataclass(frozen=True)
class ForwardPaths:
    """Log densities and statistics of noised target samples, all on the CPU.

    Attributes
    ----------
    log_forward
        (n,) log q - log p(x_N): free of the reverse covariance.
    log_reverse
        (n,) log p under the process's own covariance.
    statistics
        (n, N, F) sufficient statistics of the family that was asked for; None if none was.
    """

    log_forward: Tensor
    log_reverse: Tensor
    statistics: Tensor | None

    @property
    def log_ratio(self) -> Tensor:
        """(n,) as for :class:`ReversePaths`."""
        return self.log_forward - self.log_reverse

    @property
    def collected(self) -> Tensor:
        """The statistics (n, N, F).

        Raises
        ------
        ValueError
            If none were asked for.
        """
        if self.statistics is None:
            raise ValueError("family: expected one whose statistics are collected, got None")
        return self.statistics


@torch.no_grad()
def reverse_paths(
    process: DiffusionProcess,
    n: int,
    rng: torch.Generator,
    batch_size: int = 1024,
    progress: bool = True,
) -> ReversePaths:
    """Generate n trajectories from the prior down to t_0."""

    def run(batch_size: int) -> ReversePaths:
        once = process.recorded()
        positions, ratios = [], []
        with progress_bar(n * process.n_steps, "sampling", progress, "eval") as bar:
            for start in range(0, n, batch_size):
                x = once.sample_prior(min(batch_size, n - start), rng)
                path = _denoised(once, x, rng, once.n_steps, bar)
                positions.append(path.end)
                ratios.append(path.log_q - process.prior_log_prob(x) - path.log_p)
        return ReversePaths(torch.cat(positions), torch.cat(ratios))

    return until_it_fits(run, min(batch_size, n), rng)


@torch.no_grad()
def forward_paths(
    process: DiffusionProcess,
    x_0: Tensor,
    rng: torch.Generator,
    family: Fittable | None = None,
    batch_size: int = 1024,
    progress: bool = True,
) -> ForwardPaths:
    """Noise target samples x_0, (n, M, D) in model coordinates, one trajectory each.

    With few samples, as many noise levels are evaluated together as make a batch.

    Parameters
    ----------
    family
        If given, its sufficient statistics are collected; the positions are thrown away.
    """

    def run(batch_size: int) -> ForwardPaths:
        once = process.recorded()
        forward, reverse, collected = [], [], []
        with progress_bar(len(x_0) * process.n_steps, "noising", progress, "eval") as bar:
            for x in x_0.split(batch_size):
                at_once = batch_size // len(x)
                x = x.to(rng.device, torch.float64)
                path = _noised(once, x, rng, once.n_steps, family, at_once, bar)
                forward.append((path.log_q - process.prior_log_prob(path.end)).cpu())
                reverse.append(path.log_p.cpu())
                if path.statistics is not None:
                    collected.append(path.statistics.cpu())
        statistics = torch.cat(collected) if collected else None
        return ForwardPaths(torch.cat(forward), torch.cat(reverse), statistics)

    return until_it_fits(run, batch_size, rng)


def until_it_fits(run: Callable[[int], T], batch_size: int, rng: torch.Generator) -> T:
    """``run(batch_size)``, with half of it as often as a GPU's memory is not enough."""
    state = rng.get_state()
    while True:
        try:
            return run(batch_size)
        except torch.cuda.OutOfMemoryError:
            if batch_size == 1:
                raise
        batch_size //= 2
        logger.warning("out of GPU memory: going on with batches of %d", batch_size)
        torch.cuda.empty_cache()
        rng.set_state(state)
