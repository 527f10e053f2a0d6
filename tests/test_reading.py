"""Files that users have: force fields, topologies, trajectories; sound ones, and damaged ones."""

from __future__ import annotations

import os
import subprocess
import sys
import textwrap
from pathlib import Path

import mdtraj as md
import numpy as np
import openmm
import pytest
import torch
from openmm import app, unit
from scipy.io import netcdf_file

from openmm_vtdis import DiffusionBoltzmannGenerator, WeightedEnsemble, cli, cli_options
from openmm_vtdis.core.space import Space
from openmm_vtdis.interop import system_files
from openmm_vtdis.targets import OpenMMTarget
from openmm_vtdis.topology import placeholder_topology
from openmm_vtdis.topology.frames import read_frames
from tests import damage, potentials
from tests.conftest import needs_python_force


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("reading")
    damage.originals(folder)
    return folder


# -- force fields -------------------------------------------------------------------------------
def energy(system: openmm.System, x: np.ndarray) -> float:
    context = openmm.Context(
        system, openmm.VerletIntegrator(0.001), openmm.Platform.getPlatformByName("Reference")
    )
    context.setPositions(x)
    return context.getState(energy=True).getPotentialEnergy()._value


@pytest.mark.parametrize("solvent", [None, *system_files.IMPLICIT_SOLVENTS])
def test_amber(solvent: str | None, folder: Path) -> None:
    path = str(folder / "top.prmtop")
    file = app.AmberPrmtopFile(path)
    kind = None if solvent is None else getattr(app, solvent)
    expected = file.createSystem(
        nonbondedMethod=app.NoCutoff, constraints=None, rigidWater=False, implicitSolvent=kind
    )
    system = system_files.read_system(path, implicit_solvent=solvent)
    topology = system_files.read_topology(path)
    assert topology.getNumBonds() == file.topology.getNumBonds() > 0
    x = np.random.default_rng(0).normal(size=(system.getNumParticles(), 3))
    assert energy(system, x) == energy(expected, x)
    OpenMMTarget(system, topology).check_bound()


def test_charmm_and_gromacs(folder: Path) -> None:
    psf, top = str(folder / "top.psf"), str(folder / "top.top")
    with pytest.raises(
        ValueError, match="expected the files of CHARMM's parameters with it, got no"
    ):
        system_files.read_system(psf)
    charmm = system_files.read_system(psf, parameters=[str(folder / "par.prm")])
    gromacs = system_files.read_system(top)
    _, x = potentials.water()
    for system, path in ((charmm, psf), (gromacs, top)):
        assert system.getNumConstraints() == 0
        topology = system_files.read_topology(path)
        assert [atom.name for atom in topology.atoms()] == ["O", "H1", "H2"]
        assert topology.getNumBonds() == 2
        OpenMMTarget(system, topology).check_bound()
    k, length, angle = 502416.0, 0.09572, np.radians(104.52)
    r = [np.linalg.norm(x[i] - x[0]) for i in (1, 2)]
    theta = np.arccos(x[1] @ x[2] / (r[0] * r[1]))
    bent = 0.5 * 628.02 * (theta - angle) ** 2
    expected = 0.5 * k * sum((d - length) ** 2 for d in r) + bent
    assert energy(gromacs, x) == pytest.approx(expected, rel=1e-6)
    with pytest.raises(ValueError, match="expected no implicit solvent, which OpenMM"):
        system_files.read_system(top, implicit_solvent="OBC2")
    with pytest.raises(ValueError, match="implicit_solvent: expected one of 'HCT'.* got 'water'"):
        system_files.read_system(psf, implicit_solvent="water", parameters=["x"])
    with pytest.raises(ValueError, match="expected no options of a force field with the XML"):
        system_files.read_system(str(folder / "system.xml"), implicit_solvent="OBC2")


def test_a_top_file_may_be_ambers(folder: Path) -> None:
    copy = folder / "amber.top"
    copy.write_bytes((folder / "top.prmtop").read_bytes())
    assert system_files.has_topology(str(copy))
    assert (
        system_files.read_system(str(copy)).getNumParticles()
        == system_files.read_topology(str(copy)).getNumAtoms()
    )


