"""Energies of any target, as weights need them: one number a configuration, whatever happens.

A target of the user's may hold parameters that require gradients, compute in single precision, or
raise an exception for one odd configuration of thousands. That one has no energy then, and no
weight; the others keep theirs.
"""

from __future__ import annotations

import logging
from typing import Any

import torch
from torch import Tensor

from openmm_vtdis.targets.target import OpenMMTarget

logger = logging.getLogger(__name__)


def energies_of(target: Any, x: Tensor) -> Tensor:
    """u(x) in kT: x (B, M, D) nm -> (B,) float64, detached, on the target's device.

    Parameters
    ----------
    target
        Anything with ``reduced_energy(x)``.
    x
        Where that raises an exception for a batch, it is tried in halves; a single configuration
        for which it does has energy NaN.

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
            return target.reduced_energy(x)  # type: ignore[no-any-return]
        except torch.cuda.OutOfMemoryError:
            raise
        except Exception as error:
            if len(x) <= 1:
                failures.append(error)
                return x.new_full((len(x),), torch.nan, dtype=torch.float64)
        half = len(x) // 2
        parts = [_checked(evaluate(part), part) for part in (x[:half], x[half:])]
        return torch.cat(parts)

    with torch.no_grad():
        if isinstance(target, OpenMMTarget):  # looks after single configurations itself
            return target.reduced_energy(x)
        energies = _checked(evaluate(x), x)
    if failures:
        if len(failures) == len(x):
            raise failures[0]
        logger.warning(
            "%d of %d configurations have no energy, and so no weight, since the target raised an "
            "exception; the first: %s: %s",
            len(failures), len(x), type(failures[0]).__name__, failures[0],
        )  # fmt: skip
    return energies


def _checked(energies: Any, x: Tensor) -> Tensor:
    found = torch.as_tensor(energies)
    if tuple(found.shape) != (len(x),) or found.is_complex():
        raise ValueError(
            f"reduced_energy: expected a number for each of {len(x)} configurations, got "
            f"{'complex ones' if found.is_complex() else f'shape {tuple(found.shape)}'}"
        )
    return found.detach().to(torch.float64)
