"""How much MD is enough? A small DW-4 model for each of several numbers of independent frames.

    python -m benchmarks.data_size

Each model is trained and tuned on its frames alone, and judged twice: by the last fifth of them, as
a user without more data has to, and by 10,000 forward trajectories from an independent run. Writes
``docs/tables/data-size.md`` and ``docs/figures/data-size.png``; results stay in
``benchmarks/results/data-size.json`` and are not measured again.
"""

from __future__ import annotations

from typing import Any

import numpy as np
from matplotlib.axes import Axes

from benchmarks.harness import (
    MarkdownTable,
    command_line,
    new_figure,
    percent,
    read_result,
    write_figure,
    write_page,
    write_result,
)
from benchmarks.rows import forward_part
from openmm_vtdis import DiffusionBoltzmannGenerator
from openmm_vtdis.plotting import ess_curve
from openmm_vtdis.targets import double_well
from recipes.reference import reference_frames

SIZES = (100, 300, 1_000, 3_000, 10_000, 30_000)
NETWORK, N_ITERATIONS, BATCH_SIZE, N_STEPS, SEED = "egnn-3x64", 4_000, 256, 50, 51
RESULT = "data-size"
COLUMNS = (
    "frames",
    "training loss",
    "held-out loss: last",
    "least",
    "ESS by own frames",
    "ESS by an independent run",
)


def measure(n: int, train: np.ndarray, test: np.ndarray) -> dict[str, Any]:
    """Train and tune on the first n frames."""
    bench = double_well()
    gen = DiffusionBoltzmannGenerator(
        bench.system, None, bench.temperature, n_dims=2, network=NETWORK, seed=SEED
    )
    log = gen.train(train[:n], N_ITERATIONS, batch_size=BATCH_SIZE, seed=SEED, progress=False)
    report = gen.tune(train[:n], N_STEPS, "isotropic", seed=SEED, progress=False)
    return {
        "n": n,
        "loss": log.losses[-1],
        "held_out_loss": log.held_out_losses[-1],
        "best_held_out_loss": min(log.held_out_losses),
        "own_ess": report.forward_ess_test,
        **forward_part(gen.log_weights(test[:10_000], seed=SEED, progress=False)),
    }


def cells(row: dict[str, Any]) -> list[str]:
    """Cells of a row of the table."""
    losses = (row[key] for key in ("loss", "held_out_loss", "best_held_out_loss"))
    return [
        f"{row['n']:,}",
        *(f"{loss:.3f}" for loss in losses),
        f"{row['own_ess']:.1%}",
        percent(*row["forward_ess"]),
    ]


def draw(rows: list[dict[str, Any]], left: Axes, right: Axes) -> None:
    """Draw losses and ESS over the number of frames."""
    sizes = [row["n"] for row in rows]
    left.plot(sizes, [row["loss"] for row in rows], marker="o", label="training frames")
    left.plot(sizes, [row["held_out_loss"] for row in rows], marker="o", ls="--", label="held out")
    left.set(xscale="log", xlabel="independent frames", ylabel="denoising loss after training")
    left.legend(frameon=False)
    independent = [row["forward_ess"][0] for row in rows]
    ess_curve(sizes, independent, label="independent run", ax=right)
    ess_curve(sizes, [row["own_ess"] for row in rows], label="own held-out frames", ax=right)
    right.set(xscale="log", xlabel="independent frames", ylabel="forward ESS")


def main() -> None:
    """Measure what is missing; write table and figure."""
    command_line(__doc__).parse_args()
    rows = {row["n"]: row for row in read_result(RESULT, [])}
    train, test = (reference_frames("dw4", split) for split in ("train", "test"))
    rng = np.random.default_rng(SEED)
    train, test = rng.permutation(train), rng.permutation(test)
    table = MarkdownTable(*COLUMNS)
    for n in SIZES:
        if n not in rows:
            rows[n] = measure(n, train, test)
            write_result(RESULT, list(rows.values()))
        table.add(*cells(rows[n]))
    write_page(RESULT, str(table))
    figure = new_figure(9.6, 3.8)
    draw([rows[n] for n in SIZES], *figure.subplots(1, 2))
    write_figure(RESULT, figure)


if __name__ == "__main__":
    main()
