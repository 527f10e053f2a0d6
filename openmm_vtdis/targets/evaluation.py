"""Energies of any target for weights: one number a configuration, whatever happens.

A target of the user's may hold parameters that require gradients, compute in single precision, or
raise an exception for one odd configuration of thousands. That one has no energy then, and no
weight; the others keep theirs.
"""

from __future__ import annotations

import logging
from typing import Any

import torch
from torch import Tensor

from openmm_vtdis.targets.base import same_energy
from openmm_vtdis.targets.openmm.target import OpenMMTarget

logger = logging.getLogger(__name__)

_FEW = 8


class EnergyError(ValueError):
    """Raised if a target does not give a number for each configuration."""


def energies_of(target: Any, x: Tensor) -> Tensor:
    """u(x) in kT: x (B, M, D) nm -> (B,) float64, detached, on the target's device.

    Parameters
    ----------
    target
        Anything with ``reduced_energy(x)``.
    x
        Configurations (B, M, D). Where the energy raises an exception for a batch, it is tried in
        halves; a single configuration for which it does has energy NaN.

    Raises
    ------
    ValueError
        If the target gives something else than a number for each configuration.
    Exception
        The target's own, if it raises one for every configuration, or a GPU's memory is full.
    """
    failures: list[Exception] = []

    def evaluate(x: Tensor) -> Tensor:
        try:
            return _checked(target.reduced_energy(x.clone()), x)  # which it may write to
        except (torch.cuda.OutOfMemoryError, EnergyError):
            raise
        except Exception as error:
            if len(x) <= 1:
                failures.append(error)
                return x.new_full((len(x),), torch.nan, dtype=torch.float64)
        half = len(x) // 2
        return torch.cat([evaluate(x[:half]), evaluate(x[half:])])

    with torch.no_grad():
        if isinstance(target, OpenMMTarget):  # looks after single configurations itself
            return target.reduced_energy(x)
        energies = evaluate(x)
    if failures:
        if len(failures) == len(x):
            raise failures[0]
        logger.warning(
            "%d of %d configurations have no energy, and so no weight, since the target raised an "
            "exception; the first: %s: %s",
            len(failures), len(x), type(failures[0]).__name__, failures[0],
        )  # fmt: skip
    return energies


def check_each_alone(name: str, target: Any, x: Tensor) -> None:
    """Check on a few of (n, M, D) that an energy is a function of its configuration alone.

    An OpenMM System was checked when its target was built.

    Raises
    ------
    ValueError
        If it changes with what else is in the batch, or between two calls.
    """
    if isinstance(target, OpenMMTarget):
        return
    some = x[:: max(1, len(x) // _FEW)][:_FEW]
    together = energies_of(target, some)
    again = torch.cat([energies_of(target, part) for part in some.flip(0).split(3)]).flip(0)
    comparable = torch.isfinite(together) & torch.isfinite(again)
    change = torch.where(comparable, again - together, 0.0).abs()
    if bool((change > same_energy(together)).any()):
        raise ValueError(
            f"{name}: expected an energy that depends on its configuration alone, got one that "
            f"changed by {float(change.max()):.3g} kT with the batch it was in, or between calls "
            "(a network in training mode?)"
        )


def _checked(energies: Any, x: Tensor) -> Tensor:
    if not isinstance(energies, Tensor):
        raise EnergyError(f"reduced_energy: expected a torch tensor, got {type(energies).__name__}")
    found = energies.reshape(1) if energies.ndim == 0 and len(x) == 1 else energies
    if tuple(found.shape) != (len(x),) or found.is_complex():
        raise EnergyError(
            f"reduced_energy: expected a number for each of {len(x)} configurations, got "
            f"{'complex ones' if found.is_complex() else f'shape {tuple(found.shape)}'}"
        )
    return found.detach().to(torch.float64, copy=True)
