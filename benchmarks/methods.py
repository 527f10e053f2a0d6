"""The methods that tables compare, by name: how each is fitted, and on which grid."""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True)
class Method:
    """A way to fit a diffusion process: objective, family, whether the mean is fitted, and grid.

    ``laplace``: with the Laplace approximation at low noise, and its jump. ``carried``: tuned at
    one number of steps only, and carried over to the others.
    """

    objective: str = "alpha2"
    family: str = "isotropic"
    tune_mean: bool = False
    grid: str = "geometric"
    laplace: bool = False
    carried: bool = False


METHODS: dict[str, Method] = {
    "DDPM + IS": Method("ddpm"),
    "isotropic, KL": Method("kl"),
    "isotropic, alpha = 2": Method(),
    "isotropic and mean, alpha = 2": Method(tune_mean=True),
    "time network, alpha = 2": Method(family="time-network", carried=True),
    "diagonal, alpha = 2": Method(family="diagonal"),
    "full, alpha = 2": Method(family="full"),
    "isotropic, adaptive grid": Method(grid="adaptive"),
    "isotropic, adaptive grid, tuned at 100": Method(grid="adaptive", carried=True),
    "hessian": Method(family="hessian", grid="adaptive", laplace=True),
    "pairwise": Method(family="pairwise", grid="adaptive", laplace=True),
    "pairwise, tuned at 100": Method(
        family="pairwise", grid="adaptive", laplace=True, carried=True
    ),
    "pairwise, no Laplace": Method(family="pairwise", grid="adaptive"),
    "pairwise, geometric grid": Method(family="pairwise"),
    "tweedie": Method(family="tweedie", grid="adaptive", laplace=True),
    "tweedie, no Laplace": Method(family="tweedie", grid="adaptive"),
}
AS_SHIPPED = "as shipped"
"""Label of the archive's own tuning, carried over to other numbers of steps."""
ISOTROPIC = tuple(METHODS)[:5]
"""Methods for a shipped generator, unless others are named."""
MIXTURE = ("DDPM + IS", "isotropic, KL", "isotropic, alpha = 2", *tuple(METHODS)[5:7])
"""Methods for a Gaussian mixture."""
OWN_STATISTICS = ("diagonal", "full", "hessian", "pairwise", "tweedie")
"""Families that need a pass of their own; the others share the three numbers a step."""
CARRIED_FROM = 100
"""Number of steps of a tuning that is carried over to all others."""
