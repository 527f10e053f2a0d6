"""The wheel has all that the package needs, and works where the sources are not."""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
import zipfile
from pathlib import Path

import pytest

from openmm_vtdis import __version__, pretrained
from recipes.settings import RECIPES

ROOT = Path(__file__).parents[1]
DIST_INFO = f"openmm_vtdis-{__version__}.dist-info"
INFO = """
import sys
from importlib import metadata

import openmm_vtdis

(command,) = metadata.distribution("openmm-vtdis").entry_points
print(openmm_vtdis.__file__)
sys.exit(command.load()(["info", "lj13"]))
"""


@pytest.fixture(scope="module")
def site(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The wheel, built from a copy of the sources without a network, unpacked."""
    pytest.importorskip("setuptools", "77", reason="what pyproject.toml builds with")
    folder = tmp_path_factory.mktemp("wheel")
    sources = folder / "sources"
    hidden = shutil.ignore_patterns("__pycache__")
    shutil.copytree(ROOT / "openmm_vtdis", sources / "openmm_vtdis", ignore=hidden)
    (sources / "tests").mkdir()
    (sources / "tests" / "__init__.py").touch()
    for name in ("pyproject.toml", "README.md", "LICENSE"):
        shutil.copy(ROOT / name, sources)
    pip = [sys.executable, "-m", "pip", "wheel", "--quiet", "--disable-pip-version-check"]
    alone = ["--no-deps", "--no-index", "--no-build-isolation", "--wheel-dir", str(folder), "."]
    done = subprocess.run([*pip, *alone], cwd=sources, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    (wheel,) = folder.glob("*.whl")
    shutil.rmtree(sources)
    with zipfile.ZipFile(wheel) as file:
        file.extractall(folder / "site")
    return folder / "site"


def test_the_wheel_holds_what_it_should(site: Path) -> None:
    """Every module, the types, the shipped generators with their cards, the command; no tests."""
    there = {str(path.relative_to(site)) for path in site.rglob("*") if path.is_file()}
    modules = (ROOT / "openmm_vtdis").rglob("*.py")
    shipped = [f"{name}.{end}" for name in pretrained.names() for end in ("vtdis", "md", "json")]
    assert len(shipped) == 3 * len(RECIPES)
    assert {str(path.relative_to(ROOT)) for path in modules} <= there
    assert {f"openmm_vtdis/pretrained/{name}" for name in shipped} <= there
    assert {"openmm_vtdis/py.typed", f"{DIST_INFO}/licenses/LICENSE"} <= there
    assert {name.split("/")[0] for name in there} == {"openmm_vtdis", DIST_INFO}
    command = (site / DIST_INFO / "entry_points.txt").read_text()
    assert "openmm-vtdis = openmm_vtdis.cli:main" in command


def test_the_command_runs_away_from_the_sources(site: Path, tmp_path: Path) -> None:
    done = subprocess.run(
        [sys.executable, "-c", INFO], cwd=tmp_path, env={**os.environ, "PYTHONPATH": str(site)},
        capture_output=True, text=True, check=False,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    where, _, text = done.stdout.partition("\n")
    assert Path(where) == site / "openmm_vtdis" / "__init__.py"
    assert "particles     13 in 3 dimensions" in text
    assert "grid          200 steps" in text
