"""The digest of a proposal changes with all that its density depends on, and with nothing else."""

from __future__ import annotations

import copy
import dataclasses
import re
from collections.abc import Callable
from pathlib import Path

import openmm
import pytest
import torch
from torch import Tensor

from openmm_vtdis import DiffusionBoltzmannGenerator, WeightedEnsemble
from openmm_vtdis.coordinates import Cartesian, Configurations
from openmm_vtdis.core.space import Space
from openmm_vtdis.diffusion.denoiser import GaussianMixtureDenoiser
from openmm_vtdis.diffusion.process import DiffusionProcess
from openmm_vtdis.diffusion.schedule import make_schedule
from openmm_vtdis.targets import GaussianMixture, OpenMMTarget


@pytest.fixture
def gen() -> DiffusionBoltzmannGenerator:
    return DiffusionBoltzmannGenerator.from_pretrained("dw4")


def proposals(gen: DiffusionBoltzmannGenerator) -> tuple[str, str]:
    """Of its reverse process, and of its flow."""
    return gen.path_sampler().fingerprint, gen.flow_sampler().fingerprint


def test_a_copy_from_a_file_is_the_same_proposal(
    gen: DiffusionBoltzmannGenerator, tmp_path: Path
) -> None:
    again = DiffusionBoltzmannGenerator.load(gen.save(tmp_path / "copy.vtdis"))
    assert proposals(again) == proposals(gen)


def covariance(gen: DiffusionBoltzmannGenerator) -> None:
    family = gen.process.covariance  # type: ignore[union-attr]
    changed = family.with_parameters(family.parameters + 1e-6)
    gen.process = gen.process.with_covariance(changed)  # type: ignore[union-attr]


def mean(gen: DiffusionBoltzmannGenerator) -> None:
    gen.process = gen.process.with_mean_coefficients(1.001 * gen.process.coefficients)  # type: ignore[union-attr]


def grid(gen: DiffusionBoltzmannGenerator) -> None:
    gen.process = gen.process.with_n_steps(99)  # type: ignore[union-attr]


def laplace(gen: DiffusionBoltzmannGenerator) -> None:
    gen.process = dataclasses.replace(gen.process, laplace=None)  # type: ignore[type-var]


def network(gen: DiffusionBoltzmannGenerator) -> None:
    with torch.no_grad():
        next(gen.network.parameters()).flatten()[0].add_(1e-5)


def length(gen: DiffusionBoltzmannGenerator) -> None:
    length = 1.001 * gen.coordinates.length  # type: ignore[union-attr]
    gen.coordinates = dataclasses.replace(gen.coordinates, length=length)  # type: ignore[type-var]


def temperature(gen: DiffusionBoltzmannGenerator) -> None:
    gen.target = copy.copy(gen.target)
    gen.target.temperature = 1.001 * gen.target.temperature  # type: ignore[operator]


def hamiltonian(gen: DiffusionBoltzmannGenerator) -> None:
    system = copy.deepcopy(gen.target.system)  # type: ignore[attr-defined]
    force = system.getForce(0)
    force.setEnergyFunction(f"({force.getEnergyFunction().split(';')[0]})*1.001")
    gen.target = OpenMMTarget(system, None, gen.temperature, n_dims=2)


@pytest.mark.parametrize(
    ("change", "of_flow"),
    [
        (covariance, False), (mean, False), (grid, False), (laplace, False),
        (network, True), (length, True), (temperature, True), (hamiltonian, True),
    ],
)  # fmt: skip
def test_whatever_the_density_depends_on_counts(
    gen: DiffusionBoltzmannGenerator,
    change: Callable[[DiffusionBoltzmannGenerator], None],
    of_flow: bool,
) -> None:
    before = proposals(gen)
    change(gen)
    after = proposals(gen)
    assert after[0] != before[0]
    assert (after[1] != before[1]) == of_flow


def test_the_version_of_openmm_that_wrote_a_system_does_not_count(
    gen: DiffusionBoltzmannGenerator, monkeypatch: pytest.MonkeyPatch
) -> None:
    before, serialize = proposals(gen), openmm.XmlSerializer.serialize
    older = re.compile(r'openmmVersion="[^"]*"')
    monkeypatch.setattr(
        openmm.XmlSerializer,
        "serialize",
        lambda system: older.sub('openmmVersion="8.0"', serialize(system)),
    )
    assert openmm.XmlSerializer.serialize(gen.target.system).count("8.0") == 1  # type: ignore[attr-defined]
    assert proposals(gen) == before


class Biased(GaussianMixture):
    """Another density than that of the class whose numbers it has."""

    bias = 1.0

    def reduced_energy(self, x: Tensor) -> Tensor:
        return super().reduced_energy(x) + self.bias * x.square().sum(dim=(1, 2))


class MoreBiased(Biased):
    bias = 1.1


class Doubled(Cartesian):
    """Other coordinates than those whose numbers it has."""

    def to_configurations(self, z: Tensor) -> Configurations:
        found = super().to_configurations(z)
        return dataclasses.replace(found, x=2.0 * found.x)


def of_mixture(
    cls: type[GaussianMixture], coordinates: type[Cartesian] = Cartesian
) -> DiffusionBoltzmannGenerator:
    means, space = torch.tensor([[[1.0], [-1.0]]]), Space(2, 1, centred=False)
    denoiser = GaussianMixtureDenoiser(space, torch.ones(1), means, torch.ones(1))
    target = cls(means, [1.0], [1.0], space)
    gen = DiffusionBoltzmannGenerator.from_denoiser(target, denoiser, coordinates(space))
    gen.process = DiffusionProcess.ddpm(
        denoiser, make_schedule("karras", 5, 0.1, 5.0), gen.model_energy
    )
    return gen


def test_a_subclass_is_another_target_and_its_energies_tell_it() -> None:
    known = of_mixture(GaussianMixture)
    assert known.target.fingerprint is not None
    assert of_mixture(Biased).target.fingerprint is None
    found = [proposals(of_mixture(cls))[0] for cls in (GaussianMixture, Biased, MoreBiased)]
    assert len(set(found)) == 3
    assert proposals(of_mixture(Biased))[0] == found[1]  # control


def test_a_subclass_is_other_coordinates() -> None:
    plain = proposals(of_mixture(GaussianMixture))[0]
    assert proposals(of_mixture(GaussianMixture, Doubled))[0] != plain
    assert proposals(of_mixture(GaussianMixture))[0] == plain


def test_a_sampler_whose_network_was_trained_on_is_another(
    gen: DiffusionBoltzmannGenerator,
) -> None:
    sampler = gen.path_sampler()
    before = sampler.fingerprint
    assert sampler.fingerprint == before
    network(gen)
    assert sampler.fingerprint != before


def test_steps_of_a_flow_are_another_run_of_the_same_density(
    gen: DiffusionBoltzmannGenerator,
) -> None:
    """One seed gives nearly the same samples: they are not pooled, but slices are."""
    few, more = (gen.sample_ode(40, n_steps=n, seed=3, progress=False) for n in (4, 12))
    assert few.provenance.proposal == more.provenance.proposal
    assert few.provenance.streams[0].sampler != more.provenance.streams[0].sampler
    with pytest.raises(ValueError, match="drawn with one seed"):
        WeightedEnsemble.concatenate([few, more])
    assert len(WeightedEnsemble.concatenate([few[:20], few[20:]])) == 40
