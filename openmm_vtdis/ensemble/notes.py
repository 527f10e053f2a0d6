"""What samples say of themselves, as JSON: where they are from, and what was done with them."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from typing import Any


def json_copy(metadata: object) -> dict[str, Any]:
    """A copy of notes, of which nobody else has a part.

    Raises
    ------
    ValueError
        If they are no dictionary of JSON-able values.
    """
    if not isinstance(metadata, dict):
        raise ValueError(f"metadata: expected a dictionary, got {type(metadata).__name__}")
    try:
        copy: dict[str, Any] = json.loads(json.dumps(metadata, allow_nan=False))
    except (TypeError, ValueError) as error:
        raise ValueError(
            f"metadata: expected JSON-able values without NaN or infinity, got {error}"
        ) from error
    return copy


def parts(metadata: Mapping[str, Any]) -> list[Mapping[str, Any]]:
    """Notes of the ensembles that one was concatenated from; none if it was not."""
    found = metadata.get("concatenated")
    return [part for part in found if isinstance(part, dict)] if isinstance(found, list) else []


def says(key: str, metadata: Mapping[str, Any]) -> Any:
    """What notes have under a key; if nothing, what the first part has that has anything."""
    if key in metadata:
        return metadata[key]
    return next((found for part in parts(metadata) if (found := says(key, part))), None)


_KEPT = (
    "proposal", "hamiltonian", "centred", "streams", "resampled_from", "reweighted", "unweighted",
    "selected_by_weight", "n_failed",
)  # fmt: skip
"""What only the package itself may take away."""


def kept(metadata: Mapping[str, Any]) -> dict[str, Any]:
    """What notes say of the weights, which stays true whatever else is noted."""
    found = {key: says(key, metadata) for key in _KEPT}
    return {key: value for key, value in found.items() if value is not None}


def pooled(notes: Sequence[Mapping[str, Any]]) -> dict[str, Any]:
    """Notes of ensembles that become one: as they are if they differ in the streams at most."""
    rest = [{k: v for k, v in note.items() if k != "streams"} for note in notes]
    if any(other != rest[0] for other in rest):
        return {"concatenated": [dict(note) for note in notes]}
    streams = [stream for note in notes for stream in note.get("streams", [])]
    return {**rest[0], **({"streams": list(dict.fromkeys(streams))} if streams else {})}


def draws(metadata: Mapping[str, Any]) -> list[tuple[str, Any]]:
    """Each stream of random numbers that samples are from, with the run that used it."""
    said = [str(stream).partition("/") for stream in metadata.get("streams", [])]
    own = [(stream, (metadata.get("proposal"), sizes)) for stream, _, sizes in said]
    return own + [draw for part in parts(metadata) for draw in draws(part)]


def both(key: str, one: Mapping[str, Any], other: Mapping[str, Any]) -> tuple[Any, Any]:
    """What two say, where both know it; else twice None."""
    a, b = says(key, one), says(key, other)
    return (None, None) if a is None or b is None else (a, b)
