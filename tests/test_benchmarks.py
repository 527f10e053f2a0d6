"""The scripts behind the tables of performance run to their end, at a size that says nothing."""

from __future__ import annotations

import dataclasses
import importlib
import json
import sys
from pathlib import Path
from typing import Any

import pytest
from openmm import version

from benchmarks import effective, network_size, run, tables
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


@pytest.mark.parametrize(
    ("method", "kept"), [("as shipped", 3), ("isotropic, alpha = 2", 7), ("hessian", 7)]
)
def test_rows_are_measured_in_pieces_and_go_on(
    method: str, kept: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    frames = DiffusionBoltzmannGenerator.from_pretrained("dw4").sample(
        12, n_steps=10, seed=0, progress=False
    )
    monkeypatch.setattr(run, "reference_frames", lambda *_, **__: frames.positions)
    monkeypatch.setattr(run, "PIECE", {"cpu": 4})
    arguments = ["run", "dw4", "--steps", "10", "--methods", method, "--samples", "10"]
    arguments += ["--fit-trajectories", "16", "--no-progress"]
    monkeypatch.setattr(sys, "argv", arguments)

    def rows(name: str) -> dict[str, str]:
        for attribute in ("RESULTS", "CACHE"):
            monkeypatch.setattr(run, attribute, tmp_path / name / attribute)
        (tmp_path / name / "RESULTS").mkdir(parents=True, exist_ok=True)
        run.main()
        (path,) = (tmp_path / name / "RESULTS").glob("*.json")
        (row,) = json.loads(path.read_text())["rows"].values()
        return {key: str(value) for key, value in row.items() if "seconds" not in key}

    whole = rows("whole")
    assert whole["reverse_n"] == whole["forward_n"] == "10"
    calls, sample = [], DiffusionBoltzmannGenerator.sample

    def interrupted(self: DiffusionBoltzmannGenerator, n: int, **options: Any) -> Any:
        calls.append(n)
        if len(calls) == 2:
            raise KeyboardInterrupt
        return sample(self, n, **options)

    monkeypatch.setattr(DiffusionBoltzmannGenerator, "sample", interrupted)
    with pytest.raises(KeyboardInterrupt):
        rows("resumed")
    assert rows("resumed") == whole
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
    (tmp_path / "runs").mkdir()
    (tmp_path / "tables").mkdir()
    small = dataclasses.replace(
        network_size.RECIPE, n_iterations=3, head_iterations=2, batch_size=8, n_trajectories=100
    )
    for name, value in {
        "RECIPE": small,
        "NETWORKS": ("egnn-1x8", small.network),
        "STEPS": (15,),
        "N_SAMPLES": 8,
        "ROUNDS": 1,
        "RESULT": tmp_path / "rows.json",
        "reference_frames": lambda *_: frames,
    }.items():
        monkeypatch.setattr(network_size, name, value)
    monkeypatch.setattr(tables, "DOCS", tmp_path)
    network_size.main()
    (row,) = json.loads((tmp_path / "rows.json").read_text()).values()
    assert row["forward_n"] == row["reverse_n"] == 8
    archive = tmp_path / "runs" / "dw4-egnn-1x8.vtdis"
    assert DiffusionBoltzmannGenerator.load(archive).kernel.covariance.kind == "pairwise"  # type: ignore[union-attr]
    head, _, *lines = (tmp_path / "tables" / "network-size.md").read_text().splitlines()[:4]
    assert [line.count("|") for line in lines] == 2 * [head.count("|")]
    before = archive.stat().st_mtime_ns, (tmp_path / "rows.json").stat().st_mtime_ns
    network_size.main()
    assert before == (archive.stat().st_mtime_ns, (tmp_path / "rows.json").stat().st_mtime_ns)


def test_two_runs_at_a_time_keep_each_other_s_rows(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(run, "RESULTS", tmp_path)
    first, second = run.Table("dw4"), run.Table("dw4")
    first.add("pairwise", 100, {"forward_ess": [0.9, 0.01]})
    second.add("tweedie", 100, {"forward_ess": [0.95, 0.01]})
    assert set(run.Table("dw4").rows) == {"pairwise @ 100", "tweedie @ 100"}
    assert not second.lacks("pairwise", 100)


def test_figures_are_those_that_a_page_shows(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "page.md").write_text("![Costs](figures/dw4-small-costs.png)\n")
    results = tmp_path / "results"
    results.mkdir()
    for name in ("dw4-small", "gmm2-50"):
        (results / f"{name}.json").write_bytes((tables.RESULTS / f"{name}.json").read_bytes())
    monkeypatch.setattr(tables, "DOCS", tmp_path)
    monkeypatch.setattr(tables, "RESULTS", results)
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

    rows = [
        row("a", 10, 0.5, k=0.75),
        row("a", 20, 0.6, share=0.2),
        row("a", 50, 0.7),
        row("a", 100, 0.9),
        row("b", 10, 0.9),
        row("c", 10, 0.3, k=0.9),
    ]
    (tmp_path / "x.json").write_text(json.dumps({"rows": dict(enumerate(rows))}))
    monkeypatch.setattr(effective, "RESULTS", tmp_path)
    assert effective.best("x", "a") == rows[2]
    assert effective.best("x", "a", "b") == rows[2]
    assert effective.best("x", "none", "b") == rows[4]
    assert effective.best("x", "c") == rows[5]  # none of its kind is reliable
    assert effective.best("x", "none") is None
    assert effective.lower_ess(rows[2]) == (0.7, 0.03)
    frames_only = {**rows[5], "forward_n": 2_000, "forward_pareto_k": 0.2}
    for name in ("reverse_ess", "reverse_n", "reverse_pareto_k", "largest_weight_share"):
        del frames_only[name]
    assert effective.reliable(frames_only)
    assert not effective.reliable(rows[5])
