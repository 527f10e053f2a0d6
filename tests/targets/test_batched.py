"""Every translation against plain OpenMM, and every feature without one."""

from __future__ import annotations

from collections.abc import Callable

import openmm
import pytest
import torch

from openmm_vtdis.targets import batched, lennard_jones
from openmm_vtdis.targets.batched import BatchedEnergy, Term, Untranslatable, translates
from tests.targets.reference import (
    all_pairs,
    angle,
    bonds,
    by_openmm,
    configurations,
    external,
    system_of,
)


def harmonic_bonds() -> openmm.HarmonicBondForce:
    force = openmm.HarmonicBondForce()
    for i, j, length, k in ((0, 1, 0.15, 1000.0), (1, 2, 1.3, 20.0), (3, 0, 0.0, 7.5)):
        force.addBond(i, j, length, k)
    return force


def custom_bonds() -> openmm.CustomBondForce:
    rows = [[1.0, 0.4], [2.5, 0.4], [0.3, 0.4], [-1.0, 0.4]]
    source = "scale*depth*(top-exp(-a*(r-r0)))^2; r0=1+shift/10; shift=select(step(r-1), 1, 2)"
    force = bonds(source, parameters=["depth", "a"], values=rows)
    force.addGlobalParameter("scale", 1.7)
    force.addGlobalParameter("top", 1.1)
    return force


def nonbonded() -> openmm.CustomNonbondedForce:
    force = openmm.CustomNonbondedForce(
        "strength*4*eps*((s/r)^12-(s/r)^6)+charge1*charge2/r; eps=sqrt(e1*e2); s=0.5*(s1+s2)"
    )
    for name in ("e", "s", "charge"):
        force.addPerParticleParameter(name)
    force.addGlobalParameter("strength", 0.9)
    for row in ([1.0, 0.5, -0.3], [0.2, 0.4, 0.1], [1.0, 0.5, 0.4], [0.7, 0.3, 0.0]):
        force.addParticle(row)
    force.addExclusion(2, 0)
    force.addExclusion(1, 3)
    return force


def field() -> openmm.CustomExternalForce:
    force = openmm.CustomExternalForce("g*k*(x^2+2*(y-y0)^2)+sin(z)")
    force.addPerParticleParameter("k")
    force.addPerParticleParameter("y0")
    force.addGlobalParameter("g", -0.5)
    force.addParticle(3, [1.0, 0.1])
    force.addParticle(1, [2.0, 0.2])
    return force


FORCES: dict[str, Callable[[], openmm.Force]] = {
    "HarmonicBondForce": harmonic_bonds,
    "CustomBondForce": custom_bonds,
    "CustomNonbondedForce": nonbonded,
    "CustomExternalForce": field,
    "CMMotionRemover": openmm.CMMotionRemover,
    "constant": lambda: external("2"),
    "no bonds": lambda: bonds("r", []),
}


@pytest.mark.parametrize("force", FORCES.values(), ids=FORCES.keys())
def test_translation_agrees_with_openmm(force: Callable[[], openmm.Force]) -> None:
    system = system_of(force())
    x = configurations(30)
    expected_u, expected_f = by_openmm(system, x)
    u, f = BatchedEnergy(system).energy_and_force(x)
    assert u.shape == (30,)
    assert u.dtype == f.dtype == torch.float64
    assert torch.allclose(u, expected_u, rtol=1e-12, atol=1e-11)
    assert torch.allclose(f, expected_f, rtol=1e-11, atol=1e-10)
    assert torch.allclose(BatchedEnergy(system).energy(x), expected_u, rtol=1e-12, atol=1e-11)


def test_forces_add_up() -> None:
    system = system_of(harmonic_bonds(), custom_bonds(), nonbonded(), openmm.CMMotionRemover())
    x = configurations(10)
    assert torch.allclose(BatchedEnergy(system).energy(x), by_openmm(system, x)[0], rtol=1e-12)


def test_no_forces() -> None:
    u, f = BatchedEnergy(system_of()).energy_and_force(configurations(3))
    assert u.tolist() == [0.0, 0.0, 0.0]
    assert not bool(f.any())


def with_cutoff() -> openmm.Force:
    force = nonbonded()
    force.setNonbondedMethod(openmm.CustomNonbondedForce.CutoffNonPeriodic)
    return force


def with_groups() -> openmm.Force:
    force = nonbonded()
    force.addInteractionGroup([0, 1], [2])
    return force


