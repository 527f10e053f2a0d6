"""Energies of users' own: with parameters, in single precision, raising; and what save() says."""

from __future__ import annotations

import copy
import logging
import math
import pickle
from pathlib import Path

import numpy as np
import pytest
import torch
from torch import Tensor

from openmm_vtdis import DiffusionBoltzmannGenerator
from openmm_vtdis.core.space import Space
from openmm_vtdis.ensemble import forward_ess
from openmm_vtdis.networks import EGNN, MLP
from openmm_vtdis.targets import Target, double_well, energies_of, gaussian_mixture

STIFFNESS = 20.0


class Net(Target):
    """Springs between five points, of a stiffness that is to be learned some day."""

    temperature = 300.0

    def __init__(self, dtype: torch.dtype = torch.float32) -> None:
        self.space = Space(5, 3, centred=True)
        self.k = torch.nn.Parameter(torch.tensor(STIFFNESS, dtype=dtype))

    def reduced_energy(self, x: Tensor) -> Tensor:
        pairs = x[:, :, None] - x[:, None]
        return self.k * pairs.square().sum((1, 2, 3)) / 4.0


class Single(Net):
    def reduced_energy(self, x: Tensor) -> Tensor:
        return super().reduced_energy(x.float())


class Column(Net):
    def reduced_energy(self, x: Tensor) -> Tensor:
        return super().reduced_energy(x)[:, None]


class Raising(Net):
    """Not defined for configurations of more than a size, and the whole batch suffers."""

    limit = 1.0

    def reduced_energy(self, x: Tensor) -> Tensor:
        if bool((x.square().sum(dim=(1, 2)) > self.limit).any()):
            raise RuntimeError("did not converge")
        return super().reduced_energy(x)


EXACT = 6.0 * math.log(2.0 * math.pi / (5.0 * STIFFNESS))


def frames(n: int = 2_000) -> np.ndarray:
    x = np.random.default_rng(0).normal(size=(n, 5, 3)) / math.sqrt(5.0 * STIFFNESS)
    return x - x.mean(axis=1, keepdims=True)


def make_generator(target: Target) -> DiffusionBoltzmannGenerator:
    gen = DiffusionBoltzmannGenerator.from_target(target, network="egnn-2x16", seed=0)
    gen.train(frames(), 150, batch_size=64, learning_rate=3e-3, progress=False)
    gen.tune(frames(), 15, n_trajectories=400, progress=False)
    return gen


@pytest.mark.parametrize("target", [Net(), Net(torch.float64), Single()])
def test_parameters_and_precision_of_a_target(target: Net) -> None:
    assert target.k.requires_grad
    gen = make_generator(target)
    ensemble = gen.sample(1_500, seed=0, progress=False)
    assert abs(ensemble.log_z().z(EXACT)) < 4.0
    log_w = gen.log_weights(frames(300), seed=1, progress=False)
    assert 0.2 < forward_ess(log_w) <= 1.0
    assert abs(ensemble.free_energy(log_w).z(-EXACT)) < 4.0
    again = ensemble.reweight(target)
    np.testing.assert_allclose(again.log_weights, ensemble.log_weights, atol=1e-4)
    assert target.k.grad is None


def test_energies_of_another_shape_are_refused_before_they_broadcast() -> None:
    x = torch.tensor(frames(4))
    with pytest.raises(ValueError, match=r"a number for each of 4 config.*, got shape \(4, 1"):
        energies_of(Column(), x)
    with pytest.raises(ValueError, match=r"reduced_energy: expected a number for each of"):
        DiffusionBoltzmannGenerator.from_target(Column(), network="egnn-1x8").train(
            frames(50), 1, progress=False
        )


def test_a_target_that_raises_for_one_configuration(caplog: pytest.LogCaptureFixture) -> None:
    target, x = Raising(), torch.tensor(frames(9))
    x[4] *= 100.0
    found = energies_of(target, x)
    assert torch.isnan(found).tolist() == [False] * 4 + [True] + [False] * 4
    assert torch.equal(found[:4], Net().reduced_energy(x[:4]).detach())
    assert "1 of 9 configurations have no energy" in caplog.text
    assert "RuntimeError: did not converge" in caplog.text
    target.limit = 0.0
    with pytest.raises(RuntimeError, match="did not converge"):
        energies_of(target, x)
    target.limit = 1.0
    gen = make_generator(target)
    target.limit = 0.11
    ensemble = gen.sample(400, seed=0, progress=False)
    about = ensemble.diagnostics()
    assert 0 < about.n_without_energy == about.n_zero_weight < 400
    inside = ensemble.positions[np.isfinite(ensemble.log_weights)]
    assert np.square(inside).sum(axis=(1, 2)).max() <= 0.11


class Writing(Net):
    """Works in angstrom, in place: numpy shares the memory."""

    def reduced_energy(self, x: Tensor) -> Tensor:
        angstrom = x.detach().numpy()
        angstrom *= 10.0
        return super().reduced_energy(x / 10.0)


