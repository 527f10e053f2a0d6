"""The command line: from files to samples, interrupted and resumed, and what it refuses."""

from __future__ import annotations

import contextlib
import inspect
import os
import re
import shutil
import signal
import subprocess
import sys
import termios
from pathlib import Path
from typing import Any

import mdtraj
import numpy as np
import openmm
import pytest
from openmm import app

from openmm_vtdis import DiffusionBoltzmannGenerator, WeightedEnsemble, cli, pretrained
from openmm_vtdis.core.units import thermal_energy
from openmm_vtdis.storage.archive import read_archive
from openmm_vtdis.targets import alanine_dipeptide
from openmm_vtdis.topology import placeholder_topology
from openmm_vtdis.training.trainer import Trainer
from openmm_vtdis.tuning import tune

STIFFNESS, TEMPERATURE = 300.0, 300.0


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """System XML and a trajectory of three particles on springs, and a trained archive."""
    folder = tmp_path_factory.mktemp("cli")
    system, force = openmm.System(), openmm.HarmonicBondForce()
    for _ in range(3):
        system.addParticle(12.0)
    for i, j in ((0, 1), (1, 2), (0, 2)):
        force.addBond(i, j, 0.0, STIFFNESS)
    system.addForce(force)
    (folder / "system.xml").write_text(openmm.XmlSerializer.serialize(system))
    width = np.sqrt(thermal_energy(TEMPERATURE) / (3.0 * STIFFNESS))
    x = width * np.random.default_rng(0).normal(size=(2_000, 3, 3))
    top = mdtraj.Topology.from_openmm(placeholder_topology(3))
    mdtraj.Trajectory(x, top).save_dcd(str(folder / "md.dcd"))
    assert run(folder, "train", *training(folder)) == 0
    tuning = ["-t", str(folder / "md.dcd"), "--steps", "6", "--trajectories", "500"]
    assert run(folder, "tune", str(folder / "model.vtdis"), *tuning) == 0
    return folder


def training(folder: Path, iterations: int = 60) -> list[str]:
    files = ["-s", str(folder / "system.xml"), "-t", str(folder / "md.dcd")]
    size = ["--network", "egnn-2x16", "--iterations", str(iterations), "--batch-size", "64"]
    return [*files, "-T", str(TEMPERATURE), "-o", str(folder / "model.vtdis"), *size]


def run(folder: Path, *arguments: str) -> int:
    quiet = [] if arguments[0] == "info" else ["--no-progress"]
    return cli.main([*arguments, *quiet])


