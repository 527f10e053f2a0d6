r"""Trajectories in both directions, with the log ratio of the two path densities.

Reverse: draw x_N from the prior, then x_{n-1} from the reverse kernel. Forward: noise target
samples x_0 with q. Along either,

    log ratio = sum_n log q(x_n | x_{n-1}) - log p(x_N) - sum_n log p(x_{n-1} | x_n),

and the log weight of the trajectory is log w = -u(x_0) + log ratio (paper, Eq. 16, 17). Positions
and all log densities are float64, whatever precision the network runs in; trajectories are made in
batches, and only x_0 and the sums survive a batch.

All draws come from the caller's generator, one batch after the other: the same seed and batch size
give the same result. Where a batch does not fit into a GPU's memory, all begins again from the same
state of the generator with batches of half the size.
"""

from __future__ import annotations

import logging
from collections.abc import Callable
from dataclasses import dataclass
from typing import TypeVar

import torch
from torch import Tensor

from openmm_vtdis.diffusion.covariance import Fittable
from openmm_vtdis.diffusion.process import DiffusionKernel
from openmm_vtdis.runtime.progress import progress_bar

logger = logging.getLogger(__name__)

T = TypeVar("T")


@dataclass(frozen=True)
class ReversePaths:
    """End points of generated trajectories, in model units.

    Attributes
    ----------
    x
        x_0, (n, M, D) float64, on the generator's device.
    log_ratio
        (n,) float64, sum log q - log p(x_N) - sum log p.
    """

    x: Tensor
    log_ratio: Tensor


@dataclass(frozen=True)
class ForwardPaths:
    """Log densities and statistics of noised target samples, all on the CPU.

    Attributes
    ----------
    log_forward
        (n,) sum_n log q(x_n | x_{n-1}) - log p(x_N): free of the reverse covariance.
    log_reverse
        (n,) sum_n log p(x_{n-1} | x_n) under the kernel's own covariance.
    statistics
        (n, N, F) of the family that was asked for; None if none was.
    """

    log_forward: Tensor
    log_reverse: Tensor
    statistics: Tensor | None

    @property
    def log_ratio(self) -> Tensor:
        """(n,) as for :class:`ReversePaths`."""
        return self.log_forward - self.log_reverse


@torch.no_grad()
def reverse_paths(
    kernel: DiffusionKernel,
    n: int,
    generator: torch.Generator,
    batch_size: int = 1024,
    progress: bool = True,
) -> ReversePaths:
    """Generate n trajectories from the prior down to t_0."""

    def run(size: int) -> ReversePaths:
        return _reverse_paths(kernel, n, generator, size, progress)

    return until_it_fits(run, min(batch_size, n), generator)


def _reverse_paths(
    kernel: DiffusionKernel, n: int, generator: torch.Generator, batch_size: int, progress: bool
) -> ReversePaths:
    positions, ratios = [], []
    kernel = kernel.recorded()
    n_steps = kernel.schedule.n_steps
    with progress_bar(n * n_steps, "sampling", progress, "eval") as bar:
        for size in _batches(n, batch_size):
            x = kernel.sample_prior(size, generator)
            log_ratio = -kernel.prior_log_prob(x)
            for level in range(n_steps, 0, -1):
                step = kernel.step(level, x)
                scatter = kernel.covariance.at(step)
                residual = scatter.sample(size, generator)
                before = kernel.mean(step) + residual
                log_ratio += kernel.forward_log_prob(level, before, x) - scatter.log_prob(residual)
                x = before
                bar.update(size)
            positions.append(x)
            ratios.append(log_ratio)
    return ReversePaths(torch.cat(positions), torch.cat(ratios))


@torch.no_grad()
def forward_paths(
    kernel: DiffusionKernel,
    x_0: Tensor,
    generator: torch.Generator,
    family: Fittable | None = None,
    batch_size: int = 1024,
    progress: bool = True,
) -> ForwardPaths:
    """Noise target samples x_0, (n, M, D) in model units, one trajectory each.

    Of few samples many noise levels are evaluated together, as many as make a batch.

    Parameters
    ----------
    family
        If given, its sufficient statistics are collected; the positions are thrown away.
    """

    def run(size: int) -> ForwardPaths:
        return _forward_paths(kernel, x_0, generator, family, size, progress)

    return until_it_fits(run, batch_size, generator)


def _forward_paths(
    kernel: DiffusionKernel,
    x_0: Tensor,
    generator: torch.Generator,
    family: Fittable | None,
    batch_size: int,
    progress: bool,
) -> ForwardPaths:
    forward, reverse, collected = [], [], []
    n_steps = kernel.schedule.n_steps
    device = generator.device
    kernel = kernel.recorded()
    pairs = family is not None and family.uses_pairs
    with progress_bar(len(x_0) * n_steps, "noising", progress, "eval") as bar:
        for start in range(0, len(x_0), batch_size):
            x = x_0[start : start + batch_size].to(device, torch.float64)
            log_forward = torch.zeros(len(x), dtype=torch.float64, device=device)
            log_reverse = torch.zeros_like(log_forward)
            rows = []
            at_once = max(batch_size // len(x), 1)
            for levels in torch.arange(1, n_steps + 1, device="cpu").split(at_once):
                path = [x]
                for level in levels.tolist():
                    path.append(kernel.sample_forward(level, path[-1], generator))
                steps = kernel.steps(levels.tolist(), path[1:], pairs)
                for step, before in zip(steps, path[:-1], strict=True):
                    residual = before - kernel.mean(step)
                    log_forward += kernel.forward_log_prob(step.n, before, step.x)
                    log_reverse += kernel.covariance.at(step).log_prob(residual)
                    if family is not None:
                        rows.append(family.statistics(step, residual))
                x = path[-1]
                bar.update(len(x) * len(levels))
            log_forward -= kernel.prior_log_prob(x)
            forward.append(log_forward.cpu())
            reverse.append(log_reverse.cpu())
            if rows:
                collected.append(torch.stack(rows, dim=1).cpu())
    statistics = torch.cat(collected) if collected else None
    return ForwardPaths(torch.cat(forward), torch.cat(reverse), statistics)


def until_it_fits(run: Callable[[int], T], batch_size: int, generator: torch.Generator) -> T:
    """``run(batch_size)``, with half of it as often as a GPU's memory is not enough."""
    state = generator.get_state()
    while True:
        try:
            return run(batch_size)
        except torch.cuda.OutOfMemoryError:
            if batch_size == 1:
                raise
        batch_size //= 2
        logger.warning("out of GPU memory: going on with batches of %d", batch_size)
        torch.cuda.empty_cache()
        generator.set_state(state)


def _batches(n: int, batch_size: int) -> list[int]:
    full, rest = divmod(n, batch_size)
    return [batch_size] * full + ([rest] if rest else [])
