"""Covariance as a function of the noise level: one tuning for any number of steps."""

from __future__ import annotations

import math
from typing import Self

import numpy as np
import torch
from torch import Tensor

from openmm_vtdis.diffusion.covariance.base import COVARIANCES
from openmm_vtdis.diffusion.covariance.constant import Diagonal
from openmm_vtdis.diffusion.schedule import Schedule, widening


@COVARIANCES.register
class TimeNetwork(Diagonal):
    r"""eta_L(t_n, t_{n-1}) from a small network of log t: one tuning for any number of steps.

    With the denoiser's mean square error per degree of freedom c(t_n), the reverse kernel closest
    to the forward process has variance v_n + (1 - r_n)^2 c(t_n), whatever the denoiser. Hence

        eta_n = 1 + (1 - r_n) / r_n g(log t_n),    g = c / t^2 >= 0,

    in which the grid enters through r_n only, and the network gives g. (A free factor in front
    could not be told from g on a geometric grid, where r_n is constant, and would not hold on
    another.) Parameters: the network's, (1, P).
    """

    kind = "time-network"
    _WIDTH = 16

    def precision(self, parameters: Tensor, levels: Tensor) -> tuple[Tensor, Tensor]:
        return super().precision(1.0 / self._eta(parameters, levels), levels)

    def _eta(self, parameters: Tensor, levels: Tensor) -> Tensor:
        """(N, K) at levels (N, 2) = (t_{n-1}, t_n)."""
        width, n_classes = self._WIDTH, len(self.multiplicity)
        log_t = levels[:, 1:].log()
        sizes = [width, width, width * width, width, width * n_classes, n_classes]
        w1, b1, w2, b2, w3, b3 = parameters[0].split(sizes)
        hidden = torch.tanh(log_t * w1 + b1)
        hidden = torch.tanh(hidden @ w2.reshape(width, width) + b2)
        g = torch.nn.functional.softplus(hidden @ w3.reshape(width, n_classes) + b3 - 3.0)
        return 1.0 + widening(levels)[:, None] * g

    def cost(self, parameters: Tensor, statistics: Tensor, schedule: Schedule) -> Tensor:
        return super().cost(1.0 / self._eta(parameters, schedule.pairs), statistics, schedule)

    def eta(self, schedule: Schedule) -> Tensor:
        precision = 1.0 / self._eta(self.parameters, schedule.pairs)
        return Diagonal(self.space, self.labels, precision).eta(schedule)

    def initial(self, statistics: Tensor, schedule: Schedule) -> Tensor:
        return self.ddpm_parameters(schedule)

    def ddpm_parameters(self, schedule: Schedule) -> Tensor:
        """Small random weights from a fixed seed, biases that spread the units over log t."""
        width, n_classes = self._WIDTH, len(self.multiplicity)
        rng = np.random.default_rng(0)
        log_t = schedule.tensor[1:].log()
        centres = np.linspace(float(log_t.min()), float(log_t.max()), width)
        parts = [
            np.ones(width),
            -centres,
            rng.normal(size=width * width) / math.sqrt(width),
            np.zeros(width),
            rng.normal(size=width * n_classes) * 0.01,
            np.zeros(n_classes),
        ]
        return torch.tensor(np.concatenate(parts))[None]

    def lower_bounds(self, parameters: Tensor) -> Tensor:
        return torch.full_like(parameters, -math.inf)

    def with_parameters(self, parameters: Tensor) -> Self:
        return type(self)(self.space, self.labels, parameters)
