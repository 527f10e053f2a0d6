"""The examples run, at a small size."""

from __future__ import annotations

import importlib.util
import re
from pathlib import Path
from types import ModuleType

import numpy as np
import pytest

from openmm_vtdis import WeightedEnsemble

EXAMPLES = Path(__file__).parents[1] / "examples"


def example(name: str) -> ModuleType:
    spec = importlib.util.spec_from_file_location(name, EXAMPLES / f"{name}.py")
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def test_demo(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """What `make demo` runs: both systems beside their references, two files and a picture."""
    monkeypatch.chdir(tmp_path)
    example("demo").main(n_double_well=1_000, n_alanine=8, n_steps=6, n_chains=20, burn_in=150)
    text = capsys.readouterr().out
    raw, reweighted = (
        float(z)
        for z in re.findall(r"([+-][\d.]+) standard errors", text.partition("aldp-800K")[0])
    )
    assert abs(reweighted) < 4.0 < abs(raw)
    output = tmp_path / "demo-output"
    for name, n in (("dw4", 1_000), ("aldp-800K", 8)):
        assert len(WeightedEnsemble.load(output / f"{name}.nc")) == n
    assert (output / "demo.png").stat().st_size > 10_000


def test_own_system() -> None:
    ensemble, reference = example("own_system").main(n_frames=300, n_iterations=30, n_samples=50)
    assert ensemble.positions.shape == (50, 5, 3)
    assert np.isfinite(ensemble.log_weights).all()
    assert 0.2 < reference.value < 0.5


def test_toluene(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    ensemble = example("toluene").main(n_frames=60, n_iterations=8, n_samples=100, n_steps=3)
    assert ensemble.positions.shape == (100, 15, 3)
    files = {path.name for path in (tmp_path / "toluene-output").iterdir()}
    assert {"md-1.dcd", "network.ckpt", "toluene.nc", "toluene.png", "toluene.vtdis"} <= files
