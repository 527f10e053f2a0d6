"""Measure the benchmark tables: method x steps, forward and reverse ESS on held-out data.

    python -m benchmarks.run dw4
    python -m benchmarks.run lj13 --steps 200 --samples 20000
    python -m benchmarks.run gmm2-50 gmm2-100 gmm2-50-mlp gmm2-100-mlp
    python -m benchmarks.tables          # tables and figures from what has been measured

Rows go to ``benchmarks/results/<system>.json``, one at a time: an interrupted run loses nothing and
goes on where it stopped; a row that is there is not measured again (delete it to do so). Tuning
uses the training frames; forward ESS is measured on frames of another seed, reverse ESS on fresh
samples.

Samples, and frames noised by the tuning that an archive ships with, are kept under ``runs/`` in
pieces. Forward trajectories are simulated once for each number of steps and kept there too: with
a = x_{n-1} - x_n, b = D - x_n, the three numbers <a, a>, <a, b>, <b, b> a step serve every
isotropic covariance and every mean coefficient.
"""

from __future__ import annotations

import argparse
import functools
import json
import math
import time
from pathlib import Path
from typing import Any

import numpy as np
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor
from torch.utils.flop_counter import FlopCounterMode

from benchmarks.cases import (
    FIT_SEED,
    SAMPLE_SEED,
    SGD_SEED,
    TEST_SEED,
    Case,
    fingerprint_of,
    make_case,
)
from benchmarks.harness import cached, command_line, machine, system_rows, write_result
from benchmarks.methods import (
    AS_SHIPPED,
    CARRIED_FROM,
    ISOTROPIC,
    METHODS,
    MIXTURE,
    OWN_STATISTICS,
    Method,
)
from benchmarks.rows import Row, forward_part, reverse_part
from openmm_vtdis import DiffusionBoltzmannGenerator, WeightedEnsemble, storage
from openmm_vtdis.core.rng import make_rng
from openmm_vtdis.diffusion.covariance import Covariance, Fittable, make_covariance
from openmm_vtdis.diffusion.flow import Flow
from openmm_vtdis.diffusion.posteriors.jacobian import tangent_basis
from openmm_vtdis.diffusion.posteriors.laplace import LaplaceRange
from openmm_vtdis.diffusion.process import DiffusionProcess
from openmm_vtdis.diffusion.schedule import Schedule
from openmm_vtdis.storage.atomic import replacing
from openmm_vtdis.tuning.adaptive_schedule import adapt
from openmm_vtdis.tuning.fit import Fit, MeanCoefficients, Trajectories, fit, fit_sgd, log_weights
from openmm_vtdis.tuning.laplace_range import find_range
from openmm_vtdis.tuning.tune import collect

COUNTED = 32
"""Batch size for counting operations, some of which are done once for the whole batch."""
PIECE = {"cpu": 500, "cuda": 5_000}
"""Samples in a piece, the most that an interruption can cost."""


# -- forward trajectories ---------------------------------------------------------------------
def trajectories(
    case: Case,
    process: DiffusionProcess,
    family: Fittable,
    split: str,
    n: int,
    progress: bool,
    variant: str,
) -> Trajectories:
    """Simulate n forward trajectories from one split's frames, once and piece by piece."""
    label = f"{case.name}-{process.schedule.n_steps}-{type(family).__name__}-{split}-{variant}"
    level = 0.0 if process.laplace is None else process.laplace.level
    fingerprint = torch.tensor([*process.schedule.times, level, fingerprint_of(case.gen)])
    seed = FIT_SEED if split == "train" else TEST_SEED
    pieces = []
    whole = PIECE[case.gen.device.type]
    for k in range(math.ceil(n / whole)):
        size = min(whole, n - k * whole)
        path = cached(f"{label}-{size}-{k}.safetensors")
        stored = load_file(path) if path.exists() else {}
        if not stored or not torch.equal(stored["fingerprint"], fingerprint):
            frames = (case.train if split == "train" else case.test) / case.gen.coordinates.length
            rng = make_rng(seed + 1_000 * k, case.gen.device)
            data = collect(
                process, family, case.gen.model_energy, frames, size, rng,
                case.gen.batch_size(), progress,
            )  # fmt: skip
            stored = {"base": data.base, "statistics": data.statistics, "fingerprint": fingerprint}
            with replacing(path) as partial:
                save_file(stored, partial)
        pieces.append(stored)
    base, statistics = (torch.cat([p[name] for p in pieces]) for name in ("base", "statistics"))
    return Trajectories(base, statistics)


