"""Ratios that are 1 in equilibrium and T'/T at another temperature, and what is refused."""

from __future__ import annotations

import logging
from collections.abc import Callable

import numpy as np
import openmm
import openmm.app
import pytest
import torch

from openmm_vtdis import DiffusionBoltzmannGenerator
from openmm_vtdis.core.space import Space
from openmm_vtdis.core.units import thermal_energy
from openmm_vtdis.mcmc import sample_hmc
from openmm_vtdis.targets import (
    GaussianMixture,
    OpenMMTarget,
    Target,
    alanine_dipeptide,
    gaussian_mixture,
)
from openmm_vtdis.targets.frame_checks import (
    _spread_at_rest,
    check_equilibrium,
    check_exploded,
    check_flexible,
    configurational_ratio,
    virial_ratio,
)
from openmm_vtdis.topology.particles import Particles
from tests.targets.reference import system_of

STIFFNESS = 800.0


def springs(temperature: float = 300.0) -> OpenMMTarget:
    """Four particles with a spring of length zero between any two: Gaussian."""
    force = openmm.HarmonicBondForce()
    for i in range(4):
        for j in range(i):
            force.addBond(i, j, 0.0, STIFFNESS)
    return OpenMMTarget(system_of(force), None, temperature)


def exact_frames(target: OpenMMTarget, n: int, temperature: float) -> torch.Tensor:
    """1/2 k sum_ij |x_i - x_j|^2 = 1/2 (4 k) |x|^2 on the zero-CoM subspace."""
    variance = thermal_energy(temperature) / (4.0 * STIFFNESS)
    return variance**0.5 * target.space.standard_normal(n, torch.Generator().manual_seed(0))


@pytest.mark.parametrize("estimate", [virial_ratio, configurational_ratio])
@pytest.mark.parametrize("temperature", [300.0, 450.0])
def test_both_ratios_tell_the_temperature(
    temperature: float, estimate: Callable[[Target, torch.Tensor], tuple[float, float]]
) -> None:
    target = springs()
    ratio, error = estimate(target, exact_frames(target, 4000, temperature))
    assert error < 0.02
    assert abs(ratio - temperature / 300.0) < 4.0 * error


@pytest.mark.parametrize("estimate", [virial_ratio, configurational_ratio])
def test_both_hold_without_a_centre_of_mass(
    estimate: Callable[[Target, torch.Tensor], tuple[float, float]],
) -> None:
    target = gaussian_mixture(5)
    ratio, error = estimate(target, target.sample(4000, seed=0))
    assert abs(ratio - 1.0) < 4.0 * error


@pytest.mark.parametrize("backend", ["batched", "contexts"])
def test_the_configurational_ratio_is_that_of_the_hessian(backend: str) -> None:
    """Against traces of dense Hessians, whose noise along a direction is the only difference."""
    system = alanine_dipeptide(300.0)
    target = system.target(backend=backend)
    noise = target.space.standard_normal(200, torch.Generator().manual_seed(0))
    x = torch.tensor(system.positions) + 0.003 * noise
    gradient, hessian = system.target().derivatives(x)
    traces = torch.einsum("nijij->n", hessian)
    exact = float(gradient.square().sum(dim=(1, 2)).mean() / traces.mean())
    ratio, error = configurational_ratio(target, x)
    assert ratio == pytest.approx(exact, rel=0.1)
    assert error < 0.1 * ratio


def test_a_hot_molecule_is_seen_where_the_virial_is_noise(caplog: pytest.LogCaptureFixture) -> None:
    """Alanine dipeptide at 400 K in a target of 300 K: 200 frames of 20 chains are enough."""
    right, hot = (alanine_dipeptide(t) for t in (300.0, 400.0))
    frames = {
        system.temperature: sample_hmc(
            system.target(),
            n_chains=20,
            n_samples=10,
            burn_in=50,
            thin=1,
            n_leapfrog=20,
            step_size=1e-3,
            initial=torch.tensor(system.positions),
            seed=1,
            progress=False,
        ).positions
        for system in (right, hot)
    }
    target = right.target()
    for temperature, x in frames.items():
        ratio, error = configurational_ratio(target, x)
        assert error < 0.06
        assert abs(ratio - temperature / 300.0) < 4.0 * error
        assert virial_ratio(target, x)[1] > 0.08
    with caplog.at_level(logging.WARNING):
        check_equilibrium("train", target, frames[300.0])
        assert not caplog.records
        check_equilibrium("train", target, frames[400.0])
    assert "<|grad u|^2> / <laplacian u> is 1.3" in caplog.text


