"""The class users meet: train, tune, sample, and the weights that come of it."""

from __future__ import annotations

import math
from pathlib import Path
from typing import Any

import mdtraj as md
import numpy as np
import openmm
import pytest
import torch
from openmm import unit
from openmmtools.states import ThermodynamicState

from openmm_vtdis import DiffusionBoltzmannGenerator, WeightedEnsemble
from openmm_vtdis.core.space import Space
from openmm_vtdis.ensemble import forward_ess, mbar
from openmm_vtdis.mcmc import sample_hmc
from openmm_vtdis.targets import OpenMMTarget, double_well
from openmm_vtdis.topology import placeholder_topology
from tests.conftest import exact_generator
from tests.generator.small import equilibrium_frames, new_generator, trained_generator


@pytest.fixture(scope="module")
def frames() -> np.ndarray:
    return equilibrium_frames()


@pytest.fixture(scope="module")
def trained(frames: np.ndarray) -> DiffusionBoltzmannGenerator:
    return trained_generator(frames)


@torch.no_grad()
def test_everything_works_where_gradients_are_off(frames: np.ndarray, tmp_path: Path) -> None:
    gen = new_generator()
    before = [p.clone() for p in gen.network.parameters()]
    gen.train(frames, 3, batch_size=8, progress=False)
    assert any(not torch.equal(a, b) for a, b in zip(before, gen.network.parameters(), strict=True))
    gen.train_pair_head(frames, 3, batch_size=8, progress=False)
    for method in ("convex", "sgd"):
        options = {"n_trajectories": 100, "sgd_iterations": 2, "progress": False}
        gen.tune(frames, 4, "hessian", method=method, **options)  # type: ignore[arg-type]
    gen = DiffusionBoltzmannGenerator.load(gen.save(tmp_path / "model.vtdis"))
    assert np.isfinite(gen.sample(5, seed=0, progress=False).log_weights).all()
    assert not torch.is_grad_enabled()


def test_weights_stay_double_under_autocast(frames: np.ndarray) -> None:
    bench = double_well()
    gen = DiffusionBoltzmannGenerator(
        bench.system, None, bench.temperature, n_dims=2, network="egnn-2x16", seed=0
    )
    gen.train(frames, 50, batch_size=32, progress=False)
    gen.tune(frames, 6, "isotropic", n_trajectories=200, progress=False)
    exact = gen.log_weights(frames, seed=1, progress=False)
    with torch.autocast("cpu", torch.bfloat16):
        rough = gen.log_weights(frames, seed=1, progress=False)
        ensemble = gen.sample(50, seed=2, progress=False)
    assert rough.log_weights.dtype == ensemble.log_weights.dtype == np.float64
    assert 0.0 < np.abs(rough - exact).max() < 1.0
    with torch.autocast("cpu", torch.bfloat16):  # the same network gives the same weights
        np.testing.assert_array_equal(rough, gen.log_weights(frames, seed=1, progress=False))


def test_report_and_ensemble_of_a_trained_generator(
    trained: DiffusionBoltzmannGenerator, frames: np.ndarray
) -> None:
    report = trained.tune(frames, 20, "isotropic", n_trajectories=500, progress=False)
    assert report.eta.shape == (20, 1)
    assert report.times.shape == (21,)
    assert report.n_network_evaluations == 500 * 20
    assert 0.0 < report.forward_ess_test <= 1.0
    assert "held out" in str(report)
    ensemble = trained.sample(300, seed=0, progress=False)
    assert isinstance(ensemble, WeightedEnsemble)
    assert ensemble.positions.shape == (300, 4, 2)
    assert ensemble.log_weights.dtype == np.float64
    expected = trained.target.reduced_energy(torch.tensor(ensemble.positions)).numpy()
    np.testing.assert_allclose(ensemble.reduced_energies, expected)
    again = trained.sample(300, seed=0, progress=False)
    np.testing.assert_array_equal(again.log_weights, ensemble.log_weights)
    other = trained.sample(300, seed=1, progress=False)
    assert not np.array_equal(other.log_weights, ensemble.log_weights)


