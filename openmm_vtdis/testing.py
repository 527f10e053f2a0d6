"""Contract checks for targets and coordinates of your own.

    >>> from openmm_vtdis.targets import gaussian_mixture
    >>> from openmm_vtdis.testing import check_target
    >>> target = gaussian_mixture(dim=10)  # or one of your own
    >>> check_target(target, target.sample(8, seed=0))  # sane configurations (B, M, D) in nm

A check returns None, or raises an AssertionError that says what was expected and what came.
"""

from __future__ import annotations

import math
from collections.abc import Sequence

import torch
from torch import Tensor

from openmm_vtdis.coordinates import Coordinates, ModelEnergy, TorchEnergy
from openmm_vtdis.core import checks
from openmm_vtdis.core.derivatives import differentiation
from openmm_vtdis.core.rng import Seed, make_rng
from openmm_vtdis.core.space import Space, random_rotations
from openmm_vtdis.targets.base import Target

_DIFFERENCE_STEP = 1e-5
_DIRECTIONS = 4


def check_target(
    target: Target,
    x: Tensor,
    *,
    symmetries: Sequence[str] | None = None,
    rtol: float = 1e-5,
    seed: Seed = 0,
) -> None:
    """Check that ``target`` keeps the contract of :class:`~openmm_vtdis.targets.Target`.

    Parameters
    ----------
    target
        The target to try.
    x
        At least two configurations (B, M, D), nm, away from singularities of the energy.
    symmetries
        Symmetries that the energy should have, of "translation", "rotation" and "permutation".
        None: the first two on a centred space, none otherwise.
    rtol
        Relative tolerance of energies and of finite-difference forces. (An energy in single
        precision needs a larger one.)
    seed
        Seed of the random motions and directions.

    Raises
    ------
    AssertionError
        If the contract is broken.
    ValueError
        If ``x`` is not usable.
    """
    space = target.space
    x = checks.configurations("x", x, space.n_particles, space.n_dims, minimum=2)
    x = space.project(x)
    rng = make_rng(seed)
    energy = target.reduced_energy(x)
    _expect_shape("reduced_energy(x)", energy, (len(x),), x)
    if not bool(torch.isfinite(energy).all()):
        raise ValueError("x: expected configurations of finite energy")
    scale = energy.abs() + 1.0

    _check_batches(target, x, energy, rtol * scale)
    _check_forces(target, x, energy, rtol, rng)
    if symmetries is None:
        symmetries = ("translation", "rotation") if space.centred else ()
    for symmetry in symmetries:
        moved = _move(symmetry, x, rng)
        change = (target.reduced_energy(moved) - energy).abs()
        _expect(
            bool((change <= rtol * scale).all()),
            f"expected an energy invariant under {symmetry}, got a change of "
            f"{float(change.max()):.3g} kT",
        )
    _check_nan(target, x, energy, rtol * scale)


def check_coordinates(
    coordinates: Coordinates, target: Target, x: Tensor, *, rtol: float = 1e-6
) -> None:
    """Check that coordinates are a bijection with the right log-determinant and gradients.

    Parameters
    ----------
    coordinates
        The coordinates to try, differentiable in both directions.
    target
        Target of the configurations, with an energy of torch operations.
    x
        Configurations (B, M, D), nm, in the domain of the target.
    rtol
        Relative tolerance.

    Raises
    ------
    AssertionError
        If the contract is broken.
    """
    x = target.space.project(x.to(torch.float64))
    z, log_det = coordinates.to_model(x)
    found = coordinates.to_configurations(z)
    size = float(x.abs().max())
    _expect(
        bool(found.inside.all()) and bool(((found.x - x).abs() <= rtol * size).all()),
        "expected to_configurations to undo to_model, got configurations that are off by "
        f"{float((found.x - x).abs().max()):.3g} nm",
    )
    _expect(
        bool(((found.log_det - log_det).abs() <= 10.0 * rtol).all()),
        "expected one log_det of a configuration and its coordinates, got others",
    )
    folds = math.log(2.0) if coordinates.handedness is not None else 0.0
    volume = torch.stack([_log_volume(coordinates, target.space, frame) for frame in z]) - folds
    _expect(
        bool(((volume - log_det).abs() <= 1e3 * rtol).all()),
        "expected log_det to be the log of the volume dx/dz, got a difference of "
        f"{float((volume - log_det).abs().max()):.3g}",
    )
    energy = ModelEnergy(target, coordinates)
    exact, given = TorchEnergy(energy).gradient(z), energy.gradient(z)
    _expect(
        _close(given, exact, rtol),
        "expected pull_back to give the gradient of u(x(z)) - log_det, got a difference of "
        f"{float((given - exact).abs().max()):.3g}",
    )

    def log_density(x: Tensor) -> Tensor:
        """Log density of x if z is a standard Gaussian."""
        z, log_det = coordinates.to_model(x)
        return -0.5 * z.square().sum(dim=(1, 2)) - log_det

    exact = target.space.project(TorchEnergy(log_density).gradient(x))
    given = target.space.project(coordinates.push_forward(z, -z))
    _expect(
        _close(given, exact, rtol),
        "expected push_forward to give the gradient of a log density in nm, got a difference of "
        f"{float((given - exact).abs().max()):.3g}",
    )


