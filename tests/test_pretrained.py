"""Shipped generators: they load, sample, and are documented by the files beside them."""

from __future__ import annotations

import dataclasses
import json
from pathlib import Path
from typing import Any

import mdtraj
import numpy as np
import openmm
import pytest
import torch
from openmm import unit

from openmm_vtdis import DiffusionBoltzmannGenerator, pretrained
from openmm_vtdis.core.units import thermal_energy
from openmm_vtdis.mcmc import ConvergenceReport, ReferenceData
from openmm_vtdis.targets import BenchmarkSystem
from openmm_vtdis.training.config import TrainingLog
from recipes import train
from recipes.reference import (
    BARRIER,
    ROUND,
    basin_frames,
    basin_report,
    basins,
    between_chains,
    peptide_bias,
    peptide_bonds,
    training_frames,
    unbiased,
)
from recipes.settings import RECIPES, TEST_SEED, TRAIN_SEED, build_system
from tests import pretrained_numbers
from tests.pretrained_numbers import numbers


def test_what_ships() -> None:
    assert set(pretrained.names()) == set(RECIPES)
    assert TRAIN_SEED != TEST_SEED


@pytest.mark.parametrize("name", pretrained.names())
def test_a_shipped_generator_loads_and_samples(name: str) -> None:
    gen = DiffusionBoltzmannGenerator.from_pretrained(name)
    assert gen.process is not None
    assert gen.process.schedule.n_steps == RECIPES[name].n_steps
    ensemble = gen.sample(12, n_steps=40, seed=0, progress=False)
    assert np.isfinite(ensemble.log_weights).all()
    assert ensemble.log_weights.std() < 8.0  # an untrained network is hundreds of nats off


@pytest.mark.parametrize("name", pretrained.names())
def test_energies_of_a_shipped_generator_are_those_of_its_system(name: str) -> None:
    """In kT at the system's temperature, by an OpenMM Context that the package has not made."""
    gen, system = DiffusionBoltzmannGenerator.from_pretrained(name), build_system(name)
    assert gen.temperature == system.temperature
    ensemble = gen.sample(5, n_steps=20, seed=1, progress=False)
    context = openmm.Context(
        system.system, openmm.VerletIntegrator(0.001), openmm.Platform.getPlatform("Reference")
    )
    for x, u in zip(ensemble.positions, ensemble.reduced_energies, strict=True):
        assert abs(x.mean(axis=0)).max() < 1e-12
        context.setPositions(np.pad(x, ((0, 0), (0, 3 - x.shape[1]))))
        energy = context.getState(energy=True).getPotentialEnergy()
        kt = unit.MOLAR_GAS_CONSTANT_R * system.temperature * unit.kelvin
        assert u == pytest.approx(energy / kt, rel=1e-8)


@pytest.mark.parametrize(
    ("name", "n", "n_steps", "log_z", "stderr"),
    [
        ("dw4", 600, 25, 29.670, 0.008),
        ("dw4-small", 600, 25, 29.670, 0.008),
        ("lj13", 250, 50, 59.864, 0.029),
    ],
)
def test_weights_of_a_shipped_generator_have_the_log_z_of_annealing(
    name: str, n: int, n_steps: int, log_z: float, stderr: float
) -> None:
    """Reference values that no network has touched: see the benchmarks' page."""
    gen = DiffusionBoltzmannGenerator.from_pretrained(name)
    ensemble = gen.sample(n, n_steps=n_steps, seed=2, progress=False)
    found = ensemble.log_z()
    assert found.stderr < 0.15
    assert abs(found.z(log_z, stderr)) < 4.0
    # Control: log weights that are off by two per cent
    off = dataclasses.replace(ensemble, log_weights=1.02 * ensemble.log_weights).log_z()
    assert abs(off.z(log_z, stderr)) > 6.0


def test_samples_in_inference_mode_are_the_same() -> None:
    """Its kernel differentiates the energy, which no_grad and inference_mode must not silence."""
    gen = DiffusionBoltzmannGenerator.from_pretrained("dw4")
    expected = gen.sample(20, n_steps=10, seed=3, progress=False)
    with torch.inference_mode():
        found = gen.sample(20, n_steps=10, seed=3, progress=False)
    np.testing.assert_array_equal(found.log_weights, expected.log_weights)


