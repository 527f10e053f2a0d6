r"""Checks that frames can be equilibrium samples of a target, before training on them.

Integration by parts gives, for every Boltzmann density that vanishes at infinity::

    < x . grad u > = d,                  d = the dimension of the space,
    < |grad u|^2 > = < laplacian u >.

Frames from another temperature T' have T'/T times the right sides instead; frames in another length
unit, of another force field or of a simulation with constraints are off by as much. The second is
the configurational temperature (Rugh, Phys. Rev. Lett. 78, 772, 1997; Butler et al., J. Chem. Phys.
109, 6519, 1998), which sees the stiffest terms, sharply. The first sees the whole arrangement, and
a density that does not vanish, such as that of a cluster that evaporates; of a molecule with stiff
bonds it is noise, since forces far from the centre of mass count most.
"""

from __future__ import annotations

import logging
import math
from collections.abc import Sequence

import numpy as np
import torch
from torch import Tensor

from openmm_vtdis.targets.base import Target
from openmm_vtdis.targets.evaluation import check_each_alone, energies_of

logger = logging.getLogger(__name__)

_FRAMES = 5_000
_FRAMES_TWICE = 1_000
"""Most frames of the check that needs forces at two more points."""
_STEP = 1e-3
"""Step of a central difference, in units of kT over the root-mean-square force, or of the
root-mean-square coordinate where that is less."""
_BLOCKS = 20
_TOLERANCE = 0.1
_SIGMAS = 5.0
_LARGE = 10.0
"""Root-mean-square coordinate of a frame to be looked at, in units of the median frame's."""
_LOW = 0.05
"""Share of frames below the energy that others are compared with: up to nearly all may be broken,
and a few that were minimised do no harm."""
_EXCESS, _EXCESS_PER_ROOT = 100.0, 22.0
"""Energy above the low one, in kT and in kT per square root of the degrees of freedom, that
equilibrium never reaches."""
_FEW, _NOTICEABLE = 20, 0.5
"""Frames on which exchanges are tried, and the change of energy in kT that is reported."""
_FAR = 10.0
"""A ratio that no temperature explains."""
_STIFF, _RIGID = 0.01, 0.25
"""Spread of a bond's length to be looked at, over the length; and one that is too small, over what
the bond's own stiffness gives with all else at rest."""


def virial_ratio(target: Target, x: Tensor) -> tuple[float, float]:
    """<x . grad u> / d over frames (n, M, D) in nm, 1 in equilibrium, and its standard error.

    The error comes from blocks of consecutive frames, since those of a simulation are correlated.
    """
    _, force = target.reduced_energy_and_force(x)
    values = -(x * target.space.project(force)).sum(dim=(1, 2))
    return _ratio(values, torch.full_like(values, target.space.dim))


def configurational_ratio(target: Target, x: Tensor) -> tuple[float, float]:
    """``< |grad u|^2 > / < laplacian u >`` over frames (n, M, D) in nm, and its standard error.

    T'/T for frames of temperature T'. The Laplacian is estimated without bias: along one Gaussian
    direction a frame, always the same ones, by a central difference of forces.
    """

    def slope(x: Tensor) -> Tensor:
        return -target.space.project(target.reduced_energy_and_force(x)[1])

    directions = target.space.standard_normal(len(x), torch.Generator().manual_seed(0))
    direction = directions.to(x.device)
    gradient = slope(x)
    squares = gradient.square().sum(dim=(1, 2))
    width = (target.space.dim / squares.nanmean()).sqrt()
    step = _STEP * float(torch.minimum(width, x.square().mean().sqrt()))
    change = (slope(x + step * direction) - slope(x - step * direction)) / (2.0 * step)
    return _ratio(squares, (direction * change).sum(dim=(1, 2)))


