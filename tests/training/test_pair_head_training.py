"""Training of a pair head: nothing else changes, and it resumes bit for bit."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from torch import Tensor

from openmm_vtdis.core.space import Space
from openmm_vtdis.diffusion.denoiser import PreconditionedDenoiser
from openmm_vtdis.networks import EGNN, MLP
from openmm_vtdis.training.config import TrainingConfig
from openmm_vtdis.training.pair_head import new_pair_head
from openmm_vtdis.training.trainer import Trainer
from tests.conftest import make_oracle
from tests.diffusion.posteriors.test_pairwise import pairwise_process


def test_training_the_head_lowers_its_loss_and_nothing_else() -> None:
    oracle = make_oracle(3, 2, True)
    frames = oracle.sample(600, seed=0)
    process = pairwise_process(Space(3, 2))
    denoiser = process.denoiser
    before = {k: v.clone() for k, v in denoiser.state_dict().items() if "pair_head" not in k}  # type: ignore[attr-defined]
    config = TrainingConfig(150, batch_size=64, learning_rate=5e-3, seed=1)
    with new_pair_head(denoiser, 16, seed=1) as objective:
        trainer = Trainer(objective, frames[:500], frames[500:], config)
        first = trainer.held_out_loss()
        log = trainer.run(evaluate_every=50, progress=False)
    assert log.held_out_losses[-1] < first - 0.05
    after = denoiser.state_dict()  # type: ignore[attr-defined]
    assert all(torch.equal(before[k], after[k]) for k in before)


def test_a_head_whose_training_failed_is_taken_away_again() -> None:
    network = EGNN([0, 0, 0], 2, 1, 8)
    denoiser = PreconditionedDenoiser(network, Space(3, 2))
    with pytest.raises(KeyboardInterrupt), new_pair_head(denoiser, 16, seed=1):
        raise KeyboardInterrupt
    assert network.pair_head is None
    assert network.config["pair_head"] is None
    with pytest.raises(ValueError, match="expected a trained network .* such as the EGNN, got MLP"):  # noqa: SIM117
        with new_pair_head(PreconditionedDenoiser(MLP(3, 2, 1, 8), Space(3, 2)), 16, seed=1):
            pass


def test_a_checkpoint_for_another_denoiser_is_refused(tmp_path: Path) -> None:
    frames = make_oracle(3, 2, True).sample(100, seed=0)
    config = TrainingConfig(4, batch_size=8, seed=1)
    denoiser = pairwise_process(Space(3, 2)).denoiser
    for change in (0.0, 0.0, 0.1):
        denoiser.network.node_input.weight.data += change  # type: ignore[attr-defined]
        with new_pair_head(denoiser, 8, seed=1) as objective:
            trainer = Trainer(objective, frames[:80], frames[80:], config)
            if change == 0.0:
                trainer.run(tmp_path / "head.ckpt", progress=False)
        if change:
            with pytest.raises(ValueError, match="got one that differs in network"):
                trainer.run(tmp_path / "head.ckpt", progress=False)


def test_the_training_of_a_head_resumes_bit_for_bit(tmp_path: Path) -> None:
    frames = make_oracle(3, 2, True).sample(100, seed=0)
    path, config = tmp_path / "head.ckpt", TrainingConfig(12, batch_size=8, seed=1)

    def run(stop: bool) -> dict[str, Tensor]:
        denoiser = pairwise_process(Space(3, 2)).denoiser
        with new_pair_head(denoiser, 8, seed=1) as objective:
            trainer = Trainer(objective, frames[:80], frames[80:], config)
            if stop:
                for _ in range(5):
                    trainer._step()
                trainer.save(path)
                return {}
            trainer.run(path, progress=False)
            return dict(objective.head.state_dict())

    whole = run(stop=False)
    path.unlink()
    run(stop=True)
    resumed = run(stop=False)
    assert all(torch.equal(whole[name], resumed[name]) for name in whole)
