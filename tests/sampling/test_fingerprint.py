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

from openmm_vtdis import DiffusionBoltzmannGenerator
from openmm_vtdis.targets import OpenMMTarget


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