def _ratio(above: Tensor, below: Tensor) -> tuple[float, float]:
    """<above> / <below> of values (n,) each, in the order of time, and its standard error.

    Frames without finite values are left out. NaN where nothing can be told.
    """
    finite = torch.isfinite(above) & torch.isfinite(below)
    above, below = above[finite], below[finite]
    if len(above) < 2:
        return math.nan, math.nan
    ratio = above.mean() / below.mean()
    rest = ((above - ratio * below) / below.mean()).chunk(min(_BLOCKS, len(above)))
    blocks = torch.stack([block.mean() for block in rest])
    return float(ratio), float(blocks.std()) / math.sqrt(len(blocks))


def _differs(ratio: float, error: float) -> bool:
    """Whether neither the ratio nor its inverse is 1 within its error.

    Frames that happen to miss what is rare and large give a small ratio with too small an error;
    that of its inverse is not.
    """
    if 0.0 < ratio < 1.0:
        error = error / ratio
    return math.isfinite(error) and abs(ratio - 1.0) >= max(_TOLERANCE, _SIGMAS * error)


def check_equilibrium(
    name: str, target: Target, x: Tensor, bonds: Sequence[tuple[int, int]] = ()
) -> None:
    """Refuse frames (n, M, D), nm, that are exploded or rigid; warn of those of another ensemble.

    Messages begin with ``name``.

    Raises
    ------
    ValueError
        See :func:`check_exploded` and :func:`check_flexible`.
    """
    check_exploded(name, target, x)
    check_flexible(name, target, x, bonds)
    checks = (
        ("<|grad u|^2> / <laplacian u>", configurational_ratio, _FRAMES_TWICE),
        ("<x.grad u> / d", virial_ratio, _FRAMES),
    )
    for quantity, estimate, most in checks:
        every = _some_of(len(x), most)
        ratio, error = estimate(target, x[every])
        if not _differs(ratio, error):
            continue
        looks, wanted = "", ""
        if target.temperature is not None:
            wanted = f" ({target.temperature:.4g} K is the target's)"
            looks = f", as if they were at {ratio * target.temperature:.4g} K" if ratio > 0 else ""
        of_energy = "unit of the energy, " if target.runs_user_code else ""
        causes = f"temperature{wanted}, {of_energy}length unit (nm), force field, and that they "
        causes += "were made without constraints"
        if not 0.0 < ratio < _FAR:
            looks, causes = "", "length unit (nm), the order of their atoms, and their force field"
        logger.warning(
            "%s: %s is %.3g ± %.2g over the frames, where equilibrium has exactly 1%s; check their "
            "%s",
            name, quantity, ratio, error, looks, causes,
        )  # fmt: skip
        return


def _some_of(n: int, most: int) -> Tensor:
    """Indices of at most ``most`` of n frames, evenly spaced."""
    return torch.from_numpy(np.linspace(0, n - 1, min(n, most)).astype(np.int64))


def check_exploded(name: str, target: Target, x: Tensor) -> None:
    """Refuse frames (n, M, D), nm, whose energies equilibrium does not have.

    Energies are looked at on up to five thousand frames, and on all that are unusually large.

    Raises
    ------
    ValueError
        If a frame has no finite energy, or one far beyond what equilibrium allows, or most of its
        particles in one place.
    """
    check_apart(name, x)
    check_distinct(name, x)
    check_each_alone(name, target, x)
    size = x.square().mean(dim=(1, 2)).sqrt()
    every = _some_of(len(x), _FRAMES)
    large = torch.nonzero(size > _LARGE * size.median()).flatten()[:_FRAMES]
    index = torch.cat([every, large]).unique()
    energies = energies_of(target, x[index]).cpu()
    finite = torch.isfinite(energies)
    if not bool(finite.all()):
        raise ValueError(
            f"{name}: expected frames of finite energy, got {int((~finite).sum())} of {len(index)} "
            f"without, the first at index {int(index[~finite].min())}; check the length unit (nm) "
            "and the order of the atoms"
        )
    low = float(energies.quantile(_LOW))
    highest = low + _EXCESS + _EXCESS_PER_ROOT * math.sqrt(target.space.dim)
    exploded = energies > highest
    if bool(exploded.any()):
        raise ValueError(
            f"{name}: expected equilibrium frames, got {int(exploded.sum())} of {len(index)} that "
            f"exploded, the first at index {int(index[exploded].min())}, of up to "
            f"{float(energies.max()):.4g} kT where the lowest have less than {low:.4g} kT; "
            "check the length unit (nm) and the order of the atoms, or remove single bad frames"
        )


