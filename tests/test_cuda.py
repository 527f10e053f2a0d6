"""The whole package on a GPU: everything that runs there gives what the CPU gives.

Networks are in double precision here, and noise is drawn on the CPU, so that both devices compute
the same numbers to rounding. Without a GPU these tests are skipped.
"""

from __future__ import annotations

import functools
import logging
import math
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import openmm
import pytest
import torch
from openmm import app, unit
from openmmtools import testsystems
from torch import Tensor

from openmm_vtdis import DiffusionBoltzmannGenerator
from openmm_vtdis.core.space import Space
from openmm_vtdis.diffusion.covariance import make_covariance
from openmm_vtdis.diffusion.flow import ode_paths
from openmm_vtdis.diffusion.paths import forward_paths, reverse_paths
from openmm_vtdis.diffusion.posteriors.laplace import LaplaceRange
from openmm_vtdis.diffusion.process import DiffusionProcess
from openmm_vtdis.diffusion.schedule import Schedule
from openmm_vtdis.interop import DiffusionMove, score_force
from openmm_vtdis.runtime import cuda_graphs
from openmm_vtdis.targets.openmm.torch_energy import BatchedEnergy
from recipes.train import compile_layers
from tests.conftest import make_oracle, z_of_mean_weight
from tests.targets.openmm.test_translators import FORCE_FIELDS, FORCES, N, geometries
from tests.targets.reference import configurations, system_of

CUDA = "cuda"
pytestmark = [
    pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU"),
    pytest.mark.filterwarnings("ignore"),
]
NAMES = ("dw4", "lj13", "aldp-800K")
BY_EIGENVECTORS = ("hessian", "tweedie", "laplace")
"""Families whose draws depend on the signs of eigenvectors, which are any; densities do not."""
FAMILIES = (
    "isotropic", "diagonal", "block", "full", "low-rank", "time-network", "pairwise",
    *BY_EIGENVECTORS,
)  # fmt: skip
WITHOUT_WAITING = ("isotropic", "diagonal", "pairwise")
"""Families that ask a GPU for nothing; eigendecompositions report whether they converged."""
GRID = Schedule.geometric(6, 0.05, 20.0)


@pytest.fixture
def streams(monkeypatch: pytest.MonkeyPatch) -> dict[int, torch.Generator]:
    """Gaussians are drawn on the CPU, from a stream a seed; to be cleared between devices."""
    streams: dict[int, torch.Generator] = {}

    def standard_normal(
        self: Space, n: int, rng: torch.Generator, dtype: torch.dtype = torch.float64
    ) -> Tensor:
        seed = rng.initial_seed()
        stream = streams.setdefault(seed, torch.Generator().manual_seed(seed))
        noise = torch.randn(n, self.n_particles, self.n_dims, generator=stream, dtype=dtype)
        return self.project(noise.to(rng.device))

    monkeypatch.setattr(Space, "standard_normal", standard_normal)
    return streams


def shipped(name: str, device: str) -> DiffusionBoltzmannGenerator:
    gen = DiffusionBoltzmannGenerator.from_pretrained(name, device)
    gen.network.double()
    return gen


def kernel_of(gen: DiffusionBoltzmannGenerator, kind: str) -> DiffusionProcess:
    plain = DiffusionProcess.ddpm(gen.denoiser, GRID, gen.model_energy)
    family = make_covariance("hessian" if kind == "laplace" else kind, gen.space, gen.labels)
    process = plain.with_covariance(family.with_parameters(family.ddpm_parameters(GRID)))
    return process.with_laplace(LaplaceRange(1.0), jump=False) if kind == "laplace" else process


@functools.cache
def some_samples(name: str) -> Tensor:
    """Three configurations, made on the CPU: (3, M, D) nm."""
    gen = DiffusionBoltzmannGenerator.from_pretrained(name)
    ensemble = gen.sample(3, n_steps=25, seed=0, progress=False)
    return torch.tensor(ensemble.positions)


