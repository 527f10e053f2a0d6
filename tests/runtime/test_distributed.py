"""Several processes, under torchrun, gloo or SLURM: they train what one does."""

from __future__ import annotations

import os
import subprocess
import sys
from collections.abc import Callable
from datetime import timedelta
from pathlib import Path

import numpy as np
import pytest
import torch
from torch import distributed

from openmm_vtdis import storage
from openmm_vtdis.core.forks import from_environment
from openmm_vtdis.runtime import distributed as processes
from tests.training.test_trainer import make_trainer

SCRIPT = """
import sys
import torch
from openmm_vtdis.runtime import distributed as processes
from openmm_vtdis.storage import write_archive
from tests.training.test_trainer import make_trainer

with processes.group("cpu"):
    trainer = make_trainer(12)
    if processes.in_group()[0] == 1:  # begins elsewhere: process 0 counts
        for value in trainer.denoiser.parameters():
            value.data.add_(1.0)
    trainer.run(sys.argv[1] if processes.in_group()[0] == 0 else None, progress=False)
    i, n = processes.in_group()
    state = trainer.denoiser.state_dict()
    write_archive(f"{sys.argv[2]}/{i}-of-{n}", "weights", state, {"losses": trainer.log.losses})
"""


def test_two_processes_train_what_one_does(tmp_path: Path) -> None:
    """Under torchrun, with gloo."""
    script = tmp_path / "script.py"
    script.write_text(SCRIPT)
    root = Path(__file__).parents[2]
    launch = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node=2"]
    environment = {**os.environ, "PYTHONPATH": str(root), "OMP_NUM_THREADS": "1"}
    done = subprocess.run(
        [*launch, script, tmp_path / "run.ckpt", tmp_path], env=environment, capture_output=True,
        text=True, check=False,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    alone = make_trainer(12)
    alone.run(progress=False)
    states = [storage.read_archive(tmp_path / f"{i}-of-2", "weights") for i in (0, 1)]
    for name, value in alone.denoiser.state_dict().items():
        assert torch.equal(states[0][0][name], states[1][0][name])
        torch.testing.assert_close(states[0][0][name], value, rtol=1e-3, atol=1e-4)
    np.testing.assert_allclose(states[0][1]["losses"], alone.log.losses, rtol=1e-4)


def in_two_processes(work: Callable[[int], None], folder: Path) -> list[int]:
    """Exit codes of two processes of one gloo group: 0, or 3 where ``work`` was refused."""
    children = []
    for rank in range(2):
        child = os.fork()
        if child == 0:
            code = 1
            try:
                distributed.init_process_group(
                    "gloo", init_method=f"file://{folder / 'store'}", rank=rank, world_size=2,
                    timeout=timedelta(seconds=60),
                )  # fmt: skip
                work(rank)
                code = 0
            except (ValueError, FloatingPointError) as error:
                (folder / f"error-{rank}").write_text(str(error))
                code = 3
            finally:
                os._exit(code)
        children.append(child)
    return [os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) for child in children]


@pytest.mark.parametrize("shared", [True, False])
def test_processes_that_go_on_from_different_places_are_refused(
    shared: bool, tmp_path: Path
) -> None:
    """A checkpoint that only process 0 can read, as on a disk of its own."""
    path = tmp_path / "run.ckpt"
    begun = make_trainer(12)
    for _ in range(5):
        begun._step()
    begun.save(path)

    def work(rank: int) -> None:
        make_trainer(12).run(path if shared or rank == 0 else None, progress=False)

    codes = in_two_processes(work, tmp_path)
    assert codes == ([0, 0] if shared else [3, 3])
    if not shared:
        assert "at the same iteration, in all processes" in (tmp_path / "error-1").read_text()


def test_processes_fail_together_where_a_training_diverges(tmp_path: Path) -> None:
    """Though only process 0 writes checkpoints, before which it looks at the losses."""

    def work(rank: int) -> None:
        trainer, calls = make_trainer(12), []

        def broken(gradient: torch.Tensor) -> torch.Tensor:
            calls.append(1)
            return gradient * float("nan") if len(calls) > 5 else gradient

        next(trainer.denoiser.parameters()).register_hook(broken)
        trainer.run(tmp_path / "run.ckpt", checkpoint_seconds=0.0, progress=False)

    assert in_two_processes(work, tmp_path) == [3, 3]
    for rank in range(2):
        assert "diverged at iteration 5" in (tmp_path / f"error-{rank}").read_text()


def test_training_under_another_launcher_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("RANK", raising=False)
    monkeypatch.setenv("SLURM_PROCID", "0")
    monkeypatch.setenv("SLURM_STEP_NUM_TASKS", "4")
    with (
        pytest.raises(ValueError, match="several that torchrun started, got 4"),
        processes.group("cpu"),
    ):
        pass


def test_control_without_the_sum_of_gradients_two_processes_differ(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """Control: process 0 of two that takes its half of the batch and sums with nobody."""
    alone, half = make_trainer(12), make_trainer(12)
    alone.run(progress=False)
    monkeypatch.setattr("openmm_vtdis.runtime.distributed.in_group", lambda: (0, 2))
    monkeypatch.setattr("openmm_vtdis.runtime.distributed.sum_over_group", lambda tensors: None)
    monkeypatch.setattr("openmm_vtdis.runtime.distributed.copy_from_first", lambda tensors: None)
    monkeypatch.setattr("openmm_vtdis.runtime.distributed.any_in_group", lambda flag, device: flag)
    monkeypatch.setattr("openmm_vtdis.runtime.distributed.all_alike", lambda text, device: True)
    half.run(progress=False)
    pairs = zip(
        alone.denoiser.state_dict().values(), half.denoiser.state_dict().values(), strict=True
    )
    assert max(float((a - b).abs().max()) for a, b in pairs) > 1e-3


def test_who_a_process_is(monkeypatch: pytest.MonkeyPatch) -> None:
    for name in ("RANK", "WORLD_SIZE", "SLURM_PROCID", "SLURM_STEP_NUM_TASKS", "LOCAL_RANK"):
        monkeypatch.delenv(name, raising=False)
    assert from_environment() == (0, 1)
    assert processes.own_device("cpu") == "cpu"
    monkeypatch.setenv("SLURM_PROCID", "3")
    monkeypatch.setenv("SLURM_NTASKS", "8")  # of an allocation: srun has not started this one
    assert from_environment() == (0, 1)
    monkeypatch.setenv("SLURM_STEP_NUM_TASKS", "8")
    assert from_environment() == (3, 8)
    monkeypatch.setenv("RANK", "1")
    monkeypatch.setenv("WORLD_SIZE", "2")
    assert from_environment() == (1, 2)
    monkeypatch.setenv("LOCAL_RANK", "5")
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 4)
    assert processes.own_device("cuda") == "cuda:1"
    assert processes.own_device("cuda:2") == "cuda:2"