def check_apart(name: str, x: Tensor) -> None:
    """Refuse frames (n, M, D), nm, in which most particles lie where another one does.

    Raises
    ------
    ValueError
        If there is one, such as an array of zeros that nobody filled, or a damaged file.
    """
    n_particles = x.shape[1]
    ordered = x[:, :, 0].sort(dim=1).values  # particles in one place have this in common
    together = (ordered.diff(dim=1) == 0.0).sum(dim=1)
    bad = [
        k
        for k in torch.nonzero(2 * together > n_particles - 1).flatten().tolist()
        if 2 * len(x[k].unique(dim=0)) <= n_particles
    ]
    if bad:
        raise ValueError(
            f"{name}: expected particles apart, got {len(bad)} of {len(x)} frames in which most of "
            f"them are in one place, the first at index {bad[0]}; was the array filled?"
        )


def check_distinct(name: str, x: Tensor) -> None:
    """Warn of frames (n, M, D) of which most are copies of others."""
    distinct = len({hash(frame.tobytes()) for frame in x.cpu().numpy()})
    if len(x) >= _FEW and 2 * distinct < len(x):
        logger.warning(
            "%s: of %d frames only %d are distinct; errors, and figures of held-out frames, take "
            "copies for more",
            name, len(x), distinct,
        )  # fmt: skip


def check_flexible(name: str, target: Target, x: Tensor, bonds: Sequence[tuple[int, int]]) -> None:
    """Refuse frames (n, M, D), nm, of a simulation that held bonds between particles rigid.

    A bond's length has to vary at least about as much as it would with everything else at rest,
    1 / sqrt(u'') for its own stretching. Fewer than twenty frames are not judged.

    Raises
    ------
    ValueError
        If one varies by less than a quarter of that.
    """
    rigid = []
    for i, j in bonds if len(x) >= _FEW else ():
        lengths = (x[:, i] - x[:, j]).norm(dim=1)
        length, spread = float(lengths.mean()), float(lengths.std())
        if spread < _STIFF * length:
            wanted = _spread_at_rest(target, x, i, j)
            if spread < _RIGID * wanted:
                rigid.append((i, j, length, spread, wanted))
    if rigid:
        i, j, length, spread, wanted = rigid[0]
        raise ValueError(
            f"{name}: expected frames of a simulation without constraints, got {len(rigid)} of "
            f"{len(bonds)} bonds that were held rigid, the first between particles {i} and {j}, of "
            f"{length:.4g} ± {spread:.1g} nm where equilibrium has at least ± {wanted:.1g} nm; run "
            "the MD with constraints=None, rigidWater=False and a time step that bonds allow"
        )


def _spread_at_rest(target: Target, x: Tensor, i: int, j: int) -> float:
    """Standard deviation (nm) of the distance of two particles if nothing else moved.

    It comes from the median second derivative of the energy along it; 0 where that is not positive.
    """
    some = x[:: max(1, len(x) // _FEW)][:_FEW]
    apart = torch.zeros_like(some)
    apart[:, i], apart[:, j] = some[:, i] - some[:, j], some[:, j] - some[:, i]
    size = _STEP * apart[:, i].norm(dim=1)
    energies = [target.reduced_energy(some + k * _STEP / 2.0 * apart) for k in (-1.0, 0.0, 1.0)]
    curvature = (energies[0] - 2.0 * energies[1] + energies[2]) / size.to(energies[0].device) ** 2
    median = float(curvature.nanmedian())
    return 1.0 / math.sqrt(median) if median > 0.0 else 0.0


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
