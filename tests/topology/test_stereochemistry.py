"""Handedness: what a centre is, folding, and a restricted target whose log Z is known."""

from __future__ import annotations

import math
from pathlib import Path

import numpy as np
import pytest
import torch
from openmm import app
from openmmtools import testsystems
from torch import Tensor

from openmm_vtdis import DiffusionBoltzmannGenerator, storage
from openmm_vtdis.coordinates import Cartesian
from openmm_vtdis.core.derivatives import differentiate_twice
from openmm_vtdis.core.space import Space, random_rotations
from openmm_vtdis.diffusion.denoiser import GaussianMixtureDenoiser
from openmm_vtdis.targets import GaussianMixture
from openmm_vtdis.topology import (
    Handedness,
    bond_features,
    element_features,
    stereocentres,
    symmetry_labels,
)
from tests.molecules import molecule

CORNERS = torch.tensor(
    [[0.0, 0, 0], [1, 1, 1], [1, -1, -1], [-1, 1, -1], [-1, -1, 1]], dtype=torch.float64
)
"""A centre and its four neighbours."""


def bromochlorofluoromethane() -> app.Topology:
    return molecule(["C", "F", "Cl", "Br", "H"], [(0, k) for k in range(1, 5)])


def two_centres() -> app.Topology:
    """CHFCl-CHFBr."""
    elements = ["C", "C", "F", "Cl", "H", "F", "Br", "H"]
    return molecule(elements, [(0, 1), (0, 2), (0, 3), (0, 4), (1, 5), (1, 6), (1, 7)])


def centres_of(topology: app.Topology) -> list:
    return stereocentres(topology, symmetry_labels(topology).tolist())


def test_alanine_has_one_centre() -> None:
    dipeptide = testsystems.AlanineDipeptideVacuum(constraints=None)
    (centre,) = centres_of(dipeptide.topology)
    assert centre.name == "CA of ALA 2"
    x = torch.tensor(np.asarray(dipeptide.positions._value)[None])
    reference = Handedness.of([centre], x[0])
    assert reference.agreement(torch.cat([x, -x])).tolist() == [1, -1]


@pytest.mark.parametrize(
    ("topology", "n_centres"),
    [
        (bromochlorofluoromethane(), 1),
        (two_centres(), 2),
        (molecule(["C", "F", "Cl", "H", "H"], [(0, k) for k in range(1, 5)]), 0),
        (molecule(["N", "F", "Cl", "H"], [(0, k) for k in range(1, 4)]), 0),  # inverts
        (molecule(["P", "F", "Cl", "H"], [(0, k) for k in range(1, 4)]), 1),
        (molecule(["S", "O", "Cl", "H"], [(0, k) for k in range(1, 4)]), 1),
    ],
)
def test_centres(topology: app.Topology, n_centres: int) -> None:
    assert len(centres_of(topology)) == n_centres


def test_labels_decide() -> None:
    methyl = molecule(["C", "F", "H", "H", "H"], [(0, k) for k in range(1, 5)])
    assert not stereocentres(methyl, [0, 1, 2, 2, 2])
    assert len(stereocentres(methyl, [0, 1, 2, 3, 4])) == 1


def test_handedness_turns_with_reflections_only() -> None:
    (centre,) = centres_of(bromochlorofluoromethane())
    rng = torch.Generator().manual_seed(0)
    x = CORNERS + 0.1 * torch.randn(20, 5, 3, generator=rng, dtype=torch.float64)
    reference = Handedness.of([centre], CORNERS)
    assert reference.agreement(x).tolist() == [1] * 20
    rotated = x @ random_rotations(20, 3, rng) + 3.0
    assert reference.agreement(rotated).tolist() == [1] * 20
    mirror = torch.tensor([1.0, 1.0, -1.0], dtype=torch.float64)
    assert reference.agreement(rotated * mirror).tolist() == [-1] * 20
    exchanged = x[:, [0, 2, 1, 3, 4]]
    assert reference.agreement(exchanged).tolist() == [-1] * 20


def test_folding_keeps_mirrors_and_marks_mixtures() -> None:
    centres = centres_of(two_centres())
    x = torch.randn(400, 8, 3, generator=torch.Generator().manual_seed(1), dtype=torch.float64)
    reference = Handedness.of(centres, x[0])
    agreement = reference.agreement(x)
    assert set(agreement.tolist()) == {-1, 0, 1}
    folded, inside = reference.fold(x)
    assert torch.equal(inside, agreement != 0)
    assert torch.equal(folded[agreement == 1], x[agreement == 1])
    assert torch.equal(folded[agreement == -1], -x[agreement == -1])
    assert reference.agreement(folded[inside]).tolist() == [1] * int(inside.sum())
    reference.check("x", folded[inside])
    with pytest.raises(ValueError, match=r"x: expected the handedness .* in \d+ of 400 frames"):
        reference.check("x", x)


