"""Settings and history of a training run."""

from __future__ import annotations

import dataclasses
import math
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor

from openmm_vtdis.core import checks


@dataclass(frozen=True)
class TrainingConfig:
    """Settings of one training run.

    Attributes
    ----------
    n_iterations, batch_size
        Optimiser steps and configurations in each.
    learning_rate, final_learning_rate, warmup
        Peak and end of the cosine schedule; iterations of linear warm-up.
    ema_decay
        Decay of the weight average per iteration (shorter at the start of the run).
    gradient_clip
        Largest gradient norm.
    log_t_mean, log_t_std, t_min, t_max
        log t ~ Normal(mean, std), clipped to [log t_min, log t_max], in model coordinates.
    precision
        "float32", or "bfloat16" for the matrix products of a training step (weights, their average
        and the held-out loss stay float32): two to three times faster on most hardware.
    seed
        Seed of the batches and noise.
    """

    n_iterations: int
    batch_size: int = 256
    learning_rate: float = 1e-3
    final_learning_rate: float = 1e-6
    warmup: int = 100
    ema_decay: float = 0.999
    gradient_clip: float = 1.0
    log_t_mean: float = -1.5
    log_t_std: float = 1.4
    t_min: float = 1e-3
    t_max: float = 40.0
    precision: str = "float32"
    seed: int = 0

    def __post_init__(self) -> None:
        for name, least in (("n_iterations", 1), ("batch_size", 1), ("warmup", 0)):
            number = checks.positive_integer(name, vars(self)[name], minimum=least)
            object.__setattr__(self, name, number)
        for name in (
            "learning_rate", "final_learning_rate", "gradient_clip", "log_t_std", "t_min", "t_max",
        ):  # fmt: skip
            object.__setattr__(self, name, checks.positive_number(name, vars(self)[name]))
        checks.fraction("ema_decay", self.ema_decay)
        checks.choice("precision", self.precision, ("float32", "bfloat16"))
        if not isinstance(self.log_t_mean, int | float) or not math.isfinite(self.log_t_mean):
            raise ValueError(f"log_t_mean: expected a finite number, got {self.log_t_mean!r}")
        if self.t_max <= self.t_min:
            raise ValueError(f"expected t_min < t_max, got {self.t_min} and {self.t_max}")

    @classmethod
    def of(cls, name: str, **settings: Any) -> TrainingConfig:
        """Settings by name; an unknown one is a TypeError that lists those that ``name`` knows."""
        known = {entry.name for entry in dataclasses.fields(cls)}
        if not settings.keys() <= known:
            raise TypeError(
                f"{name}: unknown setting {', '.join(sorted(settings.keys() - known))}; the known "
                f"ones are {', '.join(sorted(known))}"
            )
        return cls(**settings)

    def learning_rate_at(self, iteration: int) -> float:
        """Learning rate of the given iteration, counted from zero."""
        if iteration < self.warmup:
            return self.learning_rate * (iteration + 1) / self.warmup
        progress = (iteration - self.warmup) / max(self.n_iterations - self.warmup, 1)
        cosine = 0.5 * (1.0 + math.cos(math.pi * min(progress, 1.0)))
        return self.final_learning_rate + (self.learning_rate - self.final_learning_rate) * cosine

    def draw_levels(self, n: int, rng: torch.Generator) -> Tensor:
        """Draw n noise levels, (n,) float32."""
        normal = torch.randn(n, generator=rng, device=rng.device, dtype=torch.float32)
        log_t = self.log_t_mean + self.log_t_std * normal
        return log_t.clamp(math.log(self.t_min), math.log(self.t_max)).exp()


@dataclass
class TrainingLog:
    """History of a run: one row per evaluation.

    Attributes
    ----------
    iterations, losses, held_out_losses, seconds
        Iteration count, mean training loss since the last row, held-out loss of the EMA weights,
        and wall seconds since the start (resumed runs go on counting).
    """

    iterations: list[int] = field(default_factory=list)
    losses: list[float] = field(default_factory=list)
    held_out_losses: list[float] = field(default_factory=list)
    seconds: list[float] = field(default_factory=list)

    def append(self, iteration: int, loss: float, held_out: float, seconds: float) -> None:
        """Add one row."""
        self.iterations.append(iteration)
        self.losses.append(loss)
        self.held_out_losses.append(held_out)
        self.seconds.append(seconds)
