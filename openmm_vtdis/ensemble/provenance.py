"""Provenance of weights: their proposal, their random numbers, and what was done to them.

Generated samples and noised frames are two sides of one problem only if one density drew the
former and weighs the latter, with the same network, grid, covariance and coordinates, and if both
are weighed for one Hamiltonian. Both sides carry the fingerprint of all of it, so that mixed ones
are an error, and not a number that is off by many of its errors.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import Any, Self


@dataclass(frozen=True)
class Stream:
    """A stream of random numbers that samples were drawn with.

    Attributes
    ----------
    numbers
        Fingerprint of the rng (:func:`~openmm_vtdis.storage.fingerprint.stream_fingerprint`).
    n, batch_size
        Samples that were drawn with them, and how many at once.
    sampler
        Fingerprint of the sampler and its steps: two streams with the same one, and as many samples
        at once, give the same samples from the same numbers.
    """

    numbers: str
    n: int
    batch_size: int
    sampler: str | None = None


@dataclass(frozen=True)
class Provenance:
    """Provenance of log weights; immutable, and carried along when they are changed.

    Attributes
    ----------
    proposal
        Fingerprint of the density that they are against; None: not known, or several.
    hamiltonian
        Fingerprint of the Hamiltonian that they are for; None: not known.
    centred
        Whether configurations stand for all their translates; None: not known.
    n_steps
        Network evaluations of a trajectory, of one sampler.
    streams
        Streams of random numbers of generated samples.
    resampled_from
        Number of samples that these were drawn from by their weights; None: not resampled.
    n_failed
        Samples without weight that resampling left behind, for want of an energy.
    reweighted
        Whether they are for another Hamiltonian or temperature than the samples were drawn for.
    unweighted
        Whether the weights were set aside.
    selected_by_weight
        Whether samples without weight were removed.
    concatenated
        Whether they are against several proposals.
    """

    proposal: str | None = None
    hamiltonian: str | None = None
    centred: bool | None = None
    n_steps: int | None = None
    streams: tuple[Stream, ...] = ()
    resampled_from: int | None = None
    n_failed: int = 0
    reweighted: bool = False
    unweighted: bool = False
    selected_by_weight: bool = False
    concatenated: bool = False

    def replace(self, **changes: Any) -> Self:
        """A copy with the given changes."""
        return dataclasses.replace(self, **changes)

    def to_json(self) -> dict[str, Any]:
        """Everything that differs from the default, JSON-able."""
        document = dataclasses.asdict(self)
        default = dataclasses.asdict(Provenance())
        return {name: value for name, value in document.items() if value != default[name]}

    @classmethod
    def from_json(cls, document: object) -> Provenance:
        """Read what :meth:`to_json` wrote.

        Raises
        ------
        ValueError
            If it is something else.
        """
        if not isinstance(document, dict):
            raise ValueError(f"provenance: expected a dictionary, got {type(document).__name__}")
        try:
            streams = tuple(Stream(**stream) for stream in document.get("streams", ()))
            found = cls(**{**document, "streams": streams})
        except TypeError as error:
            raise ValueError(f"provenance: expected what this version writes: {error}") from error
        _check_types(found)
        for stream in streams:
            _check_types(stream)
        return found

    @staticmethod
    def pooled(parts: Sequence[Provenance]) -> Provenance:
        """Provenance of weights that are pooled into one set."""
        proposals = {part.proposal for part in parts}
        first = parts[0]
        resampled = [part.resampled_from for part in parts if part.resampled_from is not None]
        steps = {part.n_steps for part in parts}
        return Provenance(
            proposal=first.proposal if len(proposals) == 1 else None,
            hamiltonian=_known(part.hamiltonian for part in parts),
            centred=_known(part.centred for part in parts),
            n_steps=first.n_steps if len(steps) == 1 else None,
            streams=tuple(dict.fromkeys(stream for part in parts for stream in part.streams)),
            resampled_from=resampled[0] if resampled else None,
            n_failed=sum(part.n_failed for part in parts),
            reweighted=any(part.reweighted for part in parts),
            unweighted=any(part.unweighted for part in parts),
            selected_by_weight=any(part.selected_by_weight for part in parts),
            concatenated=len(proposals) > 1 or any(part.concatenated for part in parts),
        )


UNKNOWN = Provenance()
"""Provenance of weights from elsewhere."""


_TYPES: dict[str, tuple[type, ...]] = {
    "str": (str,), "int": (int,), "bool": (bool,),
    "str | None": (str, type(None)), "int | None": (int, type(None)),
    "bool | None": (bool, type(None)), "tuple[Stream, ...]": (tuple,),
}  # fmt: skip


def _check_types(part: Provenance | Stream) -> None:
    """Raise ValueError if a field has another type than it is declared with."""
    for field in dataclasses.fields(part):
        value, expected = vars(part)[field.name], _TYPES[str(field.type)]
        if type(value) not in expected:
            raise ValueError(f"provenance: {field.name}: expected {field.type}, got {value!r}")


def _known(values: Iterable[Any]) -> Any:
    """The first value that is known."""
    return next((value for value in values if value is not None), None)


def both(one: Any, other: Any) -> tuple[Any, Any]:
    """The two values if both are known; else None twice."""
    return (None, None) if one is None or other is None else (one, other)