@pytest.mark.parametrize("number", ["99999999999", "100001", "9" * 5_000])
def test_more_molecules_than_anybody_has(number: str, folder: Path, tmp_path: Path) -> None:
    """OpenMM makes them one by one, until the memory is full."""
    text = (folder / "top.top").read_text()
    path = tmp_path / "many.top"
    path.write_text(text.replace("HOH 1\n", f"HOH {number}\n"))
    for read in (system_files.read_system, system_files.read_topology):
        with pytest.raises(ValueError, match=r"a GROMACS top, got .* molecules of HOH"):
            read(str(path))
    path.write_text(text.replace("HOH 1\n", "HOH 2 ; two\n"))
    assert system_files.read_topology(str(path)).getNumAtoms() == 6


def test_what_is_missing_is_named(folder: Path) -> None:
    for read in (system_files.read_system, system_files.read_topology):
        with pytest.raises(FileNotFoundError, match=r"nowhere.prmtop: no such file"):
            read("nowhere.prmtop")
    psf = str(folder / "top.psf")
    with pytest.raises(FileNotFoundError, match=r"nowhere.prm: no such file"):
        system_files.read_system(psf, parameters=["nowhere.prm"])
    with pytest.raises(
        ValueError, match="expected the XML of a System, or an AMBER, CHARMM or GRO"
    ):
        system_files.read_system(str(folder / "top.pdb"))
    with pytest.raises(ValueError, match="expected a PDB, mmCIF, prmtop, psf or top file"):
        system_files.read_topology(str(folder / "system.xml"))


@pytest.mark.parametrize("text", ["300", "300K", "300 K", "300k", "300.0kelvin", " 3e2 Kelvin "])
def test_temperatures_as_people_write_them(text: str) -> None:
    assert cli_options.temperature(text) == 300.0


