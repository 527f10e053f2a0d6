"""Training: learns, resumes bit for bit, refuses another run's checkpoint, stops on divergence."""

from __future__ import annotations

import math
import signal
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
import torch

from openmm_vtdis.diffusion.denoiser import PreconditionedDenoiser
from openmm_vtdis.networks import EGNN
from openmm_vtdis.storage.archive import read_archive
from openmm_vtdis.training import trainer as training
from openmm_vtdis.training.config import TrainingConfig
from openmm_vtdis.training.trainer import Trainer
from tests.conftest import make_oracle

ORACLE = make_oracle(3, 2, True)
FRAMES = ORACLE.sample(400, seed=0)


def make_trainer(n_iterations: int = 30, seed: int = 1, **settings: float) -> Trainer:
    torch.manual_seed(0)
    network = EGNN([0, 1, 2], 2, n_layers=2, n_hidden=16)
    config = TrainingConfig(n_iterations, batch_size=32, seed=seed, warmup=5, **settings)  # type: ignore[arg-type]
    denoiser = PreconditionedDenoiser(network, ORACLE.space)
    return Trainer(denoiser, FRAMES[:300], FRAMES[300:], config)


def weights(trainer: Trainer) -> list[torch.Tensor]:
    return list(trainer.denoiser.state_dict().values())


def before_step(
    trainer: Trainer, action: Callable[[], None], monkeypatch: pytest.MonkeyPatch, at: int
) -> None:
    """Let something happen before a step."""
    step = trainer._step

    def acting() -> None:
        if trainer.iteration == at:
            action()
        step()

    monkeypatch.setattr(trainer, "_step", acting)


@pytest.fixture(autouse=True)
def interruptible() -> Iterator[None]:
    """Python's own handler, also where the tests run in the background and SIGINT is ignored."""
    before = signal.signal(signal.SIGINT, signal.default_int_handler)
    yield
    signal.signal(signal.SIGINT, before)


def press_ctrl_c() -> None:
    signal.raise_signal(signal.SIGINT)


class Interrupted(Exception):
    """Stands for a kill signal."""


