"""The examples of CONTRIBUTING, "Extending", as a package of their own that the package serves."""

from __future__ import annotations

import importlib
import math
import re
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from types import ModuleType
from typing import Any

import numpy as np
import pytest
import torch

from openmm_vtdis import DiffusionBoltzmannGenerator, WeightedEnsemble
from openmm_vtdis.coordinates import COORDINATES
from openmm_vtdis.core.space import Space
from openmm_vtdis.diffusion.covariance import COVARIANCES
from openmm_vtdis.diffusion.denoiser import GaussianMixtureDenoiser
from openmm_vtdis.generator.sharded import sample_to_file
from openmm_vtdis.interop import DiffusionMove
from openmm_vtdis.networks import NETWORKS
from openmm_vtdis.targets import TARGETS, GaussianMixture
from openmm_vtdis.testing import check_coordinates, check_target
from tests.conftest import make_oracle, z_of_mean_weight

PAGE = Path(__file__).parents[1] / "CONTRIBUTING.md"
BLOCK = re.compile(r"^```python\n# (\w+)\.py\n(.*?)^```", re.DOTALL | re.MULTILINE)
REGISTRIES = (TARGETS, NETWORKS, COVARIANCES, COORDINATES)


@pytest.fixture(scope="module")
def package(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Path]:
    """``outside``, a package with a module for each example, on the path of Python."""
    root = tmp_path_factory.mktemp("elsewhere")
    (root / "outside").mkdir()
    (root / "outside" / "__init__.py").write_text("")
    for name, code in BLOCK.findall(PAGE.read_text()):
        (root / "outside" / f"{name}.py").write_text(code)
    before = [dict(registry._classes) for registry in REGISTRIES]
    sys.path.insert(0, str(root))
    yield root
    sys.path.remove(str(root))
    for registry, classes in zip(REGISTRIES, before, strict=True):
        registry._classes = classes  # type: ignore[assignment]
    for name in [name for name in sys.modules if name.startswith("outside")]:
        del sys.modules[name]


def example(package: Path, name: str) -> ModuleType:
    return importlib.import_module(f"outside.{name}")


def springs_generator(package: Path, network: str = "egnn-1x8") -> Any:
    """A generator of three particles on springs, after a very short training."""
    target = example(package, "springs").Springs(3, 200.0)
    gen = DiffusionBoltzmannGenerator.from_target(target, network=network, seed=0)
    gen.train(frames(target), 60, batch_size=64, progress=False)
    return gen


def frames(target: Any, n: int = 400) -> torch.Tensor:
    """Exact samples: each of d modes has the stiffness 3 k."""
    noise = target.space.standard_normal(n, torch.Generator().manual_seed(1))
    return noise / math.sqrt(3.0 * target.k)


def exact_log_z(target: Any) -> float:
    return 0.5 * target.space.dim * math.log(2.0 * math.pi / (3.0 * target.k))


def test_every_axis_has_an_example() -> None:
    names = {name for name, _ in BLOCK.findall(PAGE.read_text())}
    assert names == {"springs", "radial", "one_scale", "stretched", "random_walk"}


def test_a_target_is_trained_saved_sharded_and_moved(package: Path, tmp_path: Path) -> None:
    gen = springs_generator(package)
    check_target(gen.target, frames(gen.target, 8))
    gen.tune(frames(gen.target), 20, "isotropic", n_trajectories=500, progress=False)
    ensemble = gen.sample(2_000, seed=0, progress=False)
    assert abs(ensemble.log_z().z(exact_log_z(gen.target))) < 4.0
    path = gen.save(tmp_path / "springs.vtdis")
    again = DiffusionBoltzmannGenerator.load(path)
    assert (type(again.target), again.target.k) == (type(gen.target), 200.0)  # type: ignore[attr-defined]
    assert again.path_sampler().fingerprint == gen.path_sampler().fingerprint
    a, b = (g.sample(20, seed=3, progress=False).log_weights for g in (gen, again))
    np.testing.assert_array_equal(a, b)
    assert sample_to_file(again, tmp_path / "s.nc", 20, shard_size=10, progress=False)
    assert len(WeightedEnsemble.load(tmp_path / "s.nc")) == 20
    proposals = DiffusionMove(path, batch_size=4, seed=1)._kept().proposals
    assert proposals.draw().x.shape == (3, 3)
    other = example(package, "springs").Springs(3, 201.0)  # control
    other_gen = DiffusionBoltzmannGenerator.from_target(other, network="egnn-1x8", seed=0)
    other_gen.coordinates, other_gen.process = gen.coordinates, gen.process
    assert other_gen.path_sampler().fingerprint != gen.path_sampler().fingerprint


