r"""The learned score as an OpenMM force.

At a noise level sigma the density of the noised target is p_sigma, and a denoiser gives its score,

    s(x) = grad log p_sigma(x) = (D(x, sigma) - x) / sigma^2,

so that kT s is a force: that of the target where sigma is small beside its stiffest degree of
freedom, a smoother one where it is not. A network's score is in general not the gradient of
anything: the force reports the energy zero, and thermostats sample what it leads to; energies,
barostats and Monte Carlo mean nothing with it.

The ``PythonForce`` of OpenMM 8.5 and later works on every platform; serialised, it holds the
network as a pickle, which OpenMM executes on reading: share such XML only with those who trust you.
"""

from __future__ import annotations

import copy
import importlib
import logging
import re

import numpy as np
import openmm
import torch
from openmm import unit
from torch import Tensor, nn

from openmm_vtdis.coordinates import Coordinates
from openmm_vtdis.core import checks
from openmm_vtdis.core.units import nanometers, thermal_energy
from openmm_vtdis.diffusion.denoiser import Denoiser
from openmm_vtdis.generator import DiffusionBoltzmannGenerator

logger = logging.getLogger(__name__)


class Score(nn.Module):
    """Positions (M, 3) in nm -> energy 0 and force kT s (M, 3) in kJ/mol/nm."""

    def __init__(
        self, denoiser: Denoiser, coordinates: Coordinates, level: float, kT: float, n_dims: int
    ) -> None:
        super().__init__()
        self.denoiser, self.coordinates = denoiser, coordinates
        self.level, self.kT, self.n_dims = level, kT, n_dims

    def forward(self, positions: Tensor) -> tuple[Tensor, Tensor]:
        """Energy and force together, as OpenMM's forces need them."""
        x = positions[None, :, : self.n_dims].to(torch.float64)
        space = self.denoiser.space
        z = space.project(self.coordinates.to_model(x)[0])
        level = torch.full((1,), self.level, dtype=torch.float64, device=z.device)
        score = space.project(self.denoiser(z, level) - z) / self.level**2
        force = self.kT * self.coordinates.push_forward(z, score)[0]
        force = nn.functional.pad(force, (0, positions.shape[1] - self.n_dims))
        return torch.zeros((), dtype=force.dtype, device=force.device), force


class ScoreFunction:
    """The function that a ``PythonForce`` calls with a State; can be copied and serialised."""

    def __init__(self, score: Score, device: str) -> None:
        self.score, self.device = score, device

    def __call__(self, state: openmm.State) -> tuple[float, np.ndarray]:
        """Energy in kJ/mol, forces (M, 3) in kJ/mol/nm."""
        x = torch.from_numpy(np.array(state.getPositions(asNumpy=True) / unit.nanometer))
        with torch.no_grad():
            energy, force = self.score(x.to(self.device))
        return float(energy), force.cpu().numpy()


def score_force(
    gen: DiffusionBoltzmannGenerator, sigma: float | unit.Quantity, backend: str = "python"
) -> openmm.Force:
    """kT times the learned score at noise level ``sigma``, for a System of the same particles.

    Parameters
    ----------
    gen
        A trained generator; T is its temperature. Training it further does not change the force.
    sigma
        Noise level, in nm or with a unit of length.
    backend
        "python" for an ``openmm.PythonForce``; "torch" for the ``TorchForce`` of openmm-torch,
        where that is installed.

    Returns
    -------
    openmm.Force
        A force to pass to ``system.addForce``: kJ/mol/nm, with energy zero.

    Raises
    ------
    ValueError
        If the generator has no temperature or is not trained, or sigma is not a positive length.
    ImportError
        If the backend is not installed.
    """
    checks.choice("backend", backend, ("python", "torch"))
    if not isinstance(gen, DiffusionBoltzmannGenerator):
        raise ValueError(
            f"score_force: expected a DiffusionBoltzmannGenerator, got {type(gen).__name__}"
        )
    if gen.coordinates is None or gen.temperature is None:
        raise ValueError("score_force: expected a trained generator of a temperature")
    level = gen.coordinates.noise_level(checks.positive_number("sigma", nanometers(sigma)))
    score = Score(
        copy.deepcopy(gen.denoiser),
        gen.coordinates,
        level,
        thermal_energy(gen.temperature),
        gen.space.n_dims,
    )
    if backend == "torch":
        return _torch_force(score, gen)
    if not hasattr(openmm, "PythonForce"):
        raise ImportError(
            f"score_force: expected OpenMM 8.5 or later for PythonForce, got {openmm.__version__}"
        )
    return openmm.PythonForce(ScoreFunction(score, str(gen.device)))


def _torch_force(score: Score, gen: DiffusionBoltzmannGenerator) -> openmm.Force:
    """A TorchForce of the traced network."""
    try:
        openmmtorch = importlib.import_module("openmmtorch")
    except (ImportError, OSError) as error:
        raise ImportError(
            'score_force: backend="torch" needs openmm-torch, which does not import here '
            f'({error}); see docs/ecosystem.md, or use backend="python"'
        ) from error
    _load_torch_plugins()
    example = torch.randn(gen.space.n_particles, 3, device=gen.device)
    with torch.no_grad():
        traced = torch.jit.trace(score, example)  # type: ignore[no-untyped-call]
    force: openmm.Force = openmmtorch.TorchForce(torch.jit.freeze(traced.eval()))
    force.setOutputsForces(True)  # type: ignore[attr-defined]
    return force


def _load_torch_plugins() -> None:
    """Load the plugins that OpenMM, imported before torch, could not load without torch."""
    failed = re.compile(r"Error loading library (\S*OpenMMTorch\S*):")
    for failure in openmm.Platform.getPluginLoadFailures():
        if found := failed.match(failure):
            try:
                openmm.Platform.loadPluginLibrary(found[1])
            except openmm.OpenMMException as error:  # of a platform that this machine has not
                logger.info("openmm-torch: %s", error)
