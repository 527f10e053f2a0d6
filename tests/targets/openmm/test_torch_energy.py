"""Every translation against plain OpenMM, and every feature without one."""

from __future__ import annotations

import itertools
from collections.abc import Callable, Sequence

import openmm
import pytest
import torch

from openmm_vtdis.core.derivatives import differentiate_twice
from openmm_vtdis.targets import Target, lennard_jones
from openmm_vtdis.targets.openmm import terms, torch_energy
from openmm_vtdis.targets.openmm.term_geometry import distance
from openmm_vtdis.targets.openmm.terms import Sum, Term, Untranslatable, translates
from openmm_vtdis.targets.openmm.torch_energy import BatchedEnergy
from tests.targets.reference import (
    all_pairs,
    bonds,
    by_openmm,
    configurations,
    external,
    many_body,
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
    gradient, hessian = BatchedEnergy(system).derivatives(x)
    _, expected_h = differentiate_twice(BatchedEnergy(system).energy, x)
    assert torch.allclose(gradient, -f, rtol=1e-11, atol=1e-10)
    assert torch.allclose(hessian, expected_h, rtol=1e-11, atol=1e-9)


def test_forces_add_up() -> None:
    system = system_of(harmonic_bonds(), custom_bonds(), nonbonded(), openmm.CMMotionRemover())
    x = configurations(10)
    assert torch.allclose(BatchedEnergy(system).energy(x), by_openmm(system, x)[0], rtol=1e-12)


def test_no_forces() -> None:
    u, f = BatchedEnergy(system_of()).energy_and_force(configurations(3))
    assert u.tolist() == [0.0, 0.0, 0.0]
    assert not bool(f.any())
    gradient, hessian = BatchedEnergy(system_of()).derivatives(configurations(3))
    assert hessian.shape == (3, 4, 3, 4, 3)
    assert not bool(gradient.any() or hessian.any())


def with_cutoff() -> openmm.Force:
    force = nonbonded()
    force.setNonbondedMethod(openmm.CustomNonbondedForce.CutoffNonPeriodic)
    return force


def periodic_bonds() -> openmm.Force:
    force = harmonic_bonds()
    force.setUsesPeriodicBoundaryConditions(True)
    return force


def with_a_surface() -> openmm.Force:
    force = openmm.CustomNonbondedForce("table(r,r)")
    table = openmm.Continuous2DFunction(2, 2, [0.0, 1.0, 1.0, 2.0], 0.0, 5.0, 0.0, 5.0)
    force.addTabulatedFunction("table", table)
    for _ in range(4):
        force.addParticle([])
    return force


def named_like_a_point() -> openmm.Force:
    force = openmm.CustomCompoundBondForce(2, "p1*distance(p1,p2)")
    force.addPerBondParameter("p1")
    force.addBond([0, 1], [2.0])
    return force


def named_like_a_side() -> openmm.Force:
    force = nonbonded()
    force.addGlobalParameter("e1", 1.0)
    return force


def with_a_table_named_select() -> openmm.Force:
    force = openmm.CustomCompoundBondForce(2, "select(distance(p1,p2))")
    force.addTabulatedFunction("select", openmm.Continuous1DFunction([0.0, 1.0, 2.0], 0.0, 5.0))
    force.addBond([0, 1], [])
    return force


def without_direct_space() -> openmm.Force:
    force = openmm.NonbondedForce()
    for _ in range(4):
        force.addParticle(0.1, 0.3, 1.0)
    force.setIncludeDirectSpace(False)
    return force


@pytest.mark.parametrize(
    ("force", "message"),
    [
        (named_like_a_point, "CustomCompoundBondForce: two variables named 'p1'"),
        (named_like_a_side, "CustomNonbondedForce: two variables named 'e1'"),
        (with_a_table_named_select, "CustomCompoundBondForce: a tabulated function named 'select'"),
        (without_direct_space, "NonbondedForce: no direct space"),
        (with_cutoff, "CustomNonbondedForce: a cutoff"),
        (periodic_bonds, "HarmonicBondForce: periodic boundary conditions"),
        (with_a_surface, "CustomNonbondedForce: a tabulated function .*Continuous2DFunction"),
        (many_body, "CustomManyParticleForce: no batched translation"),
        (
            lambda: external("periodicdistance(x,y,z,0,0,0)"),
            "CustomExternalForce: periodic boundary conditions",
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
    gradient, hessian = BatchedEnergy(system).derivatives(x)
    assert torch.allclose(gradient[good], -clean_force[good], rtol=1e-12)
    bad = torch.tensor([1, 4])
    assert torch.isfinite(hessian[good]).all()
    assert not torch.isfinite(hessian[bad]).flatten(1).all(dim=1).any()


def test_a_constant_has_no_slope_even_where_particles_coincide() -> None:
    x = configurations(2)
    x[0, 0] = x[0, 1]
    found = BatchedEnergy(system_of(bonds("3"))).derivatives(x)
    assert not any(bool(part.any()) for part in found)


def test_derivatives_are_there_in_inference_mode() -> None:
    energy = BatchedEnergy(system_of(custom_bonds(), nonbonded()))
    target = lennard_jones().target()
    cloud = 2 * configurations(3, 13)
    expected = (*energy.energy_and_force(cloud[:, :4]), *energy.derivatives(cloud[:, :4]))
    default = (*Target.reduced_energy_and_force(target, cloud), *Target.derivatives(target, cloud))
    with torch.inference_mode():
        x = cloud.clone()
        found = (*energy.energy_and_force(x[:, :4]), *energy.derivatives(x[:, :4]))
        again = (*Target.reduced_energy_and_force(target, x), *Target.derivatives(target, x))
    for a, b in zip((*found, *again), (*expected, *default), strict=True):
        assert torch.equal(a, b)
        assert bool(a.any())


def test_chunks_give_what_one_batch_gives(monkeypatch: pytest.MonkeyPatch) -> None:
    system = lennard_jones().system
    x = 2 * configurations(25, 13)
    energy = BatchedEnergy(system)
    whole = (*energy.energy_and_force(x), *energy.derivatives(x))
    monkeypatch.setitem(torch_energy._CHUNK_ELEMENTS, "cpu", 78 * 4)  # 78 pairs: 4 samples at once
    pieces = (*energy.energy_and_force(x), *energy.derivatives(x))
    for a, b in zip(whole, pieces, strict=True):
        assert torch.allclose(a, b, rtol=1e-13)
    assert BatchedEnergy(system).energy(x[:0]).shape == (0,)
    assert BatchedEnergy(system).energy_and_force(x[:0])[1].shape == (0, 13, 3)
    assert BatchedEnergy(system).derivatives(x[:0])[1].shape == (0, 13, 3, 13, 3)


def test_chunks_that_do_not_fit_into_a_gpu_are_halved(monkeypatch: pytest.MonkeyPatch) -> None:
    system = lennard_jones().system
    x = 2 * configurations(25, 13)
    energy = BatchedEnergy(system)
    expected = (energy.energy(x), *energy.energy_and_force(x), *energy.derivatives(x))
    (term,), room, sizes = energy.terms, 4, []

    def smaller(work: Callable[..., object]) -> Callable[..., object]:
        def limited(coordinates: torch.Tensor, *more: object) -> object:
            sizes.append(coordinates.shape[2])
            if sizes[-1] > room:
                raise torch.cuda.OutOfMemoryError("out of memory")
            return work(coordinates, *more)

        return limited

    monkeypatch.setattr(term, "forward", smaller(term.forward))
    monkeypatch.setattr(term, "add_derivatives", smaller(term.add_derivatives))
    found = (energy.energy(x), *energy.energy_and_force(x), *energy.derivatives(x))
    assert sizes[:4] == [25, 12, 6, 3]
    assert sum(size for size in sizes if size <= room) == 3 * 25
    for a, b in zip(expected, found, strict=True):
        assert torch.allclose(a, b, rtol=1e-13)
    room = 0
    with pytest.raises(torch.cuda.OutOfMemoryError):
        energy.energy(x)


def test_energy_is_differentiable_twice() -> None:
    system = system_of(custom_bonds(), nonbonded())
    x = configurations(1)
    energy = BatchedEnergy(system).energy
    assert torch.autograd.gradcheck(energy, (x.clone().requires_grad_(True),), rtol=1e-4)
    assert torch.autograd.gradgradcheck(energy, (x.clone().requires_grad_(True),), rtol=1e-3)


def test_a_new_force_is_a_new_translator(monkeypatch: pytest.MonkeyPatch) -> None:
    """The seam: nothing but a decorated function."""
    monkeypatch.setattr(terms, "_TRANSLATORS", dict(terms._TRANSLATORS))

    @translates("CustomManyParticleForce")
    def _triples(force: openmm.CustomManyParticleForce, system: openmm.System) -> Term:
        triples = itertools.combinations(range(force.getNumParticles()), 3)

        def energy(points: Sequence[torch.Tensor], parameters: dict) -> torch.Tensor:
            a, b, c = points
            return 0.1 * (distance(a, b) + distance(b, c) + distance(a, c)).square()

        return Sum(list(triples), energy, {})

    system = system_of(many_body(), harmonic_bonds())
    x = configurations(10)
    expected_u, expected_f = by_openmm(system, x)
    u, f = BatchedEnergy(system).energy_and_force(x)
    assert torch.allclose(u, expected_u, rtol=1e-11)
    assert torch.allclose(f, expected_f, rtol=1e-9, atol=1e-9)
