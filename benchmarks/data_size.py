"""How much MD is enough? One small DW-4 model a data set of 100 to 30,000 independent frames.

    python -m benchmarks.data_size

Each model is trained and tuned on its frames alone, and judged twice: by the last fifth of them, as
a user without more data has to, and by 10,000 forward trajectories from an independent run. Writes
``docs/tables/data-size.md`` and ``docs/figures/data-size.png``; results stay in
``benchmarks/results/data-size.json`` and are not measured again.
"""

from __future__ import annotations

import json
from typing import Any

import numpy as np
from matplotlib.axes import Axes
from matplotlib.figure import Figure

from benchmarks.run import RESULTS, forward_part
from benchmarks.tables import DOCS
from openmm_vtdis import DiffusionBoltzmannGenerator
from openmm_vtdis.plotting import ess_curve
from openmm_vtdis.storage.atomic import write_atomically
from openmm_vtdis.targets import double_well
from recipes.reference import reference_frames

SIZES = (100, 300, 1_000, 3_000, 10_000, 30_000)
NETWORK, N_ITERATIONS, BATCH_SIZE, N_STEPS, SEED = "egnn-3x64", 4_000, 256, 50, 51
RESULT = RESULTS / "data-size.json"


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


def table(rows: list[dict[str, Any]]) -> str:
    """As a docs table."""
    text = (
        "| frames | training loss | held-out loss: last | least | ESS by own frames "
        "| ESS by an independent run |\n|---|---|---|---|---|---|\n"
    )
    for row in rows:
        ess, error = row["forward_ess"]
        text += (
            f"| {row['n']:,} | {row['loss']:.3f} | {row['held_out_loss']:.3f} "
            f"| {row['best_held_out_loss']:.3f} | {row['own_ess']:.1%} "
            f"| {100 * ess:.1f} ± {100 * error:.1f} % |\n"
        )
    return text


def draw(rows: list[dict[str, Any]], left: Axes, right: Axes) -> None:
    """Losses and ESS over the number of frames."""
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
    rows = json.loads(RESULT.read_text()) if RESULT.exists() else []
    train, test = (reference_frames("dw4", split) for split in ("train", "test"))
    rng = np.random.default_rng(SEED)
    train, test = rng.permutation(train), rng.permutation(test)
    for n in SIZES:
        if n not in [row["n"] for row in rows]:
            rows.append(measure(n, train, test))
            write_atomically(RESULT, (json.dumps(rows, indent=1) + "\n").encode())
            print(table(rows[-1:]).splitlines()[-1], flush=True)
    write_atomically(DOCS / "tables" / "data-size.md", table(rows).encode())
    figure = Figure(figsize=(9.6, 3.8), layout="constrained")
    draw(rows, *figure.subplots(1, 2))
    figure.savefig(DOCS / "figures" / "data-size.png", dpi=110)


if __name__ == "__main__":
    main()