class Averaging(Net):
    """As batch normalisation in training mode."""

    def reduced_energy(self, x: Tensor) -> Tensor:
        energy = super().reduced_energy(x)
        return energy - 0.1 * energy.mean()


class Noisy(Net):
    """As dropout in training mode."""

    def reduced_energy(self, x: Tensor) -> Tensor:
        energy = super().reduced_energy(x)
        return energy + 0.1 * torch.randn_like(energy)


class Heavy(Net):
    """With the energy of all electrons."""

    def reduced_energy(self, x: Tensor) -> Tensor:
        return super().reduced_energy(x) - 1e6


class Detached(Net):
    def reduced_energy(self, x: Tensor) -> Tensor:
        return super().reduced_energy(x).detach()


def test_a_target_that_writes_to_its_input() -> None:
    x = torch.tensor(frames(6))
    before = x.clone()
    torch.testing.assert_close(energies_of(Writing(), x), energies_of(Net(), x))
    assert torch.equal(x, before)
    with torch.no_grad():
        assert torch.equal(Net().reduced_energy_and_force(x)[0], energies_of(Net(), x))
    assert torch.equal(x, before)


@pytest.mark.parametrize("target", [Averaging(), Noisy()])
def test_energies_of_more_than_the_configuration_are_refused(target: Net) -> None:
    gen = DiffusionBoltzmannGenerator.from_target(target, network="egnn-1x8", seed=0)
    with pytest.raises(ValueError, match="train: expected an energy that depends on its configur"):
        gen.train(frames(50), 1, progress=False)


def test_large_energies_do_not_hide_it() -> None:
    class Both(Heavy):
        def reduced_energy(self, x: Tensor) -> Tensor:
            energy = super().reduced_energy(x)
            return energy + 5.0 * torch.randn_like(energy)

    gen = DiffusionBoltzmannGenerator.from_target(Heavy(torch.float64), network="egnn-1x8")
    gen.train(frames(50), 1, progress=False)  # control
    gen = DiffusionBoltzmannGenerator.from_target(Both(torch.float64), network="egnn-1x8")
    with pytest.raises(ValueError, match="expected an energy that depends on its configuration"):
        gen.train(frames(50), 1, progress=False)


def test_energies_that_cannot_be_differentiated_are_named_at_once() -> None:
    class Numpy(Net):
        def reduced_energy(self, x: Tensor) -> Tensor:
            return super().reduced_energy(x).detach().numpy()  # type: ignore[return-value]

    for target, message in (
        (Detached(), "that can be differentiated, got a detached one from Detached"),
        (Numpy(), "reduced_energy: expected a torch tensor, got ndarray"),
    ):
        gen = DiffusionBoltzmannGenerator.from_target(target, network="egnn-1x8")
        with pytest.raises(ValueError, match=message):
            gen.train(frames(50), 1, progress=False)


def test_one_configuration_may_have_a_plain_number() -> None:
    class Squeezed(Raising):
        def reduced_energy(self, x: Tensor) -> Tensor:
            return super().reduced_energy(x).squeeze()

    x = torch.tensor(frames(5))
    x[2] *= 100.0
    assert torch.isnan(energies_of(Squeezed(), x)).tolist() == [False, False, True, False, False]
    assert energies_of(Squeezed(), x[:1]).shape == (1,)


def test_a_network_that_an_archive_would_change_is_not_stored(tmp_path: Path) -> None:
    bench = double_well()
    x = bench.positions + 0.1 * np.random.default_rng(0).normal(size=(60, 4, 2))
    for change in (
        lambda net: net.register_forward_hook(lambda module, args, out: 0.5 * out),
        lambda net: torch.nn.utils.parametrizations.weight_norm(net.node_input),
        lambda net: net.add_module("more", torch.nn.Linear(2, 2)),
    ):
        gen = DiffusionBoltzmannGenerator(bench.system, None, 120, n_dims=2, network="egnn-1x8")
        gen.train(x, 1, batch_size=4, progress=False)
        gen.save(tmp_path / "a.vtdis")  # control
        change(gen.network)
        with pytest.raises(ValueError, match=r"got EGNN that was changed \(hooks, or weights"):
            gen.save(tmp_path / "a.vtdis")


def test_what_is_no_target_is_named() -> None:
    class Spaceless(Target):
        def reduced_energy(self, x: Tensor) -> Tensor:
            return x.square().sum(dim=(1, 2))

    for target, got in ((lambda x: x, "got function"), (Spaceless(), "got one without")):
        with pytest.raises(ValueError, match=f"target: expected a Target with a space.*{got}"):
            DiffusionBoltzmannGenerator.from_target(target)  # type: ignore[arg-type]


