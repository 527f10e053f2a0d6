"""Benchmark tables: method x steps, forward and reverse, on held-out data.

    python benchmarks/run.py dw4 lj13 gmm2 [--samples 20000] [--steps 25 50 100 200]

Each system writes ``benchmarks/results/<system>.json`` after every row, so that an interrupted run
loses nothing and goes on where it stopped, and figures under ``docs/figures``. Tuning uses the
training frames; every ESS is measured on test frames of another seed, or on fresh samples.
"""

from __future__ import annotations

import argparse
import json
import os
import platform
import time
from pathlib import Path
from typing import Any

import numpy as np
import torch
from matplotlib.figure import Figure
from torch.utils.flop_counter import FlopCounterMode

from openmm_vtdis import DiffusionBoltzmannGenerator
from openmm_vtdis.ensemble import forward_ess, pareto_k, reverse_ess
from openmm_vtdis.plotting import ess_curve, ess_versus_samples
from openmm_vtdis.pretrained.train import reference_frames
from openmm_vtdis.storage import write_atomically
from openmm_vtdis.targets import gaussian_mixture

RESULTS = Path(__file__).parent / "results"
FIGURES = Path(__file__).parents[1] / "docs" / "figures"
SEED = 2024


def gflops_per_evaluation(gen: DiffusionBoltzmannGenerator) -> float:
    """Matrix-multiplication GFLOPs of one denoiser call for one configuration."""
    n = 8
    x = gen.space.standard_normal(n, torch.Generator().manual_seed(0))
    with torch.no_grad(), FlopCounterMode(display=False) as counter:
        gen.denoiser(x, torch.ones(n, dtype=x.dtype))
    return counter.get_total_flops() / n / 1e9


def measure(
    gen: DiffusionBoltzmannGenerator, test: np.ndarray, n_samples: int, ode: bool = False
) -> dict[str, Any]:
    """Both ESS, Pareto k and cost of a tuned generator."""
    index = np.random.default_rng(SEED).integers(len(test), size=n_samples)
    forward = gen.noise_ode if ode else gen.noise
    backward = gen.sample_ode if ode else gen.sample
    noised = forward(test[index], seed=SEED, progress=False)
    began = time.perf_counter()
    ensemble = backward(n_samples, seed=SEED + 1, progress=False)
    seconds = time.perf_counter() - began
    n_steps = gen.kernel.schedule.n_steps  # type: ignore[union-attr]
    calls = 2 * n_steps * (1 + 2 * gen.space.dim) if ode else n_steps
    diagnostics = ensemble.diagnostics()
    energy = ensemble.expectation(ensemble.reduced_energies)
    raw = ensemble.with_log_weights(np.zeros(n_samples)).expectation(ensemble.reduced_energies)
    return {
        "n_samples": n_samples,
        "forward_ess": forward_ess(noised),
        "reverse_ess": reverse_ess(ensemble.log_weights),
        "pareto_k": diagnostics.pareto_k,
        "forward_pareto_k": pareto_k(noised),
        "largest_weight_share": diagnostics.largest_weight_share,
        "log_z": [float(ensemble.log_z().value), float(ensemble.log_z().stderr)],
        "energy": [float(energy.value), float(energy.stderr)],
        "raw_energy": [float(raw.value), float(raw.stderr)],
        "gflops_per_sample": calls * gflops_per_evaluation(gen),
        "sampling_seconds": seconds,
    }


METHODS: dict[str, dict[str, Any]] = {
    "DDPM + IS": {"objective": "ddpm"},
    "isotropic, KL": {"objective": "kl"},
    "isotropic, alpha = 2": {},
    "isotropic + mean, alpha = 2": {"tune_mean": True},
    "time network, alpha = 2": {"covariance": "time-network"},
}
FREE_METHODS: dict[str, dict[str, Any]] = {
    "diagonal, alpha = 2": {"covariance": "diagonal"},
    "full, alpha = 2": {"covariance": "full"},
}


