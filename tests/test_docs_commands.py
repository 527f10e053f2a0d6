"""Every shell line of README, docs and the command line's docstring runs, at a small size.

Lines that need several processes are parsed, by their launcher and by the command line.
"""

from __future__ import annotations

import re
import shlex
from pathlib import Path

import mdtraj
import numpy as np
import openmm
import pytest
from openmm import app
from torch.distributed.run import get_args_parser

from openmm_vtdis import DiffusionBoltzmannGenerator, WeightedEnsemble, cli, cli_options
from tests.molecules import molecule

ROOT = Path(__file__).parents[1]
BLOCK = re.compile(r"^```sh\n(.*?)^```", re.DOTALL | re.MULTILINE)
SMALL = {
    "train": "--network egnn-2x16 --iterations 40 --batch-size 64",
    "tune": "--steps 4 --trajectories 300",
    "sample": "-n 200",
}
"""Options that a line ends with, so that they replace its own."""


def documented(page: Path) -> list[str]:
    """Commands of a page's sh blocks, or those that a module's docstring indents."""
    text = page.read_text()
    if page.suffix == ".py":
        return re.findall(r"^    (openmm-vtdis .*)$", text.split('"""')[1], re.MULTILINE)
    lines = "".join(BLOCK.findall(text)).splitlines()
    return [line for line in lines if shlex.split(line, comments=True)]


PAGES = [
    page
    for page in (ROOT / "README.md", *sorted((ROOT / "docs").glob("*.md")), Path(cli.__file__))
    if documented(page)
]


@pytest.fixture
def folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """The files that the pages take for granted: a bent molecule on soft springs, and its MD."""
    monkeypatch.chdir(tmp_path)
    system, force = openmm.System(), openmm.HarmonicBondForce()
    for mass in (16.0, 12.0, 16.0):
        system.addParticle(mass)
    for i, j in ((0, 1), (1, 2), (0, 2)):
        force.addBond(i, j, 0.0, 300.0)
    system.addForce(force)
    Path("system.xml").write_text(openmm.XmlSerializer.serialize(system))
    topology = molecule("OCO", [(0, 1), (1, 2)])
    x = 0.053 * np.random.default_rng(0).normal(size=(900, 3, 3))
    with open("top.pdb", "w") as file:
        app.PDBFile.writeFile(topology, 10.0 * x[0], file)
    md = mdtraj.Trajectory(x, mdtraj.Topology.from_openmm(topology))
    md[:600].save_dcd("md.dcd")
    md[600:].save_dcd("other_md.dcd")
    return tmp_path


def follow(line: str) -> None:
    """Do what a line says, or parse it where it wants several processes."""
    words = shlex.split(line, comments=True)
    if words[0] == "make":
        targets = re.findall(r"^([a-z-]+):", (ROOT / "Makefile").read_text(), re.MULTILINE)
        assert words[1] in targets, line
    elif words[0] == "openmm-vtdis":
        small = SMALL.get(words[1], "").split()
        quiet = [] if words[1] == "info" else ["--no-progress"]
        assert cli.main([*words[1:], *small, *quiet]) == 0, line
    else:
        assert words[0] in ("torchrun", "srun"), line
        if words[0] == "torchrun":
            launched = get_args_parser().parse_args(words[1:])
            assert launched.no_python, line
            assert launched.training_script == "openmm-vtdis", line
        cli_options.parse(words[words.index("openmm-vtdis") + 1 :], cli.RUNS)


@pytest.mark.parametrize("page", PAGES, ids=lambda p: p.name)
def test_commands_run_in_sequence(page: Path, folder: Path) -> None:
    for line in documented(page):
        follow(line)


def test_the_commands_leave_what_they_promise(folder: Path) -> None:
    """All of them are found, and what the PDB knows is in the archive."""
    lines = documented(ROOT / "docs" / "ecosystem.md")
    commands = [shlex.split(line)[1] for line in lines if line.startswith("openmm-vtdis")]
    assert commands == ["train", "tune", "sample", "analyze", "info"]
    assert sum(line.startswith(("torchrun", "srun")) for line in lines) == 3
    for line in lines:
        follow(line)
    gen = DiffusionBoltzmannGenerator.load("model.vtdis")
    assert gen.topology is not None
    assert [atom.name for atom in gen.topology.atoms()] == ["O0", "C1", "O2"]
    assert [(a.index, b.index) for a, b in gen.topology.bonds()] == [(0, 1), (1, 2)]
    assert gen.labels == [0, 1, 0]
    assert len(WeightedEnsemble.load("samples.nc")) == 200


@pytest.mark.parametrize(
    ("line", "error"),
    [
        ("openmm-vtdis info dw4 --no-such-option", SystemExit),
        ("openmm-vtdis info no-such.vtdis", AssertionError),
        ("srun openmm-vtdis sample model.vtdis --no-such-option", SystemExit),
        ("torchrun --no-such-option 4 --no-python openmm-vtdis sample model.vtdis", SystemExit),
        ("torchrun --nproc-per-node 4 openmm-vtdis sample model.vtdis", AssertionError),
        ("make no-such-target", AssertionError),
        ("pip install something", AssertionError),
    ],
)
def test_a_line_that_is_wrong_fails(line: str, error: type[BaseException], folder: Path) -> None:
    """Control."""
    page = folder / "page.md"
    page.write_text(f"Text\n\n```sh\n# a comment\n{line}\n```\n")
    assert documented(page) == [line]
    with pytest.raises(error):
        test_commands_run_in_sequence(page, folder)
