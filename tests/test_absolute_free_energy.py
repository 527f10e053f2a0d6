"""log Z of the benchmark systems, against annealed importance sampling that knows no network."""

from __future__ import annotations

import math

import pytest
import torch
from torch import Tensor

from openmm_vtdis import DiffusionBoltzmannGenerator
from openmm_vtdis.ensemble import Estimate
from openmm_vtdis.ensemble.diagnostics import log_mean_weight
from openmm_vtdis.targets import OpenMMTarget, double_well, lennard_jones, sample_hmc
from tests.conftest import springs


def annealed(
    target: OpenMMTarget, width: float, step: float, n: int, n_levels: int, n_leapfrog: int = 4
) -> Estimate:
    """log Z by AIS from a zero-CoM Gaussian of this width (nm), whose log Z is known.

    At each level one HMC trajectory, of random length against resonances (Neal 2001).
    """
    space, rng = target.space, torch.Generator().manual_seed(1)
    x = width * space.standard_normal(n, rng)

    def both(y: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        u, force = target.reduced_energy_and_force(y)
        return u, space.project(force), 0.5 * y.square().sum(dim=(1, 2)) / width**2

    def mixed(b: float, f: Tensor, y: Tensor) -> Tensor:
        return b * f - (1.0 - b) * y / width**2

    u, force, harmonic = both(x)
    log_w, before = torch.zeros(n, dtype=torch.float64), 0.0
    for b in torch.linspace(0.0, 1.0, n_levels + 1)[1:].square().tolist():
        log_w += (b - before) * (harmonic - u)
        before = b
        size = step * (0.5 + torch.rand(n, 1, 1, generator=rng, dtype=torch.float64))
        y, f, v = x, force, space.standard_normal(n, rng)
        start = b * u + (1.0 - b) * harmonic + 0.5 * v.square().sum(dim=(1, 2))
        for _ in range(n_leapfrog):
            v = v + 0.5 * size * mixed(b, f, y)
            y = y + size * v
            u_y, f, h_y = both(y)
            v = v + 0.5 * size * mixed(b, f, y)
        end = b * u_y + (1.0 - b) * h_y + 0.5 * v.square().sum(dim=(1, 2))
        taken = torch.rand(n, generator=rng, dtype=torch.float64).log() < start - end
        x = torch.where(taken[:, None, None], y, x)
        force = torch.where(taken[:, None, None], f, force)
        u, harmonic = torch.where(taken, u_y, u), torch.where(taken, h_y, harmonic)
    gaussian = 0.5 * space.dim * math.log(2.0 * math.pi * width**2)
    found = log_mean_weight(log_w.numpy())
    return Estimate(gaussian + found.value, found.stderr)


def test_annealing_knows_the_log_z_of_springs() -> None:
    """The oracle's own test: three harmonic springs, a Gaussian integral."""
    target, exact = springs(300.0)
    found = annealed(target, 0.3, 0.03, 600, 60)
    assert abs(found.z(exact)) < 4.0
    assert found.stderr < 0.1


def test_double_well() -> None:
    gen = DiffusionBoltzmannGenerator.from_pretrained("dw4")
    ais = annealed(double_well().target(), 3.0, 0.15, 1_000, 250)
    ensemble = gen.sample(500, seed=3, progress=False)
    md = sample_hmc(
        gen.target, n_chains=500, n_samples=1, burn_in=200, seed=4, progress=False
    ).positions
    log_v = gen.noise(md, seed=5, progress=False)
    found = ensemble.free_energy(log_v)
    assert ais.stderr < 0.1
    assert abs(found.z(-ais.value, ais.stderr)) < 4.0
    assert abs(Estimate(found.value + 1.0, found.stderr).z(-ais.value, ais.stderr)) > 4.0  # control
    assert abs(found.disagreement) < 4.0
    assert abs(ensemble.free_energy(log_v + 0.2).disagreement) > 4.0  # control
    assert found.stderr < 0.9 * min(found.from_generated.stderr, found.from_target.stderr)
    # each side alone, against annealing at full length (the slow test below, to 0.008)
    log_z = ensemble.log_z()
    assert abs(log_z.z(29.670, 0.008)) < 4.0
    assert abs(Estimate(log_z.value + math.log(1.15), log_z.stderr).z(29.670, 0.008)) > 4.0


@pytest.mark.slow
@pytest.mark.parametrize(
    ("name", "width", "step", "n", "n_levels"),
    [("dw4", 3.0, 0.15, 10_000, 800), ("lj13", 0.7, 0.02, 4_000, 3_000)],
)
def test_to_a_few_hundredths(name: str, width: float, step: float, n: int, n_levels: int) -> None:
    gen = DiffusionBoltzmannGenerator.from_pretrained(name)
    bench = double_well() if name == "dw4" else lennard_jones()
    ais = annealed(bench.target(), width, step, n, n_levels)
    ensemble = gen.sample(3_000, seed=3, progress=False)
    md = sample_hmc(
        gen.target, n_chains=1_000, n_samples=3, burn_in=1_000, thin=20, seed=4, progress=False
    ).positions
    found = ensemble.free_energy(gen.noise(md, seed=5, progress=False))
    print(f"{name}: AIS {ais}, BAR {found}")
    assert ais.stderr < 0.1
    assert abs(found.z(-ais.value, ais.stderr)) < 4.0
