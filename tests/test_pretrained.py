"""Shipped generators: they load, sample, and are documented by the files beside them."""

from __future__ import annotations

import dataclasses
import json

import numpy as np
import pytest

from openmm_vtdis import DiffusionBoltzmannGenerator, pretrained
from openmm_vtdis.pretrained.train import RECIPES, TEST_SEED, TRAIN_SEED


def test_what_ships() -> None:
    assert set(pretrained.names()) <= set(RECIPES)
    assert {"aldp-800K", "dw4", "lj13"} <= set(pretrained.names())
    assert TRAIN_SEED != TEST_SEED


@pytest.mark.parametrize("name", pretrained.names())
def test_a_shipped_generator_loads_and_samples(name: str) -> None:
    gen = DiffusionBoltzmannGenerator.from_pretrained(name)
    assert gen.kernel is not None
    assert gen.kernel.schedule.n_steps == RECIPES[name].n_steps
    ensemble = gen.sample(12, n_steps=40, seed=0, progress=False)
    assert np.isfinite(ensemble.log_weights).all()
    assert ensemble.log_weights.std() < 8.0  # an untrained network is hundreds of nats off


@pytest.mark.parametrize("name", pretrained.names())
def test_card_and_log_are_of_the_script_as_it_stands(name: str) -> None:
    folder = pretrained.path(name).parent
    record = json.loads((folder / f"{name}.json").read_text())
    assert record["recipe"] == json.loads(json.dumps(dataclasses.asdict(RECIPES[name])))
    assert len(record["fine"]) == len(RECIPES[name].fine_iterations)
    assert record["seeds"] == {"train": TRAIN_SEED, "test": TEST_SEED, "model": 7}
    assert record["log"]["iterations"][-1] == RECIPES[name].n_iterations
    card = (folder / f"{name}.md").read_text()
    assert RECIPES[name].network.removeprefix("egnn-").replace("x", " layers x ") in card


def test_an_unknown_name_lists_those_that_ship() -> None:
    with pytest.raises(ValueError, match="expected one of aldp-800K, dw4, lj13, got 'water'"):
        pretrained.path("water")
