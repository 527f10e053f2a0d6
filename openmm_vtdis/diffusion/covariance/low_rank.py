"""Covariances of low rank plus a multiple of the identity."""

from __future__ import annotations

import torch
from torch import Tensor

from openmm_vtdis.diffusion.covariance.base import COVARIANCES, Ranked
from openmm_vtdis.diffusion.covariance.constant import ClassCovariance
from openmm_vtdis.diffusion.schedule import Schedule


@COVARIANCES.register
class LowRank(Ranked, ClassCovariance):
    """Sigma_n = v_n (A A^T + alpha I), A of ``rank`` columns that respect the labels (Eq. 8).

    Parameters, (N, 1 + k rank): log alpha, and A in class-sum coordinates. Not convex; the fit
    starts at the optimum under KL, probabilistic PCA (Tipping & Bishop 1999). The paper's start,
    A = 0, is a stationary point of the objective for every alpha and cannot be left by a gradient.
    """

    kind = "low-rank"

    @property
    def _columns(self) -> int:
        return min(self.rank, len(self.between))

    def precision(self, parameters: Tensor, levels: Tensor) -> tuple[Tensor, Tensor]:
        alpha = parameters[:, :1].exp()
        k = len(self.between)
        identity = torch.eye(k, dtype=torch.float64)
        columns = parameters[:, 1:].reshape(len(parameters), k, self._columns)
        covariance = columns @ columns.mT + alpha[:, :, None] * identity
        lam = (1.0 / alpha).expand(-1, len(self.multiplicity))
        if k == 0:
            return lam, covariance
        return lam, torch.linalg.cholesky(torch.cholesky_inverse(torch.linalg.cholesky(covariance)))

    def initial(self, statistics: Tensor, schedule: Schedule) -> Tensor:
        within, between = self._split(statistics)
        k, rank, n_dims = len(self.between), self._columns, self.space.n_dims
        scatter = torch.einsum("snid,snjd->nij", between, between) / (len(statistics) * n_dims)
        spread = within.mean(dim=0).sum(dim=1) / n_dims
        if k == 0:
            return (spread / self.space.rank).log()[:, None]
        values, vectors = torch.linalg.eigh(scatter)
        rest = spread + values[:, : k - rank].sum(dim=1)
        alpha = rest / max(self.space.rank - rank, 1)
        if self.space.rank == rank:
            alpha = 0.5 * values[:, 0]
        excess = (values[:, k - rank :] - alpha[:, None]).clamp_min(1e-4)
        columns = vectors[:, :, k - rank :] * excess.sqrt()[:, None]
        return torch.cat([alpha.log()[:, None], columns.flatten(1)], dim=1)

    def ddpm_parameters(self, schedule: Schedule) -> Tensor:
        columns = 1e-2 * torch.eye(len(self.between), self._columns, dtype=torch.float64)
        row = torch.cat([torch.zeros(1, dtype=torch.float64), columns.flatten()])
        return row.repeat(schedule.n_steps, 1)
