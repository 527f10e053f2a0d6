"""Forces that run code of the user's: in one thread, one by one, and known again."""

from __future__ import annotations

import copy
import os
import pickle
import subprocess
import sys
from pathlib import Path

import numpy as np
import openmm
import pytest
import torch

from openmm_vtdis import DiffusionBoltzmannGenerator, WeightedEnsemble
from openmm_vtdis.interop import DiffusionMove
from openmm_vtdis.storage.fingerprint import content_fingerprint
from openmm_vtdis.targets import OpenMMTarget
from openmm_vtdis.targets.openmm.contexts import ContextPool
from openmm_vtdis.targets.openmm.user_code import system_fingerprint, user_forces
from tests import potentials
from tests.conftest import needs_python_force

pytestmark = needs_python_force


def exact(x: np.ndarray) -> np.ndarray:
    return np.array([potentials.Springs().of(frame)[0] for frame in x])


def make_generator(potential: object, **options: object) -> DiffusionBoltzmannGenerator:
    """Trained for a moment, and tuned."""
    topology, _ = potentials.water()
    gen = DiffusionBoltzmannGenerator(
        potentials.system_with(potential), topology, 300, network="egnn-2x16", seed=0, **options
    )  # type: ignore[arg-type]
    x = potentials.frames()
    gen.train(x, 20, progress=False)
    gen.tune(x, 4, "isotropic", n_trajectories=100, progress=False)
    return gen


# -- threads ----------------------------------------------------------------------------------
@pytest.mark.parametrize("nested", [False, True])
def test_code_that_keeps_its_input_runs_in_one_thread(nested: bool) -> None:
    system = potentials.system_with(potentials.Keeping(), nested)
    x = torch.tensor(potentials.frames(400))
    with ContextPool(system) as pool:
        assert pool.n_threads == 1
        found = pool.energy(x).numpy()
    np.testing.assert_allclose(found, exact(x.numpy()), rtol=1e-12, atol=1e-12)


def test_more_threads_have_copies_of_it() -> None:
    topology, _ = potentials.water()
    system = potentials.system_with(potentials.Keeping())
    target = OpenMMTarget(system, topology, n_threads=3)
    x = torch.tensor(potentials.frames(400))
    found = target.reduced_energy(x).numpy() * 300.0 * 8.31446261815324e-3
    np.testing.assert_allclose(found, exact(x.numpy()), rtol=1e-9)


def test_what_copies_share_is_seen_before_it_is_believed(monkeypatch: pytest.MonkeyPatch) -> None:
    """Control: with one callable for all threads, or one place for all copies, energies are off."""
    topology, _ = potentials.water()
    system = potentials.system_with(potentials.Shared())
    with pytest.raises(ValueError, match="code that may run in 4 threads, got PythonForce"):
        OpenMMTarget(system, topology, n_threads=4)
    monkeypatch.setattr("openmm_vtdis.targets.openmm.contexts.copied", lambda system: system)
    with pytest.raises(ValueError, match="code that may run in 4 threads, got PythonForce"):
        OpenMMTarget(potentials.system_with(potentials.Keeping()), topology, n_threads=4)


def test_an_energy_of_more_than_positions_is_refused() -> None:
    topology, _ = potentials.water()
    with pytest.raises(ValueError, match=r"depends on positions only, got PythonForce \(force 0\)"):
        OpenMMTarget(potentials.system_with(potentials.Counting()), topology)


@pytest.mark.parametrize("positions", [False, True])
def test_forces_that_are_not_the_gradient_are_refused(positions: bool) -> None:
    topology, x = potentials.water()
    options = {"positions": x} if positions else {}
    for potential in (potentials.Uphill(), potentials.Angstrom()):
        with pytest.raises(ValueError, match="minus the gradient of the energy, got PythonForce"):
            OpenMMTarget(potentials.system_with(potential), topology, **options)
    for potential in (potentials.Springs(), potentials.Heavy()):  # control
        OpenMMTarget(potentials.system_with(potential), topology, **options)


