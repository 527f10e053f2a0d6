r"""Denoising score matching, with checkpoints from which a run resumes bit for bit.

Minimises ``E |D(x_0 + t xi, t) - x_0|^2 / (c_out(t)^2 d)`` over frames x_0, noise xi and log t
drawn from a normal distribution clipped to the range in use (Karras et al. 2022, Sec. 5, with a
mean and width that reach down to the stiffest modes of a molecule). Adam, linear warm-up, cosine
decay, gradient clipping by norm, and an exponential moving average (EMA) of the weights, which is
what is kept.

In a process group (:mod:`~openmm_vtdis.runtime.distributed`) every process draws the same batch,
takes its share of it and sums the gradients over all: weights and random numbers stay the same
everywhere, the result does not depend on the number of processes but for rounding, and process 0
writes the checkpoints.

Progress is judged by the held-out denoising loss: EMA weights, frames that training never sees,
and noise that is the same at every evaluation.
"""

from __future__ import annotations

import dataclasses
import json
import math
import os
import time
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any, Protocol

import torch
from torch import Tensor, nn
from torch.optim.swa_utils import get_ema_multi_avg_fn

from openmm_vtdis import storage
from openmm_vtdis.core import checks
from openmm_vtdis.core.rng import make_rng
from openmm_vtdis.core.space import Space
from openmm_vtdis.runtime import cuda_graphs, distributed
from openmm_vtdis.runtime.interrupts import deferred_interrupt
from openmm_vtdis.runtime.progress import progress_bar
from openmm_vtdis.storage.fingerprint import fingerprint
from openmm_vtdis.training.config import TrainingConfig, TrainingLog

READ_EVERY = 16
"""Steps between looks at the loss: each waits for a GPU to finish what it has been given."""


class Trainable(Protocol):
    """A torch module with a loss: a denoiser, or a head of one."""

    @property
    def space(self) -> Space:
        """The space of the configurations."""
        ...

    @property
    def graph_safe(self) -> bool:
        """Whether a training step may be recorded as a CUDA graph."""
        ...

    def loss(self, clean: Tensor, t: Tensor, noise: Tensor) -> Tensor:
        """Loss (B,) of clean (B, M, D), t (B,) and noise (B, M, D)."""
        ...

    def parameters(self) -> Iterator[nn.Parameter]: ...

    def buffers(self) -> Iterator[Tensor]: ...

    def state_dict(self) -> dict[str, Tensor]: ...

    def load_state_dict(self, state_dict: Mapping[str, Tensor]) -> object: ...

    def eval(self) -> object: ...


