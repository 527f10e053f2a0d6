"""Weights in numpy, scikit-learn and deeptime give what the ensemble gives itself."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest

from openmm_vtdis import WeightedEnsemble

PAGE = Path(__file__).parents[2] / "docs" / "ecosystem.md"
Features = tuple[WeightedEnsemble, np.ndarray, np.ndarray]


@pytest.fixture(scope="module")
def features() -> Features:
    """Samples of two blobs that the target populates otherwise, some of zero weight nowhere."""
    rng = np.random.default_rng(0)
    x = rng.normal(size=(2_000, 1, 3))
    x[1_000:] += 6.0
    lw = 0.3 * rng.normal(size=2_000)
    lw[:1_000] += np.log(3.0)
    x[::50], lw[::50] = np.nan, -np.inf
    ensemble = WeightedEnsemble(x, lw, np.zeros(2_000))
    some = ensemble[ensemble.weights > 0.0]
    return some, some.positions[:, 0] ** 2, some.weights


def documented(fit: str, features: Features, **names: Any) -> Any:
    """The estimator that a line of the page fits."""
    _, f, w = features
    assert f"`{fit}`" in PAGE.read_text()
    return eval(fit, {"f": f, "w": w, **names})


def covariance(features: Features) -> np.ndarray:
    """By definition, from expectations."""
    some, f, _ = features
    centred = f - some.expectation(f).value
    return np.asarray(some.expectation(centred[:, :, None] * centred[:, None]).value)


def test_numpy(features: Features) -> None:
    some, f, w = features
    mean = np.average(f, axis=0, weights=w)
    np.testing.assert_allclose(mean, some.expectation(f).value)
    np.testing.assert_allclose(np.cov(f.T, aweights=w, ddof=0), covariance(features))


def test_scikit_learn(features: Features) -> None:
    some, f, _ = features
    preprocessing = pytest.importorskip("sklearn.preprocessing")
    names = {"StandardScaler": preprocessing.StandardScaler}
    scaler = documented("StandardScaler().fit(f, sample_weight=w)", features, **names)
    estimate = some.expectation(f)
    np.testing.assert_allclose(scaler.mean_, estimate.value)
    np.testing.assert_allclose(scaler.var_, np.diag(covariance(features)))
    # control: weights matter
    raw = preprocessing.StandardScaler().fit(f)
    assert (np.abs(raw.mean_ - estimate.value) > 4.0 * np.asarray(estimate.stderr)).all()


def test_clusters_of_scikit_learn(features: Features) -> None:
    """Centres are weighted means of their members."""
    some, f, _ = features
    cluster = pytest.importorskip("sklearn.cluster")
    fit = "KMeans(2, random_state=0).fit(f, sample_weight=w)"
    found = documented(fit, features, KMeans=cluster.KMeans)
    for label, centre in enumerate(found.cluster_centers_):
        inside = found.labels_ == label
        np.testing.assert_allclose(centre, some[inside].expectation(f[inside]).value)
    raw = cluster.KMeans(2, random_state=0).fit(f)
    assert not np.allclose(np.sort(raw.cluster_centers_, 0), np.sort(found.cluster_centers_, 0))


def test_deeptime(features: Features) -> None:
    some, f, _ = features
    package = pytest.importorskip("deeptime.covariance")
    fit = "Covariance(remove_data_mean=True, bessels_correction=False).fit(f, weights=w)"
    model = documented(fit, features, Covariance=package.Covariance).fetch_model()
    np.testing.assert_allclose(model.mean_0, some.expectation(f).value)
    np.testing.assert_allclose(model.cov_00, covariance(features))