@pytest.mark.parametrize("text", ["", "K", "300C", "-300K", "nan", "300 K K", "27 degrees"])
def test_what_is_no_temperature(text: str, capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as stop:
        cli.main(["train", "-s", "a.xml", "-t", "a.dcd", f"--temperature={text}"])
    assert stop.value.code == 2
    assert f"expected a temperature in kelvin, got {text!r}" in capsys.readouterr().err


@pytest.mark.parametrize("kind", ["prmtop", "psf", "top"])
def test_from_files_of_force_fields_to_an_archive(
    kind: str, folder: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    system = str(folder / f"top.{kind}")
    more = {"psf": ["--parameters", str(folder / "par.prm")]}.get(kind, [])
    more += {"prmtop": ["--implicit-solvent", "OBC2"]}.get(kind, [])
    topology = system_files.read_topology(system)
    target = OpenMMTarget(
        system_files.read_system(
            system,
            implicit_solvent="OBC2" if kind == "prmtop" else None,
            parameters=[str(folder / "par.prm")] if kind == "psf" else (),
        ),
        topology,
    )
    integrator = openmm.LangevinMiddleIntegrator(300, 10, 0.0005)
    simulation = app.Simulation(topology, target.system, integrator)
    n = topology.getNumAtoms()
    start = np.random.default_rng(3).normal(size=(n, 3)) * 0.3
    simulation.context.setPositions(potentials.water()[1] if n == 3 else start)
    simulation.minimizeEnergy()
    simulation.context.setVelocitiesToTemperature(300, 1)
    simulation.step(500)
    frames = []
    for _ in range(40):
        simulation.step(20)
        state = simulation.context.getState(positions=True)
        frames.append(state.getPositions(asNumpy=True).value_in_unit(unit.nanometer))
    trajectory = md.Trajectory(np.array(frames), md.Topology.from_openmm(topology))
    trajectory.save_netcdf(str(tmp_path / "md.nc"))
    output = str(tmp_path / "model.vtdis")
    command = ["train", "-s", system, *more, "-t", str(tmp_path / "md.nc"), "-T", "300K"]
    command += ["-o", output, "--iterations", "3", "--network", "egnn-1x8", "--no-progress"]
    assert cli.main(command) == 0, capsys.readouterr().err
    gen = DiffusionBoltzmannGenerator.load(output)
    assert gen.target.fingerprint == target.fingerprint
    assert gen.topology is not None
    assert gen.topology.getNumBonds() == topology.getNumBonds()


@needs_python_force
def test_the_command_line_trusts_a_pickle_only_when_told(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    system = potentials.system_with(potentials.Springs())
    (tmp_path / "pf.xml").write_text(openmm.XmlSerializer.serialize(system))
    topology, x = potentials.water()
    with (tmp_path / "top.pdb").open("w") as file:
        app.PDBFile.writeFile(topology, x * unit.nanometer, file)
    trajectory = md.Trajectory(potentials.frames(60, 0.003), md.Topology.from_openmm(topology))
    trajectory.save_dcd(str(tmp_path / "md.dcd"))
    files = ["-p", str(tmp_path / "top.pdb"), "-t", str(tmp_path / "md.dcd"), "-T", "300"]
    small = ["--iterations", "3", "--network", "egnn-1x8", "--no-progress"]
    output = str(tmp_path / "model.vtdis")
    train = ["train", "-s", str(tmp_path / "pf.xml"), *files, "-o", output, *small]
    assert cli.main(train) == 2
    assert "pass --allow-pickle" in capsys.readouterr().err
    assert cli.main([*train, "--allow-pickle", "--n-threads", "2"]) == 0
    assert cli.main(["info", output]) == 2
    assert cli.main(["info", output, "--allow-pickle"]) == 0
    tune = ["tune", output, "-t", str(tmp_path / "md.dcd"), "--steps", "3", "--no-progress"]
    assert cli.main([*tune, "--trajectories", "100", "--allow-pickle"]) == 0
    samples = str(tmp_path / "samples.nc")
    draw = ["sample", output, "-n", "20", "-o", samples, "--shard-size", "10", "--no-progress"]
    assert cli.main([*draw, "--allow-pickle"]) == 0
    assert cli.main([*draw, "--allow-pickle"]) == 0  # the same run: it is the same generator
    capsys.readouterr()


@needs_python_force
@pytest.mark.parametrize("where", ["__main__", "a_module_that_is_gone"])
def test_functions_that_cannot_be_imported_here(
    where: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """OpenMM ends the process for them."""
    code = """
        import sys, numpy as np, openmm, logging
        logging.basicConfig()
        sys.path.insert(0, sys.argv[1])
        if sys.argv[2] == "__main__":
            def energy(state):
                x = state.getPositions(asNumpy=True)._value
                d = x[:, None] - x[None]
                return 12.5 * (d**2).sum(), -50.0 * d.sum(1)
        else:
            from a_module_that_is_gone import energy
        from openmm_vtdis import DiffusionBoltzmannGenerator
        s = openmm.System()
        for _ in range(3): s.addParticle(12.0)
        s.addForce(openmm.PythonForce(energy))
        g = DiffusionBoltzmannGenerator(s, None, 300, network="egnn-1x8")
        x = 0.13 * np.random.default_rng(0).normal(size=(100, 3, 3))
        g.train(x, 1, batch_size=4, progress=False)
        g.save(sys.argv[1] + "/a.vtdis")
        open(sys.argv[1] + "/s.xml", "w").write(openmm.XmlSerializer.serialize(s))
        """
    script = textwrap.dedent(code)
    function = script[script.index("    def energy") : script.index("else:")]
    (tmp_path / "a_module_that_is_gone.py").write_text(textwrap.dedent(function))
    (tmp_path / "script.py").write_text(script)
    done = subprocess.run(
        [sys.executable, str(tmp_path / "script.py"), str(tmp_path), where],
        capture_output=True, text=True, check=False, cwd=Path(__file__).parents[1],
        env={**os.environ, "PYTHONPATH": str(Path(__file__).parents[1])},
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    assert ("no other program will be able to read" in done.stderr) == (where == "__main__")
    with pytest.raises(ValueError, match="expected a PythonForce whose function can be imported"):
        DiffusionBoltzmannGenerator.load(tmp_path / "a.vtdis", allow_pickle=True)
    with pytest.raises(ValueError, match="expected a PythonForce whose function can be imported"):
        system_files.read_system(str(tmp_path / "s.xml"), allow_pickle=True)
    assert cli.main(["info", str(tmp_path / "a.vtdis"), "--allow-pickle"]) == 2
    assert "can be imported here" in capsys.readouterr().err


# -- errors of other packages ---------------------------------------------------------------------
def test_errors_of_openmm_and_mdtraj_are_one_line(
    folder: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    def system(name: str, *forces: openmm.Force) -> str:
        made = openmm.XmlSerializer.deserialize((folder / "system.xml").read_text())
        for force in forces:
            made.addForce(force)
        (folder / name).write_text(openmm.XmlSerializer.serialize(made))
        return str(folder / name)

    def scaled(k: float, text: str = "k*r") -> openmm.CustomBondForce:
        force = openmm.CustomBondForce(text)
        force.addGlobalParameter("k", k)
        force.addBond(0, 1, [])
        return force

    beyond, short = openmm.HarmonicBondForce(), openmm.NonbondedForce()
    beyond.addBond(0, 7, 0.1, 10.0)
    short.addParticle(0.0, 0.1, 0.0)
    (folder / "bad.gro").write_text("t\n    3\n    1HOH     O0    1   x.xxx   0.000   0.000\n")
    (folder / "bad.mol2").write_text("@<TRIPOS>MOLECULE\nx\n")
    (folder / "bad.h5").write_text("no HDF5\n")
    good = str(folder / "system.xml")
    trajectory = str(folder / "md.dcd")
    for xml, frames in (
        (system("two-k.xml", scaled(1.0), scaled(2.0)), trajectory),
        (system("bond-7.xml", beyond), trajectory),
        (system("short.xml", short), trajectory),
        (system("syntax.xml", scaled(1.0, "k*(r")), trajectory),
        *((good, str(folder / name)) for name in ("bad.gro", "bad.mol2", "bad.h5", "top.pdb.gz")),
    ):
        files = ["train", "-s", xml, "-p", str(folder / "top.pdb"), "-t", frames, "-T", "300"]
        assert cli.main([*files, "-o", str(folder / "out.vtdis"), "--no-progress"]) == 2
        told = capsys.readouterr().err.splitlines()
        assert len([line for line in told if "openmm-vtdis: " in line]) == 1
        assert told[-1].startswith("openmm-vtdis: ")


def test_damaged_files_are_read_or_refused(tmp_path: Path) -> None:
    """A thousand of them, of all kinds; ``make test-slow`` tries many more."""
    done = subprocess.run(
        [sys.executable, "-m", "tests.damage", "1000"], capture_output=True, text=True, check=False,
        cwd=Path(__file__).parents[1],
    )  # fmt: skip
    assert done.returncode == 0, done.stdout[-3_000:]


@pytest.mark.slow
def test_many_damaged_files_are_read_or_refused() -> None:
    assert damage.main(["100000", "--seed", "7"]) == 0


def test_a_reader_that_leaks_is_seen(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """Control: a traceback, a message of several lines, and a process that ends."""

    def leaking(folder: Path) -> dict:
        def read(path: str) -> None:
            content = Path(path).read_bytes()
            if content[:1] == b"a":
                raise KeyError("x")
            if content[:1] == b"b":
                raise ValueError("one\ntwo")
            os.abort()

        for letter in "abc":
            (folder / letter).write_bytes(letter.encode() * 5_000)
        return dict.fromkeys("abc", read)

    monkeypatch.setattr(damage, "originals", leaking)
    assert damage.main(["3"]) == 3
    text = capsys.readouterr().out
    assert "KeyError: 'x'" in text
    assert "lines: one" in text
    assert "ended the process, -6" in text


# -- trajectories ---------------------------------------------------------------------------------
@pytest.mark.parametrize("n_atoms", [5, 14])
@pytest.mark.parametrize("kind", ["xtc", "trr"])
def test_headers_of_gromacs_files(kind: str, n_atoms: int, tmp_path: Path) -> None:
    rng = np.random.default_rng(0)
    space, top = Space(n_atoms, 3), md.Topology.from_openmm(placeholder_topology(n_atoms))
    x = rng.normal(size=(6, n_atoms, 3))
    for boxed in (False, True):
        trajectory = md.Trajectory(x, top)
        if boxed:
            trajectory.unitcell_vectors = np.tile(2.0 * np.eye(3), (6, 1, 1))
        path = tmp_path / f"md.{kind}"
        trajectory.save(str(path))
        found = read_frames("train", path, space, None)
        torch.testing.assert_close(found, space.project(torch.tensor(x)), atol=1e-3, rtol=0.0)
    content = path.read_bytes()
    with pytest.raises(ValueError, match=r"frame 0 of .* has \d+ atoms"):
        read_frames("train", path, Space(n_atoms + 1, 3), None)
    path.write_bytes(content[:-7])
    with pytest.raises(ValueError, match=r"frame 5 of .* is cut short, as a killed simulation"):
        read_frames("train", path, space, None)
    frame = len(content) // 6 if kind == "trr" or n_atoms < 10 else None
    if frame is not None:
        broken = content[:frame] + b"\0\0\0\1" + content[frame + 4 :]
        path.write_bytes(broken)
        with pytest.raises(ValueError, match=r"frame 1 of .* is damaged"):
            read_frames("train", path, space, None)


# -- weighted files ----------------------------------------------------------------------
@pytest.mark.parametrize("suffix", [".nc", ".npz"])
def test_weighted_samples_are_no_md(suffix: str, tmp_path: Path) -> None:
    rng = np.random.default_rng(0)
    e = WeightedEnsemble(rng.normal(size=(40, 3, 3)), rng.normal(size=40), rng.normal(size=40))
    space = Space(3, 3)
    weighted, raw, pooled = (tmp_path / f"{name}{suffix}" for name in ("a", "b", "c"))
    e.save(weighted)
    e.unweighted().save(raw)
    halves = [part.unweighted() for part in (e[:20], e[20:].with_metadata({"run": 2}))]
    WeightedEnsemble.concatenate(halves).save(pooled)
    copy = tmp_path / "renamed.ncdf"
    copy.write_bytes(weighted.read_bytes())
    for path, what in (
        (weighted, "weighted"),
        (raw, "unweighted"),
        (pooled, "unweighted"),
        ([weighted], "weighted"),
        *([(copy, "weighted")] if suffix == ".nc" else []),
    ):
        message = f"expected frames of MD, got {what} samples of openmm-vtdis"
        if suffix == ".npz":  # which no trajectory reader takes
            message = r"expected a trajectory, got .*WeightedEnsemble.load\(path\)"
        with pytest.raises(ValueError, match=message):
            read_frames("noise", path, space, None)
    if suffix == ".nc":  # control: resampled ones are fair samples, and MD is read as ever
        fair = e.resample(30, seed=0)
        fair.save(tmp_path / "fair.nc")
        found = read_frames("noise", tmp_path / "fair.nc", space, None)
        expected = space.project(torch.tensor(fair.positions))
        torch.testing.assert_close(found, expected, atol=1e-6, rtol=0.0)
        top = md.Topology.from_openmm(placeholder_topology(3))
        md.Trajectory(e.positions, top).save_netcdf(str(tmp_path / "md.nc"))
        assert len(read_frames("noise", tmp_path / "md.nc", space, None)) == 40
    with pytest.raises(ValueError, match="expected an array"):
        read_frames("noise", e, space, None)  # type: ignore[arg-type]


@pytest.mark.parametrize("scale", [None, 2.0])
def test_amber_netcdf_is_in_angstrom_times_its_scale(scale: float | None, tmp_path: Path) -> None:
    x = np.random.default_rng(0).normal(size=(4, 3, 3)).astype(np.float32)
    with netcdf_file(tmp_path / "md.nc", "w", version=2) as file:
        for name, size in (("frame", None), ("atom", 3), ("spatial", 3)):
            file.createDimension(name, size)
        variable = file.createVariable("coordinates", "f4", ("frame", "atom", "spatial"))
        if scale is not None:
            variable.scale_factor = scale
        variable[:] = 10.0 * x / (scale or 1.0)
    space = Space(3, 3)
    found = read_frames("train", tmp_path / "md.nc", space, None)
    torch.testing.assert_close(found, space.project(torch.tensor(x).double()), atol=1e-6, rtol=0.0)
