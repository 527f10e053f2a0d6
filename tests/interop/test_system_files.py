"""Systems and topologies from files of AMBER, CHARMM, GROMACS and OpenMM, to an archive."""

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
from openmm import app, unit

from openmm_vtdis import DiffusionBoltzmannGenerator, cli
from openmm_vtdis.interop import system_files
from openmm_vtdis.targets import OpenMMTarget
from tests import damage, potentials
from tests.conftest import needs_python_force


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("reading")
    damage.originals(folder)
    return folder


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
        capture_output=True, text=True, check=False, cwd=Path(__file__).parents[2],
        env={**os.environ, "PYTHONPATH": str(Path(__file__).parents[2])},
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    assert ("no other program will be able to read" in done.stderr) == (where == "__main__")
    with pytest.raises(ValueError, match="expected a PythonForce whose function can be imported"):
        DiffusionBoltzmannGenerator.load(tmp_path / "a.vtdis", allow_pickle=True)
    with pytest.raises(ValueError, match="expected a PythonForce whose function can be imported"):
        system_files.read_system(str(tmp_path / "s.xml"), allow_pickle=True)
    assert cli.main(["info", str(tmp_path / "a.vtdis"), "--allow-pickle"]) == 2
    assert "can be imported here" in capsys.readouterr().err