def test_the_command_line_finds_an_installed_target(package: Path, tmp_path: Path) -> None:
    """By the entry point of a package that nothing has imported."""
    gen = springs_generator(package)
    gen.tune(frames(gen.target), 6, "isotropic", n_trajectories=100, progress=False)
    path = gen.save(tmp_path / "springs.vtdis")
    found = package / "outside-1.0.dist-info"
    found.mkdir(exist_ok=True)
    (found / "METADATA").write_text("Metadata-Version: 2.1\nName: outside\nVersion: 1.0\n")
    entry = found / "entry_points.txt"
    command = [sys.executable, "-m", "openmm_vtdis", "info", str(path)]
    for point, code in (("springs = outside.springs:Springs\n", 0), ("", 2)):
        entry.write_text(f"[openmm_vtdis.targets]\n{point}")
        done = subprocess.run(
            command, capture_output=True, text=True, check=False, cwd=package,
            env={"PATH": "", "PYTHONPATH": f"{package}:{PAGE.parent}", "OMP_NUM_THREADS": "1"},
        )  # fmt: skip
        assert done.returncode == code, done.stderr
    assert "expected a kind among the targets" in done.stderr
    assert "got 'springs'" in done.stderr


def test_a_network_of_a_size_is_trained_and_saved(package: Path, tmp_path: Path) -> None:
    example(package, "radial")
    gen = springs_generator(package, "radial-2x16")
    assert gen.network.config == {"n_layers": 2, "n_hidden": 16}
    with pytest.raises(ValueError, match="expected a trained network with messages .* got Radial"):
        gen.train_pair_head(frames(gen.target), 2, progress=False)
    gen.tune(frames(gen.target), 20, "isotropic", n_trajectories=500, progress=False)
    assert abs(gen.sample(2_000, seed=0, progress=False).log_z().z(exact_log_z(gen.target))) < 4.0
    again = DiffusionBoltzmannGenerator.load(gen.save(tmp_path / "radial.vtdis"))
    x, t = frames(gen.target, 5), torch.full((5,), 0.3, dtype=torch.float64)
    assert torch.equal(again.denoiser(x, t), gen.denoiser(x, t))


def test_a_covariance_is_fitted_and_its_weights_are_exact(package: Path, tmp_path: Path) -> None:
    example(package, "one_scale")
    oracle = make_oracle(4, 2, True)
    target = GaussianMixture(
        oracle.denoiser.means, oracle.denoiser.variances, oracle.denoiser.weights, oracle.space
    )
    gen = DiffusionBoltzmannGenerator.from_denoiser(target, oracle.denoiser, labels=[0, 1, 1, 1])
    report = gen.tune(
        target.sample(2_000, seed=0), 30, "one-scale", n_trajectories=2_000, progress=False
    )
    assert report.covariance == "one-scale"
    parameters = gen.process.covariance.parameters  # type: ignore[union-attr]
    assert parameters.shape == (1, 1)
    assert float(parameters) < -0.05  # wider than DDPM
    log_w = torch.tensor(gen.sample(3_000, seed=1, progress=False).log_weights)
    assert abs(z_of_mean_weight(log_w)) < 4.0


