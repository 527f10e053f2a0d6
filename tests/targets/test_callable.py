"""A torch function of the user's as a target: checked, stored by its name, and seen to change."""

from __future__ import annotations

import copy
import math
import pickle
from pathlib import Path
from typing import Any

import mdtraj
import numpy as np
import pytest
import torch
from openmm import app, unit

from openmm_vtdis import DiffusionBoltzmannGenerator, WeightedEnsemble, cli
from openmm_vtdis.generator.sharded import sample_to_file
from openmm_vtdis.interop import DiffusionMove
from openmm_vtdis.targets import CallableTarget
from openmm_vtdis.targets.callable import imported
from openmm_vtdis.testing import check_target
from openmm_vtdis.topology import placeholder_topology
from tests import potentials

STIFFNESS = 500.0
"""kJ/mol/nm^2 of every spring."""


def exact_frames(target: CallableTarget, n: int = 600) -> torch.Tensor:
    """Of the springs between all pairs: every mode has M times the stiffness of one."""
    kT = 8.31446261815324e-3 * (target.temperature or 1.0)
    noise = target.space.standard_normal(n, torch.Generator().manual_seed(1))
    return noise * math.sqrt(kT / (target.space.n_particles * STIFFNESS))


def springs(temperature: float = 300.0, **options: object) -> CallableTarget:
    return CallableTarget(
        potentials.spring_energy, placeholder_topology(3), temperature,
        energy_unit=unit.kilojoule_per_mole, **options,  # type: ignore[arg-type]
    )  # fmt: skip


def test_it_keeps_the_contract_of_a_target() -> None:
    target = springs()
    check_target(target, exact_frames(target, 6))
    assert target.topology is not None
    assert "spring_energy" in repr(target)


def test_units_are_those_of_openmm() -> None:
    x = exact_frames(springs(), 5)
    expected = potentials.spring_energy(x) / (8.31446261815324e-3 * 300.0)
    torch.testing.assert_close(springs().reduced_energy(x), expected)
    in_kcal = CallableTarget(
        lambda x: potentials.spring_energy(x) / 4.184, n_particles=3, temperature=300.0,
        energy_unit=unit.kilocalorie_per_mole,
    )  # fmt: skip
    torch.testing.assert_close(in_kcal.reduced_energy(x), expected)
    reduced = CallableTarget(potentials.spring_energy, n_particles=3)
    torch.testing.assert_close(reduced.reduced_energy(x), potentials.spring_energy(x))


def test_log_z_is_that_of_its_gaussian_and_it_is_stored_sharded_and_moved(tmp_path: Path) -> None:
    target = springs()
    gen = DiffusionBoltzmannGenerator.from_target(target, network="egnn-1x8", seed=0)
    frames = exact_frames(target)
    gen.train(frames, 60, batch_size=64, progress=False)
    gen.tune(frames, 20, "hessian", n_trajectories=300, progress=False)
    ensemble = gen.sample(1_000, seed=1, progress=False)
    variance = 8.31446261815324e-3 * 300.0 / (3.0 * STIFFNESS)
    assert abs(ensemble.log_z().z(3.0 * math.log(2.0 * math.pi * variance))) < 4.0
    path = gen.save(tmp_path / "springs.vtdis")
    with pytest.raises(ValueError, match=r"springs.vtdis: the energy is the function tests\.pot"):
        DiffusionBoltzmannGenerator.load(path)
    again = DiffusionBoltzmannGenerator.load(path, allow_pickle=True)
    assert again.path_sampler().fingerprint == gen.path_sampler().fingerprint
    assert again.topology is not None
    torch.testing.assert_close(
        again.target.reduced_energy(frames), target.reduced_energy(frames), rtol=0.0, atol=0.0
    )
    assert sample_to_file(again, tmp_path / "s.nc", 20, shard_size=10, progress=False)
    move = DiffusionMove(path, batch_size=4, seed=1, allow_pickle=True)
    assert move._kept().proposals.draw().x.shape == (3, 3)


