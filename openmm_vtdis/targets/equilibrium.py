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

import torch
from torch import Tensor

from openmm_vtdis.targets.target import Target

logger = logging.getLogger(__name__)

_FRAMES = 1_000
_BLOCKS = 20
_TOLERANCE = 0.1
_SIGMAS = 5.0
_EXPLODED = 10.0
"""Root-mean-square coordinate, in units of the median frame's."""


def virial_ratio(target: Target, x: Tensor) -> tuple[float, float]:
    """<x . grad u> / d over frames (n, M, D) in nm, 1 in equilibrium, and its standard error.

    The error comes from blocks of consecutive frames, since those of a simulation are correlated.
    """
    _, force = target.reduced_energy_and_force(x)
    values = -(x * target.space.project(force)).sum(dim=(1, 2)) / target.space.dim
    blocks = torch.stack([block.mean() for block in values.chunk(min(_BLOCKS, len(values)))])
    return float(values.mean()), float(blocks.std()) / math.sqrt(len(blocks))


def check_equilibrium(target: Target, x: Tensor) -> None:
    """Refuse frames (n, M, D), nm, that are exploded; warn of frames of another ensemble.

    Raises
    ------
    ValueError
        If a frame is ten times as large as most, or has no finite energy.
    """
    size = x.square().mean(dim=(1, 2)).sqrt()
    median = float(size.median())
    exploded = torch.nonzero(size > _EXPLODED * median).flatten()
    if len(exploded):
        first = int(exploded[0])
        raise ValueError(
            f"train: expected equilibrium frames, got {len(exploded)} of {len(x)} that exploded, "
            f"the first at index {first}, with a root-mean-square coordinate of "
            f"{float(size[first]):.3g} nm where that of most is {median:.3g} nm; remove them"
        )
    index = torch.linspace(0, len(x) - 1, min(len(x), _FRAMES)).long().unique()
    some = x[index]
    finite = torch.isfinite(target.reduced_energy(some))
    if not bool(finite.all()):
        raise ValueError(
            f"train: expected frames of finite energy, got {int((~finite).sum())} of {len(some)} "
            f"without, the first at index {int(index[~finite.to(index.device)][0])}; check the "
            "length unit (nm) and the order of the atoms"
        )
    ratio, error = virial_ratio(target, some)
    if not abs(ratio - 1.0) < max(_TOLERANCE, _SIGMAS * error):
        looks = ""
        if target.temperature is not None and ratio > 0.0:
            looks = f", as if they were at {ratio * target.temperature:.4g} K"
        logger.warning(
            "train: <x.grad u> / d is %.3g ± %.2g over the frames, where equilibrium has exactly "
            "1%s; check their temperature%s, length unit (nm), force field, and that they were "
            "made without constraints",
            ratio, error, looks,
            "" if target.temperature is None else f" ({target.temperature:.4g} K is the target's)",
        )  # fmt: skip