def test_weights_do_not_depend_on_orientation_or_order_of_the_input(
    trained: DiffusionBoltzmannGenerator, frames: np.ndarray
) -> None:
    """Forward log weights of moved copies agree in distribution; energies agree exactly."""
    x = frames[:200]
    angle = 0.7
    turn = np.array([[math.cos(angle), -math.sin(angle)], [math.sin(angle), math.cos(angle)]])
    reference = trained.log_weights(x, seed=0, progress=False)
    np.testing.assert_allclose(
        trained.log_weights(x + 5.0, seed=0, progress=False), reference, atol=1e-6
    )
    for moved in (x @ turn, x * np.array([1.0, -1.0]), x[:, [3, 1, 2, 0]]):
        log_w = trained.log_weights(moved, seed=1, progress=False)
        spread = math.sqrt(np.var(reference) / len(x) + np.var(log_w) / len(x))
        assert abs(np.mean(log_w) - np.mean(reference)) < 4.0 * spread


def test_both_directions_estimate_one_log_z(
    trained: DiffusionBoltzmannGenerator, frames: np.ndarray
) -> None:
    trained.tune(frames, 60, "isotropic", n_trajectories=2000, progress=False)
    generated = trained.sample(3000, seed=3, progress=False).log_z()
    noised = np.asarray(trained.log_weights(np.tile(frames, (4, 1, 1)), seed=4, progress=False))
    mean = np.exp(-(noised - noised.mean()))
    backward = noised.mean() - math.log(mean.mean())
    stderr = mean.std() / mean.mean() / math.sqrt(len(frames))
    assert abs(generated.value - backward) < 4.0 * math.hypot(float(generated.stderr), stderr)


def test_a_sample_with_infinite_energy_gets_no_weight(
    trained: DiffusionBoltzmannGenerator, monkeypatch: pytest.MonkeyPatch
) -> None:
    clean = trained.sample(50, seed=5, progress=False)
    energy = trained.target.reduced_energy

    def broken(x: torch.Tensor) -> torch.Tensor:
        u = energy(x).clone()
        u[3], u[7] = float("nan"), float("inf")
        return u

    monkeypatch.setattr(trained.target, "reduced_energy", broken)
    ensemble = trained.sample(50, seed=5, progress=False)
    assert ensemble.diagnostics().n_zero_weight == 2
    assert ensemble.weights[3] == ensemble.weights[7] == 0.0
    keep = np.delete(np.arange(50), [3, 7])
    np.testing.assert_array_equal(ensemble.log_weights[keep], clean.log_weights[keep])


@pytest.mark.parametrize("covariance", ["isotropic", "time-network"])
def test_one_tuning_serves_other_numbers_of_steps(
    trained: DiffusionBoltzmannGenerator, frames: np.ndarray, covariance: str
) -> None:
    trained.tune(frames, 20, covariance, n_trajectories=500, progress=False)
    ensemble = trained.sample(100, n_steps=35, seed=0, progress=False)
    assert len(ensemble.metadata["times"]) == 36
    assert trained.log_weights(
        frames[:50], n_steps=7, seed=0, progress=False
    ).log_weights.shape == (50,)


def test_a_covariance_between_classes_belongs_to_its_grid(
    trained: DiffusionBoltzmannGenerator, frames: np.ndarray
) -> None:
    trained.tune(frames, 20, "block", n_trajectories=500, progress=False)
    with pytest.raises(ValueError, match="expected parameters for 35 steps, got 20"):
        trained.sample(100, n_steps=35)


