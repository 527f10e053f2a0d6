"""Growth of time and memory with particles, batch, steps and samples.

    python -m benchmarks.scaling
    python -m benchmarks.scaling --device cuda

On a CPU each point runs in a process of its own, whose peak memory is known. Networks are
untrained: their time does not depend on what they know. Exponents are slopes of a line through the
logarithms of the upper half of each series. Writes ``docs/tables/scaling.md`` and
``docs/figures/scaling.png``.
"""

from __future__ import annotations

import gc
import json
import resource
import subprocess
import sys
import tempfile
from pathlib import Path

import numpy as np
import torch
from matplotlib.ticker import NullFormatter

from benchmarks.harness import (
    MarkdownTable,
    command_line,
    median_seconds,
    named,
    new_figure,
    seconds,
    write_figure,
    write_table,
)
from openmm_vtdis import DiffusionBoltzmannGenerator
from openmm_vtdis.core.space import Space
from openmm_vtdis.diffusion.covariance import make_covariance
from openmm_vtdis.diffusion.denoiser import PreconditionedDenoiser
from openmm_vtdis.diffusion.paths import reverse_paths
from openmm_vtdis.diffusion.process import DiffusionProcess
from openmm_vtdis.diffusion.schedule import Schedule
from openmm_vtdis.generator.sharded import sample_to_file
from openmm_vtdis.networks import EGNN
from openmm_vtdis.targets import double_well

N_PARTICLES, BATCH, STEPS = 22, 32, 4
SERIES: dict[str, list[int]] = {
    "particles": [4, 8, 16, 32, 64, 100],
    "batch": [1, 4, 16, 64, 256],
    "steps": [10, 20, 40, 80, 160],
    "samples": [1_000, 10_000, 100_000, 1_000_000],
}
ON_A_GPU = {"batch": [1, 16, 256, 4_096, 16_384]}
COVARIANCES = ("isotropic", "pairwise")
MEMORY = {
    "cpu": "Memory is that of the whole process, imports included.",
    "cuda": "Memory is what was allocated on the GPU.",
}


def make_process(
    n_particles: int, n_steps: int, covariance: str, device: torch.device
) -> DiffusionProcess:
    """An untrained 4 x 64 network on distinct particles."""
    torch.manual_seed(0)
    network = EGNN(list(range(n_particles)), 3, 4, 64, pair_head=64).to(device)
    denoiser = PreconditionedDenoiser(network, Space(n_particles, 3)).eval()
    schedule = Schedule.geometric(n_steps, 0.1, 10.0)
    plain = DiffusionProcess.ddpm(denoiser, schedule)
    family = make_covariance(covariance, plain.space, list(range(n_particles)))
    return plain.with_covariance(family.with_parameters(family.ddpm_parameters(schedule)))


def paths_seconds(setting: dict[str, int], covariance: str, device: torch.device) -> float:
    """Seconds of one batch of reverse trajectories."""
    process = make_process(setting["particles"], setting["steps"], covariance, device)
    rng, size = torch.Generator(device).manual_seed(0), setting["batch"]
    return median_seconds(
        lambda: reverse_paths(process, size, rng, size, progress=False), 3, device
    )


def file_seconds(n: int, device: torch.device) -> float:
    """Seconds of n samples of a tiny network, streamed to NetCDF."""
    system = double_well()
    gen = DiffusionBoltzmannGenerator(
        system.system, None, system.temperature, n_dims=2, network="egnn-1x8", seed=0, device=device
    )
    frames = system.positions + 0.2 * np.random.default_rng(0).normal(size=(400, 4, 2))
    gen.train(frames, 2, batch_size=16, progress=False)
    gen.tune(
        frames, STEPS, "isotropic", schedule="geometric", n_trajectories=200, seed=0, progress=False
    )
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "samples.nc"
        return seconds(
            lambda: sample_to_file(gen, path, n, shard_size=5_000, progress=False), device
        )