def split_fit(family: Any, data: Trajectories, schedule: Schedule, objective: str) -> Fit[Any]:
    """Fit on seven eighths, stop early on the last."""
    n = len(data) // 8
    return fit(family, data[:-n], schedule, objective, data[-n:])


# -- operations -------------------------------------------------------------------------------
def megaflops(gen: DiffusionBoltzmannGenerator, trace: bool = False) -> float:
    """Matrix-product MFLOPs of a denoiser call, or of one with its trace, per configuration."""
    x = gen.space.standard_normal(COUNTED, make_rng(0, gen.device))
    directions = tangent_basis(gen.space, x)[:, None].repeat(1, COUNTED, 1, 1)
    flow = Flow(gen.denoiser, directions, exact=True)
    with torch.no_grad(), FlopCounterMode(display=False) as counter:
        (flow.velocity_and_rate if trace else flow.velocity)(0.0, x)
    return counter.get_total_flops() / COUNTED / 1e6


def kernel_gigaflops(process: DiffusionProcess, device: torch.device) -> float:
    """Matrix-product GFLOPs of a trajectory: all steps, with what their covariances need.

    The energy's own derivatives, where they are used, and eigendecompositions are not products of
    matrices and do not count.
    """
    level = 0.0 if process.laplace is None else process.laplace.level
    alike: dict[bool, list[int]] = {}
    for n in range(1, process.schedule.n_steps + 1):
        alike.setdefault(process.schedule.times[n] <= level, []).append(n)
    total = 0
    for steps in alike.values():
        n = steps[0]
        noise = process.space.standard_normal(COUNTED, make_rng(n, device))
        x = (1.0 + process.schedule.times[n] ** 2) ** 0.5 * noise
        with torch.no_grad(), FlopCounterMode(display=False) as counter:
            process.covariance.at(process.step(n, x))
        total += counter.get_total_flops() * len(steps)
    return total / COUNTED / 1e9


# -- rows -------------------------------------------------------------------------------------
class SystemRows:
    """Rows of one system, stored whenever one is added."""

    def __init__(self, name: str) -> None:
        self.name = name
        self.rows = system_rows(name)

    def add(self, method: str, n_steps: int, row: Row) -> None:
        """Store a row beside those that other runs have stored, and print its ESS."""
        self.rows = system_rows(self.name)
        self.rows[f"{method} @ {n_steps}"] = {"method": method, "n_steps": n_steps, **row}
        write_result(self.name, {"system": self.name, "machine": machine(), "rows": self.rows})
        text = ", ".join(
            f"{way} {row[f'{way}_ess'][0]:.2%} ± {row[f'{way}_ess'][1]:.2%}"
            for way in ("forward", "reverse")
            if f"{way}_ess" in row
        )
        print(f"{self.name}  {method} @ {n_steps}:  {text}", flush=True)

    def lacks(self, method: str, n_steps: int) -> bool:
        """Whether that row has not been measured."""
        return f"{method} @ {n_steps}" not in self.rows


