"""Archives of generators: nothing is lost, nothing in them runs, and a damaged one is refused."""

from __future__ import annotations

import contextlib
from pathlib import Path
from typing import Any

import numpy as np
import openmm
import pytest
import torch
from torch import Tensor

from openmm_vtdis import DiffusionBoltzmannGenerator, storage
from openmm_vtdis.coordinates import COORDINATES, Cartesian, Configurations, Coordinates
from openmm_vtdis.core.space import Space
from openmm_vtdis.targets import GaussianMixture
from openmm_vtdis.topology import Handedness
from recipes.train import round_weights
from tests.conftest import needs_python_force
from tests.generator.small import equilibrium_frames, new_generator, trained_generator


@pytest.fixture(scope="module")
def frames() -> np.ndarray:
    return equilibrium_frames()


@pytest.fixture(scope="module")
def trained(frames: np.ndarray) -> DiffusionBoltzmannGenerator:
    return trained_generator(frames)


def test_archive_round_trip(trained: DiffusionBoltzmannGenerator, tmp_path: Path) -> None:
    path = trained.save(tmp_path / "model.vtdis")
    again = DiffusionBoltzmannGenerator.load(path)
    a = trained.sample(50, seed=9, progress=False)
    b = again.sample(50, seed=9, progress=False)
    np.testing.assert_array_equal(a.log_weights, b.log_weights)
    np.testing.assert_array_equal(a.positions, b.positions)


@pytest.mark.parametrize("covariance", ["tweedie", "hessian", "pairwise"])
def test_covariances_of_the_state_all_the_way(
    trained: DiffusionBoltzmannGenerator, frames: np.ndarray, tmp_path: Path, covariance: str
) -> None:
    if covariance == "pairwise":
        trained.network.pair_head = None
        with pytest.raises(ValueError, match="pairwise.*train_pair_head"):
            trained.tune(frames, 8, covariance, n_trajectories=100, progress=False)
        trained.train_pair_head(frames, 20, n_hidden=16, batch_size=32, progress=False)
    report = trained.tune(frames, 8, covariance, n_trajectories=200, progress=False)
    assert 0.0 < report.forward_ess_test <= 1.0
    again = DiffusionBoltzmannGenerator.load(trained.save(tmp_path / "model.vtdis"))
    a = trained.sample(20, seed=9, n_steps=12, progress=False)  # one tuning serves any grid
    b = again.sample(20, seed=9, n_steps=12, progress=False)
    np.testing.assert_array_equal(a.log_weights, b.log_weights)
    assert np.isfinite(a.log_weights).all()


def test_a_network_keeps_its_precision_in_the_archive(frames: np.ndarray, tmp_path: Path) -> None:
    gen = new_generator()
    gen.network.double()
    gen.coordinates = Cartesian(gen.space)
    again = DiffusionBoltzmannGenerator.load(gen.save(tmp_path / "model.vtdis"))
    x = torch.tensor(frames[:5])
    t = torch.tensor(0.5, dtype=torch.float64)
    assert torch.equal(gen.denoiser(x, t), again.denoiser(x, t))


@pytest.mark.parametrize("rounded", [True, False])
def test_weights_that_half_precision_holds_are_stored_so(rounded: bool, tmp_path: Path) -> None:
    gen = new_generator()
    gen.coordinates = Cartesian(gen.space)
    if rounded:
        round_weights(gen.network)
    path = gen.save(tmp_path / "model.vtdis")
    stored, _ = storage.read_archive(path, "generator")
    kind = torch.float16 if rounded else torch.float32
    assert {v.dtype for k, v in stored.items() if k.startswith("network.")} == {kind}
    again = DiffusionBoltzmannGenerator.load(path)
    for weight, other in zip(gen.network.parameters(), again.network.parameters(), strict=True):
        assert weight.dtype == other.dtype == torch.float32
        assert torch.equal(weight, other)


@pytest.mark.parametrize("covariance", ["diagonal", "block", "full", "low-rank", "time-network"])
def test_every_covariance_survives_the_archive(
    trained: DiffusionBoltzmannGenerator, frames: np.ndarray, tmp_path: Path, covariance: str
) -> None:
    trained.tune(frames, 8, covariance, n_trajectories=200, rank=2, tune_mean=True, progress=False)
    again = DiffusionBoltzmannGenerator.load(trained.save(tmp_path / "model.vtdis"))
    a = trained.sample(20, seed=9, progress=False)
    np.testing.assert_array_equal(
        a.log_weights, again.sample(20, seed=9, progress=False).log_weights
    )