@pytest.mark.parametrize("name", pretrained.names())
def test_card_and_log_are_of_the_script_as_it_stands(name: str) -> None:
    folder = pretrained.path(name).parent
    record = json.loads((folder / f"{name}.json").read_text())
    assert record["recipe"] == json.loads(json.dumps(dataclasses.asdict(RECIPES[name])))
    assert len(record["fine"]) == len(RECIPES[name].fine_iterations)
    assert record["seeds"] == {"train": TRAIN_SEED, "test": TEST_SEED, "model": 7}
    n_iterations = record["log"]["iterations"][-1] if record["log"] else 0
    assert n_iterations == RECIPES[name].n_iterations
    card = (folder / f"{name}.md").read_text()
    assert RECIPES[name].network.removeprefix("egnn-").replace("x", " layers x ") in card


def test_an_unknown_name_lists_those_that_ship() -> None:
    with pytest.raises(
        ValueError, match="expected one of aldp-300K, aldp-800K, aldp-800K-7x256, dw4, dw4-small, "
    ):
        pretrained.path("water")


def turned(system: BenchmarkSystem, angles: np.ndarray) -> np.ndarray:
    """The molecule with its last residue turned about its peptide bond by angles (n,)."""
    _, carbon, nitrogen, _ = peptide_bonds(system.topology)[1]
    moving = [atom.index for atom in system.topology.atoms() if atom.residue.index == 2]
    axis = system.positions[nitrogen] - system.positions[carbon]
    axis /= np.linalg.norm(axis)
    arm = system.positions[moving] - system.positions[carbon]
    along = (arm @ axis)[:, None] * axis
    cosine, sine = np.cos(angles)[:, None, None], np.sin(angles)[:, None, None]
    frames = np.repeat(system.positions[None], len(angles), axis=0)
    frames[:, moving] = (
        system.positions[carbon] + along + cosine * (arm - along) + sine * np.cross(axis, arm)
    )
    return frames