def test_a_cloud_that_is_too_wide_is_seen_by_the_virial(caplog: pytest.LogCaptureFixture) -> None:
    """A stiff pair, in equilibrium, in a soft trap, out of it: the first ratio sees nothing."""
    widths = torch.tensor([0.01, 1.0, 1.0])

    class Trap(Target):
        space = Space(3, 1, centred=False)

        def reduced_energy(self, x: torch.Tensor) -> torch.Tensor:
            return 0.5 * (x[:, :, 0] / widths).square().sum(dim=1)

    target = Trap()
    x = target.space.standard_normal(2_000, torch.Generator().manual_seed(0)) * widths[:, None]
    with caplog.at_level(logging.WARNING):
        check_equilibrium("train", target, x)
        assert not caplog.records
        x[:, 1:] *= 1.5
        check_equilibrium("train", target, x)
    assert "<x.grad u> / d is 1.8" in caplog.text
    assert abs(configurational_ratio(target, x)[0] - 1.0) < 0.1


def test_frames_of_another_temperature_are_reported(caplog: pytest.LogCaptureFixture) -> None:
    target = springs()
    with caplog.at_level(logging.WARNING):
        check_equilibrium("train", target, exact_frames(target, 2000, 300.0))
        assert not caplog.records
        check_equilibrium("train", target, exact_frames(target, 2000, 600.0))
    assert "equilibrium has exactly 1, as if they were at" in caplog.text
    assert "(300 K is the target's)" in caplog.text


class Line(Target):
    """One particle on a line, in the energy given."""

    space = Space(1, 1, centred=False)

    def __init__(self, energy: Callable[[torch.Tensor], torch.Tensor]) -> None:
        self.energy = energy

    def reduced_energy(self, x: torch.Tensor) -> torch.Tensor:
        return self.energy(x[:, 0, 0])