def rewrite(path: Path, tensors: dict[str, torch.Tensor], metadata: dict[str, Any]) -> None:
    """Write a doctored archive over ``path``."""
    for key in ("format", "version", "kind"):
        metadata.pop(key)
    storage.write_archive(path, "generator", tensors, metadata)


@pytest.mark.parametrize("spelling", ["PythonForce", "Python&#70;orce"])
def test_archives_with_a_python_force_are_refused(
    trained: DiffusionBoltzmannGenerator, tmp_path: Path, spelling: str
) -> None:
    path = trained.save(tmp_path / "model.vtdis")
    tensors, metadata = storage.read_archive(path, "generator")
    metadata["target"]["system"] = metadata["target"]["system"].replace(
        "<Forces>", f'<Forces><Force type="{spelling}" version="1"/>'
    )
    rewrite(path, tensors, metadata)
    with pytest.raises(ValueError, match=r"PythonForce.*allow_pickle=True"):
        DiffusionBoltzmannGenerator.load(path)


@needs_python_force
def test_nothing_in_a_refused_archive_is_executed(
    trained: DiffusionBoltzmannGenerator, tmp_path: Path
) -> None:
    """A PythonForce whose pickle makes a folder: OpenMM would run it, loading must not."""
    evidence = tmp_path / "executed"
    payload = f"cos\nmkdir\n(S'{evidence}'\ntR.".encode().hex()
    path = trained.save(tmp_path / "model.vtdis")
    tensors, metadata = storage.read_archive(path, "generator")
    attack = (
        f'<Force forceGroup="0" function="{payload}" name="PythonForce" type="PythonForce" '
        'usesPeriodic="0" version="2"><GlobalParameters/><Particles/></Force>'
    )
    metadata["target"]["system"] = metadata["target"]["system"].replace(
        "<Forces>", f"<Forces>{attack}"
    )
    rewrite(path, tensors, metadata)
    with pytest.raises(ValueError, match="PythonForce"):
        DiffusionBoltzmannGenerator.load(path)
    assert not evidence.exists()
    with contextlib.suppress(Exception):  # control: the pickle is armed
        openmm.XmlSerializer.deserialize(metadata["target"]["system"])
    assert evidence.exists()


@pytest.mark.parametrize("missing", ["network.noise.mlp.0.weight", "covariance"])
def test_an_incomplete_archive_is_refused(
    trained: DiffusionBoltzmannGenerator, tmp_path: Path, missing: str
) -> None:
    path = trained.save(tmp_path / "model.vtdis")
    tensors, metadata = storage.read_archive(path, "generator")
    for key in ("format", "version", "kind"):
        metadata.pop(key)
    tensors.pop(missing)
    storage.write_archive(path, "generator", tensors, metadata)
    with pytest.raises(ValueError, match="expected a complete generator archive"):
        DiffusionBoltzmannGenerator.load(path)


# -- what archives know ---------------------------------------------------------------------------
class Subclass(GaussianMixture):
    """Another density, which its kind does not tell."""


class Shifted(Cartesian):
    """Other coordinates, which their kind does not tell."""


@COORDINATES.register
class FirstAtRest(Coordinates):
    """Positions of all particles but the first, which is at the origin."""

    kind = "first-at-rest"

    def __init__(self, space: Space) -> None:
        self.full, self.handedness = space, None
        self.space = Space(space.n_particles - 1, space.n_dims, centred=False)

    def to_model(self, x: Tensor) -> tuple[Tensor, Tensor]:
        return x[:, 1:], x.new_zeros(len(x))

    def to_configurations(self, z: Tensor) -> Configurations:
        x = torch.cat([torch.zeros_like(z[:, :1]), z], dim=1)
        return Configurations(x, z.new_zeros(len(z)), torch.ones(len(z), dtype=torch.bool))

    def pull_back(self, z: Tensor, gradient: Tensor) -> Tensor:
        return gradient[:, 1:]

    def push_forward(self, z: Tensor, gradient: Tensor) -> Tensor:
        return torch.cat([torch.zeros_like(gradient[:, :1]), gradient], dim=1)

    def noise_level(self, sigma: float) -> float:
        return sigma

    def restricted_to(self, handedness: Handedness | None) -> FirstAtRest:
        return self

    def describe(self) -> dict[str, Any]:
        return {}

    @classmethod
    def rebuild(
        cls, description: dict[str, Any], space: Space, handedness: Handedness | None
    ) -> FirstAtRest:
        return cls(space)


