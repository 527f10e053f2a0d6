"""What samplers take: the same as the generator's calls, and a clear error for the rest."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
import torch

from openmm_vtdis import DiffusionBoltzmannGenerator
from openmm_vtdis.core.rng import make_rng
from openmm_vtdis.diffusion.paths import denoise, noise
from openmm_vtdis.mcmc import sample_hmc
from openmm_vtdis.mcmc.renoising import IndependentProposals


@pytest.fixture(scope="module")
def gen() -> DiffusionBoltzmannGenerator:
    return DiffusionBoltzmannGenerator.from_pretrained("dw4-small")


@pytest.fixture(scope="module")
def frames(gen: DiffusionBoltzmannGenerator) -> torch.Tensor:
    return torch.tensor(gen.sample(20, seed=0, n_steps=10, progress=False).positions)


def test_frames_away_from_the_origin_have_the_weights_of_those_at_it(
    gen: DiffusionBoltzmannGenerator, frames: torch.Tensor
) -> None:
    sampler = gen.path_sampler(10)
    known = gen.log_weights(frames, n_steps=10, seed=1, progress=False).log_weights
    for x in (frames, frames + 5.0, (frames + 5.0).numpy()):
        found = sampler.log_weights(x, rng=make_rng(1), progress=False).log_weights
        np.testing.assert_allclose(found, known, rtol=1e-9)


def test_mirror_images_of_the_samples_are_refused() -> None:
    gen = DiffusionBoltzmannGenerator.from_pretrained("aldp-800K")
    sampler = gen.path_sampler(3)
    ensemble = sampler.sample(8, rng=make_rng(0), progress=False)
    x = torch.tensor(ensemble.positions[np.isfinite(ensemble.log_weights)][:2])
    sampler.log_weights(x, rng=make_rng(1), progress=False)  # control
    with pytest.raises(ValueError, match="log_weights: "):
        sampler.log_weights(-x, rng=make_rng(1), progress=False)


@pytest.mark.parametrize(
    ("change", "match"),
    [
        ({"rng": 0}, "rng: expected a torch.Generator, got 0"),
        ({"rng": None}, "rng: expected a torch.Generator, got None"),
        ({"batch_size": 0}, "batch_size: expected an integer >= 1"),
    ],
)
def test_arguments_of_other_kinds(
    gen: DiffusionBoltzmannGenerator, frames: torch.Tensor, change: dict[str, Any], match: str
) -> None:
    sampler = gen.path_sampler(3)
    with pytest.raises(ValueError, match=match):
        sampler.sample(3, **{"rng": make_rng(0), **change})
    with pytest.raises(ValueError, match=match):
        sampler.log_weights(frames, **{"rng": make_rng(0), **change})


def test_sizes_and_shapes(gen: DiffusionBoltzmannGenerator, frames: torch.Tensor) -> None:
    sampler, rng = gen.path_sampler(3), make_rng(0)
    for n in ("3", 0, 2.0):
        with pytest.raises(ValueError, match="n: expected an integer >= 1"):
            sampler.sample(n, rng=rng)  # type: ignore[arg-type]
    with pytest.raises(ValueError, match=r"expected positions of shape \(n, 4, 2\)"):
        sampler.log_weights(frames[:, :3], rng=rng)
    with pytest.raises(ValueError, match="sampler: expected a Sampler, got Diffusion"):
        IndependentProposals(gen, rng, 3)  # type: ignore[arg-type]
    with pytest.raises(ValueError, match="target: expected a Target"):
        sample_hmc(gen)  # type: ignore[arg-type]


def test_paths_take_batches_of_model_coordinates(
    gen: DiffusionBoltzmannGenerator, frames: torch.Tensor
) -> None:
    process, rng = gen.process, make_rng(0)
    assert process is not None
    n_steps = process.n_steps
    for path, level in ((noise, "to"), (denoise, "from_")):
        with pytest.raises(ValueError, match=r"expected positions of shape \(B, 4, 2\)"):
            path(process, frames[0], rng)
        with pytest.raises(TypeError, match="expected a torch tensor"):
            path(process, frames.numpy(), rng)  # type: ignore[arg-type]
        with pytest.raises(TypeError, match="process: expected a DiffusionProcess"):
            path(gen, frames, rng)  # type: ignore[arg-type]
        with pytest.raises(ValueError, match="rng: expected a torch.Generator"):
            path(process, frames, 3)  # type: ignore[arg-type]
        with pytest.raises(ValueError, match=f"{level}: expected a level from 0 to {n_steps}"):
            path(process, frames, rng, n_steps + 1)


def test_what_is_missing_is_said_by_the_name_of_the_call(
    gen: DiffusionBoltzmannGenerator,
) -> None:
    new = DiffusionBoltzmannGenerator.from_target(gen.target, "egnn-1x8")
    for name in ("path_sampler", "flow_sampler"):
        with pytest.raises(ValueError, match=f"^{name}: expected a trained generator"):
            {"path_sampler": new.path_sampler, "flow_sampler": new.flow_sampler}[name]()
    with pytest.raises(ValueError, match="^model_energy: expected a trained generator"):
        print(new.model_energy)
