"""Cost of a step of each covariance, next to the isotropic one in the same run.

    python -m benchmarks.step_time

The three shipped systems, one thread: seconds of a step of the reverse process (network,
covariance, a draw, and its densities in both directions), for steps that go by the network and for
those, at low noise, that go by the Laplace approximation; and of whole trajectories of the process
that ships with an archive. Rounds over all methods alternate and the median counts, so that a busy
machine hits all alike. Writes ``docs/tables/step-time.md``.
"""

from __future__ import annotations

import functools

import numpy as np
import torch

from benchmarks.harness import (
    NETWORKS,
    MarkdownTable,
    command_line,
    in_turns,
    seconds,
    spread,
    write_table,
)
from openmm_vtdis import DiffusionBoltzmannGenerator
from openmm_vtdis.diffusion.covariance import make_covariance
from openmm_vtdis.diffusion.paths import reverse_paths
from openmm_vtdis.diffusion.posteriors.laplace import LaplaceRange
from openmm_vtdis.diffusion.process import DiffusionProcess
from openmm_vtdis.diffusion.schedule import Schedule

METHODS = ("isotropic", "pairwise", "hessian", "Laplace", "tweedie")
MOST = 1_024
"""Most configurations in a batch, since a Jacobian keeps all of an evaluation in memory."""
GRID = Schedule((0.1, 0.3, 0.33, 10.0))
"""Grid whose second step, at t = 0.33, is timed."""


def processes(gen: DiffusionBoltzmannGenerator) -> dict[str, DiffusionProcess]:
    """An untuned process for each method."""
    plain = DiffusionProcess.ddpm(gen.denoiser, GRID, gen.model_energy)
    found = {"isotropic": plain}
    for name in METHODS[1:]:
        kind = "hessian" if name == "Laplace" else name
        family = make_covariance(kind, gen.space, gen.labels)
        process = plain.with_covariance(family.with_parameters(family.ddpm_parameters(GRID)))
        if name == "Laplace":
            process = process.with_laplace(LaplaceRange(1.0), jump=False)
        found[name] = process
    return found


def one_step(process: DiffusionProcess, x: torch.Tensor) -> None:
    """Take one reverse step from configurations (B, M, D)."""
    step = process.step(2, x)
    scatter = process.covariance.at(step)
    residual = scatter.sample(len(x), torch.Generator(x.device).manual_seed(0))
    before = process.mean(step) + residual
    process.forward_log_prob(2, before, x) - scatter.log_prob(residual)


def timed(process: DiffusionProcess, x: torch.Tensor, device: torch.device) -> float:
    """Seconds of a step that follows another of its kind, as in a chain."""
    one_step(process, x)
    return seconds(lambda: one_step(process, x), device)


def trajectories(gen: DiffusionBoltzmannGenerator, n_rounds: int, device: torch.device) -> str:
    """Cell of the time of the archive's trajectories, in that of isotropic ones on its grid."""
    shipped = gen.process
    plain = DiffusionProcess.ddpm(gen.denoiser, shipped.schedule, gen.model_energy)
    rng, size = torch.Generator(device).manual_seed(0), min(gen.batch_size(), MOST)
    works = [
        functools.partial(reverse_paths, process, size, rng, size, False)
        for process in (plain, shipped)
    ]
    times = in_turns(works, n_rounds, device, warm_up=0)
    return spread(times[:, 1] / times[:, 0])


@torch.no_grad()
def measure(name: str, n_rounds: int, device: torch.device) -> list[str]:
    """Measure a row of the table."""
    gen = DiffusionBoltzmannGenerator.from_pretrained(name, device)
    if gen.network.pair_head is None:
        gen.network.add_pair_head()  # type: ignore[operator]  # untrained: it takes as long
    found = processes(gen)
    size = min(gen.batch_size(), MOST)
    noise = gen.space.standard_normal(size, torch.Generator(device).manual_seed(1))
    x = (1.0 + GRID.times[2] ** 2) ** 0.5 * noise
    rounds = [
        [timed(process, x, device) for process in found.values()] for _ in range(n_rounds + 1)
    ]
    ratios = np.array(rounds[1:])
    base = float(np.median(ratios[:, 0]))
    cells = [spread(ratios[:, k] / ratios[:, 0]) for k in range(1, len(METHODS))]
    whole = trajectories(gen, max(n_rounds // 3, 1), device)
    return [name, f"{1e6 * base / size:.3g} µs", *cells, whole]


def main() -> None:
    """Command line entry."""
    options = command_line(__doc__, systems=NETWORKS, rounds=15, device=True).parse_args()
    torch.set_num_threads(1)
    table = MarkdownTable("", *METHODS, "as shipped, all steps")
    for name in options.systems:
        table.add(*measure(name, options.rounds, options.device))
    note = (
        "Seconds of a step and configuration, then multiples of it: the median (and range) over "
        f"{options.rounds} alternating rounds (a third of them for whole trajectories), on "
    )
    write_table("step-time", table, note, options.device)


if __name__ == "__main__":
    main()
