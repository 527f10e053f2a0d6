r"""Whether frames can be equilibrium samples of a target, before anything is trained on them.

Integration by parts gives, for every Boltzmann density that vanishes at infinity,

    < x . grad u > = d,                  d = the dimension of the space.

Frames from another temperature T' have d T'/T instead; frames in another length unit, of another
force field or of a simulation with constraints are off by as much. (A density that does not
vanish, such as that of a cluster that evaporates, is off as well, and has no samples to train on.)
"""

from __future__ import annotations

import logging
import math
from collections.abc import Sequence

import torch
from torch import Tensor

from openmm_vtdis.targets.target import Target

logger = logging.getLogger(__name__)

_FRAMES = 5_000
_BLOCKS = 20
_TOLERANCE = 0.1
_SIGMAS = 5.0
_LARGE = 10.0
"""Root-mean-square coordinate that is worth a look, in units of the median frame's."""
_EXCESS, _EXCESS_PER_ROOT = 100.0, 20.0
"""kT above the median, and per square root of a degree of freedom, that equilibrium never has."""
_FEW, _NOTICEABLE = 20, 0.5
"""Frames on which exchanges are tried, and the change of energy in kT that is reported."""


def virial_ratio(target: Target, x: Tensor) -> tuple[float, float]:
    """<x . grad u> / d over frames (n, M, D) in nm, 1 in equilibrium, and its standard error.

    The error comes from blocks of consecutive frames, since those of a simulation are correlated.
    """
    _, force = target.reduced_energy_and_force(x)
    values = -(x * target.space.project(force)).sum(dim=(1, 2)) / target.space.dim
    blocks = torch.stack([block.mean() for block in values.chunk(min(_BLOCKS, len(values)))])
    return float(values.mean()), float(blocks.std()) / math.sqrt(len(blocks))


def check_equilibrium(name: str, target: Target, x: Tensor) -> None:
    """Refuse frames (n, M, D), nm, that are exploded; warn of frames of another ensemble.

    Messages begin with ``name``.

    Raises
    ------
    ValueError
        As for :func:`check_exploded`.
    """
    check_exploded(name, target, x)
    every = torch.linspace(0, len(x) - 1, min(len(x), _FRAMES)).long().unique()
    ratio, error = virial_ratio(target, x[every])
    if not abs(ratio - 1.0) < max(_TOLERANCE, _SIGMAS * error):
        looks, wanted = "", ""
        if target.temperature is not None:
            wanted = f" ({target.temperature:.4g} K is the target's)"
            looks = f", as if they were at {ratio * target.temperature:.4g} K" if ratio > 0 else ""
        logger.warning(
            "%s: <x.grad u> / d is %.3g ± %.2g over the frames, where equilibrium has exactly "
            "1%s; check their temperature%s, length unit (nm), force field, and that they were "
            "made without constraints",
            name, ratio, error, looks, wanted,
        )  # fmt: skip


def check_exploded(name: str, target: Target, x: Tensor) -> None:
    """Refuse frames (n, M, D), nm, whose energies equilibrium does not have.

    Energies are looked at on up to five thousand frames, and on all that are unusually large.

    Raises
    ------
    ValueError
        If a frame has no finite energy, or one far beyond what equilibrium allows.
    """
    size = x.square().mean(dim=(1, 2)).sqrt()
    every = torch.linspace(0, len(x) - 1, min(len(x), _FRAMES)).long().unique()
    large = torch.nonzero(size > _LARGE * size.median()).flatten()[:_FRAMES]
    index = torch.cat([every, large]).unique()
    energies = target.reduced_energy(x[index]).cpu()
    finite = torch.isfinite(energies)
    if not bool(finite.all()):
        raise ValueError(
            f"{name}: expected frames of finite energy, got {int((~finite).sum())} of {len(index)} "
            f"without, the first at index {int(index[~finite].min())}; check the length unit (nm) "
            "and the order of the atoms"
        )
    highest = energies.median() + _EXCESS + _EXCESS_PER_ROOT * math.sqrt(target.space.dim)
    exploded = energies > highest
    if bool(exploded.any()):
        raise ValueError(
            f"{name}: expected equilibrium frames, got {int(exploded.sum())} of {len(index)} that "
            f"exploded, the first at index {int(index[exploded].min())}, of up to "
            f"{float(energies.max()):.4g} kT where half of them have less than "
            f"{float(energies.median()):.4g} kT; check the length unit (nm) and the order "
            "of the atoms, or remove single bad frames"
        )


def check_exchangeable(target: Target, x: Tensor, pairs: Sequence[tuple[int, int]]) -> None:
    """Warn if exchanging two particles that pass for alike changes the energy of frames (n, M, D).

    Weights stay exact, but the model has a symmetry that the target has not. (The impropers of some
    force fields depend on the order of equivalent atoms; that is far below kT.)
    """
    some = x[:: max(1, len(x) // _FEW)][:_FEW]
    before = target.reduced_energy(some)
    for i, j in pairs:
        exchanged = some.clone()
        exchanged[:, [i, j]] = some[:, [j, i]]
        change = float((target.reduced_energy(exchanged) - before).abs().median())
        if not change < _NOTICEABLE:
            logger.warning(
                "train: particles %d and %d have one label, but exchanging them changes the energy "
                "by %.3g kT; give the topology its bonds, or labels= that tell them apart",
                i, j, change,
            )  # fmt: skip
            return