def test_few_frames_that_miss_what_is_rare_raise_no_alarm(caplog: pytest.LogCaptureFixture) -> None:
    """A hard core, met by one frame in some: 300 sets of 20 exact frames, by rejection."""
    target = Line(lambda r: r.abs() ** -12 + 0.5 * r.square())
    x = torch.randn(60_000, 1, 1, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
    uniform = torch.rand(60_000, dtype=torch.float64, generator=torch.Generator().manual_seed(1))
    x = x[uniform < (-(x[:, 0, 0].abs() ** -12)).exp()][:6_000]
    with caplog.at_level(logging.WARNING):
        for frames in x.split(20):
            check_equilibrium("train", target, frames)
        assert len(x) == 6_000
        assert len(caplog.records) < 20
        caplog.clear()
        check_equilibrium("train", target, 1.1 * x)
    assert len(caplog.records) == 1


def kinked() -> tuple[Target, torch.Tensor]:
    """u = |x|, and frames on either side of the kink, which have no curvature."""
    x = -torch.rand(1000, 1, 1, generator=torch.Generator().manual_seed(0)).double().log()
    x = torch.cat([x, -x])
    return Line(lambda r: r.abs()), x[x[:, 0, 0].abs() > 0.01]


def broken() -> tuple[Target, torch.Tensor]:
    """A Gaussian, and frames of which one has no finite force."""

    class Broken(Line):
        def reduced_energy_and_force(self, x: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
            u, f = super().reduced_energy_and_force(x)
            return u, torch.where(x == 0.0, torch.nan, f)

    target = Broken(lambda r: 0.5 * r.square())
    x = target.space.standard_normal(1000, torch.Generator().manual_seed(0))
    x[0] = 0.0
    return target, x


@pytest.mark.parametrize(
    ("make", "message"),
    [(kinked, "<x.grad u> / d is 1.5"), (broken, "<|grad u|^2> / <laplacian u> is 2.2")],
)
def test_what_cannot_be_told_is_no_alarm_and_hides_none(
    make: Callable[[], tuple[Target, torch.Tensor]],
    message: str,
    caplog: pytest.LogCaptureFixture,
) -> None:
    target, x = make()
    with caplog.at_level(logging.WARNING):
        check_equilibrium("train", target, x)
        assert not caplog.records
        check_equilibrium("train", target, 1.5 * x)
    assert message in caplog.text


def test_frames_without_forces_are_not_moved_far(caplog: pytest.LogCaptureFixture) -> None:
    """At a minimum kT over the force is no length to go by."""
    target = Line(lambda r: torch.where(r.abs() < 10.0, 0.5 * (r.abs() - 1.0).square(), torch.nan))
    x = torch.ones(100, 1, 1, dtype=torch.float64)
    x[::2] += 1e-9
    with caplog.at_level(logging.WARNING):
        check_equilibrium("train", target, x)
    assert "e-19 ± " in caplog.text


def test_exploded_frames_are_refused() -> None:
    target = springs()
    x = exact_frames(target, 10_000, 300.0)
    x[[18, 1041]] *= 30.0  # 1041 is not among the five thousand that are looked at anyhow
    with pytest.raises(ValueError, match="got 2 of 5001 that exploded, the first at index 18, of"):
        check_equilibrium("train", target, x)


@pytest.mark.parametrize("share", [0.3, 0.5, 0.9])
def test_exploded_frames_are_refused_however_many_they_are(share: float) -> None:
    """Of most frames even: those that are sound have the lowest energies. And a few minimised."""
    target = springs()
    x = exact_frames(target, 2_000, 300.0)
    check_exploded("noise", target, torch.cat([x, 0.01 * x[:60]]))  # control
    broken = torch.rand(2_000, generator=torch.Generator().manual_seed(0)) < share
    x[broken] *= 30.0
    with pytest.raises(ValueError, match=f"got {int(broken.sum())} of 2000 that exploded"):
        check_exploded("noise", target, x)


@pytest.mark.parametrize("n_filled", [0, 1])
def test_frames_in_one_place_are_refused_whatever_their_energy(n_filled: int) -> None:
    target = springs()
    x = exact_frames(target, 100, 300.0)
    check_exploded("noise", target, x)
    x[40:, n_filled:] = x[40:, n_filled:].mean(dim=1, keepdim=True)
    with pytest.raises(ValueError, match="got 60 of 100 frames in which most of them are in one"):
        check_exploded("noise", target, target.space.project(x))
    two = exact_frames(target, 100, 300.0)
    two[:, 1, 0] = two[:, 0, 0]  # in one plane, not in one place
    check_exploded("noise", target, two)


def test_a_large_frame_of_low_energy_is_no_explosion() -> None:
    narrow = GaussianMixture(torch.zeros(2, 3, 1), [0.9, 0.1], [0.01, 100.0], Space(3, 1, False))
    check_equilibrium("train", narrow, narrow.sample(500, seed=0))


def test_frames_without_a_finite_energy_are_refused() -> None:
    force = openmm.CustomBondForce("1/r+r^2")
    for i in range(4):
        for j in range(i):
            force.addBond(i, j, [])
    target = OpenMMTarget(system_of(force), None, 300.0)
    x = target.space.standard_normal(50, torch.Generator().manual_seed(1))
    x[20, 1] = x[20, 3]
    with pytest.raises(ValueError, match="got 1 of 50 without, the first at index 20"):
        check_equilibrium("train", target, target.space.project(x))


def dynamics(constraints: object, temperature: float = 300.0) -> torch.Tensor:
    """100 frames of alanine dipeptide, 30 fs apart, in nm."""
    system = alanine_dipeptide(temperature)
    built = openmm.app.ForceField("amber96.xml").createSystem(
        system.topology, nonbondedMethod=openmm.app.NoCutoff, constraints=constraints
    )
    integrator = openmm.LangevinMiddleIntegrator(temperature, 10.0, 0.001)
    integrator.setRandomNumberSeed(1)
    context = openmm.Context(built, integrator, openmm.Platform.getPlatformByName("Reference"))
    context.setPositions(system.positions)
    openmm.LocalEnergyMinimizer.minimize(context)
    context.setVelocitiesToTemperature(temperature, 1)
    frames = []
    for _ in range(100):
        integrator.step(30)
        frames.append(context.getState(positions=True).getPositions(asNumpy=True)._value)
    return torch.tensor(np.array(frames))


@pytest.mark.parametrize("decimals", [7, 3], ids=["full precision", "rounded like XTC"])
@pytest.mark.parametrize("constraints", [None, openmm.app.HBonds, openmm.app.AllBonds])
def test_rigid_bonds_are_refused_by_name(constraints: object, decimals: int) -> None:
    system = alanine_dipeptide(300.0)
    bonds = Particles.of(system.topology, Space(22, 3)).bonds
    x = system.target().space.project(dynamics(constraints).round(decimals=decimals))
    assert len(bonds) == 21
    if constraints is None:
        return check_flexible("train", system.target(), x, bonds)
    rigid = 12 if constraints is openmm.app.HBonds else 21
    with pytest.raises(ValueError, match=f"train: .* without constraints, got {rigid} of 21 bonds"):
        check_equilibrium("train", system.target(), x, bonds)


def test_bonds_may_be_as_stiff_as_cold_makes_them() -> None:
    """At 3 K they vary by less than rounding at 300 K does; control: the target of 300 K."""
    system, x = alanine_dipeptide(3.0), dynamics(None, 3.0)
    bonds = Particles.of(system.topology, Space(22, 3)).bonds
    check_flexible("tune", system.target(), x, bonds)
    with pytest.raises(ValueError, match="21 of 21 bonds"):
        check_flexible("tune", alanine_dipeptide(300.0).target(), x, bonds)


@pytest.mark.parametrize("backend", ["batched", "contexts"])
@pytest.mark.parametrize("temperature", [300.0, 600.0])
def test_what_a_bond_is_held_against_is_its_thermal_spread(
    temperature: float, backend: str
) -> None:
    """Of one spring, sqrt(kT / k), in nm; a quarter of it is the limit."""
    stiffness, length = 2.5e6, 0.1
    force = openmm.HarmonicBondForce()
    force.addBond(0, 1, length, stiffness)
    target = OpenMMTarget(system_of(force, n_particles=2), None, temperature, backend)
    exact = (thermal_energy(temperature) / stiffness) ** 0.5
    lengths = torch.linspace(-1.0, 1.0, 200, dtype=torch.float64)
    lengths = lengths / lengths.std()

    def frames(share: float) -> torch.Tensor:
        half = 0.5 * (length + share * exact * lengths)[:, None]
        return torch.stack([half, -half], dim=1) * torch.tensor([0.6, 0.0, 0.8])

    assert _spread_at_rest(target, frames(1.0), 0, 1) == pytest.approx(exact, rel=1e-3)
    for share in (0.26, 1.0):
        check_flexible("train", target, frames(share), [(0, 1)])
    with pytest.raises(ValueError, match=f"0.1 ± .* at least ± {exact:.1g} nm"):
        check_flexible("train", target, frames(0.24), [(0, 1)])


def test_of_few_frames_nothing_is_said_of_bonds() -> None:
    system, x = alanine_dipeptide(300.0), dynamics(openmm.app.HBonds)
    bonds = Particles.of(system.topology, Space(22, 3)).bonds
    check_flexible("train", system.target(), x[:19], bonds)
    with pytest.raises(ValueError, match="12 of 21 bonds"):
        check_flexible("train", system.target(), x[:20], bonds)


@pytest.mark.parametrize("action", ["train", "tune"])
def test_generators_refuse_rigid_bonds(action: str) -> None:
    gen = DiffusionBoltzmannGenerator.from_pretrained("aldp-300K")
    with pytest.raises(ValueError, match=f"{action}: expected frames of a simulation without"):
        getattr(gen, action)(dynamics(openmm.app.HBonds), progress=False)


@pytest.mark.parametrize("change", ["order", "unit"])
def test_what_no_temperature_explains_is_not_called_one(
    change: str, caplog: pytest.LogCaptureFixture
) -> None:
    """Of all frames alike: single ones are refused as exploded."""
    system, x = alanine_dipeptide(300.0), dynamics(None)[::10]
    if change == "order":
        x[:, [0, 1]] = x[:, [1, 0]]
    else:
        x *= 1.2
    u = system.target().reduced_energy(x)
    alike = x[u < u.median() + 150.0]
    assert len(alike) >= 5
    with caplog.at_level(logging.WARNING):
        check_equilibrium("train", system.target(), alike)
    assert "check their length unit (nm), the order of their atoms" in caplog.text
    assert "as if they were at" not in caplog.text
