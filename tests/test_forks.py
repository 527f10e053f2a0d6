"""Forked processes draw samples of their own, and wait for no thread that stayed behind."""

from __future__ import annotations

import dataclasses
import subprocess
import sys
import textwrap
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from openmm_vtdis import DiffusionBoltzmannGenerator, WeightedEnsemble
from openmm_vtdis.core import rng
from openmm_vtdis.ensemble.consistency import check_as_drawn

HEAD = """
import multiprocessing, os, sys
import numpy as np, openmm, torch
torch.set_num_threads(1)
from openmm_vtdis import DiffusionBoltzmannGenerator, WeightedEnsemble
from openmm_vtdis.targets import OpenMMTarget, double_well
fork = multiprocessing.get_context("fork")
gen = DiffusionBoltzmannGenerator.from_pretrained("dw4-small")
"""


def run(script: str, *arguments: str, seconds: float = 100.0) -> str:
    done = subprocess.run(
        [sys.executable, "-c", HEAD + textwrap.dedent(script), *arguments],
        capture_output=True, text=True, check=False, timeout=seconds,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr[-3_000:]
    return done.stdout


@pytest.mark.parametrize("before", ["", "torch.manual_seed(1)"])
def test_forked_workers_draw_their_own_samples(before: str, tmp_path: Path) -> None:
    path = tmp_path / "energies.npy"
    run(
        f"""
        {before}
        def work(seed):
            if seed is not None: torch.manual_seed(seed)
            return gen.sample(40, n_steps=4, progress=False)
        with fork.Pool(3) as pool:
            parts = pool.map(work, [None] * 3, chunksize=1)
            again = pool.map(work, [5, 5], chunksize=1)
        WeightedEnsemble.concatenate(parts)
        np.save(sys.argv[1], np.stack([p.reduced_energies for p in (*parts, *again)]))
        """,
        str(path),
    )
    energies = np.load(path)
    assert len(np.unique(energies[:3])) == 120
    np.testing.assert_array_equal(energies[3], energies[4])  # seeded after the fork: as asked for


def test_grandchildren_and_moves_have_numbers_of_their_own(tmp_path: Path) -> None:
    path = tmp_path / "first.npy"
    run(
        """
        from openmm_vtdis.interop import DiffusionMove
        move = DiffusionMove("dw4-small", batch_size=4, n_steps=4, seed=7)
        def child(queue, depth):
            if depth:
                inner = fork.Process(target=child, args=(queue, depth - 1))
                inner.start()
                inner.join()
            queue.put(move._kept().proposals.draw().x)
            queue.put(gen.sample(1, n_steps=4, progress=False).positions[0])
        queue = fork.Queue()
        found = [move._kept().proposals.draw().x]
        for depth in (0, 1, 2):
            process = fork.Process(target=child, args=(queue, depth)); process.start()
            found += [queue.get() for _ in range(2 * (depth + 1))]
            process.join()
        np.save(sys.argv[1], np.stack(found))
        """,
        str(path),
    )
    found = np.load(path)
    assert len(np.unique(found.reshape(len(found), -1), axis=0)) == len(found) == 13


def test_processes_of_a_launcher_that_were_seeded_alike(monkeypatch: pytest.MonkeyPatch) -> None:
    def fresh() -> int:
        torch.manual_seed(0)
        return rng.make_rng(None).initial_seed()

    alone = fresh()
    assert alone == fresh()
    seeds = {alone}
    for names in (("RANK", "WORLD_SIZE"), ("SLURM_PROCID", "SLURM_STEP_NUM_TASKS")):
        for rank in range(3):
            monkeypatch.setenv(names[0], str(rank))
            monkeypatch.setenv(names[1], "3")
            seeds.add(fresh())
        for name in names:
            monkeypatch.delenv(name)
    assert len(seeds) == 4  # rank k of either launcher is process k


@pytest.mark.parametrize("end", ["os._exit(0)", "sys.exit(0)"])
def test_contexts_of_the_parent_do_not_hold_up_its_children(end: str) -> None:
    """However a child ends, whether it uses the target or only drops it, and its own child too."""
    out = run(
        f"""
        bench = double_well()
        target = OpenMMTarget(bench.system, None, 120, n_dims=2, backend="contexts", n_threads=2)
        dropped = OpenMMTarget(bench.system, None, 120, n_dims=2, backend="contexts", n_threads=2)
        x = gen.sample(20, n_steps=4, seed=0, progress=False).positions
        x = torch.tensor(x)
        expected = target.reduced_energy(x)
        dropped.reduced_energy(x)
        def child(depth):
            global dropped
            dropped = None
            pid = os.fork() if depth else -1
            if pid == 0:
                child(depth - 1)
            elif pid > 0 and os.waitpid(pid, 0)[1]:
                os._exit(1)
            ok = torch.equal(target.reduced_energy(x), expected)
            print("same" if ok else "other", flush=True)
            {end}
        pid = os.fork()
        if pid == 0:
            child(1)
        assert os.waitpid(pid, 0)[1] == 0
        assert torch.equal(target.reduced_energy(x), expected)
        print("parent")
        """
    )
    assert out.split() == ["same", "same", "parent"]


def test_a_data_loader_may_evaluate_energies() -> None:
    out = run(
        """
        bench = double_well()
        target = OpenMMTarget(bench.system, None, 120, n_dims=2, backend="contexts")
        x = torch.tensor(gen.sample(12, n_steps=4, seed=0, progress=False).positions)
        class Energies(torch.utils.data.Dataset):
            def __len__(self): return len(x)
            def __getitem__(self, k): return target.reduced_energy(x[k : k + 1])[0]
        expected = target.reduced_energy(x)
        loader = torch.utils.data.DataLoader(Energies(), batch_size=3, num_workers=2,
                                             multiprocessing_context="fork")
        print(torch.equal(torch.cat(list(loader)), expected))
        """
    )
    assert out.split() == ["True"]


def test_threads_of_torch_that_stayed_behind_are_not_waited_for() -> None:
    out = run(
        """
        torch.set_num_threads(2)
        bench = double_well()
        target = bench.target()
        def work():
            ensemble = gen.sample(200, n_steps=4, seed=0, progress=False)
            x = torch.tensor(ensemble.positions)
            again = target.reduced_energy(x)
            return ensemble.log_weights.sum() + float(again.sum())
        expected = work()
        with fork.Pool(1) as pool:
            print(abs(pool.apply(work) - expected) < 1e-3)
        print(torch.get_num_threads())
        """,
        seconds=60.0,
    )
    assert out.split() == ["True", "2"]


# -- what is pooled -----------------------------------------------------------------------------
def ensemble(seed: int, n: int = 50) -> WeightedEnsemble:
    rng = np.random.default_rng(seed)
    return WeightedEnsemble(rng.normal(size=(n, 3, 3)), rng.normal(size=n), rng.normal(size=n))


@pytest.mark.parametrize(
    "parts",
    [
        lambda e: [e, e],
        lambda e: [ensemble(1), e, ensemble(2), e[10:12]],
        lambda e: [e[:30], e[29:]],
        lambda e: [e, e.with_metadata({"run": 2})],
        lambda e: [e, e.resample(50, seed=1)],
        lambda e: [e, e.with_log_weights(e.log_weights + 1.0)],
    ],
)
def test_a_sample_is_pooled_once(parts: Any) -> None:
    with pytest.raises(ValueError, match=r"expected independent samples, got \d+ that"):
        WeightedEnsemble.concatenate(parts(ensemble(0)))


def test_one_seed_is_pooled_once() -> None:
    """However else runs differ: steps, kind of processor, precision. Slices of one are no runs."""
    gen = DiffusionBoltzmannGenerator.from_pretrained("dw4-small")
    e = gen.sample(60, n_steps=8, seed=0, progress=False)
    assert len(e.provenance.streams) == 1
    wrong = {
        "other steps": gen.sample(60, n_steps=10, seed=0, progress=False),
        "more of them": gen.sample(90, n_steps=8, seed=0, progress=False),
        "the flow": gen.sample_ode(60, n_steps=8, seed=0, progress=False),
        "rounding": dataclasses.replace(e, positions=e.positions + 1e-6),
    }
    for what, other in wrong.items():
        with pytest.raises(ValueError, match="independent samples, got"):
            WeightedEnsemble.concatenate(
                [gen.sample(5, n_steps=8, seed=1, progress=False), e, other]
            )
        assert what
    halves = WeightedEnsemble.concatenate([e[:25], e[25:]])
    assert (halves.metadata, halves.provenance) == (e.metadata, e.provenance)
    fresh = gen.sample(60, n_steps=8, seed=1, progress=False)
    both = WeightedEnsemble.concatenate([e, fresh])
    assert both.provenance.streams == e.provenance.streams + fresh.provenance.streams
    check_as_drawn("test", both.provenance)
    noted = e.with_metadata({"run": 7})
    assert noted.provenance == e.provenance
    stream = torch.Generator().manual_seed(3)
    parts = [gen.sample(10, n_steps=8, seed=stream, progress=False) for _ in range(2)]
    WeightedEnsemble.concatenate(parts)


def test_notes_on_weights_stay_with_them() -> None:
    e = ensemble(0)
    again = e.resample(seed=1).with_metadata({"run": 2})
    assert again.metadata == {"run": 2}
    assert again.provenance.resampled_from == 50
    assert np.isnan(again.log_z().stderr)
    zero = e.with_log_weights(np.where(np.arange(50) < 20, -np.inf, e.log_weights))
    some = zero[np.isfinite(zero.log_weights)]
    assert some.expectation(some.reduced_energies).value == pytest.approx(
        zero.expectation(zero.reduced_energies).value
    )
    for ask in (some.log_z, lambda: some.free_energy(e.log_weights + 0.1)):
        with pytest.raises(ValueError, match="expected all samples, got those that have weight"):
            ask()
    assert zero[zero.log_weights > 0.5].provenance == e.provenance


def test_a_hamiltonian_that_nobody_knows_is_not_pooled() -> None:
    gen = DiffusionBoltzmannGenerator.from_pretrained("dw4-small")

    class Other:
        temperature = gen.temperature

        def reduced_energy(self, x: torch.Tensor) -> torch.Tensor:
            return x.square().sum(dim=(1, 2))

    e, f = (gen.sample(20, n_steps=4, seed=k, progress=False) for k in (0, 1))
    with pytest.raises(ValueError, match="expected one Hamiltonian"):
        WeightedEnsemble.concatenate([e, f.reweight(Other())])
    WeightedEnsemble.concatenate([e.reweight(Other()), f.reweight(Other())])


def test_what_may_stand_twice() -> None:
    """Resampled ensembles, whose errors are unknown; samples without weight, which may be alike."""
    e = ensemble(0)
    pooled = WeightedEnsemble.concatenate([e.resample(30, seed=1), e.resample(30, seed=2)])
    assert np.isnan(pooled.log_z().stderr)
    assert np.isnan(pooled.expectation(pooled.reduced_energies).stderr)
    nowhere = [
        WeightedEnsemble(
            np.concatenate([np.full((1, 3, 3), np.nan), ensemble(k).positions]),
            np.append(-np.inf, ensemble(k).log_weights),
            np.append(np.nan, ensemble(k).reduced_energies),
        )
        for k in (1, 2)
    ]
    assert len(WeightedEnsemble.concatenate(nowhere)) == 102


def test_fork_entropy_is_of_forked_processes_only() -> None:
    assert rng.fork_entropy() == []