def close(a: Tensor, b: Tensor, tolerance: float = 1e-8) -> None:
    """The same to rounding, on whatever devices."""
    a, b = a.cpu(), b.cpu()
    assert a.dtype == b.dtype == torch.float64
    assert float((a - b).abs().max()) < tolerance * (1.0 + float(b.abs().max()))


# -- energies ---------------------------------------------------------------------------------
def energies_agree(system: openmm.System, x: Tensor) -> None:
    """Energies, forces and second derivatives, each relative to its configuration's largest."""
    here, there = BatchedEnergy(system), BatchedEnergy(system)
    for a, b in (
        (here.energy_and_force(x), there.energy_and_force(x.to(CUDA))),
        (here.derivatives(x[:3]), there.derivatives(x[:3].to(CUDA))),
    ):
        for expected, found in zip(a, b, strict=True):
            assert found.device.type == CUDA
            scale = 1e-3 + expected.flatten(1).abs().amax(1) if expected.dim() > 1 else None
            scale = 1e-3 + expected.abs() if scale is None else scale
            difference = (found.cpu() - expected).reshape(len(expected), -1).abs().amax(1)
            assert float((difference / scale).max()) < 1e-10


@pytest.mark.parametrize("force", FORCES.values(), ids=FORCES.keys())
def test_a_force_agrees(force: Callable[[], openmm.Force]) -> None:
    x = configurations(30, N)
    energies_agree(system_of(force(), n_particles=N), torch.cat([0.3 * x, x]))


@pytest.mark.parametrize("files", FORCE_FIELDS.values(), ids=FORCE_FIELDS.keys())
def test_a_force_field_agrees(files: tuple[str, ...]) -> None:
    dipeptide = testsystems.AlanineDipeptideVacuum()
    system = app.ForceField(*files).createSystem(dipeptide.topology, constraints=None)
    energies_agree(system, geometries(dipeptide.positions))


# -- trajectories and their weights -----------------------------------------------------------
@pytest.mark.parametrize("kind", FAMILIES)
@pytest.mark.parametrize("name", NAMES)
def test_paths_and_log_ratios_agree(name: str, kind: str, streams: dict[int, Any]) -> None:
    x = some_samples(name)
    found = []
    for device in ("cpu", CUDA):
        streams.clear()
        gen = shipped(name, device)
        process = kernel_of(gen, kind)
        seeds = (torch.Generator(device).manual_seed(seed) for seed in (1, 2))
        paths = reverse_paths(process, 3, next(seeds), 3, progress=False)
        assert paths.x.device.type == torch.device(device).type
        back = forward_paths(
            process, x / gen.coordinates.length, next(seeds), process.covariance, 3, progress=False
        )
        assert torch.isfinite(paths.log_ratio).all()
        forward = (back.log_forward, back.log_reverse)
        found.append(forward if kind in BY_EIGENVECTORS else (*forward, paths.x, paths.log_ratio))
    for here, there in zip(*found, strict=True):
        close(here, there, 1e-6)


def test_weights_of_the_exact_mixture_average_to_one() -> None:
    oracle = make_oracle(4, 2, True)
    grid = Schedule.geometric(12, 0.05, 20.0)
    process = DiffusionProcess.ddpm(oracle.denoiser, grid, oracle.reduced_energy)
    family = make_covariance("tweedie", oracle.space, [0, 0, 1, 1])
    process = process.with_covariance(family.with_parameters(family.ddpm_parameters(grid)))
    paths = reverse_paths(process, 4_000, torch.Generator(CUDA).manual_seed(0), progress=False)
    log_w = paths.log_ratio.cpu() - oracle.reduced_energy(paths.x.cpu())
    assert abs(z_of_mean_weight(log_w)) < 4.0
    assert abs(z_of_mean_weight(log_w + 0.2)) > 4.0  # control


def test_the_flow_agrees(streams: dict[int, Any]) -> None:
    found = []
    for device in ("cpu", CUDA):
        streams.clear()
        gen = shipped("dw4", device)
        rng = torch.Generator(device).manual_seed(0)
        found.append(ode_paths(gen.denoiser, GRID, rng, n=5, solver="rk4", progress=False))
    for here, there in zip(*found, strict=True):
        close(here, there, 1e-7)


