"""What generators refuse, and the message that each of it gets."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import mdtraj as md
import numpy as np
import openmm
import pytest
import torch

from openmm_vtdis import DiffusionBoltzmannGenerator
from openmm_vtdis.coordinates import Cartesian
from openmm_vtdis.core.space import Space
from openmm_vtdis.diffusion.covariance import Isotropic
from openmm_vtdis.diffusion.denoiser import GaussianMixtureDenoiser
from openmm_vtdis.diffusion.process import DiffusionProcess
from openmm_vtdis.diffusion.schedule import Schedule
from openmm_vtdis.mcmc import sample_hmc
from openmm_vtdis.targets import double_well, gaussian_mixture
from openmm_vtdis.topology import placeholder_topology
from tests.conftest import exact_generator
from tests.generator.small import equilibrium_frames, new_generator, trained_generator


@pytest.fixture(scope="module")
def frames() -> np.ndarray:
    return equilibrium_frames()


@pytest.fixture(scope="module")
def trained(frames: np.ndarray) -> DiffusionBoltzmannGenerator:
    return trained_generator(frames)


def test_an_energy_without_second_derivatives_is_refused(frames: np.ndarray) -> None:
    bench = double_well()
    gen = DiffusionBoltzmannGenerator(
        bench.system, None, bench.temperature, n_dims=2, network="egnn-1x8", backend="contexts"
    )
    gen.train(frames, 2, batch_size=8, progress=False)
    with pytest.raises(ValueError, match=r"second derivatives, got that of OpenMM Contexts"):
        gen.tune(frames, 3, "hessian", n_trajectories=100, progress=False)
    assert gen.process is None


def test_bad_input_is_refused(trained: DiffusionBoltzmannGenerator, frames: np.ndarray) -> None:
    gen = new_generator()
    with pytest.raises(ValueError, match="tune: expected a trained generator"):
        gen.tune(frames)
    with pytest.raises(ValueError, match="save: expected a trained generator"):
        gen.save("nowhere")
    with pytest.raises(ValueError, match=r"expected positions of shape \(n, 4, 2\)"):
        gen.train(frames[:, :3])
    bad = frames.copy()
    bad[5, 0, 0] = np.inf
    with pytest.raises(ValueError, match="the first at index 5"):
        gen.train(bad)
    gen.coordinates = Cartesian(gen.space)
    with pytest.raises(ValueError, match="sample: expected a tuned generator"):
        gen.sample(10)
    with pytest.raises(ValueError, match="n_steps: expected an integer >= 2, got 1"):
        trained.tune(frames, 1)
    with pytest.raises(ValueError, match="n: expected an integer >= 1, got 0"):
        trained.sample(0)
    with pytest.raises(ValueError, match="covariance: expected one of 'auto', 'isotropic', "):
        trained.tune(frames, covariance="banded")
    with pytest.raises(ValueError, match="objective: expected one of"):
        trained.tune(frames, objective="mse")
    with pytest.raises(ValueError, match="pretrained: expected one of"):
        DiffusionBoltzmannGenerator.from_pretrained("water")
    system = openmm.System()
    for _ in range(3):
        system.addParticle(1.0)
    system.addConstraint(0, 1, 0.1)
    with pytest.raises(ValueError, match="constraints=None"):
        DiffusionBoltzmannGenerator(system)


@pytest.mark.parametrize("method", ["convex", "sgd"])
def test_frames_of_infinite_energy_are_refused_by_every_method(method: str) -> None:
    target, gen = exact_generator()
    x = target.sample(200, seed=1)
    energy = target.reduced_energy
    target.reduced_energy = lambda y: torch.where(y[:, 0, 0] < 0, torch.nan, energy(y))  # type: ignore[method-assign]
    with pytest.raises(ValueError, match="tune: expected frames of finite energy"):
        gen.tune(
            x, 5, "isotropic", method=method, sgd_iterations=3, n_trajectories=100, progress=False
        )
    assert gen.process is None


def test_more_bad_input_is_refused(frames: np.ndarray) -> None:
    target, gen = exact_generator()
    x = target.sample(200, seed=1)
    with pytest.raises(ValueError, match="t_min: expected a finite number > 0, got 0.0"):
        gen.tune(x, 5, "isotropic", t_min=0.0, n_trajectories=100, progress=False)
    gen.tune(x, 5, "isotropic", n_trajectories=100, progress=False)
    for bad in (0, -1, 2.5):
        with pytest.raises(ValueError, match="batch_size: expected an integer >= 1"):
            gen.sample(10, batch_size=bad, progress=False)  # type: ignore[arg-type]
    raised = np.concatenate([frames, np.full_like(frames[..., :1], 0.5)], axis=-1)
    traj = md.Trajectory(raised, md.Topology.from_openmm(placeholder_topology(4)))
    with pytest.raises(ValueError, match="expected particles at z = 0 in 2 dimensions"):
        new_generator().train(traj, 3)


def test_a_failed_training_leaves_the_generator_as_it_was(
    trained: DiffusionBoltzmannGenerator, frames: np.ndarray, tmp_path: Path
) -> None:
    before = trained.sample(20, seed=3, progress=False).log_weights
    with pytest.raises(FloatingPointError, match="training diverged"):
        trained.train(frames, 20, learning_rate=1e38, batch_size=16, progress=False)
    with pytest.raises(ValueError, match="checkpoint: expected a path in a folder that exists"):
        trained.train(frames, 20, checkpoint=tmp_path / "no" / "run.ckpt", progress=False)
    after = trained.sample(20, seed=3, progress=False).log_weights
    np.testing.assert_array_equal(before, after)


def test_arguments_of_the_wrong_kind_are_refused(frames: np.ndarray) -> None:
    bench = double_well()
    top: Any = md.Topology.from_openmm(placeholder_topology(4))
    with pytest.raises(ValueError, match=r"topology: .*mdtraj.*Topology; use its to_openmm\(\)"):
        DiffusionBoltzmannGenerator(bench.system, top, n_dims=2)
    with pytest.raises(ValueError, match="network: expected a size .* got 3"):
        DiffusionBoltzmannGenerator(bench.system, n_dims=2, network=3)  # type: ignore[arg-type]
    with pytest.raises(ValueError, match="device: expected one that torch can use here, got 'moon"):
        DiffusionBoltzmannGenerator(bench.system, n_dims=2, device="moon")
    with pytest.raises(ValueError, match="state: expected an openmmtools ThermodynamicState, got"):
        DiffusionBoltzmannGenerator.from_thermodynamic_state(bench.system)
    gen = new_generator()
    with pytest.raises(TypeError, match="train: unknown setting lr; the known ones are batch_size"):
        gen.train(frames, 3, lr=0.1)
    with pytest.raises(ValueError, match="particles apart, got 20 of 20 frames in which most"):
        gen.train(np.zeros((20, 4, 2)), 3)


def test_settings_that_contradict_each_other_are_refused() -> None:
    target, gen = exact_generator()
    x = target.sample(200, seed=1)
    options = {"n_trajectories": 100, "progress": False}
    with pytest.raises(ValueError, match='tune_mean: expected False with objective="ddpm"'):
        gen.tune(x, 5, "isotropic", objective="ddpm", tune_mean=True, **options)
    with pytest.raises(ValueError, match="tune_mean: expected True or False, got 'no'"):
        gen.tune(x, 5, tune_mean="no", **options)  # type: ignore[arg-type]
    wide = gaussian_mixture(200)
    exact = GaussianMixtureDenoiser(wide.space, wide.weights, wide.means, wide.variances)
    gen = DiffusionBoltzmannGenerator.from_denoiser(wide, exact)
    with pytest.raises(ValueError, match=r"200 x 200 numbers, at least 400, got 70"):
        gen.tune(wide.sample(200, seed=1), 5, "full", **options)


def test_a_denoiser_on_another_space_is_refused() -> None:
    target, _ = exact_generator(0.7, Space(4, 2))
    free = GaussianMixtureDenoiser(
        Space(4, 2, centred=False), target.weights, target.means, target.variances
    )
    with pytest.raises(ValueError, match="denoiser: expected one on the coordinates' space"):
        DiffusionBoltzmannGenerator.from_denoiser(target, free)
    with pytest.raises(ValueError, match="covariance: expected one on the denoiser's space"):
        DiffusionProcess(
            free, Schedule.geometric(5, 0.1, 5.0),
            Isotropic.ddpm(target.space, Schedule.geometric(5, 0.1, 5.0)),
        )  # fmt: skip


def test_frames_in_another_unit_are_not_noised(trained: DiffusionBoltzmannGenerator) -> None:
    frames = sample_hmc(
        trained.target, n_chains=30, n_samples=1, burn_in=60, seed=8, progress=False
    ).positions
    assert np.isfinite(trained.log_weights(frames, seed=0, progress=False)).all()
    with pytest.raises(ValueError, match=r"log_weights: expected equilibrium frames.*length unit"):
        trained.log_weights(10.0 * frames, seed=0, progress=False)


class Wrong(torch.nn.Module):
    """A network whose output has another shape, or which cannot be called."""

    def __init__(self, how: str) -> None:
        super().__init__()
        self.how, self.scale = how, torch.nn.Parameter(torch.ones(1))

    def forward(self, x: torch.Tensor, log_t: torch.Tensor) -> torch.Tensor:
        if self.how == "raises":
            raise RuntimeError("mat1 and mat2 shapes cannot be multiplied")
        return self.scale * (x[:, :3] if self.how == "shape" else x)


def test_networks_and_coordinates_that_do_not_fit_are_refused_at_once() -> None:
    target = double_well().target()
    make = DiffusionBoltzmannGenerator.from_target
    make(target, Wrong("not"))  # control
    with pytest.raises(ValueError, match=r"network: expected a map of x \(B, 4, 2\)"):
        make(target, Wrong("shape"))
    with pytest.raises(ValueError, match="got RuntimeError: mat1 and mat2"):
        make(target, Wrong("raises"))
    with pytest.raises(ValueError, match='such as "egnn-4x128", of one of .*egnn.*mlp.* got'):
        make(target, "atn-1x8")
    make(target, coordinates=Cartesian(target.space))  # control
    for other in (Cartesian, "cartesian", Space(4, 2)):
        with pytest.raises(ValueError, match="coordinates: expected an object such as Cartesian"):
            make(target, coordinates=other)  # type: ignore[arg-type]
    with pytest.raises(ValueError, match="expected those of 4 particles in 2 dimensions"):
        make(target, coordinates=Cartesian(Space(5, 2)))


def test_a_network_that_cannot_see_where_particles_are_is_warned_of(
    caplog: pytest.LogCaptureFixture,
) -> None:
    target = gaussian_mixture(4)
    DiffusionBoltzmannGenerator.from_target(target, "mlp-1x8")
    assert "differences of positions" not in caplog.text
    DiffusionBoltzmannGenerator.from_target(target, "egnn-1x8")
    assert "an EGNN sees differences of positions only" in caplog.text
