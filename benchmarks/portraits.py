"""Pictures of weights, of a grid and of a pool of states: the shipped DW-4, at two temperatures.

    python -m benchmarks.portraits

Draws 2,000 samples, and as many frames by Hamiltonian Monte Carlo at either temperature: the
generator's own, and three times that. Reweighted to the latter, samples have weights that one
should not trust; pooled with frames from there they tell log Z. Writes ``dw4-weights.png``,
``dw4-step-cost.png`` and ``dw4-overlap.png`` of ``docs/figures``, in four minutes of a CPU core.
"""

from __future__ import annotations

import torch
from matplotlib.figure import Figure
from openmm import unit

from benchmarks.harness import command_line, new_figure, write_figure
from openmm_vtdis import DiffusionBoltzmannGenerator, WeightedEnsemble
from openmm_vtdis.core.rng import make_rng
from openmm_vtdis.diffusion.schedule import Schedule
from openmm_vtdis.ensemble import mbar
from openmm_vtdis.mcmc import sample_hmc
from openmm_vtdis.plotting import overlap_matrix, pareto_tail, step_cost, weight_distribution
from openmm_vtdis.targets import OpenMMTarget
from openmm_vtdis.tuning import adaptive_schedule

NAME, HOTTER, SEED = "dw4", 3.0, 7


def frames(target: OpenMMTarget, n: int) -> torch.Tensor:
    """Draw n configurations (n, M, D), four from each of many chains."""
    run = sample_hmc(target, n_chains=n // 4, n_samples=4, thin=10, burn_in=150, seed=SEED)
    return run.positions


def draw_weights(ensembles: dict[str, WeightedEnsemble], figure: Figure) -> None:
    """Draw all weights above and the largest below, with a column for each ensemble."""
    columns = figure.subplots(2, len(ensembles)).T
    for (above, below), (label, ensemble) in zip(columns, ensembles.items(), strict=True):
        weight_distribution(ensemble, above, label=label)
        pareto_tail(ensemble.log_weights, below, label=label)


def draw_cost(gen: DiffusionBoltzmannGenerator, x: torch.Tensor, figure: Figure) -> None:
    """Draw the cost of a step over the noise level, measured as ``tune`` does, and the grid."""
    times = gen.process.schedule.times
    levels = Schedule.geometric(adaptive_schedule.N_LEVELS - 1, times[0], times[-1]).tensor
    errors = adaptive_schedule.denoising_errors(
        gen.denoiser, x / gen.coordinates.length, levels, make_rng(SEED)
    )
    step_cost(
        levels, adaptive_schedule.step_cost(levels, errors, gen.space.dim), times, figure.subplots()
    )


def main() -> None:
    """Draw samples and frames, then the figures."""
    parser = command_line(__doc__)
    parser.add_argument("-n", type=int, default=2_000)
    n = parser.parse_args().n
    gen = DiffusionBoltzmannGenerator.from_pretrained(NAME)
    hot = OpenMMTarget(gen.target.system, None, HOTTER * gen.temperature * unit.kelvin, n_dims=2)
    states = [gen.target, hot]
    names = [f"{target.temperature:.0f} K" for target in states]
    ensemble, md = gen.sample(n, seed=SEED), [frames(target, n) for target in states]
    log_w = [gen.log_weights(x.numpy(), seed=SEED) for x in md]
    pool = mbar(ensemble, states, [x.numpy() for x in md], log_w)
    for k, name in enumerate(names):
        print(
            f"log Z at {name}: {ensemble.reweight(states[k]).log_z()} alone, {pool.log_z(k)} pooled"
        )

    weights, cost, overlap = (new_figure(*size) for size in ((9.6, 6.4), (6.0, 3.8), (4.8, 3.8)))
    drawn = {f"samples, {names[0]}": ensemble, f"reweighted, {names[1]}": ensemble.reweight(hot)}
    draw_weights(drawn, weights)
    draw_cost(gen, md[0], cost)
    overlap_matrix(
        pool.overlap, ["generator", *(f"MD, {name}" for name in names)], overlap.subplots()
    )
    for name, figure in {"weights": weights, "step-cost": cost, "overlap": overlap}.items():
        write_figure(f"{NAME}-{name}", figure)


if __name__ == "__main__":
    main()
