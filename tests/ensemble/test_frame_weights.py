"""Log weights of frames: numpy takes them, and nothing loses what they are against."""

from __future__ import annotations

import copy
import pickle

import numpy as np
import pytest
import torch

from openmm_vtdis.ensemble import FrameLogWeights
from openmm_vtdis.ensemble.provenance import Provenance

KERNEL = Provenance("kernel")


def test_log_weights_of_frames_are_an_array() -> None:
    lw = FrameLogWeights(np.array([0.0, 1.0, 2.0 + 1e-12]), KERNEL)
    assert lw[1:].provenance == lw[lw > 0.0].provenance == KERNEL
    for same in (copy.copy(lw), copy.deepcopy(lw), pickle.loads(pickle.dumps(lw))):
        assert same.provenance == KERNEL
        assert not same.log_weights.flags.writeable
        np.testing.assert_array_equal(same, lw)
    for plain in (-lw, lw + lw, np.exp(lw), 1.0 - lw, np.append(lw, 3.0), np.asarray(lw)):
        assert type(plain) is np.ndarray
    assert np.mean(lw) == lw.mean() == lw.log_weights.mean()
    assert (lw.std(), lw.var(ddof=1)) == (np.std(lw), np.var(lw.log_weights, ddof=1))
    assert (lw.min(), lw.max(), lw.shape, lw.dtype) == (0.0, lw[2], (3,), np.float64)
    assert lw.tolist() == lw.log_weights.tolist()
    assert (lw.size, lw.ndim, lw.argmax()) == (3, 1, 2)
    assert lw.sum(axis=0) == lw.reshape(3, 1).sum() == lw.astype(np.float64).sum()
    assert not hasattr(lw, "no_such_thing")
    assert len(lw[lw > 5.0]) == 0
    before = np.array(lw)
    with pytest.raises(TypeError, match="immutable"):
        np.add.at(lw, [0], 1.0)
    other = lw
    other += 1.0
    assert type(other) is np.ndarray
    np.testing.assert_array_equal(lw, before)
    assert isinstance(lw[2], float)
    assert torch.equal(torch.tensor(lw), torch.tensor(lw.log_weights))
    assert list(lw) == lw.log_weights.tolist()


def test_log_weights_that_are_joined_keep_their_proposal_or_are_refused() -> None:
    one, two = (FrameLogWeights(np.arange(3.0) + k, KERNEL) for k in (0.0, 0.5))
    for joined in (
        FrameLogWeights.concatenate([one, two]),
        np.concatenate([one, two]),
        np.append(one, two),
        np.hstack([one, two]),
        np.concatenate([one, two], axis=0),
    ):
        assert isinstance(joined, FrameLogWeights)
        assert joined.provenance == KERNEL
        assert len(joined) == 6
    assert (
        len(FrameLogWeights.concatenate([FrameLogWeights([1.0, 1.0], KERNEL), one[:0:-1]][:1])) == 2
    )
    other = FrameLogWeights(np.arange(3.0) + 0.25, Provenance("another"))
    with pytest.raises(ValueError, match="expected log weights against one proposal, got several"):
        np.concatenate([one, other])
    with pytest.raises(ValueError, match="independent noise, got 3 that stand in two of the parts"):
        np.concatenate([one, one])
    with pytest.raises(ValueError, match="expected FrameLogWeights, as log_weights.* got ndarray"):
        FrameLogWeights.concatenate([np.arange(3.0)])  # type: ignore[list-item]
    assert type(np.concatenate([one, np.arange(2.0)])) is np.ndarray