def test_from_files_to_samples(folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    samples, archive = folder / "samples.nc", str(folder / "model.vtdis")
    assert run(folder, "sample", archive, "-n", "1500", "-o", str(samples)) == 0
    assert f"next: openmm-vtdis analyze {samples}" in capsys.readouterr().out
    assert len(mdtraj.load(samples, top=mdtraj.Topology.from_openmm(placeholder_topology(3)))) == (
        1_500
    )
    both = ["--archive", archive, "-t", str(folder / "md.dcd")]
    assert run(folder, "analyze", str(samples), *both) == 0
    text = capsys.readouterr().out
    assert "forward ESS" in text
    assert "-log Z by BAR" in text
    ensemble = WeightedEnsemble.load(samples)
    assert abs(ensemble.expectation(ensemble.reduced_energies).z(3.0)) < 4.0
    exact = 3.0 * np.log(2.0 * np.pi * thermal_energy(TEMPERATURE) / (3.0 * STIFFNESS))
    assert abs(ensemble.log_z().z(exact)) < 4.0
    assert run(folder, "info", archive) == 0
    assert "grid          6 steps" in capsys.readouterr().out


def test_samples_are_analysed_on_their_own_grid(
    folder: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    samples, archive = str(folder / "coarse.nc"), str(folder / "model.vtdis")
    assert run(folder, "sample", archive, "-n", "600", "--steps", "4", "-o", samples) == 0
    md = ["-t", str(folder / "md.dcd")]
    assert run(folder, "analyze", samples, "--archive", archive, *md) == 0
    assert "-log Z by BAR" in capsys.readouterr().out
    again = str(folder / "again.vtdis")
    assert run(folder, "tune", archive, *md, "--steps", "6", "--seed", "9", "-o", again) == 0
    assert run(folder, "analyze", samples, "--archive", again, *md) == 2
    assert "log_weights() of the same generator, System, tuning" in capsys.readouterr().err


def test_training_that_is_done_keeps_the_tuning(
    folder: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """A job script that runs twice."""
    archive = folder / "model.vtdis"
    before = archive.read_bytes()
    assert run(folder, "train", *training(folder)) == 0
    assert "has this network already, and its tuning" in capsys.readouterr().out
    assert archive.read_bytes() == before
    # what is no archive is replaced, after training as before it
    other = tmp_path / "other.vtdis"
    other.write_text("notes")
    short = [*training(folder, 2), "-o", str(other), "--checkpoint", str(tmp_path / "other.ckpt")]
    assert run(folder, "train", *short) == 0
    assert DiffusionBoltzmannGenerator.load(other).process is None


def test_an_interrupted_sample_goes_on_where_it_was(
    folder: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    archive, whole, parts = (str(folder / f) for f in ("model.vtdis", "whole.npz", "parts.npz"))
    size = ["-n", "35", "--shard-size", "10"]
    assert run(folder, "sample", archive, *size, "-o", whole) == 0
    draw, calls = DiffusionBoltzmannGenerator.sample, []

    def interrupted(self: DiffusionBoltzmannGenerator, *args: Any, **options: Any) -> Any:
        calls.append(args)
        if len(calls) == 3:
            raise KeyboardInterrupt
        return draw(self, *args, **options)

    monkeypatch.setattr(DiffusionBoltzmannGenerator, "sample", interrupted)
    assert run(folder, "sample", archive, *size, "-o", parts) == 130
    assert f"kept in {parts}.shards" in capsys.readouterr().err
    assert run(folder, "sample", archive, *size, "-o", parts, "--seed", "1") == 2
    assert "differ in seed (0 there, 1 here)" in capsys.readouterr().err
    assert run(folder, "sample", archive, *size, "-o", parts) == 0
    assert [args[0] for args in calls] == [10, 10, 10, 10, 5]
    a, b = WeightedEnsemble.load(whole), WeightedEnsemble.load(parts)
    np.testing.assert_array_equal(a.log_weights, b.log_weights)
    assert run(folder, "sample", archive, *size, "-o", parts) == 0  # done already
    assert run(folder, "sample", archive, *size, "-o", parts, "--seed", "1") == 2
    assert "exists; give another name" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("method", "said", "printed"),
    [
        ("train", "at iteration 7, {}", "at iteration 7, new.ckpt. The same command goes on."),
        ("train", "", "The same command goes on."),  # before it has begun
        ("train_pair_head", "at 7, {}", "at 7, new.pairs.ckpt. The same command goes on."),
    ],
)
def test_an_interrupted_training_says_how_to_go_on(
    method: str, said: str, printed: str, folder: Path, tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str],
) -> None:  # fmt: skip
    def interrupted(*args: Any, **options: Any) -> None:
        raise KeyboardInterrupt(said.format(options["checkpoint"].name))

    monkeypatch.setattr(DiffusionBoltzmannGenerator, method, interrupted)
    output = ["-o", str(tmp_path / "new.vtdis")]
    assert run(folder, "train", *training(folder, 2), "--pairs", "2", *output) == 130
    assert capsys.readouterr().err.endswith(f"openmm-vtdis: interrupted. {printed}\n")


def written(terminal: int, until: str | None = None) -> str:
    """What a process writes to a terminal, to its end or until a pattern is there."""
    text = b""
    with contextlib.suppress(OSError):  # the end, on Linux
        while until is None or re.search(until, text.decode(errors="ignore")) is None:
            if not (more := os.read(terminal, 1_000)):
                break
            text += more
    return text.decode(errors="ignore")


def test_ctrl_c_in_a_terminal(
    folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A real signal to a real process: exit code, message and checkpoint; then the command again.

    The bar on a terminal tells when training has begun.
    """
    n, checkpoint = 300, tmp_path / "new.ckpt"
    command = ["train", *training(folder, n), "-o", str(tmp_path / "new.vtdis")]
    terminal, theirs = os.openpty()
    termios.tcsetwinsize(theirs, (24, 80))
    # a process inherits it where SIGINT is ignored, as it is in the background of a shell
    before = signal.signal(signal.SIGINT, signal.default_int_handler)
    try:
        process = subprocess.Popen(
            [sys.executable, "-m", "openmm_vtdis.cli", *command], stdout=theirs, stderr=theirs
        )
    finally:
        signal.signal(signal.SIGINT, before)
    os.close(theirs)
    started = written(terminal, rf" [1-9]\d*/{n} ")
    process.send_signal(signal.SIGINT)
    text = written(terminal)
    os.close(terminal)
    assert process.wait() == 130, started + text
    message = re.search(r"interrupted\. training: at iteration (\d+); .* from (\S+)\. (.*)", text)
    assert message is not None, text
    assert message[2] == str(checkpoint)
    assert message[3].strip() == "The same command goes on."
    done = int(message[1])
    assert 0 < done < n
    assert read_archive(checkpoint, "checkpoint")[1]["iteration"] == done
    assert not (tmp_path / "new.vtdis").exists()
    assert "Traceback" not in text

    step, steps = Trainer._step, []
    monkeypatch.setattr(Trainer, "_step", lambda trainer: steps.append(1) or step(trainer))
    assert run(folder, *command) == 0
    assert len(steps) == n - done
    assert DiffusionBoltzmannGenerator.load(tmp_path / "new.vtdis").process is None


def test_an_interrupted_tuning_leaves_the_archive(
    folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:  # fmt: skip
    archive = tmp_path / "model.vtdis"
    shutil.copy(folder / "model.vtdis", archive)
    before = archive.read_bytes()
    command = ["tune", str(archive), "-t", str(folder / "md.dcd"), "--steps", "5"]

    def interrupted(*args: Any, **options: Any) -> None:
        raise KeyboardInterrupt

    with monkeypatch.context() as patched:
        patched.setattr(tune, "tune", interrupted)
        assert run(folder, *command) == 130
    error = capsys.readouterr().err
    assert error.endswith(f"{archive} is as it was. The same command begins again.\n")
    assert archive.read_bytes() == before
    assert run(folder, *command, "--trajectories", "300") == 0
    assert archive.read_bytes() != before


def test_options_from_a_file_stand_behind_those_given(
    folder: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    config = tmp_path / "run.toml"
    config.write_text(
        f'[tune]\ntrajectory = ["{folder / "md.dcd"}"]\nsteps = 4\ntrajectories = 300\n'
        f'output = "{tmp_path / "tuned.vtdis"}"\n'
    )
    archive = str(folder / "model.vtdis")
    assert run(folder, "tune", archive, "--config", str(config)) == 0
    assert "alpha2, 4 steps" in capsys.readouterr().out
    assert run(folder, "tune", archive, f"--config={config}", "--steps", "3") == 0
    assert "alpha2, 3 steps" in capsys.readouterr().out
    config.write_text(f'[tune]\ntrajectory = "{folder / "md.dcd"}"\nsteps = 5\n')
    more = ["--config", str(config), "--trajectories", "300", "-o", str(tmp_path / "t.vtdis")]
    assert run(folder, "tune", archive, *more) == 0
    text = capsys.readouterr().out
    assert "alpha2, 5 steps" in text
    config.write_text("[tune]\nstep = 4\n")
    assert run(folder, "tune", archive, "--config", str(config)) == 2
    assert "expected options of tune, got 'step'" in capsys.readouterr().err
    config.write_text("steps = 4\n[tune]\ntrajectories = 300\n")
    assert run(folder, "tune", archive, "--config", str(config)) == 2
    assert "expected a table for each command, got steps = 4" in capsys.readouterr().err
    config.write_text("[tune\n")
    assert run(folder, "tune", archive, "--config", str(config)) == 2
    assert "expected TOML" in capsys.readouterr().err
    config.write_text("[tune]\nsteps = 5\n")
    for again in (["--conf", str(config)], ["--config", str(config), "--config", "other.toml"]):
        assert run(folder, "tune", archive, "-t", str(folder / "md.dcd"), *again) == 2
        assert "--config: expected it once, and in full" in capsys.readouterr().err


def test_samples_of_an_untuned_archive_ask_for_the_command_that_tunes(
    folder: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    gen = DiffusionBoltzmannGenerator.load(folder / "model.vtdis")
    gen.process = None
    gen.save(tmp_path / "plain.vtdis")
    assert cli.main(["sample", str(tmp_path / "plain.vtdis"), "-o", str(tmp_path / "x.nc")]) == 2
    assert "first: openmm-vtdis tune" in capsys.readouterr().err


def test_bad_input_is_one_line_and_exit_code_2(
    folder: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    foreign = tmp_path / "foreign.xml"
    foreign.write_text("<a/>")
    pickled = tmp_path / "pickled.xml"
    pickled.write_text('<System><Forces><Force type="PythonForce"/></Forces></System>')
    empty = tmp_path / "empty.pdb"
    empty.write_text("")
    samples = tmp_path / "dw4.nc"
    DiffusionBoltzmannGenerator.from_pretrained("dw4").sample(
        30, n_steps=3, seed=0, progress=False
    ).save(samples)
    both = ["analyze", str(folder / "s.nc"), "--archive", "dw4"]
    other = ["analyze", str(samples), "--archive", str(folder / "model.vtdis")]
    rest = training(folder)[2:]
    for arguments, message in (
        (["sample", str(tmp_path / "none.vtdis")], "no such archive"),
        (["info", str(folder / "md.dcd")], "got a truncated or foreign file"),
        (["train", "-s", str(foreign), *rest], "expected the XML of a System"),
        (["train", "-s", str(pickled), *rest], "expected a System without PythonForce"),
        (["train", "-s", str(tmp_path / "none.xml"), *rest], "none.xml"),
        (both, "expected --archive and --trajectory together"),
        (["analyze", str(folder / "s.nc")], "no such ensemble"),
        (["info", "dw4-smal"], "expected one of aldp-300K, "),
        ([*other, "-t", str(folder / "md.dcd")], "of these samples, of 4 particles in 2 dimen"),
        (["train", *training(folder), "-p", str(empty)], "empty.pdb: expected a PDB, mmCIF"),
        (
            ["train", *training(folder), "-p", str(folder / "md.dcd")],
            "md.dcd: expected a PDB, mmCIF",
        ),
        (["train", "-s", str(folder / "md.dcd"), *rest], "md.dcd: expected the XML of a System"),
        (["tune", "dw4", "-t", str(folder / "md.dcd")], "expected --output, since dw4 is no file"),
        (["demo", "water"], f"expected one of {', '.join(pretrained.names())}, got 'water'"),
    ):
        assert run(folder, *arguments) == 2
        error = capsys.readouterr().err
        assert error.startswith("openmm-vtdis: ")
        assert message in error
        assert "Traceback" not in error
    with pytest.raises(SystemExit, match="2"):
        cli.main(["train"])


def test_a_topology_is_read_from_pdb_or_mmcif(tmp_path: Path) -> None:
    system = alanine_dipeptide()
    for name, write in (("a.pdb", app.PDBFile.writeFile), ("a.cif", app.PDBxFile.writeFile)):
        with (tmp_path / name).open("w") as stream:
            write(system.topology, 10.0 * system.positions, stream)
        atoms = cli.read_topology(str(tmp_path / name)).atoms()
        assert [a.name for a in atoms] == [a.name for a in system.topology.atoms()]
    (tmp_path / "none.cif").write_text("data_x\n")
    with pytest.raises(
        ValueError, match=r"none.cif: expected a PDB, mmCIF, prmtop, psf or top file, got"
    ):
        cli.read_topology(str(tmp_path / "none.cif"))


def test_a_training_that_diverges_is_exit_code_1(
    folder: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    output = tmp_path / "new.vtdis"
    wild = ["--learning-rate", "1e30", "-o", str(output)]
    assert run(folder, "train", *training(folder, 30), *wild) == 1
    assert capsys.readouterr().err.startswith("openmm-vtdis: training diverged at iteration ")
    assert not output.exists()


def test_demo(capsys: pytest.CaptureFixture[str]) -> None:
    """Weighted samples without a file of one's own."""
    assert cli.main(["demo", "dw4", "-n", "50", "--no-progress"]) == 0
    text = capsys.readouterr().out
    assert text.startswith("50 samples, ESS ")
    energy = re.search(r"<u> reweighted   (\S+) ± (\S+) kT", text)
    assert energy is not None
    value, error = map(float, energy.groups())
    assert abs(value + 22.552) < 4.0 * error < 4.0  # HMC: examples/demo.py
    assert text.endswith("next: openmm-vtdis train --help\n")


def test_every_exit_code_is_documented() -> None:
    page = Path(__file__).parents[1] / "docs" / "ecosystem.md"
    documented = re.findall(r"^\| (\d+) \|", page.read_text(), re.MULTILINE)
    returned = re.findall(r"^ +return (\d+)$", inspect.getsource(cli.main), re.MULTILINE)
    assert sorted(set(returned), key=int) == documented == ["0", "1", "2", "130"]


def test_as_a_command(folder: Path) -> None:
    command = [sys.executable, "-m", "openmm_vtdis", "info", "dw4"]
    done = subprocess.run(command, capture_output=True, text=True, check=True)
    assert "particles     4 in 2 dimensions" in done.stdout
    assert done.stderr == ""
