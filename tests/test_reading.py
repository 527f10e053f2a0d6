"""What users give: temperatures in words, and files that are damaged or that others refuse."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import openmm
import pytest

from openmm_vtdis import cli, cli_options
from tests import damage


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("reading")
    damage.originals(folder)
    return folder


@pytest.mark.parametrize("text", ["300", "300K", "300 K", "300k", "300.0kelvin", " 3e2 Kelvin "])
def test_temperatures_as_people_write_them(text: str) -> None:
    assert cli_options.temperature(text) == 300.0


@pytest.mark.parametrize("text", ["", "K", "300C", "-300K", "nan", "300 K K", "27 degrees"])
def test_what_is_no_temperature(text: str, capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as stop:
        cli.main(["train", "-s", "a.xml", "-t", "a.dcd", f"--temperature={text}"])
    assert stop.value.code == 2
    assert f"expected a temperature in kelvin, got {text!r}" in capsys.readouterr().err


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
