r"""Fitting the reverse covariance from one pass of forward trajectories.

The log weight of a forward trajectory is a part that does not depend on the covariance plus the
family's cost, log w_i = b_i + c_i(phi), with c_i = -sum_n log p(x_{n-1} | x_n) a function of the
sufficient statistics alone. The objectives are::

    alpha = 2   log mean_i exp(log w_i)     minimised where the forward ESS is largest (Eq. 10)
    KL          mean_i log w_i              (alpha = 1)

Both are convex in the precision for the isotropic, diagonal and block families, because c_i is
convex and log-mean-exp is convex and non-decreasing. L-BFGS then finds the global optimum in a
second, from statistics that were collected once; :func:`fit_sgd` is the paper's own procedure
(Algorithm 1), thousands of steps with fresh trajectories, kept for comparison.

The mean coefficients k_n are fitted together with an isotropic covariance: with a = x_{n-1} - x_n
and b = D - x_n, the cost
``lambda |a|^2 - 2 kappa <a, b> + (kappa^2 / lambda) |b|^2``, kappa = lambda k, is jointly convex in
(lambda, kappa).
"""

from __future__ import annotations

import math
import time
from collections.abc import Callable
from dataclasses import dataclass
from typing import Generic, Self, TypeVar

import numpy as np
import torch
from scipy.optimize import minimize
from torch import Tensor

from openmm_vtdis.core import checks
from openmm_vtdis.diffusion.covariance import Fittable, ReverseStep
from openmm_vtdis.diffusion.covariance.base import roughness
from openmm_vtdis.diffusion.schedule import Schedule
from openmm_vtdis.runtime.progress import progress_bar

OBJECTIVES = ("alpha2", "kl")
F = TypeVar("F", bound=Fittable)


@dataclass(frozen=True)
class Trajectories:
    """Forward trajectories, reduced to what a fit needs.

    Attributes
    ----------
    base
        (S,) b_i = -u(x_0) + sum log q - log p(x_N), plus the log-determinant of the coordinates.
    statistics
        (S, N, F) sufficient statistics of the family to be fitted.
    """

    base: Tensor
    statistics: Tensor

    def __getitem__(self, index: slice | Tensor) -> Trajectories:
        return Trajectories(self.base[index], self.statistics[index])

    def __len__(self) -> int:
        return len(self.base)


@dataclass(frozen=True)
class Fit(Generic[F]):
    """Result of a fit.

    Attributes
    ----------
    fitted
        The family with fitted parameters.
    objective
        Value on the trajectories it was fitted to.
    n_iterations, seconds
        Optimiser iterations and wall time.
    """

    fitted: F
    objective: float
    n_iterations: int
    seconds: float


def objective_value(log_weights: Tensor, objective: str) -> Tensor:
    """Objective of log weights (S,): log mean w ("alpha2") or mean log w ("kl")."""
    checks.choice("objective", objective, OBJECTIVES)
    if objective == "kl":
        return log_weights.mean()
    return torch.logsumexp(log_weights, dim=0) - math.log(len(log_weights))


def log_weights(covariance: Fittable, trajectories: Trajectories, schedule: Schedule) -> Tensor:
    """Log weights (S,) of forward trajectories under a fitted covariance."""
    return trajectories.base + covariance.cost(
        covariance.parameters, trajectories.statistics, schedule
    )


@torch.enable_grad()
def fit(
    family: F,
    trajectories: Trajectories,
    schedule: Schedule,
    objective: str = "alpha2",
    validation: Trajectories | None = None,
    start: Tensor | None = None,
    max_iterations: int = 500,
) -> Fit[F]:
    """Minimise the objective by L-BFGS.

    Parameters
    ----------
    family
        The covariance; its own parameters are ignored.
    validation
        If given, the iterate that does best on these trajectories is kept (early stopping).
    start
        First iterate; by default the family's closed-form KL optimum.
    """
    checks.choice("objective", objective, OBJECTIVES)
    check_finite(trajectories)
    if validation is not None:
        check_finite(validation)
    began = time.perf_counter()
    first = family.initial(trajectories.statistics, schedule) if start is None else start
    shape = first.shape

    def value(x: np.ndarray, data: Trajectories, gradient: bool) -> tuple[float, np.ndarray]:
        parameters = torch.tensor(x, dtype=torch.float64).reshape(shape).requires_grad_(gradient)
        loss = objective_value(
            data.base + family.cost(parameters, data.statistics, schedule), objective
        )
        if not gradient:
            return float(loss), x
        loss = loss + family.penalty(parameters, schedule)
        (grad,) = torch.autograd.grad(loss, parameters)
        return float(loss.detach()), grad.flatten().numpy()

    least, best = math.inf, first.flatten().numpy()

    def keep(x: np.ndarray) -> None:
        nonlocal least, best
        if validation is not None:
            held_out = value(x, validation, gradient=False)[0]
            if held_out < least:
                least, best = held_out, x.copy()

    keep(first.flatten().numpy())
    lower = family.lower_bounds(first).flatten().tolist()
    result = minimize(
        lambda x: value(x, trajectories, gradient=True),
        first.flatten().numpy(),
        jac=True,
        method="L-BFGS-B",
        bounds=[(None if math.isinf(b) else b, None) for b in lower],
        callback=keep,
        options={"maxiter": max_iterations, "ftol": 1e-12, "gtol": 1e-8, "maxcor": 20},
    )
    x = result.x if validation is None else best
    parameters = torch.tensor(x, dtype=torch.float64).reshape(shape)
    final = float(value(parameters.flatten().numpy(), trajectories, gradient=False)[0])
    return Fit(
        family.with_parameters(parameters), final, int(result.nit), time.perf_counter() - began
    )


