r"""Reference samples of independent chains, with a report of their convergence.

A check needs no reference value: integrating by parts::

    < x . grad u > = d,      d = the dimension of the space,

for every Boltzmann density. Standard errors are taken from the spread *between* chains, which are
independent whatever the correlation along them.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import numpy as np
from arviz_stats.base import array_stats
from torch import Tensor


@dataclass(frozen=True)
class ConvergenceReport:
    """Convergence of an HMC run: compare ``virial`` with ``dim``, and ``r_hat`` with 1.

    Attributes
    ----------
    n_chains, n_samples
        Independent chains, and samples kept of each.
    acceptance
        Mean acceptance probability after burn-in, over all temperatures.
    step_size
        The adapted step size h.
    energy, energy_stderr, energy_std
        Mean of u in kT, its standard error (from the spread between chains), and the standard
        deviation of u itself.
    virial, virial_stderr
        Mean of x . grad u, and its standard error. The exact value is ``dim``.
    dim
        Degrees of freedom d.
    r_hat
        Split R-hat of u; NaN with fewer than 4 samples per chain.
    exchanges
        Share of accepted exchanges of each pair of neighbours on a ladder of temperatures; NaN
        where a pair never had its turn.
    """

    n_chains: int
    n_samples: int
    acceptance: float
    step_size: float
    energy: float
    energy_stderr: float
    energy_std: float
    virial: float
    virial_stderr: float
    dim: int
    r_hat: float
    exchanges: tuple[float, ...] = ()

    @property
    def virial_z(self) -> float:
        """(virial - d) in standard errors: beyond 4 means the samples are wrong."""
        return (self.virial - self.dim) / self.virial_stderr

    def __str__(self) -> str:
        rows = [
            ("chains x samples", f"{self.n_chains} x {self.n_samples}"),
            ("acceptance", f"{self.acceptance:.3f} at step size {self.step_size:.4g}"),
            ("<u>", f"{self.energy:.4f} ± {self.energy_stderr:.4f} kT, std {self.energy_std:.4f}"),
            (
                "<x·∇u>",
                f"{self.virial:.4f} ± {self.virial_stderr:.4f}, exact {self.dim} "
                f"(z = {self.virial_z:+.1f})",
            ),
            ("split R-hat of u", f"{self.r_hat:.4f}"),
        ]
        if self.exchanges:
            rows.append(("exchanges", ", ".join(f"{share:.1%}" for share in self.exchanges)))
        return "\n".join(f"{name:<18}{value}" for name, value in rows)


@dataclass(frozen=True)
class ReferenceData:
    """Samples of a target from independent chains.

    Attributes
    ----------
    positions
        (n_chains * n_samples, M, D) in nm, float64, on the target's space. Chain by chain: row
        ``c * n_samples + k`` is sample k of chain c, so that a split of the rows at a multiple of
        ``n_samples`` is a split between *chains* (training and test frames that share no chain).
    reduced_energies
        (n_chains * n_samples,) in kT.
    report
        Convergence of the chains.
    """

    positions: Tensor
    reduced_energies: Tensor
    report: ConvergenceReport

    def __post_init__(self) -> None:
        n = self.report.n_chains * self.report.n_samples
        if len(self.positions) != n or tuple(self.reduced_energies.shape) != (n,):
            raise ValueError(
                f"positions and reduced_energies: expected {n} rows, got {len(self.positions)} "
                f"and shape {tuple(self.reduced_energies.shape)}"
            )


def convergence_report(
    energies: Tensor,
    virials: Tensor,
    dim: int,
    acceptance: float,
    step_size: float,
    exchanges: tuple[float, ...] = (),
) -> ConvergenceReport:
    """Report on C chains of K samples from their energies and virials, (C, K) each."""
    n_chains, n_samples = energies.shape

    def stderr(values: Tensor) -> float:
        return float(values.mean(dim=1).std()) / math.sqrt(n_chains)

    return ConvergenceReport(
        n_chains=n_chains,
        n_samples=n_samples,
        acceptance=acceptance,
        step_size=step_size,
        energy=float(energies.mean()),
        energy_stderr=stderr(energies),
        energy_std=float(energies.std()),
        virial=float(virials.mean()),
        virial_stderr=stderr(virials),
        dim=dim,
        r_hat=_split_r_hat(energies),
        exchanges=exchanges,
    )


def _split_r_hat(values: Tensor) -> float:
    """Split R-hat (Gelman et al., BDA3, Sec. 11.4) of (C, K); NaN for K < 4 or where all is one."""
    if values.shape[1] < 4 or float(values.std()) == 0.0:
        return math.nan
    with np.errstate(divide="ignore"):  # infinite where chains stand still, each elsewhere
        return float(array_stats.rhat(values.numpy(), chain_axis=0, draw_axis=1, method="split"))
