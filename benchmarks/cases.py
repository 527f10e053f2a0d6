"""Cases: generators with frames to tune on and others to judge by, and the seeds."""

from __future__ import annotations

import functools
import math
from collections.abc import Callable
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from openmm_vtdis import DiffusionBoltzmannGenerator
from openmm_vtdis.coordinates import Cartesian
from openmm_vtdis.core.rng import make_rng
from openmm_vtdis.diffusion.denoiser import GaussianMixtureDenoiser
from openmm_vtdis.targets import gaussian_mixture
from recipes.reference import reference_frames
from recipes.settings import RECIPES

FIT_SEED, TEST_SEED, SAMPLE_SEED, SGD_SEED = 31, 32, 33, 34


@dataclass(frozen=True)
class Case:
    """A generator with frames to tune on, and others to judge by, made when they are needed."""

    name: str
    gen: DiffusionBoltzmannGenerator
    load: Callable[[str], Tensor]

    @functools.cached_property
    def train(self) -> Tensor:
        """Frames (n, M, D) in nm to tune on."""
        return self.load("train")

    @functools.cached_property
    def test(self) -> Tensor:
        """Frames (n, M, D) in nm to judge by, of another seed."""
        return self.load("test")


def make_case(name: str, device: torch.device | str = "cpu") -> Case:
    """The case of a name: a shipped generator's, "gmm2-<dim>" or "gmm2-<dim>-mlp"."""
    if name.startswith("gmm2"):
        if torch.device(device).type != "cpu":
            raise ValueError(f"{name}: expected the CPU, got {str(device)!r}")
        return mixture_case(name)
    gen = DiffusionBoltzmannGenerator.from_pretrained(name, device)

    def load(split: str) -> Tensor:
        n_frames = RECIPES[name].later_frames if split == "train" else None
        return torch.tensor(reference_frames(name, split, n_frames=n_frames))

    return Case(name, gen, load)


def mixture_case(name: str) -> Case:
    """GMM-2 with its exact denoiser, or with an MLP trained here (and kept under ``runs/``)."""
    target = gaussian_mixture(int(name.split("-")[1]))
    frames = {"train": target.sample(100_000, seed=1), "test": target.sample(100_000, seed=2)}
    train = frames["train"]
    length = math.sqrt(float(train.square().mean()))
    if not name.endswith("-mlp"):
        exact = GaussianMixtureDenoiser(
            target.space, target.weights, target.means, target.variances
        ).scaled(length)
        coordinates = Cartesian(target.space, length)
        gen = DiffusionBoltzmannGenerator.from_denoiser(target, exact, coordinates)
    else:
        torch.manual_seed(7)
        gen = DiffusionBoltzmannGenerator.from_target(target, "mlp-7x512")
        gen.train(train, 12_000, checkpoint=f"runs/{name}.ckpt", batch_size=512, seed=7)
    return Case(name, gen, frames.__getitem__)


def held_out_frames(name: str, n: int) -> np.ndarray:
    """n frames (n, M, D) of the run that neither training nor tuning has seen, with repeats."""
    pool = reference_frames(name, "test")
    return pool[np.random.default_rng(TEST_SEED).integers(len(pool), size=n)]


def fingerprint_of(gen: DiffusionBoltzmannGenerator) -> float:
    """A number that changes when the denoiser does."""
    x = gen.space.standard_normal(4, make_rng(0)).to(gen.device)
    with torch.no_grad():
        return float(gen.denoiser(x, torch.full((4,), 0.5, dtype=x.dtype)).abs().sum())