@torch.enable_grad()
def fit_sgd(
    family: F,
    draw: Callable[[int], Trajectories],
    schedule: Schedule,
    start: Tensor,
    objective: str = "alpha2",
    n_iterations: int = 5000,
    batch_size: int = 512,
    learning_rate: float = 1e-2,
    final_learning_rate: float = 1e-6,
    progress: bool = True,
) -> Fit[F]:
    """The paper's procedure (Algorithm 1, App. C.3): Adam on fresh trajectories at every step.

    Parameters
    ----------
    draw
        Function that returns the given number of freshly simulated trajectories.
    start
        First parameters, DDPM in the paper.
    """
    began = time.perf_counter()
    parameters = start.to(torch.float64, copy=True).requires_grad_(True)
    bounds = family.lower_bounds(start)
    optimizer = torch.optim.Adam([parameters], lr=learning_rate)
    schedule_lr = torch.optim.lr_scheduler.CosineAnnealingLR(
        optimizer, n_iterations, eta_min=final_learning_rate
    )
    value = math.nan
    bar = progress_bar(n_iterations, "tuning (sgd)", progress)
    for _ in range(n_iterations):
        data = draw(batch_size)
        optimizer.zero_grad()
        loss = objective_value(
            data.base + family.cost(parameters, data.statistics, schedule), objective
        )
        if not bool(torch.isfinite(loss)):
            raise FloatingPointError(
                f"tuning: Adam diverged, the objective is {float(loss.detach())}; use "
                'method="convex" or a lower learning rate'
            )
        (loss + family.penalty(parameters, schedule)).backward()  # type: ignore[no-untyped-call]
        optimizer.step()
        schedule_lr.step()
        with torch.no_grad():
            parameters.clamp_(min=bounds)
        value = float(loss.detach())
        bar.update()
    bar.close()
    fitted = family.with_parameters(parameters.detach())
    return Fit(fitted, value, n_iterations, time.perf_counter() - began)


class MeanCoefficients(Fittable):
    """Mean coefficients k_n, fitted together with an isotropic precision.

    Statistics: <a, a>, <a, b>, <b, b> over v_n. Parameters: (lambda_n, kappa_n = lambda_n k_n).
    """

    def statistics(self, step: ReverseStep, residual: Tensor) -> Tensor:
        """Statistics (B, 3). ``residual`` is that of the default mean, k_n = 1 - r_n."""
        b = step.denoised - step.x
        a = residual + (1.0 - step.ratio) * b
        products = [(a * a), (a * b), (b * b)]
        return torch.stack([p.sum(dim=(-2, -1)) for p in products], dim=1) / step.variance

    def cost(self, parameters: Tensor, statistics: Tensor, schedule: Schedule) -> Tensor:
        """Minus the log density of the residuals, up to a constant."""
        lam, kappa = parameters[:, 0], parameters[:, 1]
        coefficients = torch.stack([lam, -2.0 * kappa, kappa.square() / lam], dim=1)
        square = torch.einsum("snf,nf->s", statistics, coefficients)
        return 0.5 * (square - self.space.dim * lam.log().sum())

    def initial(self, statistics: Tensor, schedule: Schedule) -> Tensor:
        aa, ab, bb = statistics.mean(dim=0).unbind(dim=1)
        k = ab / bb
        lam = self.space.dim / (aa - 2.0 * k * ab + k.square() * bb)
        return torch.stack([lam, lam * k], dim=1)

    def lower_bounds(self, parameters: Tensor) -> Tensor:
        bounds = torch.full_like(parameters, -math.inf)
        bounds[:, 0] = 1e-6
        return bounds

    def penalty(self, parameters: Tensor, schedule: Schedule) -> Tensor:
        return roughness(parameters, schedule)

    def with_parameters(self, parameters: Tensor) -> Self:
        return type(self)(self.space, self.labels, parameters)

    def isotropic_statistics(self, statistics: Tensor, mean_coefficients: Tensor) -> Tensor:
        """|R|^2 / v_n for the given mean coefficients (N,): (S, N, 3) -> (S, N, 1)."""
        aa, ab, bb = statistics.unbind(dim=2)
        return (aa - 2.0 * mean_coefficients * ab + mean_coefficients.square() * bb)[..., None]

    @property
    def mean_coefficients(self) -> Tensor:
        """k_n = kappa_n / lambda_n, (N,)."""
        return self.parameters[:, 1] / self.parameters[:, 0]


def check_finite(trajectories: Trajectories) -> None:
    """Raise ValueError if a log density or a statistic is NaN or infinite."""
    good = torch.isfinite(trajectories.base) & torch.isfinite(trajectories.statistics).all(
        dim=-1
    ).all(dim=-1)
    if not bool(good.all()):
        raise ValueError(
            f"tuning: expected finite log densities, got {int((~good).sum())} of {len(good)} "
            "trajectories that are not; check the frames' energies"
        )