@pytest.mark.parametrize("kind", WITHOUT_WAITING)
@pytest.mark.parametrize("name", NAMES)
def test_the_reverse_chain_never_waits_for_the_device(name: str, kind: str) -> None:
    gen = DiffusionBoltzmannGenerator.from_pretrained(name, CUDA)
    process, rng = kernel_of(gen, kind), torch.Generator(CUDA).manual_seed(0)
    reverse_paths(process, 8, rng, 8, progress=False)
    torch.cuda.set_sync_debug_mode("error")
    try:
        paths = reverse_paths(process, 8, rng, 8, progress=False)
        with pytest.raises(RuntimeError, match="synchroniz"):  # control
            float(paths.log_ratio.sum())
    finally:
        torch.cuda.set_sync_debug_mode("default")


@pytest.mark.parametrize("half", [False, True], ids=["float32", "bfloat16"])
@pytest.mark.parametrize("kind", ["isotropic", "pairwise", "tweedie"])
def test_recorded_evaluations_change_nothing(
    kind: str, half: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    gen = DiffusionBoltzmannGenerator.from_pretrained("lj13", CUDA)
    process, x = kernel_of(gen, kind), some_samples("lj13") / gen.coordinates.length
    recordings: list[Any] = []
    make = cuda_graphs.Recording.__init__

    def counted(self: Any, *inputs: Any, **settings: Any) -> None:
        recordings.append(self)
        make(self, *inputs, **settings)

    monkeypatch.setattr(cuda_graphs.Recording, "__init__", counted)
    found = []
    for after in (10**9, 2):
        assert not recordings
        monkeypatch.setattr(cuda_graphs, "AFTER", after)
        seeds = [torch.Generator(CUDA).manual_seed(seed) for seed in (1, 2)]
        with torch.autocast(CUDA, torch.bfloat16, enabled=half):
            there = reverse_paths(process, 40, seeds[0], 16, progress=False)
            back = forward_paths(process, x, seeds[1], process.covariance, 1, progress=False)
        found.append((there.x, there.log_ratio, back.log_forward, back.log_reverse))
    assert len(recordings) == 3  # batches of 16 and 8, and one frame
    for eager, recorded in zip(*found, strict=True):
        close(recorded, eager, 1e-5 if kind == "tweedie" else 1e-9)


@pytest.mark.skipif(torch.cuda.device_count() < 2, reason="needs two GPUs")
def test_another_gpu_than_the_current_one_is_recorded_too(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(cuda_graphs, "AFTER", 2)
    found = []
    for device in (CUDA, "cuda:1"):
        gen = DiffusionBoltzmannGenerator.from_pretrained("lj13", device)
        seed = torch.Generator(device).manual_seed(1)
        paths = reverse_paths(kernel_of(gen, "pairwise"), 40, seed, 16, progress=False)
        found.append(paths.log_ratio)
    close(*found, 1e-9)


def test_a_batch_that_does_not_fit_is_halved(caplog: pytest.LogCaptureFixture) -> None:
    gen = DiffusionBoltzmannGenerator.from_pretrained("aldp-800K", CUDA)
    whole = torch.cuda.get_device_properties(0).total_memory
    torch.cuda.empty_cache()
    gen.process = kernel_of(gen, "isotropic")
    torch.cuda.set_per_process_memory_fraction(1.5e9 / whole)
    try:
        with caplog.at_level(logging.WARNING):
            ensemble = gen.sample(8_192, seed=0, batch_size=8_192, progress=False)
    finally:
        torch.cuda.set_per_process_memory_fraction(1.0)
    assert len(ensemble) == 8_192
    assert "out of GPU memory" in caplog.text
    assert np.isfinite(ensemble.log_weights).any()


# -- the life of a generator ------------------------------------------------------------------
@pytest.mark.parametrize("precision", ["float32", "bfloat16"])
def test_train_tune_sample_and_back_to_the_cpu(precision: str, tmp_path: Path) -> None:
    frames = DiffusionBoltzmannGenerator.from_pretrained("dw4").sample(
        2_000, n_steps=25, seed=1, progress=False
    )
    traj = frames.resample(seed=2)
    known = DiffusionBoltzmannGenerator.from_pretrained("dw4")
    gen = DiffusionBoltzmannGenerator(
        known.target.system, temperature=known.temperature, n_dims=2, network="egnn-2x32",
        device=CUDA, seed=0,
    )  # fmt: skip
    log = gen.train(
        traj.positions, 150, evaluate_every=50, precision=precision, progress=False,
        checkpoint=tmp_path / "run.ckpt",
    )  # fmt: skip
    assert log.held_out_losses[-1] < log.held_out_losses[0]
    gen.train_pair_head(traj.positions, 30, progress=False)
    report = gen.tune(traj.positions, 8, n_trajectories=200, progress=False)
    assert math.isfinite(report.forward_ess_test)
    first, again = (gen.sample(300, seed=3, progress=False) for _ in range(2))
    assert np.array_equal(first.positions, again.positions)
    np.testing.assert_allclose(first.log_weights, again.log_weights, rtol=1e-9)
    log_w = gen.log_weights(traj.positions[:100], seed=4, progress=False)
    back = DiffusionBoltzmannGenerator.load(gen.save(tmp_path / "made.vtdis"))
    assert back.device.type == "cpu"
    here = back.log_weights(traj.positions[:100], seed=4, progress=False)
    spread = np.hypot(np.std(log_w), np.std(here)) / 10.0
    assert abs(np.mean(log_w) - np.mean(here)) < 5.0 * spread  # other noise, the same kernel


def test_an_interrupted_training_goes_on(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from openmm_vtdis.training.trainer import Trainer

    known = DiffusionBoltzmannGenerator.from_pretrained("dw4")
    frames = configurations(400, 4, 2)

    def trained(checkpoint: Path) -> dict[str, Tensor]:
        gen = DiffusionBoltzmannGenerator(
            known.target.system, temperature=known.temperature, n_dims=2, network="egnn-2x32",
            device=CUDA, seed=0,
        )  # fmt: skip
        gen.train(frames, 20, checkpoint=checkpoint, checkpoint_seconds=0.0, progress=False)
        return gen.network.state_dict()

    monkeypatch.setattr("openmm_vtdis.generator.check_equilibrium", lambda *_: None)
    monkeypatch.setattr("openmm_vtdis.generator.check_exchangeable", lambda *_: None)
    whole = trained(tmp_path / "whole.ckpt")
    step = Trainer._step

    def stopped(self: Trainer) -> None:
        if self.iteration == 9:
            raise RuntimeError("killed")
        step(self)

    with monkeypatch.context() as patch:
        patch.setattr(Trainer, "_step", stopped)
        with pytest.raises(RuntimeError, match="killed"):
            trained(tmp_path / "stopped.ckpt")
    resumed = trained(tmp_path / "stopped.ckpt")
    for name, value in whole.items():
        torch.testing.assert_close(resumed[name], value, rtol=1e-4, atol=1e-6)


@pytest.mark.parametrize("precision", ["float32", "bfloat16"])
@pytest.mark.parametrize("compiled", [False, True], ids=["eager", "compiled"])
def test_recorded_steps_train_the_same(
    precision: str, compiled: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    from openmm_vtdis.training.trainer import Trainer, TrainingConfig

    found, losses = [], []
    for after in (10**9, 3):
        monkeypatch.setattr(cuda_graphs, "AFTER", after)
        torch.compiler.reset()
        gen = DiffusionBoltzmannGenerator.from_pretrained("lj13", CUDA)
        if compiled:
            compile_layers(gen.network)
        frames = gen.space.standard_normal(500, torch.Generator(CUDA).manual_seed(0))
        config = TrainingConfig(12, 64, 1e-3, warmup=1, precision=precision)
        trainer = Trainer(gen.denoiser, frames, frames[:100], config)
        log = trainer.run(evaluate_every=4, progress=False)
        assert (trainer._recording is not None) == (after == 3)
        found.append(gen.network.state_dict())
        losses.append(torch.tensor([*log.losses, *log.held_out_losses], dtype=torch.float64))
    start = DiffusionBoltzmannGenerator.from_pretrained("lj13", CUDA).network.state_dict()
    close(*losses, 1e-4)
    for name, eager in found[0].items():
        moved = float((eager - start[name]).abs().max())
        assert float((found[1][name] - eager).abs().max()) <= 0.05 * moved + 1e-6, name


def test_steps_of_training_do_not_wait_for_the_device() -> None:
    from openmm_vtdis.training.trainer import READ_EVERY, Trainer, TrainingConfig

    gen = DiffusionBoltzmannGenerator.from_pretrained("lj13", CUDA)
    frames = gen.space.standard_normal(500, torch.Generator(CUDA).manual_seed(0))
    trainer = Trainer(gen.denoiser, frames, frames[:100], TrainingConfig(100, 64))
    for _ in range(READ_EVERY):  # recorded among them
        trainer._step()
    torch.cuda.set_sync_debug_mode("error")
    try:
        for _ in range(READ_EVERY - 1):
            trainer._step()
        with pytest.raises(RuntimeError, match="synchroniz"):  # control
            trainer._read()
    finally:
        torch.cuda.set_sync_debug_mode("default")


def test_compiled_layers_give_the_same() -> None:
    gen = shipped("aldp-800K", CUDA)
    x = gen.space.standard_normal(16, torch.Generator(CUDA).manual_seed(0))
    t = torch.full((16,), 0.5, dtype=x.dtype, device=CUDA)
    with torch.no_grad():
        expected = gen.denoiser(x, t)
        compile_layers(gen.network)
        close(gen.denoiser(x, t), expected)


# -- neighbours -------------------------------------------------------------------------------
def platforms() -> list[str]:
    """Those of OpenMM that are installed here, of the two that matter."""
    count = openmm.Platform.getNumPlatforms()
    installed = {openmm.Platform.getPlatform(i).getName() for i in range(count)}
    return [name for name in ("Reference", "CUDA") if name in installed]


def test_a_force_of_the_learned_score_agrees() -> None:
    forces = []
    for device, name in (("cpu", "Reference"), *((CUDA, name) for name in platforms())):
        gen = shipped("aldp-800K", device)
        system = openmm.System()
        for atom in range(gen.space.n_particles):
            system.addParticle(gen.target.system.getParticleMass(atom))
        system.addForce(score_force(gen, 0.01 * unit.nanometer))
        platform = openmm.Platform.getPlatformByName(name)
        properties = {"Precision": "double"} if name == "CUDA" else {}
        context = openmm.Context(system, openmm.VerletIntegrator(0.001), platform, properties)
        context.setPositions(np.asarray(testsystems.AlanineDipeptideVacuum().positions._value))
        forces.append(torch.tensor(context.getState(forces=True).getForces(asNumpy=True)._value))
    for force in forces[1:]:
        close(force, forces[0])


def test_a_move_runs_on_the_device() -> None:
    from openmmtools.mcmc import MCMCSampler
    from openmmtools.states import SamplerState, ThermodynamicState

    gen = DiffusionBoltzmannGenerator.from_pretrained("dw4")
    ensemble = gen.sample(1, n_steps=25, seed=0, progress=False)
    flat = np.pad(ensemble.positions[0], ((0, 0), (0, 1)))
    move = DiffusionMove("dw4", n_steps=10, n_proposals=20, device=CUDA, seed=1)
    sampler: Any = MCMCSampler(
        ThermodynamicState(gen.target.system, gen.temperature * unit.kelvin),
        SamplerState(flat * unit.nanometer),
        move,
    )
    sampler.run(5)
    assert move.n_proposed > 0