def test_bad_references_are_refused() -> None:
    centres = centres_of(bromochlorofluoromethane())
    flat = CORNERS * torch.tensor([1.0, 1.0, 0.0])
    with pytest.raises(ValueError, match="a handedness of C0 of MOL 1, got a flat one"):
        Handedness.of(centres, flat)
    with pytest.raises(ValueError, match=r"signs: expected \+1 and -1"):
        Handedness(tuple(centres), (2,))
    with pytest.raises(ValueError, match="one for each of 1 stereocentres, got 2"):
        Handedness(tuple(centres), (1, 1))


# -- a restricted target with a known log Z -----------------------------------------------------
def chiral_mixture(
    topology: app.Topology, length: float = 0.7
) -> tuple[GaussianMixture, DiffusionBoltzmannGenerator]:
    """A mixture that is its own mirror image, its exact denoiser, and a reference handedness."""
    n = topology.getNumAtoms()
    space = Space(n, 3)
    shape = torch.randn(n, 3, generator=torch.Generator().manual_seed(4), dtype=torch.float64)
    target = GaussianMixture(torch.stack([shape, -shape]), [0.5, 0.5], [1.0, 1.0], space)
    denoiser = GaussianMixtureDenoiser(space, target.weights, target.means, target.variances)
    gen = DiffusionBoltzmannGenerator.from_denoiser(
        target, denoiser.scaled(length), Cartesian(target.space, length)
    )
    gen.coordinates = gen.coordinates.restricted_to(Handedness.of(centres_of(topology), shape))
    return target, gen


def inside_fraction(gen: DiffusionBoltzmannGenerator, x: Tensor) -> float:
    assert gen.handedness is not None
    return float((gen.handedness.agreement(x) == 1).double().mean())


@pytest.mark.parametrize("topology", [bromochlorofluoromethane(), two_centres()], ids=["1", "2"])
def test_log_z_of_a_restricted_target_is_known(topology: app.Topology) -> None:
    """exp(-u) integrates to one; its right-handed part to the probability of being right-handed."""
    target, gen = chiral_mixture(topology)
    exact = inside_fraction(gen, target.sample(400_000, seed=1))
    fold, gen.coordinates = gen.coordinates, gen.coordinates.restricted_to(None)
    gen.tune(target.sample(4_000, seed=2), 20, "isotropic", n_trajectories=4_000, progress=False)
    gen.coordinates = fold
    ensemble = gen.sample(6_000, seed=3, progress=False)
    x = torch.tensor(ensemble.positions)
    alive = torch.tensor(np.isfinite(ensemble.log_weights))
    assert gen.handedness is not None
    gen.handedness.check("positions", x[alive])
    assert bool((gen.handedness.agreement(x)[~alive] == 0).all())
    assert ensemble.diagnostics().n_outside == int((~alive).sum())
    assert abs(ensemble.log_z().z(math.log(exact), 2e-3)) < 4.0
    frames = target.sample(12_000, seed=5)
    # <1/w> over the target is the share of the proposal that is inside, over Z
    share = float(alive.double().mean())
    inside = frames[gen.handedness.agreement(frames) == 1]
    inverse = np.exp(-gen.log_weights(inside, seed=6, progress=False))
    error = inverse.std() / math.sqrt(len(inverse))
    error = np.hypot(error, np.sqrt(share * (1.0 - share) / len(x)) / exact)
    assert abs(inverse.mean() - share / exact) < 4.0 * np.hypot(error, 2e-3 / exact)
    # negative control: without the factor 2 of the folded proposal log Z is off by log 2
    wrong = ensemble.with_log_weights(ensemble.log_weights + math.log(2.0))
    assert abs(wrong.log_z().z(math.log(exact), 2e-3)) > 10.0


def test_frames_of_the_wrong_handedness_are_refused() -> None:
    target, gen = chiral_mixture(bromochlorofluoromethane())
    with pytest.raises(ValueError, match=r"tune: expected the handedness .* \(C0 of MOL 1\)"):
        gen.tune(target.sample(500, seed=1), 5, "isotropic", n_trajectories=200, progress=False)


def test_a_dipeptide_trained_on_both_hands_is_refused_unless_any(tmp_path) -> None:
    dipeptide = testsystems.AlanineDipeptideImplicit(constraints=None)
    x = torch.tensor(np.asarray(dipeptide.positions._value), dtype=torch.float64)
    noise = torch.randn(40, 22, 3, generator=torch.Generator().manual_seed(0)).double()
    frames = x + 0.002 * noise
    both = torch.cat([frames, -frames[:2]])
    options = {"network": "egnn-1x8", "labels": None}
    run = {"batch_size": 8, "progress": False}
    gen = DiffusionBoltzmannGenerator(dipeptide.system, dipeptide.topology, 800.0, **options)
    with pytest.raises(ValueError, match=r"train: .*in 2 of 42 frames, the first at index 40"):
        gen.train(both, 2, **run)
    gen.train(frames, 2, **run)
    again = DiffusionBoltzmannGenerator.load(gen.save(tmp_path / "aldp.vtdis"))
    assert again.handedness == gen.handedness is not None
    with pytest.raises(ValueError, match="tune: expected the handedness"):
        again.tune(both, 2, "isotropic", n_trajectories=100, progress=False)
    anyhow = DiffusionBoltzmannGenerator(
        dipeptide.system, dipeptide.topology, 800.0, stereochemistry="any", **options
    )
    anyhow.train(both, 2, **run)
    assert anyhow.handedness is None
    with pytest.raises(ValueError, match="stereochemistry: expected one of"):
        DiffusionBoltzmannGenerator(
            dipeptide.system, dipeptide.topology, 800.0, stereochemistry="S", **options
        )