def test_frames_of_a_flattened_peptide_bond_are_kept_as_the_bias_says() -> None:
    """Uniform omega goes in; what is kept has the density exp(b), b the bias in kT."""
    system = build_system("aldp-800K")
    n = 40_000
    frames = torch.tensor(turned(system, 2.0 * np.pi * np.random.default_rng(0).random(n)))
    report = ConvergenceReport(2, n // 2, *(0.0,) * 8, 0.0)
    data = ReferenceData(frames, torch.zeros(n, dtype=torch.float64), report)
    bias = peptide_bias(system)
    kept = unbiased(data, bias, system, seed=1)
    traj = mdtraj.Trajectory(frames.numpy(), mdtraj.Topology.from_openmm(system.topology))
    bonds = peptide_bonds(system.topology)
    first, omega = mdtraj.compute_dihedrals(traj, bonds).T

    def log_keep(angle: np.ndarray) -> np.ndarray:
        excess = np.maximum(0.0, 83.68 * np.sin(angle) ** 2 - BARRIER)
        return -(excess**2) / (excess + ROUND) / thermal_energy(800.0)

    expected = np.exp(log_keep(omega) + log_keep(first))
    edges = np.linspace(-np.pi, np.pi, 13)
    counts, _ = np.histogram(omega[kept], edges)
    mean, _ = np.histogram(omega, edges, weights=expected)
    variance, _ = np.histogram(omega, edges, weights=expected * (1.0 - expected))
    z = (counts - mean) / np.sqrt(variance + 1e-9)
    assert np.abs(z).max() < 4.0
    assert 0.3 < kept.mean() < 0.8
    colder = dataclasses.replace(system, temperature=600.0)  # the control
    wrong, _ = np.histogram(omega[unbiased(data, bias, colder, seed=1)], edges)
    assert np.abs((wrong - mean) / np.sqrt(variance + 1e-9)).max() > 4.0
    upwards = openmm.CustomTorsionForce("1")
    upwards.addTorsion(*bonds[0], [])
    with pytest.raises(ValueError, match="bias: expected energies of at most 0"):
        unbiased(data, upwards, system, seed=1)


def test_rare_basins_have_frames_of_their_own(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    system, cis_bond = build_system("aldp-300K"), (False, False, True)
    omega = mdtraj.compute_dihedrals(
        mdtraj.Trajectory(system.positions, mdtraj.Topology.from_openmm(system.topology)),
        peptide_bonds(system.topology),
    )[0, 1]
    small = dataclasses.replace(
        RECIPES["aldp-300K"], basins=(cis_bond,), basins_of="hot", basin_chains=3,
        basin_samples=5, basin_thin=1, burn_in=4, n_leapfrog=4,
    )  # fmt: skip
    monkeypatch.setitem(RECIPES, "aldp-300K", small)
    monkeypatch.setitem(RECIPES, "hot", dataclasses.replace(small, data_of=None))
    trans, bent = turned(system, np.array([np.pi - omega, -omega]))
    frames = np.array([trans, bent] * 20)
    np.save(tmp_path / "hot-train.npy", frames)
    np.save(tmp_path / "aldp-300K-train.npy", frames[::2])
    rare = basin_frames("aldp-300K", tmp_path)
    assert rare.shape == (15, *trans.shape)
    where = basins(mdtraj.Trajectory(rare, mdtraj.Topology.from_openmm(system.topology)))
    np.testing.assert_array_equal(where, [cis_bond] * 15)
    assert "cis, bond 2       1 ± 0; 0 changes" in (tmp_path / "aldp-300K-basins.txt").read_text()
    both = training_frames("aldp-300K", tmp_path)
    np.testing.assert_array_equal(both[:31], [frames[0]] * 18 + list(rare[:13]))
    last = np.array([frames[0]] * 2 + list(rare[13:]))
    np.testing.assert_array_equal(np.sort(both[31:], axis=0), np.sort(last, axis=0))
    np.testing.assert_array_equal(training_frames("aldp-300K", tmp_path), both)  # kept, not made
    assert basin_report("aldp-300K", tmp_path)[0] == "rare basins"
    left = dataclasses.replace(small, basins=((True, False, False),))
    monkeypatch.setitem(RECIPES, "aldp-800K", left)
    with pytest.raises(
        ValueError, match=r"hot: expected frames in \(True, False, False\), got none"
    ):
        basin_frames("aldp-800K", tmp_path)


@pytest.mark.parametrize("everywhere", [False, True])
def test_only_the_last_training_may_be_at_all_noise_levels(
    everywhere: bool, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    recipe = dataclasses.replace(
        RECIPES["dw4"], fine_iterations=(3, 4), last_at_all_levels=everywhere, head_iterations=0
    )
    trainings: list[dict[str, Any]] = []

    class Recorder:
        device, network = "cpu", None

        def train(self, frames: Any, n: int, **settings: Any) -> TrainingLog:
            trainings.append({"n": n, **settings})
            return TrainingLog()

        def tune(self, *_: Any, **settings: Any) -> str:
            return "tuned"

        def save(self, path: Path) -> None:
            path.touch()

    monkeypatch.setattr(train, "FOLDER", tmp_path)
    monkeypatch.setattr(train, "reference_frames", lambda *_, **settings: np.zeros((10, 4, 2)))
    monkeypatch.setattr(train, "reports", lambda *_: [])
    first = {"log": None, "fine": [], "data": []}
    train.finish("dw4", Recorder(), recipe, first, "float32")  # type: ignore[arg-type]
    levels = [{k: v for k, v in t.items() if k.startswith("log_t")} for t in trainings]
    assert [t["n"] for t in trainings] == [3, 4]
    assert levels == [train.FINE_LEVELS, {} if everywhere else train.FINE_LEVELS]


def test_errors_between_chains_are_those_of_repeated_chains() -> None:
    rng = np.random.default_rng(3)
    values, stderrs = [], []
    for _ in range(400):
        lengths = rng.integers(5, 60, size=40)
        offsets = np.repeat(rng.normal(size=40), lengths)  # chains that never mix
        estimate = between_chains(offsets + 0.3 * rng.normal(size=lengths.sum()), lengths)
        values.append(estimate.value)
        stderrs.append(estimate.stderr)
    assert np.sqrt(np.mean(np.square(stderrs))) == pytest.approx(np.std(values), rel=0.12)


@pytest.mark.parametrize("name", pretrained.names())
def test_shipped_generators_give_the_numbers_that_they_gave(name: str) -> None:
    """Up to rounding, which is another on other processors, and grows on the way down."""
    expected, found = json.loads(pretrained_numbers.FILE.read_text())[name], numbers(name)
    assert found.keys() == expected.keys()
    for what, values in expected.items():
        np.testing.assert_allclose(found[what], values, rtol=1e-3, atol=0.1, err_msg=what)