def run(
    name: str,
    gen: DiffusionBoltzmannGenerator,
    train: np.ndarray,
    test: np.ndarray,
    methods: dict[str, dict[str, Any]],
    steps: list[int],
    n_samples: int,
    ode_steps: int | None,
    n_ode: int,
    sgd_iterations: int,
) -> None:
    """Fill ``results/<name>.json``, one row at a time."""
    path = RESULTS / f"{name}.json"
    rows: dict[str, Any] = json.loads(path.read_text())["rows"] if path.exists() else {}

    def store(key: str, row: dict[str, Any]) -> None:
        rows[key] = row
        document = {
            "system": name,
            "machine": f"{platform.machine()}, {os.cpu_count()} cores, "
            f"{torch.get_num_threads()} torch threads",
            "torch": torch.__version__,
            "rows": rows,
        }
        RESULTS.mkdir(exist_ok=True)
        write_atomically(path, (json.dumps(document, indent=1) + "\n").encode())
        both = f"forward {row['forward_ess']:.2%} reverse {row['reverse_ess']:.2%}"
        print(f"{name}  {key:<40} {both}", flush=True)

    for n_steps in steps:
        for label, options in methods.items():
            key = f"{label} @ {n_steps}"
            if key in rows:
                continue
            report = gen.tune(
                train, n_steps, n_trajectories=20_000, seed=SEED, progress=False, **options
            )
            row = {"method": label, "n_steps": n_steps, **measure(gen, test, n_samples)}
            row |= {
                "tuning_seconds": report.seconds,
                "fit_seconds": report.fit_seconds,
                "tuning_evaluations": report.n_network_evaluations,
                "eta": report.eta[:, 0].tolist(),
                "times": report.times.tolist(),
            }
            store(key, row)
    if ode_steps is not None and f"PF-ODE, exact @ {ode_steps}" not in rows:
        gen.tune(train, ode_steps, n_trajectories=1_000, seed=SEED, progress=False)
        row = {"method": "PF-ODE, exact", "n_steps": ode_steps}
        store(f"PF-ODE, exact @ {ode_steps}", row | measure(gen, test, n_ode, ode=True))
    if sgd_iterations and f"isotropic, SGD @ {steps[-2]}" not in rows:
        report = gen.tune(
            train, steps[-2], method="sgd", sgd_iterations=sgd_iterations, seed=SEED
        )  # fmt: skip
        row = {"method": "isotropic, SGD", "n_steps": steps[-2], **measure(gen, test, n_samples)}
        row |= {
            "tuning_seconds": report.seconds,
            "tuning_evaluations": report.n_network_evaluations,
            "sgd_iterations": sgd_iterations,
        }
        store(f"isotropic, SGD @ {steps[-2]}", row)
    draw(name, gen, test, train, rows, n_samples)


def draw(
    name: str,
    gen: DiffusionBoltzmannGenerator,
    test: np.ndarray,
    train: np.ndarray,
    rows: dict[str, Any],
    n_samples: int,
) -> None:
    """Figures: ESS against steps for every method; ESS against samples for KL and alpha = 2."""
    FIGURES.mkdir(parents=True, exist_ok=True)
    figure = Figure(figsize=(6, 4), layout="constrained")
    ax = figure.subplots()
    labels = sorted({row["method"] for row in rows.values() if "PF-ODE" not in row["method"]})
    for label in labels:
        some = [row for row in rows.values() if row["method"] == label]
        some.sort(key=lambda row: row["n_steps"])
        ess_curve(
            [r["n_steps"] for r in some],
            [r["forward_ess"] for r in some],
            [r["reverse_ess"] for r in some],
            label,
            ax,
        )
    figure.savefig(FIGURES / f"{name}-ess-steps.png", dpi=120)
    weights = {}
    for label in ("kl", "alpha2"):
        gen.tune(train, 100, objective=label, n_trajectories=20_000, seed=SEED, progress=False)
        weights[label] = gen.sample(n_samples, seed=SEED + 2, progress=False).log_weights
    figure = Figure(figsize=(6, 4), layout="constrained")
    ess_versus_samples(weights, figure.subplots())
    figure.savefig(FIGURES / f"{name}-ess-samples.png", dpi=120)


def main() -> None:
    """Command line entry."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])  # type: ignore[union-attr]
    parser.add_argument("systems", nargs="*", default=["gmm2", "dw4", "lj13"])
    parser.add_argument("--samples", type=int, default=20_000)
    parser.add_argument("--ode-samples", type=int, default=20_000)
    parser.add_argument("--steps", type=int, nargs="+")
    parser.add_argument("--sgd-iterations", type=int, default=5_000)
    options = parser.parse_args()
    for name in options.systems:
        if name == "gmm2":
            for dim in (50, 100):
                target = gaussian_mixture(dim)
                denoiser = oracle_denoiser(target)
                gen = DiffusionBoltzmannGenerator.from_denoiser(target, denoiser)
                train, test = target.sample(50_000, seed=1), target.sample(50_000, seed=2)
                methods = {k: v for k, v in METHODS.items() if "mean" not in k} | FREE_METHODS
                run(
                    f"gmm2-{dim}", gen, train.numpy(), test.numpy(), methods,
                    options.steps or [25, 50, 100, 200], options.samples, None, 0, 0,
                )  # fmt: skip
            continue
        gen = DiffusionBoltzmannGenerator.from_pretrained(name)
        default = [25, 50, 100, 200] + ([400] if name == "lj13" else [])
        run(
            name, gen, reference_frames(name, "train"), reference_frames(name, "test"), METHODS,
            options.steps or default, options.samples, 50, options.ode_samples,
            options.sgd_iterations,
        )  # fmt: skip


def oracle_denoiser(target: Any) -> Any:
    """The exact denoiser of GMM-2, in units of its own length."""
    from openmm_vtdis.diffusion.denoiser import GaussianMixtureDenoiser

    return GaussianMixtureDenoiser(target.space, target.weights, target.means, target.variances)


if __name__ == "__main__":
    main()