def with_table() -> openmm.Force:
    force = openmm.CustomNonbondedForce("table(r)")
    force.addTabulatedFunction("table", openmm.Continuous1DFunction([0.0, 1.0, 2.0], 0.0, 5.0))
    for _ in range(4):
        force.addParticle([])
    return force


@pytest.mark.parametrize(
    ("force", "message"),
    [
        (with_cutoff, "CustomNonbondedForce: a cutoff"),
        (with_groups, "CustomNonbondedForce: interaction groups"),
        (with_table, "CustomNonbondedForce: tabulated functions"),
        (angle, "HarmonicAngleForce: no batched translation"),
        (
            lambda: external("periodicdistance(x,y,z,0,0,0)"),
            "CustomExternalForce: .*unknown function 'periodicdistance'",
        ),
    ],
)
def test_untranslatable_features_are_named(force, message: str) -> None:
    with pytest.raises(Untranslatable, match=message) as caught:
        BatchedEnergy(system_of(force()))
    assert message.startswith(caught.value.force)


def test_a_bad_sample_stays_alone() -> None:
    system = system_of(all_pairs("4*(r^-12-r^-6)"))
    x = configurations(6)
    clean, clean_force = BatchedEnergy(system).energy_and_force(x)
    x[1, 0] = x[1, 2]  # coincident particles
    x[4, 3, 1] = torch.nan
    u, f = BatchedEnergy(system).energy_and_force(x)
    good = torch.tensor([0, 2, 3, 5])
    assert not bool(torch.isfinite(u[[1, 4]]).any())
    assert torch.equal(u[good], clean[good])
    assert torch.equal(f[good], clean_force[good])


def test_chunks_give_what_one_batch_gives(monkeypatch: pytest.MonkeyPatch) -> None:
    system = lennard_jones().system
    x = 2 * configurations(25, 13)
    whole = BatchedEnergy(system).energy_and_force(x)
    monkeypatch.setitem(batched._CHUNK_ELEMENTS, "cpu", 78 * 4)  # 78 pairs: 4 samples at once
    pieces = BatchedEnergy(system).energy_and_force(x)
    for a, b in zip(whole, pieces, strict=True):
        assert torch.allclose(a, b, rtol=1e-13)
    assert BatchedEnergy(system).energy(x[:0]).shape == (0,)
    assert BatchedEnergy(system).energy_and_force(x[:0])[1].shape == (0, 13, 3)


def test_energy_is_differentiable_twice() -> None:
    system = system_of(custom_bonds(), nonbonded())
    x = configurations(1)
    energy = BatchedEnergy(system).energy
    assert torch.autograd.gradcheck(energy, (x.clone().requires_grad_(True),), rtol=1e-4)
    assert torch.autograd.gradgradcheck(energy, (x.clone().requires_grad_(True),), rtol=1e-3)


def test_a_new_force_is_a_new_translator(monkeypatch: pytest.MonkeyPatch) -> None:
    """The seam for molecular forces: nothing but a decorated function."""
    monkeypatch.setattr(batched, "_TRANSLATORS", dict(batched._TRANSLATORS))

    @translates("HarmonicAngleForce")
    def _angle(force: openmm.HarmonicAngleForce, system: openmm.System) -> Term:
        return _Angle([force.getAngleParameters(i) for i in range(force.getNumAngles())])

    class _Angle(Term):
        def __init__(self, rows: list) -> None:
            super().__init__()
            self.rows, self.n_terms = rows, len(rows)

        def forward(self, coordinates: torch.Tensor) -> torch.Tensor:
            energy = coordinates.new_zeros(coordinates.shape[2])
            for i, j, k, theta0, stiffness in self.rows:
                a = coordinates[:, i] - coordinates[:, j]
                b = coordinates[:, k] - coordinates[:, j]
                theta = torch.acos((a * b).sum(0) / (a.norm(dim=0) * b.norm(dim=0)))
                energy = energy + 0.5 * stiffness._value * (theta - theta0._value).square()
            return energy

    system = system_of(angle(), harmonic_bonds())
    x = configurations(10)
    expected_u, expected_f = by_openmm(system, x)
    u, f = BatchedEnergy(system).energy_and_force(x)
    assert torch.allclose(u, expected_u, rtol=1e-11)
    assert torch.allclose(f, expected_f, rtol=1e-9, atol=1e-9)