def test_a_target_of_another_space_is_refused() -> None:
    class Free(Net):
        def __init__(self) -> None:
            super().__init__(torch.float64)
            self.space = Space(5, 3, centred=False)

        def reduced_energy(self, x: Tensor) -> Tensor:
            return 50.0 * x.square().sum(dim=(1, 2))

    gen = DiffusionBoltzmannGenerator.from_target(Free(), network="mlp-1x8", seed=0)
    x = np.random.default_rng(0).normal(size=(300, 5, 3)) / 10.0
    gen.train(x, 1, progress=False)
    gen.tune(x, 4, "isotropic", n_trajectories=100, progress=False)
    ensemble = gen.sample(50, seed=0, progress=False)
    with pytest.raises(ValueError, match="expected a target of configurations anywhere, got"):
        ensemble.reweight(Net())
    ensemble.reweight(Free())  # control


def test_numbers_of_numpy_in_arguments(tmp_path: Path) -> None:
    bench = double_well()
    network = EGNN(labels=[0] * 4, n_dims=2, n_layers=np.int64(1), n_hidden=np.int64(8))
    gen = DiffusionBoltzmannGenerator(
        bench.system, None, np.float64(120), n_dims=np.int64(2), network=network
    )
    x = bench.positions + 0.1 * np.random.default_rng(0).normal(size=(60, 4, 2))
    gen.train(x, np.int64(1), batch_size=4, progress=False)
    DiffusionBoltzmannGenerator.load(gen.save(tmp_path / "a.vtdis"))


def test_defaults_follow_the_space() -> None:
    class Plain(Net):
        def __init__(self) -> None:
            super().__init__()
            self.space = Space(5, 3, centred=False)

        def reduced_energy(self, x: Tensor) -> Tensor:
            return x.square().sum(dim=(1, 2))

    for target, kind in ((Net(), EGNN), (Plain(), MLP), (double_well().target(), EGNN)):
        assert type(DiffusionBoltzmannGenerator.from_target(target).network) is kind


def test_what_save_cannot_do_is_said_at_the_beginning(
    caplog: pytest.LogCaptureFixture, tmp_path: Path
) -> None:
    with caplog.at_level(logging.WARNING):
        gen = DiffusionBoltzmannGenerator.from_target(Net(), network="egnn-1x8")
    assert "save() will not be able to store this generator, since its target, a Net" in caplog.text
    gen.train(frames(100), 1, progress=False)
    with pytest.raises(
        ValueError, match="save: expected a target that archives know, got one of Net.*pickle"
    ):
        gen.save(tmp_path / "x.vtdis")
    caplog.clear()
    bench = double_well()
    DiffusionBoltzmannGenerator(
        bench.system, None, 120, n_dims=2, network=torch.nn.Sequential(torch.nn.Identity())
    )
    assert "its network, a Sequential" in caplog.text
    caplog.clear()
    DiffusionBoltzmannGenerator(bench.system, None, 120, n_dims=2, network="egnn-1x8")
    assert caplog.text == ""


@pytest.mark.parametrize("backend", ["batched", "contexts"])
@pytest.mark.parametrize("how", [copy.deepcopy, lambda gen: pickle.loads(pickle.dumps(gen))])
def test_generators_cross_to_other_processes(backend: str, how: object) -> None:
    bench = double_well()
    x = bench.positions + 0.1 * np.random.default_rng(0).normal(size=(60, 4, 2))
    gen = DiffusionBoltzmannGenerator(
        bench.system, None, 120, n_dims=2, network="egnn-1x8", backend=backend, seed=0
    )
    gen.train(x, 1, batch_size=4, progress=False)
    gen.tune(x, 10, "isotropic", n_trajectories=100, progress=False)
    expected = gen.sample(20, seed=3, progress=False)
    again = how(gen)  # type: ignore[operator]
    assert again.target is not gen.target
    assert again.target.backend == backend
    assert again.target.fingerprint == gen.target.fingerprint
    found = again.sample(20, seed=3, progress=False)
    np.testing.assert_array_equal(found.log_weights, expected.log_weights)
    assert found.metadata == expected.metadata
    assert again.process.denoiser is again.denoiser
    y = torch.tensor(expected.positions)
    assert torch.equal(again.target.reduced_energy(y), gen.target.reduced_energy(y))


def test_those_that_no_archive_holds_can_be_pickled() -> None:
    target = gaussian_mixture(3)
    gen = DiffusionBoltzmannGenerator.from_target(target, network="mlp-2x16", seed=0)
    x = target.sample(500, seed=0)
    gen.train(x, 20, progress=False)
    gen.tune(x, 5, "isotropic", n_trajectories=100, progress=False)
    again = pickle.loads(pickle.dumps(gen))
    a, b = (g.sample(30, seed=0, progress=False) for g in (gen, again))
    np.testing.assert_array_equal(a.log_weights, b.log_weights)
    ensembles = [pickle.loads(pickle.dumps(a)), copy.deepcopy(a), copy.copy(a)]
    for same in ensembles:
        assert not same.positions.flags.writeable
        assert not same.log_weights.flags.writeable
        assert same.metadata == a.metadata