def test_coordinates_give_densities_in_nm(package: Path, tmp_path: Path) -> None:
    space = Space(3, 2, centred=False)
    scales = [0.5, 2.0, 0.1]
    coordinates = example(package, "stretched").Stretched(space, scales)
    variances = torch.tensor(scales).square()
    means = torch.tensor([[[1.0, 0.0], [0.0, 2.0], [0.3, 0.0]]], dtype=torch.float64)

    class Anisotropic(GaussianMixture):
        """A normalised Gaussian of another width for each particle."""

        def reduced_energy(self, x: torch.Tensor) -> torch.Tensor:
            width = variances.to(x)[:, None]
            square = ((x - means[0]).square() / width).sum(dim=(1, 2))
            return 0.5 * square + (2.0 * math.pi * width).log().sum()

    target = Anisotropic(means, [1.0], [1.0], space)
    z_0 = means / torch.tensor(scales)[:, None]
    denoiser = GaussianMixtureDenoiser(space, torch.ones(1), z_0, torch.ones(1))
    noise = space.standard_normal(2_000, torch.Generator().manual_seed(0))
    x = means + noise * torch.tensor(scales)[:, None]
    check_coordinates(coordinates, target, x[:8])
    coordinates = coordinates
    gen = DiffusionBoltzmannGenerator.from_denoiser(target, denoiser, coordinates)
    gen.tune(x, 20, "isotropic", n_trajectories=1_000, progress=False)
    ensemble = gen.sample(2_000, seed=1, progress=False)
    assert abs(ensemble.log_z().z(0.0, 1e-3)) < 4.0
    assert ensemble.ess > 0.9
    lw = gen.log_weights(x[:500], seed=2, progress=False)
    assert abs(z_of_mean_weight(-torch.tensor(lw.log_weights))) < 4.0
    rebuilt = COORDINATES["stretched"].rebuild(coordinates.describe(), space, None)
    assert torch.equal(rebuilt.to_model(x)[0], coordinates.to_model(x)[0])


def test_coordinates_with_a_wrong_determinant_are_seen(package: Path) -> None:
    """Negative controls: of the determinant, of a gradient, and of the inverse."""
    stretched = example(package, "stretched").Stretched
    space = Space(3, 2, centred=False)
    target = GaussianMixture(torch.zeros(1, 3, 2), [1.0], [1.0], space)
    x = target.sample(6, seed=0)

    class Determinant(stretched):  # type: ignore[misc, valid-type]
        def _log_det(self, x: torch.Tensor) -> torch.Tensor:
            return 0.5 * super()._log_det(x)

    class Gradient(stretched):  # type: ignore[misc, valid-type]
        def pull_back(self, z: torch.Tensor, gradient: torch.Tensor) -> torch.Tensor:
            return gradient

    class Inverse(stretched):  # type: ignore[misc, valid-type]
        def to_model(self, x: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
            return x, self._log_det(x)

    for cls, match in (
        (Determinant, "expected log_det to be the log of the volume"),
        (Gradient, "expected pull_back to give the gradient"),
        (Inverse, "expected to_configurations to undo to_model"),
    ):
        with pytest.raises(AssertionError, match=match):
            check_coordinates(cls(space, [0.5, 2.0, 0.1]), target, x)


def test_a_proposal_leaves_the_density_as_it_is(package: Path) -> None:
    target = GaussianMixture(torch.zeros(1, 2, 2), [0.5], [1.0], Space(2, 2, centred=False))
    rng = torch.Generator().manual_seed(5)
    walk = example(package, "random_walk").random_walk
    x = walk(target, target.sample(4_000, seed=1), 0.8, 20, rng)
    square = x.square().sum(dim=(1, 2)) / 0.5  # chi squared of four
    assert abs(float(square.mean() - 4.0)) < 4.0 * math.sqrt(8.0 / 4_000)
    started_elsewhere = walk(target, 0.1 * target.sample(4_000, seed=2), 0.8, 200, rng)
    square = started_elsewhere.square().sum(dim=(1, 2)) / 0.5
    assert abs(float(square.mean() - 4.0)) < 4.0 * math.sqrt(8.0 / 4_000)
