"""The forms in which networks are timed: eager or compiled, in float32 or in bfloat16."""

from __future__ import annotations

from collections.abc import Callable

import torch

from openmm_vtdis import DiffusionBoltzmannGenerator
from openmm_vtdis.diffusion.denoiser import PreconditionedDenoiser
from openmm_vtdis.runtime.cuda_graphs import AFTER
from openmm_vtdis.training.trainer import Trainer, TrainingConfig
from recipes.train import compile_layers

FORMS = {"cpu": ("float32",), "cuda": ("float32", "bfloat16, compiled")}
"""Forms of the package's networks; those of the baseline are always eager and in float32."""
WARM_UP = {"cpu": 1, "cuda": AFTER + 2}
"""Warm-up calls before the first that is timed."""


def in_form(name: str, form: str, device: torch.device) -> DiffusionBoltzmannGenerator:
    """A shipped generator, its layers compiled if the form says so."""
    gen = DiffusionBoltzmannGenerator.from_pretrained(name, device)
    if "compiled" in form:
        compile_layers(gen.network)
    return gen


def half_precision(form: str, device: torch.device) -> torch.autocast:
    """The autocast context in which a network of this form samples."""
    return torch.autocast(device.type, torch.bfloat16, enabled="bfloat16" in form)


def training_step(
    denoiser: PreconditionedDenoiser,
    batch_size: int,
    device: torch.device,
    precision: str = "float32",
) -> Callable[[], None]:
    """One step of training on Gaussians, whose configuration does not matter for the time."""
    rng = torch.Generator(device).manual_seed(0)
    frames = denoiser.space.standard_normal(2 * batch_size, rng, torch.float32)
    config = TrainingConfig(1_000, batch_size, precision=precision)
    trainer = Trainer(denoiser, frames, frames[:batch_size], config)

    def step() -> None:
        trainer._step()

    return step
