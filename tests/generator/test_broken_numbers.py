"""Numbers that are none, in a network or a covariance: refused, or counted and never weighted."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import torch
from torch import Tensor

from openmm_vtdis import DiffusionBoltzmannGenerator
from openmm_vtdis.coordinates import Cartesian
from openmm_vtdis.diffusion.denoiser import GaussianMixtureDenoiser
from openmm_vtdis.generator import archive
from openmm_vtdis.targets import double_well, gaussian_mixture


@pytest.mark.parametrize("value", [float("nan"), float("inf"), -float("inf")])
@pytest.mark.parametrize("where", ["network", "covariance"])
def test_generators_with_numbers_that_are_none(
    value: float, where: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Neither written nor read; a file that was there stays."""
    system = double_well()
    gen = DiffusionBoltzmannGenerator(
        system.system, None, system.temperature, n_dims=2, network="egnn-1x8", seed=0
    )
    frames = system.positions + 0.1 * np.random.default_rng(0).normal(size=(50, 4, 2))
    gen.train(frames, 1, batch_size=4, progress=False)
    gen.tune(frames, 4, "isotropic", "ddpm", "geometric", n_trajectories=100, progress=False)
    path = gen.save(tmp_path / "model.vtdis")
    content = path.read_bytes()
    assert gen.process is not None
    tensors = [p.data for p in gen.network.parameters()]
    broken = tensors[-1] if where == "network" else gen.process.covariance.parameters.data
    broken.view(-1)[0] = value
    message = f"expected finite numbers, got NaN or infinity in .'{where}"
    with pytest.raises(ValueError, match=message):
        gen.save(path)
    assert path.read_bytes() == content
    with monkeypatch.context() as patch:
        patch.setattr(archive, "_check_finite", lambda *arguments: None)
        gen.save(path)  # as a file from elsewhere may be
    with pytest.raises(ValueError, match=message):
        DiffusionBoltzmannGenerator.load(path)


@pytest.mark.parametrize("value", [float("nan"), float("inf"), -float("inf")])
@pytest.mark.parametrize("covariance", ["isotropic", "tweedie", "hessian"])
def test_a_network_that_breaks_for_some_samples(value: float, covariance: str) -> None:
    """Those that it breaks for have weight zero and are counted; the others are as they were."""
    target = gaussian_mixture(4)
    frames = target.sample(2_000, seed=1)
    exact = GaussianMixtureDenoiser(
        target.space, target.weights, target.means, target.variances
    ).scaled(2.0)

    class Breaking:
        space, broken = exact.space, False

        def __call__(self, x: Tensor, t: Tensor) -> Tensor:
            denoised = exact(x, t)
            if not self.broken:
                return denoised
            bad = (x[..., 0].abs().sum(dim=-1) > 40.0)[..., None, None]
            return torch.where(bad, value, denoised)

    denoiser = Breaking()
    coordinates = Cartesian(target.space, 2.0)
    gen = DiffusionBoltzmannGenerator.from_denoiser(target, denoiser, coordinates)
    gen.tune(
        frames, 8, covariance, schedule="geometric", n_trajectories=300, seed=0, progress=False
    )
    whole = gen.sample(300, seed=4, batch_size=300, progress=False)
    denoiser.broken = True
    some = gen.sample(300, seed=4, batch_size=300, progress=False)
    broken = np.isneginf(some.log_weights)
    assert 0 < broken.sum() < 300
    assert some.diagnostics().n_zero_weight == broken.sum()
    assert np.isfinite(some.log_weights[~broken]).all()
    np.testing.assert_allclose(some.log_weights[~broken], whole.log_weights[~broken], atol=1e-9)
