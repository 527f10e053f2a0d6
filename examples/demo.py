"""Weighted DW-4 samples from the shipped generator: `make demo`.

Loads "dw4", draws 5,000 weighted samples at 100 steps through the OpenMM System in the archive,
compares the raw and the reweighted mean energy with an independent reference, and writes a NetCDF
file and a picture.
"""

from __future__ import annotations

from pathlib import Path

from matplotlib.figure import Figure

from openmm_vtdis import DiffusionBoltzmannGenerator, Estimate
from openmm_vtdis.plotting import energy_histogram, eta_profile
from openmm_vtdis.targets import sample_hmc

OUTPUT = Path("demo-output")
REFERENCE = Estimate(-22.552, 0.005)
"""<u> of DW-4 in kT, from 160,000 HMC samples of 20,000 independent chains."""


def main() -> None:
    """Run the demonstration."""
    gen = DiffusionBoltzmannGenerator.from_pretrained("dw4")
    ensemble = gen.sample(5_000, seed=0)
    raw = ensemble.with_log_weights(0.0 * ensemble.log_weights).expectation(
        ensemble.reduced_energies
    )
    reweighted = ensemble.expectation(ensemble.reduced_energies)

    print(f"\nDW-4, {gen.kernel.schedule.n_steps} steps")
    print(ensemble.diagnostics())
    print(f"log Z                 {ensemble.log_z()}")
    print(f"<u> raw               {raw} kT   (z = {raw.z(REFERENCE.value, REFERENCE.stderr):+.1f})")
    z = reweighted.z(REFERENCE.value, REFERENCE.stderr)
    print(f"<u> reweighted        {reweighted} kT   (z = {z:+.1f})")
    print(f"<u> reference         {REFERENCE} kT")

    OUTPUT.mkdir(exist_ok=True)
    ensemble.save(OUTPUT / "dw4.nc")
    reference = sample_hmc(gen.target, n_chains=1_000, n_samples=8, burn_in=150, seed=1)
    figure = Figure(figsize=(10, 4), layout="constrained")
    left, right = figure.subplots(1, 2)
    energy_histogram(ensemble, reference.reduced_energies.numpy(), ax=left)
    kernel = gen.kernel
    eta = kernel.covariance.eta(kernel.schedule).numpy()[:, 0]
    eta_profile(kernel.schedule.times[1:], eta, ax=right)
    figure.savefig(OUTPUT / "dw4.png", dpi=150)
    print(f"\nwrote {OUTPUT / 'dw4.png'} and {OUTPUT / 'dw4.nc'}, which mdtraj reads")


if __name__ == "__main__":
    main()
