"""The scripts behind the tables of performance run to their end, at a size that says nothing."""

from __future__ import annotations

import importlib
import sys
from pathlib import Path

import pytest
from openmm import version

from benchmarks import tables

SCRIPTS = {
    "profile": ["dw4"],
    "baseline": ["dw4", "--rounds", "1", "--batch-size", "2"],
    "effective": ["dw4", "--rounds", "1", "--batch-size", "2"],
    "step_time": ["dw4", "--rounds", "1"],
    "energies": ["--turns", "1", "--frames", "10"],
    "scaling": ["--rounds", "1"],
}


NEWER = pytest.mark.skipif(
    tuple(map(int, version.short_version.split(".")[:2])) < (8, 3),
    reason="ff19SB came with OpenMM 8.3",
)


@pytest.mark.parametrize(
    "name", [pytest.param(name, marks=NEWER if name == "energies" else ()) for name in SCRIPTS]
)
def test_script(name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    script = importlib.import_module(f"benchmarks.{name}")
    for folder in ("tables", "figures"):
        (tmp_path / folder).mkdir()
    for module in (tables, script):
        monkeypatch.setattr(module, "DOCS", tmp_path, raising=module is tables)
    if name == "scaling":
        monkeypatch.setattr(script, "SERIES", {"particles": [3, 4, 5]})
        monkeypatch.setattr(script, "COVARIANCES", ("isotropic",))
        assert script.point("samples", 8, "isotropic", "cpu")["seconds"] > 0.0
    monkeypatch.setattr(sys, "argv", [name, *SCRIPTS[name], "--device", "cpu"])
    script.main()
    written = [path.read_text() for path in (tmp_path / "tables").iterdir()]
    assert written
    for text in written:
        head, _, *rows = text.split("\n\n")[0].splitlines()
        assert rows
        assert all(row.count("|") == head.count("|") for row in rows)
        assert "nan" not in text