def test_interrupted_training_resumes_bit_for_bit(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    whole = make_trainer()
    whole.run(progress=False, evaluate_every=10)
    path = tmp_path / "run.ckpt"
    first = make_trainer()

    def kill() -> None:
        raise Interrupted

    before_step(first, kill, monkeypatch, at=17)
    with pytest.raises(Interrupted):
        first.run(path, checkpoint_seconds=0.0, evaluate_every=10, progress=False)
    second = make_trainer()
    log = second.run(path, evaluate_every=10, progress=False)
    assert all(torch.equal(a, b) for a, b in zip(weights(whole), weights(second), strict=True))
    assert log.losses == whole.log.losses
    assert log.held_out_losses == whole.log.held_out_losses


def test_negative_control_a_lost_random_state_does_not_resume(tmp_path: Path) -> None:
    whole = make_trainer()
    whole.run(progress=False)
    path = tmp_path / "run.ckpt"
    first = make_trainer()
    for _ in range(17):
        first._step()
    first.save(path)
    second = make_trainer()
    second.restore(path)
    second.rng.manual_seed(99)
    second.run(progress=False)
    assert not all(torch.equal(a, b) for a, b in zip(weights(whole), weights(second), strict=True))


def test_another_runs_checkpoint_is_refused(tmp_path: Path) -> None:
    path = tmp_path / "run.ckpt"
    make_trainer().save(path)
    with pytest.raises(ValueError, match=r"differs in seed \(1 there, 2 here\)"):
        make_trainer(seed=2).run(path, progress=False)


def test_ctrl_c_writes_a_checkpoint_and_leaves_the_denoiser_as_it_was(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    whole = make_trainer()
    whole.run(progress=False, evaluate_every=10)
    path = tmp_path / "run.ckpt"
    first = make_trainer()
    untouched = [w.clone() for w in weights(first)]
    before_step(first, press_ctrl_c, monkeypatch, at=17)
    with pytest.raises(KeyboardInterrupt, match="at iteration 18; the same call goes on from"):
        first.run(path, evaluate_every=10, progress=False)
    assert signal.getsignal(signal.SIGINT) is signal.default_int_handler
    assert all(torch.equal(a, b) for a, b in zip(weights(first), untouched, strict=True))
    second = make_trainer()
    second.run(path, evaluate_every=10, progress=False)
    assert all(torch.equal(a, b) for a, b in zip(weights(whole), weights(second), strict=True))


def test_bad_settings_of_a_run_are_refused_before_it_starts(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="checkpoint: expected a path in a folder that exists"):
        make_trainer().run(tmp_path / "nowhere" / "run.ckpt", progress=False)
    with pytest.raises(ValueError, match="evaluate_every: expected an integer >= 1, got 0"):
        make_trainer().run(evaluate_every=0, progress=False)
    with pytest.raises(ValueError, match="checkpoint_seconds: expected a number >= 0, got 'a'"):
        make_trainer().run(checkpoint_seconds="a", progress=False)  # type: ignore[arg-type]
    for name, value in (("warmup", -3), ("t_max", "a"), ("log_t_mean", math.nan)):
        with pytest.raises(ValueError, match=f"{name}: expected"):
            TrainingConfig.of("train", n_iterations=2, **{name: value})


def test_a_checkpoint_of_another_network_or_other_frames_is_refused(tmp_path: Path) -> None:
    path = tmp_path / "run.ckpt"
    trainer = make_trainer()
    trainer.run(path, progress=False)

    def again(labels: list[int], frames: torch.Tensor, held_out: torch.Tensor) -> Trainer:
        network = EGNN(labels, 2, n_layers=2, n_hidden=16)
        denoiser = PreconditionedDenoiser(network, ORACLE.space)
        return Trainer(denoiser, frames, held_out, trainer.config)

    fitted, held_out = FRAMES[:300], FRAMES[300:]
    again([0, 1, 2], fitted, held_out).run(path, progress=False)
    with pytest.raises(ValueError, match="differs in network"):
        again([0, 2, 1], fitted, held_out).run(path, progress=False)
    for other in (fitted[:, [1, 0, 2]], fitted.flip(0), fitted * torch.tensor([1.0, -1.0])):
        with pytest.raises(ValueError, match="differs in frames"):
            again([0, 1, 2], other, held_out).run(path, progress=False)
    with pytest.raises(ValueError, match="differs in frames"):
        again([0, 1, 2], fitted, held_out[:50]).run(path, progress=False)


def test_divergence_stops_and_keeps_the_last_checkpoint(tmp_path: Path) -> None:
    """Of the iteration before; a run that goes on from it ends like one that never failed."""
    path, whole = tmp_path / "run.ckpt", tmp_path / "whole.ckpt"
    make_trainer().run(whole, progress=False)
    trainer = make_trainer()
    loss, calls = trainer.denoiser.loss, []

    def breaking(*arguments: torch.Tensor) -> torch.Tensor:
        calls.append(1)
        return loss(*arguments) * (float("nan") if len(calls) > 17 else 1.0)

    trainer.denoiser.loss = breaking  # type: ignore[method-assign]
    with pytest.raises(FloatingPointError, match="diverged at iteration 17"):
        trainer.run(path, checkpoint_seconds=0.0, evaluate_every=100, progress=False)
    assert read_archive(path, "checkpoint")[1]["iteration"] == 17
    make_trainer().run(path, progress=False)
    (resumed, _), (expected, _) = (read_archive(p, "checkpoint") for p in (path, whole))
    assert all(torch.equal(resumed[name], expected[name]) for name in expected)


@pytest.mark.parametrize("at", [0, 5, 15, 16, 29])
def test_an_infinite_gradient_does_not_reach_what_is_kept(at: int, tmp_path: Path) -> None:
    """Though it is noticed some steps later only."""
    trainer, path = make_trainer(), tmp_path / "run.ckpt"
    before = [w.clone() for w in weights(trainer)]
    parameter = next(trainer.denoiser.parameters())
    calls: list[int] = []

    def broken(gradient: torch.Tensor) -> torch.Tensor:
        calls.append(1)
        return gradient * float("nan") if len(calls) > at else gradient

    parameter.register_hook(broken)
    with pytest.raises(FloatingPointError, match=f"iteration {at}: .* gradient has norm nan"):
        trainer.run(path, evaluate_every=100, progress=False)
    assert len(calls) - at <= training.READ_EVERY
    assert all(torch.equal(a, b) for a, b in zip(before, weights(trainer), strict=True))
    assert not path.exists()


@pytest.mark.parametrize("transposed", [False, True])
def test_moments_are_resumed_whatever_lies_where_in_memory(
    transposed: bool, tmp_path: Path
) -> None:
    def made() -> Trainer:
        trainer = make_trainer(30)
        weight = trainer.denoiser.network.layers[0].message.weight
        if transposed:
            weight.data = weight.data.t().contiguous().t()
        assert weight.is_contiguous() != transposed
        return trainer

    whole, first, second = made(), made(), made()
    whole.run(progress=False)
    for _ in range(13):
        first._step()
    first.save(tmp_path / "run.ckpt")
    second.run(tmp_path / "run.ckpt", progress=False)
    assert all(torch.equal(a, b) for a, b in zip(weights(whole), weights(second), strict=True))
    assert whole.log.losses == second.log.losses


def test_what_was_not_looked_at_is_forgotten_with_the_run(tmp_path: Path) -> None:
    trainer = make_trainer()
    trainer.save(tmp_path / "run.ckpt")
    trainer._step()
    trainer.restore(tmp_path / "run.ckpt")
    trainer._read()
    assert trainer._recent == []


def test_a_step_keeps_to_its_settings() -> None:
    trainer = make_trainer(gradient_clip=0.05, t_min=0.2, t_max=0.3)
    trainer._step()
    gradients = [p.grad for p in trainer.denoiser.parameters()]
    norm = float(torch.stack([g.norm() for g in gradients if g is not None]).norm())
    assert norm == pytest.approx(0.05, rel=1e-3)
    assert trainer.optimizer.param_groups[0]["lr"] == trainer.config.learning_rate_at(0)
    levels = trainer.config.draw_levels(2_000, torch.Generator().manual_seed(0))
    assert (float(levels.min()), float(levels.max())) == pytest.approx((0.2, 0.3))


def test_the_held_out_loss_is_the_same_every_time() -> None:
    trainer = make_trainer()
    state = trainer.rng.get_state()
    assert trainer.held_out_loss() == trainer.held_out_loss()
    assert torch.equal(trainer.rng.get_state(), state)


def test_an_autocast_around_a_training_is_refused() -> None:
    trainer = make_trainer(2)
    with (
        torch.autocast("cpu", torch.bfloat16),
        pytest.raises(ValueError, match="expected no torch.autocast around it"),
    ):
        trainer.run(progress=False)
    with torch.autocast("cpu", torch.bfloat16, enabled=False):
        trainer.run(progress=False)


def test_a_run_that_diverged_is_not_saved(tmp_path: Path) -> None:
    trainer, path = make_trainer(), tmp_path / "run.ckpt"
    next(trainer.denoiser.parameters()).register_hook(lambda gradient: gradient * float("inf"))
    trainer._step()
    with pytest.raises(FloatingPointError, match="diverged at iteration 0"):
        trainer.save(path)
    assert not path.exists()


def test_the_average_forgets_its_start_first_and_slowly_later() -> None:
    trainer = make_trainer(40, ema_decay=0.5)
    trainer.denoiser.register_buffer("counter", torch.zeros((), dtype=torch.int64))
    trainer.average["counter"] = torch.zeros((), dtype=torch.int64)
    expected = {name: value.clone() for name, value in trainer.average.items()}
    for k in range(1, 13):
        trainer.denoiser.counter += 1
        trainer._step()
        decay = min(0.5, (1.0 + k) / (10.0 + k))  # 0.5 from the eighth step on
        for name, now in trainer.denoiser.state_dict().items():
            if name != "counter":
                expected[name].mul_(decay).add_(now, alpha=1.0 - decay)
    assert int(trainer.average.pop("counter")) == 12
    for name, average in trainer.average.items():
        torch.testing.assert_close(average, expected[name], rtol=1e-5, atol=1e-7)


def test_the_logged_loss_is_that_of_a_configuration(monkeypatch: pytest.MonkeyPatch) -> None:
    trainer = make_trainer(40)
    weight = next(trainer.denoiser.parameters())

    def loss(clean: torch.Tensor, t: torch.Tensor, noise: torch.Tensor) -> torch.Tensor:
        return 3.0 + 0.0 * weight.sum() * t

    monkeypatch.setattr(trainer.denoiser, "loss", loss)
    for _ in range(3):
        trainer._step()
    trainer._read()
    assert trainer._recent == pytest.approx([3.0, 3.0, 3.0])


def test_training_lowers_the_held_out_loss_towards_the_exact_denoiser() -> None:
    trainer = make_trainer(n_iterations=300, learning_rate=3e-3, ema_decay=0.98)
    start = trainer.held_out_loss()
    trainer.run(progress=False)
    end = trainer.held_out_loss()
    assert end < 0.9 * start
    levels = trainer.config.draw_levels(2000, torch.Generator().manual_seed(3)).double()
    clean = ORACLE.sample(2000, seed=9)
    noise = ORACLE.space.standard_normal(2000, torch.Generator().manual_seed(4))
    noisy = clean + levels[:, None, None] * noise
    residual = ORACLE.denoiser(noisy, levels) - clean
    scale = levels.square() / (1.0 + levels.square()) * ORACLE.space.dim
    exact = float((residual.square().sum(dim=(1, 2)) / scale).mean())
    assert end > 0.9 * exact


def test_bfloat16_steps_train_float32_weights_almost_as_well() -> None:
    losses = {}
    for precision in ("float32", "bfloat16"):
        trainer = make_trainer(
            n_iterations=300, learning_rate=3e-3, ema_decay=0.98, precision=precision
        )
        start = trainer.held_out_loss()
        trainer.run(progress=False)
        losses[precision] = trainer.held_out_loss()
        assert losses[precision] < 0.9 * start
        assert all(p.dtype == torch.float32 for p in weights(trainer))
    assert losses["bfloat16"] != losses["float32"]
    assert losses["bfloat16"] < 1.02 * losses["float32"]


def test_bad_settings_are_refused() -> None:
    with pytest.raises(ValueError, match="precision: expected one of 'float32', 'bfloat16'"):
        TrainingConfig(10, precision="float16")
    with pytest.raises(ValueError, match="n_iterations: expected an integer >= 1, got 0"):
        TrainingConfig(0)
    with pytest.raises(ValueError, match="ema_decay: expected a fraction"):
        TrainingConfig(10, ema_decay=1.5)
    with pytest.raises(ValueError, match="expected t_min < t_max"):
        TrainingConfig(10, t_min=2.0, t_max=1.0)


def test_an_ignored_interrupt_stays_ignored(monkeypatch: pytest.MonkeyPatch) -> None:
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    trainer = make_trainer(5)
    before_step(trainer, press_ctrl_c, monkeypatch, at=3)
    trainer.run(progress=False)
    assert trainer.iteration == 5
