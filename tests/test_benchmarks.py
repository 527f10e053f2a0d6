"""The scripts behind the tables of performance run to their end, at a size that says nothing."""

from __future__ import annotations

import dataclasses
import importlib
import json
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from openmm import version

from benchmarks import cases, effective, harness, network_size, rows, run, tables
from openmm_vtdis import DiffusionBoltzmannGenerator

SCRIPTS = {
    "profile": ["dw4"],
    "baseline": ["dw4", "--rounds", "1", "--batch-size", "2"],
    "effective": ["dw4-small", "--rounds", "1", "--batch-size", "2"],
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
    monkeypatch.setattr(harness, "DOCS", tmp_path)
    if name == "scaling":
        monkeypatch.setattr(script, "SERIES", {"particles": [3, 4, 5]})
        monkeypatch.setattr(script, "COVARIANCES", ("isotropic",))
        assert script.point("samples", 8, "isotropic", torch.device("cpu"))["seconds"] > 0.0
    monkeypatch.setattr(sys, "argv", [name, *SCRIPTS[name], "--device", "cpu"])
    script.main()
    written = [path.read_text() for path in (tmp_path / "tables").iterdir()]
    assert written
    for text in written:
        head, _, *rows = text.split("\n\n")[0].splitlines()
        assert rows
        assert all(row.count("|") == head.count("|") for row in rows)
        assert "nan" not in text


@pytest.mark.parametrize(
    ("method", "kept"), [("as shipped", 3), ("isotropic, alpha = 2", 7), ("hessian", 7)]
)
def test_rows_are_measured_in_pieces_and_go_on(
    method: str, kept: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    frames = DiffusionBoltzmannGenerator.from_pretrained("dw4").sample(
        12, n_steps=10, seed=0, progress=False
    )
    monkeypatch.setattr(cases, "reference_frames", lambda *_, **__: frames.positions)
    monkeypatch.setattr(run, "PIECE", {"cpu": 4})
    arguments = ["run", "dw4", "--steps", "10", "--methods", method, "--samples", "10"]
    arguments += ["--fit-trajectories", "16", "--no-progress"]
    monkeypatch.setattr(sys, "argv", arguments)

    def measured(name: str) -> dict[str, str]:
        for attribute in ("RESULTS", "CACHE"):
            monkeypatch.setattr(harness, attribute, tmp_path / name / attribute)
        (tmp_path / name / "RESULTS").mkdir(parents=True, exist_ok=True)
        run.main()
        (path,) = (tmp_path / name / "RESULTS").glob("*.json")
        (row,) = json.loads(path.read_text())["rows"].values()
        return {key: str(value) for key, value in row.items() if "seconds" not in key}

    whole = measured("whole")
    assert whole["reverse_n"] == whole["forward_n"] == "10"
    calls, sample = [], DiffusionBoltzmannGenerator.sample

    def interrupted(self: DiffusionBoltzmannGenerator, n: int, **options: Any) -> Any:
        calls.append(n)
        if len(calls) == 2:
            raise KeyboardInterrupt
        return sample(self, n, **options)

    monkeypatch.setattr(DiffusionBoltzmannGenerator, "sample", interrupted)
    with pytest.raises(KeyboardInterrupt):
        measured("resumed")
    assert measured("resumed") == whole
    assert calls == [4, 4, 4, 2]
    files = [path.suffix for path in (tmp_path / "resumed" / "CACHE").iterdir()]
    assert files.count(".nc") == 3
    assert files.count(".npy") + files.count(".safetensors") == kept


def test_network_sizes_are_trained_once_and_measured_once(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    gen = DiffusionBoltzmannGenerator.from_pretrained("dw4")
    frames = gen.sample(60, n_steps=15, seed=0, progress=False).positions
    monkeypatch.chdir(tmp_path)
    for folder in ("runs", "results"):
        (tmp_path / folder).mkdir()
    shipped = "dw4.json"
    (tmp_path / "results" / shipped).write_bytes((harness.RESULTS / shipped).read_bytes())
    small = dataclasses.replace(
        network_size.RECIPE, n_iterations=3, head_iterations=2, batch_size=8, n_trajectories=100
    )
    for name, value in {
        "RECIPE": small,
        "NETWORKS": ("egnn-1x8", small.network),
        "STEPS": (15,),
        "N_SAMPLES": 8,
        "ROUNDS": 1,
    }.items():
        monkeypatch.setattr(network_size, name, value)
    for module in (cases, network_size):
        monkeypatch.setattr(module, "reference_frames", lambda *_: frames)
    monkeypatch.setattr(harness, "RESULTS", tmp_path / "results")
    monkeypatch.setattr(harness, "DOCS", tmp_path)
    monkeypatch.setattr(sys, "argv", ["network_size"])
    network_size.main()
    stored = tmp_path / "results" / "network-size.json"
    (row,) = json.loads(stored.read_text()).values()
    assert row["forward_n"] == row["reverse_n"] == 8
    archive = tmp_path / "runs" / "dw4-egnn-1x8.vtdis"
    assert DiffusionBoltzmannGenerator.load(archive).process.covariance.kind == "pairwise"  # type: ignore[union-attr]
    head, _, *lines = (tmp_path / "tables" / "network-size.md").read_text().splitlines()[:4]
    assert [line.count("|") for line in lines] == 2 * [head.count("|")]
    before = archive.stat().st_mtime_ns, stored.stat().st_mtime_ns
    network_size.main()
    assert before == (archive.stat().st_mtime_ns, stored.stat().st_mtime_ns)


def test_two_runs_at_a_time_keep_each_other_s_rows(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(harness, "RESULTS", tmp_path)
    first, second = run.SystemRows("dw4"), run.SystemRows("dw4")
    first.add("pairwise", 100, {"forward_ess": [0.9, 0.01]})
    second.add("tweedie", 100, {"forward_ess": [0.95, 0.01]})
    assert set(run.SystemRows("dw4").rows) == {"pairwise @ 100", "tweedie @ 100"}
    assert not second.lacks("pairwise", 100)


def test_figures_are_those_that_a_page_shows(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "page.md").write_text("![Costs](figures/dw4-small-costs.png)\n")
    results = tmp_path / "results"
    results.mkdir()
    for name in ("dw4-small", "gmm2-50"):
        (results / f"{name}.json").write_bytes((harness.RESULTS / f"{name}.json").read_bytes())
    monkeypatch.setattr(harness, "DOCS", tmp_path)
    monkeypatch.setattr(harness, "RESULTS", results)
    monkeypatch.setattr(sys, "argv", ["tables"])
    tables.main()
    assert [path.name for path in (tmp_path / "figures").iterdir()] == ["dw4-small-costs.png"]
    written = sorted(path.name for path in (tmp_path / "tables").iterdir())
    assert written == ["dw4-small.md", "gmm2-50.md"]


def test_the_best_row_is_one_with_reliable_weights(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def row(method: str, n_steps: int, ess: float, k: float = 0.2, share: float = 0.01) -> dict:
        both = {"reverse_ess": [ess + 0.1, 0.02], "forward_ess": [ess, 0.03]}
        tail = {"reverse_n": 2_000, "reverse_pareto_k": k, "largest_weight_share": share}
        return {"method": method, "n_steps": n_steps, **both, **tail}

    made = [
        row("a", 10, 0.5, k=0.75),
        row("a", 20, 0.6, share=0.2),
        row("a", 50, 0.7),
        row("a", 100, 0.9),
        row("b", 10, 0.9),
        row("c", 10, 0.3, k=0.9),
    ]
    (tmp_path / "x.json").write_text(json.dumps({"rows": dict(enumerate(made))}))
    monkeypatch.setattr(harness, "RESULTS", tmp_path)
    assert effective.best("x", "a") == made[2]
    assert effective.best("x", "a", "b") == made[2]
    assert effective.best("x", "none", "b") == made[4]
    assert effective.best("x", "c") == made[5]  # none of its kind is reliable
    assert effective.best("x", "none") is None
    assert rows.lower_ess(made[2]) == (0.7, 0.03)
    frames_only = {**made[5], "forward_n": 2_000, "forward_pareto_k": 0.2}
    for name in ("reverse_ess", "reverse_n", "reverse_pareto_k", "largest_weight_share"):
        del frames_only[name]
    assert rows.reliable(frames_only)
    assert not rows.reliable(made[5])


def test_turns_alternate_and_the_first_do_not_count() -> None:
    calls: list[str] = []
    works = [lambda name=name: calls.append(name) for name in "ab"]
    times = harness.in_turns(works, 3, torch.device("cpu"), warm_up=2)
    assert times.shape == (3, 2)
    assert (times > 0.0).all()
    assert "".join(calls) == 5 * "ab"


def test_an_error_is_the_spread_over_resampled_rows() -> None:
    x, y = np.random.default_rng(0).normal(size=(2, 10_000))
    value, error = rows.with_error(np.mean, x)  # type: ignore[arg-type]
    assert value == x.mean()
    assert error == pytest.approx(0.01, rel=0.3)
    difference, apart = rows.with_error(np.mean, x, x + 0.1 * y)  # type: ignore[arg-type]
    assert difference == pytest.approx(0.1 * y.mean())
    assert apart == pytest.approx(0.001, rel=0.3)
