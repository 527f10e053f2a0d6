"""Eigendecompositions in threads are those of one call."""

from __future__ import annotations

import pytest
import torch

from openmm_vtdis.core.eigh import eigh, in_threads


@pytest.mark.parametrize("n", [1, 2, 37])
def test_shares_are_put_together_in_order(n: int) -> None:
    rng = torch.Generator().manual_seed(n)
    matrices = torch.randn(n, 40, 40, dtype=torch.float64, generator=rng)
    matrices = matrices + matrices.mT
    threads = torch.get_num_threads()
    values, vectors = in_threads(matrices)
    assert torch.get_num_threads() == threads
    torch.testing.assert_close(values, eigh(matrices)[0], rtol=1e-12, atol=1e-12)
    torch.testing.assert_close((vectors * values[:, None]) @ vectors.mT, matrices)


def test_an_error_in_a_thread_is_the_callers(monkeypatch: pytest.MonkeyPatch) -> None:
    def fails(matrices: torch.Tensor) -> None:
        raise torch.linalg.LinAlgError("did not converge")

    monkeypatch.setattr(torch.linalg, "eigh", fails)
    with pytest.raises(torch.linalg.LinAlgError, match="did not converge"):
        in_threads(torch.eye(40, dtype=torch.float64)[None])