def test_mdtraj_paths_and_openmmtools_states(frames: np.ndarray, tmp_path: Path) -> None:
    system = double_well()
    topology = placeholder_topology(4)
    flat = np.concatenate([frames, np.zeros_like(frames[..., :1])], axis=-1)
    traj = md.Trajectory(flat, md.Topology.from_openmm(topology))
    traj.save_dcd(str(tmp_path / "md.dcd"))
    state = ThermodynamicState(system.system, system.temperature * unit.kelvin)
    gen = DiffusionBoltzmannGenerator.from_thermodynamic_state(
        state, topology, n_dims=2, network="egnn-1x8"
    )
    gen.train(str(tmp_path / "md.dcd"), 3, batch_size=8, progress=False)
    length = gen.coordinates.length
    gen.train(traj, 3, batch_size=8, progress=False)
    assert gen.coordinates.length == length
    traj.save_netcdf(str(tmp_path / "md.nc"))
    gen.train([tmp_path / "md.nc", tmp_path / "md.dcd"], 3, batch_size=8, progress=False)
    bare = new_generator()  # without a topology
    bare.train(tmp_path / "md.nc", 3, batch_size=8, progress=False)
    assert bare.coordinates.length == length
    small = md.Trajectory(flat[:, :3], md.Topology.from_openmm(placeholder_topology(3)))
    small.save_dcd(str(tmp_path / "small.dcd"))
    for name in ("small.dcd", "frames.txt"):
        (tmp_path / "frames.txt").write_text("0 0 0")
        with pytest.raises(ValueError, match=r"train: expected a trajectory of 4 atoms in a form"):
            gen.train(tmp_path / name, 3)
    other = md.Trajectory(flat[:, :3], md.Topology.from_openmm(placeholder_topology(3)))
    with pytest.raises(ValueError, match="atom"):
        gen.train(other, 3)


def test_the_seed_decides_the_first_weights() -> None:
    def first_weights(seed: int | None) -> torch.Tensor:
        bench = double_well()
        gen = DiffusionBoltzmannGenerator(bench.system, n_dims=2, network="egnn-1x8", seed=seed)
        return torch.cat([p.flatten() for p in gen.network.parameters()])

    state = torch.get_rng_state()
    assert torch.equal(first_weights(3), first_weights(3))
    assert torch.equal(torch.get_rng_state(), state)
    assert not torch.equal(first_weights(3), first_weights(4))
    assert not torch.equal(first_weights(None), first_weights(None))


def test_an_explicit_schedule_says_the_number_of_steps() -> None:
    target, gen = exact_generator()
    x = target.sample(200, seed=1)
    levels = np.geomspace(0.05, 20.0, 8)
    gen.tune(x, schedule=levels, n_trajectories=100, progress=False)
    assert gen.process is not None
    assert gen.process.schedule.n_steps == 7


def test_equal_labels_on_different_neighbours_are_not_interchangeable() -> None:
    """A0-A1 with two B beads each: all B are alike, but a B may not move to the other A alone."""
    topology = placeholder_topology(6)
    atoms = list(topology.atoms())
    system = openmm.System()
    force = openmm.HarmonicBondForce()
    for _ in range(6):
        system.addParticle(1.0)
    for i, j in ((0, 1), (0, 2), (0, 3), (1, 4), (1, 5)):
        topology.addBond(atoms[i], atoms[j])
        force.addBond(i, j, 0.2 if (i, j) == (0, 1) else 0.1, 1000.0)
    system.addForce(force)
    gen = DiffusionBoltzmannGenerator(system, topology, network="egnn-2x16", seed=1)
    assert gen.labels == [0, 0, 1, 1, 1, 1]
    x = gen.space.standard_normal(4, torch.Generator().manual_seed(0))
    t = torch.tensor(0.5, dtype=torch.float64)

    def commutes(order: list[int]) -> bool:
        return torch.allclose(gen.denoiser(x[:, order], t), gen.denoiser(x, t)[:, order], atol=1e-6)

    assert commutes([0, 1, 3, 2, 4, 5])
    assert commutes([1, 0, 4, 5, 2, 3])
    assert not commutes([0, 1, 4, 3, 2, 5])


