"""The pool of Contexts: OpenMM's own numbers, in order, with nothing swallowed."""

from __future__ import annotations

import threading

import openmm
import pytest
import torch

from openmm_vtdis.targets.openmm.contexts import ContextPool
from tests.targets.reference import all_pairs, by_openmm, configurations, many_body, system_of

LENNARD_JONES = "4*(r^-12-r^-6)"


@pytest.mark.parametrize("n_threads", [1, 3])
def test_energies_and_forces_are_those_of_openmm(n_threads: int) -> None:
    system = system_of(all_pairs(LENNARD_JONES), many_body())
    x = configurations(10)
    expected_u, expected_f = by_openmm(system, x)
    with ContextPool(system, n_threads=n_threads) as pool:
        u, f = pool.energy_and_force(x)
        assert torch.equal(u, expected_u)
        assert torch.equal(f, expected_f)
        assert torch.equal(pool.energy(x), expected_u)
        assert pool.energy(x[:2]).shape == (2,)  # fewer samples than threads
        assert pool.energy(x[:0]).shape == (0,)
        assert pool.energy_and_force(x[:0])[1].shape == (0, 4, 3)
        assert pool.energy(x.float()).dtype == torch.float64


class CountingContext(openmm.Context):
    """Records what it is asked for, and by which thread it was made."""

    made: list[int]
    asked: list[tuple[bool, bool]]

    def __init__(self, *args: object) -> None:
        super().__init__(*args)
        self.made.append(threading.get_ident())

    def getState(self, energy: bool = False, forces: bool = False) -> openmm.State:
        self.asked.append((energy, forces))
        return super().getState(energy=energy, forces=forces)


@pytest.fixture
def counting(monkeypatch: pytest.MonkeyPatch) -> type[CountingContext]:
    CountingContext.made, CountingContext.asked = [], []
    monkeypatch.setattr(openmm, "Context", CountingContext)
    return CountingContext


def test_contexts_are_made_once(counting: type[CountingContext]) -> None:
    with ContextPool(system_of(all_pairs("r")), n_threads=2) as pool:
        for _ in range(5):
            pool.energy(configurations(40))
    assert 1 <= len(counting.made) <= 2
    assert len(set(counting.made)) == len(counting.made)


def test_forces_are_computed_only_when_asked_for(counting: type[CountingContext]) -> None:
    with ContextPool(system_of(all_pairs("r")), n_threads=1) as pool:
        pool.energy(configurations(3))
        assert counting.asked == [(True, False)] * 3
        pool.energy_and_force(configurations(2))
        assert counting.asked[3:] == [(True, True)] * 2


def test_non_finite_positions_never_reach_openmm(counting: type[CountingContext]) -> None:
    x = configurations(4)
    x[1, 0, 0] = torch.nan
    x[2, 3, 1] = torch.inf
    system = system_of(all_pairs("r"))
    with ContextPool(system, n_threads=2) as pool:
        u, f = pool.energy_and_force(x)
    assert len(counting.asked) == 2
    assert torch.isnan(u).tolist() == [False, True, True, False]
    assert torch.isnan(f).flatten(1).all(dim=1).tolist() == [False, True, True, False]


def test_coincident_particles_are_not_finite_and_stay_alone() -> None:
    system = system_of(all_pairs(LENNARD_JONES))
    x = configurations(3)
    x[1, 0] = x[1, 2]
    with ContextPool(system, n_threads=1) as pool:
        u, _ = pool.energy_and_force(x)
    assert torch.isfinite(u).tolist() == [True, False, True]


def test_an_error_of_openmm_is_not_swallowed() -> None:
    force = all_pairs("r")
    force.addBond(0, 9, [])
    with (
        ContextPool(system_of(force), n_threads=2) as pool,
        pytest.raises(openmm.OpenMMException, match="particle"),
    ):
        pool.energy(configurations(3))


def test_an_error_while_computing_is_not_swallowed(monkeypatch: pytest.MonkeyPatch) -> None:
    class Failing(openmm.Context):
        def getState(self, **what: bool) -> openmm.State:
            raise openmm.OpenMMException("the device went away")

    monkeypatch.setattr(openmm, "Context", Failing)
    with (
        ContextPool(system_of(all_pairs("r")), n_threads=1) as pool,
        pytest.raises(ValueError, match="for each of 3 configurations, the first: the device went"),
    ):
        pool.energy(configurations(3))


def test_the_pool_keeps_its_own_system() -> None:
    system = system_of(all_pairs("r"))
    x = configurations(2)
    with ContextPool(system, n_threads=1) as pool:
        system.removeForce(0)
        assert bool((pool.energy(x) > 0).all())


def test_bad_arguments_and_a_closed_pool() -> None:
    system = system_of(all_pairs("r"))
    with pytest.raises(ValueError, match=r"platform: expected one of .*'Reference'.*got 'Abacus'"):
        ContextPool(system, "Abacus")
    with pytest.raises(ValueError, match="n_threads: expected an integer >= 1, got 0"):
        ContextPool(system, n_threads=0)
    pool = ContextPool(system)
    pool.close()
    with pytest.raises(RuntimeError, match="has been closed"):
        pool.energy(configurations(1))
