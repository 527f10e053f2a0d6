"""The examples run, at a small size."""

from __future__ import annotations

import importlib.util
from pathlib import Path
from types import ModuleType

import numpy as np
import pytest

EXAMPLES = Path(__file__).parents[1] / "examples"


def example(name: str) -> ModuleType:
    spec = importlib.util.spec_from_file_location(name, EXAMPLES / f"{name}.py")
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


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