class Trainer:
    """One training run: parameters, their average, optimiser, rng and history.

    Parameters
    ----------
    denoiser
        A denoiser, or a head of one. Trained in place; holds the EMA weights after :meth:`run`.
    frames, held_out
        (n, M, D) configurations in model coordinates, projected onto the space.
    config
        Settings; stored in the checkpoint and compared on resume.
    """

    def __init__(
        self,
        denoiser: Trainable,
        frames: Tensor,
        held_out: Tensor,
        config: TrainingConfig,
    ) -> None:
        self.denoiser = denoiser
        self.config = config
        device = next(denoiser.parameters()).device
        self.frames = frames.to(device, torch.float32)
        self.held_out = held_out.to(device, torch.float32)
        self.rng = make_rng(config.seed, device)
        self.optimizer = torch.optim.Adam(
            denoiser.parameters(), lr=config.learning_rate, fused=True
        )
        self.average = {k: v.detach().clone() for k, v in denoiser.state_dict().items()}
        self.iteration = 0
        self.log = TrainingLog()
        self._elapsed = 0.0
        self._recent: list[float] = []
        self._unread: list[Tensor] = []
        self._steps = 0
        self._recording: cuda_graphs.Recording | None = None

    def run(
        self,
        checkpoint: str | os.PathLike[str] | None = None,
        checkpoint_seconds: float = 120.0,
        evaluate_every: int = 500,
        progress: bool = True,
    ) -> TrainingLog:
        """Train to the end, resuming from ``checkpoint`` if that file exists.

        Raises
        ------
        ValueError
            If the checkpoint belongs to another run (settings, network or data differ), or inside
            an autocast, which would keep casts of weights for longer than the weights.
        FloatingPointError
            If the loss becomes NaN or infinite; the last checkpoint is kept.
        KeyboardInterrupt
            On Ctrl-C, once a checkpoint is written. After this or any other exception the
            denoiser has the weights that it had before.
        """
        if torch.is_autocast_enabled(self.frames.device.type):
            raise ValueError(
                "training: expected no torch.autocast around it, got one; precision= says in which "
                "precision it runs"
            )
        path = checks.checkpoint(checkpoint, checkpoint_seconds)
        evaluate_every = checks.positive_integer("evaluate_every", evaluate_every)
        before = {k: v.detach().clone() for k, v in self.denoiser.state_dict().items()}
        try:
            if path is not None and path.exists():
                self.restore(path)
            self._loop(path, checkpoint_seconds, evaluate_every, progress)
        except BaseException:
            self.denoiser.load_state_dict(before)
            raise
        self.denoiser.load_state_dict(self.average)
        self.denoiser.eval()
        return self.log

    def _loop(
        self, path: Path | None, checkpoint_seconds: float, evaluate_every: int, progress: bool
    ) -> None:
        started = time.monotonic() - self._elapsed
        saved = time.monotonic()
        n_iterations = self.config.n_iterations
        first = distributed.in_group()[0] == 0
        distributed.copy_from_first([*self.denoiser.state_dict().values(), *self.average.values()])
        state = fingerprint(self._identity(), self.rng.get_state())
        if not distributed.all_alike(f"{state} {self.iteration}", self.frames.device):
            raise ValueError(
                "training: expected the same run, at the same iteration, in all processes, got "
                f"others than iteration {self.iteration} here; give all of them the same data and "
                "the same checkpoint"
            )
        bar = progress_bar(n_iterations, "training", progress and first, initial=self.iteration)
        with bar, deferred_interrupt() as pressed:
            while self.iteration < self.config.n_iterations:
                self._step()
                bar.update()
                last = self.iteration == self.config.n_iterations
                if last or self.iteration % evaluate_every == 0:
                    self._read()
                    self._elapsed = time.monotonic() - started
                    self._record()
                    bar.set_postfix(held_out=f"{self.log.held_out_losses[-1]:.4f}")
                interrupted = distributed.any_in_group(pressed(), self.frames.device)
                due = interrupted or time.monotonic() - saved >= checkpoint_seconds
                if path is not None and first and (last or due):
                    self._elapsed = time.monotonic() - started
                    self.save(path)
                    saved = time.monotonic()
                if interrupted:
                    kept = "" if path is None else f"; the same call goes on from {path}"
                    raise KeyboardInterrupt(f"training: at iteration {self.iteration}{kept}")

    @torch.enable_grad()
    def _step(self) -> None:
        config, rng = self.config, self.rng
        n_frames, device = len(self.frames), self.frames.device
        index = torch.randint(n_frames, (config.batch_size,), generator=rng, device=device)
        clean = self.frames[index]
        levels = config.draw_levels(config.batch_size, rng)
        noise = self.denoiser.space.standard_normal(config.batch_size, rng, torch.float32)
        for group in self.optimizer.param_groups:
            group["lr"] = config.learning_rate_at(self.iteration)
        rank, n_processes = distributed.in_group()
        batch = [v[rank::n_processes] for v in (clean, levels, noise)]
        may_record = self.denoiser.graph_safe and n_processes == 1
        if may_record and cuda_graphs.small_enough(clean):
            loss = self._recorded(batch)
        else:
            loss = self._gradients(*batch)
        if n_processes > 1:
            parameters = [p for p in self.denoiser.parameters() if p.requires_grad]
            for parameter in parameters:  # one that some share of the batch did not use
                if parameter.grad is None:
                    parameter.grad = torch.zeros_like(parameter)
            gradients = [p.grad for p in parameters if p.grad is not None]
            distributed.sum_over_group([loss, *gradients])
        norm = nn.utils.clip_grad_norm_(self.denoiser.parameters(), config.gradient_clip)
        self._unread.append(torch.stack([loss, norm]))
        self.optimizer.step()
        self.iteration += 1
        decay = min(config.ema_decay, (1.0 + self.iteration) / (10.0 + self.iteration))
        state = self.denoiser.state_dict()
        floating = [name for name, now in state.items() if now.dtype.is_floating_point]
        averages = [self.average[name] for name in floating]
        get_ema_multi_avg_fn(decay)(averages, [state[name] for name in floating], None)  # type: ignore[no-untyped-call]
        for name in state.keys() - floating:
            self.average[name].copy_(state[name])
        if n_processes > 1 or len(self._unread) == READ_EVERY:  # all of a group fail together
            self._read()

    def _read(self) -> None:
        """Read the losses and gradients of the steps since the last call; fail if one is bad."""
        values = torch.stack(self._unread).tolist() if self._unread else []
        self._unread.clear()
        for iteration, (loss, norm) in enumerate(values, self.iteration - len(values)):
            if not (math.isfinite(loss) and math.isfinite(norm)):
                raise FloatingPointError(
                    f"training diverged at iteration {iteration}: the loss is {loss} and its "
                    f"gradient has norm {norm}. The last "
                    "checkpoint is kept; resume with a lower learning_rate or check the frames"
                )
            self._recent.append(loss)

    def _gradients(self, clean: Tensor, levels: Tensor, noise: Tensor) -> Tensor:
        """Compute the loss, and leave its gradients with the parameters."""
        config = self.config
        self.optimizer.zero_grad(set_to_none=True)
        mixed = config.precision == "bfloat16"
        with torch.autocast(clean.device.type, torch.bfloat16, enabled=mixed):
            loss = self.denoiser.loss(clean, levels, noise).sum() / config.batch_size
        loss.backward()  # type: ignore[no-untyped-call]
        return loss.detach()

    def _recorded(self, batch: list[Tensor]) -> Tensor:
        """Call :meth:`_gradients`, by a recording after some steps.

        The training of a pair head, which waits for its decompositions, is not recorded, nor is any
        in a process group.
        """
        self._steps += 1
        if self._recording is None and self._steps > cuda_graphs.AFTER:
            self._recording = cuda_graphs.Recording(self._gradients, *batch)
        if self._recording is None:
            return self._gradients(*batch)
        loss: Tensor = self._recording(*batch)
        return loss

    def _record(self) -> None:
        mean = sum(self._recent) / max(len(self._recent), 1)
        self._recent.clear()
        self.log.append(self.iteration, mean, self.held_out_loss(), self._elapsed)

    @torch.no_grad()
    def held_out_loss(self, n: int = 2048) -> float:
        """Denoising loss of the EMA weights on held-out frames, with fixed noise."""
        rng = make_rng(0, self.held_out.device)
        current = {k: v.clone() for k, v in self.denoiser.state_dict().items()}
        self.denoiser.load_state_dict(self.average)
        total, count = 0.0, 0
        for chunk in self.held_out[:n].split(256):
            levels = self.config.draw_levels(len(chunk), rng)
            noise = self.denoiser.space.standard_normal(len(chunk), rng, torch.float32)
            total += float(self.denoiser.loss(chunk, levels, noise).sum())
            count += len(chunk)
        self.denoiser.load_state_dict(current)
        return total / max(count, 1)

    def save(self, path: str | os.PathLike[str]) -> None:
        """Write everything that the rest of the run depends on, atomically; not if it diverged."""
        self._read()
        tensors = {f"model.{k}": v for k, v in self.denoiser.state_dict().items()}
        tensors |= {f"average.{k}": v for k, v in self.average.items()}
        for index, state in self.optimizer.state_dict()["state"].items():
            tensors |= {f"optimizer.{index}.{k}": torch.as_tensor(v) for k, v in state.items()}
        tensors["generator"] = self.rng.get_state()
        metadata = {
            "run": self._identity(),
            "iteration": self.iteration,
            "elapsed": self._elapsed,
            "recent": self._recent,
            "log": dataclasses.asdict(self.log),
        }
        storage.write_archive(path, "checkpoint", tensors, metadata)

    def restore(self, path: str | os.PathLike[str]) -> None:
        """Continue from a checkpoint of this very run."""
        tensors, metadata = storage.read_archive(path, "checkpoint")
        identity = json.loads(json.dumps(self._identity()))
        if metadata["run"] != identity:
            raise ValueError(
                f"{path}: expected a checkpoint of this run, got one that differs in "
                f"{_differences(metadata['run'], identity)}; give another checkpoint path or the "
                "same settings"
            )
        self.denoiser.load_state_dict(storage.select_prefix(tensors, "model."))
        average = storage.select_prefix(tensors, "average.")
        for name, value in self.average.items():
            value.copy_(average[name])
        states: dict[int, dict[str, Tensor]] = {}
        parameters = list(self.denoiser.parameters())
        for name, tensor in storage.select_prefix(tensors, "optimizer.").items():
            index, key = int(name.split(".")[0]), name.split(".")[1]
            if key != "step":  # moments lie in memory as the parameter does
                tensor = torch.empty_like(parameters[index]).copy_(tensor)
            states.setdefault(index, {})[key] = tensor
        groups = self.optimizer.state_dict()["param_groups"]
        self.optimizer.load_state_dict({"state": states, "param_groups": groups})
        self.rng.set_state(tensors["generator"])
        self.iteration = int(metadata["iteration"])
        self._elapsed = float(metadata["elapsed"])
        self._recent = list(metadata["recent"])
        self._unread.clear()
        self.log = TrainingLog(**metadata["log"])

    def _identity(self) -> dict[str, Any]:
        """Identity of the run: a resumed one must have the same."""
        return {
            "config": dataclasses.asdict(self.config),
            "parameters": {k: list(v.shape) for k, v in self.denoiser.state_dict().items()},
            "network": fingerprint(repr(self.denoiser), list(self.denoiser.buffers())),
            "frames": fingerprint(self.frames, self.held_out),
        }


def _differences(there: dict[str, Any], here: dict[str, Any]) -> str:
    """Describe what differs between two identities, with the values of settings."""
    changed = [k for k in here if k != "config" and there.get(k) != here[k]]
    settings = storage.differences(there.get("config", {}), here["config"])
    return ", ".join([*changed, *([settings] if settings else [])])
