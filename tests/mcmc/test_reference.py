"""The convergence report of reference data: by hand, and between chains."""

from __future__ import annotations

import dataclasses
import math

import pytest
import torch

from openmm_vtdis.core.space import Space
from openmm_vtdis.mcmc.reference import convergence_report
from openmm_vtdis.targets import double_well
from tests.mcmc.test_hmc import gaussian, short


def test_split_r_hat_by_hand() -> None:
    def r_hat(values: torch.Tensor) -> float:
        return convergence_report(values, values, 1, 0.8, 0.1).r_hat

    # Halves (0, 2), (1, 3), (0, 2), (1, 3): W = 2, means 1, 2, 1, 2: B = 2 * 1/3.
    values = torch.tensor([[0.0, 2.0, 1.0, 3.0], [0.0, 2.0, 1.0, 3.0]])
    assert r_hat(values) == pytest.approx(math.sqrt((0.5 * 2 + 1 / 3) / 2))
    assert math.isnan(r_hat(values[:, :3]))


def test_report_reads_well() -> None:
    report = short(double_well().target(), n_chains=50, n_samples=4, burn_in=20).report
    text = str(report)
    assert len(text.splitlines()) == 5
    assert "chains x samples  50 x 4" in text
    assert f"{report.virial:.4f} ± {report.virial_stderr:.4f}, exact 6" in text
    z = dataclasses.replace(report, virial=7.0, virial_stderr=0.5).virial_z
    assert z == 2.0


def test_standard_errors_come_from_the_spread_between_chains() -> None:
    """Repeating every sample adds no information, and no certainty."""
    energies = torch.randn(200, 5, generator=torch.Generator().manual_seed(0)).double()
    once = convergence_report(energies, energies, 1, 0.8, 0.1)
    often = convergence_report(energies.repeat(1, 10), energies.repeat(1, 10), 1, 0.8, 0.1)
    assert often.energy_stderr == pytest.approx(once.energy_stderr, rel=1e-12)
    assert once.energy_stderr == pytest.approx(1 / math.sqrt(1000), rel=0.15)


def test_data_that_does_not_match_its_report_is_refused() -> None:
    data = short(gaussian(Space(4, 2)), n_chains=4, n_samples=2)
    with pytest.raises(ValueError, match="expected 8 rows, got 7"):
        dataclasses.replace(data, positions=data.positions[:7])