def test_labels_that_the_energy_contradicts_are_reported(
    caplog: pytest.LogCaptureFixture,
) -> None:
    system = openmm.System()
    for _ in range(4):
        system.addParticle(1.0)
    force = openmm.HarmonicBondForce()
    for i in range(4):
        for j in range(i):
            force.addBond(i, j, 0.0, 5000.0 if i == 1 else 500.0)
    system.addForce(force)
    target = OpenMMTarget(system, placeholder_topology(4), 300.0)
    x = sample_hmc(target, 20, 2, burn_in=50, step_size=0.01, seed=1, progress=False).positions
    for labels, warned in (([0, 0, 0, 0], True), ([0, 0, 1, 1], False)):
        gen = DiffusionBoltzmannGenerator(
            system, placeholder_topology(4), 300.0, network="egnn-1x8", labels=labels
        )
        caplog.clear()
        gen.train(x, 2, batch_size=8, progress=False)
        assert ("have one label, but exchanging them changes" in caplog.text) == warned


def test_forward_ess_of_the_ddpm_baseline_is_lower(
    trained: DiffusionBoltzmannGenerator, frames: np.ndarray
) -> None:
    baseline = trained.tune(
        frames, 20, "isotropic", objective="ddpm", n_trajectories=1000, progress=False
    )
    tuned = trained.tune(frames, 20, "isotropic", n_trajectories=1000, progress=False)
    assert tuned.forward_ess_test > baseline.forward_ess_test
    assert np.allclose(baseline.eta, 1.0)
    assert forward_ess(trained.log_weights(frames, seed=1, progress=False)) > 0.0


def test_samples_and_frames_of_two_proposals_are_refused() -> None:
    """BAR of two densities is off by many of its errors, and both of its sides are right."""
    target, gen = exact_generator(0.7, Space(4, 2))
    frames = target.sample(2_000, seed=0)
    gen.tune(frames, 8, "isotropic", n_trajectories=1_000, progress=False)
    ensemble = gen.sample(2_000, seed=1, progress=False)
    options: dict[str, Any] = {"seed": 2, "progress": False}
    same, other = gen.log_weights(frames, **options), gen.log_weights(frames, n_steps=4, **options)
    assert same.provenance.proposal == ensemble.provenance.proposal != other.provenance.proposal
    result = ensemble.free_energy(same[::2])
    assert abs(result.z(0.0)) < 4.0
    assert abs(mbar(ensemble, [target], [frames.numpy()], [same]).log_z(0).z(0.0)) < 4.0

    with pytest.raises(ValueError, match="free_energy: expected log weights of frames against the"):
        ensemble.free_energy(other)
    with pytest.raises(ValueError, match="mbar, state 0: expected log weights of frames"):
        mbar(ensemble, [target], [frames.numpy()], [other])
    # control: the error that this is to prevent, from arrays that do not know
    assert abs(ensemble.free_energy(np.array(other)).z(0.0)) > 4.0
    gen.tune(frames, 8, "diagonal", n_trajectories=1_000, progress=False)
    with pytest.raises(ValueError, match="draw the samples again"):
        ensemble.free_energy(gen.log_weights(frames, **options))
    # a flow's density does not depend on its solver
    flow = gen.sample_ode(50, seed=3, progress=False)
    assert (
        flow.provenance.proposal
        == gen.log_weights_ode(frames[:4], solver="rk4", **options).provenance.proposal
    )
    assert flow.provenance.proposal != same.provenance.proposal


def test_a_generator_says_in_a_line_what_it_is() -> None:
    known = DiffusionBoltzmannGenerator.from_pretrained("lj13")
    assert repr(known) == (
        "DiffusionBoltzmannGenerator(OpenMMTarget(13 particles in 3 dimensions, 120.272 K, "
        "backend='batched'), DiffusionProcess('pairwise', 200 steps))"
    )
    known.process = None
    assert repr(known).endswith(", not tuned)")
    known.coordinates = None
    assert repr(known).endswith(", untrained)")