def _log_volume(coordinates: Coordinates, space: Space, z: Tensor) -> Tensor:
    """log sqrt det J^T J, J = dx/dz in reduced coordinates, of one z (M, D)."""
    model = coordinates.space

    def function(reduced: Tensor) -> Tensor:
        y = model.expand(reduced.reshape(1, model.rank, model.n_dims))
        return space.reduce(coordinates.to_configurations(y).x).flatten()

    with differentiation():
        jacobian: Tensor = torch.autograd.functional.jacobian(function, model.reduce(z).flatten())
    return 0.5 * torch.linalg.slogdet(jacobian.mT @ jacobian).logabsdet


def _close(given: Tensor, exact: Tensor, rtol: float) -> bool:
    scale = float(exact.abs().max()) + 1.0
    return bool(((given - exact).abs() <= 10.0 * rtol * scale).all())


def _check_batches(target: Target, x: Tensor, energy: Tensor, tolerance: Tensor) -> None:
    single = torch.cat([target.reduced_energy(frame[None]) for frame in x])
    _expect(
        bool(((single - energy).abs() <= tolerance).all()),
        "expected the energies of a batch to be those of its samples one by one, got a difference "
        f"of {float((single - energy).abs().max()):.3g} kT",
    )
    _expect_shape("reduced_energy of an empty batch", target.reduced_energy(x[:0]), (0,), x)
    _expect_shape("reduced_energy of float32", target.reduced_energy(x.float()), (len(x),), x)


def _check_forces(
    target: Target, x: Tensor, energy: Tensor, rtol: float, rng: torch.Generator
) -> None:
    again, force = target.reduced_energy_and_force(x)
    _expect_shape("the energy of reduced_energy_and_force(x)", again, (len(x),), x)
    _expect_shape("the force of reduced_energy_and_force(x)", force, tuple(x.shape), x)
    _expect(
        bool(((again - energy).abs() <= rtol * (energy.abs() + 1.0)).all()),
        "expected reduced_energy and reduced_energy_and_force to agree, got a difference of "
        f"{float((again - energy).abs().max()):.3g} kT",
    )
    scale = force.flatten(1).norm(dim=1) + 1.0
    for _ in range(_DIRECTIONS):
        direction = torch.randn(x.shape, generator=rng, dtype=torch.float64)
        direction = target.space.project(
            direction / direction.flatten(1).norm(dim=1)[:, None, None]
        )
        step = _DIFFERENCE_STEP * direction
        rise = target.reduced_energy(x + step) - target.reduced_energy(x - step)
        slope = rise / (2.0 * _DIFFERENCE_STEP)
        error = (slope + (force * direction).sum(dim=(1, 2))).abs()
        worst = int((error / scale).argmax())
        _expect(
            bool((error <= 10.0 * rtol * scale).all()),
            f"expected force = -gradient; along a random direction the energy of sample {worst} "
            f"rises by {float(slope[worst]):.9g} kT/nm but the force gives "
            f"{-float((force * direction).sum(dim=(1, 2))[worst]):.9g}",
        )


def _check_nan(target: Target, x: Tensor, energy: Tensor, tolerance: Tensor) -> None:
    broken = x.clone()
    broken[0, 0, 0] = torch.nan
    for name, values in (
        ("reduced_energy", target.reduced_energy(broken)),
        ("reduced_energy_and_force", target.reduced_energy_and_force(broken)[0]),
    ):
        _expect(
            bool(torch.isnan(values[0])),
            f"expected energy NaN for a sample with a NaN coordinate, got {float(values[0])} "
            f"from {name}",
        )
        _expect(
            bool(((values - energy).abs() <= tolerance)[1:].all()),
            f"expected a NaN in one sample to leave the others alone, got other values from {name}",
        )


def _move(symmetry: str, x: Tensor, rng: torch.Generator) -> Tensor:
    if symmetry == "translation":
        shift = torch.randn(len(x), 1, x.shape[2], generator=rng, dtype=torch.float64)
        return x + shift
    if symmetry == "rotation":
        return x @ random_rotations(len(x), x.shape[2], rng)
    if symmetry == "permutation":
        return x[:, torch.randperm(x.shape[1], generator=rng)]
    raise ValueError(
        f"symmetries: expected 'translation', 'rotation' or 'permutation', got {symmetry!r}"
    )


def _expect_shape(name: str, value: object, shape: tuple[int, ...], x: Tensor) -> None:
    _expect(isinstance(value, Tensor), f"{name}: expected a tensor, got {type(value).__name__}")
    if isinstance(value, Tensor):
        _expect(
            tuple(value.shape) == shape, f"{name}: expected shape {shape}, got {tuple(value.shape)}"
        )
        _expect(value.dtype == torch.float64, f"{name}: expected torch.float64, got {value.dtype}")
        _expect(value.device == x.device, f"{name}: expected device {x.device}, got {value.device}")


def _expect(condition: bool, message: str) -> None:
    if not condition:
        raise AssertionError(message)