def point(series: str, value: int, covariance: str, device: torch.device) -> dict[str, float]:
    """Seconds and peak memory of one point, in this process."""
    if device.type != "cpu":
        gc.collect()
        torch.cuda.empty_cache()
        torch.cuda.reset_peak_memory_stats()
    if series == "samples":
        took = file_seconds(value, device)
    else:
        setting = {"particles": N_PARTICLES, "batch": BATCH, "steps": STEPS, series: value}
        took = paths_seconds(setting, covariance, device)
    peak = 1024.0 * resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    if device.type != "cpu":
        peak = float(torch.cuda.max_memory_allocated())
    return {"seconds": took, "gigabytes": peak / 1e9}


def measure(series: str, value: int, covariance: str, device: torch.device) -> dict[str, float]:
    """Measure one point, on a CPU in a process of its own."""
    if device.type != "cpu":
        return point(series, value, covariance, device)
    script = [sys.executable, "-m", "benchmarks.scaling"]
    done = subprocess.run(
        [*script, "--point", series, str(value), covariance],
        check=True, capture_output=True, text=True,
    )  # fmt: skip
    return json.loads(done.stdout)  # type: ignore[no-any-return]


def exponent(x: list[int], y: list[float]) -> float:
    """Slope of log y over log x in the upper half of x."""
    half = len(x) // 2
    return float(np.polyfit(np.log(x[half:]), np.log(y[half:]), 1)[0])


def main() -> None:
    """Command line entry."""
    parser = command_line(__doc__, rounds=3, device=True)
    parser.add_argument("--point", nargs=3, metavar=("SERIES", "VALUE", "COVARIANCE"))
    options = parser.parse_args()
    device = options.device
    if options.point:
        series, value, covariance = options.point
        print(json.dumps(point(series, int(value), covariance, device)))
        return
    columns = "series", "covariance", "values", "seconds", "exponent", "peak memory, GB"
    table = MarkdownTable(*columns)
    figure = new_figure(12.0, 6.0)
    axes = figure.subplots(2, 4, sharex="col")
    series_of_all = SERIES | (ON_A_GPU if device.type != "cpu" else {})
    for column, (series, values) in enumerate(series_of_all.items()):
        for covariance in COVARIANCES if series != "samples" else COVARIANCES[:1]:
            n_rounds = options.rounds if series != "samples" else 1
            rounds = [
                [measure(series, value, covariance, device) for value in values]
                for _ in range(n_rounds)
            ]
            took, memory = (
                np.median([[row[key] for row in rows] for rows in rounds], axis=0).tolist()
                for key in ("seconds", "gigabytes")
            )
            table.add(
                series,
                covariance,
                ", ".join(f"{value:,}" for value in values),
                ", ".join(f"{value:.2g}" for value in took),
                f"{exponent(values, took):.2f}",
                ", ".join(f"{value:.2f}" for value in memory),
            )
            axes[0, column].loglog(values, took, "o-", label=covariance)
            axes[1, column].semilogx(values, memory, "o-")
        for ax in axes[:, column]:
            ax.grid(True, color="0.9", lw=0.6)
        axes[1, column].set(xlabel=series, ylim=(0.0, None))
        axes[1, column].xaxis.set_minor_formatter(NullFormatter())
        axes[0, column].legend(frameon=False)
    axes[0, 0].set_ylabel("seconds")
    axes[1, 0].set_ylabel("peak memory / GB")
    write_figure(named("scaling", device), figure)
    note = (
        f"Of {N_PARTICLES} particles, {STEPS} steps and batches of {BATCH}, all but one of them "
        f"fixed; a network of 4 layers x 64. Samples: DW-4, a network of 1 x 8, {STEPS} steps, "
        f"shards of 5,000. Rounds over all values: {options.rounds}, the median (samples: 1). "
        f"Exponents: of the upper half of the values. {MEMORY[device.type]} On "
    )
    write_table("scaling", table, note, device)


if __name__ == "__main__":
    main()
