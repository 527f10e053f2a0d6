"""Log weights of noised frames, with their provenance."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from openmm_vtdis.core import checks
from openmm_vtdis.core.ess import Array
from openmm_vtdis.ensemble.provenance import UNKNOWN, Provenance

_JOINING = (np.concatenate, np.append, np.hstack)


@dataclass(frozen=True, eq=False, repr=False)
class FrameLogWeights(np.lib.mixins.NDArrayOperatorsMixin):
    """Log weights of frames, as ``log_weights()`` returns them. Immutable.

    It stands for its log weights wherever numpy takes an array, and arithmetic gives plain arrays.
    Slices, copies, pickles and concatenations keep the provenance.

    Attributes
    ----------
    log_weights
        (n,) float64, read-only.
    provenance
        Where they are from, first of all the proposal that they are against.

    Raises
    ------
    ValueError
        If they are no log weights (n,): NaN or +inf.
    """

    log_weights: Array
    provenance: Provenance = UNKNOWN

    def __post_init__(self) -> None:
        values = checks.log_weights(self.log_weights).copy()
        values.flags.writeable = False
        object.__setattr__(self, "log_weights", values)

    def __reduce__(self) -> tuple[Any, ...]:
        return FrameLogWeights, (self.log_weights, self.provenance)

    def __len__(self) -> int:
        return len(self.log_weights)

    def __iter__(self) -> Iterator[float]:
        return iter(self.log_weights)

    def __getitem__(self, index: Any) -> Any:
        """One log weight, or those at a slice, mask or index array with the same provenance."""
        found = self.log_weights[index]
        whole = np.ndim(found) == 1 and len(found)
        return FrameLogWeights(found, self.provenance) if whole else found

    def __getattr__(self, name: str) -> Any:
        """All other attributes of an array: mean, std, shape, size, tolist, ..."""
        if name.startswith("_") or name in ("log_weights", "provenance"):
            raise AttributeError(name)
        return getattr(self.log_weights, name)

    def __repr__(self) -> str:
        return f"FrameLogWeights({len(self)} frames, {np.array2string(self.log_weights)})"

    @staticmethod
    def concatenate(parts: Sequence[FrameLogWeights]) -> FrameLogWeights:
        """Pool log weights of several frames or runs.

        Raises
        ------
        ValueError
            If they are against several proposals, or some are copies of others: fresh noise gives
            every frame another log weight.
        """
        parts = list(parts)
        if not parts or not all(isinstance(part, FrameLogWeights) for part in parts):
            raise ValueError(
                "concatenate: expected FrameLogWeights, as log_weights() gives them, got "
                f"{', '.join(type(part).__name__ for part in parts) or 'none'}"
            )
        if len({part.provenance.proposal for part in parts}) > 1:
            raise ValueError(
                "concatenate: expected log weights against one proposal, got several; ask the same "
                "generator, with the same System, tuning and n_steps, for those of all frames"
            )
        pooled = np.concatenate([part.log_weights for part in parts])
        finite = pooled[np.isfinite(pooled)]
        copies = len(finite) - len(np.unique(finite))
        alone = sum(_copies(part.log_weights) for part in parts)
        if copies > alone:
            raise ValueError(
                f"concatenate: expected log weights of independent noise, got {copies - alone} "
                "that stand in two of the parts; were they made with the same seed?"
            )
        return FrameLogWeights(pooled, Provenance.pooled([part.provenance for part in parts]))

    # -- numpy ----------------------------------------------------------------------------------
    def __array__(self, dtype: Any = None, copy: bool | None = None) -> Array:
        if copy or (dtype is not None and np.dtype(dtype) != self.log_weights.dtype):
            return np.array(self.log_weights, dtype=dtype)
        return self.log_weights

    def __array_ufunc__(self, ufunc: Any, method: str, *inputs: Any, **kwargs: Any) -> Any:
        if any(isinstance(out, FrameLogWeights) for out in kwargs.get("out", ())):
            del kwargs["out"]  # of lw += 1, which makes a new array
        if method == "at":
            raise TypeError("FrameLogWeights are immutable; take numpy.array(...) of them")
        return getattr(ufunc, method)(*map(_plain, inputs), **kwargs)

    def __array_function__(
        self, function: Callable[..., Any], types: Any, args: Any, kwargs: Any
    ) -> Any:
        if function in _JOINING and not kwargs.keys() - {"axis"}:
            parts = list(args[0]) if len(args) == 1 else list(args)
            if all(isinstance(part, FrameLogWeights) for part in parts):
                return FrameLogWeights.concatenate(parts)
        return function(*map(_plain, args), **{k: _plain(v) for k, v in kwargs.items()})


def _plain(value: Any) -> Any:
    """Replace FrameLogWeights by arrays, also inside of lists and tuples."""
    if isinstance(value, FrameLogWeights):
        return value.log_weights
    if isinstance(value, list | tuple):
        return type(value)(map(_plain, value))
    return value


def _copies(log_weights: Array) -> int:
    finite = log_weights[np.isfinite(log_weights)]
    return len(finite) - len(np.unique(finite))
