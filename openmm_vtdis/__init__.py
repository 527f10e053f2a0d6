"""Unbiased Boltzmann samples from diffusion models, for OpenMM.

Train an equivariant diffusion model on MD of an OpenMM System, tune its reverse covariance so that
importance weights stay flat, and draw weighted samples with exact trajectory weights (VT-DIS).

    >>> from openmm_vtdis import DiffusionBoltzmannGenerator
    >>> gen = DiffusionBoltzmannGenerator.from_pretrained("dw4")
    >>> ensemble = gen.sample(500, n_steps=25, seed=0, progress=False)
    >>> energy = ensemble.expectation(ensemble.reduced_energies)  # reweighted, in kT
    >>> bool(ensemble.diagnostics().pareto_k < 0.7 and energy.stderr < 0.2)
    True
"""

from openmm_vtdis._version import __version__
from openmm_vtdis.ensemble import Estimate, WeightedEnsemble
from openmm_vtdis.generator import DiffusionBoltzmannGenerator
from openmm_vtdis.tuning.tune import TuningReport

__all__ = [
    "DiffusionBoltzmannGenerator",
    "Estimate",
    "TuningReport",
    "WeightedEnsemble",
    "__version__",
]
