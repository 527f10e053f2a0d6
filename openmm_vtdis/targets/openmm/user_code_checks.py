"""Checks that the user's code gives energies and forces of positions alone, in any thread."""

from __future__ import annotations

import logging

import openmm
import torch
from torch import Tensor

from openmm_vtdis.targets.base import same_energy
from openmm_vtdis.targets.openmm.contexts import ContextPool
from openmm_vtdis.targets.openmm.probing import ForceProbe
from openmm_vtdis.targets.openmm.torch_energy import pad
from openmm_vtdis.targets.openmm.user_code import functions_of, user_forces

logger = logging.getLogger(__name__)

_REPEATS = 8
"""Repeats of the configurations, so that threads get into each other's way."""
_STEP, _SINGLE = 1e-4, 1e-5
"""Step along a force in nm; and the least change of an energy, as a share of it, to be judged."""


def check_functions(system: openmm.System, x: Tensor) -> None:
    """Call the functions of PythonForces once, as OpenMM would, which dies of None.

    Raises
    ------
    ValueError
        If one gives something else than an energy and forces. (Exceptions are seen later.)
    """
    functions = functions_of(system)
    if not functions:
        return
    empty = openmm.System()
    for _ in range(system.getNumParticles()):
        empty.addParticle(1.0)
    context = openmm.Context(
        empty, openmm.VerletIntegrator(0.001), openmm.Platform.getPlatformByName("Reference")
    )
    context.setPositions(pad(x)[0].numpy())
    state = context.getState(positions=True)
    for function in functions:
        try:
            found = function(state)
        except Exception as error:
            logger.debug("a PythonForce raises: %s", error)
            continue
        if not isinstance(found, tuple | list) or len(found) != 2 or any(v is None for v in found):
            raise ValueError(
                f"system: expected a PythonForce that gives (energy, forces), got {found!r:.80}"
            )


def check_forces(system: openmm.System, probe: ForceProbe, x: Tensor) -> None:
    """Check that code of the user's gives the forces that belong to its energies.

    The energy has to fall along the force as it says, half or twice as much at most, in the median
    of configurations x (S, M, D), nm: a wrong sign or unit is seen, rounding is not.

    Raises
    ------
    ValueError
        If it does not.
    """
    if not user_forces(system):
        return
    positions = pad(x)
    _, force = probe.energy_and_force(positions)
    size = force.flatten(1).norm(dim=1)[:, None, None]
    step = _STEP * force / size
    ends = [probe.energy_and_force(positions + k * step)[0] for k in (-1.0, 1.0)]
    ratio = (ends[0] - ends[1]) / (2.0 * _STEP * size.flatten())
    ratio = ratio[torch.isfinite(ratio) & (_STEP * size.flatten() > _SINGLE * ends[0].abs())]
    if len(ratio) and not 0.5 < float(ratio.median()) < 2.0:
        raise ValueError(
            f"system: expected forces that are minus the gradient of the energy, got "
            f"{', '.join(user_forces(system))}, whose energy falls along the force "
            f"{float(ratio.median()):.3g} times as much as it says (kJ/mol/nm)"
        )


def check_threads(system: openmm.System, pool: ContextPool, x: Tensor) -> None:
    """Check that a pool of several threads gives the energies of one, if they run user code.

    Parameters
    ----------
    system, pool
        The System that the pool evaluates.
    x
        Configurations (S, M, D), nm.

    Raises
    ------
    ValueError
        If energies differ.
    """
    names = user_forces(system)
    if not names or pool.n_threads == 1:
        return
    many = pad(x).repeat(_REPEATS, 1, 1)
    with ContextPool(system, n_threads=1) as alone:
        expected = alone.energy(many)
    change = (pool.energy(many) - expected).abs()
    if bool((change > same_energy(expected)).any()):
        raise ValueError(
            f"n_threads: expected code that may run in {pool.n_threads} threads, got "
            f"{', '.join(names)}, whose energies then change by up to "
            f"{float(change.nan_to_num().max()):.3g} kJ/mol; leave n_threads out"
        )
