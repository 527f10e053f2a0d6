"""``check_target`` accepts good targets and names what is wrong with every broken one."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from torch import Tensor

from openmm_vtdis.core.space import Space
from openmm_vtdis.targets import GaussianMixture, OpenMMTarget, Target, double_well, lennard_jones
from openmm_vtdis.testing import check_target
from tests.targets.reference import all_pairs, configurations, system_of

SPACE = Space(4, 2)
X = configurations(5, 4, 2)


class Spring(Target):
    """Half the squared distance from the centre of mass: right in every way."""

    def __init__(self) -> None:
        self.space = SPACE

    def reduced_energy(self, x: Tensor) -> Tensor:
        return 0.5 * self.space.project(x.double()).square().sum(dim=(1, 2))


def altered(
    energy: Callable[[Tensor, Tensor], Tensor] = lambda u, x: u,
    force: Callable[[Tensor, Tensor], tuple[Tensor, Tensor]] = lambda u, f: (u, f),
) -> Target:
    """A spring whose ``energy(u, x)`` or ``(u, f)`` is tampered with."""

    class Altered(Spring):
        def reduced_energy(self, x: Tensor) -> Tensor:
            return energy(super().reduced_energy(x), x)

        def reduced_energy_and_force(self, x: Tensor) -> tuple[Tensor, Tensor]:
            return force(*super().reduced_energy_and_force(x))

    return Altered()


@pytest.mark.parametrize("backend", ["batched", "contexts"])
@pytest.mark.parametrize("system", [double_well(), lennard_jones(5)], ids=lambda s: s.name)
def test_good_targets_pass(system, backend: str) -> None:
    target = system.target(backend=backend)
    x = 2.0 * configurations(5, target.space.n_particles, system.n_dims)
    check_target(target, x, symmetries=("translation", "rotation", "permutation"))
    check_target(Spring(), X, symmetries=("translation", "rotation", "permutation"))


def test_a_free_space_has_no_symmetries_to_check() -> None:
    means = torch.ones(1, 4, 2)
    target = GaussianMixture(means, [1.0], [1.0], Space(4, 2, centred=False))
    check_target(target, X)
    with pytest.raises(AssertionError, match="invariant under translation"):
        check_target(target, X, symmetries=("translation",))


@pytest.mark.parametrize(
    ("target", "message"),
    [
        (
            altered(lambda u, x: u[:, None]),
            r"reduced_energy\(x\): expected shape \(5,\), got \(5, 1",
        ),
        (altered(lambda u, x: u.float()), "expected torch.float64, got torch.float32"),
        (altered(lambda u, x: u.tolist()), "expected a tensor, got list"),  # type: ignore[arg-type]
        (altered(lambda u, x: u + 1e-2 * len(x)), "to be those of its samples one by one"),
        (altered(force=lambda u, f: (u, 0.999 * f)), "expected force = -gradient"),
        (altered(force=lambda u, f: (u, -f)), "expected force = -gradient"),
        (altered(force=lambda u, f: (u + 0.1, f)), "reduced_energy_and_force to agree"),
        (altered(force=lambda u, f: (u, f[:, :, :1])), r"the force of .* expected shape \(5, 4, 2"),
        (altered(force=lambda u, f: (u, f.float())), "the force of .* expected torch.float64"),
        (altered(lambda u, x: u + x.double()[:, 0, 0]), "invariant under translation"),
        (altered(lambda u, x: u + x.double()[:, :2, 0].diff(dim=1)[:, 0]), "under rotation"),
        (altered(lambda u, x: u.nan_to_num(0.0)), "expected energy NaN .* got 0.0"),
        (
            altered(lambda u, x: u + 0.0 * u.detach().sum()),
            "expected a NaN in one sample to leave the others alone",
        ),
    ],
)
def test_every_broken_promise_is_named(target: Target, message: str) -> None:
    with pytest.raises(AssertionError, match=message):
        check_target(target, X)


def test_distinguishable_particles_fail_only_the_permutation_check() -> None:
    target = altered(lambda u, x: u + (x.double()[:, 0] - x.double()[:, 1]).square().sum(dim=1))
    check_target(target, X)
    with pytest.raises(AssertionError, match="invariant under permutation, got a change of"):
        check_target(target, X, symmetries=("permutation",))


def test_unusable_configurations_are_the_callers_fault() -> None:
    with pytest.raises(ValueError, match="x: expected at least 2 frames, got 1"):
        check_target(Spring(), X[:1])
    with pytest.raises(ValueError, match=r"x: expected positions of shape \(n, 4, 2\)"):
        check_target(Spring(), X[:, :3])
    with pytest.raises(ValueError, match="symmetries: expected .* got 'mirror'"):
        check_target(Spring(), X, symmetries=("mirror",))
    target = OpenMMTarget(system_of(all_pairs("r^-12")), n_dims=2)
    with pytest.raises(ValueError, match="x: expected configurations of finite energy"):
        check_target(target, torch.zeros(2, 4, 2))
