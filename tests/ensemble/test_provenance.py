"""Provenance comes back from JSON as it was, and is compared with all that is known."""

from __future__ import annotations

import dataclasses
import json
from typing import Any

import numpy as np
import pytest

from openmm_vtdis import WeightedEnsemble
from openmm_vtdis.ensemble.provenance import Provenance, Stream

FULL = Provenance("p", "h", True, 5, (Stream("n", 3, 2, "s"),), 7, 1, reweighted=True)


def test_there_and_back() -> None:
    for provenance in (FULL, Provenance()):
        assert Provenance.from_json(json.loads(json.dumps(provenance.to_json()))) == provenance


@pytest.mark.parametrize(
    "change",
    [
        {"centred": "False"}, {"reweighted": 1}, {"n_steps": 5.0}, {"n_failed": None},
        {"proposal": 3}, {"n_failed": True}, {"streams": [{"numbers": 1, "n": 3, "batch_size": 2}]},
        {"streams": [{"numbers": "1", "n": "3", "batch_size": 2}]}, {"streams": [3]},
        {"streams": 3}, {"unheard_of": 1},
    ],
)  # fmt: skip
def test_values_of_another_type_are_refused(change: dict[str, Any]) -> None:
    with pytest.raises(ValueError, match="provenance: "):
        Provenance.from_json({**FULL.to_json(), **change})


def ensembles(*hamiltonians: str | None) -> list[WeightedEnsemble]:
    rng = np.random.default_rng(0)
    return [
        WeightedEnsemble(
            rng.normal(size=(4, 2, 3)), np.zeros(4), np.zeros(4),
            provenance=Provenance(hamiltonian=hamiltonian),
        )
        for hamiltonian in hamiltonians
    ]  # fmt: skip


def test_all_known_hamiltonians_are_compared_when_ensembles_are_pooled() -> None:
    for known in (("a", "b"), (None, "a", "b"), ("a", None, "b")):
        with pytest.raises(ValueError, match="expected one Hamiltonian"):
            WeightedEnsemble.concatenate(ensembles(*known))
    assert WeightedEnsemble.concatenate(ensembles(None, "a", "a")).provenance.hamiltonian == "a"


def test_all_runs_of_one_seed_are_compared_when_ensembles_are_pooled() -> None:
    """The third is a copy of the second but for rounding, the first another part of their run."""
    first, second, third = ensembles(None, None, None)
    third = dataclasses.replace(third, positions=second.positions + 1e-7)
    alike = Provenance(streams=(Stream("n", 8, 2, "s"),))
    parts = [dataclasses.replace(part, provenance=alike) for part in (first, second, third)]
    assert len(WeightedEnsemble.concatenate(parts[:2])) == 8  # control
    with pytest.raises(ValueError, match="ensembles 1 and 2 that were drawn with one seed"):
        WeightedEnsemble.concatenate(parts)