def test_the_energy_of_all_electrons_hides_nothing(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """13 kJ/mol are a hundred-thousandth of it."""
    topology, x = potentials.water()
    system = potentials.system_with(potentials.HeavyNoise())
    with pytest.raises(ValueError, match="depends on positions only, got PythonForce"):
        OpenMMTarget(system, topology, positions=x)
    path = make_generator(potentials.HeavyEdited(), positions=x).save(tmp_path / "pf.vtdis")
    DiffusionBoltzmannGenerator.load(path, allow_pickle=True)  # control
    monkeypatch.setattr(potentials.HeavyEdited, "factor", 1.5)
    with pytest.raises(ValueError, match="expected the energies that PythonForce had when it was"):
        DiffusionBoltzmannGenerator.load(path, allow_pickle=True)


def test_what_is_no_energy_does_not_reach_openmm() -> None:
    topology, _ = potentials.water()
    with pytest.raises(ValueError, match=r"gives \(energy, forces\), got \(None, None\)"):
        OpenMMTarget(potentials.system_with(potentials.Nothing()), topology)


def test_sets_have_no_order() -> None:
    one, two = potentials.Springs(), potentials.Springs()
    one.names, two.names = {"a", "b", "c"}, {"c", "b", "a"}  # type: ignore[attr-defined]
    two.net, two.table = one.net, one.table
    assert content_fingerprint(one) == content_fingerprint(two)
    script = (
        "from tests import potentials; import torch; torch.manual_seed(0);"
        "from openmm_vtdis.storage.fingerprint import content_fingerprint;"
        "p = potentials.Springs(); p.names = {'a', 'b', 'c', 'd'}; print(content_fingerprint(p))"
    )
    found = {
        subprocess.run(
            [sys.executable, "-c", script], capture_output=True, text=True, check=True,
            env={**os.environ, "PYTHONHASHSEED": seed}, cwd=Path(__file__).parents[3],
        ).stdout
        for seed in ("1", "2", "3")
    }  # fmt: skip
    assert len(found) == 1


def test_forces_of_plugins_count_as_user_code() -> None:
    class PlumedForce(openmm.CustomExternalForce):
        """Not of OpenMM's own module."""

    class Holder:
        def getForces(self) -> list[openmm.Force]:
            return [openmm.NonbondedForce(), PlumedForce("x")]

    assert user_forces(Holder()) == ["PlumedForce"]  # type: ignore[arg-type]


# -- exceptions ---------------------------------------------------------------------------------
@pytest.mark.parametrize("positions", [False, True])
def test_one_odd_configuration_is_a_sample_without_weight(
    positions: bool, caplog: pytest.LogCaptureFixture
) -> None:
    _, x = potentials.water()
    gen = make_generator(potentials.Diverging(), positions=x if positions else None)
    ensemble = gen.sample(300, seed=0, progress=False)
    about = ensemble.diagnostics()
    assert 0 < about.n_without_energy == about.n_zero_weight < 300
    assert "without an energy" in str(about)
    assert "SCF did not converge" in caplog.text
    alive = np.isfinite(ensemble.log_weights)
    expected = exact(ensemble.positions[alive]) / (300.0 * 8.31446261815324e-3)
    np.testing.assert_allclose(ensemble.reduced_energies[alive], expected, rtol=1e-9)


def test_a_potential_for_real_positions_only_can_be_used_with_them() -> None:
    topology, x = potentials.water()
    system = potentials.system_with(potentials.NoNeighbours())
    target = OpenMMTarget(system, topology, positions=x * openmm.unit.nanometer)
    assert bool(torch.isfinite(target.reduced_energy(torch.tensor(potentials.frames(5)))).all())
    always = potentials.system_with(potentials.Diverging())
    far = x * 1e-3
    with pytest.raises(ValueError, match=r"got none from PythonForce .* \(SCF did not converge\)"):
        OpenMMTarget(always, topology, positions=far)
    for bad, message in (
        (np.zeros((3, 3)), "positions: expected particles apart, got some in one place"),
        (np.zeros((4, 3)), r"positions: expected positions of shape \(n, 3, 3\)"),
    ):
        with pytest.raises(ValueError, match=message):
            OpenMMTarget(system, topology, positions=bad)


def test_what_fails_everywhere_is_an_error() -> None:
    topology, x = potentials.water()
    target = OpenMMTarget(potentials.system_with(potentials.NoNeighbours()), topology, positions=x)
    far = torch.tensor(30.0 * potentials.frames(7))
    with pytest.raises(ValueError, match="for each of 7 configurations, the first: atom without"):
        target.reduced_energy(far)
    mixed = torch.cat([far[:3], torch.tensor(potentials.frames(4))])
    assert torch.isnan(target.reduced_energy(mixed)).tolist() == [True] * 3 + [False] * 4
    assert torch.isnan(target.reduced_energy(far[:1])).tolist() == [True]


# -- identity -----------------------------------------------------------------------------------
def test_identities_are_of_content() -> None:
    one = potentials.Springs()
    same = pickle.loads(pickle.dumps(one))
    assert (
        content_fingerprint(one)
        == content_fingerprint(same)
        == content_fingerprint(copy.deepcopy(one))
    )
    assert pickle.dumps(one) != pickle.dumps(same)  # what a digest of the bytes would see
    other = copy.deepcopy(one)
    with torch.no_grad():
        other.net.bias += 1e-12
    assert content_fingerprint(other) != content_fingerprint(one)
    table = copy.deepcopy(one)
    table.table["a"][0] = 1e-12
    assert content_fingerprint(table) != content_fingerprint(one)
    cyclic = potentials.Cyclic()
    assert content_fingerprint(cyclic) == content_fingerprint(copy.deepcopy(cyclic))


def test_a_generator_stays_itself_in_archives_pickles_and_copies(tmp_path: Path) -> None:
    gen = make_generator(potentials.Springs())
    path = gen.save(tmp_path / "pf.vtdis")
    with pytest.raises(ValueError, match=r"allow_pickle=True .* only if you trust"):
        DiffusionBoltzmannGenerator.load(path)
    again = DiffusionBoltzmannGenerator.load(path, allow_pickle=True)
    twice = DiffusionBoltzmannGenerator.load(again.save(tmp_path / "2.vtdis"), allow_pickle=True)
    others = [again, twice, pickle.loads(pickle.dumps(gen)), copy.deepcopy(gen)]
    x, ensemble = potentials.frames(30), gen.sample(20, seed=1, progress=False)
    for k, other in enumerate(others):
        assert other.target.fingerprint == gen.target.fingerprint
        WeightedEnsemble.concatenate([ensemble, other.sample(20, seed=2 + k, progress=False)])
        assert (
            other.log_weights(x, seed=0, progress=False).provenance.proposal
            == ensemble.provenance.proposal
        )
    with pytest.raises(ValueError, match="pass allow_pickle=True"):
        DiffusionMove(path)
    move = DiffusionMove(path, allow_pickle=True, batch_size=8, seed=0)
    assert pickle.loads(pickle.dumps(move)).allow_pickle


def test_two_systems_with_one_potential_are_one() -> None:
    potential = potentials.Springs()
    one, two = (potentials.system_with(potential) for _ in range(2))
    assert system_fingerprint(one) == system_fingerprint(two)
    two.setParticleMass(0, 17.0)
    assert system_fingerprint(one) != system_fingerprint(two)


def test_code_that_has_changed_since_is_seen(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    path = make_generator(potentials.Edited()).save(tmp_path / "pf.vtdis")
    DiffusionBoltzmannGenerator.load(path, allow_pickle=True)  # control
    monkeypatch.setattr(potentials.Edited, "factor", 1.01)
    with pytest.raises(ValueError, match="expected the energies that PythonForce had when it was"):
        DiffusionBoltzmannGenerator.load(path, allow_pickle=True)


def test_what_cannot_be_stored_is_said_at_construction() -> None:
    topology, _ = potentials.water()
    for function in (
        lambda state: potentials.Springs()(state),
        lambda state, k=1.0: (k, np.zeros((3, 3))),
    ):
        with pytest.raises(ValueError, match="one that pickle can write: a function or an instanc"):
            DiffusionBoltzmannGenerator(potentials.system_with(function), topology)