def of_mixture(
    cls: type[GaussianMixture] = GaussianMixture, coordinates: Coordinates | None = None
) -> DiffusionBoltzmannGenerator:
    space = Space(3, 2, centred=False)
    means = torch.tensor(np.random.default_rng(0).normal(size=(3, 3, 2)))
    target = cls(means, [0.1, 0.2, 0.3], [0.1, 0.7, 0.3], space)
    gen = DiffusionBoltzmannGenerator.from_target(
        target, "mlp-2x16", seed=0, coordinates=coordinates or Cartesian(space)
    )
    gen.train(target.sample(200, seed=1), 5, batch_size=20, progress=False)
    gen.tune(target.sample(200, seed=2), 5, "isotropic", n_trajectories=100, progress=False)
    return gen


def test_a_subclass_of_a_class_that_archives_know_is_not_stored_as_that(tmp_path: Path) -> None:
    path = tmp_path / "x.vtdis"
    with pytest.raises(ValueError, match="expected a target that archives know, got .*Subclass"):
        of_mixture(Subclass).save(path)
    other = Shifted(Space(3, 2, centred=False))
    with pytest.raises(ValueError, match="expected a coordinates that archives know.*Shifted"):
        of_mixture(coordinates=other).save(path)
    assert not path.exists()
    of_mixture().save(path)  # control


def test_a_mixture_stays_the_same_through_any_number_of_archives(tmp_path: Path) -> None:
    gen = again = of_mixture()
    for _ in range(3):
        again = DiffusionBoltzmannGenerator.load(again.save(tmp_path / "mixture.vtdis"))
    assert again.target.fingerprint == gen.target.fingerprint
    assert again.path_sampler().fingerprint == gen.path_sampler().fingerprint


def test_coordinates_of_another_dimension_come_back(tmp_path: Path) -> None:
    gen = of_mixture(coordinates=FirstAtRest(Space(3, 2, centred=False)))
    again = DiffusionBoltzmannGenerator.load(gen.save(tmp_path / "fewer.vtdis"))
    a, b = (g.sample(20, seed=3, progress=False) for g in (gen, again))
    np.testing.assert_array_equal(a.positions, b.positions)
    np.testing.assert_array_equal(a.log_weights, b.log_weights)
    assert again.denoiser.space.dim == 4
    assert (a.positions[:, 0] == 0.0).all()


@pytest.mark.parametrize(
    ("where", "value"),
    [
        (("coordinates", "length"), "1 nm"), (("coordinates", "kind"), "none"),
        (("tuning", "laplace"), {"level": "0.1"}), (("tuning", "laplace"), {"level": -1.0}),
        (("tuning", "laplace"), {"height": 1.0}), (("tuning", "covariance"), "none"),
        (("target", "kind"), "none"), (("labels",), [0]),
    ],
)  # fmt: skip
def test_whatever_is_wrong_with_a_file_is_said_with_its_name(
    where: tuple[str, ...], value: object, tmp_path: Path
) -> None:
    path = of_mixture().save(tmp_path / "good.vtdis")
    tensors, metadata = storage.read_archive(path, "generator")
    for name in ("format", "version", "kind"):
        metadata.pop(name)
    part = metadata
    for name in where[:-1]:
        part = part[name]
    DiffusionBoltzmannGenerator.load(storage.write_archive(path, "generator", tensors, metadata))
    part[where[-1]] = value
    storage.write_archive(tmp_path / "bad.vtdis", "generator", tensors, metadata)
    with pytest.raises(ValueError, match=r"bad\.vtdis: "):
        DiffusionBoltzmannGenerator.load(tmp_path / "bad.vtdis")