class Bench:
    """All rows of one case."""

    def __init__(self, case: Case, options: argparse.Namespace) -> None:
        self.case, self.options = case, options
        self.rows = SystemRows(case.name)
        self.gen, self.shipped = case.gen, case.gen.process
        self.times: tuple[float, float] = self._ends()
        self.grids: dict[str, Schedule] = {}

    def _ends(self) -> tuple[float, float]:
        """Ends of the grid: those of the shipped tuning, or the default for the data."""
        if self.gen.process is None:
            frames = self.case.train[:2000]
            self.gen.tune(frames, 2, n_trajectories=100, objective="ddpm", progress=False)
        times = self.gen.process.schedule.times  # type: ignore[union-attr]
        return times[0], times[-1]

    def ddpm(self, n_steps: int, grid: str = "geometric") -> DiffusionProcess:
        """The untuned process on a grid of n_steps."""
        if grid not in self.grids:
            fine = Schedule.geometric(1_000, *self.times)
            if grid == "adaptive":
                fine = adapt(fine, self.gen.denoiser, self.frames, self.seeded(), progress=False)
            self.grids[grid] = fine
        schedule = self.grids[grid].with_n_steps(n_steps)
        return DiffusionProcess.ddpm(self.gen.denoiser, schedule, self.gen.model_energy)

    @property
    def frames(self) -> Tensor:
        """Training frames in model coordinates."""
        return self.gen.space.project(self.case.train / self.gen.coordinates.length)

    def seeded(self) -> torch.Generator:
        """An rng for measurements before a fit."""
        return make_rng(FIT_SEED, self.gen.device)

    @functools.cached_property
    def laplace_range(self) -> LaplaceRange:
        """The range of the Laplace approximation, measured once for all numbers of steps."""
        low, high, energy = self.times[0], min(self.times[1], 1.0), self.gen.model_energy
        return find_range(
            energy, self.gen.denoiser, self.frames, low, high, self.seeded(), progress=False
        )

    def untuned(self, method: Method, n_steps: int) -> DiffusionProcess:
        """The process that a method's trajectories are simulated with."""
        process = self.ddpm(n_steps, method.grid)
        return process.with_laplace(self.laplace_range) if method.laplace else process

    def data(self, n_steps: int, family: Fittable, split: str, method: Method) -> Trajectories:
        """Forward trajectories of a split under the untuned process."""
        n = self.options.fit_trajectories if split == "train" else self.options.samples
        process, progress = self.untuned(method, n_steps), self.options.progress
        variant = f"{method.grid}{'-laplace' if method.laplace else ''}"
        return trajectories(self.case, process, family, split, n, progress, variant)

    def fitted(self, method: Method, n_steps: int) -> tuple[DiffusionProcess, Tensor, Row]:
        """The fitted process of a method, held-out forward log weights, and the fit's cost."""
        process, space = self.untuned(method, n_steps), self.gen.space
        schedule = process.schedule
        family: Covariance = make_covariance(method.family, space, self.gen.labels)
        if method.family in OWN_STATISTICS:
            train, test = (self.data(n_steps, family, split, method) for split in ("train", "test"))
        else:
            mean = MeanCoefficients(space, self.gen.labels, torch.zeros(1, 2))
            raw_train, raw_test = (
                self.data(n_steps, mean, split, method) for split in ("train", "test")
            )
            if method.tune_mean:
                mean_coefficients = split_fit(
                    mean, raw_train, schedule, method.objective
                ).fitted.mean_coefficients
                process = process.with_mean_coefficients(mean_coefficients)
            train, test = (
                Trajectories(d.base, mean.isotropic_statistics(d.statistics, process.coefficients))
                for d in (raw_train, raw_test)
            )
        if method.objective == "ddpm":
            best: Fit[Any] = Fit(process.covariance, math.nan, 0, 0.0)
        elif method.carried and n_steps != CARRIED_FROM:
            other, _, cost = self.fitted(method, CARRIED_FROM)
            carried = other.covariance.carried(other.schedule, schedule)
            return process.with_covariance(carried), log_weights(carried, test, schedule), cost
        else:
            best = split_fit(family, train, schedule, method.objective)
        process = process.with_covariance(best.fitted)
        cost = {"tuning_trajectories": len(train), "fit_seconds": best.seconds}
        return process, log_weights(best.fitted, test, schedule), cost

    def archived(self, n_steps: int) -> tuple[DiffusionProcess, Tensor, Row]:
        """The process that ships with the generator, with the rest as in :meth:`fitted`."""
        if self.shipped is None:
            raise ValueError(f"{self.case.name}: expected a generator that is tuned already")
        self.gen.process = process = self.shipped.with_n_steps(n_steps)
        rng, n = np.random.default_rng(TEST_SEED), self.options.samples
        frames = self.case.test[rng.choice(len(self.case.test), n, replace=False)]
        pieces, progress = [], self.options.progress
        for k, some in enumerate(frames.split(PIECE[self.gen.device.type])):
            path = self.piece(AS_SHIPPED, f"{n}-{k}-noised.npy")
            if not path.exists():
                log_w = self.gen.log_weights(some, seed=TEST_SEED + 1_000 * k, progress=progress)
                with replacing(path) as partial, partial.open("wb") as stream:
                    np.save(stream, log_w)
            pieces.append(np.load(path))
        return process, torch.tensor(np.concatenate(pieces)), {"tuning": "archive"}

    def piece(self, label: str, name: str) -> Path:
        """Path of a stored part of a row, for this network and this process."""
        process = self.gen.process
        about = json.dumps([process.describe(), fingerprint_of(self.gen)])
        digest = storage.fingerprint(about, process.covariance.parameters, process.coefficients)
        return cached(f"{self.case.name}-{label}-{digest[:12]}-{name}")

    def measure(self, label: str, n_steps: int, n_reverse: int) -> None:
        """Measure a row of a tuned method."""
        if not self.rows.lacks(label, n_steps):
            return
        if label == AS_SHIPPED:
            process, log_w, cost = self.archived(n_steps)
        else:
            process, log_w, cost = self.fitted(METHODS[label], n_steps)
        self.keep(label, n_steps, forward=log_w.numpy())
        gigaflops = kernel_gigaflops(process, self.gen.device)
        row = {**forward_part(log_w), **cost, "gflops_per_sample": gigaflops}
        if n_reverse:
            row |= self.reverse(process, label, n_reverse)
        eta = process.covariance.eta(process.schedule)[:, 0].detach()
        row |= {"eta": eta.tolist(), "times": list(process.schedule.times)}
        self.rows.add(label, n_steps, row)

    def reverse(self, process: DiffusionProcess, label: str, n: int) -> Row:
        """Sample n and summarise."""
        self.gen.process = process
        pieces, whole = [], PIECE[self.gen.device.type]
        for k in range(math.ceil(n / whole)):
            size = min(whole, n - k * whole)
            path = self.piece(label, f"{size}-{k}.nc")
            if not path.exists():
                began, seed = time.perf_counter(), SAMPLE_SEED + 1_000 * k
                piece = self.gen.sample(size, seed=seed, progress=self.options.progress)
                about = {**piece.metadata, "seconds": time.perf_counter() - began}
                piece.with_metadata(about).save(path)
            pieces.append(WeightedEnsemble.load(path))
        ensemble = WeightedEnsemble.concatenate(pieces)
        seconds = sum(float(piece.metadata["seconds"]) for piece in pieces)
        self.keep(
            label, process.schedule.n_steps, reverse=ensemble.log_weights,
            energies=ensemble.reduced_energies,
        )  # fmt: skip
        return self.timed(reverse_part(ensemble), seconds / n)

    def timed(self, row: Row, seconds: float) -> Row:
        """Add the seconds of a sample, which do not compare with those of another device."""
        if self.gen.device.type == "cpu":
            return {**row, "seconds_per_1000_samples": 1000.0 * seconds}
        device = torch.cuda.get_device_name(self.gen.device)
        return {**row, "device": device, "gpu_seconds_per_1000_samples": 1000.0 * seconds}

    def keep(self, label: str, n_steps: int, **arrays: np.ndarray) -> None:
        """Keep raw log weights for the figures (not committed)."""
        path = cached(f"{self.case.name}-{label}-{n_steps}.npz")
        before = dict(np.load(path)) if path.exists() else {}
        np.savez_compressed(path, **(before | arrays))  # type: ignore[arg-type]

    def ode(self, n_steps: int, n: int) -> None:
        """Measure the flow with exact divergence: n_steps of RK4, 4 n_steps evaluations."""
        label, n_evaluations = "PF-ODE, exact", 4 * n_steps
        if not self.rows.lacks(label, n_evaluations):
            return
        self.gen.process = self.ddpm(n_steps)
        options: dict[str, Any] = {"solver": "rk4", "progress": self.options.progress}
        began = time.perf_counter()
        ensemble = self.gen.sample_ode(n, seed=SAMPLE_SEED, **options)
        seconds = time.perf_counter() - began
        index = np.random.default_rng(TEST_SEED).integers(len(self.case.test), size=n)
        log_w = self.gen.log_weights_ode(self.case.test[index], seed=TEST_SEED, **options)
        row = self.timed({**forward_part(log_w), **reverse_part(ensemble)}, seconds / n)
        plain, traced = megaflops(self.gen), megaflops(self.gen, trace=True)
        row["gflops_per_sample"] = (3 * n_steps * plain + (n_steps + 1) * traced) / 1e3
        self.keep(label, n_evaluations, forward=log_w, reverse=ensemble.log_weights)
        self.rows.add(label, n_evaluations, row)

    def sgd(self, n_steps: int, n_iterations: int, batch_size: int, fresh: bool) -> None:
        """Measure the paper's procedure, with fresh trajectories or those of the one pass."""
        label = "isotropic, SGD, " + ("fresh" if fresh else "stored") + " trajectories"
        if not self.rows.lacks(label, n_steps):
            return
        process, gen = self.ddpm(n_steps), self.gen
        family = make_covariance("isotropic", gen.space, gen.labels)
        mean = MeanCoefficients(gen.space, gen.labels, torch.zeros(1, 2))
        stored, test = (
            Trajectories(d.base, mean.isotropic_statistics(d.statistics, process.coefficients))
            for d in (self.data(n_steps, mean, split, Method()) for split in ("train", "test"))
        )
        rng = make_rng(SGD_SEED, gen.device)
        frames = self.case.train / gen.coordinates.length

        def draw(n: int) -> Trajectories:
            if not fresh:
                return stored[torch.randint(len(stored), (n,), generator=rng)]
            return collect(
                process, family, gen.model_energy, frames, n, rng, gen.batch_size(), False
            )

        best = fit_sgd(
            family, draw, process.schedule, family.ddpm_parameters(process.schedule),
            n_iterations=n_iterations, batch_size=batch_size, progress=self.options.progress,
        )  # fmt: skip
        row = forward_part(log_weights(best.fitted, test, process.schedule))
        row["tuning_trajectories"] = n_iterations * batch_size if fresh else len(stored)
        row |= {"sgd_iterations": n_iterations, "sgd_batch_size": batch_size}
        row["fit_seconds"] = best.seconds
        self.rows.add(label, n_steps, row)


