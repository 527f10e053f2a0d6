"""Which proposal density log weights are against.

Generated samples and noised frames are two sides of one problem only if one density drew the
former and weighs the latter, with the same network, grid, covariance and units, and if both are
weighed for one Hamiltonian. Both sides carry a digest of all of it, so that mixed ones are an
error, and not a number that is off by many of its errors. (Of a target that is not a System only
the temperature is known.)
"""

from __future__ import annotations

import json
from typing import Any

from torch import Tensor, nn

from openmm_vtdis.diffusion.denoiser import Denoiser
from openmm_vtdis.diffusion.process import DiffusionKernel
from openmm_vtdis.diffusion.schedule import Schedule
from openmm_vtdis.generator.archive import describe_kernel
from openmm_vtdis.model_units import ModelUnits
from openmm_vtdis.networks import is_own
from openmm_vtdis.storage.fingerprint import digest
from openmm_vtdis.targets.openmm.user_code import content_digest


def about_kernel(units: ModelUnits, kernel: DiffusionKernel) -> dict[str, Any]:
    """Notes on samples of a reverse process, as JSON."""
    about = {"method": "reverse SDE", **describe_kernel(kernel)}
    fitted = (kernel.covariance.parameters, kernel.mean_gains)
    proposal = _digest(about, units, kernel.denoiser, *fitted)
    return {**about, **_of(units), "proposal": proposal}


def about_flow(
    units: ModelUnits, denoiser: Denoiser, grid: Schedule, divergence: str, solver: str
) -> dict[str, Any]:
    """Notes on samples of a probability flow, whose density does not depend on the solver."""
    about = {"method": "probability-flow ODE", "times": list(grid.times)}
    density = {"method": about["method"], "ends": [grid.times[0], grid.times[-1]]}
    proposal = _digest(density, units, denoiser)
    about |= {"divergence": divergence, "solver": solver}
    return {**about, **_of(units), "proposal": proposal}


def _of(units: ModelUnits) -> dict[str, Any]:
    """The Hamiltonian that samples are weighted for, if it is known, and the kind of space."""
    found, space = units.target.fingerprint, units.target.space
    known = {} if found is None else {"hamiltonian": found}
    return {**known, "centred": space.centred}


def _digest(about: dict[str, Any], units: ModelUnits, denoiser: Denoiser, *more: Tensor) -> str:
    signs = None if units.handedness is None else units.handedness.signs
    frame = [
        units.length,
        units.target.temperature,
        None if signs is None else list(signs),
        units.target.fingerprint,
    ]
    return digest(json.dumps([about, frame]), _rest_of(denoiser), *_tensors(denoiser), *more)


def _rest_of(denoiser: Denoiser) -> str:
    """What a network of the user's holds beside tensors; "" of the package's own."""
    network = getattr(denoiser, "network", None)
    if not isinstance(network, nn.Module) or is_own(network):
        return ""
    try:
        return content_digest(network)
    except Exception:  # of a class that cannot be pickled: its tensors must do
        return type(network).__qualname__


def _tensors(denoiser: Denoiser) -> list[Tensor]:
    """All numbers that a denoiser is made of."""
    held = denoiser.state_dict() if isinstance(denoiser, nn.Module) else vars(denoiser)
    return [value for _, value in sorted(held.items()) if isinstance(value, Tensor)]
