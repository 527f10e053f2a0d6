"""Every Python snippet of README and docs runs, in order, at a small size."""

from __future__ import annotations

import importlib.util
import re
import shutil
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import mdtraj
import numpy as np
import openmm
import pymbar
import pytest
from openmm import app, unit

from openmm_vtdis import DiffusionBoltzmannGenerator, WeightedEnsemble
from openmm_vtdis.targets import alanine_dipeptide
from tests.conftest import needs_python_force

ROOT = Path(__file__).parents[1]
PAGES = [ROOT / "README.md", *sorted((ROOT / "docs").glob("*.md"))]
SNIPPET = re.compile(r"^```python\n(.*?)^```", re.DOTALL | re.MULTILINE)
SIZES: dict[str, dict[str, int]] = {
    "train": {"n_iterations": 4},
    "tune": {"n_steps": 3, "n_trajectories": 100},
    "sample": {"n": 200},
}


def snippets(page: Path) -> list[str]:
    return SNIPPET.findall(page.read_text())


@pytest.fixture
def namespace(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> dict[str, Any]:
    """What the pages take for granted: a System with its Topology, and MD of it."""
    monkeypatch.chdir(tmp_path)
    system, force, topology = openmm.System(), openmm.HarmonicBondForce(), app.Topology()
    residue = topology.addResidue("X", topology.addChain())
    for i in range(3):
        system.addParticle(12.0)
        topology.addAtom(f"C{i}", app.Element.getBySymbol("C"), residue)
    for i, j in ((0, 1), (1, 2), (0, 2)):
        force.addBond(i, j, 0.0, 300.0)
    system.addForce(force)
    x = 0.053 * np.random.default_rng(0).normal(size=(600, 3, 3))
    md = mdtraj.Trajectory(x, mdtraj.Topology.from_openmm(topology))
    md.save_dcd("md.dcd")
    md[::2].save_dcd("other_md.dcd")

    construct = DiffusionBoltzmannGenerator.__init__

    def small(self: DiffusionBoltzmannGenerator, *args: Any, **options: Any) -> None:
        construct(self, *args, **{"network": "egnn-2x16", "seed": 0, **options})

    monkeypatch.setattr(DiffusionBoltzmannGenerator, "__init__", small)
    for name, limits in SIZES.items():
        monkeypatch.setattr(DiffusionBoltzmannGenerator, name, limited(name, limits))
    gen = DiffusionBoltzmannGenerator(system, topology, 300.0 * unit.kelvin)
    gen.train(md)
    gen.tune(md)
    return {
        "app": app, "mdtraj": mdtraj, "np": np, "openmm": openmm, "pymbar": pymbar, "unit": unit,
        "DiffusionBoltzmannGenerator": DiffusionBoltzmannGenerator,
        "WeightedEnsemble": WeightedEnsemble, "system": system, "topology": topology, "md": md,
        "gen": gen, "ensemble": gen.sample(200, seed=0),
        "pdb": SimpleNamespace(topology=alanine_dipeptide().topology),
        "my_observable": lambda x: x[:, 0, 0],
    }  # fmt: skip


def limited(name: str, limits: dict[str, int]) -> Any:
    """A method of the generator with its sizes cut down."""
    method = getattr(DiffusionBoltzmannGenerator, name)
    first = "n" if name == "sample" else "traj"

    def run(self: DiffusionBoltzmannGenerator, *args: Any, **options: Any) -> Any:
        given = {**({first: args[0]} if args else {}), **options, **limits}
        if name == "tune" and len(args) > 2:
            given["covariance"] = args[2]
        return method(self, **{"progress": False, **given})

    return run


@pytest.mark.parametrize(
    "page",
    [
        pytest.param(p, marks=needs_python_force if p.name == "ecosystem.md" else ())
        for p in PAGES
        if snippets(p)
    ],
    ids=lambda p: p.name,
)
def test_snippets_run(page: Path, namespace: dict[str, Any]) -> None:
    for snippet in snippets(page):
        exec(compile(snippet, str(page), "exec"), namespace)


def test_snippets_are_found_and_a_broken_one_fails(
    tmp_path: Path, namespace: dict[str, Any]
) -> None:
    """Control."""
    page = tmp_path / "page.md"
    page.write_text("Text\n\n```python\nensemble.no_such_method()\n```\n")
    with pytest.raises(AttributeError, match="no_such_method"):
        test_snippets_run(page, namespace)
    assert len(snippets(ROOT / "README.md")) >= 1


needs_sphinx = pytest.mark.skipif(
    importlib.util.find_spec("sphinx") is None, reason="docs are built with the newest versions"
)
NOTEBOOK_SIZES = "n_samples, n_frames, n_moves, n_steps = {}"


def build(source: Path, folder: Path) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, "-m", "sphinx", "-W", "-q", "-b", "html", source, folder]
    return subprocess.run(command, capture_output=True, text=True, check=False)


@needs_sphinx
def test_the_documentation_builds_without_warnings(tmp_path: Path) -> None:
    """With the notebook executed, at a small size."""
    source = tmp_path / "docs"
    shutil.copytree(ROOT / "docs", source, ignore=shutil.ignore_patterns("_build"))
    shutil.copytree(ROOT / "examples", tmp_path / "examples")
    page = source / "alanine.md"
    full, small = NOTEBOOK_SIZES.format("150, 50, 10, 100"), NOTEBOOK_SIZES.format("12, 6, 1, 8")
    assert full in page.read_text()
    page.write_text(page.read_text().replace(full, small))
    done = build(source, tmp_path / "html")
    assert done.returncode == 0, done.stderr
    assert "proposals accepted" in (tmp_path / "html" / "alanine.html").read_text()


@needs_sphinx
def test_a_link_to_nowhere_fails_the_build(tmp_path: Path) -> None:
    """Control."""
    source = tmp_path / "docs"
    source.mkdir()
    shutil.copy(ROOT / "docs" / "conf.py", source)
    (source / "index.md").write_text("# Title\n\n{doc}`nowhere`\n")
    done = build(source, tmp_path / "html")
    assert done.returncode != 0
    assert "nowhere" in done.stderr
