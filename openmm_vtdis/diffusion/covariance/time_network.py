"""Covariance as a function of the noise level: one tuning for any number of steps."""

from __future__ import annotations

import math

import numpy as np
import torch
from torch import Tensor
from typing_extensions import Self

from openmm_vtdis.diffusion.covariance.classes import Diagonal
from openmm_vtdis.diffusion.schedule import Schedule


class TimeNetwork(Diagonal):
    r"""eta_L(t_n, t_{n-1}) from a small network of log t: one tuning for any number of steps.

    The exact reverse kernel has variance v_n + (1 - r_n)^2 c(t_n), with c the posterior variance
    of x_0 per degree of freedom, a function of t alone. Hence

        eta_n = exp(h(log t_n)) (1 + (1 - r_n) / r_n g(log t_n)),    g = c / t^2 >= 0,

    in which h = 0 for an exact denoiser: the network gives h and g, and the grid enters through r_n
    only. Parameters: the network's, (1, P).
    """

    kind = "time-network"
    _WIDTH = 16

    def precision(self, parameters: Tensor, levels: Tensor) -> tuple[Tensor, Tensor]:
        return super().precision(1.0 / self._eta(parameters, levels), levels)

    def _eta(self, parameters: Tensor, levels: Tensor) -> Tensor:
        """(N, K) at levels (N, 2) = (t_{n-1}, t_n)."""
        width, n_classes = self._WIDTH, len(self.multiplicity)
        log_t = levels[:, 1:].log()
        sizes = [width, width, width * width, width, width * 2 * n_classes, 2 * n_classes]
        w1, b1, w2, b2, w3, b3 = parameters[0].split(sizes)
        hidden = torch.tanh(log_t * w1 + b1)
        hidden = torch.tanh(hidden @ w2.reshape(width, width) + b2)
        h, g = (hidden @ w3.reshape(width, 2 * n_classes) + b3).chunk(2, dim=1)
        r = (levels[:, :1] / levels[:, 1:]).square()
        return h.exp() * (1.0 + (1.0 - r) / r * torch.nn.functional.softplus(g - 3.0))

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
            rng.normal(size=width * 2 * n_classes) * 0.01,
            np.zeros(2 * n_classes),
        ]
        return torch.tensor(np.concatenate(parts))[None]

    def lower_bounds(self, parameters: Tensor) -> Tensor:
        return torch.full_like(parameters, -math.inf)

    def with_parameters(self, parameters: Tensor) -> Self:
        return type(self)(self.space, self.labels, parameters)
