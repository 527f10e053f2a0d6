"""Cost of a tuning: held-out forward ESS against the number of its trajectories.

    python -m benchmarks.tuning

DW-4, 100 steps, isotropic covariance. One convex fit to n trajectories, with and without a penalty
on roughness, is compared with the paper's gradient descent (Adam, the paper's learning rates, k
steps with a batch of trajectories each, k of its own schedule, no penalty). Its batches are drawn
from 16,000 trajectories, and count as if they were fresh ones. Each point is the average over
disjoint sets, or over seeds; the held-out trajectories are the same for all. Writes
``docs/tables/tuning.md`` and ``docs/figures/tuning.png``.
"""

from __future__ import annotations

import numpy as np
import torch
from torch import Tensor

from benchmarks.cases import make_case
from benchmarks.harness import (
    MarkdownTable,
    command_line,
    new_figure,
    write_figure,
    write_table,
)
from benchmarks.methods import Method
from benchmarks.rows import Row
from benchmarks.run import Bench
from openmm_vtdis.diffusion.covariance.constant import Isotropic
from openmm_vtdis.diffusion.schedule import Schedule
from openmm_vtdis.ensemble import forward_ess
from openmm_vtdis.plotting import BLUE, GREEN, ORANGE, RED
from openmm_vtdis.tuning.fit import MeanCoefficients, Trajectories, fit, fit_sgd, log_weights

N_STEPS, N_REPEATS = 100, 5
CONVEX = (50, 100, 200, 400, 800, 1_600, 3_200, 16_000)
DESCENT = {batch: (5, 10, 20, 40, 80, 160, 320, 640) for batch in (512, 64)}
PAPER = 5_000 * 512


class Free(Isotropic):
    """The isotropic covariance without a penalty on its parameters."""

    def penalty(self, parameters: Tensor, schedule: Schedule) -> Tensor:
        return parameters.new_zeros(())


def isotropic(bench: Bench, split: str) -> Trajectories:
    """Trajectories of a split with the statistics of an isotropic covariance."""
    mean = MeanCoefficients(bench.gen.space, bench.gen.labels, torch.zeros(1, 2))
    data = bench.data(N_STEPS, mean, split, Method())
    mean_coefficients = bench.ddpm(N_STEPS).coefficients
    return Trajectories(data.base, mean.isotropic_statistics(data.statistics, mean_coefficients))


def convex(
    family: Isotropic, train: Trajectories, test: Trajectories, grid: Schedule, n: int
) -> list[float]:
    """ESS of fits to disjoint sets of n trajectories, the last eighth of which stops the fit."""
    found = []
    for k in range(min(N_REPEATS, len(train) // n)):
        some = train[k * n : (k + 1) * n]
        held = max(n // 8, 3)
        best = fit(family, some[:-held], grid, "alpha2", some[-held:])
        found.append(forward_ess(log_weights(best.fitted, test, grid).numpy()))
    return found


def descent(
    family: Isotropic, train: Trajectories, test: Trajectories, grid: Schedule, k: int, batch: int
) -> list[float]:
    """ESS after k steps, with several seeds."""
    found = []
    for seed in range(3):
        rng = torch.Generator().manual_seed(seed)

        def draw(n: int, rng: torch.Generator = rng) -> Trajectories:
            return train[torch.randint(len(train), (n,), generator=rng)]

        start = family.ddpm_parameters(grid)
        best = fit_sgd(family, draw, grid, start, n_iterations=k, batch_size=batch, progress=False)
        found.append(forward_ess(log_weights(best.fitted, test, grid).numpy()))
    return found


def reached(curve: Row, ess: float) -> float | None:
    """Trajectories at which a curve reaches an ESS, log-linear between its points.

    None if it never does, or from its first point on.
    """
    n, values = np.array(list(curve)), np.array([np.mean(v) for v in curve.values()])
    above = np.flatnonzero(values >= ess)
    if len(above) == 0 or above[0] == 0:
        return None
    k = above[0]
    return float(np.exp(np.interp(ess, values[k - 1 : k + 1], np.log(n[k - 1 : k + 1]))))


def main() -> None:
    """Command line entry."""
    parser = command_line(__doc__)
    parser.add_argument("--fit-trajectories", type=int, default=16_000)
    parser.add_argument("--samples", type=int, default=10_000, help="held-out trajectories")
    parser.set_defaults(progress=True)
    options = parser.parse_args()
    bench = Bench(make_case("dw4"), options)
    train, test = (isotropic(bench, split) for split in ("train", "test"))
    grid = bench.ddpm(N_STEPS).schedule
    family, free = (
        kind(bench.gen.space, bench.gen.labels, torch.zeros(1, 1)) for kind in (Isotropic, Free)
    )
    curves: dict[str, Row] = {
        "one convex fit": {n: convex(family, train, test, grid, n) for n in CONVEX},
        "... without a price on roughness": {n: convex(free, train, test, grid, n) for n in CONVEX},
    }
    for batch, numbers in DESCENT.items():
        name = f"gradient descent, batches of {batch}"
        curves[name] = {k * batch: descent(free, train, test, grid, k, batch) for k in numbers}
    columns = "gradient descent: trajectories", "ESS", "one convex fit reaches it with", "ratio"
    table = MarkdownTable(*columns)
    for batch in DESCENT:
        for n, values in curves[f"gradient descent, batches of {batch}"].items():
            enough = reached(curves["one convex fit"], float(np.mean(values)))
            cells = [f"{n:,}, {batch} a step", f"{np.mean(values):.1%} ± {np.std(values):.1%}"]
            cells += [f"{enough:,.0f}", f"{n / enough:.0f}"] if enough else ["", ""]
            table.add(*cells)
    note = (
        f"DW-4, {N_STEPS} steps, isotropic covariance, forward ESS on {len(test):,} held-out "
        f"trajectories. Empty: less than {min(CONVEX)}. The paper's own setting is 5,000 steps "
        f"with 512, {PAPER:,} trajectories. Measured on "
    )
    write_table("tuning", table, note, torch.device("cpu"))
    figure = new_figure(6.0, 4.0)
    ax = figure.add_subplot()
    for (name, curve), colour in zip(curves.items(), (BLUE, GREEN, RED, ORANGE), strict=True):
        mean, spread = (np.array([f(v) for v in curve.values()]) for f in (np.mean, np.std))
        ax.errorbar(
            list(curve), 100 * mean, 100 * spread, marker="o", capsize=2, label=name, color=colour
        )
    ax.axvline(PAPER, color="grey", linestyle=":", label="the paper's setting")
    ax.set(xscale="log", xlabel="trajectories simulated", ylabel="forward ESS / %")
    figure.legend(loc="outside upper center", ncols=2, frameon=False, fontsize="small")
    write_figure("tuning", figure)


if __name__ == "__main__":
    main()
