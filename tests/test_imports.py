"""Imports point one way: each module imports only from its own room or from rooms before it."""

from __future__ import annotations

import ast
import subprocess
import sys
from pathlib import Path

import pytest

PACKAGE = Path(__file__).parents[1] / "openmm_vtdis"

ORDER = [
    {"_version", "pretrained"},
    {"core"},
    {"runtime"},
    {"storage"},
    {"topology"},
    {"networks"},
    {"targets"},
    {"coordinates"},
    {"diffusion"},
    {"training"},
    {"tuning"},
    {"ensemble"},
    {"sampling"},
    {"mcmc"},
    {"generator"},
    {"interop"},
    {"cli_options", "plotting", "testing"},
    {"cli"},
    {"__main__"},
]
LEVEL = {room: level for level, rooms in enumerate(ORDER) for room in rooms}


def room(path: Path) -> str:
    return path.relative_to(PACKAGE).parts[0].removesuffix(".py")


def imported_rooms(source: str) -> set[str]:
    rooms = set()
    for node in ast.walk(ast.parse(source)):
        names = []
        if isinstance(node, ast.ImportFrom) and node.module:
            if node.module == "openmm_vtdis":
                names = [f"openmm_vtdis.{alias.name}" for alias in node.names]
            else:
                names = [node.module]
        elif isinstance(node, ast.Import):
            names = [alias.name for alias in node.names]
        for name in names:
            parts = name.split(".")
            if parts[0] == "openmm_vtdis" and len(parts) > 1:
                rooms.add(parts[1])
    return rooms


MODULES = [path for path in sorted(PACKAGE.rglob("*.py")) if path != PACKAGE / "__init__.py"]


@pytest.mark.parametrize("path", MODULES, ids=lambda p: str(p.relative_to(PACKAGE)))
def test_imports_point_one_way(path: Path) -> None:
    here = room(path)
    for other in imported_rooms(path.read_text()):
        assert other == here or LEVEL[other] <= LEVEL[here], f"{path.name} imports {other}"


def test_rooms_of_one_level_do_not_import_each_other_in_a_circle() -> None:
    edges = {(room(p), other) for p in MODULES for other in imported_rooms(p.read_text())}
    both = {(a, b) for a, b in edges if a != b and (b, a) in edges}
    assert not both


def test_the_check_sees_a_backward_import() -> None:
    assert imported_rooms("from openmm_vtdis.generator import X") == {"generator"}
    assert LEVEL["generator"] > LEVEL["core"]


@pytest.mark.parametrize("folder", ["openmm_vtdis", "tests", "benchmarks", "examples", "recipes"])
def test_no_file_is_longer_than_450_lines(folder: str) -> None:
    for path in (PACKAGE.parent / folder).rglob("*.py"):
        assert len(path.read_text().splitlines()) <= 450, path


def test_importing_the_package_is_quiet_and_leaves_the_global_seed_alone() -> None:
    code = (
        "import torch; torch.manual_seed(5); a = torch.get_rng_state().clone();"
        "import openmm_vtdis; assert torch.equal(a, torch.get_rng_state());"
        "import sys; assert 'matplotlib' not in sys.modules; import openmm_vtdis.interop"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    assert done.stdout == done.stderr == ""