def test_only_networks_that_treat_mirror_images_alike_are_folded() -> None:
    dipeptide = testsystems.AlanineDipeptideImplicit(constraints=None)
    x = torch.tensor(np.asarray(dipeptide.positions._value), dtype=torch.float64)
    frames = x + 0.002 * torch.randn(20, 22, 3, generator=torch.Generator().manual_seed(0)).double()
    setup = (dipeptide.system, dipeptide.topology, 800.0)
    for network in ("mlp-1x8", "egnn-1x8"):
        gen = DiffusionBoltzmannGenerator(*setup, network=network)
        if network == "egnn-1x8":
            gen.train(frames, 2, batch_size=8, progress=False)
            continue
        with pytest.raises(ValueError, match="a network that treats mirror images alike"):
            gen.train(frames, 2, batch_size=8, progress=False)
    either = DiffusionBoltzmannGenerator(*setup, network="mlp-1x8", stereochemistry="any")
    either.train(frames, 2, batch_size=8, progress=False)


def test_an_archive_without_its_handedness_is_refused(tmp_path: Path) -> None:
    dipeptide = testsystems.AlanineDipeptideImplicit(constraints=None)
    x = torch.tensor(np.asarray(dipeptide.positions._value), dtype=torch.float64)
    frames = x + 0.002 * torch.randn(20, 22, 3, generator=torch.Generator().manual_seed(0)).double()
    gen = DiffusionBoltzmannGenerator(
        dipeptide.system, dipeptide.topology, 800.0, network="egnn-1x8"
    )
    gen.train(frames, 2, batch_size=8, progress=False)
    path = gen.save(tmp_path / "aldp.vtdis")
    for bad in (None, 1, [1, 1], [2]):
        tensors, metadata = storage.read_archive(path, "generator")
        for key in ("format", "version", "kind"):
            metadata.pop(key)
        metadata["handedness"] = bad
        doctored = tmp_path / "doctored.vtdis"
        storage.write_archive(doctored, "generator", tensors, metadata)
        with pytest.raises(ValueError, match=r"handedness|signs: expected"):
            DiffusionBoltzmannGenerator.load(doctored)


def test_a_canonical_image_is_that_of_the_mirror_image_too() -> None:
    centres = centres_of(two_centres())
    x = torch.randn(50, 8, 3, generator=torch.Generator().manual_seed(1), dtype=torch.float64)
    reference = Handedness.of(centres, x[0])
    canonical = reference.canonical(x)
    assert torch.equal(canonical, reference.canonical(-x))
    folded, inside = reference.fold(x)
    assert torch.equal(canonical[inside], folded[inside])


def test_derivatives_of_a_folded_energy_are_those_of_the_image_mirrored_back() -> None:
    target, gen = chiral_mixture(two_centres())
    y = target.sample(20, 5) / gen.coordinates.length
    handedness = gen.handedness
    assert handedness is not None
    mirrored = (handedness.canonical(y) != y).any(dim=2).any(dim=1)
    assert 0 < int(mirrored.sum()) < 20
    found = gen.model_energy.derivatives(y)
    for a, b in zip(found, differentiate_twice(gen.model_energy, y), strict=True):
        torch.testing.assert_close(a, b, rtol=1e-10, atol=1e-10)
    turned = torch.where(mirrored[:, None, None], -found[0], found[0])
    assert not torch.allclose(turned, differentiate_twice(gen.model_energy, y)[0])


# -- features -----------------------------------------------------------------------------------
def test_features_of_a_chain() -> None:
    chain = molecule(["O", "C", "C", "H", "O"], [(0, 1), (1, 2), (2, 3), (3, 4)])
    np.testing.assert_array_equal(
        element_features(chain), [[0, 0, 1], [1, 0, 0], [1, 0, 0], [0, 1, 0], [0, 0, 1]]
    )
    features = bond_features(chain)
    distance = np.abs(np.subtract.outer(np.arange(5), np.arange(5)))
    for k in range(3):
        np.testing.assert_array_equal(features[..., k], distance == k + 1)


def test_labels_of_alanine_dipeptide() -> None:
    """Three methyls of three hydrogens: 22 atoms, 16 classes."""
    topology = testsystems.AlanineDipeptideVacuum(constraints=None).topology
    labels = symmetry_labels(topology)
    assert labels.max() + 1 == 16
    counts = np.bincount(labels)
    assert sorted(counts)[-3:] == [3, 3, 3]
    assert sorted(counts)[:-3] == [1] * 13