def test_code_that_has_changed_is_seen(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    gen = DiffusionBoltzmannGenerator.from_target(springs(), network="egnn-1x8", seed=0)
    gen.train(exact_frames(springs()), 2, batch_size=8, progress=False)
    path = gen.save(tmp_path / "springs.vtdis")
    DiffusionBoltzmannGenerator.load(path, allow_pickle=True)  # control
    monkeypatch.setattr(potentials, "SPRING", 1.01 * potentials.SPRING)
    with pytest.raises(ValueError, match="expected the energies that tests.potentials:spring_ener"):
        DiffusionBoltzmannGenerator.load(path, allow_pickle=True)
    monkeypatch.delattr(potentials, "spring_energy")
    with pytest.raises(ValueError, match="expected the function tests.potentials:spring_energy"):
        DiffusionBoltzmannGenerator.load(path, allow_pickle=True)


def test_what_no_archive_can_name_is_pickled_or_refused(tmp_path: Path) -> None:
    local = CallableTarget(lambda x: potentials.spring_energy(x), n_particles=3)
    gen = DiffusionBoltzmannGenerator.from_target(local, network="egnn-1x8", seed=0)
    gen.train(exact_frames(local), 2, batch_size=8, progress=False)
    with pytest.raises(ValueError, match="save: expected a function at the top level of a module"):
        gen.save(tmp_path / "x.vtdis")
    whole = pickle.loads(pickle.dumps(springs()))
    assert whole.fingerprint == springs().fingerprint == copy.deepcopy(springs()).fingerprint
    assert springs().fingerprint == springs(400.0).fingerprint
    other = CallableTarget(potentials.spring_energy, n_particles=3)
    assert other.fingerprint != springs().fingerprint  # another unit


def test_bad_energies_are_refused() -> None:
    def anywhere(x: torch.Tensor) -> torch.Tensor:
        return x.square().sum(dim=(1, 2))

    def turned(x: torch.Tensor) -> torch.Tensor:
        y = x - x.mean(dim=1, keepdim=True)
        return y[:, :, 0].square().sum(dim=1)

    CallableTarget(anywhere, n_particles=3, centred=False)  # control
    for energy, match in (
        (anywhere, "stays the same under translation, got a change of"),
        (turned, "stays the same under rotation, got a change of"),
        (lambda x: x.sum(), r"shape \(4,\), one number a configuration, got \(\)"),
        (lambda x: 3.0, "one number a configuration, got float"),
    ):
        with pytest.raises(ValueError, match=match):
            CallableTarget(energy, n_particles=3)  # type: ignore[arg-type]
    spring = potentials.spring_energy
    for options, match in (
        ({}, "n_particles: expected a number where there is no topology"),
        ({"topology": placeholder_topology(3), "n_particles": 4}, "n_particles: expected 3"),
        ({"n_particles": 3, "energy_unit": unit.kilojoule_per_mole}, "temperature: expected one"),
        ({"n_particles": 3, "energy_unit": 2.0, "temperature": 300.0}, "energy_unit: expected"),
        ({"n_particles": 3, "positions": torch.zeros(4, 3)}, r"shape \(n, 3, 3\) in nm"),
    ):
        with pytest.raises(ValueError, match=match):
            CallableTarget(spring, **options)  # type: ignore[arg-type]
    with pytest.raises(ValueError, match="energy: expected a function of configurations, got str"):
        CallableTarget("u", n_particles=3)  # type: ignore[arg-type]


def test_the_command_line_trains_tunes_and_samples_it(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """From a module in the folder that the command is given in."""
    monkeypatch.chdir(tmp_path)
    (tmp_path / "my_springs.py").write_text(
        "def energy(x):\n    apart = x[:, :, None] - x[:, None]\n"
        f"    return {0.25 * STIFFNESS} * apart.square().sum(dim=(1, 2, 3))\n"
    )
    target = CallableTarget(
        potentials.spring_energy, n_particles=3, temperature=300.0,
        energy_unit=unit.kilojoule_per_mole,
    )  # fmt: skip
    frames = exact_frames(target, 300)
    topology = placeholder_topology(3)
    mdtraj.Trajectory(frames.numpy(), mdtraj.Topology.from_openmm(topology)).save_dcd("md.dcd")
    with open("top.pdb", "w") as file:
        app.PDBFile.writeFile(topology, frames[0].numpy() * unit.nanometer, file)
    quiet = ["--no-progress", "--seed", "0"]
    named = ["train", "--energy", "my_springs:energy", "-T", "300", "-t", "md.dcd"]
    sizes = ["--network", "egnn-1x8", "--iterations", "30", "--batch-size", "32"]
    assert cli.main([*named, "-p", "top.pdb", *sizes, "-o", "m.vtdis", *quiet]) == 0
    trusted = ["--allow-pickle", *quiet]
    tune = ["tune", "m.vtdis", "-t", "md.dcd", "--steps", "10", "--trajectories", "200"]
    assert cli.main([*tune, *trusted]) == 0
    assert cli.main(["sample", "m.vtdis", "-n", "50", "-o", "s.nc", *trusted]) == 0
    assert len(WeightedEnsemble.load("s.nc")) == 50
    capsys.readouterr()
    assert cli.main(["info", "m.vtdis"]) == 2
    assert "pass allow_pickle=True (--allow-pickle)" in capsys.readouterr().err
    for wrong in (["-s", "x.xml"], ["--energy", "my_springs:nothing"]):
        assert cli.main([*named, "-p", "top.pdb", *wrong, *quiet]) == 2
    message = capsys.readouterr().err
    assert "expected one of --system and --energy, got both or neither" in message
    assert "expected the function my_springs:nothing" in message


def test_the_command_line_from_an_energy_in_kt_by_the_lines_that_it_prints(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """One particle that is not centred, frames of .npy, and no temperature."""
    monkeypatch.chdir(tmp_path)
    (tmp_path / "my_well.py").write_text(
        "def energy(x):\n    return 2.0 * (x - 1.0).square().sum(dim=(1, 2))\n"
    )
    monkeypatch.syspath_prepend(str(tmp_path))
    rng = np.random.default_rng(0)
    np.save("frames.npy", 1.0 + 0.5 * rng.normal(size=(2_000, 1, 2)))
    quiet = ["--no-progress", "--seed", "0"]
    train = [
        "train", "--energy", "my_well:energy", "--energy-unit", "kT", "--n-particles", "1",
        "--n-dims", "2", "-t", "frames.npy", "--network", "mlp-2x16", "--iterations", "60",
    ]  # fmt: skip
    assert cli.main([*train, *quiet]) == 2
    assert "give centred=False" in capsys.readouterr().err
    assert cli.main([*train, "--not-centred", *quiet]) == 0
    for sizes in (["--steps", "10", "--trajectories", "200"], ["-n", "2000"], []):
        following = capsys.readouterr().out.splitlines()[-1].removeprefix("next: openmm-vtdis ")
        assert cli.main([*following.split(), *sizes, *quiet]) == 0
    check = ["--archive", "model.vtdis", "-t", "frames.npy", "--allow-pickle"]
    assert "frames of MD show what these samples may have missed" in capsys.readouterr().out
    assert cli.main(["analyze", "model.nc", *check, *quiet]) == 0
    log_z = WeightedEnsemble.load("model.nc").log_z()
    assert abs(log_z.z(math.log(0.5 * math.pi))) < 4.0
    capsys.readouterr()
    np.save("frames.npy", np.array(["a"]))
    assert cli.main([*train, "--not-centred", *quiet]) == 2
    assert "train: " in capsys.readouterr().err
    system = ["train", "-s", "x.xml", "-t", "frames.npy"]
    for wrong, what in (([], "--temperature"), (["-T", "300", "--not-centred"], "--not-centred")):
        assert cli.main([*system, *wrong, *quiet]) == 2
        assert f"{what} with --system" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("change", "match"),
    [
        ({"centred": "no"}, "centred: expected True or False, got 'no'"),
        ({"centred": None}, "centred: expected True or False, got None"),
        ({"n_particles": 1}, "n_particles: expected at least 2, got 1; give centred=False"),
        (
            {"topology": "top.pdb", "n_particles": None},
            "expected an openmm.app.Topology, got .*str",
        ),
        ({"energy": lambda x: x.sum((1, 2)) * float("nan")}, "expected one that is finite near"),
        ({"energy": lambda x: x.sum((1, 2)) + float("inf")}, "expected one that is finite near"),
        (
            {"energy": lambda x: torch.nn.Linear(9, 1)(x.flatten(1))[:, 0]},
            r"networks need \.double\(\)\), got RuntimeError: .*same dtype",
        ),
        ({"energy": lambda x: x.nothing()}, "got AttributeError: .*nothing"),
    ],
)
def test_what_is_wrong_with_an_energy_is_said_at_once(change: dict[str, Any], match: str) -> None:
    arguments: dict[str, Any] = {"energy": potentials.spring_energy, "n_particles": 3, **change}
    with pytest.raises(ValueError, match=match):
        CallableTarget(**arguments)


@pytest.mark.parametrize(
    ("name", "match"),
    [
        ("spring_energy", "expected a function as my_module:my_function, got 'spring_energy'"),
        ("tests.potentials:", "expected a function as my_module:my_function"),
        ("tests.potentials:none", r"got KeyError\('none'\)"),
        ("tests.broken:energy", "got SyntaxError"),
        ("tests.raising:energy", r"got RuntimeError\('no weights here'\)"),
    ],
)
def test_names_of_functions(name: str, match: str, monkeypatch: pytest.MonkeyPatch) -> None:
    def imports(module: str) -> Any:
        if module == "tests.broken":
            raise SyntaxError("invalid syntax")
        if module == "tests.raising":
            raise RuntimeError("no weights here")
        return potentials

    monkeypatch.setattr("importlib.import_module", imports)
    assert imported("tests.potentials:spring_energy") is potentials.spring_energy
    with pytest.raises(ValueError, match=match):
        imported(name)