def main() -> None:
    """Command line entry."""
    systems = ("gmm2-50", "gmm2-100", "dw4", "lj13")
    parser = command_line(__doc__, systems=systems, device=True, progress=True)
    parser.add_argument("--steps", type=int, nargs="+", help="default: 25 50 100 200 (400)")
    parser.add_argument("--methods", nargs="+", choices=(AS_SHIPPED, *METHODS))
    parser.add_argument("--samples", type=int, default=20_000, help="forward and reverse")
    parser.add_argument("--reverse-samples", type=int, help="if other than --samples; may be 0")
    parser.add_argument("--fit-trajectories", type=int, default=16_000)
    parser.add_argument("--ode", type=int, metavar="RK4_STEPS", help="also the flow")
    parser.add_argument("--ode-samples", type=int, default=20_000)
    parser.add_argument("--sgd", type=int, nargs=2, metavar=("ITERATIONS", "BATCH"))
    options = parser.parse_args()
    for name in options.systems:
        bench = Bench(make_case(name, options.device), options)
        methods = options.methods or (MIXTURE if name.startswith("gmm2") else ISOTROPIC)
        steps = options.steps or [25, 50, 100, 200] + ([400] if name == "lj13" else [])
        for n_steps in steps:
            for label in methods:
                n_reverse = options.reverse_samples
                bench.measure(label, n_steps, options.samples if n_reverse is None else n_reverse)
        if options.sgd:
            bench.sgd(100, 5_000, 512, fresh=False)
            bench.sgd(100, *options.sgd, fresh=True)
        if options.ode:
            bench.ode(options.ode, options.ode_samples)


if __name__ == "__main__":
    main()
