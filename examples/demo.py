"""Weighted samples from the shipped generators, DW-4 and alanine dipeptide: `make demo`.

Draws weighted samples through the OpenMM System in each archive, compares the raw and the
reweighted mean energy with an independent reference, and writes NetCDF files and a picture.
"""

from __future__ import annotations

from pathlib import Path

import mdtraj
from matplotlib.axes import Axes
from matplotlib.figure import Figure

from openmm_vtdis import DiffusionBoltzmannGenerator, Estimate, WeightedEnsemble
from openmm_vtdis.mcmc import sample_hmc
from openmm_vtdis.plotting import energy_histogram, ramachandran, weight_distribution

OUTPUT = Path("demo-output")
REFERENCES = {
    # <u> in kT from Hamiltonian Monte Carlo: 160,000 samples of 20,000 chains, 23,545 of 100
    "dw4": Estimate(-22.552, 0.005),
    "aldp-800K": Estimate(3.536, 0.088),
}


def draw(
    name: str, n: int, n_steps: int | None
) -> tuple[DiffusionBoltzmannGenerator, WeightedEnsemble]:
    """Sample, report, and write a file that mdtraj reads."""
    reference = REFERENCES[name]
    gen = DiffusionBoltzmannGenerator.from_pretrained(name)
    ensemble = gen.sample(n, n_steps=n_steps, seed=0)
    raw = ensemble.unweighted()
    print(f"\n{name}, {n_steps or gen.process.schedule.n_steps} steps")
    print(ensemble.diagnostics())
    print(f"log Z                 {ensemble.log_z()}")
    for label, weighted in (("raw", raw), ("reweighted", ensemble)):
        energy = weighted.expectation(ensemble.reduced_energies)
        z = energy.z(reference.value, reference.stderr)
        print(f"<u> {label:<17} {energy} kT   ({z:+.1f} standard errors from the reference)")
    print(f"<u> reference         {reference} kT\n")
    ensemble.save(OUTPUT / f"{name}.nc")
    return gen, ensemble


def draw_double_well(
    left: Axes, right: Axes, n: int, n_steps: int | None, n_chains: int, burn_in: int
) -> None:
    """Draw energies beside Hamiltonian Monte Carlo, and the weights, which tuning makes flat."""
    gen, ensemble = draw("dw4", n, n_steps)
    reference = sample_hmc(gen.target, n_chains=n_chains, n_samples=8, burn_in=burn_in, seed=1)
    energy_histogram(ensemble, reference.reduced_energies.numpy(), ax=left, bins=40)
    weight_distribution(ensemble, ax=right)
    left.set_title("DW-4: energies")
    right.set_title("DW-4: weights")


def draw_alanine(left: Axes, right: Axes, n: int, n_steps: int | None) -> None:
    """Draw energies, and the Ramachandran map of the weighted samples."""
    _, ensemble = draw("aldp-800K", n, n_steps)
    energy_histogram(ensemble, ax=left, bins=20)
    left.set_title("alanine dipeptide, 800 K: energies")
    traj = ensemble.to_mdtraj()
    phi, psi = (f(traj)[1][:, 0] for f in (mdtraj.compute_phi, mdtraj.compute_psi))
    ramachandran(phi, psi, ensemble.weights, ax=right, bins=18, depth=6.0)
    right.set_title("alanine dipeptide, reweighted")


def main(
    n_double_well: int = 2_000,
    n_alanine: int = 500,
    n_steps: int | None = None,
    n_chains: int = 1_000,
    burn_in: int = 2_000,
) -> None:
    """Run the demonstration; without a number of steps each takes those that it is tuned for."""
    OUTPUT.mkdir(exist_ok=True)
    figure = Figure(figsize=(10, 8), layout="constrained")
    axes = figure.subplots(2, 2)
    draw_double_well(*axes[0], n_double_well, n_steps, n_chains, burn_in)
    draw_alanine(*axes[1], n_alanine, n_steps)
    figure.savefig(OUTPUT / "demo.png", dpi=150)
    print(f"wrote {OUTPUT / 'demo.png'} and {OUTPUT}/*.nc, which mdtraj reads")


if __name__ == "__main__":
    main()
