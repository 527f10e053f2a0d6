"""Log weights of noised frames: an array that knows what it is against."""

from __future__ import annotations

from typing import Any

import numpy as np
from numpy.typing import ArrayLike


class FrameLogWeights(np.ndarray):
    """What ``noise()`` returns, (n,) float64: an array, and slices of it, with one more attribute.

    Results of arithmetic are plain arrays.

    Attributes
    ----------
    proposal
        Digest of the proposal density (:mod:`~openmm_vtdis.provenance`); None if it is not known.
    """

    proposal: str | None

    @classmethod
    def of(cls, values: ArrayLike, proposal: str) -> FrameLogWeights:
        """Log weights (n,) against a proposal."""
        self = np.array(values, dtype=np.float64).view(cls)
        self.proposal = proposal
        return self

    def __array_finalize__(self, other: Any) -> None:
        self.proposal = getattr(other, "proposal", None)

    def __array_wrap__(  # type: ignore[override]
        self, array: np.ndarray, context: Any = None, return_scalar: bool = False
    ) -> Any:
        plain = np.asarray(array)
        return plain[()] if return_scalar else plain
