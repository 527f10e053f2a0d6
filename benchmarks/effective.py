"""Effective samples a second: the package as it ships, and the paper's method written plainly.

    python -m benchmarks.effective

The baseline is the edge-list network of :mod:`benchmarks.baseline` with its loop over the steps and
the tuned isotropic covariance on a geometric grid, whose ESS stands in ``benchmarks/results`` (one
convex fit reaches what the paper's gradient descent does: see the rows "SGD" of DW-4). Where that
has not been measured, and in the last column everywhere, it has the package's adaptive grid. Its
network is the package's, and where that is smaller than the paper's, one of the paper's size in a
second line.

Each side runs at that number of steps of its rows which gives it the most effective samples a step,
of those with weights that are reliable by the package's own measure, if there are any. ESS is the
reverse one, or the forward one where that is lower. Both sides draw the same number of samples,
with their energies and weights, in alternating rounds. The ESS is that of the networks in float32,
in whatever form they are timed (:mod:`benchmarks.precision` has what bfloat16 makes of it). Writes
``docs/tables/effective.md``.
"""

from __future__ import annotations

import itertools

import numpy as np
import torch
from torch import Tensor

from benchmarks.baseline import EdgeListEGNN, sample
from benchmarks.forms import FORMS, half_precision, in_form
from benchmarks.harness import (
    MarkdownTable,
    command_line,
    in_turns,
    spread,
    system_rows,
    write_table,
)
from benchmarks.methods import AS_SHIPPED
from benchmarks.rows import Row, lower_ess, most_effective, per_step
from openmm_vtdis import DiffusionBoltzmannGenerator
from openmm_vtdis.diffusion.denoiser import PreconditionedDenoiser
from openmm_vtdis.diffusion.schedule import Schedule

SYSTEMS = ("dw4", "dw4-small", "lj13", "aldp-800K")
OF_THE_PAPERS_SIZE = {"dw4-small": "dw4"}
"""Generators with a smaller network, and those with one of the paper's size."""
PAPERS, ADAPTIVE = "isotropic, alpha = 2", "isotropic, adaptive grid"
BATCH = {
    "cpu": {"dw4": 256, "dw4-small": 256},
    "cuda": {"dw4": 32_768, "dw4-small": 32_768, "lj13": 8_192, "aldp-800K": 1_024},
}
"""Samples in a round; 64 if not listed."""
COLUMNS = (
    *("system", "baseline's network", "package, as", "samples"),
    *("steps", "ESS", "ms a sample", "effective / s"),
    *("baseline: steps", "ESS", "ms a sample", "effective / s"),
    *("ratio", "on the package's grid"),
)


def best(name: str, *methods: str) -> Row | None:
    """The most effective row of the first method that has any."""
    rows = system_rows(name).values()
    for method in methods:
        mine = [row for row in rows if row["method"] == method]
        if mine:
            return most_effective(mine)
    return None


def measure(
    name: str, plain_name: str, form: str, n_rounds: int, batch_size: int, device: torch.device
) -> list[str]:
    """Measure a row of the table: a generator, and the baseline with weights of ``plain_name``."""
    torch.compiler.reset()
    gen = in_form(name, form, device)
    weights = DiffusionBoltzmannGenerator.from_pretrained(plain_name)
    network = EdgeListEGNN(weights.network).to(device)  # type: ignore[arg-type]
    plain = PreconditionedDenoiser(network, gen.space).eval()
    assert weights.process is not None
    times = weights.process.schedule.times
    ours, theirs = best(name, AS_SHIPPED), best(plain_name, PAPERS, ADAPTIVE)
    assert ours is not None
    assert theirs is not None
    grid = Schedule.geometric(theirs["n_steps"], times[0], times[-1])

    def package() -> object:
        with half_precision(form, device):
            return gen.sample(
                batch_size, n_steps=ours["n_steps"], batch_size=batch_size, seed=0, progress=False
            )

    def baseline() -> Tensor:
        x, log_ratio = sample(plain, grid, batch_size, torch.Generator(device).manual_seed(0))
        return log_ratio - gen.target.reduced_energy(gen.coordinates.length * x)

    pairs = in_turns([package, baseline], n_rounds, device) / batch_size
    ess = np.array([lower_ess(ours), lower_ess(theirs)])
    rates = ess[:, 0] / pairs
    ratio = rates[:, 0] / rates[:, 1]
    cells = [name, plain_name, form, f"{batch_size:,}"]
    for k, row in enumerate((ours, theirs)):
        cells += [
            str(row["n_steps"]),
            f"{100 * ess[k, 0]:.3g} ± {100 * ess[k, 1]:.2g} %",
            f"{1e3 * np.median(pairs[:, k]):.3g}",
            f"{np.median(rates[:, k]):.3g}",
        ]
    cells.append(spread(ratio, ".3g"))
    adaptive = best(plain_name, ADAPTIVE)
    gain = per_step(adaptive) / per_step(theirs) if adaptive else None
    return [*cells, f"{np.median(ratio) / gain:.3g}" if gain else ""]


def main() -> None:
    """Command line entry."""
    parser = command_line(__doc__, systems=SYSTEMS, rounds=5, device=True)
    parser.add_argument("--batch-size", type=int, help="default: one that fills the device")
    options = parser.parse_args()
    device = options.device
    table = MarkdownTable(*COLUMNS)
    for name in options.systems:
        size = options.batch_size or BATCH[device.type].get(name, 64)
        networks = dict.fromkeys((name, OF_THE_PAPERS_SIZE.get(name, name)))
        for plain_name, form in itertools.product(networks, FORMS[device.type]):
            table.add(*measure(name, plain_name, form, options.rounds, size, device))
    note = (
        f"Median (and range of the ratio) of {options.rounds} alternating rounds, each of one "
        "batch; ESS: the lower of the two directions, from the tables of the systems. The range "
        "is of times alone: the ESS have their own errors. Last: the ratio if the baseline had the "
        "ESS a step of its best row on an adaptive grid. Measured on "
    )
    write_table("effective", table, note, device)


if __name__ == "__main__":
    main()
